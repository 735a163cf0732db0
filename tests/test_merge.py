"""Two students into one."""

import json

import pytest
import torch

from conftest import build_tiny_teacher, process, sbrush
from sbrush.console import SbrushError
from sbrush.models.export import export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import load_student, load_teacher
from sbrush.models.merge import merge

ABOUT = {
    "version": "0", "teacher": "tiny", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
    "prompts": {"count": 3, "sha256": "0"},
}  # fmt: skip


def student(teacher, folder, seed, t_init=None, **about):
    model = load_teacher(str(teacher))
    torch.manual_seed(seed)
    for parameter in model.unet.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    export_student(
        folder, model, model.unet, about=ABOUT | about, scheduler=Sampling().scheduler(model.scheduler, t_init)
    )
    return str(folder)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_every_weight_is_the_mean_asked_for_and_the_rest_is_the_first_students(tmp_path, tiny_teacher, share):
    one, two = (student(tiny_teacher, tmp_path / str(seed), seed, t_init=700) for seed in (1, 2))
    merge(one, two, tmp_path / "both", share=share)
    a, b, c = (dict(load_student(str(f)).unet.named_parameters()) for f in (one, two, tmp_path / "both"))
    assert all(torch.allclose(c[k], share * a[k] + (1 - share) * b[k], atol=1e-6) for k in a)
    merged = load_student(str(tmp_path / "both"))
    assert len(merged.schedule) == 701 and merged.about["recipe"] == {"name": "x"}
    said = json.loads((tmp_path / "both" / "sbrush.json").read_text())["merged"]
    assert [part["share"] for part in said] == [share, 1 - share] and said[0]["sha256"] != said[1]["sha256"]
    assert "merged from" in (tmp_path / "both" / "README.md").read_text()


def test_students_that_do_not_go_together_are_refused(tmp_path, tiny_teacher):
    one = student(tiny_teacher, tmp_path / "one", 1)
    cases = {
        "different ways": student(tiny_teacher, tmp_path / "other start", 2, t_init=500),
        "in different ways": student(tiny_teacher, tmp_path / "plain", 2, reparameterised=False),
        "no sbrush.json": str(build_tiny_teacher(tmp_path / "foreign")),
    }
    for said, two in cases.items():
        with pytest.raises(SbrushError, match=said):
            merge(one, two, tmp_path / "both")
        assert not (tmp_path / "both").exists()
    with pytest.raises(SbrushError, match="there already"):
        merge(one, one, tmp_path / "one")


def test_a_merged_student_carries_both_licences_and_any_safety_checker(tmp_path, tiny_teacher):
    one = student(tiny_teacher, tmp_path / "one", 1, license="openrail++", safety_checker=False)
    two = student(tiny_teacher, tmp_path / "two", 2, license="cc-by-nc-4.0", safety_checker=True)
    merge(one, two, tmp_path / "both")
    card = (tmp_path / "both" / "README.md").read_text()
    assert 'license: "other"' in card and "cc-by-nc-4.0; openrail++" in card and "came with a safety checker" in card
    merge(one, one, tmp_path / "same")
    assert 'license: "openrail++"' in (tmp_path / "same" / "README.md").read_text()


def test_merging_onto_a_full_or_read_only_disk_says_so_and_leaves_nothing(tmp_path, tiny_teacher, monkeypatch):
    one = student(tiny_teacher, tmp_path / "one", 1)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("shutil.copyfile", full)
        done = sbrush("merge", one, one, "-o", tmp_path / "both")
    assert done.returncode == 1 and "No space left on device\nhint: make room" in done.stderr
    with monkeypatch.context() as patch:
        patch.setattr("os.access", lambda *_: False)
        done = sbrush("merge", one, one, "-o", tmp_path / "new" / "both")
    assert done.returncode == 1 and "Permission denied" in done.stderr and "loading" not in done.stderr
    (tmp_path / "file").touch()
    done = sbrush("merge", one, one, "-o", tmp_path / "file" / "both")
    assert done.returncode == 1 and "it is not a folder" in done.stderr
    done = sbrush("merge", one, one, "-o", one)
    assert done.returncode == 2 and "is there already" in done.stderr and "loading" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "one"]


def test_the_help_of_merge_stands_alone():
    done = process("merge", "--help", COLUMNS="80")
    assert "Example: sbrush merge runs/seed-0 runs/seed-1 -o runs/merged" in done.stdout
    assert "must not exist yet" in " ".join(done.stdout.replace("│", " ").split()) and done.returncode == 0
