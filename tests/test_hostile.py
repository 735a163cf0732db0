"""What comes from elsewhere: damaged folders, text that acts on terminals, links that lead away, full disks."""

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import build_tiny_teacher, sbrush
from fuzz import fuzz
from launch import launch
from sbrush.console import SbrushError, printable
from sbrush.models.load import digest, load_teacher
from sbrush.prompts import make_prompts, read_prompts
from sbrush.sampling.images import image_grid, parameters, save_png
from sbrush.sampling.seeds import parse_seeds
from sbrush.storage import checkpoint
from sbrush.training import run
from sbrush.training.config import NOT_COMPARED, differences
from sbrush.training.loop import distill
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import Intervals, RunRequest

SMALL = dataclasses.replace(RECIPES["swiftbrush"], steps=4, batch=2, lora_rank=4, lora_alpha=4)
ABOUT = {
    "prompt": "", "seed": 7, "steps": 1, "guidance": 1, "sampler": "s", "size": "8x8", "model": "m, n", "version": "1",
}  # fmt: skip
NASTY = {
    "long": "cat " * 10_000,
    "control": "a\x00\x07\x1bcat\x7f\x9b",
    "right to left": "قطة \u202egnp.tac\u202c",
    "emoji": "a 🐈‍⬛ in a 🚗",
    "terminal": "\x1b]0;owned\x07\x1b[2J\x1b[31ma cat",
    "html": "<script>alert(1)</script> & \"a\" 'cat'",
    "markdown": "a [cat](javascript:alert) `rm` | * _ #",
}


def plan(teacher, out, recipe=SMALL, extend=0, prompts=("a cat", "a dog")):
    return prepare(RunRequest(
        recipe, make_prompts(prompts, "two"), out=out, teacher=str(teacher), seed=3, device="cpu",
        precision="float32", every=Intervals(log=1, grid=4, checkpoint=1), extend=extend,
    ))  # fmt: skip


def test_twenty_damaged_folders_are_refused_or_do_no_harm(tmp_path):
    """`make fuzz` damages five hundred."""
    outcomes = fuzz(tmp_path, 20, seed=1)
    assert sum(outcomes.values()) == 20 and min(outcomes["refused"], outcomes["no harm"]) > 2


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("unet/config.json", {"layers_per_block": 10**8}),
        ("unet/config.json", {"block_out_channels": [10**9, 10**9]}),
        ("unet/config.json", {"sample_size": 10**6}),
        ("unet/config.json", {"norm_num_groups": True}),
        ("text_encoder/config.json", {"num_hidden_layers": 10**7}),
        ("text_encoder/config.json", {"vocab_size": 10**12}),
        ("text_encoder/config.json", {"quantization_config": {"quant_method": "bitsandbytes"}}),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**10}),
        ("scheduler/scheduler_config.json", {"beta_end": 7}),
        ("scheduler/scheduler_config.json", {"prediction_type": "\x1b[2J"}),
        ("vae/config.json", {"scaling_factor": 0}),
        ("vae/config.json", {"latent_channels": 7}),
    ],
)
def test_configurations_out_of_all_proportion_are_refused_before_anything_is_built(tmp_path, file, change):
    build_tiny_teacher(tmp_path)
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(SbrushError) as refused:
        load_teacher(str(tmp_path))
    assert "\x1b" not in str(refused.value) and "\n" not in str(refused.value)


def test_a_link_out_of_the_model_is_not_copied_but_the_hubs_own_cache_is(tmp_path, tiny_teacher):
    secret = tmp_path / "secret.json"
    secret.write_text("{}")
    away = build_tiny_teacher(tmp_path / "away")
    (away / "tokenizer" / "added.json").symlink_to(secret)  # which nothing reads
    assert digest(load_teacher(str(away))) == digest(load_teacher(str(tiny_teacher)))
    (away / "tokenizer" / "added_tokens.json").symlink_to(secret)
    with pytest.raises(SbrushError, match="link to a file outside"):
        digest(load_teacher(str(away)))
    hub = tmp_path / "models--a--b"
    cached = build_tiny_teacher(hub / "snapshots" / "0123")
    (hub / "blobs").mkdir()
    weights = cached / "unet" / "diffusion_pytorch_model.safetensors"
    weights.rename(hub / "blobs" / "abc")
    weights.symlink_to("../../../blobs/abc")
    assert digest(load_teacher(str(cached)))


@pytest.mark.parametrize("text", NASTY.values(), ids=NASTY)
def test_nasty_prompts_are_shown_safely_everywhere(tmp_path, tiny_teacher, text, capfd):
    prompts = make_prompts([text, "a dog"], text)
    ready = plan(tiny_teacher, tmp_path / "run", dataclasses.replace(SMALL, steps=1), prompts=(text, "a dog"))
    assert distill(ready)
    card = (tmp_path / "run" / "student" / "README.md").read_text(encoding="utf-8")
    said = "".join(capfd.readouterr()) + prompts.describe() + card
    assert not [c for c in said if c not in "\n\r" and not c.isprintable()]
    image = image_grid([[torch.zeros(3, 8, 8, dtype=torch.uint8)]], row_labels=[text[:200]], column_labels=[text])
    about = {**ABOUT, "prompt": text, "model": text}
    save_png(tmp_path / "a.png", image, about)
    with Image.open(tmp_path / "a.png") as read:
        assert json.loads(read.text["sbrush"])["prompt"] == text


