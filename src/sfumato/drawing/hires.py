"""A second pass in which a picture is drawn again, larger: the web interfaces' hires fix."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from numbers import Real
from typing import Any

from sfumato.drawing.sizes import near_side
from sfumato.errors import ConfigError

UPSCALER = "Lanczos"
"""What enlarges the pixels between the passes, as A1111 calls it."""
_LARGEST_SCALE = 8


@dataclass(frozen=True)
class Hires:
    """An image is generated at its size, enlarged, and partly redrawn from there, as by A1111's hires fix.

    A base model that is asked for a size far above its training's repeats things; this way the composition is of the
    small size, and the second pass adds detail. scale: above 1, at most 8, what both sides are multiplied by. strength:
    in (0, 1], how much the second pass redraws (denoising strength). steps: so many are taken by the second pass;
    unset, as many as by the first. Raises ConfigError.
    """

    scale: float = 2.0
    strength: float = 0.4
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Real) or not 1 < self.scale <= _LARGEST_SCALE:
            raise ConfigError(f"scale {self.scale!r:.40}: wanted above 1 and at most {_LARGEST_SCALE}; 2 is usual.")
        if not isinstance(self.strength, Real) or not 0 < self.strength <= 1:
            raise ConfigError(f"strength {self.strength!r:.40}: wanted above 0 and at most 1; 0.4 is usual.")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ConfigError(f"steps {self.steps!r:.40}: wanted a whole number, at least 1.")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after the second pass, multiples of 8."""
        return near_side(width * self.scale), near_side(height * self.scale)

    def taken_steps(self, steps: int) -> int:
        """How many steps the second pass takes after a first of so many."""
        return self.steps or steps

    def scheduled_steps(self, steps: int) -> int:
        """How many steps the sampler is set to, so that the second pass takes as many of them as it is to take."""
        wanted = self.taken_steps(steps)
        count = max(wanted, ceil(wanted / self.strength) - 1)  # the quotient may be a last bit too large
        while int(count * self.strength) < wanted:
            count += 1
        return count

    def told(self, steps: int) -> dict[str, Any]:
        """What a picture's settings say of the second pass after a first of so many steps."""
        return {"scale": self.scale, "strength": self.strength, "steps": self.taken_steps(steps)}
