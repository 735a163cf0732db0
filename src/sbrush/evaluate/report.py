"""What was measured, and how it is shown: a table, JSON, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageOps

from sbrush.console import SbrushError, printable
from sbrush.storage.files import write_json, write_text

Shares = dict[str, float | None]
Images = Mapping[str, Sequence[tuple[str, Image.Image]]]
"""For each heading, images with the caption that stands under each."""
Groups = list[tuple[str, list[tuple[str, list[str]]]]]
"""A table: groups of rows by heading, each row a label and a cell for each column."""
EDGE = 256  # pixels; larger images are shown reduced, or a report would be megabytes


@dataclass(frozen=True)
class Metrics:
    """One model's metrics, and how it was sampled. None where there was nothing to measure.

    `accuracy` and `held_out` are shares, 0 to 1, of right attributes: on combinations seen in training and on held-out
    ones; `accuracy_n` and `held_out_n` count the captions that name them. `diversity` is relative to real images'.
    """

    name: str
    n: int  # images
    per_caption: int  # images of each of diversity's captions
    steps: int | None
    guidance: float | None
    fid: float | None
    clip_score: float | None
    precision: float | None
    recall: float | None
    accuracy: Shares
    accuracy_n: dict[str, int]
    held_out: Shares
    held_out_n: dict[str, int]
    diversity: Shares
    versions: dict[str, str]  # of the packages that took part

    @classmethod
    def from_json(cls, data: Any) -> Metrics:
        """The inverse of `dataclasses.asdict`. Raises ValueError if anything is missing, unknown or of another type."""
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
            raise ValueError("these are not a model's metrics")
        for f in fields(cls):
            if not _VALID[str(f.type)](data[f.name]):
                raise ValueError(f"{f.name} is not {f.type}")
        return cls(**data)


@dataclass(frozen=True)
class Report:
    """Models side by side, under one protocol, whose points are described by name.

    `notes` are remarks for the reader; `images` what each model made of the first captions.
    """

    metrics: list[Metrics]
    protocol: dict[str, str]
    notes: list[str] = field(default_factory=list)
    images: Images = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Everything but the images, as plain data without NaN or infinities."""
        return {"models": [asdict(m) for m in self.metrics], "protocol": self.protocol, "notes": self.notes}

    def table(self) -> str:
        """The metrics as aligned text, a column for each model, and the protocol below."""
        return table([m.name for m in self.metrics], _groups(self.metrics), self.protocol, self.notes)

    def write(self, path: Path) -> None:
        """`path`, one HTML file without scripts or outside links: table, protocol and images; a .json beside it.

        Both are written aside and renamed. Raises SbrushError if they cannot be written.
        """
        try:
            write_json(path.with_suffix(".json"), self.json())
            names = [m.name for m in self.metrics]
            write_text(path, page(names, _groups(self.metrics), self.protocol, self.notes, self.images))
        except OSError as problem:
            hint = "name a file in a folder that you may write to"
            raise SbrushError(f"cannot write {path}: {problem.strerror or problem}", hint) from problem


def few_images(count: int, width: int) -> list[str]:
    """A note for the reader if FID is taken from fewer images than it has features."""
    if count >= width:
        return []
    return [
        f"FID from {count} images on {width:,} features: their covariance is rank-deficient, and FID is too high by an "
        "amount that depends on the number of images. Compare it only with FIDs of as many images"
    ]


def table(columns: Sequence[str], groups: Groups, about: Mapping[str, str], notes: Sequence[str]) -> str:
    """A table as aligned text, what it is about below."""
    names = [printable(column) for column in columns]
    margin = max(len(label) for _, rows in groups for label, _ in rows) + 2
    widths = [max(len(name), 9) for name in names]  # the widest cell is "100.0 %"

    def line(label: str, cells: Sequence[str]) -> str:
        return label.ljust(margin) + "".join("  " + c.rjust(w) for c, w in zip(cells, widths, strict=True))

    lines = [line("", names)]
    for group, rows in groups:
        lines += ["", printable(group), *(line("  " + printable(label), cells) for label, cells in rows)]
    return "\n".join(
        [*lines, "", *(printable(f"{name}: {text}") for name, text in about.items()), *map(printable, notes)]
    )


def png(image: Image.Image) -> str:
    """The image as a PNG in base64."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def from_png(code: str) -> Image.Image:
    """The inverse of `png`. Raises ValueError or OSError if it is no PNG."""
    return Image.open(io.BytesIO(base64.b64decode(code, validate=True)), formats=["PNG"]).convert("RGB")


def finite(value: float) -> float | None:
    """The number itself; None for NaN and infinities, which are not JSON."""
    return value if math.isfinite(value) else None


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number_or_none(value: Any) -> bool:
    return value is None or _whole(value) or (isinstance(value, float) and math.isfinite(value))


def _each(valid: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(isinstance(k, str) and valid(v) for k, v in value.items())


_VALID: dict[str, Callable[[Any], bool]] = {  # by the type that Metrics gives a field
    "str": lambda value: isinstance(value, str),
    "int": _whole,
    "int | None": lambda value: value is None or _whole(value),
    "float | None": _number_or_none,
    "Shares": _each(_number_or_none),
    "dict[str, int]": _each(_whole),
    "dict[str, str]": _each(lambda value: isinstance(value, str)),
}


def _groups(metrics: Sequence[Metrics]) -> Groups:
    """The table: groups of rows, each row a label and one cell for each model."""
    first = metrics[0] if metrics else None

    def shares(what: str, counts: str | None = None) -> list[tuple[str, list[str]]]:
        of = getattr(first, counts) if first and counts else {}
        rows = []
        for name in getattr(first, what) if first else {}:
            label = f"{name} (n = {of[name]})" if name in of else name
            rows.append((label, [_percent(getattr(m, what).get(name)) for m in metrics]))
        return rows

    return [
        ("sampling", [
            ("images", [str(m.n) for m in metrics]),
            ("steps", ["-" if m.steps is None else str(m.steps) for m in metrics]),
            ("guidance", ["-" if m.guidance is None else f"{m.guidance:g}" for m in metrics]),
        ]),
        ("compared with real images", [
            ("FID, lower is better", [_number(m.fid, 2) for m in metrics]),
            ("precision", [_percent(m.precision) for m in metrics]),
            ("recall", [_percent(m.recall) for m in metrics]),
        ]),
        ("agreement with the caption", [
            ("CLIP score", [_number(m.clip_score, 3) for m in metrics]),
            *shares("accuracy", "accuracy_n"),
        ]),
        ("on combinations of kind and colour held out of training", shares("held_out", "held_out_n")),
        ("diversity, relative to real images'", shares("diversity")),
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def page(
    columns: Sequence[str],
    groups: Groups,
    about: Mapping[str, str],
    notes: Sequence[str],
    images: Images,
    plot: Image.Image | None = None,
) -> str:
    """The whole HTML file, `plot` below the table; the template escapes all text that comes from outside."""
    shown = {heading: [(text, png(_reduced(image))) for text, image in items] for heading, items in images.items()}
    template = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, undefined=StrictUndefined
    ).get_template("report.html.jinja")
    return template.render(
        columns=columns, groups=groups, about=about, notes=notes, images=shown, plot=plot and png(plot)
    )


def _reduced(image: Image.Image) -> Image.Image:
    return ImageOps.contain(image, (EDGE, EDGE)) if max(image.size) > EDGE else image
