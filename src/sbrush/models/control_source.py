"""What a ControlNet's name stands for. Imports nothing heavy: commands ask it before torch loads."""

from __future__ import annotations

from pathlib import Path

from sbrush.console import SbrushError
from sbrush.models.source import local_network

BUILT_IN_CONTROLS = {"outline": Path(__file__).parent.parent / "stickers" / "weights" / "control" / "outline"}
"""ControlNets that come with sbrush, for the built-in world: name -> folder."""
LARGEST_SCALE = 10.0
HINT = "give outline (built in), a folder that ControlNetModel.save_pretrained wrote, or a Hub id"


def local_control(source: str) -> Path | None:
    """The folder of a ControlNet that is here; None for a Hub id, which has to be fetched. SbrushError if neither.

    A name of BUILT_IN_CONTROLS stands for that one: a folder of the same name is "./outline".
    """
    return BUILT_IN_CONTROLS.get(source) or local_network(source, "ControlNet", HINT)


def check_scale(scale: float) -> None:
    """SbrushError if a ControlNet cannot steer so strongly."""
    if not 0 <= scale <= LARGEST_SCALE:  # NaN neither
        raise SbrushError(
            f"a control scale of {scale:g} is out of range",
            f"give 0 (no effect) to {LARGEST_SCALE:g}; 1 is as the ControlNet was trained",
            code=2,
        )
