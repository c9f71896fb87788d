"""Whose a run's folder is: nobody's, a run's, or somebody else's; and what is removed of a run that is replaced.

Whether a training is the one that a run folder holds, as far as the result depends on it.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import re
import shutil
import sys
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from sfumato import config as configs
from sfumato.errors import ConfigError, RunError
from sfumato.runs.options import AnyRun, FolderOptions, persistent_config
from sfumato.utils.atomic import write_text
from sfumato.utils.formatting import format_list
from sfumato.utils.text_files import read_json_object, read_toml

IGNORED_OPTIONS = frozenset(
    (
        *("output", "overwrite", "resume", "force", "keep", "device", "tensorboard", "push_to_hub", "cache"),
        *("save_precision", "wandb", "wandb_name", "author", "license"),
        *("gradient_checkpointing", "micro_batch", "fused"),
    )
) | {f"{what}_every" for what in ("checkpoint", "sample", "measure", "save")}
"""Fields that change what is seen of a training, or where it runs, and nothing of what is learned."""
CHECKPOINT_OPTIONS = frozenset(
    (
        *("algo", "conv", "conv_rank", "dora", "factor", "loraplus_ratio", "method", "optimizer", "placeholder"),
        *("rank", "rank_of", "rate_of", "targets", "train_text_encoder", "train_words", "vectors", "word_vectors"),
    )
)
"""Fields that decide which numbers a checkpoint holds: of another value none fits."""
GOES_ON = ("0.27.",)
"""How the versions of sfumato begin whose runs go on in this one as they would have in theirs, to the bit."""
STAGES: Mapping[str, str] = {"style_emphasis": "pretrain", "self_play": "pretrain"}
"""By its name up to 0.27, each program that is now a stage of another."""
COMPARED_BY_CONTENT: Mapping[str, tuple[str, ...]] = {
    "images": ("data",),
    "preferred": ("data",),
    "rejected": ("partners",),
    "more_images": ("data",),
    "less_images": ("partners",),
    "data": ("data",),
    "validation_split": ("data", "validation"),
    "class_images": ("class",),
    "class_cache": ("class",),
    "base": ("base",),
    "vae": ("base", "vae"),
    "init_from": ("init",),
    "init": ("init",),
}
"""Fields that name what lies elsewhere, and the facts that tell its content: what was moved is the same."""


class DataSet(Protocol):
    """What a training learns from. fingerprint: over all of it. contents: of each picture, by name, two digests: of its
    files (it and its mask), and of its caption, crop and the settings of its source."""

    fingerprint: str
    contents: Mapping[str, str]


def copied_program(program: str) -> Path | None:
    """The file of the running program, where it is a copy of the trainer (`sfumato cp`) and not the trainer itself."""
    main = sys.modules.get("__main__")
    file = getattr(main, "__file__", None)
    config = getattr(main, "Config", None)
    # A script that imports the trainer's names runs the trainer itself, and reads no options.
    if file is None or getattr(config, "__module__", None) != "__main__" or not hasattr(main, "train"):
        return None
    own = importlib.util.find_spec(f"sfumato.trainers.{program}")
    found = Path(file).resolve()
    return None if own is not None and own.origin is not None and found == Path(own.origin).resolve() else found


def read_facts(folder: Path) -> dict[str, str]:
    """What `run.json` says the training depends on beside its config; nothing where it is missing or broken."""
    return {str(name): str(value) for name, value in read_json_object(folder / "run.json").items()}


def write_facts(folder: Path, facts: Mapping[str, str]) -> None:
    """What the run is made of, by name, as `run.json` of its folder."""
    write_text(folder / "run.json", json.dumps(dict(facts), indent=1) + "\n")


def read_pictures(folder: Path) -> dict[str, dict[str, str]]:
    """By fact, such as "data", its `DataSet.contents`; nothing where they were not written."""
    facts = read_json_object(folder / "pictures.json").items()
    return {name: {key: str(of) for key, of in each.items()} for name, each in facts if isinstance(each, dict)}


def write_pictures(folder: Path, pictures: Mapping[str, Mapping[str, str]]) -> None:
    """What `read_pictures` reads."""
    write_text(folder / "pictures.json", json.dumps(pictures, indent=1, default=dict) + "\n")


def changed_facts(
    known: Mapping[str, str],
    facts: Mapping[str, str],
    pictures: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = MappingProxyType({}),
) -> list[str]:
    """One text for each fact that has changed: "base 0123 -> 4567", by the beginnings of digests, or what is new in its
    pictures. pictures: by fact, its `DataSet.contents` then and now."""
    changed = [name for name in facts if name in known and known[name] != facts[name]]
    if known.get("sfumato", "").startswith(GOES_ON):
        changed = [name for name in changed if name != "sfumato"]
    return [
        changed_pictures(name, *pictures[name])
        if name in pictures
        else f"{name} {known[name][:24]} -> {facts[name][:24]}"
        for name in changed
    ]


def changed_pictures(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which pictures are others, "data: a.png has another caption, crop or setting, b.png is gone and 3 more".

    before, now: as `DataSet.contents`. Where all are the same, they come in another order.
    """
    found = [f"{each} is new" for each in now if each not in before]
    found += [f"{each} is gone" for each in before if each not in now]
    for each, digests in now.items():
        if digests != (then := before.get(each, digests)):
            is_file = digests.partition(" ")[0] != then.partition(" ")[0]
            found.append(f"{each} {'or its mask is another' if is_file else 'has another caption, crop or setting'}")
    return f"{name}: {format_list(found) or 'its images come in another order'}"


