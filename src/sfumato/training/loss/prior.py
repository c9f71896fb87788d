"""Prior preservation: the half of each batch that keeps a class what it was while a subject is learned.

Ruiz et al. 2023, section 3.3: beside "sks otter" with the subject's pictures the model sees "otter" with pictures that
it drew itself, and the loss is the sum of both errors, the second times a weight. What the class half is to predict is
either the noise of such a picture (or its v), or the prediction of the frozen base itself, which needs no pictures.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.adapters.embeddings import embedding
from sfumato.runs.processes import MicroBatch, MicroBatches
from sfumato.runs.progress import progress_bar
from sfumato.training.additions.interface import Addition, Training
from sfumato.training.loss.objective import NoisedBatch, NoiseSettings, draw_noised, predict
from sfumato.utils import randomness
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.runs.processes import Processes
    from sfumato.training.options import TrainerOptions

KEPT_BYTES = 2**30
"""Predictions of the base that all processes together keep in memory for a run; the draws of a longer run repeat."""


def prepare_datasets(
    config: TrainerOptions,
    base: Base,
    subjects: ExampleSet,
    of_class: ExampleSet | None,
    global_batch: int,
    processes: Processes,
    *,
    embed_text: bool,
    embed_class: bool | None = None,
    drawn_over: bool = False,
) -> tuple[Dataset, Dataset | None]:
    """What is learned, and pictures of the class, if there are any, with the embeddings of just the captions that each
    will give; of the class's, which `ClassPictures` gives, none are dropped.

    config: resolved. embed_text, embed_class: whether there are embeddings at all; of the class unset, as of the
    others. drawn_over: whether what is learned will be drawn over, for which its crops must stay where they are.
    """
    assert config.steps is not None
    shared: dict[str, Any] = {"together": config.batch, "processes": processes}
    will_draw = (config.seed, config.steps, global_batch)
    dataset = config.prepare(
        subjects, base, embed_text=embed_text, will_draw=will_draw, drawn_over=drawn_over, **shared
    )
    if not of_class:
        return dataset, None
    class_set = config.prepare(
        of_class,
        base,
        caption_dropout=0.0,
        tag_dropout=0.0,
        embed_text=embed_text if embed_class is None else embed_class,
        will_draw=(class_seed(config.seed), config.steps, global_batch),
        **shared,
    )
    return dataset, class_set


class ClassPictures:
    """The class half as in the paper: pictures of the class, and their noise or v is what is to be predicted.

    data: the class pictures with their own captions. Randomness is that of the run's seed, in streams of its own.
    """

    def __init__(self, base: Base, data: Dataset, seed: int, *, noising: NoiseSettings | None = None):
        self._base, self._data, self._noising = base, data, noising
        self._seed = class_seed(seed)

    def draw(self, micro: MicroBatch) -> NoisedBatch:
        """The class's share of a step: as many samples as the subject's, drawn independently of them."""
        return draw_noised(self._base, self._data, self._seed, micro, noising=self._noising)


@dataclass(frozen=True)
class _TargetTable:
    """Targets that were computed before the training, an entry for each of the run's first steps that find room.

    room: how many steps' global batches KEPT_BYTES hold; after so many steps the draws repeat. Of a global batch of 4
    with room for 3, step 7 uses entry 1: it has the pictures, noise, timesteps and targets of step 1 again. Whole
    global batches are counted, so that the draws do not depend on which process computes which part.
    targets: by (entry, first place in the global batch), on the CPU.
    """

    room: int
    targets: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def entry_of(self, step: int) -> int:
        return step % self.room


class BasePrediction:
    """The class half whose target is what the frozen base predicts for the class prompts (Li & Hoiem 2017).

    data: pictures to be noised; those of the subject serve, because the target is a prediction and not the picture.
    Their captions are not used, so `data` needs no embeddings of them. prompts: taken in turns. order: the seed of
    which pictures are taken; where `data` is the subject's, that of its half gives each step the pictures, and so the
    shapes, of that half. embed_text: whether what is drawn holds the prompts' embeddings, as the subject's holds its
    captions'.

    The targets come in one of two ways:

    - on the fly: each is computed when it is drawn, in `pristine`, a context in which the base predicts as it did
      before the training;
    - precomputed: where there is no such context, because the base's own weights are trained, `precompute_targets`
      computes them all beforehand. Every draw is a function of (seed, step), so no second copy of the base is needed.
    """

    def __init__(
        self,
        base: Base,
        data: Dataset,
        prompts: Sequence[str],
        seed: int,
        *,
        order: int | None = None,
        pristine: Callable[[], AbstractContextManager[object]] | None = None,
        noising: NoiseSettings | None = None,
        embed_text: bool = True,
    ):
        self._order, self._embed_text = order, embed_text
        self._base, self._data, self._noising = base, data, noising
        self._prompts, self._seed, self._pristine = list(prompts), class_seed(seed), pristine
        with torch.no_grad(), base.lazy_weights.restored_after():
            self._text = embedding.encode(base, self._prompts)
        self._table: _TargetTable | None = None  # on the fly until precompute_targets() fills one

    def precompute_targets(self, steps: range, batches: MicroBatches, *, shown: bool) -> str:
        """Compute the targets of these steps while the base is the base; a line for the person. shown: with progress.

        The targets are kept in the dtype they are computed in.
        """
        one = MicroBatch(0, batches.global_batch, 0, 1)  # the same in all processes: those of other shapes take others
        sample_bytes = self._without_target(one).batch.latents.numel() * self._dtype.itemsize
        table = _TargetTable(max(1, KEPT_BYTES // (sample_bytes * batches.global_batch)))
        entries = sorted({table.entry_of(step) for step in steps})
        for entry in progress_bar(entries, "asking the base", unit="step", shown=shown):
            for micro in batches.of(entry):
                targets = self._predict(self._without_target(micro))
                table.targets[entry, micro.first] = targets.to("cpu", self._dtype)
        self._table = table
        mib = sample_bytes * batches.count * len(batches.firsts) * len(entries) / 2**20
        again = f", which repeat after {table.room} steps" if len(steps) > table.room else ""
        return f"the base's predictions for {pluralize(len(entries), 'step')}{again}: {mib:,.0f} MiB"

    def draw(self, micro: MicroBatch) -> NoisedBatch:
        """The class's share of a step: as many samples as the subject's, with noise and timesteps of their own."""
        if self._table is not None:
            entry = self._table.entry_of(micro.step)
            noised = self._without_target(dataclasses.replace(micro, step=entry))
            return dataclasses.replace(noised, target=self._table.targets[entry, micro.first].to(noised.noise))
        assert self._pristine is not None, "without a context, precompute_targets() comes first"
        noised = self._without_target(micro)
        with self._pristine():
            return dataclasses.replace(noised, target=self._predict(noised))

    @property
    def _dtype(self) -> torch.dtype:
        return self._base.precision.compute

    def _without_target(self, micro: MicroBatch) -> NoisedBatch:
        """The draw with the class prompts as its captions; its target is not the base's prediction yet."""
        noised = draw_noised(
            self._base, self._data, self._seed, micro, noising=self._noising, embed_text=False, order=self._order
        )
        rows = [(micro.step * micro.global_batch + place) % len(self._prompts) for place in micro.places]
        batch = dataclasses.replace(
            noised.batch,
            text=self._text[rows] if self._embed_text else None,
            captions=[self._prompts[row] for row in rows],
            mask=None,
            weights=torch.ones_like(noised.batch.weights),
        )
        return dataclasses.replace(noised, batch=batch)

    @torch.no_grad()
    def _predict(self, noised: NoisedBatch) -> Tensor:
        text = self._text[[self._prompts.index(caption) for caption in noised.batch.captions]]
        # With the perturbation that the adapter's input has, so that an adapter of nothing has nothing to learn.
        return predict(self._base, noised.batch, noised.seen_noise, noised.timesteps, text)


