"""The FID-CLIP plot: guidance buys agreement with captions at the price of variety, so one point misleads."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from sbrush.sampling.open_image import open_image

LONGEST = 48  # letters of a point's name; a path's end says most


def tradeoff(lines: Mapping[str, Sequence[tuple[str, float, float]]], title: str) -> Image.Image:
    """FID against CLIP score. `lines`: for each label its points, (name, CLIP score, FID), in order."""
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    clips = [clip for points in lines.values() for _, clip, _ in points]
    for label, points in lines.items():
        axes.plot([clip for _, clip, _ in points], [fid for _, _, fid in points], marker="o", label=label)
        for name, clip, fid in points:
            right = clip > (min(clips) + max(clips)) / 2  # names lie towards the middle, where there is room
            name = name if len(name) <= LONGEST else f"...{name[-LONGEST:]}"
            axes.annotate(
                name, (clip, fid), xytext=(-6 if right else 6, 5), textcoords="offset points",
                ha="right" if right else "left", fontsize=8, parse_math=False, in_layout=False,
            )  # fmt: skip
    axes.set_xlabel("CLIP score (more is better)")
    axes.set_ylabel("FID (less is better)")
    axes.set_title(title, fontsize=10, parse_math=False)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(frameon=False)
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    return open_image(drawn)
