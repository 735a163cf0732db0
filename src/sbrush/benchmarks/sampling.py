"""The fastest image: how long one takes, warm and cold, beside the least time that it can take.  `make bench-sample`

Warm: images a second of the bare networks (text encoder, UNet, decoder; nothing else), of sbrush and of plain
diffusers, taking turns in one process. Cold: a new process each, from its start to the image on the disk, beside that
of its bare imports. Seconds are the wall's; on a busy machine look at the CPU's.

On a GPU:  python -m sbrush.benchmarks.sampling --size sd21
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import StableDiffusionPipeline
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sbrush.benchmarks import full_size
from sbrush.benchmarks.roofline import matrix_rate, seconds
from sbrush.console import info, out, out_json
from sbrush.device import pick_arithmetic, pick_device
from sbrush.models.load import BUILT_IN, load_student
from sbrush.models.load_vae import with_vae
from sbrush.models.model import Model
from sbrush.models.vae_source import TINY
from sbrush.onnx.decoder import DECODER
from sbrush.onnx.model import OnnxModel, find
from sbrush.sampling.generation import Drawer, student_images

PROMPT = "a small red cat on a mint background"
BATCHES = (1, 8, 32)
DIFFUSERS = """
import sys, torch
from diffusers import DiffusionPipeline, UNet2DConditionModel, DDIMScheduler
base, student, path = sys.argv[1:]
unet = UNet2DConditionModel.from_pretrained(student + "/unet")
pipe = DiffusionPipeline.from_pretrained(
    base, unet=unet, scheduler=DDIMScheduler.from_pretrained(student + "/scheduler"), torch_dtype=torch.float32)
