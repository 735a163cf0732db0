"""Refuses requests that cannot work, before anything heavy is imported."""

from __future__ import annotations

import os
from pathlib import Path

from sbrush.console import SbrushError, printable
from sbrush.evaluate.coco.protocols import PROTOCOLS, Coco
from sbrush.evaluate.request import CocoRequest, MetricWeights, StickersRequest
from sbrush.metrics.conventions import NEIGHBOURS
from sbrush.models.source import check_source

LIMIT = 100, 50_000  # captions of the built-in world, at least and at most


def check(request: StickersRequest | CocoRequest) -> None:
    """SbrushError if a request contradicts itself, or needs a file that is not there."""
    if isinstance(request, CocoRequest):
        _check_subject(request)
        _check_weights(request.weights)
        _check_data(request)
        _check_report(request.output.report)
        return
    least, most = LIMIT
    if not least <= request.limit <= most:
        few = request.limit < least
        raise SbrushError(
            f"{request.limit} captions are too {'few' if few else 'many'}",
            f"--limit {least} or more" if few else f"--limit {most} or less",
            code=2,
        )
    _check_report(request.report)


def _check_subject(request: CocoRequest) -> None:
    """What is measured: one thing, or a sweep over one kind of thing."""
    models, sweep = request.models, request.sweep is not None
    named = sum(x is not None for x in (models.student, models.teacher, request.images))
    if named > 1 or (sweep and (models.student or request.images)):
        hint = "one of --student, --teacher and --images; or --sweep A,B with students, or with --teacher and scales"
        raise SbrushError("several things to measure", hint, code=2)
    if models.start_timestep is not None and (models.teacher or request.images):
        raise SbrushError("--start-timestep is the student's", "leave it out, or give --student", code=2)
    if models.steps is not None and (models.teacher or request.images):
        raise SbrushError(
            "--steps is the student's, and none is measured", "leave it out, or --teacher-steps for a teacher's", code=2
        )
    if models.negative is not None and request.images:
        raise SbrushError("--negative is for a model, and none draws here", "leave out --negative or --images", code=2)
    if models.loras and request.images:
        raise SbrushError("--lora is for a model, and --images has its images already", "leave out one of them", code=2)
    if models.vae is not None and (models.teacher or request.images):
        raise SbrushError("--vae is the student's, and none is measured", "leave it out, or give --student", code=2)
    if sweep and not request.weights.clip_score:
        raise SbrushError("a sweep is FID against CLIP score", "leave out --no-clip-score", code=2)
    if sweep and request.output.images is not None:
        raise SbrushError("the images of a sweep would overwrite each other", "leave out --save-images", code=2)
    if request.images is not None and request.output.images is not None:
        raise SbrushError("the images of --images are there already", "leave out --save-images", code=2)
    if request.sweep is None:
        return
    if models.teacher is not None:
        assert request.scales  # or SbrushError
        return
    for name in request.sweep.split(","):
        if not Path(name).expanduser().is_dir():  # it may be one of checkpoints
            check_source(name)


def _check_weights(weights: MetricWeights) -> None:
    if (weights.hps is None) != (weights.hps_version is None):
        raise SbrushError(
            "HPS v2's weights do not say which version they are",
            "--hps-weights FILE and --hps-version 2.0 or 2.1, both or neither",
            code=2,
        )
    for flag, file in (
        ("--inception", weights.inception),
        ("--clip-weights", weights.clip),
        ("--hps-weights", weights.hps),
    ):
        if file is not None and not file.exists():
            raise SbrushError(f"there is no {printable(file)}", f"{flag} takes a file that is there", code=2)


def _check_data(request: CocoRequest) -> None:
    """The captions and the real images, as far as folders show."""
    data, rules = request.data, PROTOCOLS[request.data.protocol]
    if data.column is not None and not data.captions and not request.images:
        raise SbrushError(
            "--column is of a table of captions, and there is none", "--captions FILE, or --images", code=2
        )
    listed, gallery = request.listed, request.gallery
    if rules.captions is None and not listed and not (gallery and gallery.captions):
        raise SbrushError(f"the {rules.name} protocol's captions are a list of its own", "--captions FILE", code=2)
    if data.limit is not None and data.limit <= NEIGHBOURS:
        raise SbrushError(f"{data.limit} images are too few to measure", f"--limit {NEIGHBOURS + 1} or more", code=2)
    if not data.download:
        Coco.check(data.root)


def _check_report(report: Path) -> None:
    if report.suffix.lower() not in (".html", ".htm"):
        raise SbrushError(
            f"the report is an HTML file, and {printable(report)} is not named like one",
            f"--report {printable(report.with_suffix('.html'))}; the same as JSON is written beside it",
            code=2,
        )
    if report.is_dir() or not os.access(report.absolute().parent, os.W_OK):
        raise SbrushError(f"cannot write {printable(report)}", "choose another --report", code=2)
