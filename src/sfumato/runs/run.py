"""The loop of a run: `for step in run.steps(n)`, between opening its folder and closing it."""

from __future__ import annotations

import errno
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import sfumato
from sfumato import config as configs
from sfumato import shell
from sfumato.errors import RunError, SfumatoError, is_out_of_memory
from sfumato.files.atomic import write_text
from sfumato.precision import give_back_freed_memory
from sfumato.runs import identity, plot, progress, unfinished
from sfumato.runs.checkpointed import CheckpointedParts
from sfumato.runs.checkpoints import Checkpoints, NotFiniteError, bytes_of, require_space
from sfumato.runs.folder import (
    also_written,
    check_folder,
    clear,
    forget_leftovers,
    forget_new,
    forget_samples,
    has_begun,
    is_run,
)
from sfumato.runs.health import Health, not_finite
from sfumato.runs.lock import Lock
from sfumato.runs.log import Log
from sfumato.runs.progress import Progress
from sfumato.runs.signals import Stop
from sfumato.runs.step import Step

if TYPE_CHECKING:
    from sfumato.data import Dataset
    from sfumato.runs.options import FolderOptions
    from sfumato.runs.processes import Processes

_LOOKED = "looked"
"""The fact that names the last step whose samples and measurements are done."""
_UNSAVED, _BROKEN = 1, 2
"""How a checkpoint failed: it could not be written, or is not finite."""
_PLOT_EVERY_S = 60.0
"""Between two plots of a run that goes on."""


