"""Figures of a training that are the same whenever they are measured.

Fit: the loss on fixed pictures, noise and timesteps; it falls while the training loss only jitters.
Validation: the same on pictures that are not learned from; where it rises, what is learned is the pictures themselves.
Drift: how far the base's prediction on prompts that have nothing to do with the pictures has moved, as a share of its
size; it says what the learning costs. Neither depends on the run's seed.

The pictures that are held out of a training, as they are measured.

Plain things that no training is about: what they become tells what is lost beside what is learned.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import Tensor, nn

from sfumato.adapters.embeddings.tokens import contains_placeholder
from sfumato.data.captions import fill_template
from sfumato.data.options import Options
from sfumato.generation.draw import LATENTS_AT_ONCE
from sfumato.runs.reporting.samples import eval_mode
from sfumato.training.loss.objective import denoising_errors, predict
from sfumato.utils import randomness
from sfumato.utils.formatting import format_list, pluralize

if TYPE_CHECKING:
    from sfumato.data import Batch, Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.options import TrainerOptions


_SEED = 0
_MOST = 16
VALIDATIONS = 32
"""Samples of the pictures held out: a few pictures at a few timesteps each would tell little."""
_DRIFTS = ("class_drift", "drift")
_Noised: TypeAlias = "tuple[Batch, Tensor, Tensor]"
"""Pictures, noise and timesteps."""


class Metrics:
    """Fit, validation and drift of what is trained on one base: on at most 16 pictures, and on 32 samples of those held
    out, if there are any.

    watched: prompts for each drift, by the figure's name; what the base says of them is computed at once. pristine: a
    context in which the base predicts as it did before the training; none is needed where nothing has been trained yet.
    within: a context for all later figures, such as a running mean's `applied`. modules: what is set to evaluation
    meanwhile.
    """

    def __init__(
        self,
        base: Base,
        data: Dataset,
        watched: Mapping[str, Sequence[str]],
        *,
        pristine: Callable[[], AbstractContextManager[object]] = nullcontext,
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
        modules: Sequence[nn.Module] = (),
        held_out: Dataset | None = None,
    ):
        self._base, self._modules, self._within = base, list(modules), within
        count = min(_MOST, len(data))
        self._learned = _noised_samples(base, data, count)
        self._held_out = None if held_out is None else _noised_samples(base, held_out, VALIDATIONS)
        self._watched = {name: [prompts[i % len(prompts)] for i in range(count)] for name, prompts in watched.items()}
        with pristine():
            self._before = {name: self._predict(prompts) for name, prompts in self._watched.items()}

    def values(self) -> dict[str, float]:
        """All figures, by name."""
        with self._within(), self._base.lazy_weights.restored_after():
            self._base.lazy_weights.load("text")  # once for all figures, where it rests
            validation = {} if self._held_out is None else {"validation": self._validation(self._held_out)}
            return {"fit": self.fit(), **validation, **{name: self.drift(name) for name in self._watched}}

    def fit(self) -> float:
        """Mean squared error of the prediction, no weights."""
        return self._loss([(dataclasses.replace(batch, mask=None), noise, at) for batch, noise, at in self._learned])

    def _validation(self, samples: Sequence[_Noised]) -> float:
        """The same of pictures held out, within their masks: of what lies outside of them nothing was learned."""
        return self._loss(samples)

    @torch.no_grad()
    def _loss(self, samples: Sequence[_Noised]) -> float:
        errors = []
        with eval_mode(self._modules), self._base.lazy_weights.restored_after():
            for batch, noise, timesteps in samples:
                plain = dataclasses.replace(batch, weights=torch.ones_like(batch.weights))
                with warnings.catch_warnings():  # what is cut from a caption was said before training
                    warnings.filterwarnings("ignore", message="prompt of")
                    text = self._base.encode_text(plain.captions)
                errors.append(denoising_errors(self._base, plain, noise, timesteps, text))
        return float(torch.cat(errors).mean())

    def drift(self, name: str = "drift") -> float:
        """Norm of the change of the prediction over the norm of the base's prediction."""
        before = self._before[name].float()
        return float((self._predict(self._watched[name]).float() - before).norm() / before.norm())

    @torch.no_grad()
    def _predict(self, prompts: list[str]) -> Tensor:
        left, predictions = iter(prompts), []
        with eval_mode(self._modules), self._base.lazy_weights.restored_after():
            for batch, noise, timesteps in self._learned:
                text = self._base.encode_text([*islice(left, len(batch))])
                untold = dataclasses.replace(batch, known=None)  # an inpainting model has the prompt alone
                predictions.append(predict(self._base, untold, noise, timesteps, text))
        return torch.cat([each.flatten() for each in predictions])  # which may be of several sizes


