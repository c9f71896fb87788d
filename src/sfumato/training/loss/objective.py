"""The denoising error of a batch: what every trainer of this package lowers.

Batches with all that their error depends on: noise, timesteps and targets.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.adapters.embeddings import embedding
from sfumato.data import concat_batches
from sfumato.models import diffusion
from sfumato.runs.processes import MicroBatch
from sfumato.utils import randomness

if TYPE_CHECKING:
    from sfumato.data import Batch, Dataset
    from sfumato.models import Base, TextEmbedding


def draw_noise(batch: Batch, seed: int, step: int, first: int, *, offset: float = 0.0, pyramid: float = 0.0) -> Tensor:
    """The batch's noise in its latents' shape, each picture's a function of (seed, step, place in the global batch).

    first: the place of the batch's first picture. offset: strength of a constant per channel (Guttenberg 2023).
    pyramid: discount of `diffusion.pyramid_noise`, 0 for none.
    """
    sides = batch.latents.shape[2:]
    noise = _numbers(batch, seed, "noise", step, first, *sides)
    if pyramid:
        levels = [_coarser(own, seed, step, place) for place, own in enumerate(noise, first)]
        each = zip(noise[:, None], levels, strict=True)
        noise = torch.cat([diffusion.pyramid_noise(own, coarser, pyramid) for own, coarser in each])
    if offset:
        noise = diffusion.offset_noise(noise, _numbers(batch, seed, "noise offset", step, first, 1, 1), offset)
    return noise.to(batch.latents)


def draw_perturbation(batch: Batch, seed: int, step: int, first: int) -> Tensor:
    """Further noise in the latents' shape, a function of the same as `draw_noise`'s."""
    return _numbers(batch, seed, "input perturbation", step, first, *batch.latents.shape[2:]).to(batch.latents)


def _numbers(batch: Batch, seed: int, stream: str, step: int, first: int, *sides: int) -> Tensor:
    """Standard normal numbers, (batch, channels, *sides), each picture's those of its place."""
    count, channels = batch.latents.shape[:2]
    drawn = [randomness.normal((channels, *sides), seed, stream, step, first + place) for place in range(count)]
    return torch.stack(drawn)


def _coarser(noise: Tensor, seed: int, step: int, place: int) -> list[Tensor]:
    """The levels of one picture's pyramid, level i 2^i to 4^i times as coarse as (channels, h, w), down to a pixel."""
    draw = randomness.generator(seed, "pyramid noise", step, place)
    channels, *full = noise.shape
    levels: list[Tensor] = []
    while not levels or min(levels[-1].shape[-2:]) > 1:
        ratio = 2 + 2 * float(torch.rand((), generator=draw))
        sides = [max(1, int(side / ratio ** (len(levels) + 1))) for side in full]
        levels.append(torch.randn(1, channels, *sides, generator=draw))
    return levels


def predict(base: Base, batch: Batch, noise: Tensor, timesteps: Tensor, text: TextEmbedding) -> Tensor:
    """What the base predicts of the batch's latents with this noise; arguments as of `denoising_errors`."""
    alpha_bar = base.alpha_bar.to(batch.latents.device)[timesteps]
    noisy = diffusion.add_noise(batch.latents, noise, alpha_bar, base.prediction_type)
    return base.predict(noisy, timesteps, text, batch.added(base, text), batch.known)


def denoising_errors(
    base: Base,
    batch: Batch,
    noise: Tensor,
    timesteps: Tensor,
    text: TextEmbedding,
    *,
    min_snr: float | None = None,
    huber: float = 0.0,
    debiased: bool = False,
    target: Tensor | None = None,
) -> Tensor:
    """(batch,): each picture's mean squared error of the base's prediction, eq. 14 of Ho et al. 2020.

    noise: as the latents. timesteps: (batch,) integers on the latents' device. text: the captions' embeddings.
    min_snr: gamma of Hang et al. 2023, 0 or None for none. huber: the least scale of `diffusion.huber_scale`, 0 for
    squared errors. debiased: weigh by `diffusion.debiased_weight` instead of min_snr. target: what is to be predicted,
    noise or v of the latents if None. The batch's mask and its pictures' weights count.
    """
    prediction = predict(base, batch, noise, timesteps, text)
    alpha_bar = base.alpha_bar.to(batch.latents.device)[timesteps]
    wanted = (
        diffusion.prediction_target(base.prediction_type, batch.latents, noise, alpha_bar) if target is None else target
    )
    weight = torch.ones_like(alpha_bar)
    if debiased:
        weight = diffusion.debiased_weight(base.prediction_type, alpha_bar)
    elif min_snr:
        weight = diffusion.snr_weight(base.prediction_type, alpha_bar, min_snr)
    scales = diffusion.huber_scale(alpha_bar, huber) if huber else None
    errors = diffusion.weighted_loss(prediction, wanted, weight, batch.mask, scales)
    return errors * batch.weights.to(errors.device)


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
    target = diffusion.prediction_target(base.prediction_type, batch.latents, noise, alpha_bar)
    unasked = None
    if noising.perturbation:
        unasked = noising.perturbation * draw_perturbation(batch, seed, step, first)
    return NoisedBatch(batch, noise, timesteps, target, unasked)
