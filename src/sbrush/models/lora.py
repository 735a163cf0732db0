"""Adds LoRAs to a loaded model: W + weight (alpha / r) B A in every layer that a file names, text encoders included.

Files are read by diffusers' own loaders, in its own, PEFT's or kohya's key layout. Before anything is changed, each
tensor is checked: that it is a number, and that a layer of the model takes it. Diffusers would pass over the rest.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import diffusers
import torch
from diffusers.utils import convert_state_dict_to_diffusers, convert_state_dict_to_peft, convert_unet_state_dict_to_peft
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sbrush.console import SbrushError, printable
from sbrush.models.lora_request import AddedLora, LoraRequest
from sbrush.models.model import Model
from sbrush.models.parts import refuse_pointer
from sbrush.models.source import check_file

ADAPTER = "sbrush"  # what a LoRA is called while it is in the network beside its weights
BASES = {  # whose text embeddings are so wide
    128: "the built-in world",
    768: "Stable Diffusion 1.x",
    1024: "Stable Diffusion 2.x",
    2048: "Stable Diffusion XL",
}
TRANSFORMERS = {  # what the keys of LoRAs for other architectures hold
    "FLUX": r"(double|single)_blocks|single_transformer_blocks",
    "a diffusion transformer, such as Stable Diffusion 3": r"joint_blocks|^(lora_)?transformer[._]",
}
NAMED = 5  # keys that an error names

M = TypeVar("M", bound=Model)


class LoraFile(NamedTuple):
    """A file's content in diffusers' layout."""

    shown: str
    tensors: dict[str, Tensor]  # by the file's own names
    layers: dict[str, Tensor]  # by diffusers' names: "unet.", "text_encoder." ... and the layer's
    alphas: dict[str, float] | None
    settings: dict[str, Any] | None  # a LoraConfig that diffusers has written into the file

    def name_of(self, tensor: Tensor, otherwise: str) -> str:
        """What the file itself calls one of its tensors, whatever diffusers has made of the name."""
        return next((name for name, own in self.tensors.items() if own is tensor), otherwise)


def add_loras(model: M, requests: Iterable[LoraRequest]) -> M:
    """The model with LoRAs added to its weights; `model.loras` names them. Its networks are changed in place.

    Each is added in the networks' own number format. bfloat16 swallows what is less than 1/512 of a weight: load the
    model in float32, add, and convert then, as load_student does.

    Raises:
        SbrushError: There is no such LoRA, it is damaged, empty or not finite, or it was made for another architecture.
            The model is as it was.
    """
    requests = list(requests)
    read = [_read(request, model) for request in requests]
    for file, _ in read:
        _check_fit(file, model)
    for request, (file, _) in zip(requests, read, strict=True):
        _add(file, model, request.weight)
    added = tuple(AddedLora(request, sha256) for request, (_, sha256) in zip(requests, read, strict=True))
    return replace(model, loras=model.loras + added)


def _read(request: LoraRequest, model: Model) -> tuple[LoraFile, str]:
    """A LoRA's file, and the start of its SHA-256. SbrushError if it is no LoRA that can be added to any model."""
    path, shown = request.locate(), printable(request.source)
    check_file(path)
    refuse_pointer(path)
    try:
        with safe_open(path, "pt") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}
            settings = json.loads((content.metadata() or {}).get("lora_adapter_metadata", "null"))
        with path.open("rb") as stream:
            sha256 = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
    except (SafetensorError, OSError, ValueError) as problem:
        raise SbrushError(
            f"{shown} is no complete .safetensors: {printable(_first_line(problem))}",
            "its download may have been cut short; compare its size and SHA-256 with those on its page",
        ) from problem
    _check_content(shown, tensors)
    return _convert(shown, tensors, settings, model), sha256


