"""The log in other places too, and validation in mid-run."""

import dataclasses
import importlib.util
import json

import pytest
import torch

from sbrush.console import SbrushError
from sbrush.metrics.clip import ClipScorer
from sbrush.models.load import load_student, load_teacher
from sbrush.prompts import make_prompts
from sbrush.sampling.generation import student_images
from sbrush.storage import checkpoint
from sbrush.training.loop import distill
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import Intervals, RunRequest, ValidationRequest
from sbrush.training.validation import Validation

TEXTS = ["a cat", "a dog", "a red fish", "a blue car on a mint background"]
SMALL = dataclasses.replace(
    RECIPES["swiftbrush"], steps=4, batch=2, student_lr=1e-3, lora_lr=1e-2, lora_rank=4, lora_alpha=4
)


def run(teacher, out, *, validate=0, **options):
    plan = prepare(RunRequest(
        SMALL, make_prompts(TEXTS, "four"), out=out, teacher=str(teacher), seed=3, device="cpu",
        precision="float32", every=Intervals(log=1, grid=0, checkpoint=2, validate=validate), **options,
    ))  # fmt: skip
    assert distill(plan)
    return [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_tensorboard_holds_the_log_and_each_step_once_after_a_kill(tmp_path, tiny_teacher, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monkeypatch.context() as patch:
        save = checkpoint.save

        def killed(folder, step, parts, **options):
            if step == 4:
                raise KeyboardInterrupt
            save(folder, step, parts, **options)

        patch.setattr(checkpoint, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            run(tiny_teacher, tmp_path / "run", trackers=["tensorboard"])
    log = run(tiny_teacher, tmp_path / "run", trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "sbrush"))
    events.Reload()
    assert {"gap", "lora_loss", "images_per_second"} <= set(events.Tags()["scalars"])
    assert not {"step", "clip_score"} & set(events.Tags()["scalars"])
    for name in ("gap", "x0_std"):
        told = [(event.step, event.value) for event in events.Scalars(name)]
        assert [step for step, _ in told] == [1, 2, 3, 4]
        assert [value for _, value in told] == pytest.approx([entry[name] for entry in log], rel=1e-6)


def test_nothing_is_tracked_unless_asked(tmp_path, tiny_teacher):
    run(tiny_teacher, tmp_path / "run")
    assert not (tmp_path / "run" / "trackers").exists()


def test_a_tracker_that_is_not_there_or_does_not_start_is_an_error(tmp_path, tiny_teacher, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", lambda name: None)
        with pytest.raises(SbrushError, match="wandb: it is not installed") as caught:
            run(tiny_teacher, tmp_path / "run", trackers=["wandb"])
    assert caught.value.hint == "pip install wandb" and not (tmp_path / "run").exists()

    def refuses(*arguments, **options):
        raise OSError("no account")

    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.__init__", refuses)
    with pytest.raises(SbrushError, match="a tracker cannot start: no account"):
        run(tiny_teacher, tmp_path / "run", trackers=["tensorboard"])


def test_validation_is_the_average_students_clip_score_and_leaves_the_run_alone(tmp_path, tiny_teacher, clip_folder):
    others = make_prompts(["a green bird", "a cat"], "two")
    log = run(tiny_teacher, tmp_path / "seen", validate=3, validation=ValidationRequest(others, clip_folder))
    run(tiny_teacher, tmp_path / "unseen")
    one, two = (load_student(str(tmp_path / name)) for name in ("seen", "unseen"))
    weights = zip(one.unet.state_dict().values(), two.unet.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in weights)
    assert ["clip_score" in entry for entry in log] == [False, False, True, True]  # every third, and at the end
    images = next(student_images(one, others.texts, [0, 1]))
    scorer = ClipScorer.load(clip_folder)
    prepared = torch.stack([scorer.prepare(image) for image in images])
    assert log[3]["clip_score"] == pytest.approx(scorer.scores(prepared, others.texts).mean().item(), abs=1e-5)
    assert log[2]["clip_score"] != log[3]["clip_score"]


def test_the_built_in_world_is_validated_by_its_judge():
    prompts = make_prompts([f"a small red cat on a {name} background" for name in ("mint", "cream")], "two")
    validation = Validation.load(prompts, load_teacher(), None, device="cpu")
    assert validation.score(load_student()) > 0.2  # real images have .28, other captions about 0
