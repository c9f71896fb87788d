"""Convert a training of sd-scripts, diffusers' scripts, OneTrainer, ai-toolkit or SimpleTuner to a config of ours."""

from __future__ import annotations

import importlib
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass, fields
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.utils.formatting import escape_control, option_flag, pluralize, quote_argument, say

if TYPE_CHECKING:
    from sfumato.interop.settings import Recipe

_NAMES_A_FILE = re.compile(r"\.(safetensors|ckpt)$|\\|^[/.~]|^\w:")
"""Of a base: no hub id, whatever the system that it was written on."""


@dataclass(frozen=True)
class Config:
    """Convert a training of another tool to a config of `sfumato train`, and its images to a dataset.toml.

    Reads a config of kohya_ss, sd-scripts (its --config_file), OneTrainer, ai-toolkit or SimpleTuner, or a script with
    a command of sd-scripts or of diffusers' example scripts. The config also says what the other tool does by default
    and sfumato does not. Settings without a counterpart are listed.

    Example: sfumato recipe train.sh -o mine.toml
    """

    file: Path
    """The other tool's config (.toml, .json, .yaml), or a script (.sh, .bat, .txt) with its command."""
    _: KW_ONLY
    output: Annotated[Path, Parameter(alias="-o")]
    """The config to write, such as mine.toml; images are listed in mine-images.toml beside it. Neither may exist."""


def main(argv: Sequence[str]) -> int:
    """Write the config. Lists on stderr what could not be converted, and prints the command that trains."""
    # A first word that ends in .toml is the other tool's, not a config of this program.
    config = parse(Config, argv, program="recipe", first_may_be_config=False)
    from sfumato.interop.recipes import convert
    from sfumato.utils.atomic import write_text

    images = config.output.with_name(f"{config.output.stem}-images.toml")
    training = convert(config.file, images)
    if config.output.suffix.lower() != ".toml":
        raise ConfigError(f"--output {config.output}: wanted a name that ends in .toml.")
    for path in (config.output, images):
        if path.exists():
            raise ConfigError(f"--output {config.output}: {path} exists and is not written over. Name another file.")
    recipe = training.recipe
    trainer = importlib.import_module(f"sfumato.trainers.{recipe.program}")
    refuse(config.file, recipe, trainer)
    say(*map(escape_control, (*training.notes, *absent_base(recipe, config.output))))
    if training.images is not None:
        write_text(images, training.images.text)
        say(f"{images}: {pluralize(training.images.sources, 'source')}")
    write_text(config.output, training.to_toml({field.name: field.default for field in fields(trainer.Config)}))
    say(f"{config.output}: a config of {recipe.program}")
    asked = [f"{option_flag(name)} {'DIR' if name == 'images' else 'WORDS'}" for name in recipe.ask]
    run_folder = quote_argument((Path("runs") / config.output.stem).as_posix())
    print(
        " ".join(
            [
                "sfumato train",
                recipe.program,
                quote_argument(str(config.output)),
                *asked,
                "--output",
                run_folder,
            ]
        )
    )
    return 0


def refuse(file: Path, recipe: Recipe, trainer: ModuleType) -> None:
    """Refuse what the trainer would refuse, before anything is written. Raises ConfigError."""
    left = {"output": "runs/recipe", **dict.fromkeys(recipe.ask, "thing")}
    try:
        trainer.check(trainer.Config(**{**left, **recipe.values}))
    except ConfigError as error:
        raise ConfigError(f"{file.name}: {recipe.program} refuses what it asks for: {error}") from None


def absent_base(recipe: Recipe, output: Path) -> list[str]:
    """A line where the base is a file or folder, by its spelling, that this machine does not have: trainings are often
    converted elsewhere than where they ran. output: the config that is written."""
    base = str(recipe.values.get("base", ""))
    if not _NAMES_A_FILE.search(base) or Path(base).expanduser().exists():
        return []
    return [f"the base {base} is not on this machine; name one that is by --base, or in {output}"]


if __name__ == "__main__":
    run(main)
