"""Batches with all that their error depends on: noise, timesteps and targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato import diffusion
from sfumato.data import concat_batches
from sfumato.runs.micro_batch import MicroBatch
from sfumato.training.objective import denoising_errors, draw_noise, draw_perturbation
from sfumato.words import embedding

if TYPE_CHECKING:
    from sfumato.bases import Base
    from sfumato.data import Batch, Dataset


@dataclass(frozen=True)
class NoiseSettings:
    """How pictures are noised. timesteps: those of the base that are drawn. offset, pyramid: as of `draw_noise`.

    perturbation: strength of further noise that is seen and not asked for (Ning et al. 2023, algorithm 1).
    """

    timesteps: range
    offset: float = 0.0
    pyramid: float = 0.0
    perturbation: float = 0.0


@dataclass(frozen=True)
class LossSettings:
    """How errors count. min_snr, huber, debiased: as of `denoising_errors`."""

    min_snr: float | None = None
    huber: float = 0.0
    debiased: bool = False


@dataclass(frozen=True)
class NoisedBatch:
    """A batch with all that its error depends on. noise, target: as batch.latents. timesteps: (batch,).

    unasked: further noise that is mixed in, and that the target knows nothing of; None for none.
    """

    batch: Batch
    noise: Tensor
    timesteps: Tensor
    target: Tensor
    unasked: Tensor | None = None

    @property
    def seen_noise(self) -> Tensor:
        """All noise that the model sees."""
        return self.noise if self.unasked is None else self.noise + self.unasked

    def concat(self, other: NoisedBatch) -> NoisedBatch:
        """Both as one batch, these first."""
        return NoisedBatch(
            concat_batches(self.batch, other.batch),
            torch.cat([self.noise, other.noise]),
            torch.cat([self.timesteps, other.timesteps]),
            torch.cat([self.target, other.target]),
            None if self.unasked is None or other.unasked is None else torch.cat([self.unasked, other.unasked]),
        )


def per_sample_losses(
    base: Base, parts: Sequence[NoisedBatch], *, encode: bool, settings: LossSettings | None = None
) -> Tensor:
    """Each sample's loss, (samples,), in the order of `parts`; neighbours of one latent shape share a U-Net call.

    encode: whether captions are encoded here, with gradients; else the batches hold their embeddings.
    """
    settings, errors = settings or LossSettings(), []
    for call in merge_by_shape(parts):
        batch = call.batch
        text = embedding.encode(base, batch.captions, grad=True) if encode else batch.text
        assert text is not None
        counted = dataclasses.asdict(settings)
        errors.append(
            denoising_errors(base, batch, call.seen_noise, call.timesteps, text, target=call.target, **counted)
        )
    return torch.cat(errors)


def merge_by_shape(parts: Sequence[NoisedBatch]) -> list[NoisedBatch]:
    """The parts in their order, those beside each other whose latents are of one shape as one."""
    found: list[NoisedBatch] = []
    for part in parts:
        if found and found[-1].noise.shape[1:] == part.noise.shape[1:]:
            found[-1] = found[-1].concat(part)
        else:
            found.append(part)
    return found


def draw_noised(
    base: Base,
    data: Dataset,
    seed: int,
    micro: MicroBatch,
    *,
    noising: NoiseSettings | None = None,
    embed_text: bool = True,
    order: int | None = None,
) -> NoisedBatch:
    """The samples of a micro-batch, with noise, stratified timesteps and target.

    noising: None draws all of the base's timesteps, with plain noise. order: the seed that picks the pictures; None
    takes `seed`. Without `embed_text` the captions come without their embeddings.
    """
    step, first = micro.step, micro.first
    of_pictures = seed if order is None else order
    batch = data.batch(of_pictures, step, micro.global_batch, first, micro.count, embed_text=embed_text)
    noising = noising or NoiseSettings(range(len(base.alpha_bar)))
    noise = draw_noise(batch, seed, step, first, offset=noising.offset, pyramid=noising.pyramid)
    timesteps = diffusion.stratified_timesteps(micro.global_batch, noising.timesteps, seed, step)
    timesteps = timesteps[first : first + micro.count].to(noise.device)
    alpha_bar = base.alpha_bar.to(noise.device)[timesteps]
    target = diffusion.target(base.prediction_type, batch.latents, noise, alpha_bar)
    unasked = None
    if noising.perturbation:
        unasked = noising.perturbation * draw_perturbation(batch, seed, step, first)
    return NoisedBatch(batch, noise, timesteps, target, unasked)
