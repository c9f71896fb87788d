"""How far a training is, or what goes before it, on stderr."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any, TypeVar

from tqdm import tqdm

from sfumato.command_line.terminal import escape_control

T = TypeVar("T")


def say(text: str) -> None:
    """A line for the person, above the bar, or several: what a terminal would obey in the names of files is spelt."""
    if sys.stderr is not None:  # as of pythonw and services
        tqdm.write("\n".join(map(escape_control, text.split("\n"))), file=sys.stderr)


def speaking(is_main: bool) -> Callable[..., None]:
    """What says lines in the main process, and nothing in the others."""

    def speak(*lines: str) -> None:
        for line in lines if is_main else ():
            say(line)

    return speak


def _pause_s() -> float:
    """Between two looks of a bar: a terminal's moves, a log file gets a line now and then."""
    return 0.2 if _is_terminal() else 10.0


def _is_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


def bar(items: Collection[T], what: str, *, unit: str, shown: bool = True, done: int = 0) -> Iterator[T]:
    """The items, with a bar of how many are done. done: before these."""
    hidden = not shown or sys.stderr is None
    total = done + len(items)
    yield from tqdm(items, what, total, initial=done, unit=unit, file=sys.stderr, disable=hidden)


class Progress:
    """A bar with the time left and the running mean of the loss. A terminal gets a moving one, a log file a line every
    ten seconds, and what is no main process nothing."""

    def __init__(self, *, shown: bool):
        self._shown = shown and sys.stderr is not None
        self._bar: Any = None
        self._smooth = math.nan

    def begin(self, first: int, count: int) -> Any:
        """The bar from step `first` to `count`; a context that takes it away."""
        pause_s = _pause_s()
        self._bar = tqdm(
            total=count,
            initial=min(first, count),
            file=sys.stderr,
            disable=not self._shown,
            mininterval=pause_s,
            maxinterval=pause_s,
            dynamic_ncols=True,
            desc="training",
            unit="step",
        )
        return self._bar

    def loss(self, loss: float) -> None:
        self._smooth = loss if math.isnan(self._smooth) else 0.9 * self._smooth + 0.1 * loss
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {self._smooth:.4f}", refresh=False)

    def step(self) -> None:
        self._bar.update()

    def go_back_to(self, step: int) -> None:
        self._bar.n = step
        self._bar.refresh()


class Preparation(ExitStack):
    """Bars for what goes before a training, as `sfumato.data.prepare` tells of it, where that takes seconds."""

    def __init__(self, *, shown: bool):
        super().__init__()
        self._shown = shown and sys.stderr is not None
        self._bars: dict[str, Any] = {}

    def __call__(self, what: str, done: int, count: int) -> None:
        """Of so many pictures or captions, which `what` names, so many are encoded."""
        if what not in self._bars:
            self.close()  # one bar after the other
            pause_s = _pause_s()
            bar = tqdm(
                total=count,
                file=sys.stderr,
                disable=not self._shown,
                delay=0 if _is_terminal() else pause_s,
                mininterval=pause_s,
                maxinterval=pause_s,
                dynamic_ncols=True,
                leave=False,
                desc=f"encoding {what}",
                unit=what.removesuffix("s"),
            )
            self._bars[what] = self.enter_context(bar)
        self._bars[what].update(done - self._bars[what].n)
