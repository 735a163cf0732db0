"""One-step students that others made, each in its own scheduler's format, against plain diffusers and by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from torch import Tensor

from sbrush.console import SbrushError
from sbrush.models.ladder import Sampling
from sbrush.models.load import load_student, load_teacher
from sbrush.models.schedule import noise_scale, one_step_scheduler, read_scheduler, timesteps_of
from sbrush.noise import image_noise
from sbrush.sampling.files import SampleRequest, sample_to_files
from sbrush.sampling.generation import ddim, student_latents
from sbrush.sampling.targets import Images, Target

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # within diffusers

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SWIFTBRUSH = diffusers.PNDMScheduler(**SD, skip_prk_steps=True, steps_offset=1)  # the teacher's own, multi-step
TURBO = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="trailing", steps_offset=1)
DMD2 = diffusers.EulerDiscreteScheduler(**SD, timestep_spacing="leading", steps_offset=1)


def foreign(tiny: Path, folder: Path, scheduler: Any) -> Path:
    """The tiny folder with another scheduler in it."""
    shutil.copytree(tiny, folder)
    shutil.rmtree(folder / "scheduler")
    scheduler.save_pretrained(folder / "scheduler")
    index = json.loads((folder / "model_index.json").read_text())
    index["scheduler"] = ["diffusers", type(scheduler).__name__]
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def plain(folder: Path, scheduler: Any = None, **options: Any) -> Tensor:
    """What plain diffusers makes of it in one step: a latent."""
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    if scheduler is not None:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    options = {"num_inference_steps": 1, "guidance_scale": 0, "output_type": "latent"} | options
    return pipe("a red cat", generator=torch.Generator().manual_seed(5), **options).images


def ours(folder: Path, start: int | None = None) -> Tensor:
    (latent,) = student_latents(load_student(str(folder), start_timestep=start), ["a red cat"], [5])
    return latent


@torch.no_grad()
def by_hand(folder: Path, t: int, scale: float) -> Tensor:
    """x0 = (x_t - sigma_t eps(x_t, t, y)) / alpha_t with x_t = scale z, from SD's betas."""
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[t]
    model = load_teacher(str(folder))
    x_t = scale * image_noise([5], model.latent_shape)
    eps = model.unet(x_t, torch.tensor([t]), model.encode(["a red cat"])["tokens"]).sample
    return (x_t - (1 - abar).sqrt().float() * eps) / abar.sqrt().float()


SIGMA_T = 0.99767  # sqrt(1 - .00466)


@pytest.mark.parametrize(
    "scheduler, start, t, scale",
    [(SWIFTBRUSH, None, 999, 1.0), (TURBO, None, 999, SIGMA_T), (DMD2, 399, 399, 1.0), (TURBO, 399, 399, 1.0)],
    ids=["SwiftBrush", "SD-Turbo", "DMD2", "SD-Turbo, earlier"],
)
def test_one_step_by_hand(
    tiny_teacher: Path, tmp_path: Path, scheduler: Any, start: int | None, t: int, scale: float
) -> None:
    folder = foreign(tiny_teacher, tmp_path / "student", scheduler)
    assert torch.allclose(ours(folder, start), by_hand(folder, t, scale), atol=2e-3)
    assert ours(folder, start).std() > 0.5


def test_turbo_is_plain_diffusers_own_pipeline(tiny_teacher: Path, tmp_path: Path) -> None:
    folder = foreign(tiny_teacher, tmp_path / "student", TURBO)
    theirs = plain(folder)
    assert torch.allclose(ours(folder), theirs, atol=1e-3)
    assert (by_hand(folder, 999, 1.0) - theirs).abs().max() > 0.02  # unscaled noise would be another image


def test_an_earlier_start_is_diffusers_recipe_for_dmd2(tiny_teacher: Path, tmp_path: Path) -> None:
    """LCMScheduler with timesteps=[399], as DMD2's model card has it."""
    folder = foreign(tiny_teacher, tmp_path / "student", DMD2)
    theirs = plain(folder, diffusers.LCMScheduler, timesteps=[399])
    assert torch.allclose(ours(folder, 399), theirs, atol=1e-3)
    assert not torch.allclose(ours(folder), theirs, atol=1)


def test_a_start_beyond_the_schedule(tiny_teacher: Path, tmp_path: Path) -> None:
    request = SampleRequest(
        Images(["a"], [1]), Target(tmp_path / "x.png"), student=str(tiny_teacher), start_timestep=1000
    )
    with pytest.raises(SbrushError, match="start-timestep 1000"):
        list(sample_to_files(request))


@pytest.mark.parametrize(
    "name", ["PNDM", "EulerDiscrete", "EulerAncestralDiscrete", "LCM", "DPMSolverMultistep", "TCD"]
)
def test_any_schedulers_betas(name: str) -> None:
    """What a configuration leaves out is that class's own default, which differ."""
    kind = getattr(diffusers, f"{name}Scheduler")
    for config in ({}, {"num_train_timesteps": 500, "prediction_type": "v_prediction", **SD}):
        read = read_scheduler({"_class_name": f"{name}Scheduler", **config}, "it")
        assert torch.equal(read.alphas_cumprod, kind(**config).alphas_cumprod)
        assert read.config.prediction_type == config.get("prediction_type", "epsilon")
        assert type(read) is DDIMScheduler and noise_scale({"_class_name": f"{name}Scheduler"}) == pytest.approx(
            1, abs=1e-6 if "Euler" not in name else 0.01
        )


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "StableDiffusionPipeline", "os", "NoScheduler"])
def test_a_scheduler_without_betas_is_refused(name: str) -> None:
    with pytest.raises(SbrushError, match=name):
        read_scheduler({"_class_name": name}, "it")


@pytest.mark.parametrize("steps", [1, 25, 60, 61, 103, 122, 1000])
def test_so_many_steps_are_so_many_timesteps(steps):
    """diffusers gives 62 for 61: the last is -1, whose noise is taken for that of T."""
    scheduler = one_step_scheduler(DDIMScheduler(**SD))
    timesteps = timesteps_of(scheduler, steps)
    assert len(timesteps) == steps and timesteps[0] == 999 and timesteps[-1] >= 0
    assert (timesteps.diff() < 0).all() or steps == 1
    seen: list[int] = []

    def denoise(x: Tensor, t: Tensor, _: Any) -> Tensor:
        seen.append(int(t[0]))
        return torch.zeros_like(x)

    drawn = ddim(denoise, scheduler, torch.ones(1, 4, 2, 2), {}, {}, steps=steps, guidance=1.0)
    assert seen == timesteps.tolist() and drawn.abs().max() < 16  # 1 / alpha_T is 14.65, and not taken twice


def test_a_student_whose_steps_diffusers_miscounts_is_refused():
    assert Sampling(60, fresh=False).scheduler(DDIMScheduler(**SD))
    with pytest.raises(SbrushError, match="would take 62 steps in place of 61") as problem:
        Sampling(61, fresh=False).scheduler(DDIMScheduler(**SD))
    assert problem.value.code == 2
