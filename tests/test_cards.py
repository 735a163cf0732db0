"""What cards say is true of the very student that they lie beside: their snippets run, and draw its image."""

import json
import re
import shlex

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from conftest import build_tiny_teacher, build_tiny_xl, sbrush
from ldm import whole_file
from sbrush.models import card, format_cards
from sbrush.models.checks import read_network
from sbrush.models.export import export_lora, export_student
from sbrush.models.ladder import Sampling
from sbrush.models.load import BUILT_IN, load_student, load_teacher
from sbrush.models.merge import merge
from sbrush.models.scheduler_swap import SCHEDULERS
from sbrush.models.source import BUILT_IN_STUDENTS
from sbrush.models.unet import STUDENT_TARGETS, add_lora, merge_lora

ABOUT = {"version": "0", "reparameterised": True, "recipe": {"name": "x"}, "seed": 0,
         "prompts": {"count": 3000, "sha256": "0"}}  # fmt: skip


def half(folder):
    """Every network of a folder in half precision, as most on the Hub are."""
    from safetensors.torch import load_file, save_file

    for file in folder.rglob("*.safetensors"):
        save_file({name: t.half() for name, t in load_file(file).items()}, file, metadata={"format": "pt"})
        config = file.parent / "config.json"
        content = json.loads(config.read_text())
        if "dtype" in content:
            config.write_text(json.dumps(content | {"dtype": "float16"}))
    return folder


TEACHERS = {
    "epsilon": build_tiny_teacher,
    "v": lambda folder: build_tiny_teacher(folder, prediction="v_prediction"),
    "half": lambda folder: half(build_tiny_teacher(folder)),
    "xl": build_tiny_xl,
    "half xl": lambda folder: half(build_tiny_xl(folder)),
}


def write(source, out, *, t_init=None, lora=False, seed=1, teacher_config=None, **about):
    """Exports what a run would: `out`/student, and `out`/student-lora of a LoRA."""
    teacher = load_teacher(source, config=teacher_config)
    about = ABOUT | {"teacher": source or "stickers (built in)"} | about
    about |= {"teacher_config": teacher_config} if teacher_config else {}
    unet, scheduler = teacher.unet, Sampling(about.get("steps", 1)).scheduler(teacher.scheduler, t_init)
    if lora:
        parameters = add_lora(unet, "student", rank=2, alpha=4, targets=STUDENT_TARGETS, seed=seed)
    else:
        parameters = dict(unet.named_parameters())
    torch.manual_seed(seed)
    for parameter in parameters.values():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
    if lora:
        export_lora(out / "student-lora", teacher, unet, "student", about=about, scheduler=scheduler)
        plain = read_network(type(unet), teacher.folders["unet"] / "unet", torch_dtype=torch.float32)
        unet = merge_lora(unet, "student", plain)
    export_student(out / "student", teacher, unet, about=about, scheduler=scheduler)
    return out


def check(folder, tmp_path, monkeypatch, student=None):
    """What the card of `folder` shows is right; `student`: whose image it is, if not the folder's own."""
    text = (folder / "README.md").read_text(encoding="utf-8").replace("path/to/this/folder", str(folder))
    check_text(text.replace("path/to/student", str(student)), tmp_path, monkeypatch)


