"""Sentences around a caption, so that a word learns the thing and not one way to speak of it.

Radford et al. 2021 (CLIP, the prompts for ImageNet), as Gal et al. 2022 took them up for Textual Inversion; the same
lists as in their code and in diffusers' script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from sfumato.runs.processes import MicroBatch
from sfumato.utils import randomness

_OBJECT = (
    "a photo of a {}",
    "a rendering of a {}",
    "a cropped photo of the {}",
    "the photo of a {}",
    "a photo of a clean {}",
    "a photo of a dirty {}",
    "a dark photo of the {}",
    "a photo of my {}",
    "a photo of the cool {}",
    "a close-up photo of a {}",
    "a bright photo of the {}",
    "a cropped photo of a {}",
    "a photo of the {}",
    "a good photo of the {}",
    "a photo of one {}",
    "a close-up photo of the {}",
    "a rendition of the {}",
    "a photo of the clean {}",
    "a rendition of a {}",
    "a photo of a nice {}",
    "a good photo of a {}",
    "a photo of the nice {}",
    "a photo of the small {}",
    "a photo of the weird {}",
    "a photo of the large {}",
    "a photo of a cool {}",
    "a photo of a small {}",
)
_STYLE = (
    "a painting in the style of {}",
    "a rendering in the style of {}",
    "a cropped painting in the style of {}",
    "the painting in the style of {}",
    "a clean painting in the style of {}",
    "a dirty painting in the style of {}",
    "a dark painting in the style of {}",
    "a picture in the style of {}",
    "a cool painting in the style of {}",
    "a close-up painting in the style of {}",
    "a bright painting in the style of {}",
    "a good painting in the style of {}",
    "a close-up painting in the style of {}",
    "a rendition in the style of {}",
    "a nice painting in the style of {}",
    "a small painting in the style of {}",
    "a weird painting in the style of {}",
    "a large painting in the style of {}",
)

TEMPLATES: Mapping[str, tuple[str, ...]] = MappingProxyType({"none": ("{}",), "object": _OBJECT, "style": _STYLE})
"""By name; `none` leaves a caption as it is."""


def fill_templates(captions: Sequence[str], templates: Sequence[str], seed: int, micro: MicroBatch) -> list[str]:
    """Each caption of a micro-batch in a sentence, a function of (seed, step, place in the global batch); "" stays
    empty."""

    def sentence(place: int) -> str:
        return templates[int(randomness.uniform(seed, "template", micro.step, place) * len(templates))]

    return [
        sentence(place).format(caption) if caption else ""
        for place, caption in zip(micro.places, captions, strict=True)
    ]
