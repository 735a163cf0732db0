"""The load test of `sbrush serve` counts what is lost and what is wrong."""

import asyncio
import dataclasses

import pytest

from sbrush.benchmarks.serve import Bare, Load, ask, put_under_load, read_counters, wrong_answers
from serving import listening, load

REQUESTS = [("a cat", 1), ("a red dog", 2), ("a fish", 3)]


@pytest.fixture(scope="module")
def artist(tiny_teacher):
    return load(tiny_teacher)


def test_a_moment_of_load(artist):
    with listening(artist) as (address, service):
        seen = Load()
        seen.add(asyncio.run(put_under_load(address, REQUESTS, 4, 1.0)))
        assert len(seen.latencies) >= 4 and not seen.failed and seen.answers.keys() == {0, 1, 2}
        assert wrong_answers(seen, service.student, REQUESTS) == 0
        counters = read_counters(address)
        assert counters["sbrush_images_total"] == len(seen.latencies) + 1
        assert asyncio.run(ask(address, "nowhere"))[0] == 404


def test_anothers_image_is_counted_as_wrong(artist):
    with listening(artist) as (address, service):
        seen = asyncio.run(put_under_load(address, REQUESTS, 3, 0.1))
    mixed = dataclasses.replace(seen, answers={0: seen.answers[1], 1: seen.answers[1]})
    assert wrong_answers(mixed, service.student, REQUESTS) == len(seen.answers[1])


def test_answers_that_are_none_are_counted_as_lost(artist):
    with listening(artist) as (address, _):
        refused = asyncio.run(put_under_load(address, [(" ", 1)], 2, 0.1))
    assert set(refused.failed) == {"400"} and not refused.answers


def test_the_bare_networks_rate(artist):
    bare = Bare()
    bare.draw(artist.student, REQUESTS, 4, 0.1)
    assert bare.images % 4 == 0 and bare.images > 0 and bare.seconds > 0
