"""Adapters that change no weight, in a mix: what they add to a module's answer, for as long as they count."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.compose.layers.fused import Applied
from sfumato.compose.layers.lowrank import Scratch
from sfumato.compose.layers.unfused import UnfusedLayer
from sfumato.files.kinds import ModuleAdapter
from sfumato.files.kinds.modules import Call, first_output, with_first


class Placed:
    """An adapter where and in which dtype the model computes, from the file's own numbers: a copy for each."""

    def __init__(self, adapter: ModuleAdapter) -> None:
        self._adapter = adapter
        self._ready: tuple[tuple[torch.device, torch.dtype], ModuleAdapter] | None = None

    def added(self, call: Call, strength: float) -> Tensor:
        """What it adds to the call's output, of that one's dtype."""
        x = call.output
        autocast = torch.is_autocast_enabled(x.device.type)
        where = x.device, torch.get_autocast_dtype(x.device.type) if autocast else x.dtype
        ready = self._ready  # once, as another thread may move it meanwhile
        if ready is None or ready[0] != where:
            with torch.inference_mode(False), torch.no_grad():
                moved = copy.deepcopy(self._adapter).requires_grad_(False).to(*where)
            ready = self._ready = where, moved
        return ready[1].added(call, strength).to(x.dtype)


class Beside(UnfusedLayer):
    """The adapters of a mix beside one module of any class, each of which sees the module's own answer.

    No weight is touched: a forward hook adds the shares, and taking it away leaves the base.
    """

    way = "beside"
    name = "output"

    def __init__(self, part: str, path: str, module: nn.Module) -> None:
        super().__init__(part, path, module, torch.float32, torch.device("cpu"))
        self.place = (part, path, self.name)
        self._placed: dict[str, Placed] = {}

    @property
    def is_bare(self) -> bool:
        """Whether nothing stands beside the module yet."""
        return self._handle is None

    def forget(self, labels: Iterable[str]) -> None:
        """Drop these adapters, of which none is applied."""
        for label in labels:
            self.effects.pop(label, None)
            self._placed.pop(label, None)

    def rebuilds(self, wanted: Applied) -> bool:
        """Whether these weights take a hook that is not there yet."""
        return bool(wanted) and self._handle is None

    def apply(self, wanted: Applied, scratch: Scratch) -> None:
        """Bring the module's answers to these weights."""
        for label, _ in wanted:
            if label not in self._placed:
                change = self.effects[label].change
                assert isinstance(change, ModuleAdapter)
                self._placed[label] = Placed(change)
        self.applied = wanted
        if wanted and self._handle is None:
            self._handle = self.module.register_forward_hook(self._answer, with_kwargs=True)

    def set_aside(self, other: Applied | None, scratch: Scratch) -> None:
        """Hold these weights, for `exchange`; None for nothing."""
        self.other = other

    def exchange(self) -> None:
        """Answer by the weights that were set aside; at the next call as before."""
        self._exchanged = not self._exchanged

    def restore(self) -> None:
        """Let the module answer by itself."""
        self.remove_hook()
        self.applied, self.other, self._placed = (), None, {}

    def _answer(self, module: nn.Module, args: tuple[Any, ...], options: Mapping[str, Any], answer: Any) -> Any:
        numbers = self.other if self._exchanged and self.other is not None else self.applied
        output = first_output(answer)
        if output is None or not numbers:
            return answer
        call, total = Call(module, args, options, output), output
        for label, number in numbers:
            total = total + self._placed[label].added(call, number)
        return with_first(answer, total)


def with_rows(call: Call, pictures: Sequence[int], terms: Sequence[Sequence[tuple[float, Placed]]]) -> Tensor:
    """The call's output with what the adapters of each row's picture add.

    pictures: that of each row. terms: for each picture its adapters with their weights.
    """
    total = call.output.clone()
    for picture, own in enumerate(terms):
        rows = [row for row, each in enumerate(pictures) if each == picture]
        if rows and own:
            part = call.of_rows(rows)
            total[rows] = sum((placed.added(part, number) for number, placed in own), total[rows])
    return total


def under_masks(call: Call, terms: Sequence[tuple[int, float, Placed]], masks: Callable[[Tensor], Tensor]) -> Tensor:
    """The call's output with what each region's adapters add under its mask.

    terms: (region, weight now, adapter). masks: from the output to the regions' masks at its resolution, such that
    one region's broadcasts with it.
    """
    under, total = masks(call.output), call.output
    for place, number, placed in terms:
        if number:
            total = total + placed.added(call, number) * under[place]
    return total
