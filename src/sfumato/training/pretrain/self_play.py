"""A base that learns to tell pictures from what it draws itself: Direct Discriminative Optimization.

By how much a learning U-Net finds a picture likelier than the U-Net it began as, the two are a discriminator of that
picture (Zheng et al. 2025, "Your likelihood-based visual generative model is secretly a GAN discriminator"). To raise
that of real pictures and to lower that of the first U-Net's own drawings, each noised alike, is to learn where those
drawings are not yet like the pictures, as a GAN does, without another network.

The paper's drawings are unguided. Of guided ones the U-Net unlearns what that guidance overdoes, too, so that what it
draws with the same guidance comes nearer to the pictures.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import Tensor

from sfumato.errors import BaseModelError, FileError
from sfumato.files.header import read_header
from sfumato.files.read import read_tensors
from sfumato.files.save import write_tensors
from sfumato.models import diffusion
from sfumato.precision import Precision
from sfumato.runs.progress import progress_bar
from sfumato.training.pretrain.dataset import batch_indices
from sfumato.utils import randomness

DRAWN_AT_ONCE = 48
"""Pictures; twice as many rows of the U-Net, for guidance."""
OWN_STEPS = 25
"""Steps of DDIM in which they are drawn."""
KEPT_EVERY = 4
"""Batches, so that an interruption costs a minute or two of them."""


def discriminative_loss(real: Tensor, own: Tensor, sharpness: float) -> Tensor:
    """The paper's loss with beta `sharpness` and alpha 1: -log s(-beta real) - log s(beta own), s the sigmoid.

    real, own: (b,), by how much the learning U-Net's error is larger than the first one's, of real pictures and of own
    drawings: the errors stand for negative log-likelihoods.
    """
    return -(F.logsigmoid(-sharpness * real) + F.logsigmoid(sharpness * own)).mean()


def select_pictures(pictures: int, named: int, others_share: float, seed: int) -> list[int]:
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


def error_increase(
    unet: UNet2DConditionModel,
    first: UNet2DConditionModel,
    latents: Tensor,
    hidden: Tensor,
    timesteps: Tensor,
    noise: Tensor,
    scheduler: DPMSolverMultistepScheduler,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """By how much the mean squared error of `unet` is larger than that of `first`, of the pictures and of the drawings,
    each (b,).

    latents, hidden: as `Pairs.at` gives them. timesteps: (b,), and noise: (b, channels, h, w), of each picture and of
    its drawing alike.
    """
    device = latents.device
    timesteps, noise = timesteps.repeat(2), torch.cat([noise, noise]).to(device)
    alpha_bar = scheduler.alphas_cumprod[timesteps].to(device)
    noisy = diffusion.add_noise(latents, noise, alpha_bar)
    wanted = diffusion.prediction_target("v_prediction", latents, noise, alpha_bar)
    with precision.autocast():
        now = unet(noisy, timesteps.to(device), hidden).sample
        with torch.no_grad():
            before = first(noisy, timesteps.to(device), hidden).sample
    error, error_before = ((predicted.float() - wanted).square().mean((1, 2, 3)) for predicted in (now, before))
    real, own = (error - error_before).chunk(2)
    return real, own


@torch.no_grad()
def own_drawings(
    unet: UNet2DConditionModel,
    states: Tensor,
    empty: Tensor,
    scheduler: DPMSolverMultistepScheduler,
    precision: Precision,
    *,
    guidance: float,
    seed: int,
    kept: Path,
    unet_fingerprint: str,
) -> Tensor:
    """Latents of what the U-Net draws of `states`, (n, channels, side, side), in OWN_STEPS of DDIM.

    kept: the file that they are written to as they are drawn, and read from where it has those of the same U-Net,
    states, size, precision, guidance and seed. Raises BaseModelError for a U-Net that draws NaN or infinity, FileError
    for a disk that does not take them.
    """
    shape = unet.config.in_channels, unet.config.sample_size, unet.config.sample_size
    facts = (unet_fingerprint, tuple(states.shape), shape, str(precision.compute), guidance, seed)
    digest = hashlib.sha256(repr(facts).encode())
    digest.update(states.cpu().contiguous().numpy().data)
    drawn = _read(kept, digest.hexdigest())
    if drawn is None:
        drawn = torch.empty(0, *shape)
    ddim = DDIMScheduler.from_config(scheduler.config, clip_sample=False, set_alpha_to_one=False)
    ddim.set_timesteps(OWN_STEPS)
    batches = [range(start, min(start + DRAWN_AT_ONCE, len(states))) for start in range(0, len(states), DRAWN_AT_ONCE)]
    left = [places for places in batches if places.start >= len(drawn)]
    done = len(batches) - len(left)
    for places in progress_bar(left, "own drawings", unit="batch", done=done):
        noise = torch.stack([randomness.normal(shape, seed, "own drawing", place) for place in places])
        said = states[places.start : places.stop]
        latents = _draw(unet, noise.to(precision.device), said, empty, ddim, precision, guidance).cpu()
        if not latents.isfinite().all():
            raise BaseModelError(
                "the U-Net of --base draws NaN or infinity, from which nothing can be learned; try --precision fp32, "
                "a smaller --guidance, or another base."
            )
        drawn = torch.cat([drawn, latents])
        done += 1
        if done % KEPT_EVERY == 0 or done == len(batches):
            write_tensors(kept, {"latents": drawn}, {"of": digest.hexdigest()})
    return drawn.to(precision.device)


def _draw(
    unet: UNet2DConditionModel,
    latents: Tensor,
    states: Tensor,
    empty: Tensor,
    scheduler: DDIMScheduler,
    precision: Precision,
    guidance: float,
) -> Tensor:
    """What becomes of the noise `latents` where `states` are said, in the scheduler's steps."""
    hidden = states if guidance == 1 else torch.cat([states, empty.expand(len(states), -1, -1)])
    for timestep in scheduler.timesteps:
        with precision.autocast():
            seen = latents if guidance == 1 else torch.cat([latents, latents])
            predicted = unet(seen, timestep.to(precision.device), hidden).sample.float()
        if guidance != 1:
            told, untold = predicted.chunk(2)
            predicted = untold + guidance * (told - untold)
        latents = scheduler.step(predicted, timestep, latents).prev_sample
    return latents


def _read(kept: Path, digest: str) -> Tensor | None:
    """The latents in the file, if there is one that is whole and says that they are of this."""
    if not kept.exists():
        return None
    try:
        header = read_header(kept)
        return read_tensors(kept, header=header)["latents"] if header.metadata.get("of") == digest else None
    except FileError:
        return None
