"""`sbrush eval --coco-30k` against the baseline and against the roofline, in one run.  `make bench-eval`

The baseline: plain diffusers writes PNGs, a pass of torch's DataLoader over them as clean-fid has it, and one for
CLIP; Inception in torch's own memory layout, CLIP over all 77 tokens. Both take turns with the same student, metrics
and images; the metrics' weights are random, for speed does not depend on them. The roofline: the FLOPs of student, VAE,
Inception and CLIP, as sbrush runs them, over the rate of the matrix products that the same device does in the same run,
in the student's precision. The reference is not in it: its images are looked at once.

On a GPU:  python -m sbrush.benchmarks.evaluation --size sd21 --clip ViT-g-14 --images 3000 --minutes 6
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
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode

from sbrush.benchmarks import full_size
from sbrush.benchmarks.roofline import matrix_rate, seconds
from sbrush.console import info, out, out_json
from sbrush.device import pick_arithmetic, pick_device
from sbrush.evaluate.coco.features import BATCH, FeatureExtractor
from sbrush.evaluate.coco.protocols import PROTOCOLS
from sbrush.metrics.clip import ClipScorer
from sbrush.metrics.inception import Inception
from sbrush.models.load import load_student
from sbrush.models.model import Model
from sbrush.sampling.generation import student_images
from sbrush.sampling.images import to_image
from sbrush.sampling.open_image import open_image
from sbrush.stickers.world import random_caption, stream
from sbrush.storage.shards import Shards

TURNS = 3


def ours(
    student: Model, extractor: FeatureExtractor, texts: list[str], folder: Path, *, batch: int
) -> dict[str, Tensor]:
    """Features and CLIP scores of a student's images as `sbrush eval --coco-30k` takes them: rows by name."""
    shards = Shards(folder, len(texts))

    def drawn(blocks: Sequence[range]) -> Iterator[Tensor]:
        for block in blocks:
            yield from student_images(student, [texts[i] for i in block], block, batch=batch)

    shards.fill(
        "sbrush",
        lambda blocks: extractor.extract_generated(drawn(blocks), [texts[i] for block in blocks for i in block]),
    )
    return shards.rows()


class BaselineInception(Inception):
    """In the memory layout that networks have if nobody asks, layer by layer."""

    memory_format = torch.contiguous_format

    def frozen(self) -> Self:
        return self.requires_grad_(False).eval()


class BaselineClip(ClipScorer):
    """Reads all 77 tokens, whatever the captions' length."""

    def _embed_texts(self, tokens: Tensor, device: torch.device) -> Tensor:
        texts: Tensor = self.network.encode_text(tokens.to(device), normalize=True)
        return texts


def baseline(
    student: Model, extractor: FeatureExtractor, texts: list[str], folder: Path, *, batch: int
) -> dict[str, Tensor]:
    """The same in three passes: images to disk, features, CLIP scores; `extractor` with plain networks."""
    parts = {part: getattr(student, part) for part in ("vae", "text_encoder", "tokenizer", "unet", "scheduler")}
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    pipe = StableDiffusionPipeline(**parts, **absent)
    pipe.set_progress_bar_config(disable=True)
    for first in range(0, len(texts), batch):
        some = texts[first : first + batch]
        noise = [torch.Generator().manual_seed(first + i) for i in range(len(some))]
        drawn = pipe(some, num_inference_steps=1, guidance_scale=1, generator=noise).images
        for i, image in enumerate(drawn, first):
            image.save(folder / f"{i}.png")

    def passed(part: str) -> DataLoader[Tensor]:
        files = _Files([folder / f"{i}.png" for i in range(len(texts))], extractor, part)
        return DataLoader(files, BATCH, num_workers=os.cpu_count() or 1, multiprocessing_context="fork")

    features = [extractor.inception.features(images, extractor.protocol.resize) for images in passed("inception")]
    assert extractor.clip is not None
    spoken = (texts[first : first + BATCH] for first in range(0, len(texts), BATCH))
    scores = [extractor.clip.scores(p, said) for p, said in zip(passed("clip"), spoken, strict=True)]
    return {"features": torch.cat(features), "clip": torch.cat(scores)}


class _Files(torch.utils.data.Dataset[Tensor]):
    """Image files, each as one of the networks takes it."""

    def __init__(self, files: list[Path], extractor: FeatureExtractor, part: str) -> None:
        self._files, self._looker, self._part = files, extractor, part

    def __len__(self) -> int:
        return len(self._files)

    def __getitem__(self, i: int) -> Tensor:
        image = open_image(self._files[i])
        return getattr(self._looker.prepare(image, scored=self._part == "clip"), self._part)