pipe("a cat", num_inference_steps=1, guidance_scale=1, generator=torch.Generator().manual_seed(0)).images[0].save(path)
"""
# By a small process, whose memory is not taken for the child's: a fork starts with the peak of what it is a copy of.
LAUNCHER = """
import json, os, sys, time
start = time.perf_counter()
null = os.open(os.devnull, os.O_WRONLY)
pid = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, null, 1)])
_, status, usage = os.wait4(pid, 0)
took = time.perf_counter() - start
cpu, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024
print(json.dumps({"seconds": took, "cpu_seconds": cpu, "peak_mib": peak}))
sys.exit(os.waitstatus_to_exitcode(status))
"""


@dataclass(frozen=True)
class Process:
    """What a process took, from its start to its end."""

    seconds: float
    cpu_seconds: float
    peak_mib: float


def cold(*arguments: str | Path) -> Process:
    """Runs Python with these arguments. CalledProcessError if that fails."""
    command = [sys.executable, "-S", "-c", LAUNCHER, sys.executable, *map(str, arguments)]
    return Process(**json.loads(subprocess.run(command, check=True, capture_output=True).stdout))


def bare(model: Drawer, batch: int) -> Callable[[], Tensor]:
    """Text encoder, UNet and decoder, one after the other, on tensors that are ready."""
    noise = torch.randn(batch, *model.latent_shape, device=model.device)
    t = model.schedule.start(batch)
    if isinstance(model, OnnxModel):
        ids = model.token_ids([PROMPT] * batch)
        run = model._run  # the networks without what sampling adds to them

        def onnx() -> Tensor:
            tokens = run("text_encoder", input_ids=ids)
            x0 = run("unet", sample=noise, timestep=t[0], encoder_hidden_states=tokens)
            return run(DECODER, latent_sample=x0)

        return onnx
    assert isinstance(model, Model)
    encoded = model.encode([PROMPT] * batch)

    @torch.inference_mode()
    def networks() -> Tensor:
        model.encode([PROMPT] * batch)
        x0 = model.denoise(noise, t, encoded)
        return model.decoding_vae.decode(x0.to(model.decoding_vae.dtype)).sample

    return networks


def decoder(model: Drawer, batch: int) -> Callable[[], Tensor]:
    """The decoder alone, on latents that are ready."""
    latents = torch.randn(batch, *model.latent_shape, device=model.device)
    if isinstance(model, OnnxModel):
        return partial(model._run, DECODER, latent_sample=latents)
    assert isinstance(model, Model)
    vae = model.decoding_vae

    @torch.inference_mode()
    def decoded() -> Tensor:
        return vae.decode(latents.to(vae.dtype)).sample

    return decoded


def warm_ways(models: dict[str, Drawer], batch: int) -> dict[str, Callable[[], Any]]:
    """What takes turns, by name: each draws `batch` images."""
    ways: dict[str, Callable[[], Any]] = {}
    prompts, seeds = [PROMPT] * batch, range(batch)
    for name, model in models.items():
        ways[f"decoder, {name}"] = decoder(model, batch)
        ways[f"bare networks, {name}"] = bare(model, batch)
        ways[f"sbrush, {name}"] = partial(_drawn, model, prompts, seeds, batch)
        if isinstance(model, Model) and model.decoder is None:
            parts = {part: getattr(model, part) for part in ("vae", "text_encoder", "tokenizer", "unet")}
            absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
            pipe = StableDiffusionPipeline(**parts, scheduler=model.sampler, **absent)
            pipe.set_progress_bar_config(disable=True)
            steps = len(model.rungs())
            ways["plain diffusers"] = partial(pipe, prompts, num_inference_steps=steps, guidance_scale=1)
    return ways


def _drawn(model: Drawer, prompts: list[str], seeds: range, batch: int) -> list[Tensor]:
    return list(student_images(model, prompts, seeds, batch=batch))


def flops(model: Model) -> dict[str, float]:
    """FLOPs of an image in the UNet, all its steps, and in the decoder of the model."""
    noise = torch.zeros(1, *model.latent_shape, device=model.device)
    conditioning, t = model.encode([PROMPT]), model.schedule.start(1)
    found = {}
    with torch.no_grad():
        with FlopCounterMode(display=False) as counter:
            model.denoise(noise, t, conditioning)
        found["UNet"] = float(counter.get_total_flops()) * len(model.rungs())
        with FlopCounterMode(display=False) as counter:
            model.decoding_vae.decode(noise.to(model.decoding_vae.dtype))
        found["decoder"] = float(counter.get_total_flops())
    return found


def main(
    student: Annotated[str | None, typer.Option(help="A student's folder; by default the built-in one.")] = None,
    size: Annotated[full_size.Size | None, typer.Option(help="Random weights of this size, in its place.")] = None,
    vae: Annotated[str, typer.Option(help="VAE beside the student's own, as sbrush sample takes it.")] = TINY,
    turns: Annotated[int, typer.Option(help="Of each way; the fastest counts.", min=1)] = 5,
    only_warm: Annotated[bool, typer.Option("--only-warm", help="Start no processes.")] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Seconds and images/s of drawing, side by side."""
    where = pick_device(device)
    arithmetic = pick_arithmetic("auto", where, "sample")
    processes: dict[str, Process] = {}
    with full_size.or_made(student, size) as source:
        model = load_student(source, device=where, dtype=arithmetic.dtype)
        other = str(full_size.make_tiny_vae(Path(source) / "taesd")) if size and source else vae
        if not only_warm:
            processes = _cold_ways(source, other, where, turns)
        tiny = with_vae(model, other)
        onnx = [find(source), find(source, other)] if where == "cpu" else []
    models: dict[str, Drawer] = {"torch": model, f"torch, --vae {vae}": tiny}
    models |= {name: one for name, one in zip(("onnxruntime", f"onnxruntime, --vae {vae}"), onnx, strict=False) if one}
    warm: dict[int, dict[str, float]] = {}
    with arithmetic.context(where):
        for batch in BATCHES:
            ways = warm_ways(models, batch)
            taken: dict[str, list[float]] = {name: [] for name in ways}
            for turn in range(-1, turns):  # the first warms up
                for name, way in ways.items():
                    took = seconds(way, where)
                    if turn >= 0:
                        taken[name].append(took)
            warm[batch] = {name: min(times) for name, times in taken.items()}
        work, rate = flops(model), matrix_rate(where, arithmetic.dtype)
        tiny_work = flops(tiny)["decoder"]
    if json_:
        out_json(
            {
                "student": size or model.name, "device": where, "precision": str(arithmetic),
                "torch": torch.__version__, "seconds_a_batch": warm,
                "cold": {name: asdict(process) for name, process in processes.items()}, "flops": work,
                "vae": {"name": vae, "decoder_flops": tiny_work}, "matrix_flops_per_second": rate,
            }
        )  # fmt: skip
        return
    out(f"{size or model.name} on {where}, {arithmetic}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, count in work.items():
        out(f"{name:28} {count / 1e9:9.2f} GFLOP an image")
    out(f"{f'decoder, --vae {vae}':28} {tiny_work / 1e9:9.2f} GFLOP an image")
    floor = sum(work.values()) / rate
    out(f"{'matrix products':28} {rate / 1e12:9.3f} TFLOP/s: {1000 * floor:.1f} ms an image at least")
    for batch, times in warm.items():
        out(f"\nbatch {batch:<34} {'ms a batch':>12} {'images/s':>10} {'over its bare networks':>24}")
        for name, took in times.items():
            kind = name.partition(", ")[2] or "torch"
            base = times.get(f"bare networks, {kind}", took)
            out(f"{name:40} {1000 * took:12.1f} {batch / took:10.1f} {took / base:24.2f}")
    if processes:
        least = processes["python, import torch"]
        out(f"\n{'cold':42} {'seconds':>8} {'CPU s':>8} {'over import torch':>18} {'peak MiB':>9}")
        for name, process in processes.items():
            ratio = process.cpu_seconds / least.cpu_seconds
            out(f"{name:42} {process.seconds:8.2f} {process.cpu_seconds:8.2f} {ratio:18.2f} {process.peak_mib:9.0f}")


def _cold_ways(source: str | None, vae: str, device: str, turns: int) -> dict[str, Process]:
    """The least CPU time of each way to an image in a process of its own."""
    base, own = (source, source) if source else (str(BUILT_IN / "teacher"), str(BUILT_IN / "student"))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cat.png"
        sample = ("-m", "sbrush", "sample", "a cat", "-o", path, "--device", device)
        named = ("--student", source) if source else ()
        imports = "from diffusers import UNet2DConditionModel, AutoencoderKL; from transformers import CLIPTextModel"
        ways: dict[str, tuple[str | Path, ...]] = {
            "python, import torch": ("-c", "import torch"),
            "python, import of the networks' classes": ("-c", imports),
            "sbrush sample": (*sample, *named),
            f"sbrush sample --vae {Path(vae).name}": (*sample, *named, "--vae", vae),
            "sbrush sample --runtime torch": (*sample, *named, "--runtime", "torch"),
            "plain diffusers": ("-c", DIFFUSERS, base, own, path),
        }
        found: dict[str, Process] = {}
        for turn in range(turns):
            for name, arguments in ways.items():
                path.unlink(missing_ok=True)
                process = cold(*arguments)
                info(f"turn {turn + 1} of {turns}, {name}: {process.seconds:.2f} s, CPU {process.cpu_seconds:.2f} s")
                if name not in found or process.cpu_seconds < found[name].cpu_seconds:
                    found[name] = process
        return found


if __name__ == "__main__":
    typer.run(main)
