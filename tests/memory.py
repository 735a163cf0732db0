"""What `sbrush eval --coco-30k` holds in memory as images grow more.  `make memory`

The whole road, the shipped student's images through Inception of its true size (random weights) and a small CLIP
model, each time in a process of its own; the most that it held, as the system counts it, and how much more an image
cost. 8 KiB an image are its features. With --quick a random projection stands in for Inception: minutes less.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from conftest import build_clip
from sbrush.stickers.world import random_caption, stream
from test_coco import make_coco, make_inception

QUICK = """
import torch
from sbrush.cli.app import main
from sbrush.metrics.inception import Inception

mix = torch.randn(3 * 16 * 16, 2048, generator=torch.Generator().manual_seed(0))
pool = torch.nn.functional.adaptive_avg_pool2d
Inception.features = lambda self, images, resize: pool(images.float() / 128 - 1, 16).flatten(1) @ mix
main()
"""


def peak(command: list[object]) -> float:
    """The most that a command held at a time, in MiB."""
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"it ended with status {status}")
    return usage.ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def main(sizes: list[int], quick: bool) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder, measured = Path(temporary), list[tuple[int, float]]()
        captions, coco = folder / "captions.txt", make_coco(folder / "coco")
        captions.write_text("".join(random_caption(stream("memory", i)).text + "\n" for i in range(max(sizes))))
        (folder / "clip").mkdir()
        networks = "--inception", make_inception(folder / "i.pth"), "--clip-weights", build_clip(folder / "clip")
        for size in sizes:
            start = [sys.executable, *(("-c", QUICK) if quick else ("-m", "sbrush"))]
            command = [*start, "eval", "--coco-30k", "--coco-root", coco, *networks]
            mib = peak(
                [
                    *command, "--captions", captions, "--limit", size, "--work", folder / str(size),
                    "--report", folder / "report.html", "--device", "cpu",
                ]
            )  # fmt: skip
            print(f"{size:6} images {mib:8.0f} MiB at most", flush=True)
            measured.append((size, mib))
    for (few, before), (many, after) in pairwise(measured):
        print(f"from {few} to {many}: {(after - before) * 1024 / (many - few):.1f} KiB more an image")


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("sizes", type=int, nargs="*", default=[300, 3000])
    arguments.add_argument("--quick", action="store_true")
    main(**vars(arguments.parse_args()))
