"""Two figures of a training that are the same whenever they are measured.

Fit: the loss on fixed pictures, noise and timesteps; it falls while the training loss only jitters.
Drift: how far the base's prediction on prompts that have nothing to do with the pictures has moved, as a share of its
size; it says what the learning costs. Neither depends on the run's seed.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sfumato import diffusion, randomness

if TYPE_CHECKING:
    from sfumato.adapters import Lora
    from sfumato.bases import Base, TextEmbedding
    from sfumato.data import Dataset

UNRELATED = ("a ball", "a dog", "a house", "a car", "a tree", "a chair", "a bird", "a cup")
"""Prompts for the drift: plain things that any base can draw."""

_SEED = 0
_MOST = 16


class Measures:
    """Fit and drift of one adapter on one base, on at most 16 pictures."""

    def __init__(self, base: "Base", data: "Dataset", lora: "Lora"):
        self.base, self.lora = base, lora
        self.batch = data.batch(_SEED, 0, min(_MOST, len(data)), augment=False)
        count = len(self.batch.latents)
        shape = tuple(self.batch.latents.shape[1:])
        self.noise = torch.stack([randomness.normal(shape, _SEED, "measure", 0, i) for i in range(count)])
        self.noise = self.noise.to(self.batch.latents)
        total = len(base.alpha_bar)
        self.timesteps = ((torch.arange(count) + 0.5) / count * total).long().to(self.noise.device)
        self.unrelated = [UNRELATED[i % len(UNRELATED)] for i in range(count)]
        with lora.disabled():
            self.before = self._predict(base.encode_text(self.unrelated))

    @torch.no_grad()
    def fit(self) -> float:
        """Mean squared error of the prediction, no weights."""
        text = self.base.encode_text(self.batch.captions)
        wanted = diffusion.target(self.base.prediction_type, self.batch.latents, self.noise, self._alpha_bar())
        error = diffusion.weighted_error(self._predict(text), wanted, torch.ones(len(wanted), device=wanted.device))
        return float(error.mean())

    @torch.no_grad()
    def drift(self) -> float:
        """Norm of the change of the prediction over the norm of the base's prediction."""
        change = self._predict(self.base.encode_text(self.unrelated)).float() - self.before.float()
        return float(change.norm() / self.before.float().norm())

    def _alpha_bar(self) -> Tensor:
        return self.base.alpha_bar.to(self.noise.device)[self.timesteps]

    @torch.no_grad()
    def _predict(self, text: "TextEmbedding") -> Tensor:
        training = self.lora.training
        self.lora.eval()
        noisy = diffusion.noise_latents(self.batch.latents, self.noise, self._alpha_bar())
        prediction = self.base.predict(noisy, self.timesteps, text, self.batch.added(self.base, text))
        self.lora.train(training)
        return prediction
