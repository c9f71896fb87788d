"""A training's run at Weights & Biases: its config, the rows of its log and its sample images."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError, RunError
from sfumato.utils.formatting import quote_argument

if TYPE_CHECKING:
    from PIL.Image import Image

Row = Mapping[str, float]

_WAIT_S = 60
"""For the server at the start, and for what is still to be uploaded at the end."""
_NOT_IN_PROJECTS = "/\\#?%:"


class WandbRun:
    """Only the main process has one. Whatever fails after the start is said once, and ends no training.

    W&B takes no step below its latest one. A resumed training makes some rows again: the server is not sent those that
    it has, and gets what a killed process has not sent. Offline files are whole, each by itself, because a killed
    process leaves W&B's without their end, or empty. A training that goes back makes other rows instead; these get W&B
    steps that follow its latest one, while `step`, the axis of the charts, is the training's.

    folder: of the run; W&B's own files are in its folder `wandb`. project: PROJECT or TEAM/PROJECT. name: unset, that
    in the environment, or the folder's. say: tells the person lines.
    """

    def __init__(self, folder: Path, project: str, name: str | None, say: Callable[[str], None]):
        """Raises ConfigError for what is no project, RunError without the package or a key."""
        self._team, _, self._project = project.rpartition("/")
        check_project(project)
        self._folder, self._say = folder, say
        self._name = name or os.environ.get("WANDB_NAME") or folder.resolve().name
        self._wandb = _package()
        self._run: Any = None
        self._at = 0  # W&B's latest step
        self._shift = 0  # how far its steps are beyond the training's
        self._again = -1  # the step up to which rows are made again
        self._note: Callable[[str], None] = lambda _: None

    def start(
        self, known: str | None, note: Callable[[str], None], config: Mapping[str, Any], rows: Sequence[Row]
    ) -> None:
        """Begin the run, or go on with the known one, offline if the server does not answer.

        known: what `note` got last, by which the run is known again; note keeps that in the run's folder. rows: the log
        so far, of which W&B gets what it has not.
        """
        where, number, shift = (known or "").rsplit(" ", 2) if known and known.count(" ") >= 2 else ("", "", "0")
        is_known = where == self._where and shift.isdecimal()
        self._number = number if is_known else secrets.token_hex(4)
        self._shift = int(shift) if is_known else 0
        self._note = note
        try:
            self._run = self._begun(config)
            self._at = self._run.step if is_known else 0  # 0 offline, where nobody knows
        except Exception as error:  # no one class holds all that W&B raises, nor pydantic and the system below it
            self._stop(error)
            return
        self._write_down()
        self._say(f"W&B: {self._address()}")
        self.add([row for row in rows if row.get("step", 0) + self._shift >= self._at])

    def add(self, rows: Sequence[Row]) -> None:
        """The rows of the log that are new."""
        for row in rows:
            if self._run is not None:
                self._send(row)

    def show(self, step: int, images: Sequence[Image], captions: Sequence[str]) -> None:
        """The sample images of a step. Not those that W&B has: of a step before its latest one."""
        if self._run is None or step + self._shift < self._at:
            return
        try:
            shown = [self._wandb.Image(image, caption=said) for image, said in zip(images, captions, strict=True)]
            self._run.log({"samples": shown, "step": step}, step=max(step + self._shift, self._at))
        except Exception as error:
            self._stop(error)

    def forget(self, rows: Sequence[Row], *, again: bool) -> None:
        """These rows have left the log. again: they will be made again, the same."""
        self._again = max((int(row.get("step", 0)) for row in rows), default=-1) if again else -1

    def finish(self, *, is_whole: bool) -> None:
        """Wait, not for ever, until all is uploaded. is_whole: whether the training made all its steps."""
        run, self._run = self._run, None
        if run is None:
            return
        try:
            run.finish(exit_code=0 if is_whole else 1)
        except Exception as error:
            self._say(f"W&B: {_reason(error)}. {self._upload()} uploads what is missing.")

    @property
    def _where(self) -> str:
        return f"{self._team}/{self._project}" if self._team else self._project

    def _begun(self, config: Mapping[str, Any]) -> Any:
        """W&B's run; an offline one where an online one cannot be had."""
        try:
            return self._init(config)
        except Exception as error:
            self._say(f"W&B: {_reason(error)}. The training is logged offline; {self._upload()} uploads it.")
            self._wandb.teardown()  # else its service says that the run is in use
            return self._init(config, mode="offline")

    def _init(self, config: Mapping[str, Any], **mode: str) -> Any:
        settings = self._wandb.Settings(
            console="off",  # what the program prints stays here, and so do its code and its repository
            disable_code=True,
            disable_git=True,
            silent=True,
            init_timeout=_WAIT_S,
            finish_timeout=_WAIT_S,
            finish_timeout_raises=True,
            **mode,
        )
        run = self._wandb.init(
            project=self._project,
            entity=self._team or None,
            name=self._name,
            id=self._number,
            resume="allow",
            reinit="create_new",  # a notebook may have a run of its own
            dir=str(self._folder),
            config=dict(config),
            allow_val_change=True,
            settings=settings,
        )
        run.define_metric("*", step_metric="step")
        return run

    def _send(self, row: Row) -> None:
        """A row, at the W&B step that is its own, or after the latest one where that has passed it."""
        step = int(row.get("step", 0))
        if step + self._shift < self._at:
            if step <= self._again:
                return
            self._shift = self._at + 1 - step
            self._write_down()
        self._at = step + self._shift
        try:
            self._run.log({"step": step, **row}, step=self._at)
        except Exception as error:
            self._stop(error)

    def _write_down(self) -> None:
        self._note(f"{self._where} {self._number} {self._shift}")

    def _address(self) -> str:
        if self._run.offline:
            return f"offline; {self._upload()} uploads the run"
        return str(self._run.url or "switched off by WANDB_MODE")

    def _upload(self) -> str:
        return f"`wandb sync {quote_argument(str(self._folder / 'wandb'))}/offline-run-*`"

    def _stop(self, error: Exception) -> None:
        self._run = None
        self._say(f"W&B: {_reason(error)}. The training goes on without it; log.jsonl has every row.")


def check_project(project: str) -> None:
    """Raises ConfigError for what W&B would refuse as PROJECT or TEAM/PROJECT."""
    parts = project.split("/")
    if len(parts) > 2 or any(not part.strip() or set(part) & set(_NOT_IN_PROJECTS) for part in parts):
        raise ConfigError(f"--wandb {project!r:.60}: no project of W&B; wanted PROJECT or TEAM/PROJECT.")


def _package() -> Any:
    """The package wandb. Raises RunError where it is not installed, or would ask for a key after all is loaded."""
    try:
        wandb: Any = import_module("wandb")
        mode = wandb.setup().settings.mode
    except ImportError:
        raise RunError('--wandb: the package is not installed; pip install "sfumato[wandb]".') from None
    except Exception as error:  # pydantic's, of a variable or a settings file
        raise RunError(f"--wandb: {_reason(error)}. Mend the variables WANDB_..., or W&B's settings file.") from None
    if mode in ("online", "run") and not _has_key(wandb):
        raise RunError(
            "--wandb: no API key of W&B; log in once with `wandb login`, or set WANDB_MODE=offline and upload later."
        )
    return wandb


def _has_key(wandb: Any) -> bool:
    try:
        return bool(wandb.login(prompt=False, verify=False))
    except Exception as error:
        raise RunError(f"--wandb: {_reason(error)}. Log in anew with `wandb login --relogin`.") from None


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__
