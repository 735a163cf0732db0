"""The engine behind `sbrush serve`: what shares a batch, what is dropped, who is refused."""

import dataclasses
import socket
import threading
from types import SimpleNamespace

import pytest
from diffusers import LCMScheduler

from sbrush.console import SbrushError
from sbrush.models.ladder import Ladder
from sbrush.sampling.artist import Artist
from sbrush.sampling.generation import student_images
from sbrush.sampling.seeds import LARGEST_SEED
from sbrush.serving.address import bind
from sbrush.serving.engine import Busy, Engine, Replaced, Stopped
from sbrush.serving.requests import ImageRequest, Settings, Turn, image_requests
from serving import load

SECONDS = 30


@dataclasses.dataclass(frozen=True)
class Gated(Artist):
    """An artist that draws when its gate is open, and fails at the prompt "bad". `batches`: what was drawn together."""

    gate: threading.Event = dataclasses.field(default_factory=threading.Event)
    batches: list = dataclasses.field(default_factory=list)

    def draw(self, prompts, seeds, *, batch):
        self.batches.append(list(prompts))
        assert self.gate.wait(SECONDS)
        if "bad" in prompts:
            raise SbrushError("overflow", "none")
        yield from super().draw(prompts, seeds, batch=batch)


@pytest.fixture(scope="module")
def student(tiny_teacher):
    """A student that takes 1 to 4 steps."""
    model = load(tiny_teacher).student
    scheduler = LCMScheduler.from_config(model.scheduler.config, original_inference_steps=4)
    return dataclasses.replace(model, ladder=Ladder.read(scheduler, 4))


@pytest.fixture
def artist(student):
    return Gated(student, "float32")


def asked(*prompts, steps=None):
    return [ImageRequest(prompt, 1, Settings(steps)) for prompt in prompts]


def occupied(engine, artist):
    """The engine draws something and does not get on until the gate opens."""
    (future,) = engine.submit(asked("first"))
    while not future.running():
        pass
    return future


def test_what_waits_is_drawn_together_if_its_settings_are_the_same(artist):
    with Engine(artist, batch=3) as engine:
        first = occupied(engine, artist)
        futures = [
            *engine.submit(asked("a", "b")), *engine.submit(asked("c", steps=2)), *engine.submit(asked("d", "e", "f")),
        ]  # fmt: skip
        assert engine.waiting == 6
        artist.gate.set()
        drawn = [future.result(SECONDS) for future in futures]
    assert artist.batches == [["first"], ["a", "b", "d"], ["c"], ["e", "f"]]
    assert first.result().record["prompt"] == "first" and [one.record["steps"] for one in drawn] == [4, 4, 2, 4, 4, 4]
    for one, prompt in zip(drawn, "abcdef", strict=True):
        (alone,) = next(student_images(artist.student, [prompt], [1], steps=one.record["steps"]))
        assert one.record["prompt"] == prompt and (one.image.int() - alone.int()).abs().max() <= 2


def test_a_newer_turn_takes_the_place_of_what_its_client_waits_for(artist):
    with Engine(artist, batch=1) as engine:
        first = occupied(engine, artist)
        old = engine.submit(asked("o", "l"), Turn("me", 1))
        other = engine.submit(asked("x"), Turn("you", 1))
        new = engine.submit(asked("n", "e", "w"), Turn("me", 2))
        same = engine.submit(asked("s"), Turn("me", 2))  # of a grid, whose images are asked for one by one
        assert all(isinstance(future.exception(0), Replaced) for future in old)
        with pytest.raises(Replaced):
            engine.submit(asked("late"), Turn("me", 1))
        artist.gate.set()
        for future in (first, *other, *new, *same):
            assert future.result(SECONDS)
    assert artist.batches == [["first"], ["n"], ["e"], ["w"], ["x"], ["s"]]


def test_what_is_being_drawn_is_not_replaced(artist):
    with Engine(artist) as engine:
        (future,) = engine.submit(asked("a"), Turn("me", 1))
        while not future.running():
            pass
        (newer,) = engine.submit(asked("b"), Turn("me", 2))
        artist.gate.set()
        assert future.result(SECONDS).record["prompt"] == "a" and newer.result(SECONDS).record["prompt"] == "b"


