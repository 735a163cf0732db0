"""Schedulers in, whichever of diffusers': noise schedule and scale of noise. A student's one-step scheduler out."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import torch
from diffusers import DDIMScheduler, SchedulerMixin
from torch import Tensor

from sbrush.console import SbrushError, printable
from sbrush.models.configurations import SCHEDULER, Table, check_scheduler


def read_scheduler(config: dict[str, Any], name: str, table: Table = SCHEDULER) -> DDIMScheduler:
    """DDIM on the noise schedule of a scheduler's configuration, of whatever class: PNDM, Euler, LCM ...

    What a configuration leaves out is its own class's default. SbrushError if that class has no beta_t, as flow
    matching has none, or if `table` does not accept what it says; `name` is the model's.
    """
    kind = scheduler_class(config)
    if kind is None:
        raise SbrushError(
            f"{printable(name)} has the scheduler {printable(config['_class_name'])}",
            "sbrush reads schedulers whose noise schedule is given by betas, such as DDIM, PNDM, Euler or LCM",
        )
    check_scheduler(config, kind, table, f"{printable(name)}/scheduler")
    fields = inspect.signature(DDIMScheduler).parameters
    own = {key: p.default for key, p in inspect.signature(kind).parameters.items() if key in fields}
    ours = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False}
    known = {key: value for key, value in config.items() if key in fields}  # diffusers warns of any other
    return DDIMScheduler.from_config({**own, **known}, **ours)


def noise_scale(config: dict[str, Any]) -> float:
    """What a scheduler multiplies unit noise by before the UNet sees it at T.

    1 for most. Those that count in sigma_t / alpha_t (Euler, Heun, LMS ...) with "trailing" spacing, as SD-Turbo's,
    start from (sigma_T / alpha_T) z, of which the UNet sees sigma_T z: .9977 z for Stable Diffusion's schedule. It
    matters little, (1 - sigma_T) / alpha_T = .034 z in x0, but it is what such a student was trained on.
    """
    kind = scheduler_class(config)
    if kind in (None, DDIMScheduler):
        return 1.0
    own = kind.from_config(config)
    T = torch.tensor(float(own.config.num_train_timesteps - 1))
    return float(own.scale_model_input(torch.ones(()) * own.init_noise_sigma, T))


def one_step_scheduler(teacher: DDIMScheduler, t_init: int | None = None) -> DDIMScheduler:
    """The scheduler with which plain diffusers' single step is core.student_x0: from T straight to alpha = 1.

    With `t_init` the schedule ends there, so that the student's T is `t_init`.
    """
    cut: dict[str, Any] = {}
    if t_init is not None:
        betas = teacher.betas[: t_init + 1].tolist()
        cut = {"num_train_timesteps": len(betas), "trained_betas": betas, "rescale_betas_zero_snr": False}
    return DDIMScheduler.from_config(
        teacher.config,
        timestep_spacing="trailing",
        set_alpha_to_one=True,
        clip_sample=False,
        thresholding=False,
        **cut,
    )


def timesteps_of(scheduler: SchedulerMixin, steps: int) -> Tensor:
    """Where a scheduler takes `steps` steps: its timesteps, descending, int64 [steps].

    diffusers counts "trailing" timesteps down in floats, and for some numbers of steps, such as 61 of 1,000 timesteps,
    comes past the last one: a timestep of -1, of which a network knows nothing.
    """
    scheduler.set_timesteps(steps)
    timesteps: Tensor = scheduler.timesteps
    return timesteps[:steps].long()


def as_ddim(scheduler: SchedulerMixin) -> DDIMScheduler:
    """DDIM on the noise schedule of a student's scheduler: its alphas, and what its UNet predicts."""
    if isinstance(scheduler, DDIMScheduler):
        return scheduler
    fields = inspect.signature(DDIMScheduler).parameters
    own = {key: value for key, value in scheduler.config.items() if key in fields}
    return DDIMScheduler.from_config(own | {"timestep_spacing": "trailing", "set_alpha_to_one": True})


def scheduler_class(config: dict[str, Any]) -> Any:
    """The scheduler's class, None if it is none that has betas."""
    name = str(config.get("_class_name", "DDIMScheduler"))
    kind = getattr(diffusers, name, None) if name.endswith("Scheduler") and name.isidentifier() else None
    if not (isinstance(kind, type) and issubclass(kind, SchedulerMixin)):
        return None
    return kind if "beta_start" in inspect.signature(kind).parameters else None