def flops(student: Model, extractor: FeatureExtractor, texts: Sequence[str]) -> dict[str, float]:
    """FLOPs of an image by what takes them, counted while images for `texts` are made and looked at."""
    images = torch.empty(0)

    def make() -> None:
        nonlocal images
        images = torch.cat(list(student_images(student, texts, range(len(texts)), batch=len(texts))))

    def counted(work: Callable[[], Any]) -> float:
        # Attention in plain products: not every torch's counter knows the fused one on a CPU.
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            work()
        return counter.get_total_flops() / len(texts)

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # it is one operation, which the counter does not know
    try:
        found = {"student and VAE": counted(make)}
        ready = [extractor.prepare(to_image(p), scored=True) for p in images]
        found["Inception"] = counted(lambda: extractor.extract(ready))
        found["CLIP"] = counted(lambda: extractor.extract(ready, texts)) - found["Inception"]
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return found


def main(
    student: Annotated[str | None, typer.Option(help="A student's folder; by default the shipped one.")] = None,
    size: Annotated[full_size.Size | None, typer.Option(help="Random weights of this size, in its place.")] = None,
    clip: Annotated[str, typer.Option(help="open_clip's name of a model; the benchmark's is ViT-g-14.")] = "ViT-B-32",
    images: Annotated[int, typer.Option(help="Images in all, shared by the turns.", min=TURNS)] = 300,
    batch: Annotated[int, typer.Option(help="Images made at once.", min=1)] = 64,
    minutes: Annotated[float, typer.Option(help="After which no turn but the first begins.", min=0)] = 60,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Images/s of `sbrush eval --coco-30k` and of the baseline, and the share of the roofline."""
    until = time.monotonic() + 60 * minutes
    where = pick_device(device)
    arithmetic = pick_arithmetic("auto", where, "eval")
    with full_size.or_made(student, size) as source:
        model = load_student(source, device=where, dtype=arithmetic.dtype)
    network, _, preprocess = open_clip.create_model_and_transforms(clip, device=where)
    tokenizer = open_clip.get_tokenizer(clip)

    def extractor(inception: type[Inception], scorer: type[ClipScorer]) -> FeatureExtractor:
        return FeatureExtractor(
            PROTOCOLS["swiftbrush"], inception().frozen().to(where), scorer(network, preprocess, tokenizer, clip)
        )

    extractors = {baseline: extractor(BaselineInception, BaselineClip), ours: extractor(Inception, ClipScorer)}
    texts = [random_caption(stream("bench", i)).text for i in range(images // TURNS)]
    taken: dict[str, list[float]] = {"baseline": [], "sbrush": []}
    for turn in range(-1, TURNS):  # the first warms up, on a batch
        if turn > 0 and time.monotonic() >= until:
            break
        some = texts if turn >= 0 else texts[:batch]
        for name, way in (("baseline", baseline), ("sbrush", ours)):
            with tempfile.TemporaryDirectory() as folder, arithmetic.context(where):
                took = seconds(partial(way, model, extractors[way], some, Path(folder), batch=batch), where)
            if turn >= 0:
                taken[name].append(took)
                info(f"turn {turn + 1} of {TURNS}, {name}: {len(some) / took:.3g} images/s")
    work = flops(model, extractors[ours], texts[:2])
    with arithmetic.context(where):
        rate = matrix_rate(where, arithmetic.dtype)
    roofline = sum(work.values()) / rate
    rates = {name: len(texts) / statistics.median(times) for name, times in taken.items()}
    ratio = statistics.median(u / o for u, o in zip(taken["baseline"], taken["sbrush"], strict=True))
    if json_:
        out_json(
            {
                "student": size or model.name, "device": where, "precision": str(arithmetic), "clip": clip,
                "turns": len(taken["sbrush"]), "images_a_turn": len(texts),
                "images_per_second": rates, "times_baseline": ratio, "gflop_a_image":
                {name: count / 1e9 for name, count in work.items()}, "matrix_gflop_per_second": rate / 1e9,
                "roofline_fraction": {name: roofline * r for name, r in rates.items()}, "torch": torch.__version__,
            }
        )  # fmt: skip
        return
    out(f"{size or model.name} on {where}, {arithmetic}, CLIP {clip}, torch {torch.__version__}")
    out(f"turns: {len(taken['sbrush'])}, images in each: {len(texts)}")
    for name, count in work.items():
        out(f"{name:26} {count / 1e9:8.1f} GFLOP an image")
    out(f"{'matrix products':26} {rate / 1e12:8.2f} TFLOP/s: at most {1 / roofline:.1f} images/s")
    for name, label in (("baseline", "PNGs, then two passes"), ("sbrush", "sbrush eval --coco-30k")):
        out(f"{label:26} {rates[name]:8.2f} images/s   {100 * roofline * rates[name]:.0f} % of the roofline")
    out(f"{'':26} {ratio:8.2f} times the baseline")


if __name__ == "__main__":
    typer.run(main)
