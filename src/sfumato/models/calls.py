"""What a call of the U-Net is about: its sample, its timestep, and which step of the picture that is.

What is known, anywhere below it, of the call of `sfumato.draw` that is under way in this thread or task.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from sfumato.errors import ConfigError


def sample_of(args: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The noisy latents of a call of the U-Net with these arguments, (rows, channels, height/f, width/f)."""
    return options["sample"] if "sample" in options else args[0]


def is_inpainting(unet: Any, vae: Any) -> bool:
    """Whether it is an inpainting model's: one that takes a mask and latents of the rest beside noised latents."""
    return bool(getattr(unet.config, "in_channels", None) == 2 * vae.config.latent_channels + 1)


def timestep_of(args: Sequence[Any], options: Mapping[str, Any]) -> float:
    """The timestep of a call of the U-Net with these arguments."""
    import torch

    return float(torch.as_tensor(options["timestep"] if "timestep" in options else args[1]).flatten()[0])


class StepClock:
    """Number of a step, counted from 0, from the timestep that the U-Net is asked for.

    Timesteps fall; one that rises begins a new picture, and so does a new schedule: each call of a pipeline sets one,
    also after a call that was stopped. Second-order schedulers ask twice a step, an ancestral one for
    timesteps that rise in mid-picture, and some, with Karras' sigmas, for one timestep in two steps: these count their
    calls themselves.
    """

    def __init__(self) -> None:
        self._last, self._step = -math.inf, 0
        self._schedule: Any = ""  # no scheduler's
        self._counts_itself = False

    def step(self, timestep: Any, scheduler: Any) -> int:
        """Raises ConfigError for PNDM with Runge-Kutta steps, which asks for some timesteps of the next step."""
        if not scheduler.config.get("skip_prk_steps", True):
            raise ConfigError(
                "PNDM's Runge-Kutta steps ask four times each, so that they cannot be told apart. Set skip_prk_steps "
                "in the scheduler's config, as Stable Diffusion has it, or take another scheduler."
            )
        schedule = getattr(scheduler, "timesteps", None)
        if schedule is not self._schedule:
            self._counts_itself = scheduler.order > 1 or _is_repeated(schedule, scheduler)
        if self._counts_itself:
            self._schedule = schedule
            first = scheduler.begin_index or 0
            return int(((scheduler.step_index or first) - first) // scheduler.order)
        if timestep > self._last or schedule is not self._schedule:
            self._step = 0
        elif timestep < self._last:
            self._step += 1
        self._last, self._schedule = timestep, schedule
        return self._step


def _is_repeated(schedule: Any, scheduler: Any) -> bool:
    """Whether a timestep of the schedule is that of two steps, and the scheduler knows which of them it is at."""
    return hasattr(scheduler, "step_index") and schedule is not None and len(set(schedule.tolist())) < len(schedule)


CURRENT_IMAGES: ContextVar[tuple[Sequence[int], int] | None] = ContextVar("PICTURES", default=None)
"""The places in the call of the pictures that are encoded or drawn at once, and how many the call has; what each
picture has for itself asks for it."""
CURRENT_STEPS: ContextVar[int | None] = ContextVar("STEPS", default=None)
"""How many steps of each picture `sfumato.draw` is drawing, by which words that change are counted."""


@contextmanager
def drawing_images(places: Sequence[int], count: int) -> Iterator[None]:
    """Within the block the pictures of these places, of so many in the call, are encoded or drawn."""
    before = CURRENT_IMAGES.set((places, count))
    try:
        yield
    finally:
        CURRENT_IMAGES.reset(before)


@contextmanager
def drawing_steps(steps: int) -> Iterator[None]:
    """Within the block so many steps of each picture are drawn."""
    before = CURRENT_STEPS.set(steps)
    try:
        yield
    finally:
        CURRENT_STEPS.reset(before)
