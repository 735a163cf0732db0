"""The built-in LoRA "blueprint": a style of stickers/style.py, learned as LoRAs of Stable Diffusion are.

    python -m sbrush.training.world.teach lora     or: make teach ARGS=lora

The ordinary diffusion loss on the built-in teacher, whose own weights stay as they are. The captions are those of the
stickers before they were drawn in the style, colour and background included: the style is always on.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from peft import get_peft_model_state_dict
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from sbrush.console import info, progress
from sbrush.models.load import BUILT_IN, load_teacher
from sbrush.models.model import Model
from sbrush.models.unet import add_lora, attend_explicitly
from sbrush.stickers.style import draw_blueprint
from sbrush.stickers.world import Sticker, random_caption, random_sticker, stream
from sbrush.storage.files import follow_umask

IMAGES = 3000
RANK = 8
TARGETS = "to_q to_k to_v to_out.0 proj_in proj_out ff.net.0.proj ff.net.2"  # what kohya's sd-scripts train
SEED = 1
NAME = "blueprint"

Loss = Callable[[int, torch.Generator], Tensor]
Stage = Callable[[nn.Module, torch.optim.Optimizer, Loss], None]


def train_lora(stage: Stage, *, batch: int, lr: float, to: Path = BUILT_IN) -> Path:
    """Trains the LoRA and writes it into the folder `to`, in float16 and diffusers' layout; returns its file.

    `stage` runs the training steps: given what is trained, its optimizer and its loss.
    """
    teacher = load_teacher()
    stickers = [random_sticker(stream(NAME, i)) for i in range(IMAGES)]
    latents = _latents(teacher, stickers)
    attend_explicitly(teacher.unet)
    trained = add_lora(teacher.unet, "student", rank=RANK, alpha=RANK, targets=TARGETS, seed=SEED)
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(stickers), (batch,), generator=draw).tolist()
        empty = torch.rand(batch, generator=draw) < 0.1
        captions = [
            "" if nothing else random_caption(stream(f"{NAME}/{step}", i), stickers[index]).text
            for i, (index, nothing) in enumerate(zip(chosen, empty.tolist(), strict=True))
        ]
        return _diffusion_loss(teacher, latents[chosen], captions, draw)

    # PyTorch has no dictionary of parameters whose names hold dots.
    stage(nn.ParameterDict({name.replace(".", "/"): p for name, p in trained.items()}), optimizer, loss)
    folder = to / "loras"
    layers = {
        name: tensor.half() for name, tensor in get_peft_model_state_dict(teacher.unet, adapter_name="student").items()
    }
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=layers, weight_name=f"{NAME}.safetensors")
    follow_umask(folder)
    info(f"{folder / NAME}.safetensors: {sum(t.nbytes for t in layers.values()) / 1024:.0f} KiB")
    return folder / f"{NAME}.safetensors"


def _latents(teacher: Model, stickers: list[Sticker]) -> Tensor:
    """The stickers' images in the style as latents, float32 [N, 4, 16, 16]."""
    parts = []
    with progress("drawing and encoding images", len(stickers), unit="images") as bar:
        for first in range(0, len(stickers), 100):
            some = [pil_to_tensor(draw_blueprint(sticker)) for sticker in stickers[first : first + 100]]
            parts.append(teacher.encode_images(torch.stack(some)))
            bar.advance(len(some))
    return torch.cat(parts)


def _diffusion_loss(teacher: Model, x0: Tensor, captions: list[str], draw: torch.Generator) -> Tensor:
    """The mean squared error of the v prediction, as diffusers' LoRA script has it.

    The teacher's own weight, min-SNR-5, is next to nothing at T, where a one-step student works: of a LoRA trained with
    it the teacher's own single step took on less (docs/log.md).
    """
    noise = torch.randn(x0.shape, generator=draw)
    t = torch.randint(len(teacher.schedule), (len(x0),), generator=draw)
    alpha, sigma = teacher.schedule.at(t)
    with torch.autocast("cpu", torch.bfloat16):
        v = teacher.denoise(alpha * x0 + sigma * noise, t, teacher.encode(captions))
    return (v.float() - (alpha * noise - sigma * x0)).pow(2).mean()
