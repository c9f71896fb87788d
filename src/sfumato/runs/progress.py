"""How far a training is, or what goes before it, on stderr.

Ctrl-C, SIGTERM, a closed terminal and Windows' Ctrl-Break end a training after its step; a second one ends it at
once.

The runs of this process that are not finished, so that what ends a program early can let go of their folders.

A run passes four states. The main process locks the folder when it opens it; `Run.close` lets go of it in any state.

    state       set             an error               an interruption    the program's end   a line for the person
                                (abandon_unbegun)      (close_unbegun)    (unlock)            (stopped_while_writing)
    opened      _not_begun      Run.withdraw           Run.close          -                   -
    begun       none            -                      -                  -                   -
    steps done  _not_written    -                      -                  Run.unlock          Run.close_while_writing
    written     none            -                      -                  -                   -

Run.withdraw   also removes what opening the folder wrote, if it held no run before
Run.close      leaves the folder as it is, so that the run can be resumed
Run.unlock     the same, but the run stays in its set, so that `stopped_while_writing` can still tell of it

While the steps are made, `Run.steps` itself closes the run, whatever ends it; `take_left_in_a_step` tells of one that
the program left. Once all is written, the program closes it as its last act. Each function here treats the runs of its
own thread: those of others go on.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, suppress
from threading import get_ident
from types import FrameType
from typing import Any, Self, TypeVar

from tqdm import tqdm

from sfumato.utils.formatting import escape_control

T = TypeVar("T")


def say(text: str) -> None:
    """A line for the person, above the bar, or several: what a terminal would obey in the names of files is spelt."""
    if sys.stderr is not None:  # as of pythonw and services
        tqdm.write("\n".join(map(escape_control, text.split("\n"))), file=sys.stderr)


def say_on_main_process(is_main: bool) -> Callable[..., None]:
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


def progress_bar(items: Collection[T], what: str, *, unit: str, shown: bool = True, done: int = 0) -> Iterator[T]:
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


class PreparationBars(ExitStack):
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


_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
_HEARD = b"\nstopping after this step and saving; once more to stop now\n"


class StopSignal:
    """Within the block a first signal is only remembered, in `signal`; the second is KeyboardInterrupt or the end.

    alone: whether no launcher stands above, which passes on what the system has sent to every process already: then a
    second signal is no person's, and the launcher itself ends who takes too long.
    """

    def __init__(self, *, quiet: bool = False, alone: bool = True) -> None:
        self.signal: int | None = None
        self._quiet, self._alone = quiet, alone
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Elsewhere signals cannot be handled, and whoever runs a training in a thread stops it by other means.
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number == getattr(signal, "SIGHUP", None) and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None and not self._alone:
            return
        if self.signal is not None:
            raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)
        self.signal = number
        # A print could meet the print that the signal has interrupted. Without a stream for errors 2 may be another
        # file, and the reader of one, such as tee, may have been stopped by the same Ctrl-C.
        if not self._quiet and sys.stderr is not None:
            with suppress(OSError):
                os.write(2, _HEARD)


_not_begun: weakref.WeakSet[Any] = weakref.WeakSet()
"""Runs whose folder is open, before their first step."""
_left: weakref.WeakSet[Any] = weakref.WeakSet()
"""Closed runs, in a step of which the program left the loop."""
_not_written: weakref.WeakSet[Any] = weakref.WeakSet()
"""Runs whose steps are made and whose results are not yet all in the folder."""


def note_opened(run: Any) -> None:
    """Its folder is open."""
    _not_begun.add(run)


def note_begun(run: Any) -> None:
    """It makes steps, and whatever it replaces is gone."""
    _not_begun.discard(run)


def note_left(run: Any) -> None:
    """The program has left the loop in a step, by an error or of its own accord."""
    _left.add(run)


def note_steps_done(run: Any) -> None:
    """What is left is to write its results."""
    _not_written.difference_update(_of_this_thread(_not_written))  # one training at a time is at its end
    _not_written.add(run)


def note_written(run: Any) -> None:
    """There is nothing left to go on with."""
    _not_written.discard(run)


def take_interrupted() -> Any:
    """The run of this thread whose loop was left in a step; told once."""
    for run in _of_this_thread(_left):
        _left.discard(run)
        return run
    return None


def abandon_unbegun() -> None:
    """Let go of the folders of runs that an error stopped before their first step; new ones leave nothing in them."""
    for run in _of_this_thread(_not_begun):
        run.withdraw()
        _not_begun.discard(run)


def close_unbegun() -> None:
    """Close the runs that an interruption stopped before their first step; they can be resumed."""
    for run in _of_this_thread(_not_begun):
        run.close()
        _not_begun.discard(run)


def is_writing() -> bool:
    """Whether the results of a run are not all written."""
    return bool(_of_this_thread(_not_written))


def unlock() -> None:
    """Let go of the folders of runs whose results are not all written; `stopped_while_writing` still tells of them."""
    for run in _of_this_thread(_not_written):
        run.unlock()


def stopped_while_writing() -> str:
    """Let go of the folder of a run that was stopped after its last step, while its results were written; returns how
    the rest is written, after a space, or nothing."""
    return "".join(run.close_while_writing() for run in _of_this_thread(_not_written))


def _of_this_thread(runs: Iterable[Any]) -> list[Any]:
    """Those that this thread has started: another's go on."""
    return [run for run in list(runs) if run.thread == get_ident()]
