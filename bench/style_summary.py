"""Figures over all runs of a bench, with intervals by the paired bootstrap; and bench/style_fidelity.py's goals.

Runs of one style are alike: where styles were learned several times, styles are resampled, and then the runs of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sfumato.utils import randomness

DRAWS = 2000


def interval(value: Callable[[Tensor], Tensor], count: int, groups: Sequence[str] = ()) -> list[float]:
    """95 % interval of a figure over resamples of its `count` things; value: places (count,) -> the figure.

    groups: each thing's, resampled first; unset, the things are independent.
    """
    generator = randomness.generator(0, "bootstrap")
    members = [torch.tensor([i for i, own in enumerate(groups) if own == one]) for one in dict.fromkeys(groups)]

    def places() -> Tensor:
        if not members:
            return _again(torch.arange(count), generator)
        chosen = _again(torch.arange(len(members)), generator)
        return torch.cat([_again(members[group], generator) for group in chosen])

    drawn = torch.stack([value(places()) for _ in range(DRAWS)])
    low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
    return [round(low, 4), round(high, 4)]


def _again(things: Tensor, generator: torch.Generator) -> Tensor:
    """As many of the things (n,), drawn with replacement."""
    return things[torch.randint(len(things), (len(things),), generator=generator)]


def paired(before: Tensor, after: Tensor, groups: Sequence[str] = ()) -> dict[str, Any]:
    """The means before and after, and 95 % intervals of the mean after and of the change, drawn with the same things.

    before, after: (things,), or (things, pictures of each): pictures of one thing are alike, so things are resampled.
    groups: as in `interval`.
    """
    return {
        "before": round(float(before.mean()), 4),
        "after": round(float(after.mean()), 4),
        "after_95": interval(lambda i: after[i].mean(), len(after), groups),
        "change_95": interval(lambda i: (after[i] - before[i]).mean(), len(after), groups),
    }


def summary(scores: Sequence[dict[str, Tensor]], styles: Sequence[str]) -> dict[str, Any]:
    """Over all pictures of all runs. scores: for each run, outcome of each picture before and after, (n,) of 0 and 1,
    of the true pictures and their reconstructions, too, and "closed", the share of the distance that is closed, (1,).
    styles: each run's.

    Styles and their runs are resampled: pictures of one adapter are alike, and styles differ far more than what is
    drawn in one.
    """
    by_run = {name: torch.stack([score[name] for score in scores]) for name in scores[0]}
    found: dict[str, Any] = {"pictures": by_run["style_after"].numel(), "runs": len(scores)}
    found |= {name: round(float(by_run[name].mean()), 4) for name in ("style_of_real", "style_of_reconstruction")}
    for kind in ("style", "top5"):
        found[kind] = paired(by_run[f"{kind}_before"], by_run[f"{kind}_after"], styles)
    closed = by_run["closed"]
    found["distance_closed"] = {
        "mean": round(float(closed.mean()), 3),
        "mean_95": interval(lambda i: closed[i].mean(), len(closed), styles),
    }
    found["goals"] = {
        "style at least 0.90": bool(found["style"]["after"] >= 0.9),
        "concept top-5 at most 0.10 under the base": bool(found["top5"]["before"] - found["top5"]["after"] <= 0.1),
        "half the distance closed": bool(found["distance_closed"]["mean"] >= 0.5),
    }
    return found


def mix_summary(runs: Sequence[Sequence[dict[str, float]]], styles: Sequence[str]) -> dict[str, Any]:
    """Means over the mixes of all runs, and what a mix keeps of each solo score, with 95 % intervals over the runs.

    runs: for each training of a style, the scores of its mixes, of as many subjects in each. styles: each run's.
    """
    scores = {name: torch.tensor([[mix[name] for mix in run] for run in runs]) for name in runs[0][0]}
    found: dict[str, Any] = {name: round(float(values.mean()), 4) for name, values in scores.items()}
    for what in ("style", "subject"):
        alone, mixed = scores[f"{what}_alone"], scores[f"{what}_mixed"]

        def kept(i: Tensor, alone: Tensor = alone, mixed: Tensor = mixed) -> Tensor:
            return mixed[i].mean() / alone[i].mean().clamp(min=1e-9)

        found[f"{what}_kept"] = round(float(kept(torch.arange(len(runs)))), 4)
        found[f"{what}_kept_95"] = interval(kept, len(runs), styles)
    found["goals"] = {f"{what} kept at least 0.90": found[f"{what}_kept"] >= 0.9 for what in ("style", "subject")}
    return found
