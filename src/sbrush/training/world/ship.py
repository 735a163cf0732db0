"""Puts what was trained into the package, with the guidance scale that the teacher is used at.  `make teach`:

python -m sbrush.training.world.ship teacher       teacher and judge, as teach.py left them
python -m sbrush.training.world.ship guidance      the teacher's guidance scale, chosen on validation captions
python -m sbrush.training.world.ship graphs        the networks' architecture as ONNX; needs sbrush[onnx]
python -m sbrush.training.world.ship student DIR   a student, or the one in a run's folder
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderKL, ModelMixin, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from sbrush.console import info
from sbrush.metrics.accuracy import attribute_accuracy
from sbrush.models.card import model_card
from sbrush.models.load import BUILT_IN, FORMAT, load_student, load_teacher
from sbrush.models.load_vae import with_vae
from sbrush.models.model import Model
from sbrush.models.single_file import published_name
from sbrush.models.source import BUILT_IN_STUDENTS
from sbrush.models.vae_source import TINY
from sbrush.onnx.export import write_graphs
from sbrush.onnx.graphs import GRAPHS
from sbrush.sampling.generation import teacher_images
from sbrush.stickers import networks
from sbrush.stickers.judge import Judge
from sbrush.stickers.world import random_caption, stream
from sbrush.storage.files import follow_umask, write_json, write_text
from sbrush.training.world.teach import WORK, Work

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def teacher(
    work: Work = WORK, to: Annotated[Path, typer.Option(help="Where the package keeps them.")] = BUILT_IN
) -> None:
    """Teacher and judge as shipped: UNet, VAE and judge in float16, the small text encoder in float32."""
    folder = to / "teacher"
    _save_half(UNet2DConditionModel.from_pretrained(work / "unet"), folder / "unet")
    _save_half(AutoencoderKL.from_pretrained(work / "vae"), folder / "vae")
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(work / part, folder / part, dirs_exist_ok=True)
    file = folder / "text_encoder" / "model.safetensors"
    words = {published_name("text_encoder", name): value for name, value in load_file(file).items()}
    save_file(words, file, metadata={"format": "pt"})
    shutil.copytree(work / "judge", to / "judge", dirs_exist_ok=True)
    networks.build_scheduler().save_pretrained(folder / "scheduler")
    write_json(folder / "model_index.json", Model.student_index())
    write_json(folder / "sbrush.json", {"format": FORMAT, "world": "stickers", "license": "apache-2.0"})
    follow_umask(to)


@app.command()
def guidance(
    scales: Annotated[str, typer.Option(help="Guidance scales to try.")] = "1.5,2,3,4",
    images: Annotated[int, typer.Option(help="Validation captions.")] = 300,
) -> None:
    """Chooses the teacher's guidance scale on validation captions, and records it.

    The smallest whose mean accuracy is within half a point of the best: more of it would cost variety.
    """
    built_in, looking = load_teacher(), Judge.load()
    captions = [random_caption(stream("validation", i)) for i in range(images)]
    texts, seeds, means = [c.text for c in captions], list(range(500_000, 500_000 + images)), dict[float, float]()
    for scale in map(float, scales.split(",")):
        drawn = torch.cat(list(teacher_images(built_in, texts, seeds, steps=25, guidance=scale, batch=50)))
        score = attribute_accuracy(captions, looking.classify(looking.features(drawn)))
        means[scale] = sum(score.values()) / len(score)
        info(f"guidance {scale}: mean accuracy {means[scale]:.4f}  {score}")
    chosen = min(scale for scale, mean in means.items() if mean > max(means.values()) - 0.005)
    file = BUILT_IN / "teacher" / "sbrush.json"
    write_json(file, json.loads(file.read_text()) | {"guidance": chosen})


@app.command()
def graphs(to: Annotated[Path, typer.Option(help="Where the package keeps them.")] = GRAPHS) -> None:
    """The architecture of the built-in student's networks as ONNX, with which onnxruntime draws."""
    write_graphs(with_vae(load_student(), TINY), to)
    follow_umask(to)


@app.command()
def student(
    folder: Annotated[Path, typer.Argument(help="The student to be shipped, or the run that made it.")],
    to: Path = BUILT_IN,
    name: Annotated[str, typer.Option(help="Its name: " + " or ".join(BUILT_IN_STUDENTS))] = "stickers",
) -> None:
    """A student as shipped: its UNet in float16; the other parts are the teacher's."""
    home = BUILT_IN_STUDENTS[name]
    if (folder / "student").is_dir():
        folder = folder / "student"
    _save_half(UNet2DConditionModel.from_pretrained(folder / "unet"), to / home / "unet")
    shutil.copytree(folder / "scheduler", to / home / "scheduler", dirs_exist_ok=True)
    shutil.copyfile(folder / "sbrush.json", to / home / "sbrush.json")
    made = load_student(str(folder))
    places = {part: to / (home if part in ("unet", "scheduler") else "teacher") for part in made.parts}
    write_text(to / home / "README.md", model_card(dataclasses.replace(made, folders=places)))
    follow_umask(to)


def _save_half(net: ModelMixin, folder: Path) -> None:
    """A network in float16, its configuration without the folder that it came from."""
    net.register_to_config(_name_or_path="")
    net.half().save_pretrained(folder)


if __name__ == "__main__":
    app()
