"""`sbrush eval --coco-30k`: a student, a teacher or a folder of pictures under one of coco.py's protocols.

Generate, prepare, look, forget: features and scores stay, on disk, in shards under a key of all that they depend on. So
the same command goes on where it was stopped, and the reference is looked at once. A picture's noise depends on
its caption's number and the seed alone: torch.Generator().manual_seed(seed * 1,000,000 + number).
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from sbrush.console import SbrushError, printable, say
from sbrush.evaluate.clip import ClipScorer
from sbrush.evaluate.coco import PROTOCOLS, Bad, Coco, Looker, Protocol, hash_of, read_captions
from sbrush.evaluate.download import fetch_coco
from sbrush.evaluate.fid import fid, fid_error
from sbrush.evaluate.gallery import Gallery
from sbrush.evaluate.inception import Inception
from sbrush.evaluate.kid import kid
from sbrush.evaluate.memory import versions
from sbrush.evaluate.precision_recall import NEIGHBOURS, precision_recall
from sbrush.evaluate.published import BenchmarkReport
from sbrush.evaluate.shards import Shards
from sbrush.files import user_cache
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.pictures import save_png, to_image
from sbrush.sample import one_step, scale_for, student_pictures, teacher_pictures

SHOWN = 24


@dataclass(frozen=True)
class Subject:
    """What is measured: a name, all that its pictures depend on, and the pictures of captions from a number on."""

    name: str
    key: list[Any]
    pictures: Callable[[list[str], list[int]], Iterator[Tensor]] | None  # None: they are files
    files: list[Path] | None = None


def benchmark(
    *,
    root: Path,
    protocol: str,
    student: str | None,
    start_timestep: int | None,
    teacher: str | None,
    teacher_config: str | None,
    images: Path | None,
    captions: Path | None,
    n: int | None,
    steps: int,
    guidance: float | None,
    seed: int,
    inception: Path | None,
    clip_weights: Path | None,
    clip_score: bool,
    download: bool,
    max_bad: int,
    work: Path | None,
    save_images: Path | None,
    report: Path,
    batch: int,
    device: str,
    dtype: torch.dtype,
) -> BenchmarkReport:
    """Measures, writes `report` and a .json beside it. SbrushError if anything that it needs is missing or damaged."""
    began, rules = time.monotonic(), PROTOCOLS[protocol]
    if sum(x is not None for x in (student, teacher, images)) > 1:
        raise SbrushError("several things to measure", "one of --student, --teacher and --images", code=2)
    if start_timestep is not None and (teacher or images):
        raise SbrushError("--start-timestep is the student's", "leave it out, or give --student", code=2)
    gallery = Gallery.read(images) if images else None
    if download:
        fetch_coco(root)
    coco = Coco.read(root)
    texts, whose = _captions(captions, gallery, coco, rules)
    wanted = n or rules.pictures
    if wanted > len(texts):
        raise SbrushError(
            f"{wanted} captions are asked for, and there are {len(texts)}", f"--limit {len(texts)} at most", code=2
        )
    if wanted <= NEIGHBOURS or len(coco.files) <= NEIGHBOURS:
        raise SbrushError(f"{wanted} pictures are too few to measure", "--limit 100 or more", code=2)
    texts = texts[:wanted]
    net = Inception.load(inception, download=download, device=device)
    clip = ClipScorer.load(clip_weights, download=download, device=device) if clip_score else None
    looker, folder = Looker(rules, net, clip), work or user_cache() or Path("runs/eval")
    if gallery and images:
        _check_count(images, len(gallery.files), wanted, first=n is not None)
        content = gallery.digest(wanted, folder)
        subject = Subject(f"pictures of {images.name}", ["images", content], None, gallery.files[:wanted])
    else:
        subject = _subject(
            student, start_timestep, teacher, teacher_config, steps, guidance, batch, device, dtype
        )  # fmt: skip
    say(f"{printable(subject.name)}: {wanted} pictures under the {protocol} protocol")

    bad = Bad(max_bad)
    listed = [f"{f.name} {f.stat().st_size if f.is_file() else 'missing'}" for f in coco.files]
    reference_key = [*rules.key(), net.digest, hash_of(listed)]
    real = Shards(_place(folder, "coco-reference", reference_key)).fill(
        len(coco.files), "reference", lambda first: looker.read(coco.files[first:], bad)
    )["features"]
    made_key = [*rules.key(), net.digest, clip.name if clip else None, subject.key, seed, hash_of(texts)]
    shards, shown = Shards(_place(folder, "coco-pictures", made_key)), list[tuple[int, Image.Image]]()

    def rows(first: int) -> Iterator[dict[str, Tensor]]:
        if subject.pictures is None:
            yield from looker.read((subject.files or [])[first:wanted], bad, texts[first:])
            return
        seeds = [seed * 1_000_000 + i for i in range(first, wanted)]
        drawn = _kept(subject.pictures(texts[first:], seeds), first, save_images, shown)
        yield from looker.made(drawn, texts[first:])

    made = shards.fill(wanted, subject.name, rows)
    good_real, good = (~x.isnan().any(dim=1) for x in (real, made["features"]))
    if (~good_real).sum() + (~good).sum() > max_bad:
        raise SbrushError(
            f"{int((~good_real).sum() + (~good).sum())} pictures could not be read",
            "see --max-bad, or fetch them again",
        )
    say("measuring ...")
    r, f = real[good_real].to(device), made["features"][good].to(device)
    precision, recall = precision_recall(r, f)
    r, f = r.cpu(), f.cpu()
    distance, error = fid(r, f), fid_error(r, f) if len(f) >= 100 else None
    mean, spread = kid(r, f)
    scores = made["clip"][good] if clip else None
    result = BenchmarkReport(
        name=subject.name,
        figures={
            "fid": distance, "fid_standard_error": error, "kid": mean, "kid_spread": spread,
            "clip_score": scores.mean().item() if scores is not None else None,
            "precision": precision, "recall": recall,
        },
        manifest={
            "protocol": asdict(rules), "captions": whose,
            "captions_sha256": hash_of(texts), "pictures": int(good.sum()),
            "reference_pictures": int(good_real.sum()), "reference_sha256": hash_of(listed),
            "bad_pictures": int((~good_real).sum() + (~good).sum()),
            "inception_sha256": net.digest, "clip": clip.name if clip else None,
            "model": subject.key, "seed": seed, "versions": versions(),
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - began),
        },
    )  # fmt: skip
    shown = shown or _redrawn(subject, texts, seed)
    worst = _worst(subject, texts, seed, scores, good) if scores is not None else []
    result.write(report, {
        "The first captions": [(texts[i], picture) for i, picture in shown],
        "The lowest CLIP scores": [(f"{score:.3f} {texts[i]}", picture) for i, score, picture in worst],
    })  # fmt: skip
    return result


def _subject(
    student: str | None, start_timestep: int | None, teacher: str | None, teacher_config: str | None,
    steps: int, guidance: float | None, batch: int, device: str, dtype: torch.dtype,
) -> Subject:  # fmt: skip
    """The teacher that the flags ask for, or else the student."""
    if teacher is not None:
        many = load_teacher(teacher, config=teacher_config, device=device, dtype=dtype)
        scale = scale_for(many, guidance)
        return Subject(
            f"{many.name}, {steps} steps, guidance {scale:g}", ["teacher", digest(many), steps, scale, str(dtype)],
            lambda texts, seeds: teacher_pictures(many, texts, seeds, steps=steps, guidance=scale, batch=batch),
        )  # fmt: skip
    one = load_student(student, start_timestep=start_timestep, device=device, dtype=dtype)
    return Subject(
        f"{one.name}, {one_step(one)}", ["student", digest(one), one.start_timestep, one.noise_scale, str(dtype)],
        lambda texts, seeds: student_pictures(one, texts, seeds, batch=batch),
    )  # fmt: skip


def _captions(file: Path | None, gallery: Gallery | None, coco: Coco, rules: Protocol) -> tuple[list[str], str]:
    """The captions, and for the report whose they are: a file's, else those beside the pictures, else COCO's."""
    if file:
        return read_captions(file), str(file)
    if gallery and gallery.captions:
        return gallery.captions, f"{gallery.source} beside the pictures"
    if rules.captions is None:
        raise SbrushError(f"the {rules.name} protocol's captions are a list of its own", "--captions FILE", code=2)
    return coco.captions, "COCO's own"


def _check_count(images: Path, count: int, wanted: int, *, first: bool) -> None:
    """SbrushError if a folder has not as many pictures as captions are wanted; `first`: or more."""
    if count < wanted or (count > wanted and not first):
        raise SbrushError(
            f"{printable(images)} has {count} pictures for {wanted} captions", "--limit N for the first N", code=2
        )


def _place(folder: Path, what: str, key: list[Any]) -> Path:
    return folder / f"{what}-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:24]}"


def _kept(
    batches: Iterator[Tensor], first: int, save: Path | None, shown: list[tuple[int, Image.Image]]
) -> Iterator[Tensor]:
    """The batches as they pass; saved as PNG if asked for, and the very first ones shown."""
    for batch in batches:
        for i, picture in enumerate(batch, first):
            if save is not None:
                try:
                    save_png(save / f"{i:05d}.png", to_image(picture))
                except OSError as problem:
                    raise SbrushError(
                        f"cannot write to {printable(save)}: {problem.strerror}", "--save-images elsewhere"
                    ) from problem
            if i < SHOWN:
                shown.append((i, to_image(picture)))
        yield batch
        first += len(batch)


def _redrawn(subject: Subject, texts: list[str], seed: int) -> list[tuple[int, Image.Image]]:
    """The first pictures again, for the report of what was looked at before."""
    return [(i, picture) for i, picture in enumerate(_some(subject, texts, seed, range(min(SHOWN, len(texts)))))]


def _worst(
    subject: Subject, texts: list[str], seed: int, scores: Tensor, good: Tensor
) -> list[tuple[int, float, Image.Image]]:
    """The pictures that fit their captions least: number, CLIP score, picture."""
    order = scores.argsort()[:12]
    numbers = good.nonzero()[order, 0].tolist()
    return list(zip(numbers, scores[order].tolist(), _some(subject, texts, seed, numbers), strict=True))


def _some(subject: Subject, texts: list[str], seed: int, numbers: Any) -> list[Image.Image]:
    """Some of the pictures, by number."""
    if subject.pictures is None:
        pictures = []
        for i in numbers:
            with Image.open((subject.files or [])[i]) as picture:
                pictures.append(picture.convert("RGB"))
        return pictures
    drawn = subject.pictures([texts[i] for i in numbers], [seed * 1_000_000 + i for i in numbers])
    return [to_image(picture) for batch in drawn for picture in batch]
