"""The shapes of the pocket base: what its trainer builds from nothing.

The parts are SD 1.5's own classes, small: a picture of 64 px is 16 x 16 x 4 latents, text is 77 positions of width 192.

Parts that a pre-training is given: a trained VAE, and those of a base that learns on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sfumato.errors import BaseModelError
from sfumato.models import Base, load_base
from sfumato.models.folder import load_vae
from sfumato.precision import Precision, decide


@contextmanager
def first_weights(seed: int) -> Iterator[None]:
    """Within the block modules are built with first weights that depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def build_vae() -> AutoencoderKL:
    """0.8 M weights, factor 4: (b, 3, 64, 64) pixels <-> (b, 4, 16, 16) latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 48, 64),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        sample_size=64,
        mid_block_add_attention=False,
    )


def build_unet() -> UNet2DConditionModel:
    """11.3 M weights, cross-attention at all three levels; residual branches begin at zero (Dhariwal & Nichol 2021)."""
    unet = UNet2DConditionModel(
        sample_size=16,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        attention_head_dim=(2, 4, 6),
        cross_attention_dim=192,
    )
    for name, module in unet.named_modules():
        if name.endswith(("conv2", "proj_out")) or name == "conv_out":
            nn.init.zeros_(module.weight)
            nn.init.zeros_(module.bias)
    return unet


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """A CLIP text model of width 192 with 3 layers."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=192,
            intermediate_size=512,
            projection_dim=192,
            num_hidden_layers=3,
            num_attention_heads=6,
            max_position_embeddings=tokenizer.model_max_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler() -> DPMSolverMultistepScheduler:
    """The betas of SD 1.5, v-prediction, trailing steps (Lin et al. 2023); the family's usual sampler."""
    return DPMSolverMultistepScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        steps_offset=1,
    )


def build_tokenizer(texts: Sequence[str]) -> CLIPTokenizer:
    """A CLIP tokenizer (byte-level BPE, `</w>` ends a word) learned from `texts`; any text tokenizes."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>", continuing_subword_prefix=""))
    learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # CLIP's own pre-tokenizer drops spaces, so we learn from words, one text each.
    words = [word for text in texts for word in text.lower().replace(",", " , ").split()]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    # The learner numbers the letters that end words as it meets them, in no fixed order, and of pairs that are equally
    # frequent takes the one of lower numbers: so they get their numbers here.
    ends = {piece[-1] for word in set(words) for piece, _ in learner.pre_tokenizer.pre_tokenize_str(word)}
    learner.train_from_iterator(
        words,
        trainers.BpeTrainer(
            vocab_size=3000,
            initial_alphabet=sorted(alphabet),
            special_tokens=[f"{letter}</w>" for letter in sorted(ends)],
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    single = sorted(alphabet) + [letter + "</w>" for letter in sorted(alphabet)]
    pieces = dict.fromkeys(single + sorted(model["vocab"], key=model["vocab"].get))
    vocab = {piece: i for i, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(merge) for merge in model["merges"]]
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


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


def trainable_parts(
    source: str, device: str, scheduler: DPMSolverMultistepScheduler, *, option: str = "--base"
) -> tuple[Any, Any, Any, Any]:
    """U-Net and text encoder of a base, which learn on, its tokenizer and its VAE.

    option: which names it. Raises BaseModelError for a base that learned to predict something else than `scheduler`
    has.
    """
    base = load_base(source, precision=fp32_precision(device))
    _refuse_strangers(base, scheduler, f"{option} {source}")
    unet, text_encoder = base.denoiser.requires_grad_(True), base.text_encoders[0].requires_grad_(True)
    return unet, text_encoder, base.tokenizers[0], base.vae


def base_fingerprint(source: str, device: str) -> str:
    """By what a run that goes on knows its base again."""
    return load_base(source, precision=fp32_precision(device)).fingerprint()


def fp32_precision(device: str) -> Precision:
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
