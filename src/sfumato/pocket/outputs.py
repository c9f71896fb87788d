"""What a pre-training leaves: model folders, whole or not at all, and sheets of what is drawn."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato import randomness
from sfumato.bases import FAMILIES
from sfumato.drawing.decoding import is_picture
from sfumato.errors import BaseModelError
from sfumato.files.atomic import atomic_path
from sfumato.files.save import model_folder
from sfumato.pocket.trained import PretrainState
from sfumato.precision import Precision
from sfumato.runs.run import Run

SHEET = ("red apple", "crab", "cat face", "house", "rocket", "tulip", "pizza", "penguin", "guitar", "bus", "owl", "key")
"""Concepts drawn on the sample sheets, where the base learns them."""


def save_model(model: Any, path: Path) -> Path:
    """A diffusers folder, whole or not at all. Raises FileError for a disk that does not take it."""
    with model_folder(path) as temporary:
        model.save_pretrained(temporary)
    return path


def assemble(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DPMSolverMultistepScheduler,
) -> StableDiffusionPipeline:
    """The parts as an ordinary Stable Diffusion pipeline."""
    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet(
    pipeline: StableDiffusionPipeline,
    styles: Sequence[str],
    concepts: Sequence[str],
    path: Path,
    guidance: float | None = None,
) -> None:
    """One row for each style, one column for each of SHEET, or of the first concepts where the base learns none of
    these; the base's usual steps, and its usual guidance if None is given; the seed is the column."""
    columns = [concept for concept in SHEET if concept in concepts] or list(concepts)[: len(SHEET)]
    prompts = [f"{concept}, {style} style" for style in styles for concept in columns]
    generators = [randomness.generator(0, "sheet", 0, column) for _ in styles for column in range(len(columns))]
    usual = FAMILIES["pocket"].defaults
    drawn = pipeline(
        prompts,
        num_inference_steps=usual.sampling_steps,
        guidance_scale=usual.guidance if guidance is None else guidance,
        generator=generators,
        output_type="pt",
    ).images
    save_sheet(drawn.float() * 2 - 1, len(columns), path)


def draw_samples(
    run: Run,
    every: int,
    trained: PretrainState,
    precision: Precision,
    pipeline: StableDiffusionPipeline,
    styles: Sequence[str],
    concepts: Iterable[str],
    guidance: float | None = None,
) -> None:
    """Have the run draw a sheet with the averaged weights every so many steps; guidance: None for the base's usual."""

    def sample(step: int) -> None:
        with trained.averaged(), precision.autocast():
            sheet(pipeline, styles, list(concepts), run.folder / "samples" / f"{step:06d}.png", guidance)

    run.every(every, sample)


def save_sheet(pictures: Tensor, columns: int, path: Path) -> None:
    """(n, 3, h, w) in [-1, 1] as one PNG, `columns` in a row; BaseModelError where one is black or not finite."""
    if not is_picture(pictures).all():
        raise BaseModelError(f"{path.name}: an image is black or not finite, so the sheet was not written.")
    rows = [torch.cat(list(row), dim=2) for row in torch.split(pictures, columns)]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary)
