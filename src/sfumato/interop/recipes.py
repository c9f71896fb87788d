"""Other tools' trainings -> a config of ours, a file a tool.

What has a meaning here is converted; what the other tool does by default and ours does not is written out; every other
setting that does something is named in a note, never dropped in silence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop import ai_toolkit, diffusers_scripts, onetrainer, sd_scripts, simpletuner
from sfumato.interop.datasets import Converted, convert_values
from sfumato.interop.datasets.settings import OF_TRAINING
from sfumato.interop.datasets.settings import read_settings as read_data
from sfumato.interop.datasets.simpletuner import OF_CONFIG
from sfumato.interop.read_training import AI_TOOLKIT, ONETRAINER, SD_SCRIPTS, SIMPLETUNER, read_training
from sfumato.interop.settings import ForeignSettings, Recipe

_SETTLED = (OF_TRAINING, OF_CONFIG)
"""Notes of data sets by themselves."""


@dataclass(frozen=True)
class Training:
    """A training as ours. source: what it was converted from. images: the dataset.toml that it names, None for none.
    notes: what could not be carried over, and what to do."""

    recipe: Recipe
    source: str
    images: Converted | None
    notes: tuple[str, ...]

    def to_toml(self, defaults: Mapping[str, Any]) -> str:
        """The config. defaults: of our trainer's options, of which none is written that only says the same."""
        import tomlkit

        told = self.recipe.told
        usual = {k: v for k, v in self.recipe.usual.items() if k not in told and v != defaults.get(k)}
        document = tomlkit.document()
        document.add(tomlkit.comment(f"Converted from {self.source}."))
        for name, value in told.items():
            document.add(name, tomlkit.item(value))
        if usual:
            document.add(tomlkit.nl())
            document.add(tomlkit.comment("What that program does where it is told nothing, and sfumato otherwise."))
            for name, value in usual.items():
                document.add(name, tomlkit.item(value))
        return tomlkit.dumps(document)


def convert(path: Path, images: Path) -> Training:
    """The training at `path`, whose pictures a dataset.toml at `images` will name.

    Raises ConfigError for a file that is no known training, and for one that has no counterpart.
    """
    asked = read_training(path)
    data = None
    if asked.script in SD_SCRIPTS:
        data, recipe = _images(asked, images), sd_scripts.convert(asked)
    elif asked.script == ONETRAINER:
        data = _concepts(asked, images)
        if data is None:  # of which a dataset.toml could name several
            asked.values["resolution"] = (asked.text("resolution") or "512").split(",")[0]
        recipe = onetrainer.convert(asked)
    elif asked.script == AI_TOOLKIT:
        recipe = ai_toolkit.convert(asked)
        if asked.values.get("datasets"):
            data = convert_values({"process": [asked.values]}, asked.name, asked.folder, images)
        asked.taken |= ai_toolkit.OF_DATA
    elif asked.script == SIMPLETUNER:
        recipe = simpletuner.convert(asked)
        backends = simpletuner.data_backends(asked)
        data = convert_values(backends, asked.name, asked.folder, images) if backends else None
        asked.taken |= simpletuner.OF_DATA
    else:
        recipe = diffusers_scripts.convert(asked)
    if data is not None and data.resolution is not None:
        recipe.say("resolution", data.resolution)
    recipe.say("images", None if data is None else images.as_posix())
    if "images" not in recipe.told and recipe.program != "slider":  # which may draw its own
        recipe.ask = ("images", *recipe.ask)
    of_images = [] if data is None else [n for n in data.notes if n not in _SETTLED and not asked.is_settled(n)]
    return Training(
        recipe, f"{asked.script} in {path.name}", data, (*dict.fromkeys([*asked.notes, *of_images, *recipe.notes]),)
    )


def _images(asked: ForeignSettings, target: Path) -> Converted | None:
    """The pictures that a training of sd-scripts names, None for none. A config of data sets has its batch and size,
    too."""
    if given := asked.text("dataset_config"):
        config = asked.find(given)
        if config is None:
            raise ConfigError(f"{asked.name}: its dataset_config {given} is neither beside it nor in this folder.")
        values = _with_general(asked, read_data(config))
        return convert_values(values, config.name, config.resolve().parent, target)
    if not asked.text("train_data_dir"):
        return None
    return convert_values(asked.values, asked.name, asked.folder, target)


def _with_general(asked: ForeignSettings, values: Any) -> Any:
    """The config of data sets with what the training itself says of all, which counts where the config says nothing.
    The training gets the batch and size of the first data set."""
    if not isinstance(values, dict) or not isinstance(general := values.get("general", {}), dict):
        return values
    of_all = (*sd_scripts.OF_SUBSETS, "resolution")
    said = {key: asked.values[key] for key in of_all if asked.values.get(key) is not None}
    datasets = values.get("datasets")
    datasets = [each for each in datasets if isinstance(each, dict)] if isinstance(datasets, list) else []
    for key, there in (("resolution", "resolution"), ("train_batch_size", "batch_size")):
        found = [{there: asked.values.get(key), **general, **each}.get(there) for each in datasets]
        asked.taken.add(there)
        if found:
            asked.values[key] = found[0]
        if there == "batch_size" and any(each != found[0] for each in found):
            asked.notes.append(f"{there} of its data sets: {', '.join(map(str, found))}; all have the first of these")
    return {**values, "general": {**said, **general}}


def _concepts(asked: ForeignSettings, target: Path) -> Converted | None:
    """The pictures of a training of OneTrainer, None where their file is not here."""
    concepts, folder = asked.get("concepts"), asked.folder
    if concepts is None and (given := asked.text("concept_file_name")):
        file = asked.find(given)
        concepts = None if file is None else read_data(file)
    if not concepts:
        return None
    values = {"concepts": concepts, "masked_training": asked.flag("masked_training")}
    values["resolution"] = asked.text("resolution", "512")
    return convert_values(values, asked.name, folder, target)