def _check_content(shown: str, tensors: Mapping[str, Tensor]) -> None:
    """SbrushError if there is nothing in a file, nothing of a LoRA, or what is no number."""
    if not tensors:
        raise SbrushError(f"the LoRA {shown} is empty: it holds no tensor", "fetch or save it again", code=2)
    if not any("lora" in name for name in tensors):
        raise SbrushError(
            f"{shown} is no LoRA: none of its {len(tensors)} tensors is named as one",
            "a whole model is for --student or --teacher; of other adapters, such as LoHa, diffusers reads none",
            code=2,
        )
    if any("dora_scale" in name or "lora_magnitude_vector" in name for name in tensors):
        raise SbrushError(
            f"{shown} is a DoRA: it changes the lengths of the weights too, and diffusers passes over that",
            "take or train a plain LoRA",
            code=2,
        )
    if wrong := next((name for name, tensor in tensors.items() if not tensor.float().isfinite().all()), None):
        raise SbrushError(
            f"the LoRA {shown} holds numbers that are not finite, first in {printable(wrong)}",
            "its training diverged, or it is damaged: take an earlier version of it",
        )


def _convert(shown: str, tensors: dict[str, Tensor], settings: dict[str, Any] | None, model: Model) -> LoraFile:
    """The file's content as diffusers' loaders take it. SbrushError if diffusers does not know the names."""
    loader = getattr(diffusers, model.pipeline)
    try:
        layers, alphas, _ = loader.lora_state_dict(
            dict(tensors), unet_config=model.unet.config, return_lora_metadata=True
        )
    except Exception as problem:  # each conversion fails in its own way over names that it does not know
        raise _misfit(LoraFile(shown, tensors, {}, None, None), list(tensors), model) from problem
    return LoraFile(shown, tensors, layers, alphas or None, settings)


def _check_fit(file: LoraFile, model: Model) -> None:
    """SbrushError if the model has no layer, or none of that shape, for one of a LoRA's tensors."""
    misfits = [name for name in file.layers if not name.startswith(tuple(f"{part}." for part in _networks(model)))]
    names, odd = [file.name_of(file.layers[name], name) for name in misfits], list[str]()
    for part, network in _networks(model).items():
        modules = dict(network.named_modules())
        try:
            layers = _by_module(_of_part(file.layers, part), network, text=part != "unet")
        except ValueError as problem:  # diffusers cannot tell in which layout they are
            raise _misfit(file, list(file.tensors), model) from problem
        names += [file.name_of(tensor, name) for name, tensor in layers.items() if not _fits(name, tensor, modules)]
        odd += [file.name_of(tensor, name) for name, tensor in layers.items() if not _paired(name, layers)]
    if names:
        raise _misfit(file, names, model)
    if odd:
        raise SbrushError(
            f"the LoRA {file.shown} is damaged: {printable(odd[0])} has no other half of the same rank",
            "fetch or save it again",
        )


def _by_module(layers: dict[str, Tensor], network: nn.Module, *, text: bool) -> dict[str, Tensor]:
    """A part's tensors by the names of PEFT: the module's, and .lora_A.weight or .lora_B.weight behind it."""
    if not layers:
        return {}
    if not text:
        return layers if "lora_A" in next(iter(layers)) else convert_unet_state_dict_to_peft(layers)
    named: dict[str, Tensor] = convert_state_dict_to_peft(convert_state_dict_to_diffusers(layers))
    if not hasattr(network, "text_model"):  # as transformers 5 has it
        named = {name.removeprefix("text_model."): tensor for name, tensor in named.items()}
    return named


def _fits(name: str, tensor: Tensor, modules: Mapping[str, nn.Module]) -> bool:
    """Whether a module takes a tensor [r, in, ...] of lora_A, or [out, r, ...] of lora_B."""
    found = re.fullmatch(r"(.+)\.lora_([AB])\.(weight|bias)", name)
    module = modules.get(found[1]) if found else None
    if found is None or not isinstance(module, nn.Linear | nn.Conv2d):
        return False
    if found[2] == "B":
        return tensor.shape[0] == module.weight.shape[0]
    return tensor.shape[1:] == module.weight.shape[1:]


