"""`sbrush eval --coco-30k` against the usual way and against the floor, in one run.  `make bench-eval`

The usual way: plain diffusers writes PNGs, a pass of torch's DataLoader over them as clean-fid has it, and one for
CLIP; Inception in torch's own memory layout, CLIP over all 77 tokens. Both take turns with the same student, metrics
and pictures; the metrics' weights are random, for speed does not depend on them. The floor: the FLOPs of student, VAE,
Inception and CLIP, as sbrush runs them, over the rate of the matrix products that the same device does in the same run,
in the student's dtype. The reference is not in it: its pictures are looked at once.

On a GPU:  python -m sbrush.evaluate.bench --size sd21 --clip ViT-g-14 --pictures 3000 --minutes 6
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Self

import open_clip
import torch
import typer
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from sbrush.console import out, out_json, say
from sbrush.device import pick_device, pick_dtype
from sbrush.evaluate.clip import ClipScorer
from sbrush.evaluate.coco import BATCH, PROTOCOLS, Looker
from sbrush.evaluate.inception import Inception
from sbrush.floor import matrix_rate, seconds
from sbrush.models import full_size
from sbrush.models.load import load_student
from sbrush.models.model import Model
from sbrush.pictures import to_image
from sbrush.sample import student_pictures
from sbrush.shards import Shards
from sbrush.stickers.world import random_caption, stream

TURNS = 3


def ours(student: Model, looker: Looker, texts: list[str], folder: Path, *, batch: int) -> dict[str, Tensor]:
    """Features and CLIP scores of a student's pictures as `sbrush eval --coco-30k` takes them: rows by name."""
    shards = Shards(folder, len(texts))

    def drawn(blocks: Sequence[range]) -> Iterator[Tensor]:
        for block in blocks:
            yield from student_pictures(student, [texts[i] for i in block], block, batch=batch)

    shards.fill("sbrush", lambda blocks: looker.made(drawn(blocks), [texts[i] for block in blocks for i in block]))
    return shards.rows()


class PlainInception(Inception):
    """In the memory layout that networks have if nobody asks, layer by layer."""

    memory_format = torch.contiguous_format

    def frozen(self) -> Self:
        return self.requires_grad_(False).eval()


class PlainClip(ClipScorer):
    """Reads all 77 tokens, whatever the captions' length."""

    def _said(self, tokens: Tensor, device: torch.device) -> Tensor:
        said: Tensor = self.network.encode_text(tokens.to(device), normalize=True)
        return said


