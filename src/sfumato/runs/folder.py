"""Whose a run's folder is: nobody's, a run's, or somebody else's; and what is removed of a run that is replaced."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from sfumato.errors import ConfigError, RunError
from sfumato.runs import identity
from sfumato.runs.options import FolderOptions
from sfumato.toml import read_toml

WRITTEN = ("config.toml", "README.md", "plot.png", "samples.png", "samples", "images", "checkpoints")
"""What a run writes into its folder under a name of its own; NAME.safetensors comes beside them."""
_OPENED = ("config.toml", "run.json", "pictures.json", "log.jsonl")
_FOLDERS = ("checkpoints", "samples", "images", "adapters", "tensorboard", "wandb")
_OF_THE_LOCK = (".lock", ".holder.json")
_KEPT = re.compile(r"-(?:step\d{8,}|\d{6,})[-.]")
"""What follows a run's name in those of adapters kept on the way: sd-scripts' form, or that of runs before 0.4.0."""
_OF_WANDB = re.compile(r"(?:offline-)?run-\d{8}_\d{6}-\w+|latest-run|debug(?:-\w+)?\.log")
"""What W&B writes into its folder."""
_LEFT_OVER = re.compile(r"\..+\.[0-9a-f]{12}\.part(\.\w+)?")


def snapshot_name(name: str, step: int) -> str:
    """What an adapter or word that a run keeps on the way is called, without an ending."""
    return f"{name}-step{step:08d}"


def check_folder(config: FolderOptions, also: Sequence[str] = ()) -> bool:
    """Whether the output folder holds a run that is to be resumed.

    Raises RunError for a folder that holds a run which is neither to be resumed nor replaced, for one without a run
    where one is to be resumed, for one that another run writes into, and for one that holds other things under the
    names that a run writes. also: more names that this one writes.
    """
    folder = config.output
    holds_run = is_run(folder)
    if holds_run and has_begun(folder) and not (config.overwrite or config.resume):
        raise RunError(
            f"{folder} holds a run already; --resume goes on with it, --overwrite replaces it, or give another "
            "--output."
        )
    if config.resume and not holds_run:
        raise RunError(f"there is no run to resume in {folder}; without --resume one begins there.")
    if not config.resume and (owner := owner_of(folder)) is not None:
        raise RunError(
            f"{folder} is a folder of the run in {owner}, which may remove what lies there; give an --output of its "
            "own."
        )
    mine = [*WRITTEN, f"{getattr(config, 'name', None) or folder.resolve().name}.safetensors", *also]
    taken = [] if holds_run else [name for name in mine if (folder / name).exists()]
    if taken:
        raise RunError(
            f"{folder} holds {', '.join(taken)} and no run; a run would write over that. Give an --output of its own."
        )
    return holds_run and config.resume


def is_run(folder: Path) -> bool:
    """Whether the folder holds a run."""
    return (folder / "run.json").exists() or (folder / "log.jsonl").exists()


def owner_of(folder: Path) -> Path | None:
    """The folder of the run that this one is a part of, such as its samples; None if it is of none."""
    whole = folder.resolve()
    for above in whole.parents:
        if is_run(above):
            names = [*_FOLDERS, *also_written(identity.read_facts(above))]
            if whole.relative_to(above).parts[0] in names:
                return above
    return None


def has_begun(folder: Path) -> bool:
    """Whether there is anything to lose; what an error stopped before its first step may simply be started again."""
    log = folder / "log.jsonl"
    return (log.exists() and log.stat().st_size > 0) or any((folder / "checkpoints").glob("[0-9]*"))


def also_written(facts: Mapping[str, str]) -> list[str]:
    """The names in its folder that a run's program writes beside those of every run, by the run's facts."""
    names = facts.get("writes", "").split("/")
    return [name for name in names if name and not name.startswith(".") and Path(name).name == name]


def clear(config: FolderOptions) -> None:
    """Remove what the run in the output folder has made: samples, plot, card and its pictures, and what was learned.

    What it did not write stays, what the config names, to learn from it, and pictures of a class, which lie under names
    that know all they depend on.
    """
    folder = config.output
    used = [Path(os.path.abspath(each)) for each in vars(config).values() if each and isinstance(each, str | Path)]
    name = name_of(folder)
    forget_samples(folder, -1)
    for picture in card_pictures(folder):
        _remove(folder / picture)
    for adapter in (folder / "adapters").glob("*.safetensors"):
        if _KEPT.match(adapter.name.removeprefix(name)) and adapter.absolute() not in used:
            _remove(adapter)
    for events in (folder / "tensorboard").glob("events.out.tfevents.*"):
        _remove(events)
    for kept in (folder / "wandb").glob("*"):
        if _OF_WANDB.fullmatch(kept.name):
            _remove(kept)
    for emptied in ("images", "adapters", "samples", "tensorboard", "wandb"):
        with suppress(OSError):  # somebody keeps something there, or there is none
            (folder / emptied).rmdir()
    learned = [f"{name}.safetensors", *also_written(identity.read_facts(folder))]
    for made in (
        "samples.png",
        "plot.png",
        "README.md",
        "pictures.json",
        *(each for each in learned if each != "adapters"),
    ):
        place = Path(os.path.abspath(folder / made))
        if not any(one.is_relative_to(place) for one in used):
            _remove(place)


def card_pictures(folder: Path) -> list[str]:
    """The pictures that the card in the folder shows, images/..., in the names that cards give them."""
    card = folder / "README.md"
    text = card.read_text("utf-8", "replace") if card.is_file() else ""
    return list(dict.fromkeys(re.findall(r"images/(?:image_\d+|before|after|before_after)\.png", text)))


def forget_new(folder: Path, before: Collection[str]) -> bool:
    """Remove what opening a run has written into its folder.

    before: the names that were in it. False, and nothing is removed, where the run has made more than that since, such
    as pictures of a class.
    """
    made = {path.name for path in folder.iterdir()} - set(before) - set(_OF_THE_LOCK)
    if made - set(_OPENED):
        return False
    for name in made:
        (folder / name).unlink()
    return True


def forget_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in the folder, as `files.atomic` names it."""
    for place in (folder, folder / "images", folder / "adapters", *(folder / "samples").glob("[0-9]*")):
        for path in place.glob(".*.part*"):
            if _LEFT_OVER.fullmatch(path.name):
                with suppress(OSError):
                    _remove(path)


def forget_samples(folder: Path, step: int) -> None:
    """Remove the samples after this step, which a run that goes on from it will draw again.

    Nothing else: others call folders by numbers, too, such as photographs by their day, and a run folder from somewhere
    else may have a link to these in the place of its samples.
    """
    for row in (folder / "samples").glob("[0-9]*"):
        if row.name.isdigit() and row.is_dir() and int(row.name) > step:
            for picture in row.glob("[0-9]*.png"):
                if picture.stem.isdigit():
                    _remove(picture)
            with suppress(OSError):  # somebody keeps something there, or it is a link
                row.rmdir()


def name_of(folder: Path) -> str:
    """What the run in the folder calls what it learns."""
    try:
        name = read_toml(folder / "config.toml").get("name")
    except (OSError, ConfigError):
        name = None
    return name if isinstance(name, str) and name and Path(name).name == name else folder.resolve().name


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
