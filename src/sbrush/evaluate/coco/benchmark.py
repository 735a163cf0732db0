"""`sbrush eval --coco-30k`: a student, a teacher or a folder of images, or a sweep, under one of coco.py's protocols.

How one of them is measured is measurement.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import torch
from PIL import Image

from sbrush.console import SbrushError, info, printable
from sbrush.device import process_group
from sbrush.evaluate.cache import versions
from sbrush.evaluate.coco.download import fetch_coco
from sbrush.evaluate.coco.gallery import Gallery
from sbrush.evaluate.coco.measurement import Measurement, Subject
from sbrush.evaluate.coco.protocols import PROTOCOLS, Coco, FeatureExtractor, hash_of, read_captions
from sbrush.evaluate.coco.published import BenchmarkReport, Measured
from sbrush.metrics.clip import HPS_MODEL, ClipScorer
from sbrush.metrics.inception import Inception
from sbrush.metrics.precision_recall import NEIGHBOURS
from sbrush.models.load import digest, load_student, load_teacher
from sbrush.models.places import locate_student
from sbrush.models.tokenizers import truncated_prompts
from sbrush.sampling.generation import describe_steps, guidance_scale_of, student_images, teacher_images
from sbrush.storage import checkpoint
from sbrush.storage.files import user_cache

COCOS = "COCO's own"  # captions


def benchmark(
    *,
    root: Path,
    protocol: str,
    student: str | None,
    start_timestep: int | None,
    teacher: str | None,
    teacher_config: str | None,
    images: Path | None,
    sweep: str | None,
    captions: Path | None,
    n: int | None,
    steps: int,
    guidance: float | None,
    seed: int,
    inception: Path | None,
    clip_weights: Path | None,
    clip_score: bool,
    hps_weights: Path | None,
    hps_version: str | None,
    download: bool,
    max_bad: int,
    work: Path | None,
    save_images: Path | None,
    report: Path,
    batch: int,
    device: str,
    dtype: torch.dtype,
) -> BenchmarkReport | None:
    """Measures, writes `report` and a .json beside it. SbrushError if anything that it needs is missing or damaged.

    `sweep`: guidance scales of the teacher, or students and folders of checkpoints, with commas between. Of several
    processes only the main one has a report; the others get None.
    """
    began, rules = time.monotonic(), PROTOCOLS[protocol]
    if (hps_weights is None) != (hps_version is None):
        raise SbrushError(
            "HPS v2's weights do not say which version they are",
            "--hps-weights FILE and --hps-version 2.0 or 2.1, both or neither",
            code=2,
        )
    _check_request(student, start_timestep, teacher, images, sweep, clip_score, save_images)
    gallery = Gallery.read(images) if images else None
    if rules.captions is None and not captions and not (gallery and gallery.captions):
        raise SbrushError(f"the {rules.name} protocol's captions are a list of its own", "--captions FILE", code=2)
    names = _students(sweep) if sweep is not None and teacher is None else []
    for name in names:
        locate_student(name)
    if download:
        fetch_coco(root)
    coco = Coco.read(root)
    texts, whose = _captions(captions, gallery, coco)
    wanted = n or rules.images
    if wanted > len(texts):
        raise SbrushError(
            f"{wanted} captions are asked for, and there are {len(texts)}", f"--limit {len(texts)} at most", code=2
        )
    if wanted <= NEIGHBOURS or len(coco.files) <= NEIGHBOURS:
        raise SbrushError(f"{wanted} images are too few to measure", "--limit 100 or more", code=2)
    if gallery and images:
        _check_count(images, len(gallery.files), wanted, first=n is not None)
    with process_group(device) as together:
        where = str(together.device) if together.num_processes > 1 else device
        net = Inception.load(inception, download=download, device=where)
        clip = ClipScorer.load(clip_weights, download=download, device=where) if clip_score else None
        hps = ClipScorer.load(hps_weights, model_name=HPS_MODEL, own=True, device=where) if hps_weights else None
        folder = work or user_cache() or Path("runs/eval")
        measurement = Measurement(
            coco=coco, texts=texts[:wanted], extractor=FeatureExtractor(rules, net, clip, hps), folder=folder,
            seed=seed, max_bad=max_bad, save_images=save_images, device=where, process_group=together,
        )  # fmt: skip

        def subjects() -> Iterator[Subject]:
            if gallery and images:
                content = gallery.digest(wanted, folder)
                about = {"kind": "images", "sha256": content}
                yield Subject(f"images of {images.name}", about, None, gallery.files[:wanted])
            elif sweep is None:
                yield _subject(student, start_timestep, teacher, teacher_config, steps, guidance, batch, where, dtype)
            elif teacher is not None:
                for scale in _scales(sweep):
                    yield _subject(None, None, teacher, teacher_config, steps, scale, batch, where, dtype)
            else:
                for name in names:
                    yield _subject(name, start_timestep, None, None, steps, None, batch, where, dtype)

        points, shown_images = list[Measured](), dict[str, list[tuple[str, Image.Image]]]()
        for subject in subjects():
            info(f"{printable(subject.name)}: {wanted} images under the {protocol} protocol")
            if not together.is_main_process:
                measurement.extract(subject)
                continue
            point, shown = measurement.of(subject)
            points.append(point)
            shown_images |= {f"{subject.name}: {heading}": items for heading, items in shown.items()}
        if not together.is_main_process:
            return None
    manifest = {
        "protocol": asdict(rules) | {"captions": f"{whose}: {rules.captions}" if whose == COCOS else whose},
        "captions": whose, "captions_sha256": hash_of(texts[:wanted]),
        "reference_sha256": hash_of(measurement.listed), **points[0].counts,
        "inception_sha256": net.digest,
        "clip": clip.name if clip else None, "clip_sha256": clip.digest if clip else None,
        "hps": f"v{hps_version} {hps.name}" if hps else None, "hps_sha256": hps.digest if hps else None,
        "seed": seed, "batch": batch, "device": where,
        "versions": versions("torch-fidelity", "diffusers", "transformers", "numpy"),
        "date": datetime.now(UTC).isoformat(timespec="seconds"), "seconds": round(time.monotonic() - began),
    }  # fmt: skip
    result = BenchmarkReport(points, manifest)
    result.write(report, shown_images)
    return result


def _check_request(
    student: str | None, start_timestep: int | None, teacher: str | None, images: Path | None, sweep: str | None,
    clip_score: bool, save_images: Path | None,
) -> None:  # fmt: skip
    """SbrushError if the flags contradict each other."""
    if sum(x is not None for x in (student, teacher, images)) > 1 or (sweep is not None and (student or images)):
        hint = "one of --student, --teacher and --images; or --sweep A,B with students, or with --teacher and scales"
        raise SbrushError("several things to measure", hint, code=2)
    if start_timestep is not None and (teacher or images):
        raise SbrushError("--start-timestep is the student's", "leave it out, or give --student", code=2)
    if sweep is not None and not clip_score:
        raise SbrushError("a sweep is FID against CLIP score", "leave out --no-clip-score", code=2)
    if sweep is not None and save_images is not None:
        raise SbrushError("the images of a sweep would overwrite each other", "leave out --save-images", code=2)
    if images is not None and save_images is not None:
        raise SbrushError("the images of --images are there already", "leave out --save-images", code=2)
    if sweep is not None and teacher is not None:
        _scales(sweep)


def _scales(sweep: str) -> list[float]:
    try:
        scales = [float(text) for text in sweep.split(",")]
    except ValueError:
        scales = [-1.0]
    if not all(0 <= scale < 1000 for scale in scales):
        raise SbrushError(f"--sweep {printable(sweep)} is no list of guidance scales", "--sweep 1,2,4.5,7.5", code=2)
    return scales


def _students(sweep: str) -> list[str]:
    """Students by name; a folder of checkpoints stands for them all, oldest first."""
    names = list[str]()
    for name in sweep.split(","):
        found = checkpoint.paths(Path(name).expanduser())
        names += [str(path) for path in reversed(found)] or [name]
    return names


def _subject(
    student: str | None, start_timestep: int | None, teacher: str | None, teacher_config: str | None,
    steps: int, guidance: float | None, batch: int, device: str, dtype: torch.dtype,
) -> Subject:  # fmt: skip
    """The teacher that the flags ask for, or else the student."""
    if teacher is not None:
        many = load_teacher(teacher, config=teacher_config, device=device, dtype=dtype)
        scale = guidance_scale_of(many, guidance)
        return Subject(
            f"{many.name}, {steps} steps, guidance {scale:g}",
            {
                "kind": "teacher", "sha256": digest(many), "steps": steps, "guidance": scale,
                "dtype": str(dtype).removeprefix("torch."),
            },
            lambda texts, seeds: teacher_images(many, texts, seeds, steps=steps, guidance=scale, batch=batch),
            truncated=lambda texts: truncated_prompts(many, texts),
        )  # fmt: skip
    one = load_student(student, start_timestep=start_timestep, device=device, dtype=dtype)
    return Subject(
        f"{one.name}, {describe_steps(one)}",
        {
            "kind": "student", "sha256": digest(one), "steps": 1, "guidance": 1, "start_timestep": one.start_timestep,
            "noise_scale": one.noise_scale, "dtype": str(dtype).removeprefix("torch."),
        },
        lambda texts, seeds: student_images(one, texts, seeds, batch=batch),
        truncated=lambda texts: truncated_prompts(one, texts),
    )  # fmt: skip


def _captions(file: Path | None, gallery: Gallery | None, coco: Coco) -> tuple[list[str], str]:
    """The captions, and for the report whose they are: a file's, else those beside the images, else COCO's."""
    if file:
        return read_captions(file), str(file)
    if gallery and gallery.captions:
        return gallery.captions, f"{gallery.source} beside the images"
    return coco.captions, COCOS


def _check_count(images: Path, count: int, wanted: int, *, first: bool) -> None:
    """SbrushError if a folder has not as many images as captions are wanted; `first`: or more."""
    if count < wanted or (count > wanted and not first):
        raise SbrushError(
            f"{printable(images)} has {count} images for {wanted} captions", "--limit N for the first N", code=2
        )
