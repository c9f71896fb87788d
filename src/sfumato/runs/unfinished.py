"""The runs of this process that are not finished, so that what ends a program early can let go of their folders.

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

import weakref
from collections.abc import Iterable
from threading import get_ident
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sfumato.runs.run import Run

_not_begun: weakref.WeakSet[Run] = weakref.WeakSet()
"""Runs whose folder is open, before their first step."""
_left: weakref.WeakSet[Run] = weakref.WeakSet()
"""Closed runs, in a step of which the program left the loop."""
_not_written: weakref.WeakSet[Run] = weakref.WeakSet()
"""Runs whose steps are made and whose results are not yet all in the folder."""


def note_opened(run: Run) -> None:
    """Its folder is open."""
    _not_begun.add(run)


def note_begun(run: Run) -> None:
    """It makes steps, and whatever it replaces is gone."""
    _not_begun.discard(run)


def note_left(run: Run) -> None:
    """The program has left the loop in a step, by an error or of its own accord."""
    _left.add(run)


def note_steps_done(run: Run) -> None:
    """What is left is to write its results."""
    _not_written.difference_update(_of_this_thread(_not_written))  # one training at a time is at its end
    _not_written.add(run)


def note_written(run: Run) -> None:
    """There is nothing left to go on with."""
    _not_written.discard(run)


def take_left_in_a_step() -> Run | None:
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


def _of_this_thread(runs: Iterable[Run]) -> list[Run]:
    """Those that this thread has started: another's go on."""
    return [run for run in list(runs) if run.thread == get_ident()]
