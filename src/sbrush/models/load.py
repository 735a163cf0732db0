"""Loads models: a folder in Stable Diffusion's format, a Hub id or a single .safetensors file to one `Model`."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from sbrush.console import SbrushError, info, printable
from sbrush.models.card import STATED
from sbrush.models.checks import (
    check_configuration,
    check_fit,
    check_index,
    check_proportions,
    read_network,
    untrained_network,
)
from sbrush.models.configurations import GUIDED, ONE_STEP, TABLES
from sbrush.models.ladder import Ladder
from sbrush.models.lora import add_loras
from sbrush.models.lora_request import LoraRequest
from sbrush.models.model import Model
from sbrush.models.parts import check_part, digest_of_parts, read_json
from sbrush.models.places import BUILT_IN_TEACHER, FAMILIES, find_teacher, locate_student, resolve
from sbrush.models.schedule import noise_scale, read_scheduler, scheduler_class
from sbrush.models.single_file import Entry, convert, known_configuration, read_header
from sbrush.models.snapshot import Snapshot
from sbrush.models.source import BUILT_IN_STUDENTS, built_in_student, is_single_file

FORMAT = 1  # of sbrush.json
MOST_STEPS = 1000  # of a student
BUILT_IN = Path(__file__).parent.parent / "stickers" / "weights"
KINDS = {
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTextModel": CLIPTextModel,
    "CLIPTextModelWithProjection": CLIPTextModelWithProjection,
    "UNet2DConditionModel": UNet2DConditionModel,
    "AutoencoderKL": AutoencoderKL,
}


def load_teacher(
    source: str | None = None,
    *,
    config: str | None = None,
    loras: Sequence[LoraRequest] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A teacher from a folder or Hub id in Stable Diffusion's format, or a .safetensors; None is the built-in one.

    `config`: for a .safetensors, the folder or Hub id whose configuration and tokenizer it takes; None: by its shapes.
    `loras`: what is added to its weights.
    """
    if loras:
        return _with_loras(load_teacher(source, config=config), loras, device, dtype)
    _check_config(source, config)
    if source is None:
        return _load([BUILT_IN / "teacher"], BUILT_IN_TEACHER, device, dtype)
    if is_single_file(source):
        file = Path(source).expanduser()
        header = read_header(file)
        return _load([convert(file, header, _configuration(file, header, config))], source, device, dtype)
    return _load([resolve(source)], source, device, dtype)