class Run:
    """One training's folder, log, checkpoints and progress. Only the main process writes.

    `runs/unfinished.py` has a table of the states it passes, and of what becomes of it where an error or an
    interruption ends it in each.

    count: how many processes train. step: the step it begins with, 0 or that of the checkpoint it resumes from.
    rate_factor: what the learning rate is multiplied with; a half after the run has gone back once.
    """

    def __init__(self, folder: Path, config: FolderOptions, processes: Processes | None = None):
        self.folder = folder
        self.thread = get_ident()
        self.is_main = processes is None or processes.is_main
        self.count = 1 if processes is None else processes.count
        self.step, self.rate_factor = 0, 1.0
        # Not self.say: a run that refers to itself would hold its lock until it is collected.
        self.log_file = Log(folder / "log.jsonl", tensorboard=config.tensorboard and self.is_main, warn=progress.say)
        self._config, self._processes = config, processes
        self._checkpoints = Checkpoints(folder / "checkpoints", config.keep)
        self._lock = Lock(folder)
        self._facts: dict[str, str] = {}
        self._pictures: dict[str, Mapping[str, str]] = {}
        self._kept = CheckpointedParts()
        self._looks: list[tuple[int, Callable[[int], None]]] = []
        self._resumed_from: int | None = None
        self._replaces = False  # whether the folder holds a run that `begin` is still to remove
        self._ends = False  # whether the loop is to end before its next step
        self._before: set[str] | None = None  # what was in the folder, where it held no run
        self._saved_at: int | None = None  # the step of the last checkpoint
        self._copy: Path | None = None
        self._health = Health()
        self._plotted_s = time.monotonic()
        self._progress = Progress(shown=self.is_main)

    @classmethod
    def start(
        cls,
        config: FolderOptions,
        *,
        program: str,
        processes: Processes | None = None,
        writes: Sequence[str] = (),
    ) -> Run:
        """Open `config.output` for a training: a new folder, or with `config.resume` the one that holds it.

        A folder that holds a run is refused unless `overwrite` or `resume`; one that holds other things under the names
        that a run writes is refused always. A config that differs from the one in the folder is refused unless `force`.
        A run that is replaced is there until `begin`: what stops the new one before its first step costs nothing.
        writes: names in the folder that the program writes beside those of every run. Raises RunError, one line.
        """
        try:
            if config.output.exists() and not config.output.is_dir():
                raise RunError(f"{config.output} is a file; --output wants a folder of its own for the run.")
            run = cls(config.output, config, processes)
            run._open(program, writes)
        except OSError as error:
            mend = "make room" if error.errno == errno.ENOSPC else "see to its permissions"
            elsewhere = "" if config.resume else ", or give another --output"
            raise RunError(f"{config.output} cannot be written ({error.strerror}); {mend}{elsewhere}.") from None
        return run

    def _open(self, program: str, writes: Sequence[str]) -> None:
        if not self.folder.exists() and self._config.resume:
            raise RunError(f"there is no run to resume in {self.folder}; without --resume one begins there.")
        try:
            if self.is_main:
                if not is_run(self.folder):
                    self._before = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
                self.folder.mkdir(parents=True, exist_ok=True)
                left = self._lock.take()
                if left:
                    self.say(left)
            # Looked at under the lock, so that of two that start at once the second sees what the first has begun.
            if check_folder(self._config, writes):
                self._facts = identity.read_facts(self.folder)
                self._refuse_changes("another config", identity.differences(self.folder, self._config, program))
                self._find_checkpoint()
            else:
                self._replaces = has_begun(self.folder)
            self._wait()  # before the main process changes what the others have looked at
            names = dict.fromkeys([*also_written(self._facts), *writes])
            self._facts = {**self._facts, "program": program, **({"writes": "/".join(names)} if names else {})}
            self._copy = identity.copied_program(program)
            if self._copy is not None:
                self._facts["copy"] = self._copy.as_posix()
            if self.is_main and not self._replaces:
                self._take_over()
        except BaseException:
            self.withdraw()
            raise
        unfinished.note_opened(self)

    def begin(self) -> None:
        """Remove what a run that is replaced has left in the folder. `steps` does so where the program did not."""
        if self._replaces and self.is_main:
            self._or_stop(self._take_over)
        self._replaces = False
        unfinished.note_begun(self)

    def _take_over(self) -> None:
        forget_leftovers(self.folder)
        if self._resumed_from is None:  # a new run, or one that was stopped before its first checkpoint
            self._checkpoints.drop_after(-1)  # first, so that no other config ever stands beside them
            if self._config.resume:
                forget_samples(self.folder, -1)
            elif is_run(self.folder):
                clear(self._config)
            write_text(self.folder / "log.jsonl", "")
        self._write_facts()
        write_text(self.folder / "config.toml", configs.to_toml(identity.anchored(self._config)))

    def _refuse_changes(self, what: str, changed: list[str]) -> None:
        if changed and not self._config.force:
            raise RunError(
                f"{self.folder} was trained with {what}: {'; '.join(changed)}. Resume with the same, or with --force."
            )
        if of_checkpoint := [line for line in changed if line.partition(" ")[0] in identity.OF_CHECKPOINT]:
            raise RunError(
                f"{self.folder} was trained with {what}: {'; '.join(of_checkpoint)}. No checkpoint fits that: resume "
                "with the same, or begin anew with --overwrite."
            )
        self.say(*(f"changed by --force: {line}" for line in changed))

    def _find_checkpoint(self) -> None:
        step, passed = self._checkpoints.newest()
        self.say(*passed)
        self._resumed_from = step
        self.step = step or 0
        if step is not None:
            self.say(f"resuming from step {step}")
        elif passed:
            raise RunError(
                f"no checkpoint in {self.folder} is whole: {passed[0]} Bring one back from a copy, or begin anew with "
                "--overwrite."
            )
        else:
            self.say("resuming: there is no checkpoint yet, so from the beginning")

    def identify(self, **depends_on: str | identity.DataSet) -> None:
        """Name what the training depends on beside its config, such as data=dataset, base="sha256 ...".

        A resumed run is refused, unless `force`, where any of it differs from what the folder's depends on; of data
        sets it is said in which pictures.
        """
        sets = {name: each for name, each in depends_on.items() if not isinstance(each, str)}
        self._pictures = {name: each.contents for name, each in sets.items()}
        facts = {name: each if isinstance(each, str) else each.fingerprint for name, each in depends_on.items()}
        facts |= {"processes": str(self.count), "sfumato": sfumato.__version__}
        facts |= {"torch": torch.__version__.split("+")[0]}
        facts |= {name: version(name) for name in ("diffusers", "transformers")}
        if self._resumed_from is not None:
            try:
                before = identity.read_pictures(self.folder)
                both = {name: (before[name], each) for name, each in self._pictures.items() if name in before}
                self._refuse_changes("other things than these", identity.other_facts(self._facts, facts, both))
            except RunError:
                self.close()
                raise
        self._facts |= facts
        if self.is_main and not self._replaces:
            self._or_stop(self._write_facts)

    def _write_facts(self) -> None:
        identity.write_facts(self.folder, self._facts)
        if self._pictures:
            identity.write_pictures(self.folder, self._pictures)

    def keep(self, **parts: Any) -> None:
        """What a checkpoint holds: modules, optimizers, anything with `state_dict` and `load_state_dict`."""
        self._kept.parts.update(parts)

    def every(self, steps: int | None, look: Callable[[int], None]) -> None:
        """Call `look(step)` every so many steps and at both ends; never for 0.

        A look that a full disk or a broken picture stops is said and does not end a training that has begun.
        """
        if steps:
            self._looks.append((steps, look))

    def say(self, *lines: str) -> None:
        """Lines for the person, above the progress bar, once for all processes."""
        for line in lines if self.is_main else ():
            progress.say(line)

    def say_notes(self, *data: Dataset | None) -> None:
        """What there is to say of data sets, each line once; None stands for one that there is not."""
        self.say(*dict.fromkeys(note for each in data if each is not None for note in each.notes))

    def say_filled(self, title: str, filled: Sequence[str]) -> None:
        """Which fields of the config were filled in, and with what; nothing where none was, as when a run goes on."""
        if filled:
            self.say(f"{title} defaults: " + ", ".join(f"{name} {getattr(self._config, name)}" for name in filled))

    def log(self, **values: float | Tensor) -> None:
        """A line of measurements in the log; what is not finite is said instead."""
        broken = not_finite(values)
        if broken:
            self.say(f"step {values.get('step', '?')}: {broken} not finite")
        if self.is_main:
            self.log_file.add(values)

    def rows(self) -> list[dict[str, float]]:
        """The log so far."""
        return [] if self._replaces else self.log_file.rows()

    def steps(self, count: int) -> Iterator[Step]:
        """The optimizer steps up to count - 1, with progress, loss and time left on stderr.

        Resumes where the checkpoint stands. After SIGINT or SIGTERM the step is finished and saved, and SystemExit
        (130, 143) raised. Numbers that are not finite in three steps in a row send the run back to its last checkpoint
        with half the learning rate, once; then RunError.
        """
        try:
            yield from self._steps(count)
        except BaseException:  # GeneratorExit, too: whatever ends the loop early lets the folder go
            self.close()
            raise

    def _steps(self, count: int) -> Iterator[Step]:
        behind = self._resumed_from is not None and self._is_behind(self._resumed_from)
        if self._resumed_from is not None:
            self._restore(self._resumed_from, seen=self._resumed_from - behind)
        if self.is_main and self.step < count:  # not where only the results are still to be written
            self._or_stop(self._check_space)
        self.begin()
        with self._progress.begin(self.step, count), Stop(quiet=not self.is_main) as stop:
            if self.step == 0 or behind:
                self._look(self.step, count)
                self._checkpoint(self.step, count)
            while self.step < count and not self._ends:
                step = Step(self.step, self.rate_factor, self)
                yield step
                if not self._health.broken:
                    self.step += 1
                    self._progress.step()
                    stopped = self._agreed(stop.signal)
                    # Before the looks, which may take longer than many steps: who is killed in them loses none.
                    self._checkpoint(self.step, count, due=stopped is not None or self._ends)
                    if stopped is None and not self._health.broken and self._look(self.step, count):
                        stopped = self._agreed(stop.signal)
                        self._checkpoint(self.step, count, due=stopped is not None or self._ends)
                    if stopped is not None:
                        self._say_goodbye(self.step, count)
                        raise SystemExit(128 + stopped)
                if self._health.broken:
                    self._go_back(self.step)
        unfinished.note_steps_done(self)

    @property
    def has_begun(self) -> bool:
        """Whether it goes on from a checkpoint, which holds all that was learned and begun from."""
        return self._resumed_from is not None

    def end(self) -> None:
        """Let the loop end before its next step, with a checkpoint of the last; all processes call it, or none."""
        self._ends = True

    def _is_behind(self, step: int) -> bool:
        """Whether the looks at the checkpoint's step are still to come: always at 0, of which there may be none yet,
        and where the run was stopped or killed between the two."""
        looked = self._facts.get(_LOOKED, "")
        return step == 0 or (looked.isdecimal() and int(looked) < step)

    def _look(self, step: int, count: int) -> bool:
        """Whether there was anything to look at."""
        looks = [look for every, look in self._looks if step % every == 0 or step == count]
        for look in looks:
            try:
                look(step)
            except (OSError, SfumatoError, RuntimeError, MemoryError) as error:
                is_full = is_out_of_memory(error)
                if isinstance(error, RuntimeError) and not is_full:
                    raise
                reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
                if is_full:
                    traceback.clear_frames(error.__traceback__)  # which hold what filled the memory
                    give_back_freed_memory()
                    reason = (
                        "the memory does not hold them beside the training; --sample-every 0 and "
                        "--measure-every 0 leave them out"
                    )
                elif step == 0:  # nothing is lost yet, and it would go on like this
                    raise RunError(f"the first samples or measurements failed: {reason}") from None
                self.say(f"step {step}: no sample, measurement or kept adapter: {reason}. The training goes on.")
        if looks:
            self.log_file.flush()  # what is noted as looked at is not measured again
            self._note_looked(step)
            if time.monotonic() - self._plotted_s > _PLOT_EVERY_S:
                self._plot()
        return bool(looks)

    def _plot(self) -> None:
        """Draw the log as it is so far, for whoever looks at a run that is under way or was stopped."""
        if self.is_main:
            self.log_file.flush()
            with suppress(OSError, RunError):  # a full disk, or nothing to draw yet
                plot.plot_log(self.folder / "log.jsonl", self.folder / "plot.png")
        self._plotted_s = time.monotonic()

    def _note_looked(self, step: int) -> None:
        self._facts[_LOOKED] = str(step)
        if self.is_main:
            with suppress(OSError):  # a full disk: at worst a run that goes on looks twice
                identity.write_facts(self.folder, self._facts)

    def _agreed(self, signalled: int | None) -> int | None:
        """The signal that any process got: all of them stop after the same step."""
        if self._processes is None or self.count == 1:
            return signalled
        return self._processes.largest(signalled or 0) or None

    def _wait(self) -> None:
        if self._processes is not None:
            self._processes.wait()

    def _or_stop(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.withdraw()
            elsewhere = "" if self._config.resume else ", or give another --output"
            raise RunError(f"{self.folder}: {error.strerror}. Make room{elsewhere}.") from None

    # Checkpoints

    def _state(self) -> dict[str, Any]:
        return {"kept": self._kept.state(), "rate_factor": self.rate_factor, "bad": self._health.bad}

    def _check_space(self) -> None:
        """Before the start: room for all checkpoints that will stay, and the one that is being written."""
        most = self._checkpoints.keep + 1 if self._config.checkpoint_every else 1
        missing = max(1, most - len(self._checkpoints.steps()))
        require_space(self.folder, missing * (bytes_of(self._state()) + self._kept.bytes_to_come()))

    def _checkpoint(self, step: int, count: int, *, due: bool = False) -> None:
        every = self._config.checkpoint_every or 0
        due = due or step == count  # before the results are written, which a second Ctrl-C or a full disk may stop
        wanted = due or (every > 0 and step % every == 0)
        if not wanted or step == self._saved_at:
            return
        if self.is_main:
            self._save(step, due=due)
        # All processes know what became of it, so that each asks for the same checkpoints.
        unsaved = self.is_main and self._saved_at != step
        worst = self._agreed(_BROKEN if self._health.broken else _UNSAVED if unsaved else None)
        if worst is None:
            self._saved_at = step
        elif worst == _BROKEN and not self._health.broken:
            self._health.broken = f"the state of step {step} is not finite"

    def _save(self, step: int, *, due: bool) -> None:
        self.log_file.flush()
        try:
            self._checkpoints.save(step, self._state())
            self._saved_at = step
        except NotFiniteError as error:  # which only the main process, that saves, has found
            self._health.broken = str(error)
        except RunError as error:
            earlier, _ = self._checkpoints.newest()
            if step == 0:
                raise RunError(f"{error}. The training stops before it could lose anything.") from None
            whole = "" if earlier is None else f" That of step {earlier} is whole."
            self.say(f"{error}.{whole}{'' if due else ' The training goes on.'}")

    def _restore(self, step: int, *, seen: int) -> None:
        """Go on from this checkpoint. seen: the step up to which what was looked at stays."""
        saved = self._checkpoints.load(step)
        self._kept.load(saved["kept"], step)
        self.step, self._saved_at = step, step
        self.rate_factor, self._health.bad = saved["rate_factor"], list(saved["bad"])
        self._wait()
        if self.is_main:
            self._checkpoints.drop_after(step)
            self._or_stop(lambda: self.log_file.cut(step, seen=seen))
            self._or_stop(lambda: forget_samples(self.folder, seen))
        self._note_looked(max(seen, 0))

    def _say_goodbye(self, number: int, count: int) -> None:
        self._plot()
        if self._saved_at == number or not self.is_main:
            self.say(f"stopped after step {number} of {count}, saved. Go on with: {self.resume_command()}")
        else:
            self.say(f"stopped after step {number} of {count}; this step could not be saved.")

    def resume_command(self) -> str:
        """What goes on with the run."""
        launcher = f"accelerate launch --num_processes {self.count} -m " if self.count > 1 else ""
        folder = shell.quote(str(self.folder))
        if self._copy:
            started = f"{launcher.removesuffix('-m ')}" or "python "
            return f"{started}{shell.quote(str(self._copy))} {folder}/config.toml --output {folder} --resume"
        return f"{launcher}sfumato resume {folder}"

    # For `Step`

    def check_numbers(self, number: int, named: dict[str, float | Tensor]) -> bool:
        """Whether all numbers are finite; three steps in a row in which they are not make the run go back."""
        problem = self._health.check(number, named)
        if problem:
            self.say(f"{problem}; the step is skipped")
        return not problem

    def check_weights(self, number: int) -> None:
        """Look whether the trained weights are finite still; the run goes back where they are not."""
        self._health.check_weights(number, self._kept.parts.values())

    def note(self, row: dict[str, float | Tensor]) -> None:
        """A step's line in the log, and its loss in the progress."""
        if not self.is_main:
            return
        self.log_file.add(row)
        if "loss" in row:
            loss = row["loss"]
            self._progress.loss(float(loss.detach() if isinstance(loss, Tensor) else loss))

    def _go_back(self, number: int) -> None:
        """To the step of the last checkpoint, once."""
        reason = self._health.reset()
        newest, passed = self._checkpoints.newest()
        self.say(*passed)
        if newest is None or self.rate_factor < 1:
            again = ", also with half the learning rate" if self.rate_factor < 1 else ""
            raise RunError(
                f"{reason}{again}, so the training is broken. Lower --learning-rate, use another --precision, or look "
                f"at the pictures; {self.folder / 'log.jsonl'} has the steps before."
            )
        self._wait()
        self._restore(newest, seen=newest)
        self._health.reset()
        self.rate_factor /= 2
        self.say(f"{reason}; going back to step {newest} with half the learning rate")
        self.log(step=newest, went_back_from=number)
        self._progress.go_back_to(newest)

    # How it ends: see `runs/unfinished.py`

    def mark_finished(self) -> None:
        """What was learned, and all that tells of it, is in the folder: there is nothing left to go on with."""
        unfinished.note_written(self)

    def close(self) -> None:
        """Finish the log and let the folder go."""
        self.mark_finished()
        self.unlock()

    def unlock(self) -> None:
        """Let the folder go, whether or not all is written."""
        if self.is_main:
            self.log_file.close()
            self._lock.release()

    def close_while_writing(self) -> str:
        """Let the folder go; returns what is kept of the run, and how the rest is written."""
        self.close()
        if not self.is_main or self._saved_at != self.step:
            return ""
        return f" All its steps are kept; the rest is written by: {self.resume_command()}"

    def withdraw(self) -> None:
        """Let the folder go, and remove what opening it wrote, if it held no run before."""
        is_gone = self._lock.is_held and self._before is not None and forget_new(self.folder, self._before)
        self.log_file.close()
        self._lock.release(trace=not is_gone)
        if is_gone:
            with suppress(OSError):  # something of somebody else's is in it
                self.folder.rmdir()
