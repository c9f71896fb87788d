"""A base that is a few lines of arithmetic, and pictures made on the spot."""

from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch import Tensor


@dataclass
class FakeText:
    """As `sfumato.models.TextEmbedding`, which would import diffusers."""

    hidden: Tensor
    pooled: Tensor | None = None

    def __getitem__(self, index):
        return FakeText(self.hidden[index])

    def to(self, *args, **kwargs):
        return FakeText(self.hidden.to(*args, **kwargs))

    @staticmethod
    def cat(parts):
        return FakeText(torch.cat([part.hidden for part in parts]))


class FakeBase:
    """Latents are means over 4 x 4 pixels; a text's embedding is its length."""

    vae_factor = 4
    token_limit = 8
    precision = SimpleNamespace(device=torch.device("cpu"))
    inpaints = False
    levels, latent_channels = 3, 3

    def __init__(self, deviation=0.0):
        self.deviation = deviation
        self.encoded = 0
        self.prompts = []

    def encode_pixels(self, pixels):
        self.encoded += len(pixels)
        mean = torch.nn.functional.avg_pool2d(pixels, self.vae_factor)
        return mean, torch.full_like(mean, self.deviation)

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents, scale_factor=self.vae_factor)

    def encode_apart(self, prompts):
        self.prompts += list(prompts)
        return [FakeText(torch.tensor([[[float(len(prompt))]]])) for prompt in prompts]

    def chunk_count(self, prompt):
        return 1

    def unconditional(self, count):
        return FakeText(torch.full((count, 1, 1), -1.0))

    def token_count(self, prompt):
        return len(prompt.split())

    def cut_off(self, prompt):
        return " ".join(prompt.split()[self.token_limit :])

    def added_conditions(self, text, original_sizes, crops, target_sizes):
        return {"time_ids": torch.cat([original_sizes, crops, target_sizes], dim=1)}


def noise_picture(width=64, height=64, seed=0):
    """A picture of coarse random tiles."""
    tiles = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(tiles).resize((width, height), Image.Resampling.NEAREST)


def smooth_noise(seed, side=256):
    """A picture with detail at every scale, as photographs have it."""
    tiles = [noise_picture(side, side, seed=seed).resize((n, n)).resize((side, side)) for n in (8, 64)]
    return Image.blend(*tiles, 0.5)
