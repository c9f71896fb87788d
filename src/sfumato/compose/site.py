"""One weight of a pipeline that adapters change: its original bytes, and what is applied to it now."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sfumato.compose.lowrank import Scratch, weighted_sum
from sfumato.errors import AdapterError
from sfumato.files.lora_file import LoraModule

Applied = tuple[tuple[str, float], ...]
"""(label, weight) of every adapter with a weight other than 0, sorted by label."""

_PROBES = 32


class Site:
    """The weight of one module.

    The original is copied before the first change and given up when nothing is applied any more. Adapters are stacked
    in the order of their labels, so that the same weights give the same bytes whatever happened before.
    """

    def __init__(self, part: str, path: str, module: nn.Module) -> None:
        self.part = part
        self.path = path
        self.module = module
        self.changes: dict[str, LoraModule] = {}
        self.applied: Applied = ()
        self._original: Tensor | None = None
        self._written: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The module's weight as it is now; moving the module may have replaced it."""
        weight = self.module.weight
        assert isinstance(weight, Tensor)
        return weight

    def check_untouched(self) -> None:
        """Raise AdapterError if the weight is not what was last written; moved or cast by the user is fine."""
        weight = self.weight
        if self._written is not None and not torch.equal(_probe(weight), self._written.to(weight.device, weight.dtype)):
            raise AdapterError(
                f"{self.part} module {self.path} was changed by something else since it was mixed. "
                "mix.undo() restores the base as it was; then compose again."
            )

    def forget(self, labels: Iterable[str]) -> None:
        """Drop the changes of these adapters, of which none is applied."""
        for label in labels:
            self.changes.pop(label, None)

    @torch.no_grad()
    def apply(self, wanted: Applied, scratch: Scratch) -> None:
        """Write original + the sum of the wanted changes, rounded once; the original itself for none."""
        weight = self.weight
        if weight.device.type == "meta":
            raise AdapterError(
                f"{self.part} module {self.path} is not in memory (sequential offload). "
                "Compose before it is switched on, and switch it off before anything changes."
            )
        if not wanted:
            self._restore()
            return
        if self._original is None:
            self._original = weight.detach().clone()
        elif self._original.device != weight.device:
            self._original = self._original.to(weight.device)
        total = weighted_sum(self._original, [(number, self.changes[label]) for label, number in wanted], scratch)
        low, high = torch.aminmax(total)  # NaN spreads into both
        if not float(torch.maximum(-low, high)) <= torch.finfo(weight.dtype).max:
            raise AdapterError(
                f"{self.part} module {self.path} would overflow {str(weight.dtype).removeprefix('torch.')} with "
                f"{', '.join(f'{label}={number:g}' for label, number in wanted)}. Use smaller weights, or fp32."
            )
        weight.copy_(total)
        self.applied = wanted
        self._written = _probe(weight)

    def _restore(self) -> None:
        if self._original is not None:
            self.weight.copy_(self._original)
        self.applied = ()
        self._original = self._written = None


def _probe(weight: Tensor) -> Tensor:
    """A few values of the weight, enough to notice that another program has written to it."""
    count = min(_PROBES, weight.shape[0])
    rows = torch.linspace(0, weight.shape[0] - 1, count, dtype=torch.float64).long().to(weight.device)
    probes = weight.detach()[rows, rows % weight.shape[1]]
    return probes if weight.ndim == 2 else probes[:, 0, 0]
