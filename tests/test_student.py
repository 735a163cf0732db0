"""The Python API: what `import sbrush` offers, and that it draws what the command line draws."""

import json
import subprocess
import sys

import pytest
from PIL import Image

import sbrush
from conftest import sbrush as command


@pytest.fixture(scope="module")
def shipped():
    return sbrush.load_student(device="cpu")


def pixels(image):
    return image.size, image.tobytes()


def test_importing_sbrush_imports_nothing_heavy_and_offers_what_it_names():
    script = (
        "import sys, json, sbrush; heavy = [m for m in ('torch', 'numpy', 'PIL', 'diffusers') if m in sys.modules]; "
        "print(json.dumps([heavy, dir(sbrush), sbrush.SbrushError.__module__, hasattr(sbrush, 'nothing')]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    heavy, offered, error, nothing = json.loads(done.stdout)
    assert heavy == [] and error == "sbrush.console" and not nothing
    assert {"SbrushError", "Student", "core", "load_student", "__version__"} <= set(offered)
    assert sbrush.core.__name__ == "sbrush.core"


def test_an_image_is_the_one_that_sbrush_sample_writes(shipped, tmp_path):
    image = shipped("a small red cat", seed=3)
    done = command("sample", "a small red cat", "--seed", 3, "--device", "cpu", "-o", tmp_path / "cat.png")
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "cat.png") as written:
        assert image.mode == "RGB" and pixels(image) == pixels(written.convert("RGB"))


def test_prompts_and_seeds_broadcast(shipped):
    cat, dog = shipped("a cat", seed=1), shipped("a dog", seed=1)
    cat_2, dog_2 = shipped("a cat", seed=2), shipped("a dog", seed=2)
    assert len({pixels(image) for image in (cat, dog, cat_2, dog_2)}) == 4

    def drawn(*arguments, **names):
        return [pixels(image) for image in shipped(*arguments, batch=1, **names)]

    assert drawn(["a cat", "a dog"], seed=1) == [pixels(cat), pixels(dog)]
    assert drawn("a cat", seed=range(1, 3)) == [pixels(cat), pixels(cat_2)]
    assert drawn(["a cat", "a dog"], seed=[1, 2]) == [pixels(cat), pixels(dog_2)]
    assert drawn(["a cat"], seed=[1]) == drawn(["a cat"], seed=1) == drawn("a cat", seed=[1]) == [pixels(cat)]
    assert drawn([], seed=1) == drawn("a cat", seed=[]) == drawn([], seed=[]) == []


@pytest.mark.parametrize(
    ("prompts", "seed", "said"),
    [
        (["a cat", "a dog"], [1, 2, 3], "2 prompts do not pair with 3 seeds"),
        ([], [1, 2], "0 prompts do not pair with 2 seeds"),
        (" ", 0, "not a prompt: ' '"),
        ([None], 0, "not a prompt: None"),
        ("a cat", -1, "not a seed: -1"),
        ("a cat", 1.5, "not a seed: 1.5"),
        ("a cat", [0, "1"], "not a seed: '1'"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_hint(shipped, prompts, seed, said):
    with pytest.raises(sbrush.SbrushError) as caught:
        shipped(prompts, seed=seed)
    assert str(caught.value) == said and caught.value.hint and caught.value.code == 2


def test_a_batch_of_none_is_refused(shipped):
    with pytest.raises(sbrush.SbrushError, match="a batch of 0"):
        shipped("a cat", batch=0)


def test_a_student_comes_from_a_folder_a_run_or_a_checkpoint(tiny_teacher, prompt_file, tmp_path):
    arguments = ["--teacher", tiny_teacher, "--steps", 1, "--batch", 2, "--grid-every", 0, "--device", "cpu"]
    done = command("distill", prompt_file, *arguments, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    places = (tmp_path / "run", tmp_path / "run" / "student", tmp_path / "run" / "checkpoints" / "step-000001")
    run, folder, checkpoint = (sbrush.load_student(str(place), device="cpu") for place in places)
    assert pixels(run("a cat", seed=1)) == pixels(folder("a cat", seed=1)) == pixels(checkpoint("a cat", seed=1))
    assert "32 x 32 pixels, on cpu" in repr(run)
    halves = sbrush.load_student(str(tmp_path / "run"), device="cpu", precision="bfloat16")
    assert str(halves.model.unet.dtype) == "torch.bfloat16" and halves("a cat").size == (32, 32)


@pytest.mark.parametrize("wrong", [{"source": "no/such/folder"}, {"device": "tpu"}, {"precision": "int8"}])
def test_what_cannot_be_loaded_is_refused_with_a_hint(wrong):
    with pytest.raises(sbrush.SbrushError) as caught:
        sbrush.load_student(**wrong)
    assert caught.value.hint and caught.value.code == 2
