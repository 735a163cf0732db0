"""curves.png: how a run went, in four panels, from its log.jsonl."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sbrush.storage.files import atomic_write

PANELS = {
    "score gap": {"gap": "mean |gap|", "score_gap_ratio": "as share of the teacher's error"},
    "losses": {
        "student_loss": "student",
        "lora_loss": "LoRA teacher",
        "pair_loss": "pairs",
        "clip_cosine": "CLIP cosine",
        "clip_score": "CLIP score, validated",
        "lora_divergence": "LoRA teacher / teacher",
    },
    "latents": {"x0_mean": "mean", "x0_std": "deviation", "latent_drift": "drift from the teacher's"},
    "images/s": {"images_per_second": "images/s"},
}


def draw_curves(log: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Writes the PNG, whole. Raised alarms are marked by a red line at their first step."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True)
    raised = {name: entry["step"] for entry in reversed(log) for name in entry.get("alarms", ())}
    for panel, (title, lines) in zip(panels.flat, PANELS.items(), strict=True):
        for key, label in lines.items():
            points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
            panel.plot(*zip(*points, strict=True), label=label, linewidth=1) if points else None
        for step in raised.values():
            panel.axvline(step, color="tab:red", linewidth=0.8, linestyle="--")
        panel.set_title(title, fontsize=10)
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.margins(y=0.3)  # room for the names above and below the lines
            panel.legend(fontsize=8, framealpha=0.7, ncols=2)
    for panel in panels[-1]:
        panel.set_xlabel("step")
    if raised:
        figure.suptitle("alarms: " + ", ".join(f"{n} at {s}" for n, s in raised.items()), color="tab:red", fontsize=9)
    drawn = io.BytesIO()
    FigureCanvasAgg(figure).print_png(drawn)
    with atomic_write(path) as partial:
        partial.write_bytes(drawn.getvalue())
