"""`sbrush serve` under load, beside the bare networks, in one run.  `make bench-serve`

Clients ask one image after the other, each with prompts and seeds of its own, of a server in its own process. Every
answer is compared with the image that the same student draws directly. Before and after each turn of load the bare
networks draw batches of the server's size: text encoder, UNet and VAE, and nothing else. On a machine that others use
too, the processor's time per image is the fairer comparison: it does not depend on who else wants it.

For a minute:  python -m sbrush.benchmarks.serve --clients 100 --seconds 60
"""

from __future__ import annotations

import asyncio
import io
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
import typer
from PIL import Image

from sbrush.benchmarks import full_size
from sbrush.benchmarks.roofline import seconds as time_of
from sbrush.console import SbrushError, info, out, out_json
from sbrush.core import student_x0
from sbrush.device import pick_device, pick_dtype
from sbrush.noise import image_noise
from sbrush.sampling.generation import Drawer, student_images
from sbrush.sampling.images import to_image
from sbrush.sampling.opening import open_student
from sbrush.stickers.world import random_caption, stream

DIFFERENT = 200  # requests with prompts and seeds of their own; clients take them in turn
TURNS = 3
CLOSE = 3  # of 255: what another batch's rounding changes in a value, at most
WAITED = 300.0  # seconds for an answer, at most


@dataclass
class Load:
    """What clients saw: `answers` has every distinct file that a request was answered with."""

    latencies: list[float] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    answers: dict[int, set[bytes]] = field(default_factory=dict)
    seconds: float = 0.0

    def add(self, other: Load) -> None:
        """Counts another turn in."""
        self.latencies += other.latencies
        self.failed += other.failed
        self.seconds += other.seconds
        for number, files in other.answers.items():
            self.answers.setdefault(number, set()).update(files)


