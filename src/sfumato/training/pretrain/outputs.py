"""What a pre-training leaves: model folders, whole or not at all, and sheets of what is drawn.

What a pre-training teaches, with its optimizers and its moving average: one step of all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from sfumato.errors import BaseModelError
from sfumato.files.save import atomic_model_folder
from sfumato.generation.decoding import is_valid_image
from sfumato.models import FAMILIES
from sfumato.precision import Precision
from sfumato.runs.reporting.samples import eval_mode
from sfumato.runs.run import Run, Step
from sfumato.training.optim.ema import Ema
from sfumato.training.optim.muon import Muon
from sfumato.training.optim.optimizers import clip_grad_norm
from sfumato.training.pretrain.options import PretrainOptions
from sfumato.utils import randomness
from sfumato.utils.atomic import atomic_path

_AT_THE_ENDS = ("conv_in.", "conv_out.", "embedding", "time_emb")
"""In the names of weights that AdamW steps beside Muon: those of the first and last layers, and of embeddings."""


class PretrainState:
    """Modules being trained, with their optimizers and the moving average of their weights.

    optimizer: AdamW for all weights, or Muon for the inner matrices beside AdamW for the rest. ema: the average's
    decay. largest_norm: what the gradient's norm is clipped to. first_share: of the weights as they are given here,
    in the result.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        *,
        optimizer: Literal["adamw", "muon"],
        learning_rate: float,
        weight_decay: float,
        ema: float,
        largest_norm: float,
        first_share: float = 0.0,
    ) -> None:
        self.device, self.rate, self.largest_norm = device, 0.0, largest_norm
        self.modules = {name: module.to(device).train() for name, module in modules.items()}
        named = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        named = {name: p for name, p in named.items() if p.requires_grad}
        self.named, self.parameters = named, list(named.values())
        self._steps_before_look = 10
        self._first_share = first_share
        self._first = [p.detach().clone() for p in self.parameters] if first_share else []
        self.average = Ema(self.parameters, ema)
        inner = [p for name, p in named.items() if p.ndim > 1 and not any(word in name for word in _AT_THE_ENDS)]
        orthogonal = inner if optimizer == "muon" else []
        rest = [p for p in self.parameters if not any(p is q for q in orthogonal)]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        }
        if orthogonal:
            self.optimizers["muon"] = Muon(orthogonal, lr=learning_rate, momentum=0.95, weight_decay=weight_decay)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {**self.modules, **self.optimizers, "average": self.average}

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps from here on."""
        self.rate = rate
        for group in [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]:
            group["lr"] = rate

    def learn(self, step: Step, loss: Tensor) -> None:
        """The backward pass, then one step of the optimizers and of the moving average, unless a number is broken."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self._steps_before_look and self._begun():
            self._steps_before_look = 0
            self._warn_unused_weights(step)
        self._steps_before_look = max(0, self._steps_before_look - 1)
        norm = clip_grad_norm(self.parameters, self.largest_norm)
        if step.healthy(loss=loss, gradient_norm=norm):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.average.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        step.done(loss=loss, rate=self.rate, gradient_norm=norm)

    def _begun(self) -> bool:
        """Whether every weight can have a gradient: no branch is still at the zeros that it begins with, by which those
        before it have none; or whether that has lasted so long that it will not change."""
        return self._steps_before_look == 1 or all(bool(p.any()) for p in self.parameters if p.ndim > 1)

    def _warn_unused_weights(self, step: Step) -> None:
        """Tell of weights that no gradient reaches, as torch's compiled kernels once left two thirds of a U-Net."""
        rests = [name for name, weight in self.named.items() if weight.grad is None or not weight.grad.any()]
        if rests:
            step.run.say(
                f"{len(rests)} of {len(self.named)} weights have no gradient and do not learn, such as {rests[0]}; "
                "stop here, and go on with --no-compile or --precision fp32."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules hold their averaged weights, in evaluation mode, for as long as the block lasts."""
        with self.average.applied(), eval_mode(list(self.modules.values())), torch.no_grad():
            yield

    @contextmanager
    def result(self) -> Iterator[None]:
        """As `averaged`, with their share of the first weights (Wortsman et al. 2022)."""
        with self.averaged():
            for weight, first in zip(self.parameters, self._first, strict=True) if self._first else ():
                weight.lerp_(first, self._first_share)
            yield


def make_pretrain_state(
    modules: Mapping[str, nn.Module], config: PretrainOptions, device: torch.device, *, first_share: float = 0.0
) -> PretrainState:
    """The modules with what makes them learn, as the config says. first_share: as of `PretrainState`."""
    assert config.learning_rate is not None
    return PretrainState(
        modules,
        device,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        ema=config.ema,
        largest_norm=config.clip,
        first_share=first_share,
    )


SHEET = ("red apple", "crab", "cat face", "house", "rocket", "tulip", "pizza", "penguin", "guitar", "bus", "owl", "key")
"""Concepts drawn on the sample sheets, where the base learns them."""


def save_model(model: Any, path: Path) -> Path:
    """A diffusers folder, whole or not at all. Raises FileError for a disk that does not take it."""
    with atomic_model_folder(path) as temporary:
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
    if not is_valid_image(pictures).all():
        raise BaseModelError(f"{path.name}: an image is black or not finite, so the sheet was not written.")
    rows = [torch.cat(list(row), dim=2) for row in torch.split(pictures, columns)]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary)
