"""What a slider learns: to move images one way at weight 1 and the other way at weight -1.

Gandikota et al. 2024, "Concept Sliders". The two ways are named by prompts (section 4.1), or shown by pairs of images
(section 4.2).
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sfumato.adapters.embeddings import embedding
from sfumato.errors import ConfigError
from sfumato.runs.processes import MicroBatch, MicroBatches
from sfumato.runs.reporting.samples import Draw, eval_mode
from sfumato.training.loss.objective import NoisedBatch, NoiseSettings, draw_noised, per_sample_losses, predict
from sfumato.training.loss.validation import Metrics
from sfumato.utils import randomness
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from PIL import Image

    from sfumato.adapters import Attached
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base

WEIGHTS = (1.0, -1.0)
"""The weights at which a slider is trained, in the order of `Way.draw`."""
PLACEHOLDER = "{concept}"
_MEASURED = 16
"""Samples of the fit, or a few more so that batches are full."""


@dataclass(frozen=True)
class SliderPrompts:
    """A prompt that a slider acts on, and the prompts of what it moves to at weights 1 and -1."""

    concept: str
    more: str
    less: str

    @property
    def prompts(self) -> list[str]:
        """Each once."""
        return list(dict.fromkeys((self.concept, self.more, self.less)))


def slider_prompts(concepts: Sequence[str], more: Sequence[str], less: Sequence[str]) -> list[SliderPrompts]:
    """The ends of each concept, which `{concept}` stands for in the others. more, less: one for all concepts, or one
    for each; less: none for the concepts themselves.

    Raises ConfigError for other numbers of prompts, a concept that comes twice, and where both ends are the same.
    """
    for option, given in (("--more", more), ("--less", less)):
        if len(given) not in (1, len(concepts)) and not (option == "--less" and not given):
            times, each = pluralize(len(given), "time"), pluralize(len(concepts), "concept")
            raise ConfigError(f"{option} is given {times} for {each}; give it once for all or once for each.")
    found: dict[str, SliderPrompts] = {}
    for place, concept in enumerate(concepts):
        of_this = (prompts[place % len(prompts)] for prompts in (more, less or [PLACEHOLDER]))
        up, down = (prompt.replace(PLACEHOLDER, concept) for prompt in of_this)
        if up == down:
            raise ConfigError(f"--more and --less are both {up!r}; a slider needs two different ends.")
        if concept in found:
            raise ConfigError(f"--concept {concept!r} is given twice; give each concept once.")
        found[concept] = SliderPrompts(concept, up, down)
    return list(found.values())


@dataclass(frozen=True)
class DrawnImage:
    """An image that the base model draws for a slider: the prompt it is drawn with, the concept it is learned as."""

    prompt: str
    concept: str


def drawn_images(ends: Sequence[SliderPrompts], count: int) -> list[DrawnImage]:
    """So many images to draw, of each prompt of each concept in turn: the slider meets what lies between its ends."""
    each = [DrawnImage(prompt, one.concept) for one in ends for prompt in one.prompts]
    return [each[place % len(each)] for place in range(count)]


def prompt_counts(images: Sequence[DrawnImage]) -> Counter[str]:
    """How many images are to be drawn with each prompt."""
    return Counter(image.prompt for image in images)


def learned_as_concepts(images: Sequence[DrawnImage], drawn: ExampleSet) -> ExampleSet:
    """What was drawn, with the concepts as captions. drawn: the images of `prompt_counts`, each with its prompt."""
    from sfumato.data import Example, ExampleSet

    paths: dict[str, Iterator[Path]] = {
        prompt: iter([example.path for example in drawn if example.caption == prompt])
        for prompt in prompt_counts(images)
    }
    return ExampleSet(tuple(Example(next(paths[image.prompt]), image.concept) for image in images))


def of_concept(examples: ExampleSet, concept: str) -> ExampleSet:
    """The images with the concept as the caption of every sample, whatever their own options say of captions."""
    from sfumato.training.methods.subject import with_caption

    whole: dict[str, Any] = {"caption_dropout": 0.0, "tag_dropout": 0.0, "shuffle_tags": False, "keep_tags": 0}
    found = with_caption(examples, concept)
    each = (
        dataclasses.replace(example, options=dataclasses.replace(example.options, **whole), kept_tags={})
        for example in found
    )
    return dataclasses.replace(found, examples=tuple(each))


class SliderObjective(Protocol):
    """How a slider is told its two ways."""

    def draw(self, seed: int, micro: MicroBatch) -> tuple[NoisedBatch, NoisedBatch]:
        """Samples with what is to be predicted of them at each of WEIGHTS."""


class PromptObjective:
    """The ends are prompts: at weight 1 the prediction for the concept moves by the difference of the frozen base's
    predictions for the ends, at weight -1 by as much the other way.

    Eq. 8 of Gandikota et al. 2024: e(x_t, concept) + weight * strength * (e(x_t, more) - e(x_t, less)), with eta for
    the strength. data: images that the base model drew, with the concepts as captions. pristine: a context in which the
    base predicts as it did before the training.
    """

    def __init__(
        self,
        base: Base,
        data: Dataset,
        ends: Sequence[SliderPrompts],
        strength: float,
        *,
        pristine: Callable[[], AbstractContextManager[object]],
        noising: NoiseSettings,
    ):
        self._base, self._data, self._strength = base, data, strength
        self._pristine, self._noising = pristine, noising
        self._concepts = [one.concept for one in ends]
        with torch.no_grad(), base.lazy_weights.restored_after():
            kinds = [[one.concept for one in ends], [one.more for one in ends], [one.less for one in ends]]
            self._text = [embedding.encode(base, prompts) for prompts in kinds]

    @torch.no_grad()
    def draw(self, seed: int, micro: MicroBatch) -> tuple[NoisedBatch, NoisedBatch]:
        """The same samples twice, with opposite targets."""
        noised = draw_noised(self._base, self._data, seed, micro, noising=self._noising)
        rows = [self._concepts.index(caption) for caption in noised.batch.captions]
        # With the perturbation that the adapter's input has, so that an adapter of nothing has nothing to learn.
        noise = noised.seen_noise
        with self._pristine():
            middle, more, less = (
                predict(self._base, noised.batch, noise, noised.timesteps, text[rows]) for text in self._text
            )
        change = self._strength * (more.float() - less.float())
        up, down = (dataclasses.replace(noised, target=middle.float() + weight * change) for weight in WEIGHTS)
        return up, down


class ImagePairObjective:
    """The ends are pairs of images: at weight 1 the noise of the one is to be predicted, at weight -1 that of the
    other, which has the same noise and caption (Gandikota et al. 2024, section 4.2)."""

    def __init__(self, base: Base, more: Dataset, less: Dataset, *, noising: NoiseSettings):
        self._base, self._more, self._less, self._noising = base, more, less, noising

    def draw(self, seed: int, micro: MicroBatch) -> tuple[NoisedBatch, NoisedBatch]:
        """Both images of the same pairs."""
        up, down = (
            draw_noised(self._base, data, seed, micro, noising=self._noising) for data in (self._more, self._less)
        )
        return up, down


class SliderMetrics(Metrics):
    """Figures of a slider's training. Fit: the error at weights 1 and -1 on fixed samples, as a share of the base's, so
    that it is 1 for an adapter that does nothing. Drift: as of all, at weight 1.

    data: whose images the drift is measured with. batch: samples that are predicted at once.
    """

    def __init__(
        self,
        base: Base,
        data: Dataset,
        watched: Mapping[str, Sequence[str]],
        adapter: Attached,
        way: SliderObjective,
        batch: int,
        *,
        within: Callable[[], AbstractContextManager[object]],
    ):
        super().__init__(base, data, watched, pristine=adapter.disabled, within=within, modules=[adapter])
        self._adapter, self._way = adapter, way
        firsts = range(0, _MEASURED, batch)
        self._samples = MicroBatches(len(firsts) * batch, tuple(firsts), batch)
        self._sample_seed = randomness.derive_seed(0, "measure")

    def fit(self) -> float:
        """As the adapter is now."""
        return self._error() / self._error_of_base

    @cached_property
    def _error_of_base(self) -> float:
        """Not before it is asked for: a run may measure nothing."""
        with self._adapter.disabled():
            return self._error()

    @torch.no_grad()
    def _error(self) -> float:
        found: list[Tensor] = []
        with eval_mode([self._adapter]):
            for micro in self._samples.of(0):
                for weight, noised in zip(WEIGHTS, self._way.draw(self._sample_seed, micro), strict=True):
                    with self._adapter.scaled(weight):
                        found.append(per_sample_losses(self._base, [noised], encode=False))
        return float(torch.cat(found).mean())


def drawing_at_weights(adapter: Attached, draw: Draw, weights: Sequence[float]) -> Draw:
    """Draws a list of prompts that holds the same ones for each of the weights, one weight after another."""

    def drawing(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        count, pictures = len(prompts) // len(weights), []
        for place, weight in enumerate(weights):
            part = slice(place * count, (place + 1) * count)
            with adapter.scaled(weight):
                pictures += draw(prompts[part], seeds[part])
        return pictures

    return drawing
