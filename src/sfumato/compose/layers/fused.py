"""One weight of a pipeline into which adapters are summed: its original bytes, and what is applied to it now."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from sfumato.compose.layers.lowrank import Scratch, write_sum
from sfumato.compose.layers.original_weights import find_original
from sfumato.errors import AdapterError
from sfumato.files.kinds import Change, LoraModule
from sfumato.precision import quantization

Applied = tuple[tuple[str, float], ...]
"""(label, weight) of every adapter with a weight other than 0, sorted by label."""

_PROBES = 32


@dataclass(frozen=True)
class Effect:
    """What one adapter does to one weight: in its low-rank form where there is one."""

    change: Change
    low_rank: LoraModule | None

    @classmethod
    def of(cls, change: Change) -> Effect:
        return cls(change, change.low_rank())

    @property
    def is_zero(self) -> bool:
        """Whether it has a low-rank form that changes nothing."""
        return self.low_rank is not None and self.low_rank.is_zero


Method = TypeVar("Method", bound=Callable[..., Any])


def _in_inference_mode(method: Method) -> Method:
    """Of a pipeline that was made in inference mode: its weights can be written to in that mode alone."""

    @wraps(method)
    def called(site: FusedWeight, *args: Any, **options: Any) -> Any:
        weight = quantization.stored_tensor(site.module, site.name)  # it may be elsewhere at present, and not be needed
        with torch.inference_mode() if weight is not None and weight.is_inference() else nullcontext():
            return method(site, *args, **options)

    return cast(Method, called)


class FusedWeight:
    """A weight or bias of one module, with the adapters' changes within it.

    The original is kept from the first change on until no adapter of the mix speaks of the weight. Low-rank changes are
    stacked in the order of their labels and the others follow in that order, so that the same weights give the same
    bytes whatever happened before. Changes that depend on the weight are taken on the original.
    """

    way = "baked"

    def __init__(self, part: str, path: str, module: nn.Module, name: str) -> None:
        self.part = part
        self.path = path
        self.module = module
        self.name = name
        self.effects: dict[str, Effect] = {}
        self.applied: Applied = ()
        self.original: Tensor | None = None
        self.candidates: Sequence[Tensor] = ()
        self._written: Tensor | None = None
        self.other: Applied | None = None
        self._aside: Tensor | None = None
        self._is_of_inference = False

    @property
    def place(self) -> tuple[str, str, str]:
        return self.part, self.path, self.name

    @property
    def title(self) -> str:
        return f"{self.part} module {self.path}" + ("" if self.name == "weight" else f" ({self.name})")

    @property
    def weight(self) -> Tensor:
        """The tensor as it is now; moving the module may have replaced it. Without rows that it got since, as an
        embedding gets them for new words."""
        weight = quantization.stored_tensor(self.module, self.name)
        if weight is None or weight.device.type == "meta":
            raise AdapterError(
                f"{self.title} is not in memory (offloaded to disk, or an empty shell). Compose before it is offloaded."
            )
        if self.original is not None and len(self.original) < len(weight):
            return weight.detach()[: len(self.original)]
        return weight

    def check_untouched(self) -> None:
        """Raise AdapterError if the weight is not what was last written; moved or cast by the user is fine."""
        if self._written is None:
            return
        now = _probe(self.weight)
        written = self._written
        if written.device != now.device or written.dtype != now.dtype:
            written = written.to(now.device, now.dtype)
        if not torch.equal(now, written):
            raise AdapterError(
                f"{self.title} is not what was mixed: something else wrote to it, or it was cast to fewer bits and "
                "back. mix.undo() restores the base as it was; then compose again."
            )

    def forget(self, labels: Iterable[str]) -> None:
        """Drop the changes of these adapters, of which none is applied."""
        for label in labels:
            self.effects.pop(label, None)

    @_in_inference_mode
    def apply(self, wanted: Applied, scratch: Scratch) -> None:
        """Write original + the sum of the wanted changes, rounded once; the original itself for none.

        Called without gradients. Raises AdapterError after a sum that is not finite was written: apply the earlier
        state again.
        """
        weight = self.weight
        pristine, self.applied = not self.applied, wanted
        if not wanted:
            if self.original is None:
                return
            if not pristine:
                weight.copy_(self.original)
        else:
            kept = cache(lambda: self._kept(weight))  # of a GPU's weight it may lie in main memory
            terms, dense = self._split(wanted, kept)
            original = kept if self.original is None else kept()
            if not write_sum(weight, original, terms, dense, scratch, pristine=pristine):
                raise overflow_message(self.title, weight.dtype, wanted)
        self._written = _probe(weight)

    @_in_inference_mode
    def set_aside(self, other: Applied | None, scratch: Scratch) -> None:
        """Hold what the weight is with these changes alone, for `exchange`; None for nothing. Called without gradients.

        The original itself serves for no changes, where it has the weight's layout.
        """
        self.other = other
        self._is_of_inference = self.weight.is_inference()  # torch lets such a one have no other memory
        if other is None or other == self.applied:
            self._aside = None
            return
        if other:
            wanted = self.applied
            self.apply(other, scratch)
            self._aside = self.weight.detach().clone(memory_format=torch.preserve_format)
            self.apply(wanted, scratch)
            return
        weight = self.weight
        original = self._kept(weight)
        same = original.stride() == weight.stride() and original.dtype == weight.dtype
        self._aside = original if same else torch.empty_like(weight).copy_(original)

    @torch.no_grad()
    @_in_inference_mode
    def exchange(self, *, in_place: bool = False) -> None:
        """What was set aside in the weight's place, and that aside; at the next call the other way around.

        in_place: by copying, for a weight whose memory somebody else holds on to.
        """
        if self._aside is None:
            return
        weight = self.weight
        if in_place or self._is_of_inference:
            held = weight.detach().clone(memory_format=torch.preserve_format)
            weight.copy_(self._aside)
            self._aside = held
            return
        aside = self._aside.to(weight.device, weight.dtype)
        self._aside, weight.data = weight.data, aside

    def _kept(self, weight: Tensor) -> Tensor:
        """The original on the weight's device; from the first call on something holds it."""
        if self.original is None:
            self.original, self.candidates = find_original(weight, self.candidates), ()
        return self.original if self.original.device == weight.device else self.original.to(weight.device)

    def _split(
        self, wanted: Applied, kept: Callable[[], Tensor]
    ) -> tuple[list[tuple[float, LoraModule]], Tensor | None]:
        """(the terms with a low-rank form, the weighted sum of the others' deltas in fp32)."""
        terms: list[tuple[float, LoraModule]] = []
        dense: Tensor | None = None
        for label, number in wanted:
            effect = self.effects[label]
            if effect.low_rank is not None:
                terms.append((number, effect.low_rank))
                continue
            delta = effect.change.delta(kept())
            dense = delta * number if dense is None else dense.add_(delta, alpha=number)
        return terms, dense

    @torch.no_grad()
    @_in_inference_mode
    def restore(self) -> None:
        """Put back the original's very bytes, whatever was done to the weight since, and give it up."""
        if self.original is not None and self._written is not None:
            self.weight.copy_(self.original)
        self.applied, self.original, self._written, self.candidates = (), None, None, ()
        self.other, self._aside = None, None


def overflow_message(title: str, dtype: torch.dtype, applied: Applied) -> AdapterError:
    """What is said of weights whose sum the dtype cannot hold."""
    numbers = ", ".join(f"{label}={number:g}" for label, number in applied)
    return AdapterError(
        f"{title} would overflow {quantization.dtype_name(dtype)} with {numbers}. Use smaller weights, or fp32."
    )


def _probe(weight: Tensor) -> Tensor:
    """A few values of the weight, enough to notice that another program has written to it."""
    count = min(weight.shape[:2])
    step = max(1, count // _PROBES)
    diagonal = sum(weight.stride()[:2]) * step
    return weight.detach().as_strided((-(-count // step),), (diagonal,)).clone()
