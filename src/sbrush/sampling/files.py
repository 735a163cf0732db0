"""Prompts and seeds to image files: drawn a batch at a time and written at once, so memory stays flat for any number.

In a folder the work goes on where it stopped: an image that is there with the same prompt, seed, weights and number
format is kept, a batch that lacks one is drawn whole, so that each image is the same to the bit as without the stop.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from PIL import Image
from torch import Tensor

from sbrush import console
from sbrush.console import SbrushError, info, printable, progress
from sbrush.models.lora_request import LoraRequest
from sbrush.sampling.artist import Artist, Comparison
from sbrush.sampling.control_request import Control
from sbrush.sampling.edit_request import EditRequest
from sbrush.sampling.generation import Drawer, Overflow, student_images
from sbrush.sampling.images import cell_size, encode_png, image_grid, save_png, to_image
from sbrush.sampling.negative_request import Negative
from sbrush.sampling.notes import note_truncated_prompts, note_unknown_words
from sbrush.sampling.opening import Runtime, open_student
from sbrush.sampling.targets import KEY, KEYS, Images, Target, check_same, find_records, read_keys
from sbrush.storage.files import write_json

if TYPE_CHECKING:
    from sbrush.models.model import Model

COLUMNS = 8  # of a grid: more seeds are wrapped
LARGEST_GRID = 80_000_000  # pixels; Pillow takes a file of 89 million for an attack


@dataclass(frozen=True)
class SampleRequest:
    """What is to be drawn, by whom, and where it goes.

    `vae`: what decodes the student's images, if not its own VAE; a teacher beside it keeps its own.
    `guidance`: the scale, for a student that takes one. `teacher` None with `compare` is the one that the student
    names. `metadata`: whether an image's file says how it was drawn. `overwrite`: whether images that a folder has are
    drawn again.
    """

    images: Images
    target: Target
    student: str | None = None
    steps: int | None = None
    start_timestep: int | None = None
    loras: tuple[LoraRequest, ...] = ()
    vae: str | None = None
    edit: EditRequest | None = None
    negative: Negative | None = None
    guidance: float | None = None
    controls: tuple[Control, ...] = ()
    compare: bool = False
    teacher: str | None = None
    teacher_config: str | None = None
    teacher_steps: int = 25
    teacher_guidance: float | None = None
    metadata: bool = True
    overwrite: bool = False
    batch: int = 32
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    runtime: Runtime = "auto"


@dataclass(frozen=True)
class Saved:
    """An image that is written: `path` None is stdout; `new`: whether it was drawn now."""

    path: Path | None
    prompt: str
    seed: int
    new: bool = True


def sample_to_files(request: SampleRequest) -> Iterator[Saved]:
    """Draws each prompt with each seed; an item for each image as soon as it is written, in order.

    Several images in one file are a grid: a row for each prompt, a column for each seed, eight to a row. SbrushError,
    before anything is drawn, if a model cannot be had, or a file of another content is in the way.
    """
    target, images = request.target, request.images
    target.check(len(images), compare=request.compare)
    folder = target.path if target.folder else None
    records = {}
    if folder and not request.overwrite:
        records = find_records(images, folder, metadata=request.metadata)
    artist = load_artist(request)
    if folder:
        yield from _fill(folder, _check_done(folder, records, request, artist), request, artist)
    else:
        yield from _draw_one(request, artist)


def load_artist(request: SampleRequest) -> Artist:
    """Those who draw. Tells of prompts and of a student that will give other images than people expect."""
    student, dtype = _load_student(request)
    student.rungs(request.steps)  # or SbrushError
    edit = None
    if request.edit:
        from sbrush.sampling.editing import check_edit, fit_edit

        check_edit(student, request.steps)
        edit = fit_edit(request.edit, student)
    steering = None
    if request.controls:
        from sbrush.sampling.control import load_steering

        steering = load_steering(student, request.controls)
        student = steering.steer(student)
    note_unknown_words(student, [*request.images.prompts, *([request.negative.text] if request.negative else [])])
    note_truncated_prompts(student, request.images.prompts)
    compare = None
    if request.compare:
        compare = Comparison.load(
            cast("Model", student), request.teacher, config=request.teacher_config, steps=request.teacher_steps,
            guidance=request.teacher_guidance, dtype=dtype,
        ).with_negative(request.negative)  # fmt: skip
        if steering:
            compare = dataclasses.replace(compare, teacher=steering.steer(compare.teacher))
    return Artist(
        student, str(dtype).removeprefix("torch."), compare, request.start_timestep, request.steps, edit, steering
    )


def _load_student(request: SampleRequest) -> tuple[Drawer, torch.dtype]:
    """The student, and its number format: that asked for, or float32, with a note, if float16 overflows.

    Its first image decides, so that a command that is given again decides alike.
    """
    start, device, steered = request.start_timestep, request.device, request.negative or request.guidance is not None

    def load(dtype: torch.dtype, runtime: Runtime) -> Drawer:
        student = open_student(
            request.student, start_timestep=start, loras=request.loras, vae=request.vae, device=device, dtype=dtype,
            runtime=runtime,
        )  # fmt: skip
        if not steered:
            return student
        from sbrush.sampling.guidance import at_guidance, with_negative

        return with_negative(at_guidance(cast("Model", student), request.guidance), request.negative)

    # Only torch encodes an image to start from, has a teacher or ControlNets too, or attention for a negative prompt.
    needs_torch = request.edit or request.controls or request.compare or steered
    student = load(request.dtype, "torch" if request.runtime == "auto" and needs_torch else request.runtime)
    if request.dtype != torch.float16:
        return student, request.dtype
    prompt, seed = request.images[0]
    try:
        list(student_images(student, [prompt], [seed]))
        return student, request.dtype
    except Overflow:
        info(f"note: {printable(student.name)} overflows in float16; it draws in float32")
        return load(torch.float32, "torch"), torch.float32


def _check_done(
    folder: Path, records: Mapping[int, Mapping[str, Any]], request: SampleRequest, artist: Artist
) -> set[int]:
    """The images that the folder has; SbrushError if one of its files was drawn otherwise."""
    for index, record in records.items():
        wanted = artist.drawn_by if request.metadata else {KEY: _key(request.images[index], artist)}
        check_same(folder / request.images.name(index), record, wanted)
    return set(records)


def _fill(folder: Path, done: set[int], request: SampleRequest, artist: Artist) -> Iterator[Saved]:
    """A file for each image; those that are `done` are not written again."""
    images = request.images
    if done:
        info(f"{printable(folder)} has {len(done)} of {len(images)} images already")
    if len(done) == len(images):
        yield from (Saved(folder / images.name(index), *images[index], new=False) for index in range(len(images)))
        return
    keys, before = dict[str, str](), set[str]()
    if not request.metadata:
        keys = {images.name(index): _key(images[index], artist) for index in range(len(images))}
        # What is there and is to be replaced was drawn otherwise until it is drawn again.
        before = {images.name(index) for index in set(images.present(folder)) - done}
        known = {name: key for name, key in (read_keys(folder) | keys).items() if name not in before}
        write_json(folder / KEYS, known)
    with progress("drawing", len(images), done=len(done), unit="images") as bar:
        for first in range(0, len(images), request.batch):
            block = range(first, min(first + request.batch, len(images)))
            pairs = [images[index] for index in block]
            drawn = None
            if not done.issuperset(block):
                drawn = artist.draw(*zip(*pairs, strict=True), batch=request.batch)
            for index, (prompt, seed) in zip(block, pairs, strict=True):
                file = folder / images.name(index)
                cells = next(drawn) if drawn else ()
                if index not in done:
                    _save(file, _side_by_side(cells, artist), artist.record(prompt, seed) if request.metadata else None)
                yield Saved(file, prompt, seed, new=index not in done)
            if again := before.intersection(images.name(index) for index in block):
                write_json(folder / KEYS, read_keys(folder) | {name: keys[name] for name in again})
            bar.advance(len(set(block) - done))


def _draw_one(request: SampleRequest, artist: Artist) -> Iterator[Saved]:
    """One PNG: an image or a grid, in a file or on stdout."""
    images, path = request.images, request.target.path
    width, height = cell_size(*artist.student.image_size)
    if width * height * len(images) * len(artist.labels) > LARGEST_GRID:
        raise SbrushError(
            f"a grid of {len(images)} images, each {width} x {height} pixels, is too large to look at",
            "give a folder, such as -o images/, for a file each",
            code=2,
        )
    cells = list[tuple[Tensor, ...]]()
    with progress("drawing", len(images), unit="images") as bar:
        for first in range(0, len(images), request.batch):
            pairs = [images[index] for index in range(first, min(first + request.batch, len(images)))]
            cells += artist.draw(*zip(*pairs, strict=True), batch=request.batch)
            bar.advance(len(pairs))
    if len(images) > 1:
        whole = _grid(cells, images, artist.labels)
        record = artist.record("\n".join(images.prompts), " ".join(map(str, images.seeds)), grid=True)
    else:
        whole, record = _side_by_side(cells[0], artist), artist.record(*images[0])
    if path is None:
        console.out_bytes(encode_png(whole, record if request.metadata else None))
    else:
        if path.is_file():
            info(f"note: {printable(path)} was there, and is replaced")
        _save(path, whole, record if request.metadata else None)
    for index in range(len(images)):
        yield Saved(path, *images[index])


def _side_by_side(cells: Sequence[Tensor], artist: Artist) -> Image.Image:
    """The student's image; with a teacher, the teacher's on its right."""
    return image_grid([cells], column_labels=artist.labels) if artist.compare else to_image(cells[0])


def _grid(cells: Sequence[tuple[Tensor, ...]], images: Images, drawers: Sequence[str]) -> Image.Image:
    """A row for each prompt, a column for each seed; of more than COLUMNS seeds a prompt has several rows.

    The student's row comes first, then the teacher's, if there is one.
    """
    names = [f"seed {seed}" for seed in images.seeds]
    rows, labels, captions = list[list[Tensor]](), list[str](), list[list[str]]()
    for place, prompt in enumerate(images.prompts):
        for first in range(0, len(names), COLUMNS):
            here = range(first, min(first + COLUMNS, len(names)))
            rows += [list(row) for row in zip(*(cells[place * len(names) + i] for i in here), strict=True)]
            labels += [prompt if first == 0 else "", *(f"  {drawer}" for drawer in drawers[1:])]
            captions += [[names[i] for i in here]] * len(drawers)
    if len(names) > COLUMNS:
        return image_grid(rows, row_labels=labels, cell_labels=captions)
    return image_grid(rows, row_labels=labels, column_labels=names)


def _save(path: Path, image: Image.Image, record: dict[str, Any] | None) -> None:
    try:
        save_png(path, image, record)
    except OSError as problem:
        raise SbrushError(
            f"cannot write {printable(path)}: {problem.strerror or problem}",
            "make room or choose another -o; images that are written are kept, and the same command goes on",
        ) from problem


def _key(pair: tuple[str, int], artist: Artist) -> str:
    """What stands for an image that does not say how it was drawn; it does not tell the prompt."""
    return hashlib.sha256(json.dumps([*pair, artist.drawn_by]).encode()).hexdigest()[:32]
