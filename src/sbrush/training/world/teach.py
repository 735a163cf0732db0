"""Trains the built-in world from nothing: autoencoder, teacher, judge.  `make teach`, or one stage at a time:

    python -m sbrush.training.world.teach vae       images -> latents
    python -m sbrush.training.world.teach judge     images and captions -> one space, only for measuring
    python -m sbrush.training.world.teach teacher   captions -> latents, with the text encoder
    python -m sbrush.training.world.teach lora      a LoRA of the shipped teacher, the style "blueprint": style.py

ship.py puts what comes out of the first three into the package.

Seeded and checkpointed: the same command resumes where it stopped. Training images are drawn once and kept in
`--work`; what step s sees depends on the seed and s alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sbrush.console import info, progress
from sbrush.core import NoiseSchedule
from sbrush.models.unet import attend_explicitly
from sbrush.stickers import networks
from sbrush.stickers.world import ATTRIBUTES, Caption, random_caption, random_sticker, stream
from sbrush.storage import checkpoint
from sbrush.storage.files import atomic_write
from sbrush.training.ema import EMA
from sbrush.training.optimizer import restore, state_of

SEED = 1
IMAGES = 80_000
CHECKPOINT_EVERY = 250  # steps

app = typer.Typer(add_completion=False, help=__doc__, rich_markup_mode=None)
Work = Annotated[Path, typer.Option(help="Folder for the drawn images, checkpoints and finished parts.")]
Steps = Annotated[int, typer.Option(help="Training steps.", min=1)]
Batch = Annotated[int, typer.Option(help="Images a step.", min=2)]
Threads = Annotated[int, typer.Option(help="CPU threads; 0 leaves torch's choice.", min=0)]

WORK = Path("runs/teach")


@app.command()
def vae(work: Work = WORK, steps: Steps = 1700, batch: Batch = 32, lr: float = 3e-3, threads: Threads = 0) -> None:
    """Autoencoder: L1 + MSE + 1e-4 KL; then the scaling factor that gives the latents unit deviation."""
    device = _device(threads)
    images, _ = drawn_images(work)
    torch.manual_seed(SEED)
    net = networks.build_vae().to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        x = _to_network(images[torch.randint(len(images), (batch,), generator=draw)], device)
        with _bf16(device):
            posterior = net.encode(x).latent_dist
            y = net.decode(posterior.sample(draw if device.type == "cpu" else None)).sample
        error = y.float() - x
        return (
            error.abs().mean() + error.pow(2).mean() + 1e-4 * posterior.kl().float().mean() / posterior.mean[0].numel()
        )

    train("vae", work, steps, {"net": net}, optimizer, loss, lr=lambda s: lr * min(1, s / 50) * (1 - s / steps))
    net.eval()
    with torch.no_grad():
        sample = torch.cat([net.encode(_to_network(p, device)).latent_dist.mean for p in images[:2048].split(256)])
        test = torch.stack([_tensor(random_sticker(stream("vae-test", i), held_out=True)) for i in range(512)])
        x = _to_network(test, device)
        y = net.decode(net.encode(x).latent_dist.mean).sample
        psnr = -10 * torch.log10(((y.clamp(-1, 1) - x) / 2).pow(2).mean(dim=(1, 2, 3))).mean().item()
    net.register_to_config(scaling_factor=round(1 / sample.std().item(), 5))
    net.save_pretrained(work / "vae")
    info(f"vae: {psnr:.2f} dB on 512 unseen images, latent std by channel {sample.std(dim=(0, 2, 3)).tolist()}")


@app.command()
def judge(work: Work = WORK, steps: Steps = 2200, batch: Batch = 64, lr: float = 2e-3, threads: Threads = 0) -> None:
    """Judge: a sigmoid loss on every pair of image and caption, whose truth is known.

    It sees the held-out combinations too. One that had not took green hearts for trees, and the measure of other
    models' generalisation must not depend on the judge's own. And it sees images softened and with noise: one that
    had seen crisp ones alone took small dogs for hearts as soon as an autoencoder had smoothed them.
    """
    device = _device(threads)
    images, labels = drawn_images(work, held_out=True)
    tokenizer = networks.build_tokenizer(work / "tokenizer")
    torch.manual_seed(SEED)
    net, config = networks.build_judge(tokenizer)
    net.to(device, memory_format=torch.channels_last)
    bias = nn.Parameter(torch.tensor(-5.0, device=device))
    optimizer = torch.optim.AdamW([*net.parameters(), bias], lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    single = [Caption(**{name: value}) for name, values in ATTRIBUTES.items() for value in values]

    def loss(step: int, draw: torch.Generator) -> Tensor:
        index = torch.randint(len(images), (batch,), generator=draw)
        rows = labels[index]
        captions = [*single, *(_random_caption(row, f"judge/{step}", i) for i, row in enumerate(rows.tolist()))]
        tokens = _tokens(tokenizer, [c.text for c in captions]).to(device)
        x = _to_network(images[index], device)
        x = softened(x, draw) + noise_of(x, draw)
        with _bf16(device):
            seen, said = net.encode_image(x, normalize=True), net.encode_text(tokens, normalize=True)
        logits = net.logit_scale.exp() * seen.float() @ said.float().T + bias
        truth = _true_pairs(rows, captions).to(device)
        each = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
        hit, miss = (each * truth).sum() / truth.sum(), (each * (1 - truth)).sum() / (1 - truth).sum()
        return hit + miss

    train("judge", work, steps, {"net": net, "bias": _Holder(bias)}, optimizer, loss, lr=_warm_cosine(lr, steps))
    folder = work / "judge"
    folder.mkdir(parents=True, exist_ok=True)
    state = {k: v.half().contiguous() if v.is_floating_point() else v for k, v in net.state_dict().items()}
    save_file(state, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


@app.command()
def teacher(work: Work = WORK, steps: Steps = 7000, batch: Batch = 64, lr: float = 1e-3, threads: Threads = 0) -> None:
    """Teacher: v prediction, min-SNR-5 weight, the text encoder trained along; one caption in ten is empty."""
    device = _device(threads)
    latents, labels = _latents(work, device)
    tokenizer = networks.build_tokenizer(work / "tokenizer")
    torch.manual_seed(SEED)
    unet = networks.build_unet().to(device, memory_format=torch.channels_last)
    text = networks.build_text_encoder(tokenizer).to(device)
    attend_explicitly(unet)
    text.set_attn_implementation("eager")
    both = nn.ModuleDict({"unet": unet, "text": text})
    average = EMA(dict(both.named_parameters()), 0.999)
    schedule = NoiseSchedule.from_alphas_cumprod(networks.build_scheduler().alphas_cumprod).to(device)
    optimizer = torch.optim.AdamW(both.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01)

    def loss(step: int, draw: torch.Generator) -> Tensor:
        index = torch.randint(len(latents), (batch,), generator=draw)
        rows = labels[index].tolist()
        empty = torch.rand(batch, generator=draw) < 0.1
        captions = [
            "" if nothing else _random_caption(row, f"teacher/{step}", i).text
            for i, (row, nothing) in enumerate(zip(rows, empty.tolist(), strict=True))
        ]
        x0 = latents[index].float().to(device)
        noise = torch.randn(x0.shape, generator=draw).to(device)
        t = torch.randint(len(schedule), (batch,), generator=draw).to(device)
        alpha, sigma = schedule.at(t)
        with _bf16(device):
            words = text(_tokens(tokenizer, captions).to(device)).last_hidden_state
            v = unet((alpha * x0 + sigma * noise).to(memory_format=torch.channels_last), t, words).sample
        snr = (alpha / sigma).pow(2)
        error = v.float() - (alpha * noise - sigma * x0)
        return (snr.clamp(max=5) / (snr + 1) * error.pow(2)).mean()

    train("teacher", work, steps, {"net": both}, optimizer, loss, lr=_warm_cosine(lr, steps), average=average)
    with average.inside():
        unet.save_pretrained(work / "unet")
        text.save_pretrained(work / "text_encoder")


@app.command()
def lora(work: Work = WORK, steps: Steps = 350, batch: Batch = 32, lr: float = 2e-3, threads: Threads = 0) -> None:
    """LoRA of the shipped teacher: a style, by the teacher's own loss. It goes into the package at once."""
    from sbrush.training.world.style import train_lora

    _device(threads)

    def stage(net: nn.Module, optimizer: torch.optim.Optimizer, loss: Callable[[int, torch.Generator], Tensor]) -> None:
        train(
            "lora", work, steps, {"net": net}, optimizer, loss, lr=lambda s: lr * min(1, s / 50) * (1 - s / (steps + 1))
        )

    train_lora(stage, batch=batch, lr=lr)