def load_student(
    source: str | None = None,
    *,
    start_timestep: int | None = None,
    loras: Sequence[LoraRequest] = (),
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Model:
    """A student from a folder or a Hub id; None is the built-in one, which shares its teacher's parts.

    A run's folder stands for the student in it, one of its checkpoints for what the student was then.

    Its step is at the schedule's T, of noise as its own scheduler scales it; or, with `start_timestep`, there, of unit
    noise taken for x_t, as DMD2's is at 399. `loras`: what is added to its weights.
    """
    if loras:
        return _with_loras(load_student(source, start_timestep=start_timestep), loras, device, dtype)
    if own := built_in_student(source):
        places, name = [BUILT_IN / BUILT_IN_STUDENTS[own], BUILT_IN / "teacher"], f"{own} student (built in)"
    else:
        assert source is not None
        places, name = [locate_student(source)], source
    if (places[0] / "unet" / "model.onnx").is_file():
        raise SbrushError(
            f"{printable(name)} was exported to ONNX, which sbrush sample draws with on the CPU, and nothing else here",
            "take the student that it was exported from",
            code=2,
        )
    if (places[0] / "state.json").is_file():
        model = _of_checkpoint(places[0], device, dtype)
    else:
        model = _load(places, name, device, dtype, student=True)
    if start_timestep is None:
        _note_many_steps(model)
        return model
    if not 0 < start_timestep < len(model.schedule):
        raise SbrushError(
            f"--start-timestep {start_timestep} is not in the schedule of {printable(name)}",
            f"take 1 to {len(model.schedule) - 1}",
            code=2,
        )
    return dataclasses.replace(model, start_timestep=start_timestep, noise_scale=1.0, ladder=None)


def _with_loras(model: Model, loras: Sequence[LoraRequest], device: str, dtype: torch.dtype) -> Model:
    """A model in float32 with LoRAs, then moved: in a shorter format the sum would lose more than the format does."""
    model = add_loras(model, loras)
    for network in model.networks:
        nn.Module.to(network, device, dtype)
    return model


def _note_many_steps(model: Model) -> None:
    """Says so if nothing in a folder speaks for a one-step student, neither sbrush.json nor its scheduler's spacing."""
    if "recipe" in model.about:
        return
    scheduler = read_json(model.folders["scheduler"] / "scheduler" / "scheduler_config.json")
    own = "format" in model.about
    if own or scheduler.get("timestep_spacing") != "trailing":
        what = "has a sbrush.json that names no recipe" if own else "has no sbrush.json"
        name = printable(model.name)
        info(f"note: {name} {what}. If it was not trained to draw in one step, its images are blurred")


def _of_checkpoint(folder: Path, device: str, dtype: torch.dtype) -> Model:
    """The student within a checkpoint; SbrushError if its run's teacher is another by now."""
    snapshot = Snapshot.read(folder)
    name, sha256 = snapshot.config["teacher"], snapshot.config["teacher_sha256"]
    teacher = load_teacher(find_teacher(name, sha256, folder), config=snapshot.config.get("teacher_config"))
    if digest(teacher) != sha256:
        raise SbrushError(
            f"the teacher {printable(teacher.name)} has changed since the run of {printable(folder)}",
            "a checkpoint holds what was trained, and needs the teacher for the rest: put the old one back",
        )
    model = snapshot.student(teacher)
    for network in model.networks:
        nn.Module.to(network, device, dtype)  # diffusers' own `to` warns, of nothing that concerns this
        network.requires_grad_(False).eval()
    return model


def load_shapes(source: str | None, *, config: str | None = None) -> Model:
    """A teacher whose networks have shapes and no numbers (device "meta"): nothing is read but its configuration."""
    _check_config(source, config)
    if source is None:
        return _load([BUILT_IN / "teacher"], BUILT_IN_TEACHER, "meta", torch.float32)
    if is_single_file(source):
        file = Path(source).expanduser()
        return dataclasses.replace(_configuration(file, read_header(file), config), name=source)
    return _load([resolve(source, weights=False)], source, "meta", torch.float32)


def digest(model: Model) -> str:
    """SHA-256 over the weights and configuration files that are read of a model, by name, and its LoRAs."""
    own = digest_of_parts({part: model.folders[part] for part in model.parts}, model.sources)
    if not model.loras:
        return own
    return hashlib.sha256(
        repr((own, [(lora.sha256, lora.request.weight) for lora in model.loras])).encode()
    ).hexdigest()


def _check_config(source: str | None, config: str | None) -> None:
    if config is not None and not (source and is_single_file(source)):
        raise SbrushError(
            "--teacher-config is for a teacher that is a single .safetensors file",
            "leave it out: a folder or Hub id has its own configuration",
            code=2,
        )


def _configuration(file: Path, header: dict[str, Entry], config: str | None) -> Model:
    """The model without numbers that a single file is to be read as."""
    if config is not None:
        return _load([resolve(config, weights=False)], config, "meta", torch.float32)
    known = known_configuration(file, header)
    try:
        folder = resolve(known, weights=False)
    except SbrushError as problem:
        problem.hint += "; --teacher-config FOLDER takes the configuration and tokenizer of one that is here"
        raise
    return _load([folder], known, "meta", torch.float32)


def _load(places: list[Path], name: str, device: str, dtype: torch.dtype, *, student: bool = False) -> Model:
    """The model whose parts lie in `places`, each in the first that has it."""
    transformers_logging.disable_progress_bar()  # its bars say nothing that ours do not
    try:
        index_file = next((p / "model_index.json" for p in places if (p / "model_index.json").is_file()), None)
        index = read_json(index_file) if index_file else {}
        family = FAMILIES.get(index.get("_class_name", Model.pipeline))
        if family is None:
            raise SbrushError(
                f"{printable(name)} is a {printable(index['_class_name'])}",
                f"sbrush distills what {' and '.join(FAMILIES)} load",
            )
        folders = {part: next((p for p in places if (p / part).is_dir()), places[0]) for part in family.parts}
        _check(folders, index, family, name, weights=device != "meta", student=student)
        config = read_json(folders["scheduler"] / "scheduler" / "scheduler_config.json")
        # The class that diffusers takes, whatever the configuration says of itself; a built-in student has no index.
        if "scheduler" in index and (folders["scheduler"] / "model_index.json").is_file():
            config["_class_name"] = index["scheduler"][1]
        table = TABLES[family.pipeline]["scheduler"]
        scheduler = read_scheduler(config, name, {**table, **ONE_STEP} if student else table)
        if scheduler.config.prediction_type not in ("epsilon", "v_prediction"):
            raise SbrushError(
                f"{printable(name)} predicts {printable(scheduler.config.prediction_type)}",
                "sbrush distills teachers with epsilon or v prediction",
            )
        about_file = folders["unet"] / "sbrush.json"
        about = read_json(about_file) if about_file.is_file() else {}
        if index_file:
            about = _stated(index_file.parent, index) | about
        parts: dict[str, Any] = {
            part: _read_part(folders[part] / part, part, family, device, dtype) for part in family.parts
        }
        model = family(
            name=name, folders=folders, about=about, index=index, **(parts | {"scheduler": scheduler}),
            noise_scale=noise_scale(config) if student else 1.0,
            ladder=Ladder.read(scheduler_class(config).from_config(config), _steps(about)) if student else None,
        )  # fmt: skip
        check_fit(model)
    except SbrushError:
        raise
    except Exception as problem:  # whatever diffusers, transformers or safetensors make of a damaged file
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise SbrushError(
            f"cannot load {printable(name)}: {printable(first_line)}",
            "the folder may be damaged or half copied; fetch or export it again",
        ) from problem
    if about.get("format", FORMAT) != FORMAT:
        raise SbrushError(
            f"{printable(name)} has student format {printable(about['format'])}, this version reads {FORMAT}",
            "upgrade sbrush",
        )
    if model.prediction == "epsilon" and scheduler.alphas_cumprod[-1] == 0:
        raise SbrushError(
            f"{printable(name)} predicts epsilon and its schedule ends in pure noise, from which no image follows",
            "set 'rescale_betas_zero_snr' to false in its scheduler's configuration, or take a v-prediction model",
        )
    for network in model.networks:
        network.to(device).requires_grad_(False).eval()
    return model


def _steps(about: dict[str, Any]) -> int | None:
    """The number of steps that a sbrush.json names, if it is one."""
    steps = about.get("steps")
    return steps if type(steps) is int and 1 <= steps <= MOST_STEPS else None


def _check(
    folders: dict[str, Path], index: dict[str, Any], family: type[Model], name: str, *, weights: bool, student: bool
) -> None:
    """SbrushError if a part, or what its configuration says, is not such as the family has; nothing is built yet."""
    tables = TABLES[family.pipeline]
    if student:
        tables = tables | {"unet": {**tables["unet"], **GUIDED}}
    for part, folder in folders.items():
        check_part(folder, part, family.parts, weights=weights)
    check_index(index, family.parts, tables["index"], name)
    for part, (_, kind) in family.parts.items():
        here, where = folders[part] / part, f"{printable(name)}/{part}"
        if part.startswith("tokenizer"):
            if (here / "tokenizer_config.json").is_file():
                check_proportions(read_json(here / "tokenizer_config.json"), where)
        elif part == "scheduler":
            check_proportions(read_json(here / "scheduler_config.json"), where)
        else:
            check_configuration(here / "config.json", tables[part], kind, where)


def _stated(folder: Path, index: dict[str, Any]) -> dict[str, Any]:
    """What a folder made elsewhere says that a student must say too: its licence, its safety checker."""
    from huggingface_hub import metadata_load
    from yaml import YAMLError

    stated: dict[str, Any] = {}
    try:
        card = metadata_load(folder / "README.md") or {}
        for key in STATED[:3]:
            if value := card.get(key):
                stated[key] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    except (OSError, ValueError, AttributeError, YAMLError):  # no card, or one that is none
        pass
    if "safety_checker" in index:
        stated["safety_checker"] = bool(index["safety_checker"] and index["safety_checker"][0])
    return stated


def _read_part(folder: Path, part: str, family: type[Model], device: str, dtype: torch.dtype) -> object:
    library, kind = family.parts[part]
    if part == "scheduler":
        return None
    if kind == "CLIPTokenizer":
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    if device == "meta":
        with torch.device("meta"):
            return untrained_network(KINDS[kind], folder)
    return read_network(KINDS[kind], folder, **{"dtype" if library == "transformers" else "torch_dtype": dtype})
