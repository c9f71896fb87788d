"""What preferences teach: to find a preferred image likelier, and a rejected one of the same prompt less likely, than
the model did before.

Wallace et al. 2023, "Diffusion Model Alignment Using Direct Preference Optimization" (arXiv 2311.12908).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from sfumato.runs.processes import MicroBatch, MicroBatches
from sfumato.runs.reporting.samples import eval_mode
from sfumato.training.loss.objective import LossSettings, NoisedBatch, NoiseSettings, draw_noised, per_sample_losses
from sfumato.training.loss.validation import Metrics, unrelated_to
from sfumato.utils import randomness

if TYPE_CHECKING:
    from sfumato.adapters import Attached
    from sfumato.data import Dataset
    from sfumato.models import Base

_MEASURED = 32
"""Pairs of the fit, or a few more so that batches are full."""


def preference_margin(preferred: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """(pairs,): by how much the implicit reward of the preferred image is above that of the rejected one.

    -beta/2 ((m_w - r_w) - (m_l - r_l)), what eq. 14 of Wallace et al. 2023 takes the sigmoid of, with the mean over an
    image's numbers in the place of their sum, as their code has it.
    preferred, rejected: (pairs,), m_w - r_w and m_l - r_l: the errors less those of the model before the training.
    """
    return -0.5 * beta * (preferred - rejected)


def preference_loss(margin: Tensor) -> Tensor:
    """(pairs,): eq. 14 of Wallace et al. 2023; log 2 where nothing has been learned."""
    return -F.logsigmoid(margin)


class ReferenceAdapter:
    """The adapter as it was when the training began: what the rewards are measured against.

    Nothing in it asks for gradients, so that it needs no `no_grad`: with that, a CPU computes attention in bf16
    otherwise than for the adapter that learns, and an adapter of nothing had margins.

    from_nothing: whether it changed nothing then, and no copy of it is needed.
    """

    def __init__(self, adapter: Attached, *, from_nothing: bool):
        self._adapter = adapter
        self._values = [] if from_nothing else [p.detach().clone() for p in adapter.parameters()]

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within the block the model predicts as before the training, without dropout."""
        if not self._values:
            with self._adapter.disabled():
                yield
            return
        parameters = list(self._adapter.parameters())
        now = [(p.data, p.requires_grad) for p in parameters]
        try:
            for parameter, value in zip(parameters, self._values, strict=True):
                parameter.data = value
                parameter.requires_grad_(False)
            with eval_mode([self._adapter]):
                yield
        finally:
            for parameter, (value, learns) in zip(parameters, now, strict=True):
                parameter.data = value
                parameter.requires_grad_(learns)


@dataclass(frozen=True)
class RewardedPairs:
    """What a batch of pairs gives, each (pairs,).

    loss: of eq. 14. margin: as of `preference_margin`. preferred, rejected: errors now, with their gradients;
    preferred_before, rejected_before: the same before the training.
    """

    loss: Tensor
    margin: Tensor
    preferred: Tensor
    rejected: Tensor
    preferred_before: Tensor
    rejected_before: Tensor

    @torch.no_grad()
    def sums(self) -> Tensor:
        """(6,): what `figures_of` tells figures from, which may be added over batches and processes."""
        right = (self.margin > 0).float() + 0.5 * (self.margin == 0).float()
        errors = (self.preferred, self.preferred_before, self.rejected, self.rejected_before)
        return torch.stack([each.detach().float().sum() for each in (right, self.margin, *errors)])


def reward_figures(sums: Tensor, pairs: int) -> dict[str, Tensor]:
    """accuracy: the share of pairs whose preferred image has the larger reward. margin: the mean of the margins.
    preferred, rejected: the images' errors as a share of those before the training."""
    right, margin, preferred, preferred_before, rejected, rejected_before = sums
    return {
        "accuracy": right / pairs,
        "margin": margin / pairs,
        "preferred": preferred / preferred_before,
        "rejected": rejected / rejected_before,
    }


class Preferences:
    """Pairs with all that their loss depends on.

    preferred, rejected: data sets of partners, in one order and of like sizes. before: a context in which the model
    predicts as before the training. settings: how errors are weighted by timesteps.
    """

    def __init__(
        self,
        base: Base,
        preferred: Dataset,
        rejected: Dataset,
        beta: float,
        *,
        before: Callable[[], AbstractContextManager[object]],
        noising: NoiseSettings | None = None,
        settings: LossSettings | None = None,
    ):
        self._base, self._sets, self._beta = base, (preferred, rejected), beta
        self._before, self._noising, self._settings = before, noising, settings

    def draw(self, seed: int, micro: MicroBatch) -> list[NoisedBatch]:
        """Both images of the same pairs: noise, timesteps and captions are the same."""
        return [draw_noised(self._base, data, seed, micro, noising=self._noising) for data in self._sets]

    def rewarded(self, pair: list[NoisedBatch], *further: NoisedBatch) -> tuple[RewardedPairs, Tensor]:
        """What these pairs give, with gradients, and each sample's error of what joins them."""
        with self._before():
            before = per_sample_losses(self._base, pair, encode=False, settings=self._settings)
        errors = per_sample_losses(self._base, [*pair, *further], encode=False, settings=self._settings)
        count = len(before) // 2
        grown = errors[: 2 * count] - before
        margin = preference_margin(grown[:count], grown[count:], self._beta)
        halves = (*torch.split(errors[: 2 * count], count), *torch.split(before, count))
        return RewardedPairs(preference_loss(margin), margin, *halves), errors[2 * count :]


class PreferenceMetrics(Metrics):
    """Figures of a training on preferences. Fit: the loss on fixed samples as a share of that of a model that has
    learned nothing, log 2. Drift: as of all.

    batch: pairs that are predicted at once.
    """

    def __init__(
        self,
        base: Base,
        preferred: Dataset,
        adapter: Attached,
        preferences: Preferences,
        batch: int,
        *,
        before: Callable[[], AbstractContextManager[object]],
        within: Callable[[], AbstractContextManager[object]],
        watches: bool,
    ):
        watched = {"drift": unrelated_to(preferred.captions)} if watches else {}
        super().__init__(base, preferred, watched, pristine=before, within=within, modules=[adapter])
        self._adapter, self._preferences, self._batch = adapter, preferences, batch

    @cached_property
    def _samples(self) -> tuple[MicroBatches, int]:
        firsts = range(0, _MEASURED, self._batch)
        return MicroBatches(len(firsts) * self._batch, tuple(firsts), self._batch), randomness.derive_seed(0, "measure")

    @torch.no_grad()
    def fit(self) -> float:
        """As the adapter is now."""
        batches, seed = self._samples
        with eval_mode([self._adapter]):
            found = [self._preferences.rewarded(self._preferences.draw(seed, micro))[0] for micro in batches.of(0)]
        return float(torch.cat([each.loss for each in found]).mean()) / math.log(2)
