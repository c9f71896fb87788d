"""Samples that show the base's own drawing of a picture and ask for the picture.

Where an adapter draws what it was not shown, its first steps are nearly the base's, and later ones see a drawing that
is half the base's and half of the style; in pictures that are noised there is nothing of that. So the base draws each
picture over, from the picture itself under much noise (SDEdit, Meng et al. 2022), and in a share of the samples what is
noised lies somewhere between the two, while the picture stays what is asked for.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.adapters.embeddings import embedding
from sfumato.generation.draw import LATENTS_AT_ONCE
from sfumato.models import diffusion
from sfumato.runs.processes import MicroBatch
from sfumato.runs.progress import progress_bar
from sfumato.training.additions.interface import Addition, Training
from sfumato.utils import randomness

if TYPE_CHECKING:
    from sfumato.data import Batch, Dataset
    from sfumato.data.preparation.dataset import View
    from sfumato.models import Base, TextEmbedding
    from sfumato.training.loss.objective import NoisedBatch

START_SHARES = (0.6, 0.75, 0.9)
"""Shares of the timesteps at which the base takes up a picture; each of its views has one of them."""
DDIM_STEPS = 8
FIRST_SHARE = 0.3
"""Share of the timesteps from which on samples are crossed: with less noise the difference would be all there is."""


def first_timestep(base: Base) -> int:
    """The base's timestep from which on samples are crossed."""
    return round(FIRST_SHARE * len(base.alpha_bar))


@dataclass(frozen=True)
class CrossingPlan:
    """The steps that a run takes. batch: the global one. timesteps: those of the base that are drawn."""

    steps: int
    batch: int
    timesteps: range


class Crossing(Addition):
    """The base's drawing of the views of the pictures that a run crosses, and the samples that show it.

    The base is to be as it was before the training while this is made. share: of the samples from FIRST_SHARE on that
    are crossed, 0 to 1. course: None draws all views. All is a function of seed, step and place in the global batch.
    Raises DataError for crops at random places.
    """

    def __init__(
        self, base: Base, data: Dataset, seed: int, share: float, course: CrossingPlan | None = None, *, shown: bool
    ):
        self._base, self._seed, self._share = base, seed, share
        self._first = first_timestep(base)
        wanted = None if course is None else self._crossed(data, course)
        batches = list(data.views(LATENTS_AT_ONCE // 2 * base.vae_factor**2, wanted))  # two rows each, for guidance
        told = [list(dict.fromkeys(each.captions)) for each in batches]
        with (
            torch.no_grad(),
            base.lazy_weights.restored_after(),
        ):  # once for all: what rests is read from its file again
            texts = [embedding.encode(base, each).to("cpu") for each in told]  # there may be thousands
            self._untold = base.unconditional(1)
        self._drawn: dict[View, Tensor] = {}
        batches_shown = progress_bar(batches, "drawing over", unit="batch", shown=shown)
        for batch, captions, text in zip(batches_shown, told, texts, strict=True):
            own = text[[captions.index(each) for each in batch.captions]]
            for index, variant, latents in zip(batch.indices, batch.variants, self._draw(batch, own), strict=True):
                self._drawn[index, variant] = latents.cpu()  # there may be thousands

    @classmethod
    def of(cls, training: Training) -> Crossing | None:
        config, base = training.config, training.base
        share = getattr(config, "crossed_share", 0.0)
        if not share:
            return None
        course = CrossingPlan(config.steps, training.batches.global_batch, config.noising(base).timesteps)
        with training.trained.disabled():
            return cls(base, training.dataset, config.seed, share, course, shown=training.processes.is_main)

    def change(self, noised: NoisedBatch, micro: MicroBatch) -> NoisedBatch:
        return self.cross(noised, micro)

    def _crossed(self, data: Dataset, course: CrossingPlan) -> set[View]:
        """The views that the run crosses, from its first step on, however far it has come: of thousands of pictures a
        run may see a few."""
        found: set[View] = set()
        for step in range(course.steps):
            if len(found) == data.view_count:
                break
            timesteps = diffusion.stratified_timesteps(course.batch, course.timesteps, self._seed, step).tolist()
            views = data.drawn_views(self._seed, step, course.batch)
            found |= {view for place, view in enumerate(views) if self._is_crossed(timesteps[place], step, place)}
        return found

    def _is_crossed(self, timestep: int, step: int, place: int) -> bool:
        return timestep >= self._first and randomness.uniform(self._seed, "crossed", step, place) < self._share

    @torch.no_grad()
    def _draw(self, batch: Batch, text: TextEmbedding) -> Tensor:
        """What the base makes of a batch, whose captions' embeddings these are: deterministic DDIM (Song et al. 2021,
        eq. 12) under its usual guidance."""
        base = self._base
        texts = text.to(batch.latents.device), self._untold[[0] * len(batch)]
        views = list(zip(batch.indices, batch.variants, strict=True))
        told = [(each, batch.added(base, each)) for each in texts]
        alpha_bar = base.alpha_bar.to(batch.latents.device)
        # Of each view the timestep at which the base takes it up, and from which the DDIM steps go down.
        starts = torch.tensor([START_SHARES[sum(view) % len(START_SHARES)] for view in views]) * len(alpha_bar)
        noise = torch.stack(
            [randomness.normal(tuple(batch.latents.shape[1:]), self._seed, "drawing over", *view) for view in views]
        )
        noise, latents = noise.to(batch.latents), batch.latents
        for step in range(DDIM_STEPS):
            timesteps = (starts * (1 - step / DDIM_STEPS)).long().to(latents.device)
            now = alpha_bar[timesteps]
            noisy = diffusion.add_noise(latents, noise, now, base.prediction_type)
            asked, unasked = (base.predict(noisy, timesteps, *each) for each in told)
            prediction = unasked + base.defaults.guidance * (asked - unasked)
            latents, noise = diffusion.split_prediction(base.prediction_type, noisy, prediction, now)
        return latents

    def cross(self, noised: NoisedBatch, micro: MicroBatch) -> NoisedBatch:
        """The samples of a micro-batch, some from FIRST_SHARE on crossed."""
        latents, shown = noised.batch.latents, noised.batch.latents.clone()
        views = zip(noised.batch.indices, noised.batch.variants, strict=True)
        for row, (view, timestep) in enumerate(zip(views, noised.timesteps.tolist(), strict=True)):
            place = micro.step, micro.first + row
            if self._is_crossed(timestep, *place):
                part = randomness.uniform(self._seed, "crossed part", *place)
                shown[row] = torch.lerp(latents[row], self._drawn[view].to(latents), part)
        alpha_bar = self._base.alpha_bar.to(latents.device)[noised.timesteps]
        noise = diffusion.crossing_noise(latents, shown, noised.noise, alpha_bar)
        target = diffusion.prediction_target(self._base.prediction_type, latents, noise, alpha_bar)
        return dataclasses.replace(noised, noise=noise, target=target)
