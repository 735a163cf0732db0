"""Where models are: a path, a run's folder or a Hub id to a folder; and a run's teacher, from any directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sbrush.console import SbrushError, printable
from sbrush.models.hub import fetch
from sbrush.models.model import Model
from sbrush.models.parts import digest_of_parts, read_json
from sbrush.models.sdxl import ModelXL
from sbrush.models.snapshot import Snapshot
from sbrush.models.source import built_in_student, is_single_file, local_folder, local_student

BUILT_IN_TEACHER = "stickers (built in)"  # as configurations and students name it
FAMILIES: dict[str, type[Model]] = {family.pipeline: family for family in (Model, ModelXL)}


def resolve(source: str, *, weights: bool = True) -> Path:
    """The local folder that a path or Hub id stands for; downloads JSON and text only, and safetensors if wanted."""
    if folder := local_folder(source):
        return folder
    return fetch(source, dict.fromkeys(part for family in FAMILIES.values() for part in family.parts), weights=weights)


def locate_student(source: str) -> Path:
    """The folder of a student by path, run or Hub id; SbrushError if there is none. A Hub's is fetched."""
    return local_student(source) or resolve(source)


def teacher_of(student: Model | str | None) -> str | None:
    """A student's teacher as load_teacher takes it (None: the built-in one), for an image beside the student's.

    `student`: loaded, or as load_student takes it. SbrushError if the student does not name its teacher, or if what
    bears that name is not there or is another model by now.
    """
    if student is None or (isinstance(student, str) and built_in_student(student)):
        return None
    if isinstance(student, Model):
        shown, about = printable(student.name), student.about
        home = next(iter(student.sources.values()), student.folders["unet"])
    else:
        shown, home = printable(student), locate_student(student)
        about = _read_about(home, shown)
    name, sha256 = about.get("teacher"), about.get("teacher_sha256")
    if not isinstance(name, str) or not name:
        raise SbrushError(f"{shown} does not say who its teacher is", "name it: --teacher MODEL", code=2)
    found = find_teacher(name, sha256, home)
    if found and isinstance(sha256, str) and Path(found).is_dir() and folder_digest(Path(found)) != sha256:
        raise SbrushError(
            f"the teacher {printable(found)} is not the one that {shown} was made from",
            "it has changed since: put the old one back, or name another: --teacher MODEL",
        )
    return found


def _read_about(folder: Path, shown: str) -> dict[str, Any]:
    """What a student's folder, or the run of a checkpoint, says of it; SbrushError if that cannot be read."""
    if (folder / "state.json").is_file():
        return Snapshot.read(folder).config
    try:
        return read_json(folder / "sbrush.json") if (folder / "sbrush.json").is_file() else {}
    except (OSError, ValueError) as problem:
        raise SbrushError(f"cannot read {shown}/sbrush.json: {printable(problem)}", "export it again") from problem


def find_teacher(name: str, sha256: object, home: Path) -> str | None:
    """The teacher that a run in, or above, the folder `home` was given as `name`: as load_teacher takes it.

    A relative path is looked for here, and from each folder above `home`, for a run's commands may be given from
    elsewhere; what is found there must have the digest `sha256`. SbrushError if there is none.
    """
    if name == BUILT_IN_TEACHER:
        return None
    path, found = Path(name).expanduser(), list[Path]()
    if not path.is_absolute():
        above = [up / path for up in home.absolute().parents]
        found = [p for p in above if p.exists() and p.resolve() != path.resolve() and _is_it(p, sha256)]
    if path.exists() and (not found or _is_it(path, sha256)):
        return str(path)
    if found:
        return str(found[0])
    try:
        if not is_single_file(name) and local_folder(name) is None:
            return name  # a Hub id
    except SbrushError:
        pass
    raise SbrushError(f"the teacher {printable(name)} is not there", "put it back, or name it: --teacher MODEL", code=2)


def _is_it(place: Path, sha256: object) -> bool:
    """Whether a place holds the model with this digest, or, if that is not known, a model at all.

    A single file's digest is that of what it is converted into: it is taken by its name.
    """
    if place.is_file():
        return is_single_file(str(place))
    digest = folder_digest(place)
    return digest is not None and (not isinstance(sha256, str) or digest == sha256)


def folder_digest(folder: Path) -> str | None:
    """A model folder's digest, as load.digest of the model in it; None if it is none."""
    try:
        family = FAMILIES[read_json(folder / "model_index.json").get("_class_name", Model.pipeline)]
        return digest_of_parts(dict.fromkeys(family.parts, folder))
    except (OSError, ValueError, KeyError, TypeError, SbrushError):
        return None


def check_recorded(student: Model, hint: str) -> None:
    """SbrushError if a student's folder does not say how it was made, which its descendants' cards must say."""
    if "recipe" not in student.about:
        raise SbrushError(
            f"{printable(student.name)} says nothing of how it was made: it has no sbrush.json", hint, code=2
        )
