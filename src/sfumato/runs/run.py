"""The loop of a run: `for step in run.steps(n)`, between opening its folder and closing it.

One optimizer step, as a trainer sees it.
"""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import get_ident
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from sfumato.config import to_dict
from sfumato.errors import RunError, package_error
from sfumato.runs import folder as identity
from sfumato.runs import progress
from sfumato.runs import progress as unfinished
from sfumato.runs.claim import RunClaim
from sfumato.runs.dry_run import DryRun
from sfumato.runs.folder import clear_folder, is_run, remove_leftovers, remove_samples
from sfumato.runs.options import Request, Requests, persistent_config
from sfumato.runs.processes import SingleProcess
from sfumato.runs.progress import Progress, StopSignal
from sfumato.runs.recovery import Recovery, not_finite
from sfumato.runs.reporting.log import Log, RunCallbacks
from sfumato.runs.reporting.trackers import WandbRun
from sfumato.utils.atomic import write_text
from sfumato.utils.formatting import quote_argument

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch.amp import GradScaler

    from sfumato.data import Dataset
    from sfumato.runs.options import FolderOptions
    from sfumato.runs.processes import Processes


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


_ABOVE_SIGNALS = 256
_WANDB = "wandb"
"""The fact by which the run at W&B is known again."""


class Run:
    """One training's folder, log, checkpoints and progress. Only the main process writes.

    `runs/progress.py` has a table of the states it passes, and of what becomes of it where an error or an
    interruption ends it in each.

    count: how many processes train. step: the step it begins with, 0 or that of the checkpoint it resumes from. dry:
    what ends it after a few steps; None of a training that is meant.
    """

    def __init__(
        self, folder: Path, config: FolderOptions, processes: Processes | None = None, dry: DryRun | None = None
    ):
        self.folder = folder
        self.dry = dry
        self.thread = get_ident()
        self.step = 0
        self.config, self._processes = config, processes or SingleProcess()
        self.is_main, self.count = self._processes.is_main, self._processes.count
        # Not self.say: a run that its parts refer to would hold its lock until it is collected.
        say = self._say = progress.say_on_main_process(self.is_main)
        self.log_file = Log(
            folder / "log.jsonl",
            tensorboard=config.tensorboard and self.is_main,
            wandb=self._wandb_run() if config.wandb is not None and self.is_main else None,
            warn=progress.say,
        )
        self._claim = RunClaim(folder, config, say, is_main=self.is_main)
        self._requests = Requests(folder)
        self._recovery = Recovery(folder, config, self._processes, self.log_file, say)
        self._looks = RunCallbacks(self._claim, self.log_file, say, is_main=self.is_main)
        self._progress = Progress(shown=self.is_main)
        self._resumed_from: int | None = None
        self._is_whole = False  # whether all steps are made
        self._ends = config.finish  # whether the loop is to end before its next step

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
            if config.dry_run:
                run = run._elsewhere(program, writes)
        except OSError as error:
            if package_error(error):
                raise
            mend = "make room" if error.errno == errno.ENOSPC else "see to its permissions"
            elsewhere = "" if config.resume else ", or give another --output"
            raise RunError(f"{config.output} cannot be written ({error.strerror}); {mend}{elsewhere}.") from None
        return run

    def _elsewhere(self, program: str, writes: Sequence[str]) -> Run:
        """The dry run of this one, which its folder does not refuse, and which lets go of it."""
        self.withdraw()
        unfinished.note_begun(self)
        dry = DryRun(self.config)
        run = Run(dry.config.output, dry.config, cast("Processes", self._processes), dry)
        run._open(program, writes)
        return run

    def _open(self, program: str, writes: Sequence[str]) -> None:
        if not self.folder.exists() and self.config.resume:
            raise RunError(f"there is no run to resume in {self.folder}; without --resume one begins there.")
        try:
            if self._claim.take(program, writes):
                self._resumed_from = self._recovery.find()
                self.step = self._resumed_from or 0
                if self.config.finish and not self.step:
                    raise RunError(
                        f"{self.folder} has made no step yet, so nothing is learned; resume it without --finish."
                    )
                self._refuse_fewer_steps()
            if self.is_main:
                self._requests.forget()
            self._processes.wait()  # before the main process changes what the others have looked at
            self._claim.name_program(program, writes)
            if self.is_main and not self._claim.replaces:
                self._take_over()
        except BaseException:
            self.withdraw()
            raise
        unfinished.note_opened(self)

    def _refuse_fewer_steps(self) -> None:
        """Raise RunError where more steps are made than are asked for: the file would say that it was trained less."""
        wanted = getattr(self.config, "steps", None)
        if wanted is not None and self.step > wanted:
            raise RunError(
                f"{self.folder} has made {self.step} steps, and --steps is {wanted}; give at least {self.step}, or "
                "train anew with --overwrite."
            )

    def begin(self) -> None:
        """Remove what a run that is replaced has left in the folder. `steps` does so where the program did not."""
        if self._claim.replaces and self.is_main:
            self._or_stop(self._take_over)
        self._claim.replaces = False
        unfinished.note_begun(self)

    def _take_over(self) -> None:
        remove_leftovers(self.folder)
        if self._resumed_from is None:  # a new run, or one that was stopped before its first checkpoint
            self._recovery.checkpoints.drop_after(-1)  # first, so that no other config ever stands beside them
            if self.config.resume:
                remove_samples(self.folder, -1)
            elif is_run(self.folder):
                clear_folder(self.config)
            write_text(self.folder / "log.jsonl", "")
        self._claim.write_facts()
        self._claim.write_config()

    def identify(self, **depends_on: str | identity.DataSet) -> None:
        """Name what the training depends on beside its config, such as data=dataset, base="sha256 ...".

        A resumed run is refused, unless `force`, where any of it differs from what the folder's depends on; of data
        sets it is said in which pictures.
        """
        try:
            self._claim.identify(depends_on, self.count, resumes=self.has_begun)
        except RunError:
            self.close()
            raise
        if self.is_main and not self._claim.replaces:
            self._or_stop(self._claim.write_facts)
        if self.dry is not None and self.is_main:
            self.dry.listen(depends_on)

    def keep(self, **parts: Any) -> None:
        """What a checkpoint holds: modules, optimizers, anything with `state_dict` and `load_state_dict`."""
        self._recovery.kept.parts.update(parts)

    def every(self, steps: int | None, look: Callable[[int], None], *, on: Request = Request.SAMPLES) -> None:
        """Call `look(step)` every so many steps and at both ends, for 0 only where `sfumato ask` asks for `on`.

        A look that a full disk or a broken picture stops is said and does not end a training that has begun.
        """
        if steps is None:
            return
        self._looks.add(steps, self.dry.timed(steps, look) if self.dry and steps else look, on)

    def show(self, step: int, images: Sequence[Image], captions: Sequence[str]) -> None:
        """Sample images of a step, for whoever looks at the log elsewhere."""
        if self.log_file.wandb is not None:
            self.log_file.flush()  # the rows before
            self.log_file.wandb.show(step, images, captions)

    def say(self, *lines: str) -> None:
        """Lines for the person, above the progress bar, once for all processes."""
        self._say(*lines)

    def say_notes(self, *data: Dataset | None) -> None:
        """What there is to say of data sets, each line once; None stands for one that there is not."""
        self.say(*dict.fromkeys(note for each in data if each is not None for note in each.notes))

    def report_defaults(self, title: str, filled: Sequence[str]) -> None:
        """Which fields of the config were filled in, and with what; nothing where none was, as when a run goes on."""
        if filled:
            self.say(f"{title} defaults: " + ", ".join(f"{name} {getattr(self.config, name)}" for name in filled))

    def log(self, **values: float | Tensor) -> None:
        """A line of measurements in the log; what is not finite is said instead."""
        broken = not_finite(values)
        if broken:
            self.say(f"step {values.get('step', '?')}: {broken} not finite")
        if self.is_main:
            self.log_file.add(values)

    def rows(self) -> list[dict[str, float]]:
        """The log up to the step that it is at; the log may have more where a checkpoint is further back."""
        rows = [] if self._claim.replaces else self.log_file.rows()
        return [row for row in rows if row.get("step", 0) <= self.step]

    @property
    def has_begun(self) -> bool:
        """Whether it goes on from a checkpoint, which holds all that was learned and begun from."""
        return self._resumed_from is not None

    # The loop

    def steps(self, count: int) -> Iterator[Step]:
        """The optimizer steps up to count - 1, with progress, loss and time left on stderr.

        Resumes where the checkpoint stands. After SIGINT or SIGTERM the step is finished and saved, and SystemExit
        (130, 143) raised; `sfumato ask RUN --stop` is like SIGTERM. Numbers that are not finite in three steps in a row
        send the run back to its last checkpoint with half the learning rate, once; then RunError. A dry run ends with
        DryRunOver.
        """
        steps = self._steps(count)
        if self.dry is not None:
            steps = self.dry.first_of(steps, count, self.say, self._recovery.max_checkpoints)
        try:
            yield from steps
        except BaseException as error:  # GeneratorExit, too: whatever ends the loop early lets the folder go
            self.close()
            if isinstance(error, GeneratorExit):
                unfinished.note_left(self)
            raise

    def _steps(self, count: int) -> Generator[Step]:
        behind = self._resumed_from is not None and self._looks.is_pending(self._resumed_from)
        if self._resumed_from is not None:
            self._restore(self._resumed_from, seen=self._resumed_from - behind, again=not self.config.force)
        if self.is_main and self.step < count:  # not where only the results are still to be written
            self._or_stop(self._recovery.check_space)
        self.begin()
        self._start_wandb()
        health = self._recovery.health
        with self._progress.begin(self.step, count), StopSignal(quiet=not self.is_main, alone=self.count == 1) as stop:
            if self.step == 0 or behind:
                self._looks.at(self.step, count)
                self._checkpoint(self.step, count)
            while self.step < count and not self._ends:
                step = Step(self.step, self._recovery.rate_factor, self)
                yield step
                if not health.broken:
                    self.step += 1
                    self._progress.step()
                    stopped, asked = self._heard(stop.signal)
                    # Before the looks, which may take longer than many steps: who is killed in them loses none.
                    self._checkpoint(self.step, count, due=stopped is not None or self._ends or Request.SAVE in asked)
                    if stopped is None and not health.broken and self._looks.at(self.step, count, asked):
                        stopped = self._agreed(stop.signal)
                        self._checkpoint(self.step, count, due=stopped is not None or self._ends)
                    if stopped is not None:
                        self._say_goodbye(self.step, count)
                        self._processes.wait()  # the first that ends has the launcher end the others
                        raise SystemExit(128 + stopped)
                if health.broken:
                    self._go_back(self.step)
            if self.step < count:
                self._looks.at_end(self.step)
        self._is_whole = True
        unfinished.note_steps_done(self)

    def _wandb_run(self) -> WandbRun:
        return WandbRun(self.folder, str(self.config.wandb), self.config.wandb_name, progress.say)

    def _start_wandb(self) -> None:
        wandb, claim = self.log_file.wandb, self._claim
        if wandb is not None:
            config = {"program": claim.facts.get("program"), **to_dict(persistent_config(self.config), public=True)}
            wandb.start(claim.facts.get(_WANDB), partial(claim.note, _WANDB), config, self.log_file.rows())

    def remaining_steps(self, count: int) -> range:
        """Those that `steps` will make."""
        return range(self.step, self.step if self._ends else count)

    def end(self) -> None:
        """Let the loop end before its next step, with a checkpoint of the last; all processes call it, or none."""
        self._ends = True

    def _heard(self, signalled: int | None) -> tuple[int | None, Request]:
        """The signal that any process got, and what else is asked of the run; the same in all of them."""
        asked = self._requests.take() if self.is_main else Request.NOTHING
        # In one message: what is asked is above every signal's number, which its process has still after the next step.
        agreed = self._processes.largest(asked.value * _ABOVE_SIGNALS + (signalled or 0))
        asked, signalled = Request(agreed // _ABOVE_SIGNALS), agreed % _ABOVE_SIGNALS
        if asked:
            self.say(f"step {self.step}: asked for {asked}")
        self._ends |= Request.FINISH in asked
        return (signalled or (signal.SIGTERM if Request.STOP in asked else None)), asked

    def _agreed(self, signalled: int | None) -> int | None:
        """The signal that any process got: all of them stop after the same step."""
        return self._processes.largest(signalled or 0) or None

    def _checkpoint(self, step: int, count: int, *, due: bool = False) -> None:
        # At the last step before the results are written, which a second Ctrl-C or a full disk may stop.
        self._recovery.save(step, due=due or step == count)

    def _restore(self, step: int, *, seen: int, again: bool) -> None:
        """Go on from this checkpoint. seen: the step up to which what was looked at stays. again: whether what comes
        then is what came before."""
        self._recovery.load(step)
        self.step = step
        self._processes.wait()
        if self.is_main:
            self._recovery.checkpoints.drop_after(step)
            self._or_stop(lambda: self.log_file.cut(step, seen=seen, again=again))
            self._or_stop(lambda: remove_samples(self.folder, seen))
        self._looks.note(max(seen, 0))

    def _go_back(self, number: int) -> None:
        """To the step of the last checkpoint, once."""
        reason = self._recovery.health.reset()
        newest = self._recovery.rollback_step(reason)
        self._processes.wait()
        self._restore(newest, seen=newest, again=False)
        self._recovery.health.reset()
        self._recovery.rate_factor /= 2
        self.say(f"{reason}; going back to step {newest} with half the learning rate")
        self.log(step=newest, went_back_from=number)
        self._progress.go_back_to(newest)

    def _say_goodbye(self, number: int, count: int) -> None:
        if self.dry is not None:
            self.say(f"the dry run was stopped after step {number}; nothing of it is kept.")
            return
        self._looks.plot()
        if self._recovery.saved_at == number or not self.is_main:
            again = self.resume_command()
            self.say(f"stopped after step {number} of {count}, saved. Go on with: {again}")
            if number:
                self.say(f"Or end it here, with what is learned so far: {again} --finish")
        else:
            self.say(f"stopped after step {number} of {count}; this step could not be saved.")

    def resume_command(self) -> str:
        """What goes on with the run."""
        launcher = f"accelerate launch --num_processes {self.count} -m " if self.count > 1 else ""
        folder = quote_argument(str(self.folder))
        if self._claim.copy:
            started = f"{launcher.removesuffix('-m ')}" or "python "
            config = quote_argument(str(self.folder / "config.toml"))
            return f"{started}{quote_argument(str(self._claim.copy))} {config} --output {folder} --resume"
        return f"{launcher}sfumato resume {folder}"

    def _or_stop(self, write: Callable[[], None]) -> None:
        try:
            write()
        except OSError as error:
            self.withdraw()
            elsewhere = "" if self.config.resume else ", or give another --output"
            # Windows removes no file that another program has open.
            advice = "Close what has it open" if isinstance(error, PermissionError) else "Make room"
            raise RunError(f"{error.filename or self.folder}: {error.strerror}. {advice}{elsewhere}.") from None

    def plot(self) -> None:
        """Draw the log as it is so far."""
        self._looks.plot()

    # For `Step`

    def check_numbers(self, number: int, named: dict[str, float | Tensor]) -> bool:
        """Whether all numbers are finite; three steps in a row in which they are not make the run go back."""
        problem = self._recovery.health.check(number, named)
        if problem:
            self.say(f"{problem}; the step is skipped")
        return not problem

    def check_weights(self, number: int) -> None:
        """Look whether the trained weights are finite still; the run goes back where they are not."""
        self._recovery.health.check_weights(number, self._recovery.kept.parts.values())

    def note(self, row: dict[str, float | Tensor]) -> None:
        """A step's line in the log, and its loss in the progress."""
        if not self.is_main:
            return
        self.log_file.add(row)
        if "loss" in row:
            loss = row["loss"]
            self._progress.loss(float(loss.detach() if isinstance(loss, Tensor) else loss))

    # How it ends: see `runs/progress.py`

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
            self._requests.forget()
            self.log_file.close()
            if self.log_file.wandb is not None:
                self.log_file.wandb.finish(is_whole=self._is_whole)
            self._claim.release()
        if self.dry is not None:
            self.dry.remove()

    def close_while_writing(self) -> str:
        """Let the folder go; returns what is kept of the run, and how the rest is written."""
        self.close()
        if not self.is_main or self._recovery.saved_at != self.step:
            return ""
        return f" All its steps are kept; the rest is written by: {self.resume_command()}"

    def withdraw(self) -> None:
        """Let the folder go, and remove what opening it wrote, if it held no run before."""
        self.log_file.close()
        if self._claim.is_held:
            self._requests.forget()
        self._claim.withdraw()
        if self.dry is not None:
            self.dry.remove()