async def ask(address: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
    """Status and body of one request."""
    host, port = address.removeprefix("http://").rstrip("/").rsplit(":", 1)
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        return await _exchange(reader, writer, path, body)
    finally:
        writer.close()


async def put_under_load(address: str, requests: Sequence[tuple[str, int]], clients: int, seconds: float) -> Load:
    """`clients` ask for one image after the other over connections that they keep, until `seconds` are over.

    What is under way then is waited for.
    """
    load = Load()
    start = time.monotonic()
    host, port = address.removeprefix("http://").rstrip("/").rsplit(":", 1)

    async def client(number: int) -> None:
        reader, writer = await asyncio.open_connection(host, int(port))
        while time.monotonic() - start < seconds:
            prompt, seed = requests[number % len(requests)]
            sent = time.monotonic()
            try:
                body = json.dumps({"prompt": prompt, "seed": seed}).encode()
                status, answer = await asyncio.wait_for(_exchange(reader, writer, "api/draw", body), WAITED)
            except (OSError, asyncio.IncompleteReadError, TimeoutError) as problem:
                load.failed.append(type(problem).__name__)
                break
            load.latencies.append(time.monotonic() - sent)
            if status == 200:
                load.answers.setdefault(number % len(requests), set()).add(answer)
            else:
                load.failed.append(str(status))
            number += clients
        writer.close()

    await asyncio.gather(*map(client, range(clients)))
    load.seconds = time.monotonic() - start
    return load


async def _exchange(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, path: str, body: bytes
) -> tuple[int, bytes]:
    kind = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
    head = f"{'POST' if body else 'GET'} /{path} HTTP/1.1\r\nHost: localhost\r\n{kind}\r\n"
    writer.write(head.encode() + body)
    answer = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", answer)
    return int(answer.split()[1]), await reader.readexactly(int(length[1]) if length else 0)


def wrong_answers(load: Load, student: Drawer, requests: Sequence[tuple[str, int]]) -> int:
    """How many distinct files are not the image that the student draws for that request, or say another prompt."""
    wrong = 0
    for number, files in sorted(load.answers.items()):
        prompt, seed = requests[number]
        expected = to_image(next(student_images(student, [prompt], [seed]))[0]).tobytes()
        for file in files:
            with Image.open(io.BytesIO(file)) as image:
                record = json.loads(image.text["sbrush"])  # type: ignore[attr-defined]
                furthest = max(abs(a - b) for a, b in zip(image.tobytes(), expected, strict=True))
            wrong += furthest > CLOSE or (record["prompt"], record["seed"]) != (prompt, seed)
    return wrong


@dataclass
class Bare:
    """What the networks alone took: images, seconds of the clock and of the processor."""

    images: int = 0
    seconds: float = 0.0
    processor: float = 0.0

    def draw(self, student: Drawer, requests: Sequence[tuple[str, int]], batch: int, seconds: float) -> None:
        """Draws batches for about so many seconds."""
        some = [requests[i % len(requests)] for i in range(batch)]
        prompts, z = [prompt for prompt, _ in some], image_noise([seed for _, seed in some], student.latent_shape)
        until, before = time.monotonic() + seconds, time.process_time()
        while time.monotonic() < until:
            self.seconds += time_of(lambda: _networks(student, prompts, z), str(student.device))
            self.images += batch
        self.processor += time.process_time() - before


@torch.inference_mode()
def _networks(student: Drawer, prompts: list[str], z: torch.Tensor) -> torch.Tensor:
    """One step of text encoder, UNet and VAE."""
    conditioning = student.encode(prompts)
    z = student.noise_scale * z.to(student.device)
    t = student.schedule.start(len(z), student.rungs(1)[0])
    output = student.denoise(z, t, conditioning)
    return student.decode(student_x0(output, z, t, student.schedule, student.prediction))


@contextmanager
def server(student: str | None, batch: int, device: str) -> Iterator[str]:
    """The address of `sbrush serve` in a process of its own."""
    command = [sys.executable, "-m", "sbrush", "serve", "--port", "0", "--batch", str(batch), "--device", device]
    command += ["--student", student] if student else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None
        if not (address := running.stdout.readline().strip()):
            raise SbrushError("sbrush serve did not start", "its own lines above say why")
        try:
            yield address
        finally:
            running.terminate()


def read_counters(address: str) -> dict[str, float]:
    """The server's counters that have no labels."""
    _, text = asyncio.run(ask(address, "metrics"))
    return {name: float(value) for name, value in re.findall(r"^(\w+) (\S+)$", text.decode(), re.M)}


def main(
    student: Annotated[str | None, typer.Option(help="A student's folder; by default the shipped one.")] = None,
    size: Annotated[full_size.Size | None, typer.Option(help="Random weights of this size, in its place.")] = None,
    clients: Annotated[int, typer.Option(help="Clients at once.", min=1)] = 100,
    seconds: Annotated[float, typer.Option(help="Of load, in all turns together.", min=0.1)] = 60,
    batch: Annotated[int, typer.Option(help="Images drawn at once.", min=1)] = 16,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda.")] = "auto",
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Requests lost and wrong, latency, images/s beside the bare networks, and memory."""
    where = pick_device(device)
    requests = [(random_caption(stream("serve", i)).text, i) for i in range(DIFFERENT)]
    load, bare, memory = Load(), Bare(), list[float]()
    with full_size.or_made(student, size) as source, server(source, batch, where) as address:
        model = open_student(source, runtime="torch", device=where, dtype=pick_dtype("auto", where, "sample"))
        bare_seconds = max(1.0, seconds / TURNS / 4)
        Bare().draw(model, requests, batch, bare_seconds)  # warms up
        asyncio.run(put_under_load(address, requests, clients, 2.0))
        first = read_counters(address)
        memory.append(first["process_resident_memory_bytes"])
        for turn in range(TURNS):
            bare.draw(model, requests, batch, bare_seconds)
            load.add(asyncio.run(put_under_load(address, requests, clients, seconds / TURNS)))
            bare.draw(model, requests, batch, bare_seconds)
            last = read_counters(address)
            memory.append(last["process_resident_memory_bytes"])
            info(f"turn {turn + 1} of {TURNS}: {len(load.latencies)} answers, {memory[-1] / 2**20:.0f} MiB")
        wrong = wrong_answers(load, model, requests)
    change = {name: last[name] - first[name] for name in last}
    result = _result(load, bare, change, memory)
    result |= {"student": size or model.name, "device": where, "clients": clients, "batch": batch, "wrong": wrong}
    if json_:
        out_json(result)
        return
    for name, value in result.items():
        out(f"{name:36} {value:.4g}" if isinstance(value, float) else f"{name:36} {value}")


def _result(load: Load, bare: Bare, change: dict[str, float], memory: list[float]) -> dict[str, Any]:
    ordered = sorted(load.latencies)
    images = change["sbrush_images_total"]
    rate, bare_rate = len(load.latencies) / load.seconds, bare.images / bare.seconds
    processor = change["process_cpu_seconds_total"] / images
    return {
        "answers": len(ordered), "lost": len(load.failed), "median_latency_s": statistics.median(ordered),
        "p99_latency_s": ordered[int(0.99 * len(ordered))], "images_per_second": rate,
        "bare_images_per_second": bare_rate, "share_of_bare": rate / bare_rate,
        "images_a_batch": images / change["sbrush_batch_seconds_count"],
        "processor_ms_an_image": 1000 * processor, "bare_processor_ms_an_image": 1000 * bare.processor / bare.images,
        "memory_mib": [round(m / 2**20) for m in memory],
    }  # fmt: skip


if __name__ == "__main__":
    typer.run(main)
