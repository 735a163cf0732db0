"""The benchmark's report: what was measured, its manifest, and beside it what papers report, each with its protocol."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from sbrush.console import SbrushError, printable
from sbrush.evaluate.coco.tradeoff import tradeoff
from sbrush.evaluate.report import Groups, Images, page, table
from sbrush.metrics.clip import MODEL
from sbrush.metrics.inception import DIGEST, NAME
from sbrush.sampling.images import save_png
from sbrush.storage.files import write_json, write_text


class Published(NamedTuple):
    """Figures that a paper reports; not measured by us."""

    name: str
    fid: float
    clip_score: float | None
    source: str


PUBLISHED = (
    Published("SwiftBrush, 1 step", 16.67, 0.29, "arXiv 2312.05239; COCO-30K"),
    Published("SwiftBrush, measured again", 15.46, 0.30, "arXiv 2408.14176; its own caption list, all of val2014"),
    Published("SD 2.1, 25 steps", 13.45, None, "arXiv 2312.05239; COCO-30K"),
    Published("SD 2.1, 1 step", 202.14, None, "arXiv 2312.05239; COCO-30K"),
    Published("LCM", 35.56, 0.24, "arXiv 2312.05239; COCO-30K"),
    Published("Guided Distillation", 37.3, 0.27, "arXiv 2312.05239; COCO-30K"),
    Published("SwiftBrush v2, from SD-Turbo", 8.77, 0.32, "arXiv 2408.14176; its own caption list"),
    Published("SwiftBrush v2, image-free", 11.69, None, "arXiv 2408.14176; from SwiftBrush's weights"),
    Published("SiD-LSG, SD 2.1", 9.52, None, "SiD-LSG; GigaGAN's caption list: compare under --protocol gigagan only"),
    Published("SiD-LSG, SD 1.5", 8.15, None, "SiD-LSG; GigaGAN's caption list"),
    Published("DMD2 without GAN, SD 1.5", 9.28, None, "arXiv 2405.14867; GigaGAN's caption list"),
    Published("DMD2, SD 1.5", 8.35, None, "arXiv 2405.14867; GigaGAN's caption list; trained on images too"),
)


@dataclass(frozen=True)
class Measured:
    """One model's figures: its name, them, all that its images depend on, and how many images there were."""

    name: str
    figures: dict[str, float | None]
    model: dict[str, Any]
    counts: dict[str, int]


@dataclass(frozen=True)
class BenchmarkReport:
    """Figures under one protocol, several in a sweep, and all that is needed to check them."""

    points: list[Measured]
    manifest: dict[str, Any]

    def json(self) -> dict[str, Any]:
        """Everything as plain data."""
        published = [{**p._asdict(), "measured_by_us": False} for p in PUBLISHED]
        return {"points": [asdict(p) for p in self.points], "manifest": self.manifest, "published": published}

    def table(self) -> str:
        """The figures and the published ones as aligned text, the manifest below."""
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
        found = [(p.name, p.figures["clip_score"], p.figures["fid"]) for p in self.points]
        line = [(name, clip, fid) for name, clip, fid in found if clip is not None and fid is not None]
        rules = self.manifest["protocol"]["name"]
        return tradeoff({"": line}, f"{self.points[0].counts['images']} images, {rules} protocol")

    def _content(self) -> tuple[list[str], Groups, dict[str, str], list[str]]:
        theirs = [
            (f"{p.name} ({p.source})", [f"{p.fid:.2f}", "-" if p.clip_score is None else f"{p.clip_score:.2f}"])
            for p in PUBLISHED
        ]
        groups: Groups = [(f"measured: {point.name}", _rows(point.figures)) for point in self.points]
        groups.append(("reported elsewhere, not measured by us", theirs))
        about = {name: _told(value) for name, value in self.manifest.items()}
        about |= {f"measured: {point.name}": _told(point.model) for point in self.points}
        rules, standard = self.manifest["protocol"]["name"], self.manifest["protocol"]["images"]
        notes = []
        if self.manifest["images"] != standard:
            notes.append(
                f"{self.manifest['images']} images, not the {rules} protocol's {standard}: like nothing published"
            )
        if self.manifest["captions"] != "COCO's own":
            notes.append("the captions are a list of the user's")
        if not self.manifest["inception_sha256"].startswith(DIGEST):
            notes.append(f"Inception's weights are not {NAME}, on which FID is defined: like nothing published")
        if self.manifest["clip"] and self.manifest["clip"] != MODEL:
            notes.append(f"the CLIP model is not {MODEL}: its scores are like nothing published")
        return ["FID etc.", "CLIP score"], groups, about, notes


def _rows(figures: dict[str, float | None]) -> list[tuple[str, list[str]]]:
    """The table's rows of one model."""

    def cell(name: str, digits: int) -> str:
        value = figures[name]
        return "-" if value is None else f"{value:.{digits}f}"

    error = figures["fid_standard_error"]
    return [
        ("FID, lower is better", [cell("fid", 2), ""]),
        ("its interval, 95 % (jackknife)", ["-" if error is None else f"+- {1.96 * error:.2f}", ""]),
        ("KID x 1000, lower is better", [f"{1000 * (figures['kid'] or 0):.3f}", ""]),
        ("CLIP score", ["", cell("clip_score", 3)]),
        *([("HPS v2 x 100", ["", cell("hps", 2)])] if figures.get("hps") is not None else []),
        ("precision", [cell("precision", 3), ""]),
        ("recall", [cell("recall", 3), ""]),
    ]


def _told(value: Any) -> str:
    """A value of the manifest as people read it."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {_told(what)}" for name, what in value.items())
    return ", ".join(map(_told, value)) if isinstance(value, list) else str(value)