def differences(folder: Path, config: FolderOptions, program: str) -> list[str]:
    """One text, "rank 8 -> 16", for each difference between the folder's config and this one."""
    changed = []
    facts = read_facts(folder)
    saved_program = facts.get("program")
    stage = {"stage": saved_program} if saved_program in STAGES else {}
    if stage and saved_program is not None:
        saved_program = STAGES[saved_program]
    if saved_program not in (None, program):
        changed.append(f"program {saved_program} -> {program}")
    copy = copied_program(program)
    if saved_program and facts.get("copy") != (copy and copy.as_posix()):
        changed.append(f"program {facts.get('copy') or 'its own'} -> {copy or 'its own'}")
    try:
        before = read_toml(folder / "config.toml")
    except (OSError, ConfigError):
        return [*changed, "config.toml is missing or broken"]
    now = tomllib.loads(configs.to_toml(with_absolute_paths(config)))
    before = _defaults(config) | stage | before  # of a field that is newer than the folder
    for name, value in before.items():
        if isinstance(value, str) and isinstance(getattr(config, name, None), Path):  # older runs kept them as given
            before[name] = Path(value).absolute().as_posix()
    told_by_content = {name for name, by in COMPARED_BY_CONTENT.items() if not facts.keys().isdisjoint(by)}
    for name in sorted((before.keys() | now.keys()) - IGNORED_OPTIONS - told_by_content):
        if before.get(name) != now.get(name):
            changed.append(f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}")
    return changed


def with_absolute_paths(config: AnyRun) -> AnyRun:
    """The settled config with whole paths, so that a run may be resumed from wherever one is."""
    config = persistent_config(config)
    given = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    whole: dict[str, Any] = {name: value.absolute() for name, value in given.items() if isinstance(value, Path)}
    for name in ("base", "vae", "init"):  # a folder, a file, a hub id, or our own
        if isinstance(value := given.get(name), str) and value != "pocket" and Path(value).exists():
            whole[name] = Path(value).absolute().as_posix()
    return dataclasses.replace(config, **whole)


def _defaults(config: FolderOptions) -> dict[str, object]:
    """The fields' defaults, as a TOML file has them."""
    known = {f.name: f.default for f in dataclasses.fields(config) if f.default is not dataclasses.MISSING}
    return {
        name: value for name, value in configs.to_dict(dataclasses.replace(config, **known)).items() if name in known
    }


def _shown(value: object) -> str:
    return "unset" if value is None else " ".join(str(value).split())[:80]


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
    if holds_run and has_progress(folder) and not (config.overwrite or config.resume):
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
            names = [*_FOLDERS, *extra_names(read_facts(above))]
            if whole.relative_to(above).parts[0] in names:
                return above
    return None


def has_progress(folder: Path) -> bool:
    """Whether there is anything to lose; what an error stopped before its first step may simply be started again."""
    log = folder / "log.jsonl"
    return (log.exists() and log.stat().st_size > 0) or any((folder / "checkpoints").glob("[0-9]*"))


def extra_names(facts: Mapping[str, str]) -> list[str]:
    """The names in its folder that a run's program writes beside those of every run, by the run's facts."""
    names = facts.get("writes", "").split("/")
    return [name for name in names if name and not name.startswith(".") and Path(name).name == name]


def clear_folder(config: FolderOptions) -> None:
    """Remove what the run in the output folder has made: samples, plot, card and its pictures, and what was learned.

    What it did not write stays, what the config names, to learn from it, and pictures of a class, which lie under names
    that know all they depend on.
    """
    folder = config.output
    used = [Path(os.path.abspath(each)) for each in vars(config).values() if each and isinstance(each, str | Path)]
    name = run_name(folder)
    remove_samples(folder, -1)
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
    learned = [f"{name}.safetensors", *extra_names(read_facts(folder))]
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


def remove_new_files(folder: Path, before: Collection[str]) -> bool:
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


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing in the folder, as `files.atomic` names it."""
    for place in (folder, folder / "images", folder / "adapters", *(folder / "samples").glob("[0-9]*")):
        for path in place.glob(".*.part*"):
            if _LEFT_OVER.fullmatch(path.name):
                with suppress(OSError):
                    _remove(path)


def remove_samples(folder: Path, step: int) -> None:
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


def run_name(folder: Path) -> str:
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


def refuse_output_among(output: Path, folders: Iterable[Path]) -> None:
    """Refuse to write a run into one of the folders of its images."""
    if output.resolve() in {folder.resolve() for folder in folders}:
        raise ConfigError(
            f"--output {output} is a folder of the images; its samples and plot would be learned from, too. Give "
            f"a folder of its own, such as runs/{output.resolve().name}."
        )
