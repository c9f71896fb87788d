"""A base that learns to tell pictures from what it draws itself: Direct Discriminative Optimization.

By how much a learning U-Net finds a picture likelier than the U-Net it began as, the two are a discriminator of that
picture (Zheng et al. 2025, "Your likelihood-based visual generative model is secretly a GAN discriminator"). To raise
that of real pictures and to lower that of the first U-Net's own drawings, each noised alike, is to learn where those
drawings are not yet like the pictures, as a GAN does, without another network.
"""

from __future__ import annotations

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from sfumato import randomness
from sfumato.bases import FAMILIES
from sfumato.files.atomic import atomic_path
from sfumato.pocket.pictures import batch_indices
from sfumato.precision import Precision

DRAWN_AT_ONCE = 48
"""Pictures; twice as many rows of the U-Net, for guidance."""


def discriminative_loss(real: Tensor, own: Tensor, sharpness: float) -> Tensor:
    """The paper's loss with beta `sharpness` and alpha 1: -log s(-beta real) - log s(beta own), s the sigmoid.

    real, own: (b,), by how much the learning U-Net's error is larger than the first one's, of real pictures and of own
    drawings: the errors stand for negative log-likelihoods.
    """
    return -(F.logsigmoid(-sharpness * real) + F.logsigmoid(sharpness * own)).mean()


def taking_part(pictures: int, named: int, others_share: float, seed: int) -> list[int]:
    """Which pictures are drawn and learned from: all `named` first ones, and so many others that these are
    `others_share` of all."""
    others = pictures - named
    wanted = others if others_share >= 1 else round(named * others_share / (1 - others_share))
    chosen = randomness.permutation(others, seed, "others that are drawn")[: min(others, wanted)]
    return [*range(named), *sorted(named + place for place in chosen)]


@dataclass(frozen=True)
class Pairs:
    """Pictures and the first U-Net's drawings of the same words.

    real, own: (n, channels, h, w), their latents; of the pictures the mean, for the VAE's deviation would tell them
    from drawings, which have none. states: (n, positions, width), what is said of them. empty: (1, positions, width),
    what no words say.
    """

    real: Tensor
    own: Tensor
    states: Tensor
    empty: Tensor

    def at(self, step: int, batch: int, seed: int, empty_share: float) -> tuple[Tensor, Tensor]:
        """(2 batch, channels, h, w) latents, the pictures' and then their drawings', and (2 batch, positions, width)
        what is said of them, which is nothing in `empty_share` of the pairs."""
        places = batch_indices(step, batch, len(self.own), seed)
        draw = torch.rand(batch, generator=randomness.generator(seed, "no words", step))
        unsaid = (draw < empty_share).to(self.own.device)[:, None, None]
        said = torch.where(unsaid, self.empty, self.states[places])
        return torch.cat([self.real[places], self.own[places]]), torch.cat([said, said])


@torch.no_grad()
def own_drawings(
    unet: UNet2DConditionModel,
    states: Tensor,
    empty: Tensor,
    scheduler: DDIMScheduler,
    precision: Precision,
    *,
    guidance: float,
    seed: int,
    kept: Path,
    unet_fingerprint: str,
) -> Tensor:
    """Latents of what the U-Net draws of `states`, (n, channels, side, side), in the base's usual steps.

    kept: the file that they are written to, and read from where it has those of the same U-Net, states, guidance and
    seed.
    """
    digest = hashlib.sha256(repr((unet_fingerprint, tuple(states.shape), guidance, seed)).encode())
    digest.update(states.cpu().contiguous().numpy().data)
    if (known := _read(kept, digest.hexdigest())) is not None:
        return known.to(precision.device)
    side, channels = unet.config.sample_size, unet.config.in_channels
    scheduler.set_timesteps(FAMILIES["pocket"].defaults.sampling_steps)
    drawn: list[Tensor] = []
    starts = range(0, len(states), DRAWN_AT_ONCE)
    for start in tqdm(starts, desc="own drawings", unit="batch", file=sys.stderr):
        said = states[start : start + DRAWN_AT_ONCE]
        places = range(start, start + len(said))
        noise = [randomness.normal((channels, side, side), seed, "own drawing", place) for place in places]
        latents = torch.stack(noise).to(precision.device)
        if guidance != 1:
            said = torch.cat([said, empty.expand(len(said), -1, -1)])
        for timestep in scheduler.timesteps:
            with precision.autocast():
                seen = torch.cat([latents, latents]) if guidance != 1 else latents
                predicted = unet(seen, timestep.to(precision.device), said).sample.float()
            if guidance != 1:
                told, untold = predicted.chunk(2)
                predicted = untold + guidance * (told - untold)
            latents = scheduler.step(predicted, timestep, latents).prev_sample
        drawn.append(latents)
    found = torch.cat(drawn)
    with atomic_path(kept) as temporary:
        save_file({"latents": found.cpu()}, temporary, {"of": digest.hexdigest()})
    return found


def _read(kept: Path, digest: str) -> Tensor | None:
    """The latents in the file, if there is one and it says that they are of this."""
    if not kept.exists():
        return None
    with safe_open(kept, "pt") as file:
        if (file.metadata() or {}).get("of") != digest:
            return None
        latents: Tensor = file.get_tensor("latents")
    return latents