def drawn_images(work: Path, *, held_out: bool = False) -> tuple[Tensor, Tensor]:
    """Training images, uint8 [80000, 3, 64, 64], and their attributes as indices, int64 [80000, 4].

    With `held_out`, for the judge alone, of all combinations of kind and colour.
    """
    name = "judge" if held_out else "train"
    file = work / f"images-{name}.safetensors"
    if not file.exists():
        images, labels = torch.empty(IMAGES, 3, 64, 64, dtype=torch.uint8), torch.empty(IMAGES, 4).long()
        with progress("drawing images", IMAGES, unit="images") as bar:
            for i in range(IMAGES):
                sticker = random_sticker(stream(name, i), held_out=held_out)
                images[i] = _tensor(sticker)
                labels[i] = torch.tensor([v.index(getattr(sticker, name)) for name, v in ATTRIBUTES.items()])
                bar.advance()
        work.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as partial:
            save_file({"images": images, "labels": labels}, partial)
    loaded = load_file(file)
    return loaded["images"], loaded["labels"]


def _latents(work: Path, device: torch.device) -> tuple[Tensor, Tensor]:
    """The training images' latents, scaled to unit deviation, float16 [80000, 4, 16, 16], and their attributes."""
    from diffusers import AutoencoderKL

    images, labels = drawn_images(work)
    file = work / "latents.safetensors"
    if not file.exists():
        net = AutoencoderKL.from_pretrained(work / "vae").to(device, memory_format=torch.channels_last).eval()
        parts = []
        with progress("encoding images", len(images), unit="images") as bar, torch.no_grad(), _bf16(device):
            for some in images.split(250):
                mean = net.encode(_to_network(some, device)).latent_dist.mean.float()
                parts.append((mean * net.config.scaling_factor).half().cpu())
                bar.advance(len(some))
        with atomic_write(file) as partial:
            save_file({"latents": torch.cat(parts).contiguous()}, partial)
    return load_file(file)["latents"], labels


