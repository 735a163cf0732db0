"""Teachers of Stable Diffusion's full sizes, random weights: the whole road.  python -m pytest -m slow

Every weight is there (866 million in SD 2.1's UNet; of SDXL's, whose transformers are cut to one layer, what 24 GiB
hold); the images are 128 pixels wide, which makes a step take seconds in place of minutes.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import process
from sbrush.benchmarks.full_size import UNETS, make

pytestmark = pytest.mark.slow
FLAGS = ["--recipe", "swiftbrush", "--steps", "2", "--batch", "1", "--checkpointing", "--grid-every", "0",
         "--checkpoint-every", "1", "--set", "ema=0"]  # fmt: skip


@pytest.mark.parametrize("student", ["lora", "full"])
@pytest.mark.parametrize("name", UNETS)
def test_two_steps_killed_resumed_exported_and_drawn_by_plain_diffusers(tmp_path, prompt_file, name, student):
    from diffusers import DiffusionPipeline

    from sbrush.models.load import load_student
    from sbrush.sampling.generation import student_images

    teacher, out = make(name, tmp_path / "teacher", latent=16), tmp_path / "run"
    flags = [*FLAGS, *(["--student-lora", "16"] if student == "lora" else [])]
    command = [prompt_file, "--teacher", teacher, "--out", out, *flags]
    begun = subprocess.Popen([sys.executable, "-m", "sbrush", "distill", *map(str, command)], stderr=subprocess.DEVNULL)
    while begun.poll() is None and not (out / "checkpoints" / "step-000001" / "state.json").exists():
        time.sleep(0.2)
    begun.send_signal(signal.SIGKILL)
    begun.wait()
    assert not (out / "student").exists()
    done = process("distill", *command, timeout=3600)
    assert done.returncode == 0 and "resuming after step 1 of 2" in done.stderr, done.stderr

    weights = "unet/diffusion_pytorch_model.safetensors"
    was, now = load_file(teacher / weights), load_file(out / "student" / weights)
    assert was.keys() == now.keys() and any((was[key].float() - now[key]).abs().max() > 0 for key in now)
    del was, now
    ours = next(student_images(load_student(str(out)), ["a red cat"], [5]))[0].float()
    pipe = DiffusionPipeline.from_pretrained(out / "student")
    pipe.set_progress_bar_config(disable=True)
    options = {"num_inference_steps": 1, "guidance_scale": 1, "output_type": "np"}
    theirs = pipe("a red cat", generator=torch.Generator().manual_seed(5), **options).images[0]
    assert (torch.from_numpy(theirs * 255).round().permute(2, 0, 1) - ours).abs().max() <= 1


def test_the_expected_peak_is_the_measured_one(tmp_path):
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, str(Path(__file__).with_name("peak.py")), "sd21", str(tmp_path / "teacher")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert abs(found["measured"] / found["told"] - 1) < 0.15, found
