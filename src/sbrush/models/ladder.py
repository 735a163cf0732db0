"""The list of timesteps (the ladder) of a few-step student, from the scheduler in its folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers import DDIMScheduler, LCMScheduler, SchedulerMixin

from sbrush.console import SbrushError, count
from sbrush.models.schedule import one_step_scheduler, timesteps_of

LOWEST = 9  # From this timestep on LCMScheduler's boundary scalings are 1 and 0, to 2e-5: its x0 is the network's.
USUAL = 4  # steps of an LCM student of which nothing says how many it should take


@dataclass(frozen=True)
class Sampling:
    """How a student is to be sampled: in `steps` steps.

    `fresh`: whether each step's image is noised anew, with LCMScheduler, or keeps the noise that the student predicts,
    with DDIMScheduler. `grid`: timesteps that LCMScheduler chooses from; None: as many as steps. `guidance`: the scale
    at which a student draws whose UNet takes one as input, as diffusers' guidance_scale; None: it takes none.
    """

    steps: int = 1
    fresh: bool = True
    grid: int | None = None
    guidance: float | None = None

    @property
    def about(self) -> dict[str, Any]:
        """What a student's sbrush.json says of it."""
        return {"steps": self.steps} | ({} if self.guidance is None else {"guidance": self.guidance})

    def scheduler(self, teacher: DDIMScheduler, t_init: int | None = None) -> SchedulerMixin:
        """The scheduler with which plain diffusers takes the student's steps, on a teacher's noise schedule.

        It starts at the highest timestep, or at `t_init`: then the schedule ends there. SbrushError if the schedule
        has no room for so many steps.
        """
        one = one_step_scheduler(teacher, t_init)
        if self.steps == 1 and self.grid is None:
            return one
        timesteps = len(one.alphas_cumprod)
        if (grid := self.grid or self.steps) * (LOWEST + 1) > timesteps:
            raise SbrushError(
                f"a ladder of {count(grid, 'step')} does not fit into the schedule's {timesteps} timesteps",
                f"take at most {timesteps // (LOWEST + 1)}",
                code=2,
            )
        if not self.fresh:
            one.set_timesteps(self.steps)
            if (taken := len(one.timesteps)) != self.steps:
                raise SbrushError(
                    f"diffusers' DDIM would take {count(taken, 'step')} in place of {self.steps}, the last one wrong",
                    f"take {self.steps - 1} or {self.steps + 1}",
                    code=2,
                )
            return one
        return LCMScheduler.from_config(one.config, original_inference_steps=grid)


@dataclass(frozen=True)
class Ladder:
    """The timesteps of a student that may take several steps. `trained`: how many steps it was trained for."""

    scheduler: SchedulerMixin
    trained: int

    @classmethod
    def read(cls, scheduler: SchedulerMixin, steps: int | None) -> Ladder | None:
        """The ladder of a student's own scheduler; None: it takes one step. `steps`: what its sbrush.json says."""
        if isinstance(scheduler, LCMScheduler):
            most: int = scheduler.config.original_inference_steps
            return cls(scheduler, min(steps or USUAL, most))
        return cls(scheduler, steps) if isinstance(scheduler, DDIMScheduler) and steps and steps > 1 else None

    @property
    def fresh(self) -> bool:
        """Whether each step takes fresh noise, see Sampling."""
        return isinstance(self.scheduler, LCMScheduler)

    @property
    def choices(self) -> tuple[int, ...]:
        """The numbers of steps that the student can take."""
        most = self.scheduler.config.original_inference_steps if self.fresh else self.trained
        return tuple(range(1, most + 1)) if self.fresh else (most,)

    def rungs(self, steps: int | None = None) -> tuple[int, ...]:
        """The timesteps of `steps` steps from the start on; None: as many as the student was trained for.

        SbrushError if it cannot take so many.
        """
        steps = steps or self.trained
        if steps not in self.choices:
            able = f"1 to {self.choices[-1]}" if self.fresh else str(self.trained)
            raise SbrushError(
                f"this student does not take {count(steps, 'step')}",
                f"--steps {able}; it was trained for {self.trained}",
                code=2,
            )
        return tuple(timesteps_of(self.scheduler, steps).tolist())