def _noised_samples(base: Base, data: Dataset, count: int) -> list[_Noised]:
    """So many samples of the pictures, at timesteps from all of the base's."""
    # No more at once than are drawn at once: a training that fits does so with few pictures a step.
    batches = list(data.middles(count, LATENTS_AT_ONCE * base.vae_factor**2))
    sizes = [len(batch) for batch in batches]
    places = torch.split(torch.arange(count), sizes)
    noise = [_noise(batch, at) for batch, at in zip(batches, places, strict=True)]
    # By lot, so that no size of picture has the noisy timesteps to itself.
    order = torch.tensor(randomness.permutation(count, _SEED, "measure"))
    timesteps = ((order + 0.5) / count * len(base.alpha_bar)).long().to(batches[0].latents.device)
    return list(zip(batches, noise, torch.split(timesteps, sizes), strict=True))


def _noise(batch: Batch, places: Tensor) -> Tensor:
    shape = tuple(batch.latents.shape[1:])
    return torch.stack([randomness.normal(shape, _SEED, "measure", 0, int(at)) for at in places]).to(batch.latents)


class DriftLimit:
    """Says when the base has moved further than `limit` allows; without a limit never.

    reached: the figure that did, such as "class_drift 0.312", empty before. rows: the log of a run that goes on.
    """

    def __init__(self, limit: float | None, rows: Sequence[Mapping[str, float]] = ()):
        self.limit = limit
        self.reached = ""
        measured = [row for row in rows if any(name in row for name in _DRIFTS)]
        if measured:
            self._take(measured[-1])

    def watching(self, run: Run, metrics: Metrics, processes: Processes) -> Callable[[int], None]:
        """What measures at a step, logs it, and ends the run where the limit is reached; a run that goes on with a
        limit that was reached before ends at once."""
        if self.reached:
            run.end()

        def measure(step: int) -> None:
            figures: dict[str, float] = {}
            try:
                figures = metrics.values()
                run.log(step=step, **figures)
            finally:  # of several processes all agree, also where the memory of one holds no measurement
                self.update(figures, processes)
            if self.reached:
                run.end()

        return measure

    def tell(self, run: Run, steps: int) -> None:
        """Of a run that it ended before the last of its steps: say so."""
        if self.reached and run.step < steps:
            run.say(f"stopped after step {run.step}: {self.reached} is over --drift-limit {self.limit}")

    def update(self, figures: Mapping[str, float], processes: Processes) -> None:
        """Take a measurement in; all processes agree."""
        self._take(figures)
        if self.limit is not None and processes.largest(int(bool(self.reached))):
            self.reached = self.reached or "the drift of another process"

    def _take(self, figures: Mapping[str, float]) -> None:
        over = [name for name in _DRIFTS if self.limit is not None and figures.get(name, 0.0) > self.limit]
        self.reached = f"{over[0]} {figures[over[0]]:.3f}" if over else ""


def prepare_validation(
    config: TrainerOptions, base: Base, examples: ExampleSet, processes: Processes
) -> Dataset | None:
    """The pictures that are held out, each as it is: not mirrored, never cut at random, its caption whole, of
    wildcards with the first alternatives; None where there are none. config: resolved."""
    held_out = examples.in_group("validation")
    if not held_out:
        return None
    plain = Options(flip=False, caption_dropout=0.0, shuffle_tags=False, keep_tags=0, tag_dropout=0.0)
    as_they_are = []
    for each in held_out:
        crop = each.options.crop or config.crop
        crop = "center" if crop == "random" else crop
        options = dataclasses.replace(plain, crop=crop, resolution=each.options.resolution)
        caption, *further = each.said
        as_they_are.append(
            dataclasses.replace(each, repeats=1, options=options, caption=caption, further=tuple(further))
        )
    chosen = dataclasses.replace(held_out, examples=tuple(as_they_are))
    dataset = config.prepare(chosen, base, embed_text=False, measured=VALIDATIONS, processes=processes)
    names = format_list([each.path.name for each in held_out])
    dataset.notes.append(f"{pluralize(len(dataset), 'image is', 'images are')} held out for validation: {names}")
    return dataset


UNRELATED = ("a ball", "a dog", "a house", "a car", "a tree", "a chair", "a bird", "a cup")
"""Plain things that most bases can draw, prompts for the drift in this order: samples show some."""
_CLEAR = ("a dog", "a car", "a tree")
"""Those that also pocket draws so that one sees what they are: beside the others nobody could tell what a training
has cost."""


def unrelated_to(prompts: Sequence[str]) -> list[str]:
    """The plain things without those that one of the prompts is about, as "a dog" is of no use beside the class dog."""
    found = [
        thing for thing in UNRELATED if not any(contains_placeholder(thing.split()[-1], prompt) for prompt in prompts)
    ]
    return found or list(UNRELATED)


def recognizable_first(things: Sequence[str]) -> list[str]:
    """The things in the order in which samples show them: those first that any base draws."""
    return sorted(things, key=lambda thing: thing not in _CLEAR)


def default_prompts(captions: Sequence[str], template: str | None, trigger: str | None) -> list[str]:
    """Two captions, and two plain things put into the caption template; none twice."""
    form = template or ("{caption}, {trigger}" if trigger else "{caption}")
    unseen = [fill_template(form, thing, trigger) for thing in recognizable_first(UNRELATED)[:2]]
    return list(dict.fromkeys([*captions[:2], *unseen]))
