"""Convert a data set config of kohya's sd-scripts, ai-toolkit, OneTrainer or SimpleTuner to a dataset.toml."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.utils.formatting import escape_control, pluralize, say


@dataclass(frozen=True)
class Config:
    """Convert the data set config of another tool to a dataset.toml.

    Reads configs of kohya's sd-scripts (.toml, .json), ai-toolkit (.yaml, .json), OneTrainer (concepts.json, or the
    config of a whole training) and SimpleTuner (multidatabackend.json). Settings without a counterpart are listed.

    Example: sfumato dataset kohya.toml -o dataset.toml
    """

    file: Path
    """Config of the other tool."""
    _: KW_ONLY
    output: Annotated[Path | None, Parameter(alias="-o")] = None
    """The dataset.toml to write; it must not exist. Unset: it is printed."""


def main(argv: Sequence[str]) -> int:
    """Print or write the dataset.toml. Lists on stderr what could not be converted."""
    # A first word that ends in .toml is the other tool's, not a config of this program.
    config = parse(Config, argv, program="dataset", first_may_be_config=False)
    from sfumato.interop.datasets import convert
    from sfumato.utils.atomic import write_text

    if config.output is not None and config.output.exists():
        raise ConfigError(f"--output {config.output}: exists and is not written over. Name another file.")
    if config.output is not None and config.output.suffix.lower() != ".toml":
        raise ConfigError(f"--output {config.output}: wanted a name that ends in .toml.")
    converted = convert(config.file, config.output)
    say(*map(escape_control, converted.notes))
    if config.output is None:
        text = converted.text
        if sys.stdout is not None and sys.stdout.isatty():
            text = "\n".join(map(escape_control, text.split("\n")))
        elif isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(encoding="utf-8")  # of a file that it is sent to, which is TOML
        print(text, end="")
    else:
        write_text(config.output, converted.text)
        count = pluralize(converted.sources, "source")
        say(f"{config.output}: {count} from {converted.tool}")
    return 0


if __name__ == "__main__":
    run(main)