def test_a_queue_has_a_bound_and_takes_all_of_a_request_or_none(artist):
    with Engine(artist, waiting=3) as engine:
        occupied(engine, artist)
        engine.submit(asked("a", "b"), Turn("me", 1))
        with pytest.raises(Busy) as full:
            engine.submit(asked("c", "d"))
        assert full.value.seconds >= 1 and engine.waiting == 2
        engine.submit(asked("e", "f", "g"), Turn("me", 2))  # what is replaced makes room
        with pytest.raises(SbrushError, match="4 images in one request"):
            engine.submit(asked("h", "i", "j", "k"), Turn("me", 3))
        assert engine.waiting == 3  # a turn that is refused replaces nothing
        artist.gate.set()


def test_more_images_than_may_wait_at_all_are_no_matter_of_trying_again(artist):
    with Engine(artist, waiting=2) as engine:
        with pytest.raises(SbrushError, match="3 images in one request, and 2 may wait") as problem:
            engine.submit(asked("a", "b", "c"))
        assert problem.value.code == 2
        artist.gate.set()
        assert len([future.result() for future in engine.submit(asked("a", "b"))]) == 2


def test_what_nobody_waits_for_any_more_is_not_drawn(artist):
    with Engine(artist, waiting=2) as engine:
        occupied(engine, artist)
        gone, kept = engine.submit(asked("gone", "kept"))
        assert gone.cancel() and engine.waiting == 1
        (after,) = engine.submit(asked("after"))
        artist.gate.set()
        assert kept.result(SECONDS) and after.result(SECONDS)
    assert artist.batches == [["first"], ["kept", "after"]]


def test_one_image_that_fails_takes_no_other_with_it(artist):
    artist.gate.set()
    with Engine(artist) as engine:
        futures = engine.submit(asked("a", "bad", "b"))
        assert futures[0].result(SECONDS) and futures[2].result(SECONDS)
        with pytest.raises(SbrushError, match="overflow"):
            futures[1].result(SECONDS)
        assert engine.submit(asked("c"))[0].result(SECONDS)  # and the engine goes on


def test_an_engine_that_stops_draws_what_waits_and_takes_nothing_more(artist):
    with Engine(artist, batch=1) as engine:
        occupied(engine, artist)
        futures = engine.submit(asked("a", "b"))
        threading.Timer(0.2, artist.gate.set).start()
    assert all(future.result(0) for future in futures)
    with pytest.raises(Stopped):
        engine.submit(asked("c"))


def test_clients_are_not_remembered_for_ever(artist, monkeypatch):
    monkeypatch.setattr("sbrush.serving.engine.CLIENTS", 3)
    artist.gate.set()
    with Engine(artist) as engine:
        for client in range(20):
            engine.submit(asked("a"), Turn(str(client), 5))
        assert len(engine._turns) == 3


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((" ", 1, 1), "an empty prompt"),
        (("a" * 10_001, 1, 1), "10,001 characters"),
        (("a \ud800", 1, 1), "not text"),
        (("a", -1, 1), "not a seed"),
        (("a", 10**18 - 1, 2), "not a seed"),
        (("a", 1, 0), "0 images"),
        (("a", 1, 17), "17 images"),
    ],
)
def test_requests_that_make_no_sense(arguments, said):
    with pytest.raises(SbrushError, match=said) as problem:
        image_requests(*arguments, Settings())
    assert problem.value.code == 2


def test_the_largest_seeds_are_seeds():
    for count in (1, 2):
        last = image_requests("a", 10**18 - count, count, Settings())[-1]
        assert last.seed == LARGEST_SEED


def test_a_port_is_never_shared_with_another_program_on_windows(monkeypatch):
    """There SO_REUSEADDR lets two programs listen on one port; elsewhere it lets a server start again at once."""
    for platform, reused in (("linux", True), ("win32", False)):
        monkeypatch.setattr("sbrush.serving.address.sys", SimpleNamespace(platform=platform))
        with bind("127.0.0.1", 0) as sock:
            assert bool(sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR)) is reused
