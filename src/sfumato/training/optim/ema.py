"""The running mean (EMA) of trained weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.training.additions.interface import Addition, Training

_MANY = 10**9
PORTION = 2**28
"""Bytes that are brought from a GPU at once to a mean on the CPU."""


class Ema(Addition):
    """m <- d m + (1 - d) w after each step. With a decay of 0 it is the weights themselves and costs nothing.

    d = min(decay, (1 + n) / (10 + n)) after n steps, so that the mean of a young run forgets its untrained start. A
    weight that is not trained at a step, by `requires_grad`, is left out: its mean and its n stay. device: where the
    mean is kept; None: with the weights. The CPU saves a copy of the model on a GPU.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float, device: torch.device | str | None = None):
        self.decay = decay
        self.averaged = list(parameters)
        self.updates = [0] * len(self.averaged)
        self.mean: list[Tensor] = []
        if decay:
            self.mean = [p.detach().to(device or p.device, copy=True) for p in self.averaged]

    @classmethod
    def of(cls, training: Training) -> Ema:
        config = training.config
        return cls(training.parameters(), config.ema, device="cpu" if getattr(config, "ema_on_cpu", False) else None)

    def kept(self) -> Mapping[str, Any]:
        return {"average": self}

    def after_step(self) -> None:
        self.update()

    def finish(self) -> None:
        self.swap()

    def update(self) -> None:
        """Include the weights of a step in the mean."""
        learning = [place for place in range(len(self.mean)) if self.averaged[place].requires_grad]
        for made in {self.updates[place] for place in learning}:
            places = [place for place in learning if self.updates[place] == made]
            for some in _in_portions(places, [mean.nbytes for mean in self.mean]):
                means = [self.mean[place] for place in some]
                now = [self.averaged[place].detach().to(self.mean[place].device) for place in some]
                torch._foreach_lerp_(means, now, 1 - min(self.decay, (1 + made) / (10 + made)))
        for place in learning:
            self.updates[place] += 1

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Overwrite these weights with their running mean, so that what trains next sees the values that will be
        saved."""
        settled = set(map(id, parameters))
        for parameter, mean in zip(self.averaged, self.mean, strict=bool(self.mean)):
            if id(parameter) in settled:
                parameter.detach().copy_(mean)

    def swap(self) -> None:
        """Exchange the weights and their mean. It needs no GPU memory, because running out of it would leave them half
        done."""
        for parameter, mean in zip(self.averaged, self.mean, strict=bool(self.mean)):
            now = parameter.detach().to("cpu", copy=True)
            parameter.detach().copy_(mean)
            mean.copy_(now)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the weights are the mean."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def state_dict(self) -> dict[str, Any]:
        """The mean and how many steps each part of it has taken in, for a checkpoint."""
        return {"mean": list(self.mean), "updates": list(self.updates)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint's mean."""
        for place, (mean, saved) in enumerate(zip(self.mean, state["mean"], strict=True)):
            if mean.shape != saved.shape == self.averaged[place].shape:  # an OFT's blocks, of the size that they had
                mean = self.mean[place] = mean.new_empty(saved.shape)
            mean.copy_(saved)
        made = state.get("updates", _MANY)  # older checkpoints do not count: they go on at the whole decay
        self.updates = list(made) if isinstance(made, list) else [made] * len(self.averaged)


def _in_portions(places: Sequence[int], sizes: Sequence[int]) -> Iterator[list[int]]:
    """The places, as many at once as hold PORTION bytes: of a mean elsewhere no second whole copy is made."""
    portion: list[int] = []
    held = 0
    for place in places:
        if portion and held + sizes[place] > PORTION:
            yield portion
            portion, held = [], 0
        portion.append(place)
        held += sizes[place]
    if portion:
        yield portion
