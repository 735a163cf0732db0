"""Two students into one, weight by weight (SwiftBrush v2, arXiv 2408.14176, section 3.3)."""

from __future__ import annotations

from pathlib import Path

import sbrush
from sbrush.console import SbrushError, printable
from sbrush.models.card import STATED
from sbrush.models.export import export_student
from sbrush.models.load import digest, load_student
from sbrush.models.parts import read_json
from sbrush.models.places import check_recorded, folder_digest
from sbrush.storage.files import check_new


def merge(one: str, two: str, out: Path, *, share: float = 0.5, replace: bool = False) -> None:
    """Writes the student theta = share theta_1 + (1 - share) theta_2 to `out`; its other parts are the first one's.

    With `replace` it takes the place of a student that is there already.

    Two students of one teacher that began as copies of it are near enough for their mean to be a student too; the
    paper merges a full and a LoRA student at one half. SbrushError if they are not of one kind, or `out` is taken;
    OSError as any writing may raise it.
    """
    if not replace:
        check_new(out)
    first, second = load_student(one), load_student(two)
    for model in (first, second):
        check_recorded(model, "merge students that sbrush distill has written")
    weights, others = dict(first.unet.named_parameters()), dict(second.unet.named_parameters())
    if {k: v.shape for k, v in weights.items()} != {k: v.shape for k, v in others.items()}:
        raise SbrushError("the two students are of different architectures", "merge students of one teacher", code=2)
    same = ("reparameterised", "world", "steps", "guidance")
    if first.sampler.config != second.sampler.config or any(
        first.about.get(key) != second.about.get(key) for key in same
    ):
        raise SbrushError(
            "the two students turn noise into images in different ways",
            "merge students with one t_init, number of steps, guidance scale, prediction and parameterisation",
            code=2,
        )
    for name, weight in weights.items():
        weight.data.lerp_(others[name].data, 1 - share)
    about = {key: value for key, value in first.about.items() if key != "format"}
    about["version"] = sbrush.__version__
    if any("safety_checker" in model.about for model in (first, second)):
        about["safety_checker"] = any(model.about.get("safety_checker") for model in (first, second))
    about["merged"] = [
        {"student": printable(name), "sha256": digest(model), "share": part}
        | {key: model.about[key] for key in STATED if key in model.about}
        for name, model, part in ((one, first, share), (two, second, 1 - share))
    ]
    export_student(out, first, first.unet, about=about, scheduler=first.sampler)


def is_merged_from(student: Path, one: Path, two: Path, share: float) -> bool:
    """Whether a folder holds what `merge` makes of two students' folders as they are now."""
    try:
        merged = read_json(student / "sbrush.json")["merged"]
        made_of = [(part["sha256"], part["share"]) for part in merged]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return made_of == [(folder_digest(one), share), (folder_digest(two), 1 - share)]