def usual(student: Model, looker: Looker, texts: list[str], folder: Path, *, batch: int) -> dict[str, Tensor]:
    """The same in three passes: pictures to disk, features, CLIP scores; `looker` with plain networks."""
    parts = {part: getattr(student, part) for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(texts), batch):
        some = texts[first : first + batch]
        noise = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
        drawn = pipe(some, num_inference_steps=1, guidance_scale=1, generator=noise).images
        for i, picture in enumerate(drawn, first):
            picture.save(folder / f"{i}.png")

    def passed(part: str) -> DataLoader[Tensor]:
        files = _Files([folder / f"{i}.png" for i in range(len(texts))], looker, part)
        return DataLoader(files, BATCH, num_workers=os.cpu_count() or 1, multiprocessing_context="fork")

    features = [looker.inception.features(pictures, looker.protocol.resize) for pictures in passed("inception")]
    assert looker.clip is not None
    spoken = (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
    scores = [looker.clip.scores(p, said) for p, said in zip(passed("clip"), spoken, strict=True)]
    return {"features": torch.cat(features), "clip": torch.cat(scores)}


class _Files(torch.utils.data.Dataset[Tensor]):
    """Picture files, each as one of the networks takes it."""

    def __init__(self, files: list[Path], looker: Looker, part: str) -> None:
        self._files, self._looker, self._part = files, looker, part

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Tensor:
        with Image.open(self._files[i]) as picture:
            return getattr(self._looker.prepare(picture, scored=self._part == "clip"), self._part)


def flops(student: Model, looker: Looker, texts: Sequence[str]) -> dict[str, float]:
    """FLOPs of a picture by what takes them, counted while pictures for `texts` are made and looked at."""
    pictures = torch.empty(0)

    def make() -> None:
        nonlocal pictures
        pictures = torch.cat(list(student_pictures(student, texts, range(len(texts)), batch=len(texts))))

    def counted(work: Callable[[], Any]) -> float:
        # Attention in plain products: not every torch's counter knows the fused one on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        return counter.get_total_flops() / len(texts)

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation, which the counter does not know
    try:
        found = {"student and VAE": counted(make)}
        ready = [looker.prepare(to_image(p), scored=True) for p in pictures]
        found["Inception"] = counted(lambda: looker.look(ready))
        found["CLIP"] = counted(lambda: looker.look(ready, texts)) - found["Inception"]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return found


def main(
    student: Annotated[str | None, typer.Option(help="A student's folder; by default the shipped one.")] = None,
    size: Annotated[full_size.Size | None, typer.Option(help="Random weights of this size, in its place.")] = None,
    clip: Annotated[str, typer.Option(help="open_clip's name of a model; the benchmark's is ViT-g-14.")] = "ViT-B-32",
    pictures: Annotated[int, typer.Option(help="Pictures in all, shared by the turns.", min=TURNS)] = 300,
    batch: Annotated[int, typer.Option(help="Pictures made at once.", min=1)] = 64,
    minutes: Annotated[float, typer.Option(help="After which no turn but the first begins.", min=0)] = 60,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Pictures/s of `sbrush eval --coco-30k` and of the usual way, and the share of the floor."""
    until = time.monotonic() + 60 * minutes
    where = pick_device(device)
    dtype = pick_dtype("auto", where)
    with full_size.or_made(student, size) as source:
        model = load_student(source, device=where, dtype=dtype)
    network, _, preprocess = open_clip.create_model_and_transforms(clip, device=where)
    tokenizer = open_clip.get_tokenizer(clip)

    def looker(inception: type[Inception], scorer: type[ClipScorer]) -> Looker:
        return Looker(
            PROTOCOLS["swiftbrush"], inception().frozen().to(where), scorer(network, preprocess, tokenizer, clip)
        )

    lookers = {usual: looker(PlainInception, PlainClip), ours: looker(Inception, ClipScorer)}
    texts = [random_caption(stream("bench", i)).text for i in range(pictures // TURNS)]
    taken: dict[str, list[float]] = {"usual": [], "sbrush": []}
    for turn in range(-1, TURNS):  # the first warms up, on a batch
        if turn > 0 and time.monotonic() >= until:
            break
        some = texts if turn >= 0 else texts[:batch]
        for name, way in (("usual", usual), ("sbrush", ours)):
            with tempfile.TemporaryDirectory() as folder:
                took = seconds(partial(way, model, lookers[way], some, Path(folder), batch=batch), where)
            if turn >= 0:
                taken[name].append(took)
                say(f"turn {turn + 1} of {TURNS}, {name}: {len(some) / took:.3g} pictures/s")
    work, rate = flops(model, lookers[ours], texts[:2]), matrix_rate(where, dtype)
    floor = sum(work.values()) / rate
    rates = {name: len(texts) / statistics.median(times) for name, times in taken.items()}
    ratio = statistics.median(u / o for u, o in zip(taken["usual"], taken["sbrush"], strict=True))
    if json_:
        out_json(
            {
                "student": size or model.name, "device": where, "dtype": str(dtype), "clip": clip,
                "turns": len(taken["sbrush"]), "pictures_a_turn": len(texts),
                "pictures_per_second": rates, "times_usual": ratio, "gflop_a_picture":
                {name: count / 1e9 for name, count in work.items()}, "matrix_gflop_per_second": rate / 1e9,
                "share_of_floor": {name: floor * r for name, r in rates.items()}, "torch": torch.__version__,
            }
        )  # fmt: skip
        return
    out(f"{size or model.name} on {where}, {dtype}, CLIP {clip}, torch {torch.__version__}")
    out(f"turns: {len(taken['sbrush'])}, pictures in each: {len(texts)}")
    for name, count in work.items():
        out(f"{name:26} {count / 1e9:8.1f} GFLOP a picture")
    out(f"{'matrix products':26} {rate / 1e12:8.2f} TFLOP/s: at most {1 / floor:.1f} pictures/s")
    for name, label in (("usual", "PNGs, then two passes"), ("sbrush", "sbrush eval --coco-30k")):
        out(f"{label:26} {rates[name]:8.2f} pictures/s   {100 * floor * rates[name]:.0f} % of the floor")
    out(f"{'':26} {ratio:8.2f} times the usual way")


if __name__ == "__main__":
    typer.run(main)