def _paired(name: str, layers: Mapping[str, Tensor]) -> bool:
    """Whether a module has both lora_A [r, ...] and lora_B [..., r, ...]."""
    module = re.sub(r"\.lora_[AB]\.\w+$", "", name)
    a, b = (layers.get(f"{module}.lora_{half}.weight") for half in "AB")
    return a is not None and b is not None and a.shape[0] == b.shape[1]


def _add(file: LoraFile, model: Model, weight: float) -> None:
    """Has diffusers load a LoRA into each network that it names, and merges it there."""
    loader, networks = getattr(diffusers, model.pipeline), _networks(model)
    for part, network in networks.items():
        if not _of_part(file.layers, part):
            continue
        how = {"network_alphas": file.alphas, "adapter_name": ADAPTER, "metadata": file.settings}
        try:
            if part == "unet":
                loader.load_lora_into_unet(file.layers, unet=network, **how)
            else:
                loader.load_lora_into_text_encoder(file.layers, text_encoder=network, prefix=part, **how)
            _merge(network, weight)
        except (ValueError, RuntimeError, KeyError, TypeError) as problem:
            raise SbrushError(
                f"diffusers cannot read the LoRA {file.shown}: {printable(_first_line(problem))}",
                "it may be damaged: fetch or save it again",
            ) from problem
        finally:
            _remove(network)


@torch.no_grad()
def _merge(network: nn.Module, weight: float) -> None:
    """Adds what a loaded LoRA changes, times `weight`, to the weights. ValueError if they are not finite then."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in network.modules():
        if isinstance(module, BaseTunerLayer):
            module.scale_layer(weight)
            module.merge(safe_merge=True, adapter_names=[ADAPTER])


def _remove(network: Any) -> None:
    """Puts the plain layers back in place of PEFT's."""
    recurse_remove_peft_layers(network)
    if hasattr(network, "peft_config"):
        del network.peft_config
    network._hf_peft_config_loaded = False


def _misfit(file: LoraFile, names: list[str], model: Model) -> SbrushError:
    """A LoRA of which the model takes no or not all tensors: `names`, as the file has them."""
    some = ", ".join(printable(name) for name in sorted(names)[:NAMED])
    own = BASES.get(model.unet.config.cross_attention_dim, "another base")
    made = made_for(file.tensors)
    if any(name.startswith("base_model.model.") for name in names):
        hint = "PEFT itself has saved it; save it by the pipeline's save_lora_weights, whose names diffusers reads"
    elif made is None:
        hint = f"it does not say for which base it was made; take one for {own}"
    elif made == own:
        hint = f"it looks made for {made}, as this model is, but for other layers: take another version of it"
    else:
        hint = f"it looks made for {made}, and {printable(model.name)} is of {own}: take a LoRA for that"
    what = f"{len(names)} of its {len(file.tensors)} tensors fit no layer of {printable(model.name)}"
    return SbrushError(f"the LoRA {file.shown} does not fit: {what}, such as {some}", hint, code=2)


def made_for(tensors: Mapping[str, Tensor]) -> str | None:
    """The base that a LoRA looks made for: by its names, or the width of the text that its cross-attention reads."""
    for base, pattern in TRANSFORMERS.items():
        if any(re.search(pattern, name) for name in tensors):
            return base
    down = re.compile(r"attn2[._](processor[._])?to_[kv][._](lora[._])?(.*down|.*lora_A|A\b)")
    widths = {tensor.shape[1] for name, tensor in tensors.items() if tensor.dim() > 1 and down.search(name)}
    if len(widths) != 1:
        return None
    width = widths.pop()
    return BASES.get(width, f"a model whose text embeddings are {width} wide")


def _networks(model: Model) -> dict[str, Any]:
    """The networks that a LoRA may change, by diffusers' names of them."""
    encoders = [part for part in model.parts if part.startswith("text_encoder")]
    return {part: getattr(model, part) for part in ("unet", *encoders)}


def _of_part(layers: Mapping[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): tensor for name, tensor in layers.items() if name.startswith(f"{part}.")}


def _first_line(problem: Exception) -> str:
    return next(iter(str(problem).splitlines()), type(problem).__name__)
