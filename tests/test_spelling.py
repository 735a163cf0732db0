"""Content decides what a run is, not how its parts are called; and a run's teacher is found from any directory."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from conftest import build_tiny_teacher, sbrush
from sbrush.console import SbrushError
from sbrush.models.load import BUILT_IN, load_student
from sbrush.models.places import teacher_of
from sbrush.sampling.generation import student_images

SMALL = ("--steps", 2, "--batch", 2, "--grid-every", 0, "--checkpoint-every", 1, "--device", "cpu")


@pytest.fixture(scope="module")
def home(tmp_path_factory, tiny_teacher):
    """A directory with a teacher `t`, prompts, a run of them that was given both by short names, and its student."""
    home = tmp_path_factory.mktemp("home")
    shutil.copytree(tiny_teacher, home / "t")
    (home / "p.txt").write_text("a cat\na red dog\n")
    before = Path.cwd()
    os.chdir(home)
    try:
        done = sbrush("distill", "p.txt", "--teacher", "t", "--out", "runs/one", *SMALL)
        assert done.returncode == 0, done.stderr
    finally:
        os.chdir(before)
    return home


@pytest.mark.parametrize("spelling", ["t", "t/", "./t", "../{name}/t", "{home}/t", "{home}/link"])
def test_another_spelling_of_the_teacher_or_place_of_the_prompts_is_the_same_run(home, monkeypatch, spelling):
    if not (home / "link").exists():
        (home / "link").symlink_to(home / "t")
        shutil.copy(home / "p.txt", home / "renamed.txt")
    monkeypatch.chdir(home)
    teacher = spelling.format(home=home, name=home.name)
    again = sbrush("distill", "renamed.txt", "--teacher", teacher, "--out", "./runs/one/", *SMALL)
    assert again.returncode == 0 and "complete" in again.stderr, again.stderr


def test_another_teacher_of_the_same_name_is_another_run(home, tmp_path, monkeypatch):
    shutil.copytree(home / "runs", tmp_path / "runs")
    shutil.copy(home / "p.txt", tmp_path / "p.txt")
    build_tiny_teacher(tmp_path / "t", seed=1)
    monkeypatch.chdir(tmp_path)
    refused = sbrush("distill", "p.txt", "--teacher", "t", "--out", "runs/one", *SMALL)
    assert refused.returncode == 2 and "teacher_sha256 was" in refused.stderr, refused.stderr
    (tmp_path / "p.txt").write_text("a cat\n")
    refused = sbrush("distill", "p.txt", "--teacher", home / "t", "--out", "runs/one", *SMALL)
    assert refused.returncode == 2 and "prompts.sha256 was" in refused.stderr, refused.stderr


def test_a_student_to_start_from_may_be_spelt_otherwise(home, monkeypatch):
    monkeypatch.chdir(home)
    for init in ("runs/one", "./runs/one/student", home / "runs" / "one"):
        done = sbrush("distill", "p.txt", "--teacher", "t", "--init", init, "--out", "runs/two", *SMALL)
        assert done.returncode == 0, done.stderr
    shutil.rmtree(home / "runs" / "two")


def test_a_checkpoint_is_used_from_any_directory(home, tmp_path, monkeypatch):
    checkpoint = home / "runs" / "one" / "checkpoints" / "step-000002"
    monkeypatch.chdir(home)
    expected = next(student_images(load_student("runs/one/checkpoints/step-000002"), ["a cat"], [1]))
    monkeypatch.chdir(tmp_path)
    assert torch.equal(next(student_images(load_student(str(checkpoint)), ["a cat"], [1])), expected)
    build_tiny_teacher(tmp_path / "t", seed=1)  # another of that name is here: the run's is meant
    assert torch.equal(next(student_images(load_student(str(checkpoint)), ["a cat"], [1])), expected)
    moved = shutil.copytree(home / "runs", tmp_path / "elsewhere" / "runs") / "one" / "checkpoints" / "step-000002"
    with pytest.raises(SbrushError, match="has changed since the run"):
        load_student(str(moved))
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(SbrushError, match="the teacher t is not there"):
        load_student(str(moved))


def test_a_student_names_its_teacher(home, tmp_path, tiny_teacher, monkeypatch):
    monkeypatch.chdir(home)
    run = home / "runs" / "one"
    places = [run, run / "student", run / "checkpoints" / "step-000002"]
    assert [teacher_of(str(place)) for place in places] == ["t"] * 3
    monkeypatch.chdir(tmp_path)
    assert [teacher_of(str(place)) for place in places] == [str(home / "t")] * 3
    about = json.loads((run / "student" / "sbrush.json").read_text())
    assert about["teacher"] == "t" and len(about["teacher_sha256"]) == 64
    assert teacher_of(None) is None and teacher_of(str(BUILT_IN / "student")) is None
    student = shutil.copytree(run / "student", tmp_path / "student")
    with pytest.raises(SbrushError, match="the teacher t is not there"):
        teacher_of(str(student))
    build_tiny_teacher(tmp_path / "t", seed=1)
    with pytest.raises(SbrushError, match=r"the teacher t is not the one that .* was made from"):
        teacher_of(str(student))
    with pytest.raises(SbrushError, match="does not say who its teacher is"):
        teacher_of(str(tiny_teacher))
    (student / "sbrush.json").write_text(json.dumps(about | {"teacher": "some/one"}))
    assert teacher_of(str(student)) == "some/one"  # a Hub id


def test_a_folder_of_many_steps_as_a_student_is_noted_and_a_student_is_not(home, tmp_path, tiny_teacher, capsys):
    def said(source, **given):
        load_student(source, **given)
        return "blurred" in capsys.readouterr().err

    assert said(str(tiny_teacher)) and said(str(BUILT_IN / "teacher"))
    assert not said(None) and not said(str(home / "runs" / "one"))
    assert not said(str(tiny_teacher), start_timestep=399)  # its user knows how it is to be drawn
    turbo = shutil.copytree(tiny_teacher, tmp_path / "turbo")
    scheduler = turbo / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"timestep_spacing": "trailing"}))
    assert not said(str(turbo))
