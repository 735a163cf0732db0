"""`sbrush eval --coco-30k`: a student, a teacher or a folder of images, or a sweep, under one of protocols.py's rules.

How one of them is measured is measurement.py.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from PIL import Image

from sbrush.console import SbrushError, count, info, printable
from sbrush.device import pick_arithmetic, pick_device, process_group
from sbrush.evaluate.cache import versions
from sbrush.evaluate.coco.download import fetch_coco
from sbrush.evaluate.coco.features import FeatureExtractor, UnreadableImages
from sbrush.evaluate.coco.gallery import COCOS, Gallery
from sbrush.evaluate.coco.measurement import Measurement, Subject, Workspace
from sbrush.evaluate.coco.protocols import PROTOCOLS, Coco
from sbrush.evaluate.coco.published import BenchmarkReport, Measured
from sbrush.evaluate.coco.subjects import Generator, locate_students
from sbrush.evaluate.request import CocoData, CocoRequest, MetricWeights
from sbrush.metrics.clip import HPS_MODEL, ClipScorer
from sbrush.metrics.conventions import NEIGHBOURS
from sbrush.metrics.inception import Inception
from sbrush.sampling.image_folder import hash_of
from sbrush.storage.files import user_cache


class Inputs(NamedTuple):
    """What a request names, read."""

    coco: Coco
    captions: list[str]
    whose: str  # the captions, for the report
    gallery: Gallery | None


def benchmark(request: CocoRequest) -> BenchmarkReport | None:
    """Measures, writes the report and a .json beside it. SbrushError if anything that it needs is missing or damaged.

    Of several processes only the main one has a report; the others get None.
    """
    started, rules = time.monotonic(), PROTOCOLS[request.data.protocol]
    device = pick_device(request.execution.device)
    arithmetic = pick_arithmetic(request.execution.precision, device, "eval")
    students = locate_students(request)
    inputs = _read(request)
    with process_group(device) as group:
        where = str(group.device) if group.num_processes > 1 else device
        extractor = FeatureExtractor(rules, *_load(request.weights, download=request.data.download, device=where))
        folder = request.output.work or user_cache() or Path("runs/eval")
        measurement = Measurement(
            inputs.coco,
            inputs.captions,
            extractor,
            request.data.seed,
            UnreadableImages(request.data.max_unreadable),
            Workspace(folder, request.output.images, where),
            group,
        )
        if inputs.gallery:
            subjects = iter([_files(request, inputs.gallery, len(inputs.captions), folder)])
        else:
            subjects = Generator(request, rules, where, arithmetic).subjects(students)
        points, shown = _measure_all(
            measurement, subjects, group, f"{count(len(inputs.captions), 'image')} under {rules.name}"
        )
        if not group.is_main_process:
            return None
    manifest = {
        **_describe(request.data, inputs, measurement, points[0]),
        **_describe_weights(request.weights, extractor),
        "batch": request.execution.batch,
        "device": where,
        "versions": versions(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(time.monotonic() - started),
    }
    result = BenchmarkReport(points, manifest)
    result.write(request.output.report, shown)
    return result


def _read(request: CocoRequest) -> Inputs:
    """The captions and the files on both sides. SbrushError if their numbers do not fit."""
    data = request.data
    listed, gallery = request.listed, request.gallery
    if data.download:
        fetch_coco(data.root)
    coco = Coco.read(data.root)
    if gallery and gallery.captions is None:
        weights = request.weights
        gallery = gallery.with_coco(coco, captioned=weights.clip_score or weights.hps is not None)
    captions, whose = coco.captions, COCOS
    if gallery and gallery.captions:
        captions, whose = gallery.captions, gallery.source
    elif listed:
        captions, whose = listed.texts, listed.source
    wanted = data.limit or PROTOCOLS[data.protocol].images
    if wanted > len(captions):
        raise SbrushError(
            f"{count(wanted, 'caption')} are asked for, and there are {len(captions):,}",
            f"--limit {len(captions)} at most",
            code=2,
        )
    if len(coco.files) <= NEIGHBOURS:
        raise SbrushError(
            f"{count(len(coco.files), 'real image')} are too few to measure", "--coco-root elsewhere", code=2
        )
    if gallery:
        found = len(gallery.files)
        if found < wanted or (found > wanted and data.limit is None):
            raise SbrushError(
                f"{printable(request.images)} has {count(found, 'image')} for {count(wanted, 'caption')}",
                "--limit N for the first N",
                code=2,
            )
    return Inputs(coco, captions[:wanted], whose, gallery)


def _load(
    weights: MetricWeights, *, download: bool, device: str
) -> tuple[Inception, ClipScorer | None, ClipScorer | None]:
    """The networks that measure: Inception, the CLIP model and HPS's, where they are asked for."""
    inception = Inception.load(weights.inception, download=download, device=device)
    clip = ClipScorer.load(weights.clip, download=download, device=device) if weights.clip_score else None
    hps = ClipScorer.load(weights.hps, model_name=HPS_MODEL, own=True, device=device) if weights.hps else None
    return inception, clip, hps


def _files(request: CocoRequest, gallery: Gallery, wanted: int, cache: Path) -> Subject:
    """A folder's images, known by their content."""
    assert request.images is not None
    about = {"kind": "images", "sha256": gallery.digest(wanted, cache)}
    return Subject(f"images of {request.images.name}", about, None, gallery.files[:wanted])


def _measure_all(
    measurement: Measurement, subjects: Iterator[Subject], group: PartialState, what: str
) -> tuple[list[Measured], dict[str, list[tuple[str, Image.Image]]]]:
    """Every subject's metrics, and images to show; the processes that are not the main one help, and get none."""
    points, shown = list[Measured](), dict[str, list[tuple[str, Image.Image]]]()
    for subject in subjects:
        info(f"{printable(subject.name)}: {what}")
        if not group.is_main_process:
            measurement.extract(subject)
            continue
        point, images = measurement.measure(subject)
        points.append(point)
        shown |= {f"{subject.name}: {heading}": items for heading, items in images.items()}
    return points, shown


def _describe(data: CocoData, inputs: Inputs, measurement: Measurement, point: Measured) -> dict[str, Any]:
    """The manifest's part on protocol, captions and real images."""
    rules = PROTOCOLS[data.protocol]
    own = inputs.whose == COCOS
    return {
        "protocol": asdict(rules) | {"captions": f"{COCOS}: {rules.captions}" if own else inputs.whose},
        "captions": inputs.whose,
        **({"image_order": inputs.gallery.rule} if inputs.gallery else {}),
        "captions_sha256": hash_of(inputs.captions),
        "reference_sha256": hash_of(measurement.listing),
        **point.counts,
        "seed": data.seed,
    }


def _describe_weights(weights: MetricWeights, extractor: FeatureExtractor) -> dict[str, Any]:
    """The manifest's part on the networks that measure."""
    clip, hps = extractor.clip, extractor.hps
    return {
        "inception_sha256": extractor.inception.digest,
        "clip": clip.name if clip else None,
        "clip_sha256": clip.digest if clip else None,
        "hps": f"v{weights.hps_version} {hps.name}" if hps else None,
        "hps_sha256": hps.digest if hps else None,
    }
