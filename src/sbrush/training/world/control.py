"""Trains the built-in world's ControlNet, from outlines to stickers, and ships it.  `make teach-control`:

    python -m sbrush.training.world.control train   beside the frozen teacher
    python -m sbrush.training.world.control ship    as it comes with sbrush, in float16
    python -m sbrush.training.world.control adapt   and adapted to a one-step student, which does not come with sbrush

Seeded and checkpointed as teach.py. It learns on images that are drawn, the outlines being those that the preprocessor
finds in them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
import typer
from diffusers import ControlNetModel
from diffusers.models.attention_processor import AttnProcessor
from safetensors.torch import load_file, save_file
from torch import Tensor

from sbrush.console import info, progress
from sbrush.core import Conditioning, student_x0
from sbrush.models.control import ControlNet
from sbrush.models.load import BUILT_IN, load_student, load_teacher
from sbrush.models.load_control import load_control
from sbrush.models.model import Model
from sbrush.models.unet import attend_explicitly
from sbrush.sampling.control import as_control
from sbrush.sampling.preprocess import outline
from sbrush.stickers.world import all_captions
from sbrush.storage.files import atomic_write, follow_umask
from sbrush.training.ema import EMA
from sbrush.training.world import teach

IMAGES = 10_000  # of those that the teacher has seen
HINT = (16, 32, 64)  # channels of the layers that take an image of 64 pixels to latents of 16
CHUNK = 250
LEVELS = 8  # of noise, from the student's own to other noise

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def train(
    work: teach.Work = teach.WORK,
    steps: teach.Steps = 600,
    batch: teach.Batch = 32,
    lr: float = 1e-3,
    threads: teach.Threads = 0,
) -> None:
    """ControlNet: a copy of the teacher's encoder, by the error in v; one caption in ten is empty.

    Unlike the teacher's, the loss has no weight that falls with the noise: where things are is decided at high noise.
    """
    device = teach._device(threads)
    teacher = load_teacher(device=str(device))
    latents, outlines, labels = _examples(work, teacher)
    torch.manual_seed(teach.SEED)
    net = ControlNetModel.from_unet(teacher.unet, conditioning_embedding_out_channels=HINT)
    net.to(device, memory_format=torch.channels_last).requires_grad_(True)
    teacher.unet.to(memory_format=torch.channels_last)
    attend_explicitly(teacher.unet)
    net.set_attn_processor(AttnProcessor())  # as attend_explicitly does
    average = EMA(dict(net.named_parameters()), 0.999)
    schedule = teacher.schedule
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (batch,), generator=draw)
        empty = torch.rand(batch, generator=draw) < 0.1
        captions = [
            "" if nothing else teach._random_caption(row, f"control/{step}", i).text
            for i, (row, nothing) in enumerate(zip(labels[index].tolist(), empty.tolist(), strict=True))
        ]
        x0, image = latents[index].float().to(device), outlines[index].float().to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = torch.randint(len(schedule), (batch,), generator=draw).to(device)
        alpha, sigma = schedule.at(t)
        x_t = (alpha * x0 + sigma * noise).to(memory_format=torch.channels_last)
        tokens = teacher.encode(captions)["tokens"]
        with teach._bf16(device):
            down, mid = net(x_t, t, tokens, controlnet_cond=image.expand(-1, 3, -1, -1), return_dict=False)
            v = teacher.unet(
                x_t, t, tokens, down_block_additional_residuals=down, mid_block_additional_residual=mid
            ).sample
        return (v.float() - (alpha * noise - sigma * x0)).pow(2).mean()

    teach.train(
        "control", work, steps, {"net": net}, optimizer, loss, lr=teach._warm_cosine(lr, steps, 50), average=average
    )
    with average.inside():
        net.save_pretrained(work / "control")


@app.command()
def ship(work: teach.Work = teach.WORK, to: Path = BUILT_IN) -> None:
    """The ControlNet as it comes with sbrush, in float16."""
    net = ControlNetModel.from_pretrained(work / "control")
    net.register_to_config(_name_or_path="")
    net.half().save_pretrained(to / "control" / "outline")
    follow_umask(to)


@app.command()
def adapt(
    work: teach.Work = teach.WORK,
    student: str | None = None,
    control: str = "outline",
    steps: teach.Steps = 160,
    batch: teach.Batch = 16,
    lr: float = 1e-4,
    threads: teach.Threads = 0,
) -> None:
    """A ControlNet for a student that stays as it is: noise-consistency training (arXiv 2506.19741).

    Neither images nor a teacher: the student draws x = f(z), its outline is c, and the steered student f(., c) is to
    draw x of z itself, and of noise that is mixed with z in less and less parts what it drew of the noise before.
    """
    device = teach._device(threads)
    model = load_student(student, device=str(device))
    attend_explicitly(model.unet.to(memory_format=torch.channels_last).requires_grad_(False).eval())
    net = load_control(control, model).float().to(device, memory_format=torch.channels_last).requires_grad_(True)
    net.set_attn_processor(AttnProcessor())
    steered = replace(model, controls=(ControlNet(net),))
    average = EMA(dict(net.named_parameters()), 0.98)
    prompts = [caption.text for caption in all_captions()]
    start = model.schedule.start(batch, model.rungs()[0]).to(device)

    def drawn(by: Model, z: Tensor, cond: Conditioning) -> Tensor:
        with teach._bf16(device):
            output = by.predict(by.unet, z, start, cond).float()
        return student_x0(output, z, start, by.schedule, by.prediction)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        chosen = torch.randint(len(prompts), (batch,), generator=draw).tolist()
        z, fresh = (torch.randn(batch, *model.latent_shape, generator=draw).to(device) for _ in range(2))
        level = torch.randint(1, LEVELS + 1, (batch, 1, 1, 1), generator=draw).to(device)
        with torch.no_grad():
            cond = model.encode([prompts[i] for i in chosen])
            x = drawn(model, z, cond)
            cond = cond | {"control": as_control(outline(model.decode(x)))[:, None].to(device)}
            before = drawn(steered, mixed(z, fresh, (level - 1) / LEVELS), cond)
        now = drawn(steered, mixed(z, fresh, level / LEVELS), cond)
        return (now - before).pow(2).mean() + (drawn(steered, z, cond) - x).pow(2).mean()

    teach.train(
        "adapt", work, steps, {"net": net}, optimizer=torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.95)),
        loss_at=loss, lr=teach._warm_cosine(lr, steps, 20), average=average,
    )  # fmt: skip
    with average.inside():
        net.save_pretrained(work / "adapted")
    info(f"{work / 'adapted'} is a ControlNet for --control of sbrush sample")


def mixed(z: Tensor, fresh: Tensor, share: Tensor) -> Tensor:
    """Noise between two of unit variance, of unit variance too: sqrt(1 - s^2) z + s fresh, for shares s of 0 .. 1."""
    return (1 - share.square()).sqrt() * z + share * fresh


def _examples(work: Path, teacher: Model) -> tuple[Tensor, Tensor, Tensor]:
    """Latents float16 [N, 4, 16, 16], outlines bool [N, 1, 64, 64] and attributes int64 [N, 4] of drawn images."""
    file = work / "control.safetensors"
    if not file.exists():
        images, labels = teach.drawn_images(work)
        latents, outlines = list[Tensor](), list[Tensor]()
        teacher.vae.to(memory_format=torch.channels_last)
        with progress("encoding images", IMAGES, unit="images") as bar, teach._bf16(teacher.device):
            for some in images[:IMAGES].split(CHUNK):
                latents.append(teacher.encode_images(some).half().cpu())
                outlines.append((outline(some)[:, :1] > 0).contiguous())
                bar.advance(len(some))
        found = {"latents": torch.cat(latents), "outlines": torch.cat(outlines), "labels": labels[:IMAGES].clone()}
        with atomic_write(file) as partial:
            save_file({name: tensor.contiguous() for name, tensor in found.items()}, partial)
    loaded = load_file(file)
    info(f"{len(loaded['latents'])} images with their outlines")
    return loaded["latents"], loaded["outlines"], loaded["labels"]


if __name__ == "__main__":
    app()
