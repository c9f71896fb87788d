"""The additions that a training can have, a row for each."""

from __future__ import annotations

from sfumato.training.additions.interface import Addition, Additions, Training
from sfumato.training.additions.max_norm import MaxNorm
from sfumato.training.additions.new_words import NewWords
from sfumato.training.loss.crossed_samples import Crossing
from sfumato.training.loss.prior import PriorPreservation
from sfumato.training.optim.ema import Ema

ADDITIONS: tuple[type[Addition], ...] = (MaxNorm, NewWords, PriorPreservation, Crossing, Ema)
"""In the order of their hooks. A new row comes before Ema, which averages what all others have made of a step."""


def additions_of(training: Training) -> Additions:
    """The additions that the training's options ask for, which are now the training's, too."""
    for kind in ADDITIONS:
        addition = kind.of(training)
        if addition is not None:
            training.added.append(addition)
    return training.added
