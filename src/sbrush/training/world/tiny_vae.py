"""Trains the built-in world's tiny VAE, which decodes about three times as fast, and ships it.  `make teach-tiny-vae`:

    python -m sbrush.training.world.tiny_vae train   by the shipped VAE, on its latents and on the shipped student's
    python -m sbrush.training.world.tiny_vae ship    as it comes with sbrush, in float16

Seeded and checkpointed as teach.py. Its latents are those of the UNet's scale, so that its scaling factor is 1, as
TAESD's is. Half of what it learns from are drawn stickers, half what the student draws in one step: a decoder that had
seen the first alone has never met the second's mistakes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from sbrush.console import info, progress
from sbrush.models.load import BUILT_IN, load_student
from sbrush.models.model import Model
from sbrush.models.vae_source import TINY_FOLDER
from sbrush.sampling.generation import student_latents
from sbrush.stickers.draw import draw
from sbrush.stickers.world import random_caption, random_sticker, stream
from sbrush.storage.files import atomic_write, follow_umask
from sbrush.training.ema import EMA
from sbrush.training.world import teach

NAME = "tiny-vae"
IMAGES = 5000  # of drawn stickers, and as many of the student's
UNSEEN = 500  # of each, for the figures at the end
CHUNK = 50
WIDTH, BLOCKS = 16, (8, 1, 1)  # of the decoder: blocks at 16, 32 and 64 pixels

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)


@app.command()
def train(
    work: teach.Work = teach.WORK,
    steps: teach.Steps = 2500,
    batch: teach.Batch = 16,
    lr: float = 4e-3,
    threads: teach.Threads = 0,
) -> None:
    """Decoder: L1 + MSE to the VAE's own image, and to the sticker where there is one. Encoder: MSE to its latent."""
    device = teach._device(threads)
    student = load_student(device=str(device))
    known = {name: tensor.to(device) for name, tensor in _examples(work, student, IMAGES).items()}
    torch.manual_seed(teach.SEED)
    net = build().to(device, memory_format=torch.channels_last)
    average = EMA(dict(net.named_parameters()), 0.999)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        here = torch.randint(len(known["stickers"]), (batch // 2,), generator=generator).to(device)
        there = torch.randint(len(known["drawn"]), (batch // 2,), generator=generator).to(device)
        sticker, latent = teach._to_network(known["stickers"][here], device), known["sticker_latents"][here].float()
        z = torch.cat([latent, known["drawn_latents"][there].float()])
        own = teach._to_network(torch.cat([known["decoded"][here], known["drawn"][there]]), device)
        with teach._bf16(device):
            images = net.decode(z.contiguous(memory_format=torch.channels_last)).sample.float()
            encoded = net.encode(own[::2]).latents.float()
        return _error(images, own) + _error(images[: len(here)], sticker) / 2 + (encoded - z[::2]).pow(2).mean()

    teach.train(NAME, work, steps, {"net": net}, optimizer, loss, lr=teach._warm_cosine(lr, steps, 50), average=average)
    with average.inside():
        net.save_pretrained(work / NAME)
        _report(net, _examples(work, student, UNSEEN, first=IMAGES), device)


@app.command()
def ship(
    work: teach.Work = teach.WORK,
    to: Annotated[Path, typer.Option(help="Where the package keeps it.")] = BUILT_IN,
) -> None:
    """The tiny VAE as it comes with sbrush, in float16."""
    net = AutoencoderTiny.from_pretrained(work / NAME)
    net.register_to_config(_name_or_path="")
    net.half().save_pretrained(to / TINY_FOLDER)
    follow_umask(to)


def build() -> AutoencoderTiny:
    """Untrained: 4 x 16 x 16 latents of the UNet's scale to 64 x 64 RGB, and back."""
    return AutoencoderTiny(
        encoder_block_out_channels=(WIDTH,) * 3,
        num_encoder_blocks=(0, 1, 2),
        decoder_block_out_channels=(WIDTH,) * 3,
        num_decoder_blocks=BLOCKS,
    )


def _error(images: Tensor, wanted: Tensor) -> Tensor:
    error = images - wanted
    return error.abs().mean() + 4 * error.pow(2).mean()


def _examples(work: Path, student: Model, count: int, *, first: int = 0) -> dict[str, Tensor]:
    """`count` drawn stickers and images of the student, uint8 [N, 3, 64, 64], with their latents, float16.

    stickers, sticker_latents, decoded (by the VAE); drawn (by the student and the VAE), drawn_latents.
    """
    file = work / f"{NAME}-{first}.safetensors"
    if not file.exists():
        numbers = range(first, first + count)
        found: dict[str, list[Tensor]] = {}
        with progress("drawing and encoding images", count, unit="images") as bar:
            for start in range(0, count, CHUNK):
                for name, tensor in _some(student, numbers[start : start + CHUNK]).items():
                    found.setdefault(name, []).append(tensor.cpu())
                bar.advance(len(numbers[start : start + CHUNK]))
        work.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            save_file({name: torch.cat(parts).contiguous() for name, parts in found.items()}, partial)
    return load_file(file)


def _some(student: Model, numbers: range) -> dict[str, Tensor]:
    stickers = torch.stack([pil_to_tensor(draw(random_sticker(stream(NAME, i)))) for i in numbers])
    latents = student.encode_images(stickers)
    texts = [random_caption(stream(f"{NAME}/student", i)).text for i in numbers]
    x0 = torch.cat(list(student_latents(student, texts, numbers)))
    return {
        "stickers": stickers, "sticker_latents": latents.half(), "decoded": student.decode(latents),
        "drawn": student.decode(x0), "drawn_latents": x0.half(),
    }  # fmt: skip


@torch.no_grad()
def _report(net: AutoencoderTiny, unseen: dict[str, Tensor], device: torch.device) -> None:
    """PSNR on unseen images: against the VAE's own on both kinds of latents, and against the stickers."""
    for latents, wanted in (
        ("drawn_latents", "drawn"),
        ("sticker_latents", "decoded"),
        ("sticker_latents", "stickers"),
    ):
        images = torch.cat([net.decode(some.float().to(device)).sample.cpu() for some in unseen[latents].split(CHUNK)])
        error = (images.clamp(-1, 1) - (unseen[wanted].float() / 127.5 - 1)) / 2
        psnr = -10 * torch.log10(error.pow(2).mean(dim=(1, 2, 3)))
        info(f"{NAME}: {psnr.mean():.2f} dB against '{wanted}' on {len(images)} unseen {latents}")


if __name__ == "__main__":
    app()
