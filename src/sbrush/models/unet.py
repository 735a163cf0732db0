"""One UNet in several roles: its LoRAs, the active role, and attention where torch's own is slow."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any, Literal
from weakref import WeakKeyDictionary

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import nn

from sbrush.console import SbrushError, printable

Role = Literal["teacher", "lora_teacher", "student"]
"""As whom a UNet answers: the teacher is its own frozen weights, the others those and a LoRA of that name."""

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")
# Of a LoRA student. kohya's sd-scripts applies no LoRA to the layers outside the blocks: without them here, too, its
# images are the student's. It costs no quality (150 steps of the built-in world: FID 729, with them 801; docs/log.md).
STUDENT_TARGETS = "blocks"

GUIDANCE_WIDTH = 256  # sines and cosines of a guidance scale, as latent consistency models have them
GUIDANCE_INPUT = "time_embedding.cond_proj.weight"
RECOMPILED = 64  # graphs of one block: SD 2.1's full student and its LoRA teacher take 13

_LAYERS: WeakKeyDictionary[nn.Module, tuple[Any, ...]] = WeakKeyDictionary()  # each UNet's, see _lora_layers


def add_lora(
    unet: UNet2DConditionModel, role: Role, *, rank: int, alpha: int, targets: str, seed: int
) -> dict[str, nn.Parameter]:
    """Freezes the UNet's own weights, adds a LoRA that starts as no change, and returns its float32 parameters by name.

    `targets`: module names separated by blanks ("to_q to_v"), or "all" for every linear and convolution layer, or
    "blocks" for those of the down, middle and up blocks. SbrushError if a name is of no such layer.
    """
    from peft import LoraConfig

    kinds = (nn.Linear, nn.Conv2d)
    own = [(name, module) for name, module in unet.named_modules() if "lora_" not in name]
    layers = [name.removesuffix(".base_layer") for name, module in own if type(module) in kinds]
    if targets in ("all", "blocks"):
        names = layers
        if targets == "blocks":
            names = [name for name in names if name.startswith(BLOCKS)]
    else:
        names = targets.split()
        _check_targets(names, layers, {name for name, _ in own})
    for name, parameter in unet.named_parameters():
        parameter.requires_grad_(".lora_" in name)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # two LoRAs in one network are meant
        torch.manual_seed(seed)
        unet.add_adapter(LoraConfig(r=rank, lora_alpha=alpha, target_modules=names), adapter_name=role)
    for name, parameter in unet.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
    _LAYERS.pop(unet, None)
    set_role(unet, role)
    return lora_parameters(unet, role)


def _check_targets(names: list[str], layers: list[str], modules: set[str]) -> None:
    """SbrushError if there is no name, or if one is of no linear or convolution layer, or of other modules too.

    PEFT passes over a name that no module has, as long as another one is found.
    """
    others = modules.difference(layers, [f"{layer}.base_layer" for layer in layers])

    def fits(name: str) -> bool:
        return any(f".{layer}".endswith(f".{name}") for layer in layers) and not any(
            f".{other}".endswith(f".{name}") for other in others
        )

    wrong = [name for name in names if not fits(name)]
    if wrong or not names:
        named = f"{printable(' '.join(wrong))}, which is no name of linear or convolution layers of the UNet"
        raise SbrushError(
            f"the LoRA is to be on {named if wrong else 'no layer'}",
            "--set lora_targets=blocks, all, or names of layers with a blank between them, such as 'to_q to_v'",
            code=2,
        )


def with_guidance_input(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A copy of a UNet that takes a guidance scale besides, see model.guidance_embedding; it has no effect yet."""
    wider = UNet2DConditionModel.from_config(unet.config, time_cond_proj_dim=GUIDANCE_WIDTH)
    own = unet.state_dict()
    wider.load_state_dict(own | {GUIDANCE_INPUT: wider.get_parameter(GUIDANCE_INPUT).detach().zero_()})
    return wider.to(unet.device)


def blocks_of(unet: UNet2DConditionModel) -> list[nn.Module]:
    """A UNet's down, mid and up blocks, in order; some UNets have no mid block."""
    blocks = (*unet.down_blocks, unet.mid_block, *unet.up_blocks)
    return [block for block in blocks if block is not None]


def lora_parameters(unet: nn.Module, role: Role) -> dict[str, nn.Parameter]:
    """The parameters of one role's LoRA, by name."""
    return {name: p for name, p in unet.named_parameters() if re.search(rf"\.lora_[AB]\.{role}\.", name)}


def lora_targets(names: Iterable[str]) -> str:
    """The layers that a LoRA's parameters of these names are of, as add_lora takes them."""
    return " ".join(sorted({name.split(".lora_")[0] for name in names}))


def set_role(unet: nn.Module, role: Role) -> None:
    """Switches a UNet's LoRAs so that it answers as `role`; every LoRA stays trainable, whoever answers.

    With gradient checkpointing a backward runs parts of the forward again: it must find the role of that forward.
    """
    for layer in _lora_layers(unet):
        # PEFT's own enable_adapters and set_adapter turn requires_grad on and off in each, which at Stable Diffusion's
        # size and for all layers takes a tenth of a second a step.
        layer._disable_adapters = role == "teacher"
        if role != "teacher":
            layer._active_adapter = [role]


def _lora_layers(unet: nn.Module) -> tuple[Any, ...]:
    """A UNet's layers with LoRAs, looked for once."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if unet not in _LAYERS:
        _LAYERS[unet] = tuple(module for module in unet.modules() if isinstance(module, BaseTunerLayer))
    return _LAYERS[unet]


def compile_transformers(unet: UNet2DConditionModel, backend: str) -> None:
    """Compiles a UNet's transformer blocks with torch.compile, each shape once for all blocks that have it.

    They hold nearly all that compiling gains: at SD 2.1's size on an H200 steps are 1.26 times as fast, after a minute.
    The residual blocks as well make it 1.28 times and take five (docs/results.md); of the whole UNet as one graph, no
    role was compiled in eight minutes.
    """
    # Every shape in every role, with gradients and without, is a graph: torch tells the roles apart by the LoRAs'
    # switches. Beyond its limit, 8 by default, it would go on without compiling.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, RECOMPILED)
    unet.compile_repeated_blocks(backend=backend, dynamic=False)


@torch.no_grad()
def merge_lora(unet: UNet2DConditionModel, role: Role, into: UNet2DConditionModel) -> UNet2DConditionModel:
    """`into`, a plain UNet of the same architecture, with a role's LoRA added to its weights: W + (alpha / r) B A."""
    from peft.tuners.lora import LoraLayer

    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer) and role in module.r:
            into.get_parameter(f"{name}.weight").add_(module.get_delta_weight(role).float())
    return into


def attend_explicitly(unet: UNet2DConditionModel, device: str | None = None) -> None:
    """On the CPU (`device`: by default the UNet's), computes attention over few tokens as two plain matrix products.

    The backward of torch's fused attention took 36 % of a training step of the built-in UNet on a CPU (docs/log.md).
    Over many tokens, as at Stable Diffusion's size, the fused one stays: the products would need gigabytes.
    """
    size = unet.config.sample_size
    if (device or unet.device.type) == "cpu" and (size if isinstance(size, int) else max(size)) <= 32:
        unet.set_attn_processor(AttnProcessor())
