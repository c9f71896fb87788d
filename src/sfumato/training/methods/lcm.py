"""What a U-Net learns in order to draw in few steps: to say from any noise level where the sampling would end.

Latent consistency distillation (Luo et al. 2023, arXiv 2310.04378, algorithm 1), for an adapter (arXiv 2311.05556) as
diffusers' train_lcm_distill_lora_sd_wds.py has it: the frozen base is the teacher and has the guidance, the student has
none, and there is no third network.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato.models import diffusion
from sfumato.runs.processes import MicroBatch, MicroBatches
from sfumato.runs.reporting.samples import eval_mode
from sfumato.training.loss.objective import draw_noise
from sfumato.training.loss.validation import Metrics
from sfumato.utils import randomness

if TYPE_CHECKING:
    from sfumato.adapters import Attached
    from sfumato.data import Batch, Dataset
    from sfumato.models import Base, TextEmbedding

HUBER = 0.001
"""The scale c of the loss, sqrt(e^2 + c^2) - c for each number: nearly the error itself, by which no sample outweighs
the others."""
_SIGMA_DATA, _TIMESTEP_SCALING = 0.5, 10.0
_MEASURED = 8
"""Samples of the fit, or a few more so that batches are full."""


@dataclass(frozen=True)
class NoisySamples:
    """Samples at some of the solver's timesteps.

    latents: (batch, channels, height, width). places: (batch,) of the timesteps in the solver's order, from the last
    step of a sampling, 0, to its first.
    """

    batch: Batch
    text: TextEmbedding
    latents: Tensor
    places: Tensor


class Distillation:
    """The samples of a training, and their errors.

    guidance: scale of classifier-free guidance that the teacher draws with, and what is learned looks like.
    solver_steps: steps of DDIM (Song et al. 2021) from pure noise to an image, of which each sample is one. pristine: a
    context in which the base predicts as it did before the training.
    """

    def __init__(
        self,
        base: Base,
        data: Dataset,
        *,
        guidance: float,
        solver_steps: int,
        pristine: Callable[[], AbstractContextManager[object]],
    ):
        self._base, self._data, self._guidance, self._pristine = base, data, guidance, pristine
        count = len(base.alpha_bar)
        stride = count // solver_steps
        self._from = torch.arange(1, solver_steps + 1) * stride - 1
        self._to = (self._from - stride).clamp(min=0)
        with torch.no_grad(), base.lazy_weights.restored_after():
            self._empty = base.unconditional(1)

    def draw(self, seed: int, micro: MicroBatch) -> NoisySamples:
        """The samples of a micro-batch, with stratified timesteps."""
        batch = self._data.batch(seed, micro.step, micro.global_batch, micro.first, micro.count)
        noise = draw_noise(batch, seed, micro.step, micro.first)
        places = diffusion.stratified_timesteps(micro.global_batch, range(len(self._from)), seed, micro.step)
        places = places[micro.first : micro.first + micro.count].to(noise.device)
        assert batch.text is not None
        alpha_bar = self._alpha_bar(self._timesteps(places)[0])
        return NoisySamples(batch, batch.text, diffusion.add_noise(batch.latents, noise, alpha_bar), places)

    def errors(self, noisy: NoisySamples) -> Tensor:
        """(batch,): each sample's loss, with gradients: how far the student's end is from the one that it sees after
        the teacher's next step."""
        now, then = self._timesteps(noisy.places)
        with torch.no_grad():
            wanted = self._end_of(replace(noisy, latents=self._moved(noisy, now, then)), then)
        torch.clear_autocast_cache()  # torch 2.10 keeps the student's weights as they were cast here, without gradients
        error = ((self._end_of(noisy, now) - wanted).square() + HUBER**2).sqrt() - HUBER
        return error.mean((1, 2, 3)) * noisy.batch.weights.to(error.device)

    def student_ends(self, noisy: NoisySamples) -> Tensor:
        """Where the student says that the samples' ways end, as the latents."""
        return self._end_of(noisy, self._timesteps(noisy.places)[0])

    @torch.no_grad()
    def teacher_ends(self, noisy: NoisySamples) -> Tensor:
        """Where the teacher's sampling ends, step by step, as the latents."""
        for place in range(int(noisy.places.max()), -1, -1):
            moved = self._moved(noisy, *self._timesteps(torch.full_like(noisy.places, place)))
            left = (noisy.places >= place).view(-1, 1, 1, 1)
            noisy = replace(noisy, latents=torch.where(left, moved, noisy.latents))
        return noisy.latents

    def _timesteps(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """Those at which the solver's steps begin and end."""
        return self._from.to(places.device)[places], self._to.to(places.device)[places]

    def _moved(self, noisy: NoisySamples, now: Tensor, then: Tensor) -> Tensor:
        """The latents after the teacher's step, which is DDIM's with guidance and without new noise."""
        with self._pristine():
            told = self._predict(noisy, now, noisy.text)
            untold = self._predict(noisy, now, self._empty[[0] * len(noisy.batch)])
        guided = untold + self._guidance * (told - untold)
        kind, alpha_bar = self._base.prediction_type, self._alpha_bar(now)
        return diffusion.add_noise(
            *diffusion.split_prediction(kind, noisy.latents, guided, alpha_bar), self._alpha_bar(then)
        )

    def _end_of(self, noisy: NoisySamples, timesteps: Tensor) -> Tensor:
        """Where the student says that the way from latents at `timesteps` ends; at timestep 0 that is where it is.

        The consistency function f of the paper, eq. 9, with c_skip and c_out of diffusers' LCMScheduler.
        """
        predicted, kind = self._predict(noisy, timesteps, noisy.text), self._base.prediction_type
        end, _ = diffusion.split_prediction(kind, noisy.latents, predicted, self._alpha_bar(timesteps))
        scaled = (_TIMESTEP_SCALING * timesteps.float()).view(-1, 1, 1, 1)
        length = (scaled.square() + _SIGMA_DATA**2).sqrt()
        return (_SIGMA_DATA / length).square() * noisy.latents + scaled / length * end

    def _predict(self, noisy: NoisySamples, timesteps: Tensor, text: TextEmbedding) -> Tensor:
        added = noisy.batch.added(self._base, text)
        return self._base.predict(noisy.latents, timesteps, text, added, noisy.batch.known).float()

    def _alpha_bar(self, timesteps: Tensor) -> Tensor:
        return self._base.alpha_bar.to(timesteps.device)[timesteps]


class ConsistencyMetrics(Metrics):
    """The figure of a distillation. Fit: how far the student's ends are from the teacher's, whose sampling is made step
    by step for that, on fixed samples; as a share of the base's, so that it is 1 for an adapter that does nothing.

    batch: samples that are predicted at once.
    """

    def __init__(
        self,
        base: Base,
        data: Dataset,
        adapter: Attached,
        distillation: Distillation,
        batch: int,
        *,
        within: Callable[[], AbstractContextManager[object]],
    ):
        super().__init__(base, data, {}, within=within, modules=[adapter])
        self._adapter, self._distillation = adapter, distillation
        firsts = range(0, _MEASURED, batch)
        self._micro_batches = MicroBatches(len(firsts) * batch, tuple(firsts), batch)

    def fit(self) -> float:
        """As the adapter is now."""
        return self._error() / self._error_of_base

    @cached_property
    def _samples(self) -> list[tuple[NoisySamples, Tensor]]:
        """The samples and their true ends. Not before they are asked for: a run may measure nothing."""
        seed = randomness.derive_seed(0, "measure")
        drawn = [self._distillation.draw(seed, micro) for micro in self._micro_batches.of(0)]
        return [(noisy, self._distillation.teacher_ends(noisy)) for noisy in drawn]

    @cached_property
    def _error_of_base(self) -> float:
        with self._adapter.disabled():
            return self._error()

    @torch.no_grad()
    def _error(self) -> float:
        with eval_mode([self._adapter]):
            found = [(self._distillation.student_ends(noisy) - end).square().mean() for noisy, end in self._samples]
        return float(torch.stack(found).mean())


def prompts_to_draw(prompts: Sequence[str], count: int, seed: int) -> list[str]:
    """So many of the prompts, by lot and each as often as any other."""
    order = randomness.permutation(len(prompts), seed, "prompts that are drawn")
    return [prompts[order[place % len(order)]] for place in range(count)]
