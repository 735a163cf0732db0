"""What was measured, and how it is told: a table, JSON, and one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from sbrush.console import SbrushError, printable
from sbrush.storage.files import write_text

Shares = dict[str, float | None]
Images = Mapping[str, Sequence[tuple[str, Image.Image]]]
"""For each heading, images with the caption that stands under each."""
Groups = list[tuple[str, list[tuple[str, list[str]]]]]
"""A table: groups of rows by heading, each row a label and a cell for each column."""
EDGE = 256  # pixels; larger images are shown reduced, or a report would be megabytes


@dataclass(frozen=True)
class Figures:
    """One model's figures and the protocol that is its own. None where there was nothing to measure.

    `accuracy` and `held_out` are shares, 0 to 1, of right attributes: on combinations seen in training and on held-out
    ones; `accuracy_n` and `held_out_n` count the captions that name them. `diversity` is in shares of the truth's own.
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
    def from_json(cls, data: Any) -> Figures:
        """The inverse of `dataclasses.asdict`. Raises ValueError if anything is missing, unknown or of another type."""
        if not isinstance(data, dict) or set(data) != {f.name for f in fields(cls)}:
            raise ValueError("these are not a model's figures")
        for f in fields(cls):
            if not _VALID[str(f.type)](data[f.name]):
                raise ValueError(f"{f.name} is not {f.type}")
        return cls(**data)


@dataclass(frozen=True)
class Report:
    """Models side by side, under one protocol: names of its points to what they say.

    `notes` are remarks for the reader; `images` what each model made of the first captions.
    """

    figures: list[Figures]
    protocol: dict[str, str]
    notes: list[str] = field(default_factory=list)
    images: Images = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        """Everything but the images, as plain data without NaN or infinities."""
        return {"models": [asdict(f) for f in self.figures], "protocol": self.protocol, "notes": self.notes}

    def table(self) -> str:
        """The figures as aligned text, a column for each model, and the protocol below."""
        return table([f.name for f in self.figures], _groups(self.figures), self.protocol, self.notes)

    def write_html(self, path: Path, images: Images | None = None) -> None:
        """One HTML file without scripts or outside links: table, protocol and images, by default `self.images`.

        Written aside and renamed. Raises SbrushError if it cannot be written.
        """
        try:
            names, shown = [f.name for f in self.figures], self.images if images is None else images
            write_text(path, page(names, _groups(self.figures), self.protocol, self.notes, shown))
        except OSError as problem:
            hint = "name a file in a folder that you may write to"
            raise SbrushError(f"cannot write {path}: {problem.strerror or problem}", hint) from problem


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


_VALID: dict[str, Callable[[Any], bool]] = {  # by the type that Figures gives a field
    "str": lambda value: isinstance(value, str),
    "int": _whole,
    "int | None": lambda value: value is None or _whole(value),
    "float | None": _number_or_none,
    "Shares": _each(_number_or_none),
    "dict[str, int]": _each(_whole),
    "dict[str, str]": _each(lambda value: isinstance(value, str)),
}


def _groups(figures: Sequence[Figures]) -> Groups:
    """The table: groups of rows, each row a label and one cell for each model."""
    first = figures[0] if figures else None

    def shares(what: str, counts: str | None = None) -> list[tuple[str, list[str]]]:
        of = getattr(first, counts) if first and counts else {}
        rows = []
        for name in getattr(first, what) if first else {}:
            label = f"{name} (n = {of[name]})" if name in of else name
            rows.append((label, [_percent(getattr(f, what).get(name)) for f in figures]))
        return rows

    return [
        ("sampling", [
            ("images", [str(f.n) for f in figures]),
            ("steps", ["-" if f.steps is None else str(f.steps) for f in figures]),
            ("guidance", ["-" if f.guidance is None else f"{f.guidance:g}" for f in figures]),
        ]),
        ("likeness to real images", [
            ("FID, lower is better", [_number(f.fid, 2) for f in figures]),
            ("precision", [_percent(f.precision) for f in figures]),
            ("recall", [_percent(f.recall) for f in figures]),
        ]),
        ("agreement with the caption", [
            ("CLIP score", [_number(f.clip_score, 3) for f in figures]),
            *shares("accuracy", "accuracy_n"),
        ]),
        ("on combinations of kind and colour held out of training", shares("held_out", "held_out_n")),
        ("diversity, as a share of the truth's", shares("diversity")),
    ]  # fmt: skip


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8881; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 84rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .6rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .9rem; text-align: right; white-space: nowrap; }
th:first-child { text-align: left; font-weight: normal; }
thead th, tbody th[colspan] { font-weight: 600; }
tbody th[colspan] { padding-top: .9rem; border-bottom: 1px solid var(--line); }
dt { font-weight: 600; } dd { margin: 0 0 .4rem; overflow-wrap: anywhere; }
.images { display: flex; flex-wrap: wrap; gap: .6rem; } figure { margin: 0; width: 96px; }
img { width: 96px; height: auto; border-radius: 8px; image-rendering: pixelated; background: var(--soft); }
img.plot { width: 100%; max-width: 700px; image-rendering: auto; }
figcaption { font-size: .72rem; line-height: 1.25; }
"""


def page(
    columns: Sequence[str],
    groups: Groups,
    about: Mapping[str, str],
    notes: Sequence[str],
    images: Images,
    plot: Image.Image | None = None,
) -> str:
    """The whole HTML file, `plot` below the table; all text that comes from outside is escaped."""
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = ""
    for group, rows in groups:
        body += f'<tr><th colspan="{len(columns) + 1}">{escape(group)}</th></tr>\n'
        for label, cells in rows:
            body += f"<tr><th>{escape(label)}</th>" + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>\n"
    points = "".join(f"<dt>{escape(name)}</dt><dd>{escape(text)}</dd>\n" for name, text in about.items())
    remarks = "".join(f"<p>{escape(note)}</p>\n" for note in notes)
    plotted = f'<img class="plot" alt="FID and CLIP score" src="data:image/png;base64,{png(plot)}">\n' if plot else ""
    shown = ""
    for heading, items in images.items():
        shown += f'<h2>{escape(heading)}</h2>\n<div class="images">\n'
        for caption, image in items:
            text = escape(caption)
            image = ImageOps.contain(image, (EDGE, EDGE)) if max(image.size) > EDGE else image
            shown += f'<figure><img alt="{text}" src="data:image/png;base64,{png(image)}">'
            shown += f"<figcaption>{text}</figcaption></figure>\n"
        shown += "</div>\n"
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>sbrush eval</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>sbrush eval</h1>
<div class="wide"><table>
<thead><tr><th></th>{head}</tr></thead>
<tbody>
{body}</tbody>
</table></div>
{remarks}{plotted}<h2>Protocol</h2>
<dl>
{points}</dl>
{shown}</body>
</html>
"""
