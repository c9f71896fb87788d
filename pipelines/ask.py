"""Ask a training that is under way for samples, for what it has learned so far, or to end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sfumato.cli import run
from sfumato.config import TypedConfig, parse
from sfumato.errors import ConfigError, RunError
from sfumato.utils.formatting import escape_control


@dataclass(frozen=True)
class Config(TypedConfig):
    """Ask a training that is under way, in another terminal or on another machine with the same disk. It takes that up
    after its step, and says so.

    Example: sfumato ask runs/line --samples --save
    """

    folder: Path
    """The training's folder."""
    _: KW_ONLY
    samples: bool = False
    """Draw the sample images and measure now, as every --sample-every and --measure-every steps. What is learned does
    not depend on it."""
    save: bool = False
    """Save a checkpoint now, and an adapter or a word as it is now in RUN/adapters, as every --save-every steps."""
    stop: bool = False
    """Save a checkpoint and stop, as after Ctrl-C. `sfumato resume RUN` goes on."""
    finish: bool = False
    """Make no more steps, and write what is learned so far, as at the end."""


def ask(config: Config) -> list[str]:
    """Ask, and tell what will come of it. Raises ConfigError where no training is under way."""
    from sfumato.runs import options as request
    from sfumato.runs.folder import is_run
    from sfumato.runs.lock import is_in_use
    from sfumato.utils.formatting import quote_argument

    wanted = request.Request.NOTHING
    for each in request.Request:
        wanted |= each if getattr(config, each.word) else request.Request.NOTHING
    if not wanted:
        raise ConfigError("nothing is asked; give --samples, --save, --stop or --finish.")
    if config.stop and config.finish:
        raise ConfigError("--stop and --finish: a training that stops writes no results; give one of them.")
    folder = config.folder
    if not is_run(folder):
        raise ConfigError(f"{folder} holds no run; `sfumato runs` lists those that there are.")
    if not is_in_use(folder):
        command = f"sfumato resume {quote_argument(str(folder))}{' --finish' if config.finish else ''}"
        raise ConfigError(f"no training is under way in {folder}; one that was stopped goes on with: {command}")
    try:
        request.ask(folder, wanted)
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); see to its permissions.") from None
    places = {
        "samples": f"draws {folder / 'samples.png'} and measures",
        "save": f"saves a checkpoint, and an adapter or a word in {folder / 'adapters'}",
        "stop": "stops, to be resumed",
        "finish": f"ends, with what is learned so far in {folder}",
    }
    return [f"after its step it {places[each.word]}" for each in wanted]


def main(argv: Sequence[str]) -> int:
    """Ask as the arguments say."""
    for line in ask(parse(Config, argv, program="ask")):
        print(escape_control(line))
    return 0


if __name__ == "__main__":
    run(main)
