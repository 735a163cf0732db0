"""`sbrush sample --interactive`: what each line does, and what a session refuses."""

import contextlib
import dataclasses
import io
import json
import sys
from types import SimpleNamespace

import pytest
import torch
from diffusers import LCMScheduler
from PIL import Image
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from conftest import sbrush
from sbrush.cli.interactive import (
    COMMANDS,
    Session,
    check_interactive,
    check_single,
    completer,
    run,
    terminal_image,
    typed_lines,
)
from sbrush.console import SbrushError
from sbrush.models.ladder import Ladder
from sbrush.sampling.editing import Edit
from sbrush.sampling.generation import student_images
from sbrush.sampling.images import to_image
from sbrush.sampling.targets import Target
from serving import load


@pytest.fixture(scope="module")
def artist(tiny_teacher):
    """Its student takes 1 to 4 steps."""
    one = load(tiny_teacher)
    scheduler = LCMScheduler.from_config(one.student.scheduler.config, original_inference_steps=4)
    student = dataclasses.replace(one.student, ladder=Ladder.read(scheduler, 4))
    return dataclasses.replace(one, student=student)


@pytest.fixture
def session(artist, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = []
    one = Session(artist, tmp_path / "out.png", show=shown.append)
    one.shown = shown
    return one


def record(path):
    with Image.open(path) as image:
        return json.loads(image.text["sbrush"])


def test_a_prompt_is_drawn_shown_and_written(session, artist, capsys):
    run(session, ["a cat", "", "  "])
    (image,) = session.shown
    assert image.tobytes() == to_image(next(student_images(artist.student, ["a cat"], [0]))[0]).tobytes()
    with Image.open("out.png") as written:
        assert written.tobytes() == image.tobytes()
    assert (record("out.png")["prompt"], record("out.png")["seed"], record("out.png")["steps"]) == ("a cat", 0, 4)
    assert "out.png · seed 0 · student, 4 steps" in capsys.readouterr().err


def test_seed_and_steps_draw_the_last_prompt_again(session):
    run(session, ["/seed 7", "a cat", "/steps 2", "/seed 8", "a dog", "/steps", "/seed"])
    assert len(session.shown) == 6 and session.seed not in (7, 8)
    whole = record("out.png")
    assert (whole["prompt"], whole["seed"], whole["steps"]) == ("a dog", session.seed, 4)


def test_steps_that_leave_nothing_of_an_image_are_refused(session, capsys):
    """In one step a student draws from pure noise: as `sbrush sample --image --steps 1`, which is refused too."""
    session.artist = dataclasses.replace(session.artist, edit=Edit(torch.zeros(3, 32, 32, dtype=torch.uint8), 0.6))
    run(session, ["/steps 2", "a cat", "/steps 1"])
    assert "--image needs a student of several steps" in capsys.readouterr().err
    assert session.artist.steps == 2 and record("out.png")["steps"] == 2


def test_a_negative_prompt_holds_until_it_is_taken_back(session, capsys):
    run(session, ["a cat", "/negative a dog", "/steps 2", "/negative"])
    assert len(session.shown) == 4 and len({image.tobytes() for image in session.shown}) == 4
    assert "negative" not in record("out.png") and record("out.png")["steps"] == 2
    run(session, ["/negative a dog", "/negative " + "dog " * 60])
    assert "longer than the 16 tokens" in capsys.readouterr().err and record("out.png")["negative"] == "a dog"


def test_save_keeps_a_copy_that_the_next_image_does_not_replace(session, capsys):
    run(session, ["a cat", "/save cat.png", "a dog"])
    assert record("cat.png")["prompt"] == "a cat" and record("out.png")["prompt"] == "a dog"
    run(session, ["/save cat.png"])
    assert record("cat.png")["prompt"] == "a dog" and "replaced cat.png" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("/sede 7", "no command /sede"),
        ("/seed -1", "not a seed: -1"),
        ("/seed 1-8", "not a seed: 1-8"),
        ("/steps 5", "does not take 5 steps"),
        ("/steps 0", "not a number of steps: 0"),
        ("/save", "/save has no name"),
        ("/save cat.jpg", "images are PNG"),
        ("/save folder/", "takes the name of a .png file"),
        ("/save -", "takes the name of a .png file"),
        ("\udce9", "not UTF-8"),
    ],
)
def test_what_makes_no_sense_is_told_and_the_session_goes_on(session, capsys, line, said):
    run(session, ["a cat", line, "a dog", "/quit", "a fish"])
    err = capsys.readouterr().err
    assert said in err and err.count("error: ") == 1 and err.count("hint: ") == 1
    assert record("out.png")["prompt"] == "a dog" and len(session.shown) == 2