class PriorPreservation(Addition):
    """Samples of what shall be drawn as before, with `weight` in the loss; their own loss is logged as `name`.

    sources: what gives them, each as many as the trainer's own samples; each has an equal part of the weight.
    """

    def __init__(
        self, sources: Sequence[ClassPictures | BasePrediction], weight: float, device: torch.device, name: str
    ):
        self.sources, self.weight, self.device, self.name = list(sources), weight, device, name
        self._sum = torch.zeros((), device=device)

    @classmethod
    def of(cls, training: Training) -> PriorPreservation | None:
        if not training.priors:
            return None
        return cls(training.priors, training.config.prior_weight, training.precision.device, training.prior_name)

    def before_step(self, step: int) -> None:
        self._sum = torch.zeros((), device=self.device)

    def samples(self, micro: MicroBatch) -> list[NoisedBatch]:
        return [source.draw(micro) for source in self.sources]

    def loss(self, errors: Tensor, batch: int) -> Tensor | float:
        own = errors.sum() / (batch * len(self.sources))
        self._sum += own.detach()
        return self.weight * own

    def sums(self) -> list[Tensor]:
        return [self._sum]

    def figures(self) -> Mapping[str, float | Tensor]:
        return {self.name: self._sum}


def class_seed(seed: int) -> int:
    """The seed of the class half, so that its pictures, noise and timesteps are not the subject's."""
    return randomness.derive_seed(seed, "class")
