"""Other places that a run's log goes to, through accelerate: tensorboard, wandb, trackio. log.jsonl is always there.

Nothing leaves the machine but by a tracker that was asked for by name.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration

from sbrush.console import SbrushError, printable

FOLDER = "trackers"  # within a run's, for those that write files


def tracked_in(out: Path, names: Iterable[str]) -> dict[str, Any]:
    """What an Accelerator is made with so that it tracks a run in `out`; SbrushError if a tracker is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise SbrushError(f"--tracker {name}: it is not installed", f"pip install {name}", code=2)
    project = ProjectConfiguration(project_dir=str(out), logging_dir=str(out / FOLDER))
    return {"log_with": list(names) or None, "project_config": project}


def start(accelerator: Accelerator, out: Path, config: Mapping[str, Any], *, first: int) -> None:
    """Starts the trackers, or resumes them at step `first`; SbrushError if one cannot.

    Steps from `first` on that an interrupted run has already logged are logged again: tensorboard hides the earlier
    ones, wandb drops the later ones.
    """
    if not accelerator.log_with:
        return
    # The same run in the same folder keeps its name.
    identity = hashlib.sha256(f"{out.resolve()} {config['seed']} {config['recipe']}".encode()).hexdigest()[:16]
    where = str(out / FOLDER)
    options: dict[str, Any] = {
        "tensorboard": {"purge_step": first},
        "wandb": {"name": out.name, "id": identity, "resume": "allow", "dir": where},
        "trackio": {"name": out.name, "resume": "allow"},
    }
    (out / FOLDER).mkdir(exist_ok=True)
    try:
        accelerator.init_trackers("sbrush", dict(_flat(config)) if first == 1 else None, options)
    except Exception as problem:  # whatever a service makes of no network, no account, a full disk
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise SbrushError(
            f"a tracker cannot start: {printable(first_line)}",
            "log in to its service first (`wandb login`), or leave --tracker out: log.jsonl is written in any case",
        ) from problem


def log_metrics(accelerator: Accelerator, entry: Mapping[str, Any]) -> None:
    """Sends the numbers of one entry of log.jsonl."""
    numbers = {key: value for key, value in entry.items() if isinstance(value, int | float)}
    step = numbers.pop("step")
    accelerator.log(numbers, step=step)


def finish(accelerator: Accelerator) -> None:
    """Closes the trackers. Accelerator.end_training would part the processes too."""
    for tracker in accelerator.trackers:
        tracker.finish()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, bool | int | float | str]]:
    """A configuration's plain values: "recipe.batch"."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, bool | int | float | str):
            yield prefix + key, value
