"""One optimizer step, as a trainer sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.amp import GradScaler

    from sfumato.runs.run import Run


@dataclass
class Step:
    """number counts from 0. rate_factor: what the learning rate is multiplied with, for `Schedule.set`."""

    number: int
    rate_factor: float
    run: Run
    skipped: bool = False

    def healthy(self, scaler: GradScaler | None = None, **numbers: float | Tensor) -> bool:
        """Whether the step may change the weights: whether these numbers, such as loss and gradient_norm, are finite.

        Where fp16 is scaled, gradients that overflow are the scaler's ordinary business: it skips the step and lowers
        its scale, until that is below 1 and nothing is left to lower.
        """
        if scaler is not None and scaler.is_enabled() and scaler.get_scale() >= 1:
            numbers.pop("gradient_norm", None)
        self.skipped = not self.run.check_numbers(self.number, numbers)
        return not self.skipped

    def done(self, **values: float | Tensor) -> None:
        """Log the step; `loss` and `rate` are also shown. A skipped step is logged as that."""
        if self.skipped:
            self.run.note({"step": self.number + 1, "skipped": 1})
            return
        self.run.check_weights(self.number)
        self.run.note({"step": self.number + 1, **values})
