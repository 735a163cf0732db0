"""The benchmark's report: what was measured, its manifest, and beside it what papers report, each with its protocol.

Where published figures were found: 16.67 / 0.29 in the README of VinAIResearch/SwiftBrush, 8.14 in SwiftBrushV2's,
SiD-LSG's in that of mingyuanzhou/SiD-LSG, DMD2's in experiments/sdv1.5/README.md of tianweiy/DMD2. Those marked as
second hand are quoted from others' tables.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sbrush.console import SbrushError, count, printable
from sbrush.evaluate.coco.tradeoff import tradeoff
from sbrush.evaluate.report import Groups, Images, few_images, page, table
from sbrush.metrics.clip import MODEL
from sbrush.metrics.inception import DIGEST, NAME, WIDTH
from sbrush.sampling.images import save_png
from sbrush.storage.files import write_json, write_text


class Published(NamedTuple):
    """Figures that a paper or its authors' repository reports; not measured by us."""

    name: str
    fid: float
    clip_score: float | None
    source: str
    protocol: str  # of ours, the one to compare under
    second_hand: bool = False  # not found by us in the source itself


V1, V2 = "arXiv 2312.05239; COCO-30K, caption list not stated", "arXiv 2408.14176; a caption list of its own"
SID, DMD2 = "arXiv 2406.01561; GigaGAN's caption list", "arXiv 2405.14867; GigaGAN's caption list"
PUBLISHED = (
    Published("SwiftBrush, 1 step", 16.67, 0.29, V1, "swiftbrush"),
    Published("SwiftBrush, measured again by v2's authors", 15.46, 0.30, V2, "swiftbrush", second_hand=True),
    Published("SD 2.1, 25 steps", 13.45, None, V1, "swiftbrush"),
    Published("SD 2.1, 1 step", 202.14, None, V1, "swiftbrush"),
    Published("LCM", 35.56, 0.24, V1, "swiftbrush"),
    Published("Guided Distillation", 37.3, 0.27, V1, "swiftbrush"),
    Published("SwiftBrush v2, LoRA and full student merged", 8.14, None, V2, "swiftbrush"),
    Published("SwiftBrush v2, from SD-Turbo", 8.77, 0.32, V2, "swiftbrush", second_hand=True),
    Published("SwiftBrush v2, image-free", 11.69, None, V2, "swiftbrush", second_hand=True),
    Published("SiD-LSG, SD 2.1", 9.52, 0.308, SID, "gigagan"),
    Published("SiD-LSG, SD 1.5", 8.15, 0.304, SID, "gigagan"),
    Published("DMD2 without GAN, SD 1.5", 9.28, None, DMD2, "dmd2"),
    Published("DMD2, SD 1.5, trained on images too", 8.35, None, DMD2, "dmd2"),
)


@dataclass(frozen=True)
class Measured:
    """One model's metrics: its name, them, all that its images depend on, and how many images there were."""

    name: str
    metrics: dict[str, float | None]
    model: dict[str, Any]
    counts: dict[str, int]


