"""Parts that a pre-training is given: a trained VAE, and those of a base that learns on."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DPMSolverMultistepScheduler

from sfumato.bases import Base, load_base
from sfumato.bases.folder import load_vae
from sfumato.errors import BaseModelError
from sfumato.precision import Precision, decide


def read_vae(folder: Path, device: torch.device) -> Any:
    """The trained VAE in this folder, fp32. Raises BaseModelError for one whose latents the U-Net does not take."""
    shell = load_vae(folder, torch.float32)
    if (count := shell.model.config.latent_channels) != 4:
        raise BaseModelError(
            f"--vae {folder}: its latents have {count} channels, the U-Net takes 4. Name a VAE of 4, as "
            "--stage vae makes one."
        )
    shell.read()
    return shell.model.to(device)


def learning_parts(
    source: str, device: str, scheduler: DPMSolverMultistepScheduler, *, option: str = "--base"
) -> tuple[Any, Any, Any, Any]:
    """U-Net and text encoder of a base, which learn on, its tokenizer and its VAE.

    option: which names it. Raises BaseModelError for a base that learned to predict something else than `scheduler`
    has.
    """
    base = load_base(source, precision=fp32_on(device))
    _refuse_strangers(base, scheduler, f"{option} {source}")
    unet, text_encoder = base.unet.requires_grad_(True), base.text_encoders[0].requires_grad_(True)
    return unet, text_encoder, base.tokenizers[0], base.vae


def base_fingerprint(source: str, device: str) -> str:
    """By what a run that goes on knows its base again."""
    return load_base(source, precision=fp32_on(device)).fingerprint()


def fp32_on(device: str) -> Precision:
    """For a base whose parts learn on, in fp32: the switches of the process stay as the run has decided."""
    return replace(decide("fp32", device=device), tf32=torch.backends.cuda.matmul.allow_tf32)


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Changes with any of the words and with how text is cut into them."""
    return hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()


def _refuse_strangers(base: Base, scheduler: DPMSolverMultistepScheduler, named: str) -> None:
    """Raise BaseModelError for a base that learned to predict something else than this program teaches."""
    if len(base.text_encoders) > 1:
        why = f"of the family {base.family.title}, with more than one text encoder"
    elif base.prediction_type != "v_prediction":
        why = f"a base that predicts {base.prediction_type}, which its weights would have to forget"
    elif not torch.allclose(base.alpha_bar.cpu(), scheduler.alphas_cumprod, atol=1e-4):
        why = "a base with another noise schedule"
    elif base.inpaints:
        why = "an inpainting model"
    else:
        return
    raise BaseModelError(
        f"{named}: {why}. Name a base that pretrain made, such as pocket; the other trainers take any."
    )
