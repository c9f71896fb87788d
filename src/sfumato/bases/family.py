"""The families of base models: what each consists of, and its defaults. Imports no torch.

What differs between families and can be read from a model (widths, factors, prediction type) is read from the model.
This table holds the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from sfumato.errors import BaseModelError
from sfumato.files.family import LABELS

FamilyName = Literal["pocket", "sd1", "sd2", "sdxl"]


@dataclass(frozen=True)
class Defaults:
    """Values for the settings that a config leaves unset."""

    resolution: int
    """Side in pixels. A base model whose U-Net says otherwise (SD 2.x at 768) overrides it."""
    batch: int
    learning_rate: float
    """For a LoRA with alpha equal to its rank. Other kinds of adapter use a multiple of it
    (`sfumato.adapters.ALGOS`)."""
    steps: int
    rank: int
    guidance: float
    """Guidance scale for generating (classifier-free guidance)."""
    sampling_steps: int
    sampler: str
    """A name from `sfumato.schedulers`."""
    min_snr: float
    """Gamma of min-SNR weighting; 0 for none."""


@dataclass(frozen=True)
class Encoder:
    """The folder and the class of one text encoder in a diffusers folder."""

    folder: str
    tokenizer: str
    class_name: Literal["CLIPTextModel", "CLIPTextModelWithProjection"]


@dataclass(frozen=True)
class Family:
    """One family of base models. `sfumato.files.family` has the names that people and files use for it."""

    name: FamilyName
    defaults: Defaults
    encoders: tuple[Encoder, ...]

    @property
    def title(self) -> str:
        """Its name for people."""
        return LABELS[self.name].title


_FIRST = Encoder("text_encoder", "tokenizer", "CLIPTextModel")
_SECOND = Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection")

# diffusers' and sd-scripts' LoRA guides agree on 1e-4; 800 steps of 4 pass over 16 pictures 200 times.
_SD = Defaults(
    resolution=512, batch=4, learning_rate=1e-4, steps=800, rank=16,
    guidance=7.5, sampling_steps=30, sampler="dpm++", min_snr=5.0,
)  # fmt: skip

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "pocket": Family(
            name="pocket",
            # Tuned by eye on datasets/line-style and a base of the same shape. No min-SNR weighting: with v-prediction
            # it takes weight from the steps of little noise, which is where a small base draws its outlines.
            defaults=Defaults(
                resolution=64, batch=8, learning_rate=6e-4, steps=240, rank=16,
                guidance=2.5, sampling_steps=12, sampler="dpm++", min_snr=0.0,
            ),
            encoders=(_FIRST,),
        ),
        "sd1": Family(
            name="sd1",
            defaults=_SD,
            encoders=(_FIRST,),
        ),
        "sd2": Family(
            name="sd2",
            defaults=_SD,
            encoders=(_FIRST,),
        ),
        "sdxl": Family(
            name="sdxl",
            defaults=Defaults(
                resolution=1024, batch=2, learning_rate=1e-4, steps=800, rank=16,
                guidance=6.0, sampling_steps=30, sampler="euler", min_snr=5.0,
            ),
            encoders=(_FIRST, _SECOND),
        ),
    }
)  # fmt: skip


def family_of_config(unet: Mapping[str, Any]) -> Family:
    """The family of a U-Net, from its diffusers config.

    Widths do not matter, so that a small model belongs to its family. SDXL takes sizes and a pooled embedding. SD 2 has
    linear projections in its attention blocks. SD 1 has a lowest level without attention or, in the smallest distilled
    models, no middle block. pocket has a middle block and attention at every level. Raises BaseModelError.
    """
    if unet.get("addition_embed_type") == "text_time":
        return FAMILIES["sdxl"]
    if unet.get("use_linear_projection"):
        return FAMILIES["sd2"]
    blocks = unet.get("down_block_types", ("DownBlock2D",))
    if not isinstance(blocks, list | tuple):
        raise BaseModelError(
            f"unet/config.json: down_block_types is {blocks!r:.40}; wanted a list of names. Download it again."
        )
    if "DownBlock2D" in blocks or unet.get("mid_block_type", "") is None:
        return FAMILIES["sd1"]
    return FAMILIES["pocket"]