def test_nothing_is_saved_before_there_is_an_image(session, capsys):
    run(session, ["/save cat.png", "/help"])
    err = capsys.readouterr().err
    assert "there is no image yet" in err and all(text in err for text in COMMANDS.values())


def test_a_terminal_that_shows_no_images_is_told_once(session, capsys):
    session.show = lambda image: 1 / 0
    run(session, ["a cat", "a dog"])
    err = capsys.readouterr().err
    assert err.count("this terminal shows no images (ZeroDivisionError)") == 1 and "error" not in err.split("note")[0]
    assert record("out.png")["prompt"] == "a dog"


def test_ctrl_c_stops_an_image_and_not_the_session(session, capsys):
    def interrupted():
        session.show = lambda image: (_ for _ in ()).throw(KeyboardInterrupt)
        yield "a cat"
        session.show = session.shown.append
        yield "a dog"

    run(session, interrupted())
    assert "stopped" in capsys.readouterr().err and len(session.shown) == 1


def test_the_prompt_line_ends_with_ctrl_d_and_not_with_ctrl_c():
    ctrl_c, ctrl_d, enter = "\x03", "\x04", "\r"
    with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
        keyboard.send_text("a cat" + enter + "half" + ctrl_c + "a dog" + enter + ctrl_d)
        assert list(typed_lines("first", ())) == ["first", "a cat", "a dog"]


@pytest.mark.parametrize(
    ("typed", "completed"), [("/s", ["/seed", "/steps", "/save"]), ("a pur", ["purple"]), ("a ", None)]
)
def test_commands_and_the_worlds_words_are_completed(typed, completed):
    found = [one.text for one in completer(["purple", "cat"]).get_completions(Document(typed), CompleteEvent())]
    assert found == completed or completed is None


@pytest.mark.filterwarnings("ignore:Image.Image.getdata is deprecated:DeprecationWarning")  # within textual-image
def test_an_image_in_a_terminal(capsys):
    terminal_image(Image.new("RGB", (32, 32), "red"))
    assert len(capsys.readouterr().out.splitlines()) > 5


# ---- what is refused


def test_a_session_without_a_terminal_is_refused():
    done = sbrush("sample", "--interactive")
    assert done.returncode == 2 and done.stderr.startswith("error: an interactive session needs a terminal")


@pytest.mark.parametrize(
    ("given", "prompts", "seeds", "out", "said"),
    [
        (["compare"], ["a"], [0], "x.png", "--compare does not go with --interactive"),
        (["json_"], ["a"], [0], "x.png", "--json does not"),
        ([], ["a", "b"], [0], "x.png", "several prompts"),
        ([], ["a"], [1, 2], "x.png", "several seeds"),
        ([], ["a"], [0], "folder/", "writes one file"),
        ([], ["a"], [0], "-", "writes one file"),
    ],
)
def test_what_a_session_does_not_do(monkeypatch, given, prompts, seeds, out, said):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    context = SimpleNamespace(get_parameter_source=lambda name: "COMMANDLINE" if name in given else "DEFAULT")
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        patch.setattr(sys, "stdin", Terminal())
        patch.setattr(sys, "stdout", Terminal())
        with pytest.raises(SbrushError, match=said) as problem:
            check_interactive(context)
            check_single(prompts, Target.parse(out), seeds)
    assert problem.value.code == 2
