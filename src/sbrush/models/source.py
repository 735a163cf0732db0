"""What a model's name stands for: a folder, a single file or a Hub id. Imports nothing heavy: commands ask it first."""

from __future__ import annotations

import re
from pathlib import Path

from sbrush.console import SbrushError, printable
from sbrush.storage.files import check_name

# By name, the folders of the students that come with sbrush; no name at all stands for the first.
BUILT_IN_STUDENTS = {"stickers": "student", "stickers-few": "student-few"}
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
LAYOUT = "give a folder in Stable Diffusion's format (model_index.json, unet/, vae/ ...), a Hub id, or nothing"


def is_single_file(source: str) -> bool:
    """Whether a teacher's name is that of a file of weights, whether or not there is one."""
    return source.lower().endswith((".safetensors", *PICKLES)) and not Path(source).expanduser().is_dir()


def built_in_student(name: str | None) -> str | None:
    """The name of a student that comes with sbrush, None standing for the first; None if it is another's name.

    A folder of that name goes first.
    """
    if name is None:
        return next(iter(BUILT_IN_STUDENTS))
    return name if name in BUILT_IN_STUDENTS and not Path(name).exists() else None


def check_file(file: Path) -> None:
    """SbrushError if a file of weights is a pickle or is not there."""
    shown = printable(file)
    if file.suffix.lower() in PICKLES:
        raise SbrushError(
            f"{shown} is a pickle, which can run anything when it is read",
            "sbrush reads safetensors only: take the model's .safetensors, or a folder that was saved as such",
            code=2,
        )
    if not file.is_file():
        raise SbrushError(f"no file {shown}", "give a .safetensors file, a folder or a Hub id", code=2)


def local_folder(source: str) -> Path | None:
    """The folder that a path stands for; None for a Hub id, which has to be fetched. SbrushError if it is neither."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise SbrushError(f"{printable(source)} is a file, not a model folder", LAYOUT, code=2)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SbrushError(f"no model folder {printable(source)}", LAYOUT, code=2)
    return None


def local_network(source: str, what: str, hint: str) -> Path | None:
    """The folder of a single network, `what`, that is here; None for a Hub id. SbrushError if it is neither."""
    shown = printable(source)
    try:
        check_name(Path(source))
        folder = Path(source).expanduser()
        if folder.is_dir():
            if not (folder / "config.json").is_file():
                raise SbrushError(f"{shown} is no {what}: it has no config.json", hint, code=2)
            return folder
        if folder.exists():
            raise SbrushError(f"{shown} is a file, not a {what}'s folder", hint, code=2)
    except (OSError, RuntimeError) as problem:  # a folder that may not be read, no such user for ~
        why = getattr(problem, "strerror", None) or problem
        raise SbrushError(f"cannot read {shown}: {printable(why)}", hint, code=2) from None
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        raise SbrushError(f"no {what} {shown}", hint, code=2)
    return None


def local_student(source: str) -> Path | None:
    """The folder of a student by path or run; None for a Hub id. SbrushError if it is neither."""
    folder = local_folder(source)
    if folder and not (folder / "model_index.json").is_file() and (folder / "student" / "model_index.json").is_file():
        return folder / "student"
    return folder


def check_source(source: str, *, single_file: bool = False) -> None:
    """SbrushError if a name cannot be a model's, as far as can be seen without loading it.

    `single_file`: whether a .safetensors is one too, as for teachers.
    """
    if not single_file and built_in_student(source):
        return
    check_name(Path(source))
    try:
        if single_file and is_single_file(source):
            check_file(Path(source).expanduser())
        elif folder := local_folder(source):
            _check_layout(folder)
    except (OSError, RuntimeError) as problem:  # a name too long, a folder that may not be read, no such user for ~
        why = getattr(problem, "strerror", None) or problem
        raise SbrushError(f"cannot read {printable(source)}: {printable(why)}", LAYOUT, code=2) from None


def _check_layout(folder: Path) -> None:
    """SbrushError if a folder holds no model at all, nor a run's student, nor is one of a run's checkpoints."""
    if any((folder / part).exists() for part in ("model_index.json", "unet", "student", "state.json")):
        return
    shown = printable(folder)
    if (folder / "checkpoints").is_dir():
        raise SbrushError(
            f"the run in {shown} has no student yet",
            f"give its `sbrush distill` command again, or take a checkpoint: {shown}/checkpoints/step-N",
        )
    raise SbrushError(f"{shown} is no Stable Diffusion model: it has no unet/", LAYOUT, code=2)
