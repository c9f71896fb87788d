"""What can be added to a training: new words, prior preservation, crossed samples, an average of the weights.

Each is a class with the hooks of `Addition` that it needs, and a row of `addition_table.ADDITIONS`. A trainer's loop
calls the hooks of all of them at once, by `Additions`, and names none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sfumato.adapters.embeddings.added_tokens import Words
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.precision import Precision
    from sfumato.runs.processes import MicroBatch, MicroBatches, Processes
    from sfumato.runs.run import Run
    from sfumato.training.loss.objective import NoisedBatch


class Addition:
    """Something that takes part in a training. The hooks stand in the order in which they are called in a step.

    A subclass overrides what it needs; each hook here does nothing.
    """

    @classmethod
    def of(cls, training: Training) -> Addition | None:
        """The addition that this training's options ask for; None where they do not."""
        raise NotImplementedError(f"{cls.__name__} has no of(training), by which a training would get it")

    def parameters(self) -> Sequence[nn.Parameter]:
        """What it trains beside what the trainer trains."""
        return ()

    def groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups of `parameters`, which come after the trainer's own."""
        return []

    def kept(self) -> Mapping[str, Any]:
        """What a checkpoint holds, by its name there: anything with `state_dict` and `load_state_dict`."""
        return {}

    def before_step(self, step: int) -> None:
        """Called once before an optimizer step, which counts from 0."""

    def change(self, noised: NoisedBatch, micro: MicroBatch) -> NoisedBatch:
        """What becomes of the trainer's samples of a micro-batch."""
        return noised

    def samples(self, micro: MicroBatch) -> list[NoisedBatch]:
        """Further samples that are computed with those of a micro-batch."""
        return []

    def loss(self, errors: Tensor, batch: int) -> Tensor | float:
        """What is added to the loss of a micro-batch. errors: (n,), those of its own `samples`. batch: the samples of
        the whole step, by which a sum of errors becomes a mean."""
        return 0.0

    def after_gradients(self) -> None:
        """Called when all gradients of this process are there, before processes sum them."""

    def sums(self) -> list[Tensor]:
        """Numbers of the step that processes sum, in place, such as a loss of its own."""
        return []

    def after_step(self) -> None:
        """Called after the optimizer's step; not after one that was skipped because of NaN or infinity."""

    def figures(self) -> Mapping[str, float | Tensor]:
        """Numbers of the step for the log, by name; tensors that no later step changes, for they are read later."""
        return {}

    def applied(self) -> AbstractContextManager[None]:
        """A context in which the weights are those that would be saved."""
        return nullcontext()

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Give these weights, which learn no more, the values that would be saved."""

    def finish(self) -> None:
        """Called after the last step, before what was learned is written."""

    def close(self) -> None:
        """Called when all is written."""


class Additions(Addition):
    """Several additions as one: each hook calls theirs, in their order."""

    def __init__(self, additions: Iterable[Addition] = ()):
        self.each: list[Addition] = []
        self._sizes: list[int] = []
        for addition in additions:
            self.append(addition)

    def append(self, addition: Addition) -> None:
        """Take in one more."""
        self.each.append(addition)
        self._sizes.append(0)

    def parameters(self) -> Sequence[nn.Parameter]:
        return [parameter for one in self.each for parameter in one.parameters()]

    def groups(self) -> list[dict[str, Any]]:
        return [group for one in self.each for group in one.groups()]

    def kept(self) -> Mapping[str, Any]:
        return {name: part for one in self.each for name, part in one.kept().items()}

    def before_step(self, step: int) -> None:
        for one in self.each:
            one.before_step(step)

    def change(self, noised: NoisedBatch, micro: MicroBatch) -> NoisedBatch:
        for one in self.each:
            noised = one.change(noised, micro)
        return noised

    def samples(self, micro: MicroBatch) -> list[NoisedBatch]:
        found = [one.samples(micro) for one in self.each]
        self._sizes = [sum(len(part.batch) for part in own) for own in found]
        return [part for own in found for part in own]

    def loss(self, errors: Tensor, batch: int) -> Tensor | float:
        """errors: of all `samples`, in their order."""
        own = torch.split(errors, self._sizes) if self.each else ()
        return sum((one.loss(part, batch) for one, part in zip(self.each, own, strict=True)), 0.0)

    def after_gradients(self) -> None:
        for one in self.each:
            one.after_gradients()

    def sums(self) -> list[Tensor]:
        return [number for one in self.each for number in one.sums()]

    def after_step(self) -> None:
        for one in self.each:
            one.after_step()

    def figures(self) -> Mapping[str, float | Tensor]:
        return {name: value for one in self.each for name, value in one.figures().items()}

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            for one in self.each:
                stack.enter_context(one.applied())
            yield

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        settled = list(parameters)
        for one in self.each:
            one.settle(settled)

    def finish(self) -> None:
        for one in self.each:
            one.finish()

    def close(self) -> None:
        for one in self.each:
            one.close()


@dataclass
class Training:
    """A training that has been prepared: its data is encoded, its base loaded, its run opened. What a trainer's loop
    and the additions take what they need from.

    config: resolved. subjects: the examples that are learned, `dataset` when encoded; class_set, held_out: those of a
    class, which `class_captions` name, and those of which nothing is learned. trained: the adapter, or the modules that
    are trained whole. words: new words that learn. priors: what gives samples for prior preservation, whose mean loss
    is logged as `prior_name`.
    """

    config: Any
    processes: Processes
    precision: Precision
    base: Base
    run: Run
    batches: MicroBatches
    dataset: Dataset
    trained: Any
    subjects: ExampleSet | None = None
    _: KW_ONLY
    class_set: Dataset | None = None
    class_captions: Sequence[str] = ()
    held_out: Dataset | None = None
    words: Words | None = None
    priors: list[Any] = field(default_factory=list)
    prior_name: str = "prior_loss"
    added: Additions = field(default_factory=Additions)

    def parameters(self) -> list[nn.Parameter]:
        """All that is trained, that of the additions so far last."""
        return [*self.trained.parameters(), *self.added.parameters()]

    def end(self, path: Path, write: Callable[[], None]) -> Path:
        """After the last step: have one process write what was learned, let the run's folder go, and return `path`."""
        self.added.finish()
        if self.processes.is_main:
            write()
        self.added.close()
        self.run.close()
        self.processes.wait()
        return path


def backward(scaler: torch.amp.GradScaler, loss: Tensor) -> None:
    """The backward pass of a micro-batch's scaled loss; none where no weight has a part in it, as where words learn
    alone and SDXL has zeros for all of the batch's captions."""
    scaled = scaler.scale(loss)  # in any case: the first makes the scale
    if scaled.requires_grad:
        scaled.backward()  # type: ignore[no-untyped-call]
