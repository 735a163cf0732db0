"""What a ControlNet's name stands for. Imports nothing heavy: commands ask it before torch loads."""

from __future__ import annotations

import re
from pathlib import Path

from sbrush.console import SbrushError, printable
from sbrush.storage.files import check_name

BUILT_IN_CONTROLS = {"outline": Path(__file__).parent.parent / "stickers" / "weights" / "control" / "outline"}
"""ControlNets that come with sbrush, for the built-in world: name -> folder."""
LARGEST_SCALE = 10.0
HINT = "give outline (built in), a folder that ControlNetModel.save_pretrained wrote, or a Hub id"


def local_control(source: str) -> Path | None:
    """The folder of a ControlNet that is here; None for a Hub id, which has to be fetched. SbrushError if neither.

    A name of BUILT_IN_CONTROLS stands for that one: a folder of the same name is "./outline".
    """
    if folder := BUILT_IN_CONTROLS.get(source):
        return folder
    shown = printable(source)
    try:
        check_name(Path(source))
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise SbrushError(f"{shown} is no ControlNet: it has no config.json", HINT, code=2)
            return folder
        if folder.exists():
            raise SbrushError(f"{shown} is a file, not a ControlNet's folder", HINT, code=2)
    except (OSError, RuntimeError) as problem:  # a folder that may not be read, no such user for ~
        why = getattr(problem, "strerror", None) or problem
        raise SbrushError(f"cannot read {shown}: {printable(why)}", HINT, code=2) from None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SbrushError(f"no ControlNet {shown}", HINT, code=2)
    return None


def check_scale(scale: float) -> None:
    """SbrushError if a ControlNet cannot steer so strongly."""
    if not 0 <= scale <= LARGEST_SCALE:  # NaN neither
        raise SbrushError(
            f"a control scale of {scale:g} is out of range",
            f"give 0 (no effect) to {LARGEST_SCALE:g}; 1 is as the ControlNet was trained",
            code=2,
        )
