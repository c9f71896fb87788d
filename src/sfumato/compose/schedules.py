"""Weights that change over the steps of a picture: ramps, and LoRA-Switch.

    with over_steps(mix, line=Ramp((0, 1), (1, 0)), otter=lambda progress: 0.6):
        pipe("a crab")

Before each call of the U-Net the mix gets the weights of that step. Between two steps whose weights are equal nothing
is done. A step's change is cheapest where the mix is live; a baked one is summed anew, from the base.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from numbers import Real
from threading import get_ident
from typing import TYPE_CHECKING, Any

from sfumato.adapters.weights import (
    Weight,
    check_by_label,
    check_labels,
    check_mix,
    checked_number,
    checked_weight,
    replace_unet_weight,
    unet_weight,
)
from sfumato.compose.hooks import NonCopyableHook, calling_pipeline, serialized_calls, uncompiled_hook
from sfumato.compose.match import denoiser_of
from sfumato.errors import AdapterError
from sfumato.models import calls
from sfumato.utils import schedulers

if TYPE_CHECKING:
    from sfumato.compose.mix import Mix

Progress = Callable[[float], float]
"""From progress, 0 at pure noise and 1 at the finished picture, to a weight of the U-Net."""


@dataclass(frozen=True)
class Ramp:
    """A weight by points (progress, weight), straight between them and level beyond the first and the last."""

    points: tuple[tuple[float, float], ...]

    def __init__(self, *points: tuple[float, float]) -> None:
        if not points or not all(is_pair(point) and 0 <= point[0] <= 1 for point in points):
            raise AdapterError(f"a ramp is points (progress, weight) with progress in 0 to 1, got {points!r:.60}.")
        # By progress; two points of one progress are a jump, in the order in which they were given.
        weights = [checked_weight("a ramp", weight) for _, weight in points]
        ordered = sorted(zip((float(at) for at, _ in points), weights, strict=True), key=lambda point: point[0])
        object.__setattr__(self, "points", tuple(ordered))

    @classmethod
    def parse(cls, text: str) -> Ramp:
        """`0:1,0.5:0.2,1:0`: progress and weight of each point."""
        try:
            points = [tuple(float(number) for number in point.split(":")) for point in text.split(",")]
        except ValueError:
            points = []
        if not points or any(len(point) != 2 for point in points):
            raise AdapterError(f"ramp {text!r:.60}: wanted PROGRESS:WEIGHT,... such as 0:1,1:0.")
        return cls(*((point[0], point[1]) for point in points))

    @classmethod
    def within(cls, start: float, end: float, weight: float) -> Ramp:
        """The weight after progress `start` (from the first step on, if that is 0) and up to `end`, 0 elsewhere."""
        if not 0 <= start < end <= 1:
            raise AdapterError(f"steps from {start:g} to {end:g}: wanted progress from 0 to 1, such as (0, 0.5).")
        before = [(start, 0.0)] if start > 0 else []
        return cls(*before, (start, weight), (end, weight), (end, 0.0))

    def __call__(self, progress: float) -> float:
        (before, low), *later = self.points
        if progress <= before:
            return low
        for after, high in later:
            if progress <= after:
                share = (progress - before) / (after - before) if after > before else 1.0
                return low + share * (high - low)
            before, low = after, high
        return low


@dataclass(frozen=True)
class Switch:
    """LoRA-Switch (Zhong et al. 2024, arXiv 2402.16843): one adapter at a time, in turn, each for `every` steps.

    labels: the adapters in their order; each has its weight in the mix while it is on, and 0 otherwise.
    """

    labels: tuple[str, ...]
    every: int = 5

    def __post_init__(self) -> None:
        if isinstance(self.labels, str) or not all(isinstance(label, str) for label in self.labels):
            raise AdapterError(f"a switch wants its labels as ('line', 'otter'), got {self.labels!r:.60}.")
        if not self.labels or not isinstance(self.every, int) or self.every < 1:
            raise AdapterError("a switch wants at least one label, and each for at least one step, a whole number.")

    def on(self, step: int) -> str:
        """The label whose turn it is at `step`, counted from 0."""
        return self.labels[step // self.every % len(self.labels)]


@contextmanager
def over_steps(mix: Mix, switch: Switch | None = None, /, **weights: Progress) -> Iterator[Mix]:
    """Within the block the weights follow the steps of each picture; afterwards they are what they were.

    weights: by label, a Ramp or any function of the progress. The text is encoded before the first step, so that the
    text encoders' weights stay the mix's; a weight by blocks keeps its factors. An adapter that the mix loses within
    the block is no longer followed. Raises AdapterError for a label that the mix does not have; AdapterError or
    ConfigError while drawing, for a scheduler whose steps cannot be followed.
    """
    check_mix(mix, "over_steps")
    if not weights and switch is None:
        raise AdapterError("over_steps has nothing to follow; give ways by label, such as line=Ramp((0, 1), (1, 0)).")
    with follow_steps(mix, weights, switch):
        yield mix


@contextmanager
def over_asked_steps(mix: Mix) -> Iterator[None]:
    """Within the block adapters whose files ask for some steps have their weights at these alone.

    Raises AdapterError for what is no mix, or was undone; else as `over_steps`.
    """
    check_mix(mix, "over_asked_steps")
    ways = {label: Ramp.within(*span, unet_weight(mix.weights[label])) for label, span in mix.spans.items()}
    with follow_steps(mix, ways) if ways else nullcontext():
        yield


@contextmanager
def follow_steps(mix: Mix, weights: Mapping[str, Progress], switch: Switch | None = None) -> Iterator[None]:
    """As `over_steps`, for labels that are no Python names."""
    check_mix(mix, "over_steps")
    if not isinstance(switch, Switch | None):
        raise AdapterError(
            f"{switch!r:.40} over the steps: wanted ways by label, such as line=Ramp((0, 1), (1, 0)), or a Switch."
        )
    check_by_label(weights, mix.weights)
    check_labels(switch.labels if switch else (), mix.weights)
    for label, way in weights.items():
        if not callable(way):
            raise AdapterError(
                f"{label}: {way!r:.40} is no way over the steps; give a Ramp((0, 1), (1, 0)), or a function of the "
                "progress. One weight for all steps is mix.set's."
            )
    before, pipe = dict(mix.weights), mix.pipe
    clocks: defaultdict[int, calls.StepClock] = defaultdict(calls.StepClock)  # by thread, each of which draws its own

    def follow(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        now = calls.timestep_of(args, options)
        called = calling_pipeline(pipe)
        drawn_by = called.scheduler
        progress = progress_of(now, drawn_by)
        wanted = {label: _at(before[label], function(progress)) for label, function in weights.items()}
        if switch is not None:
            if hasattr(called, "encode_text"):
                raise AdapterError(
                    "turns are counted by the scheduler that draws, which a Base does not know of a loop of one's own. "
                    "Draw with sfumato.draw or a pipeline, or give a pipeline with the loop's scheduler to compose."
                )
            on = switch.on(clocks[get_ident()].step(now, drawn_by))
            wanted |= {label: before[label] if label == on else _at(before[label], 0.0) for label in switch.labels}
        _set(mix, wanted)

    # A LoRA that diffusers loaded beside the mix is a layer around those that the mix changes.
    unet = denoiser_of(pipe)
    with serialized_calls(pipe):
        try:
            with unet.register_forward_pre_hook(NonCopyableHook(uncompiled_hook(pipe, follow)), with_kwargs=True):
                yield
        finally:
            _set(mix, before)


def is_pair(value: Any) -> bool:
    """Whether it is two numbers."""
    return isinstance(value, tuple | list) and len(value) == 2 and all(isinstance(each, Real) for each in value)


def progress_of(timestep: float, scheduler: Any) -> float:
    """0 at pure noise and 1 at the finished picture. Raises AdapterError for a scheduler that has no timesteps."""
    if schedulers.is_sigma_conditioned(scheduler.config):
        raise AdapterError(
            f"{type(scheduler).__name__} tells the U-Net sigmas instead of timesteps, which weights by step follow. "
            "Give the adapters one weight each."
        )
    return min(1.0, max(0.0, 1 - timestep / max(1, int(scheduler.config.num_train_timesteps) - 1)))


def _set(mix: Mix, weights: Mapping[str, Weight]) -> None:
    """New weights of the adapters that the mix still holds: within the block some may be removed, or all undone."""
    held = {label: weight for label, weight in weights.items() if label in mix.weights}
    if held:
        mix.set_weights(held)


def _at(weight: Weight, number: float) -> Weight:
    return replace_unet_weight(weight, checked_number("a step's weight", number))
