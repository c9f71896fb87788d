"""From where to where in the denoising an adapter counts. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from sfumato.errors import ConfigError


@dataclass(frozen=True)
class Span:
    """From progress `start` to `end` an adapter has the weight that it has in the mix."""

    start: float
    end: float


def parse_span(text: str, label: str = "") -> Span:
    """The span of START-END in an option --over-steps. label: what stands before it there. Raises ConfigError, one
    line."""
    try:
        start, end = (float(number) for number in text.split("-"))
    except ValueError:
        start = end = 0.0
    if not 0 <= start < end <= 1:
        raise ConfigError(f"--over-steps {label}{text}: wanted START-END, progress from 0 to 1, such as {label}0-0.5.")
    return Span(start, end)