@dataclass(frozen=True)
class BenchmarkReport:
    """Metrics under one protocol, several in a sweep, and all that is needed to check them."""

    points: list[Measured]
    manifest: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Everything as plain data."""
        published = [{**p._asdict(), "measured_by_us": False} for p in PUBLISHED]
        return {"points": [asdict(p) for p in self.points], "manifest": self.manifest, "published": published}

    def table(self) -> str:
        """The metrics and the published ones as aligned text, the manifest below."""
        return table(*self._content())

    def write(self, path: Path, images: Images) -> None:
        """`path`, one HTML file with everything in it, a .json beside it, and of a sweep the plot as a .png.

        SbrushError if they cannot be written.
        """
        plot = self._plot() if len(self.points) > 1 else None
        try:
            write_json(path.with_suffix(".json"), self.json())
            if plot:
                save_png(path.with_suffix(".png"), plot)
            write_text(path, page(*self._content(), images, plot))
        except OSError as problem:
            raise SbrushError(
                f"cannot write {printable(path)}: {problem.strerror}", "choose another --report"
            ) from problem

    def _plot(self) -> Image.Image:
        found = [(p.name, p.metrics["clip_score"], p.metrics["fid"]) for p in self.points]
        line = [(name, clip, fid) for name, clip, fid in found if clip is not None and fid is not None]
        rules = self.manifest["protocol"]["name"]
        return tradeoff({"": line}, f"{count(self.points[0].counts['images'], 'image')}, {rules} protocol")

    def _content(self) -> tuple[list[str], Groups, dict[str, str], list[str]]:
        groups: Groups = [(f"measured: {point.name}", _rows(point.metrics)) for point in self.points]
        groups.append(("reported elsewhere, not measured by us", [_published(p) for p in PUBLISHED]))
        about = {name: _text(value) for name, value in self.manifest.items()}
        about |= {f"measured: {point.name}": _text(point.model) for point in self.points}
        return ["FID etc.", "CLIP score"], groups, about, self._notes()

    def _notes(self) -> list[str]:
        """What keeps the metrics from being compared with published ones, and how to read them."""
        rules, manifest = self.manifest["protocol"], self.manifest
        notes = [PRECISION_AND_RECALL]
        if manifest["images"] != rules["images"]:
            notes.append(
                f"{count(manifest['images'], 'image')}, not the {rules['name']} protocol's {rules['images']}: "
                "not comparable with anything published"
            )
        notes += few_images(manifest["images"], WIDTH)
        if any((point.metrics["kid"] or 0) < 0 for point in self.points):
            notes.append("KID is unbiased: below 0 it says that this many images show no difference")
        if (whose := manifest["captions"]) != "COCO's own":
            theirs = whose.startswith("COCO's own")
            notes.append(f"the captions are {whose}" if theirs else "the captions are a list of the user's")
        if not manifest["inception_sha256"].startswith(DIGEST):
            notes.append(
                f"Inception's weights are not {NAME}, on which FID is defined: not comparable with anything published"
            )
        if manifest["clip"] and manifest["clip"] != MODEL:
            notes.append(f"the CLIP model is not {MODEL}: its scores are not comparable with anything published")
        return notes


PRECISION_AND_RECALL = (
    "precision and recall are taken on the same Inception features as FID, of RGB images; SwiftBrush v2's come from "
    "TensorFlow's Inception, its own resizing and images in BGR order, so that the two do not compare"
)


def _published(found: Published) -> tuple[str, list[str]]:
    """A row of the table."""
    source = f"{found.source}; --protocol {found.protocol}" + ("; second hand" if found.second_hand else "")
    score = "-" if found.clip_score is None else f"{found.clip_score:.3f}".removesuffix("0")  # as it was reported
    return f"{found.name} ({source})", [f"{found.fid:.2f}", score]


def _rows(metrics: dict[str, float | None]) -> list[tuple[str, list[str]]]:
    """The table's rows of one model."""

    def cell(name: str, digits: int) -> str:
        value = metrics[name]
        return "-" if value is None else f"{value:.{digits}f}"

    interval = metrics["fid_interval"]
    return [
        ("FID, lower is better", [cell("fid", 2), ""]),
        ("its interval, 95 % (jackknife)", ["-" if interval is None else f"+- {interval:.2f}", ""]),
        ("KID x 1000, lower is better", [f"{1000 * (metrics['kid'] or 0):.3f}", ""]),
        ("CLIP score", ["", cell("clip_score", 3)]),
        *([("HPS v2 x 100", ["", cell("hps", 2)])] if metrics.get("hps") is not None else []),
        ("precision", [cell("precision", 3), ""]),
        ("recall", [cell("recall", 3), ""]),
    ]


def _text(value: Any) -> str:
    """A value of the manifest as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(what)}" for name, what in value.items())
    return ", ".join(map(_text, value)) if isinstance(value, list) else str(value)
