"""Whether a training is the one that a run folder holds, as far as the result depends on it."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from sfumato import config as configs
from sfumato.errors import ConfigError
from sfumato.files.atomic import write_text
from sfumato.json_text import object_in
from sfumato.numerals import some
from sfumato.runs.options import AnyRun, FolderOptions, settled
from sfumato.toml import read_toml

WITHOUT_EFFECT = frozenset(
    (
        *("output", "overwrite", "resume", "force", "keep", "device", "tensorboard", "push_to_hub", "cache"),
        *("save_precision", "wandb", "wandb_name", "author", "license"),
        *("gradient_checkpointing", "micro_batch", "fused"),
    )
) | {f"{what}_every" for what in ("checkpoint", "sample", "measure", "save")}
"""Fields that change what is seen of a training, or where it runs, and nothing of what is learned."""
OF_CHECKPOINT = frozenset(
    (
        *("algo", "conv", "conv_rank", "dora", "factor", "loraplus_ratio", "method", "optimizer", "placeholder"),
        *("rank", "rank_of", "rate_of", "targets", "train_text_encoder", "train_words", "vectors", "word_vectors"),
    )
)
"""Fields that decide which numbers a checkpoint holds: of another value none fits."""
BY_CONTENT: Mapping[str, tuple[str, ...]] = {
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
    return {str(name): str(value) for name, value in object_in(folder / "run.json").items()}


def write_facts(folder: Path, facts: Mapping[str, str]) -> None:
    """What the run is made of, by name, as `run.json` of its folder."""
    write_text(folder / "run.json", json.dumps(dict(facts), indent=1) + "\n")


def read_pictures(folder: Path) -> dict[str, dict[str, str]]:
    """By fact, such as "data", its `DataSet.contents`; nothing where they were not written."""
    facts = object_in(folder / "pictures.json").items()
    return {name: {key: str(of) for key, of in each.items()} for name, each in facts if isinstance(each, dict)}


def write_pictures(folder: Path, pictures: Mapping[str, Mapping[str, str]]) -> None:
    """What `read_pictures` reads."""
    write_text(folder / "pictures.json", json.dumps(pictures, indent=1, default=dict) + "\n")


def other_facts(
    known: Mapping[str, str],
    facts: Mapping[str, str],
    pictures: Mapping[str, tuple[Mapping[str, str], Mapping[str, str]]] = MappingProxyType({}),
) -> list[str]:
    """One text for each fact that has changed: "base 0123 -> 4567", by the beginnings of digests, or what is new in its
    pictures. pictures: by fact, its `DataSet.contents` then and now."""
    changed = [name for name in facts if name in known and known[name] != facts[name]]
    return [
        other_pictures(name, *pictures[name])
        if name in pictures
        else f"{name} {known[name][:24]} -> {facts[name][:24]}"
        for name in changed
    ]


def other_pictures(name: str, before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Which pictures are others, "data: a.png has another caption, crop or setting, b.png is gone and 3 more".

    before, now: as `DataSet.contents`. Where all are the same, they come in another order.
    """
    found = [f"{each} is new" for each in now if each not in before]
    found += [f"{each} is gone" for each in before if each not in now]
    for each, digests in now.items():
        if digests != (then := before.get(each, digests)):
            is_file = digests.partition(" ")[0] != then.partition(" ")[0]
            found.append(f"{each} {'or its mask is another' if is_file else 'has another caption, crop or setting'}")
    return f"{name}: {some(found) or 'its images come in another order'}"


def differences(folder: Path, config: FolderOptions, program: str) -> list[str]:
    """One text, "rank 8 -> 16", for each difference between the folder's config and this one."""
    changed = []
    facts = read_facts(folder)
    saved_program = facts.get("program")
    if saved_program not in (None, program):
        changed.append(f"program {saved_program} -> {program}")
    copy = copied_program(program)
    if saved_program and facts.get("copy") != (copy and copy.as_posix()):
        changed.append(f"program {facts.get('copy') or 'its own'} -> {copy or 'its own'}")
    try:
        before = read_toml(folder / "config.toml")
    except (OSError, ConfigError):
        return [*changed, "config.toml is missing or broken"]
    now = tomllib.loads(configs.to_toml(anchored(config)))
    before = _defaults(config) | before  # of a field that is newer than the folder
    for name, value in before.items():
        if isinstance(value, str) and isinstance(getattr(config, name, None), Path):  # older runs kept them as given
            before[name] = Path(value).absolute().as_posix()
    told_by_content = {name for name, by in BY_CONTENT.items() if not facts.keys().isdisjoint(by)}
    for name in sorted((before.keys() | now.keys()) - WITHOUT_EFFECT - told_by_content):
        if before.get(name) != now.get(name):
            changed.append(f"{name} {_shown(before.get(name))} -> {_shown(now.get(name))}")
    return changed


def anchored(config: AnyRun) -> AnyRun:
    """The settled config with whole paths, so that a run may be resumed from wherever one is."""
    config = settled(config)
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
