"""Text embeddings on disk: the same as from the encoder but for rounding, whole, of one list, in rows."""

import dataclasses
import shutil

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from conftest import build_tiny_teacher, sbrush
from sbrush.console import SbrushError
from sbrush.models.load import load_teacher
from sbrush.prompts import ShuffledPrompts, make_prompts
from sbrush.training.loop import distill
from sbrush.training.plan import prepare
from sbrush.training.recipes import RECIPES
from sbrush.training.request import Intervals, RunRequest
from sbrush.training.text_cache import TextCache

PROMPTS = make_prompts([f"{a} {b}" for a in ("a red", "a blue", "a small") for b in ("cat", "dog", "fish")], "nine")
SMALL = dataclasses.replace(
    RECIPES["swiftbrush"], steps=4, batch=2, student_lr=1e-3, lora_lr=1e-2, lora_rank=4, lora_alpha=4
)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr("sbrush.storage.shards.BLOCK", 4)
    monkeypatch.setattr("sbrush.training.text_cache.BATCH", 2)


def filled(folder, teacher, prompts=PROMPTS):
    cache = TextCache(folder, teacher, prompts)
    cache.fill(Accelerator(cpu=True))
    return cache


@pytest.mark.parametrize("kind", ["tiny_teacher", "tiny_xl"])
def test_words_are_the_encoders_rounded_to_half(tmp_path, request, kind):
    teacher = load_teacher(str(request.getfixturevalue(kind)))
    places = [8, 0, 3, 4, 0]  # of three files, and one twice
    found = filled(tmp_path, teacher).conditioning(places)
    expected = teacher.encode([PROMPTS.texts[place] for place in places])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.allclose(found[name], value, atol=1e-5, rtol=1e-3), name
        assert not torch.equal(found[name], value)  # half precision is what is on disk
        assert value[0].std() > 0 and not torch.allclose(value[0], value[1])


def test_another_encoder_or_format_is_another_cache(tmp_path, tiny_teacher):
    other = build_tiny_teacher(tmp_path / "other", seed=1)
    caches = [
        filled(tmp_path / "cache", load_teacher(str(teacher), dtype=dtype))
        for teacher, dtype in ((tiny_teacher, torch.float32), (other, torch.float32), (tiny_teacher, torch.bfloat16))
    ]
    one, two, three = (cache.conditioning([0, 1])["tokens"].float() for cache in caches)
    assert len(list((tmp_path / "cache").iterdir())) == 3
    assert not torch.allclose(one, two, atol=1e-2) and torch.allclose(one, three, atol=0.1)


def test_an_interrupted_writing_goes_on_and_another_list_is_another_cache(tmp_path, tiny_teacher, monkeypatch):
    teacher, seen = load_teacher(str(tiny_teacher)), []
    encode = type(teacher).encode

    def watched(self, texts):
        seen.extend(texts)
        if PROMPTS.texts[6] in texts and seen.count(PROMPTS.texts[6]) == 1:
            raise KeyboardInterrupt
        return encode(self, texts)

    monkeypatch.setattr(type(teacher), "encode", watched)
    with pytest.raises(KeyboardInterrupt):
        filled(tmp_path, teacher)
    assert len(list(tmp_path.glob("*/*.safetensors"))) == 1
    del seen[:]
    seen.append(PROMPTS.texts[6])
    cache = filled(tmp_path, teacher)
    assert PROMPTS.texts[0] not in seen and PROMPTS.texts[4] in seen  # the first file was whole
    del seen[:]
    filled(tmp_path, teacher)
    assert not seen
    other = filled(tmp_path, teacher, make_prompts(["a cat"], "one"))
    assert other.shards.folder != cache.shards.folder


def test_a_row_is_read_without_the_rest_of_its_file(tmp_path, tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    cache = filled(tmp_path, teacher)
    file = cache.shards.folder / "000000.safetensors"
    rows = load_file(file)["tokens"]
    assert rows.dtype == torch.float16 and rows.shape[0] == 4
    with file.open("r+b") as handle:  # the last rows are lost: the first can still be had
        handle.seek(-rows[2:].nbytes, 2)
        handle.write(b"\xff" * rows[2:].nbytes)
    assert cache.conditioning([1])["tokens"].isfinite().all() and not cache.conditioning([3])["tokens"].isfinite().all()


def test_too_little_room_is_refused_before_anything_is_written(tmp_path, tiny_teacher, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(SbrushError, match="no room for the text embeddings"):
        filled(tmp_path, load_teacher(str(tiny_teacher)))
    assert not list(tmp_path.glob("*/*"))


def test_a_run_with_a_cache_trains_on_its_own_prompts_and_is_another_run(tmp_path, tiny_teacher, monkeypatch):
    def run(out, **options):
        plan = prepare(RunRequest(
            SMALL, PROMPTS, out=tmp_path / out, teacher=str(tiny_teacher), seed=3, device="cpu",
            precision="float32", every=Intervals(log=1, grid=0, checkpoint=2), **options,
        ))  # fmt: skip
        assert distill(plan)
        return load_file(tmp_path / out / "student" / "unet" / "diffusion_pytorch_model.safetensors")

    fly, cached = run("fly"), run("cached", text_cache=tmp_path / "texts")
    start = load_teacher(str(tiny_teacher)).unet.state_dict()
    apart = sum((fly[name] - cached[name]).pow(2).sum() for name in fly).sqrt()
    learned = sum((fly[name] - start[name]).pow(2).sum() for name in fly).sqrt()
    assert 0 < apart < 0.1 * learned  # the same prompts in the same order, but for rounding
    with pytest.raises(SbrushError, match="text_cache was false, now true"):
        run("fly", text_cache=tmp_path / "texts")


def test_places_are_the_prompts():
    shuffled = ShuffledPrompts(PROMPTS, 3)
    assert [PROMPTS.texts[shuffled.place(n)] for n in range(20)] == [shuffled[n] for n in range(20)]


def test_the_dry_run_says_what_it_takes(tmp_path, tiny_teacher, prompt_file):
    done = sbrush("distill", prompt_file, "--teacher", tiny_teacher, "--dry-run", "--text-cache", tmp_path)
    assert done.returncode == 0 and "disk for text embeddings" in done.stdout, done.stderr
    assert not list(tmp_path.iterdir())