def train(
    name: str,
    work: Path,
    steps: int,
    nets: dict[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    loss_at: Callable[[int, torch.Generator], Tensor],
    *,
    lr: Callable[[int], float],
    average: EMA | None = None,
) -> None:
    """Runs `loss_at` for steps 1 to `steps`, from the newest checkpoint on if there is one."""
    folder, first = work / "checkpoints" / name, 1
    folder.mkdir(parents=True, exist_ok=True)
    if found := checkpoint.newest(folder):
        for part, net in nets.items():
            net.load_state_dict(found.part(part))
        restore(optimizer, found.part("optimizer"))
        if average:
            average.load(found.part("average"))
        first = found.step + 1
    mean = 0.0
    with progress(name, steps, done=first - 1) as bar:
        for step in range(first, steps + 1):
            for group in optimizer.param_groups:
                group["lr"] = lr(step)
            loss = loss_at(step, torch.Generator().manual_seed(SEED * 1_000_003 + step))
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_([p for net in nets.values() for p in net.parameters()], 1.0)
            optimizer.step()
            if average:
                average.update(step)
            mean += (loss.item() - mean) / min(100, step - first + 1)
            bar.advance(note=f"loss {mean:.4f}")
            if step % CHECKPOINT_EVERY == 0 or step == steps:
                parts = {part: net.state_dict() for part, net in nets.items()}
                parts["optimizer"] = state_of(optimizer)
                if average:
                    parts["average"] = average.tensors
                checkpoint.save(folder, step, parts, keep=1)


class _Holder(nn.Module):
    """A single parameter as a module, so that it is saved like the rest."""

    def __init__(self, value: nn.Parameter) -> None:
        super().__init__()
        self.value = value


def _true_pairs(rows: Tensor, captions: list[Caption]) -> Tensor:
    """1 where the caption is true of the image: float [images, captions]."""
    truth = torch.ones(len(rows), len(captions))
    for column, (name, values) in enumerate(ATTRIBUTES.items()):
        wanted = torch.tensor([values.index(v) if (v := getattr(c, name)) else -1 for c in captions])
        truth *= (wanted < 0) | (wanted == rows[:, column : column + 1])
    return truth


def _random_caption(row: list[int], seed: str, index: int) -> Caption:
    full = {name: values[i] for (name, values), i in zip(ATTRIBUTES.items(), row, strict=True)}
    return random_caption(stream(seed, index), Caption(**full))


def _tensor(sticker: Any) -> Tensor:
    from torchvision.transforms.functional import pil_to_tensor

    from sbrush.stickers.draw import draw

    return pil_to_tensor(draw(sticker))


def _tokens(tokenizer: Any, texts: list[str]) -> Tensor:
    return tokenizer(
        texts, padding="max_length", truncation=True, max_length=networks.CONTEXT, return_tensors="pt"
    ).input_ids


def _to_network(images: Tensor, device: torch.device) -> Tensor:
    """uint8 [B, 3, H, W] to float32 in [-1, 1]."""
    return (images.to(device).float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def softened(x: Tensor, draw: torch.Generator) -> Tensor:
    """Images [B, 3, 64, 64], each mixed to its own degree with itself at a lower resolution, 32 to 64 pixels."""
    size = int(torch.randint(x.shape[-1] // 2, x.shape[-1] + 1, (), generator=draw))
    soft = F.interpolate(F.interpolate(x, size, mode="bilinear", antialias=True), x.shape[-1], mode="bicubic")
    return torch.lerp(x, soft, torch.rand(len(x), 1, 1, 1, generator=draw).to(x.device))


def noise_of(x: Tensor, draw: torch.Generator) -> Tensor:
    """Noise for images in [-1, 1], of up to 0.08, each its own degree."""
    degree = 0.08 * torch.rand(len(x), 1, 1, 1, generator=draw)
    return (degree * torch.randn(x.shape, generator=draw)).to(x.device)


def _warm_cosine(peak: float, steps: int, warmup: int = 200) -> Callable[[int], float]:
    from math import cos, pi

    return lambda step: peak * min(1.0, step / warmup) * (0.02 + 0.98 * 0.5 * (1 + cos(pi * min(1.0, step / steps))))


def _device(threads: int) -> torch.device:
    if threads:
        torch.set_num_threads(threads)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _bf16(device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, torch.bfloat16)


if __name__ == "__main__":
    app()