def test_nasty_prompts_on_the_command_line(tmp_path, tiny_teacher):
    texts = [text.replace("\x00", "") for name, text in NASTY.items() if name != "long"]
    drawn = sbrush("sample", *texts, "--student", tiny_teacher, "-o", tmp_path / "images")
    assert drawn.returncode == 0, drawn.stderr
    files = list((tmp_path / "images").iterdir())
    assert len(files) == len(texts) and all(f.name.isprintable() and f.parent == tmp_path / "images" for f in files)
    assert not [c for c in drawn.stdout + drawn.stderr if c != "\n" and not c.isprintable()]


@given(st.text())
def test_printable_text_is_one_line_that_acts_on_nothing(text):
    shown = printable(text)
    assert shown.isprintable() and (shown == text or not text.isprintable())


@given(
    st.lists(st.text(st.characters(exclude_characters="\n\x00", exclude_categories=["Cs"]), max_size=20), max_size=8)
)
def test_any_lines_of_text_are_prompts_each_once(lines):
    prompts = make_prompts(lines, "x")
    stripped = [line.strip() for line in lines]
    assert set(prompts.texts) == {s for s in stripped if s} and len(set(prompts.texts)) == len(prompts.texts)
    ended_in_newline = bool(stripped) and not stripped[-1]
    assert len(prompts) + prompts.blank + prompts.duplicate == len(lines) - ended_in_newline
    assert make_prompts(prompts.texts, "y").sha256 == prompts.sha256


@given(data=st.binary(max_size=200))
def test_any_bytes_are_a_prompt_file_or_are_refused(tmp_path_factory, data):
    file = tmp_path_factory.getbasetemp() / "any.txt"
    file.write_bytes(data)
    try:
        prompts = read_prompts(file)
    except SbrushError as refused:
        assert refused.code == 2 and refused.hint
    else:
        assert prompts.texts and all(t == t.strip() and t for t in prompts.texts)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 50)), min_size=1, max_size=5))
def test_seed_ranges_mean_what_they_say(ranges):
    text = ",".join(f"{a}-{a + n}" if n else str(a) for a, n in ranges)
    assert parse_seeds(text) == [s for a, n in ranges for s in range(a, a + n + 1)]


@given(st.text(st.sampled_from("0123456789-, x"), max_size=12))
def test_any_seed_text_is_a_range_or_is_refused(text):
    try:
        assert all(s >= 0 for s in parse_seeds(text))
    except SbrushError as refused:
        assert refused.code == 2


@given(prompt=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=60))
def test_metadata_come_back_from_the_image(tmp_path_factory, prompt):
    file = tmp_path_factory.getbasetemp() / "metadata.png"
    about = {**ABOUT, "prompt": prompt}
    save_png(file, Image.new("RGB", (8, 8)), about)
    with Image.open(file) as image:
        assert json.loads(image.text["sbrush"]) == about
        assert image.text["parameters"].splitlines()[-1] == parameters(about).splitlines()[-1]


def test_two_runs_in_one_folder_the_second_is_refused(tmp_path, tiny_teacher):
    with plan(tiny_teacher, tmp_path / "run").run.claim():
        (other,) = launch(lambda: plan(tiny_teacher, tmp_path / "run").run.claim(), processes=1)
        assert other.returncode == 1 and "another run is using" in other.stderr
    assert distill(plan(tiny_teacher, tmp_path / "run"))  # free again


def test_a_full_disk_is_seen_before_writing_and_the_last_checkpoint_stays(tmp_path, tiny_teacher, monkeypatch):
    room = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        shutil, "disk_usage", lambda p: room._replace(free=10 if (p / "step-000002").exists() else 10**12)
    )
    with pytest.raises(SbrushError, match=r"no room for a checkpoint.*\d MiB needed, 10 bytes free"):
        distill(plan(tiny_teacher, tmp_path / "run"))
    monkeypatch.undo()
    assert [p.name for p in checkpoint.paths(tmp_path / "run" / "checkpoints")] == ["step-000002", "step-000001"]
    assert distill(plan(tiny_teacher, tmp_path / "run"))


PROBLEMS, PLACES = (errno.ENOSPC, errno.EACCES, errno.EIO, errno.ENOENT), ("checkpoint", "log", "sample grid", "export")


