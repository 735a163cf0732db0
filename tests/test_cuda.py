"""The training step on a GPU, without one: nothing on the wrong device, nobody who waits (fake_cuda.py)."""

import dataclasses
import gc

import pytest
import torch
from diffusers import UNet2DConditionModel

from fake_cuda import Waits, fake_cuda, without_engine
from sbrush.models.load import load_shapes
from sbrush.models.model import Model
from sbrush.sampling.generation import student_latents
from sbrush.training.cost import Held, kernels
from sbrush.training.health import TeacherReference
from sbrush.training.methods.vsd import VSD
from sbrush.training.recipes import RECIPES
from sbrush.training.request import ExecutionOptions

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
PROMPTS = ["a cat", "a dog", "a red fish", "a blue car"] * 4
PAPER = dataclasses.replace(RECIPES["swiftbrush"], batch=4, lora_rank=4, lora_alpha=4)
FEW = dataclasses.replace(PAPER, guidance=0.5, guidance_to=4.0, student_steps=2, anchor_weight=1.0, tell_rung=True)
SHARED = dataclasses.replace(RECIPES["stickers"], batch=4, lora_rank=4, lora_alpha=4, pairs=2, pair_steps=2)


WAYS = [
    (PAPER, ExecutionOptions()),
    (SHARED, ExecutionOptions(micro_batches=2)),
    (dataclasses.replace(PAPER, student_rank=3), ExecutionOptions(checkpointing=True)),
    (FEW, ExecutionOptions()),
]
QUICK = [("tiny_teacher", way) for way in WAYS[1:]] + [("tiny_xl", way) for way in WAYS[:2]]  # every way, both families
SLOW = [("tiny_teacher", WAYS[0])] + [("tiny_xl", way) for way in WAYS[2:]]


@pytest.mark.parametrize(("family", "way"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)])
def test_a_step_is_on_one_device_and_waits_for_nothing(request, monkeypatch, family, way):
    recipe, execution = way
    # The teacher's many steps read diffusers' timesteps on the CPU, whose values a fake one has not.
    monkeypatch.setattr("sbrush.training.methods.teachers.ddim", lambda denoise, scheduler, z, *_, **__: z.float())
    teacher = load_shapes(str(request.getfixturevalue(family)))
    init = load_shapes(str(request.getfixturevalue(family))) if recipe.anchor_weight else None
    reference = TeacherReference([0.0] * 4, [1.0] * 4, [1.0] * 4, 1.0, 1.0)
    # So are its own scheduler's numbers, when a distiller is made.
    monkeypatch.setattr(VSD, "scheduler", VSD.sampling(recipe).scheduler(teacher.scheduler, recipe.t_init))
    if recipe.student_steps == 2:  # and its ladder's
        monkeypatch.setattr(Model, "rungs", lambda model: (999, 499))
    with fake_cuda() as accelerator:
        for network in (*teacher.networks, *(init.networks if init else ())):
            network.to_empty(device="cpu")
        assert len(teacher.schedule) == 1000 and teacher.schedule.alpha.device.type == "cpu"  # as when a run is planned
        made = without_engine(VSD(teacher, recipe, seed=0, accelerator=accelerator, init=init, execution=execution))
        made.step(1, PROMPTS)
        with Waits() as waits:
            result = made.step(2, PROMPTS)
            result |= reference.compare(result["x0"])
            torch.stack(
                [result[name] for name in ("gap", "score_gap_ratio", "lora_divergence", "latent_drift", "skipped")]
            )
        assert {value.device.type for value in result.values()} == {"cuda"}
        assert waits.found == []


@pytest.mark.parametrize("family", ["tiny_teacher", "tiny_xl"])
def test_images_are_drawn_on_the_device(request, family):
    model = load_shapes(str(request.getfixturevalue(family)))
    with fake_cuda():
        for network in model.networks:
            network.to_empty(device="cuda").to(torch.bfloat16)
        (latents,) = student_latents(model, ["a cat", "a dog"], [1, 2])
        assert latents.shape == (2, 4, 16, 16) and (latents.dtype, latents.device.type) == (torch.float32, "cuda")
        assert model.decode(latents).shape == (2, 3, 32, 32)


def test_what_autocast_holds_is_told(tiny_teacher):
    """cost.py's idea of CUDA's kernels against CUDA's own rules for autocast."""
    config = load_shapes(str(tiny_teacher)).unet.config
    held = {}
    with torch.device("meta"):
        unet = torch.nn.Module.to(UNet2DConditionModel.from_config(config), torch.bfloat16)
        with Held([unet]) as told, kernels(autocast=True):
            output = unet(*inputs(torch.bfloat16)).sample
        gc.collect()
        held["told"] = told.now
        del output
    with fake_cuda():
        with torch.device("cuda"):
            unet = UNet2DConditionModel.from_config(config)
            with Held([unet]) as seen, kernels(autocast=False), torch.autocast("cuda", torch.bfloat16):
                output = unet(*inputs(torch.float32)).sample
        gc.collect()
        copies = sum(2 * p.numel() for p in unet.parameters() if p.dim() > 1)  # of weights, which cost.py adds apart
        held["seen"] = seen.now - copies
        del output
    assert held["told"] == pytest.approx(held["seen"], rel=0.05)


def inputs(dtype):
    return (
        torch.zeros(4, 4, 16, 16, dtype=dtype),
        torch.zeros(4, dtype=torch.int64),
        torch.zeros(4, 77, 16, dtype=dtype),
    )
