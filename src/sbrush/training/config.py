"""A run's config.json: every setting that affects its student. A changed one is refused when a run resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import sbrush
from sbrush.console import SbrushError, printable
from sbrush.models.ladder import Sampling
from sbrush.training.merged import MERGED
from sbrush.training.recipes import Recipe
from sbrush.training.request import RunRequest

FORMAT = 1
GRID_PROMPTS = 8  # on sample grids
NOT_COMPARED = ("version", "extended_by")  # keys that may change between parts of one run
# Names of what a digest beside them identifies: another spelling, or place, of the same content is the same run.
SPELLINGS = {"teacher": "teacher_sha256", "teacher_config": "teacher_sha256", "init": "init_sha256"}
LATER = {f.name: f.default for f in dataclasses.fields(Recipe) if f.default is not dataclasses.MISSING}


def make_config(
    request: RunRequest,
    *,
    sampling: Sampling,
    images: dict[str, Any] | None,
    teacher_sha256: str,
    init_sha256: str | None,
    clip: str | None,
    control_sha256: str | None,
    bf16: bool,
    held: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """What config.json holds.

    `init_sha256`, `control_sha256`: of what the student starts as and of the ControlNet in the loop, if there are any.
    `images`: where those come from that the method learns from, if it does. `clip`: the CLIP model of the clamped CLIP
    loss and its digest, if there is one. `held`: the prompts whose images stay, and of which student.
    """
    prompts = request.prompts
    shown = min(GRID_PROMPTS, len(prompts))
    spread = [prompts.texts[i * len(prompts) // shown] for i in range(shown)]
    return {
        "format": FORMAT,
        "version": sbrush.__version__,
        "teacher": request.teacher or "stickers (built in)",
        "teacher_config": request.teacher_config,
        "teacher_sha256": teacher_sha256,
        "init": request.init,
        "init_sha256": init_sha256,
        "clip": clip,
        "text_cache": request.text_cache is not None,  # half precision rounds the embeddings
        "prompts": {"source": Path(prompts.source).name, "sha256": prompts.sha256, "count": len(prompts)},
        "images": images,
        "control": dataclasses.asdict(request.control) | {"sha256": control_sha256} if request.control else None,
        "held": held,
        "seed": request.seed,
        "bf16": bf16,
        "recipe": dataclasses.asdict(request.recipe),
        "sampling": dataclasses.asdict(sampling),
        "grid_prompts": spread,
    }


def read_config(out: Path) -> dict[str, Any]:
    """A run's config.json; SbrushError if it is damaged."""
    try:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        if isinstance(config, dict) and isinstance(config.get("extended_by", []), list):
            return config
    except (ValueError, RecursionError):
        pass
    raise SbrushError(f"{printable(out)}/config.json is damaged", "name a new folder with --out")


def check_same(before: dict[str, Any], now: dict[str, Any], out: Path) -> None:
    """SbrushError if the configuration of the run in `out` is of another format, or differs from the one `now`."""
    if before.get("format") != FORMAT:
        raise SbrushError(
            f"the run in {printable(out)} has format {printable(before.get('format'))}, this version writes {FORMAT}",
            "finish it with the version that started it, or start a new run in another --out",
        )
    if (theirs := _recipe_name(before)) != (ours := _recipe_name(now)) and (theirs in MERGED or ours in MERGED):
        raise SbrushError(
            f"{printable(out)} holds a run of the recipe {printable(theirs)}, not of {ours}",
            "give the same options to resume it, or another --out to start a new run",
            code=2,
        )
    if isinstance(before.get("recipe"), dict):  # a setting that came later was what it is by default
        before = {**before, "recipe": LATER | before["recipe"]}
    if changed := differences(_spelt_alike(before, now), now):
        raise SbrushError(
            f"{printable(out)} holds a run with another configuration: {'; '.join(changed)}",
            "give the same options to resume it, or another --out to start a new run",
            code=2,
        )


def _recipe_name(config: dict[str, Any]) -> object:
    """The recipe of a run, or of several trainings, in whose folder each has a run of its own."""
    recipe = config.get("recipe")
    return recipe.get("name") if isinstance(recipe, dict) else recipe


def _spelt_alike(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """`before` with the names of `now` for what is the same by its digest."""
    same = {name: now[name] for name, digest in SPELLINGS.items() if name in now and before.get(digest) == now[digest]}
    ours, theirs = before.get("prompts"), now.get("prompts")
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("sha256") == theirs["sha256"]:
        same["prompts"] = {**ours, "source": theirs["source"]}
    ours, theirs = before.get("control"), now.get("control")
    if isinstance(ours, dict) and isinstance(theirs, dict) and ours.get("sha256") == theirs["sha256"]:
        same["control"] = {**ours, "model": theirs["model"]}
    return {**before, **same}


def differences(before: dict[str, Any], now: dict[str, Any], prefix: str = "") -> list[str]:
    """What has changed between two configurations: "recipe.batch was 16, now 8"."""
    changed = []
    for key in dict.fromkeys([*before, *now]):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            changed += differences(old, new, f"{prefix}{key}.")
        elif old != new and key not in NOT_COMPARED:
            changed.append(f"{prefix}{key} was {printable(json.dumps(old))}, now {printable(json.dumps(new))}")
    return changed