@pytest.mark.parametrize(
    ("number", "where"),
    [
        pytest.param(number, where, marks=() if i == j else pytest.mark.slow)  # each of them once, then all pairs
        for i, number in enumerate(PROBLEMS)
        for j, where in enumerate(PLACES)
    ],
)
def test_what_cannot_be_written_ends_the_run_in_one_line_and_it_goes_on_later(
    tmp_path, tiny_teacher, monkeypatch, number, where
):
    def refuse(*arguments, **options):
        raise OSError(number, os.strerror(number))

    places = {
        "checkpoint": (checkpoint, "save_tensors"), "log": (run.Run, "log"), "sample grid": (run.images, "save_png"),
        "export": (run, "export_student"),
    }  # fmt: skip
    monkeypatch.setattr(*places[where], refuse)
    with pytest.raises(SbrushError, match="cannot write to") as refused:
        distill(plan(tiny_teacher, tmp_path / "run"))
    assert os.strerror(number) in str(refused.value) and "same command" in refused.value.hint
    monkeypatch.undo()
    assert distill(plan(tiny_teacher, tmp_path / "run"))


def test_a_home_that_cannot_be_written_to_is_not_needed(tmp_path, tiny_teacher):
    nowhere = "/dev/null/home"
    away = dict.fromkeys(("HOME", "XDG_CACHE_HOME", "HF_HOME", "TORCH_HOME", "MPLCONFIGDIR"), nowhere)
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    program = (
        "import json, sys\n"
        "from sbrush.cli.app import main\n"
        "for sys.argv in json.loads(sys.stdin.read()):\n"
        "    try: main()\n"
        "    except SystemExit as left: print('code', left.code)"
    )
    distil = ["distill", tmp_path / "p.txt", "--teacher", tiny_teacher, "--out", tmp_path / "run", "--steps", 1]
    draw = ["sample", "a cat", "--student", tmp_path / "run", "-o", tmp_path / "a.png"]
    commands = [["sbrush", *map(str, command)] for command in (distil, draw)]
    done = subprocess.run(
        [sys.executable, "-c", program], input=json.dumps(commands), capture_output=True, text=True, timeout=300,
        env={**os.environ, **away},
    )  # fmt: skip
    codes = [line for line in done.stdout.splitlines() if line.startswith("code")]
    assert codes == ["code 0"] * 2 and (tmp_path / "a.png").is_file(), done.stderr


def test_extend_adds_steps_to_a_complete_run_once(tmp_path, tiny_teacher):
    out = tmp_path / "run"
    with pytest.raises(SbrushError, match="no run in"):
        plan(tiny_teacher, out, extend=2)
    assert distill(plan(tiny_teacher, out))
    assert plan(tiny_teacher, out, extend=2).run.recipe.steps == 6
    longer = plan(tiny_teacher, out, extend=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "export_student", lambda *a, **o: (_ for _ in ()).throw(OSError(28, "No space")))
        with pytest.raises(SbrushError, match="cannot write"):
            distill(longer)
    assert (out / "student" / "model_index.json").is_file()  # the shorter run's student, until there is another
    assert plan(tiny_teacher, out).run.recipe.steps == 6  # the command without --extend goes on, too
    assert plan(tiny_teacher, out, extend=2).run.recipe.steps == 6  # and the same one does not add twice
    with pytest.raises(SbrushError, match="has not finished its 6 steps"):
        plan(tiny_teacher, out, extend=3)
    assert distill(plan(tiny_teacher, out, extend=2))
    about = json.loads((out / "student" / "sbrush.json").read_text())
    assert about["recipe"]["steps"] == 6 and checkpoint.newest(out / "checkpoints").step == 6
    assert plan(tiny_teacher, out, extend=2).run.recipe.steps == 8
    with pytest.raises(SbrushError, match=r"another configuration: recipe\.steps was 4, now 5"):
        plan(tiny_teacher, out, dataclasses.replace(SMALL, steps=5)).run.claim()


def test_every_checkpoint_damaged_is_no_new_beginning(tmp_path, tiny_teacher):
    out = tmp_path / "run"
    assert distill(plan(tiny_teacher, out))
    (out / "student" / "sbrush.json").unlink()
    for path in checkpoint.paths(out / "checkpoints"):
        (path / "state.json").write_text("{")
    with pytest.raises(SbrushError, match=r"every checkpoint in .* is damaged"):
        distill(plan(tiny_teacher, out))


def test_a_run_of_another_format_gets_a_message_that_helps(tmp_path, tiny_teacher):
    out = tmp_path / "run"
    plan(tiny_teacher, out).run.claim().__exit__(None, None, None)
    file = out / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"format": 99}))
    with pytest.raises(SbrushError, match="format 99, this version writes 1") as refused:
        plan(tiny_teacher, out).run.claim()
    assert "version that started it" in refused.value.hint


@given(
    before=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=4),
    now=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3), max_size=4),
)
def test_a_difference_is_named_exactly_when_there_is_one(before, now):
    keys = {k for k in before.keys() | now.keys() if before.get(k) != now.get(k)} - set(NOT_COMPARED)
    assert len(differences(before, now)) == len(keys) and differences(before, before) == []