def check_text(text, tmp_path, monkeypatch):
    """Runs all that a card shows: the snippet draws the image that the command draws."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    exec(code, {})
    (command,) = re.findall(r"`sbrush (sample .*?)`", text)
    done = sbrush(*shlex.split(command), "-o", "ours.png", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    with Image.open("cat.png") as theirs, Image.open("ours.png") as ours:
        difference = np.abs(np.asarray(theirs, float) - np.asarray(ours, float))
        assert np.asarray(ours, float).std() > 5  # not a flat image, which would agree with anything
    assert difference.max() <= 1


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("kind", TEACHERS)
def test_every_snippet_draws_the_students_own_image(tmp_path, monkeypatch, kind, lora):
    t_init = 700 if lora == (kind in ("v", "half xl")) else None
    source = str(TEACHERS[kind](tmp_path / "teacher"))
    out = write(source, tmp_path, t_init=t_init, lora=lora)
    if lora:
        check(out / "student-lora", tmp_path, monkeypatch, out / "student")
    else:
        check(out / "student", tmp_path, monkeypatch)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_so_does_that_of_a_student_whose_output_is_the_image(tmp_path, monkeypatch, tiny_teacher, lora):
    out = write(str(tiny_teacher), tmp_path, lora=lora, reparameterised=False)
    check(out / "student", tmp_path, monkeypatch)
    if lora:
        check(out / "student-lora", tmp_path, monkeypatch, out / "student")


def test_so_does_that_of_a_merged_student(tmp_path, monkeypatch, tiny_teacher):
    one, two = (write(str(tiny_teacher), tmp_path / str(seed), seed=seed, lora=seed == 2) for seed in (1, 2))
    merge(str(one / "student"), str(two / "student"), tmp_path / "merged")
    check(tmp_path / "merged", tmp_path, monkeypatch)
    text = (tmp_path / "merged" / "README.md").read_text()
    assert "The settings are those of the first student that was merged." in text


def test_so_does_that_of_the_built_in_teachers_lora(tmp_path, monkeypatch):
    out = write(None, tmp_path, t_init=625, lora=True)
    check(out / "student-lora", tmp_path, monkeypatch, out / "student")


def test_so_does_that_of_a_single_files_lora(tmp_path, monkeypatch, tiny_teacher):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file = whole_file(tiny_teacher, tmp_path / "teacher.safetensors", dtype=torch.float16)
    out = write(str(file), tmp_path, lora=True, teacher_config=str(tiny_teacher))
    check(out / "student-lora", tmp_path, monkeypatch, out / "student")


@pytest.mark.filterwarnings("ignore:__array__ impl:DeprecationWarning")  # of numpy 2, within diffusers
@pytest.mark.parametrize("t_init", [None, 700])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_the_schedulers_that_a_card_names_draw_the_same_image_and_the_others_do_not(tmp_path, prediction, t_init):
    import diffusers

    source = build_tiny_teacher(tmp_path / "teacher", prediction=prediction)
    folder = write(str(source), tmp_path, t_init=t_init) / "student"
    text = (folder / "README.md").read_text()
    same, others = (
        set(re.findall(r"`(\w+Scheduler)`", text.split(start)[1].split("\n")[0]))
        for start in ("diffusers draw the same image: ", "These draw another image")
    )
    assert same | others == set(SCHEDULERS) and not same & others
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    own, latents = pipe.scheduler, {}
    for name in SCHEDULERS:
        pipe.scheduler = getattr(diffusers, name).from_config(own.config)
        options = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "latent"}
        try:
            latents[name] = pipe("a cat", generator=torch.Generator().manual_seed(5), **options).images
        except ValueError:  # PNDM's, which cannot take one step
            assert name in others
    for name, drawn in latents.items():
        assert ((drawn - latents["DDIMScheduler"]).abs().max() <= 1e-3) == (name in same), name
    assert {"DDIMScheduler", "DDPMScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"} <= same
    assert ("LCMScheduler" in same) == (t_init is None) and "EulerDiscreteScheduler" in others


def front(text):
    """A card's front matter, as the Hub reads it."""
    return yaml.safe_load(text.split("---\n")[1])


def test_a_cards_front_matter_is_what_the_hub_accepts(tmp_path, tiny_teacher, monkeypatch):
    teacher = load_teacher(str(tiny_teacher))
    names = {name: None for name in ("stickers (built in)", str(tiny_teacher), "m.safetensors", "runs/teacher")}
    names |= {"org/a_model.v1": "org/a_model.v1", "an `odd` [name]\n---\nlicense: mit": None}
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "teacher").mkdir(parents=True)
    for name, base in names.items():
        teacher.about = ABOUT | {"teacher": name, "license": "openrail++"}
        for text in (card.model_card(teacher), format_cards.lora_card(teacher)):
            read = front(text)
            assert read.get("base_model") == base and read["license"] == "openrail++"
            assert read["library_name"] == "diffusers" and "one-step" in read["tags"]
            assert "3,000 prompts and no images" in text.replace("\n", " ")
    assert "lora" in read["tags"]


def test_a_lora_states_all_of_its_teachers_licence(tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    said = {"license": "other", "license_name": "sai-nc", "license_link": "https://x.y"}
    teacher.about = ABOUT | {"teacher": "t"} | said
    assert said.items() <= front(
        format_cards.lora_card(teacher)
    ).items() and "sai-nc (https://x.y)" in format_cards.lora_card(teacher)


def test_a_merged_students_card_names_both_in_words(tmp_path, tiny_teacher):
    teacher = load_teacher(str(tiny_teacher))
    first = {"student": "runs/a", "sha256": "ab", "share": 0.25, "license": "mit"}
    about = {"merged": [first, first | {"student": "runs/b", "share": 0.75}], "prompts": {"count": 1, "sha256": "0"}}
    teacher.about = ABOUT | {"teacher": "t", "license": "mit"} | about
    text = card.model_card(teacher)
    assert "| merged from | 0.75 of runs/b (SHA-256 ab, licence: mit) |" in text
    assert "from 1 prompt and no images" in text


@pytest.mark.parametrize(("name", "folder"), BUILT_IN_STUDENTS.items())
def test_so_do_those_of_the_shipped_students(tmp_path, monkeypatch, name, folder):
    text = (BUILT_IN / folder / "README.md").read_text(encoding="utf-8")
    assert text == card.model_card(load_student(name))
    check_text(text, tmp_path, monkeypatch)
