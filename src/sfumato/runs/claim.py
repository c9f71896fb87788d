"""A run's claim on its folder: the lock, and the files that say what the run is made of.

config.toml         the resolved config
run.json            the facts: the program, and what the training depends on beside its config
pictures.json       by what each picture is known again
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch

import sfumato
from sfumato import config as configs
from sfumato.errors import RunError
from sfumato.runs import folder as identity
from sfumato.runs.folder import check_folder, extra_names, has_progress, is_run, remove_new_files
from sfumato.runs.lock import Lock
from sfumato.utils.atomic import write_text

if TYPE_CHECKING:
    from sfumato.runs.options import FolderOptions


class RunClaim:
    """Only the main process locks the folder and writes.

    say: tells the person lines, in the main process. facts: what the training depends on, by name. replaces: whether
    the folder holds a run that is still to be removed. copy: the program's file, where it is a copy of a trainer.
    """

    def __init__(self, folder: Path, config: FolderOptions, say: Callable[..., None], *, is_main: bool):
        self.folder = folder
        self.facts: dict[str, str] = {}
        self.replaces = False
        self.copy: Path | None = None
        self._config, self._say, self._is_main = config, say, is_main
        self._lock = Lock(folder)
        self._pictures: dict[str, Mapping[str, str]] = {}
        self._before: set[str] | None = None  # what was in the folder, where it held no run

    @property
    def is_held(self) -> bool:
        """Whether this process has the folder."""
        return self._lock.is_held

    def take(self, program: str, writes: Sequence[str]) -> bool:
        """Lock the folder and see what it holds: whether that is a run to resume.

        writes: names in the folder that the program writes beside those of every run. Raises RunError where the folder
        is not for this run.
        """
        if self._is_main:
            if not is_run(self.folder):
                self._before = {path.name for path in self.folder.iterdir()} if self.folder.exists() else set()
            self.folder.mkdir(parents=True, exist_ok=True)
            left = self._lock.take()
            if left:
                self._say(left)
        # Looked at under the lock, so that of two that start at once the second sees what the first has begun.
        resumes = check_folder(self._config, writes)
        if resumes:
            self.facts = identity.read_facts(self.folder)
            self._refuse_changes("another config", identity.differences(self.folder, self._config, program))
        else:
            self.replaces = has_progress(self.folder)
        return resumes

    def name_program(self, program: str, writes: Sequence[str]) -> None:
        """Note what trains, and the names that it writes."""
        names = dict.fromkeys([*extra_names(self.facts), *writes])
        self.facts |= {"program": program, **({"writes": "/".join(names)} if names else {})}
        self.copy = identity.copied_program(program)
        if self.copy is not None:
            self.facts["copy"] = self.copy.as_posix()

    def identify(self, depends_on: Mapping[str, str | identity.DataSet], count: int, *, resumes: bool) -> None:
        """Note what the training depends on. count: its processes. resumes: from a checkpoint of the folder.

        Raises RunError where a run that resumes depends on other things than the folder's.
        """
        sets = {name: each for name, each in depends_on.items() if not isinstance(each, str)}
        self._pictures = {name: each.contents for name, each in sets.items()}
        facts = {name: each if isinstance(each, str) else each.fingerprint for name, each in depends_on.items()}
        facts |= {"processes": str(count), "sfumato": sfumato.__version__}
        facts |= {"torch": torch.__version__.split("+")[0]}
        facts |= {name: version(name) for name in ("diffusers", "transformers")}
        if resumes:
            before = identity.read_pictures(self.folder)
            both = {name: (before[name], each) for name, each in self._pictures.items() if name in before}
            self._refuse_changes("other things than these", identity.changed_facts(self.facts, facts, both))
        self.facts |= facts

    def note(self, name: str, value: str) -> None:
        """Write down one more fact, if the disk takes it."""
        self.facts[name] = value
        if self._is_main:
            with suppress(OSError):
                identity.write_facts(self.folder, self.facts)

    def write_facts(self) -> None:
        """Write run.json and pictures.json."""
        identity.write_facts(self.folder, self.facts)
        if self._pictures:
            identity.write_pictures(self.folder, self._pictures)

    def write_config(self) -> None:
        """Write config.toml."""
        write_text(self.folder / "config.toml", configs.to_toml(identity.with_absolute_paths(self._config)))

    def release(self) -> None:
        """Let the folder go."""
        if self._is_main:
            self._lock.release()

    def withdraw(self) -> None:
        """Let the folder go, and remove what opening it wrote, if it held no run before."""
        is_gone = self._lock.is_held and self._before is not None and remove_new_files(self.folder, self._before)
        self._lock.release(trace=not is_gone)
        if is_gone:
            with suppress(OSError):  # something of somebody else's is in it
                self.folder.rmdir()

    def _refuse_changes(self, what: str, changed: list[str]) -> None:
        if changed and not self._config.force:
            raise RunError(
                f"{self.folder} was trained with {what}: {'; '.join(changed)}. Resume with the same, or with --force."
            )
        if of_checkpoint := [line for line in changed if line.partition(" ")[0] in identity.CHECKPOINT_OPTIONS]:
            raise RunError(
                f"{self.folder} was trained with {what}: {'; '.join(of_checkpoint)}. No checkpoint fits that: resume "
                "with the same, or begin anew with --overwrite."
            )
        self._say(*(f"changed by --force: {line}" for line in changed))
