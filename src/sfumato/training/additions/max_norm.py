"""Limiting the norm of each layer's update after every step (scale_weight_norms in sd-scripts)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sfumato.adapters import Attached
from sfumato.training.additions.interface import Addition, Training


class MaxNorm(Addition):
    """Keeps the norm of each update of `adapter` at `most`; logs as `limited` how many were above it."""

    def __init__(self, adapter: Attached, most: float):
        self.adapter, self.most = adapter, most
        self._limited: Tensor | float = 0.0

    @classmethod
    def of(cls, training: Training) -> MaxNorm | None:
        most = getattr(training.config, "max_norm", None)
        return cls(training.trained, most) if most and isinstance(training.trained, Attached) else None

    def after_step(self) -> None:
        self._limited = self.adapter.limit_norms(self.most)

    def figures(self) -> Mapping[str, float | Tensor]:
        return {"limited": self._limited}
