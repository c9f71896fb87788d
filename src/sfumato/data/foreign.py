"""Other tools' data set configs -> a dataset.toml: kohya's sd-scripts (TOML, JSON) and ai-toolkit (YAML, JSON).

Of kohya's there are two: one that lists data sets, and one of a whole training (sd-scripts' --config_file, kohya_ss's
saved settings), whose folder holds folders with repeats. What has a meaning here is converted; every other setting
that is not at its neutral value is named in a note, never dropped in silence.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sfumato.data.captions import CAPTION_SUFFIXES
from sfumato.data.source import check_keys, source_of
from sfumato.errors import ConfigError

Tool = Literal["kohya", "ai-toolkit"]
_KOHYA_ELSEWHERE = {
    "resolution": "--resolution",
    "batch_size": "--batch",
    "enable_bucket": "buckets are always on",
    "min_bucket_reso": "buckets follow --resolution",
    "max_bucket_reso": "buckets follow --resolution",
    "bucket_reso_steps": "buckets follow the base",
    "max_token_length": "the base's own limit",
    "cache_info": "headers are always read anew",
    "debug_dataset": "sfumato check --sheet",
}
_KOHYA_USED = frozenset(
    [
        "image_dir",
        "num_repeats",
        "is_reg",
        "class_tokens",
        "caption_extension",
        "shuffle_caption",
        "keep_tokens",
        "caption_separator",
        "caption_dropout_rate",
        "caption_tag_dropout_rate",
        "caption_prefix",
        "caption_suffix",
        "flip_aug",
        "random_crop",
        "alpha_mask",
        "prior_loss_weight",
    ]
)
_TRAINING_ELSEWHERE = _KOHYA_ELSEWHERE | {
    "max_resolution": "--resolution",
    "train_batch_size": "--batch",
    "cache_latents": "latents are always computed once",
    "cache_latents_to_disk": "--cache DIR",
}
_TRAINING_ONLY = (
    "color_aug",
    "face_crop_aug_range",
    "caption_dropout_every_n_epochs",
    "token_warmup_min",
    "token_warmup_step",
    "weighted_captions",
    "keep_tokens_separator",
    "secondary_separator",
    "enable_wildcard",
    "bucket_no_upscale",
)
"""Settings of a training that change what is seen of its pictures and have no counterpart."""
_TOOLKIT_ELSEWHERE = {
    "resolution": "--resolution",
    "batch_size": "--batch",
    "buckets": "buckets are always on",
    "bucket_tolerance": "buckets follow the base",
    "cache_latents": "latents are always computed once",
    "cache_latents_to_disk": "--cache DIR",
    "cache_text_embeddings": "embeddings are always computed once",
    "type": "pictures only",
    "num_workers": "needs none",
    "prefetch_factor": "needs none",
}
_TOOLKIT_USED = frozenset(
    [
        "folder_path",
        "dataset_path",
        "caption_ext",
        "trigger_word",
        "default_caption",
        "random_crop",
        "is_reg",
        "token_dropout_rate",
        "shuffle_tokens",
        "caption_dropout_rate",
        "keep_tokens",
        "flip_x",
        "alpha_mask",
        "num_repeats",
        "loss_multiplier",
    ]
)


@dataclass(frozen=True)
class Converted:
    """text: of the dataset.toml. sources: how many it names. notes: what could not be carried over, and why."""

    text: str
    sources: int
    tool: Tool
    notes: tuple[str, ...]


def convert(path: Path, target: Path | None = None) -> Converted:
    """The config at `path` as a dataset.toml that lies at `target` (beside `path` if None), to which its paths are
    relative where they can be. Raises ConfigError for a file that is neither tool's."""
    values = _read(path)
    home = (target or path).resolve().parent
    notes: list[str] = []
    tool: Tool
    if isinstance(values.get("datasets"), list):
        tool, entries = "kohya", list(_kohya(values, notes))
    elif (training := _training(values)) is not None:
        tool, entries = "kohya", list(_kohya_training(training, notes))
    elif (datasets := _toolkit_datasets(values)) is not None:
        tool, entries = "ai-toolkit", list(_toolkit(datasets, notes))
    else:
        raise ConfigError(
            f"{path.name}: neither kohya's [[datasets]] or train_data_dir nor ai-toolkit's config.process[].datasets "
            "is in it. Name such a config; datasets/README.md says how a dataset.toml is written by hand."
        )
    for number, entry in enumerate(entries, start=1):
        where = f"{path.name}, its data set {number}: "
        check_keys(entry, where)
        if entry.get("repeats", 1) < 1:  # which sd-scripts leaves out, too
            notes.append(f"{entry['path']}: {entry['repeats']} repeats, so it is left out")
            continue
        source_of(entry, home, where)
    entries = [entry for entry in entries if entry.get("repeats", 1) >= 1]
    if not entries:
        raise ConfigError(
            f"{path.name}: its list of data sets is empty, or none of them has repeats; there is nothing to convert."
        )
    for entry in entries:
        entry["path"] = _relative(entry["path"], path.resolve().parent, home, notes)
    return Converted(_to_toml(entries, path.name, tool), len(entries), tool, tuple(dict.fromkeys(notes)))


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{path}: not readable as text ({reason}). Name the config of the other tool.") from None
    try:
        if path.suffix.lower() == ".toml":
            values: Any = tomllib.loads(text)
        elif path.suffix.lower() == ".json":
            values = json.loads(text)
        elif path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            values = yaml.safe_load(text)
        else:
            raise ConfigError(f"{path.name}: wanted .toml or .json (kohya), .yaml or .json (ai-toolkit).")
    except ConfigError:
        raise
    except Exception as error:  # each parser has its own
        raise ConfigError(f"{path.name}: cannot be parsed ({' '.join(str(error).split())[:120]}). Mend it.") from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"{path.name}: wanted a table of settings, as kohya's and ai-toolkit's configs are, found "
            f"{type(values).__name__}. Others are not read; datasets/README.md says how a dataset.toml is written."
        )
    told: dict[str, Any] = _without_empty(values)
    return told


def _without_empty(values: Any) -> Any:
    """The settings without those that name nothing, as a YAML file's `keep_tokens:` does: they are as if left out."""
    if isinstance(values, dict):
        return {key: _without_empty(value) for key, value in values.items() if value is not None}
    return [_without_empty(value) for value in values] if isinstance(values, list) else values


def _kohya(values: Mapping[str, Any], notes: list[str]) -> Iterator[dict[str, Any]]:
    """A subset's settings fall back to its data set's, then to [general]."""
    general = values.get("general", {})
    for dataset in _tables(values["datasets"], "datasets"):
        if not dataset.get("subsets"):
            raise ConfigError("a data set has no subsets, which name the folders; give it one with an image_dir.")
        for subset in _tables(dataset["subsets"], "subsets"):
            own = {**general, **{key: value for key, value in dataset.items() if key != "subsets"}, **subset}
            if "metadata_file" in own:
                notes.append("metadata_file: list the captions in metadata.jsonl or .txt files instead")
            if "image_dir" not in own:
                raise ConfigError("a subset has no image_dir, so there is nothing to read; give it one.")
            yield _kohya_source(own)
            notes.extend(_left_over(own, _KOHYA_USED | {"metadata_file"}, _KOHYA_ELSEWHERE))


def _tables(values: Any, name: str) -> list[dict[str, Any]]:
    """The list's entries. Raises ConfigError for one that is no table of settings."""
    if not isinstance(values, list):
        raise ConfigError(f"{name} is {values!r:.40}; wanted a list of tables.")
    for value in values:
        if not isinstance(value, dict):
            raise ConfigError(f"{name} holds {value!r:.40}; wanted a table of settings.")
    return values


_TEXTS = frozenset(
    (
        *("image_dir", "class_tokens", "caption_extension", "caption_separator", "caption_prefix", "caption_suffix"),
        *("folder_path", "dataset_path", "caption_ext", "trigger_word", "default_caption"),
    )
)


def _told(own: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with numbers and yes or no as such, where a program saved its fields as texts: "0.1", "true"."""
    return {key: value if key in _TEXTS else _scalar(value) for key, value in own.items()}


def _scalar(value: Any) -> Any:
    try:
        return json.loads(value.lower()) if isinstance(value, str) else value
    except ValueError:
        return value


def _kohya_source(own: Mapping[str, Any]) -> dict[str, Any]:
    own = _told(own)
    return _plain(
        path=own["image_dir"],
        repeats=own.get("num_repeats", 1),
        **{"class": bool(own.get("is_reg"))},
        words=own.get("class_tokens", ""),
        caption=_affixes(own.get("caption_prefix"), own.get("caption_suffix")),
        caption_suffix=_suffix(own.get("caption_extension")),
        shuffle_tags=own.get("shuffle_caption", False),
        keep_tags=own.get("keep_tokens", 0),
        separator=own.get("caption_separator") or ",",
        caption_dropout=own.get("caption_dropout_rate", 0.0),
        tag_dropout=own.get("caption_tag_dropout_rate", 0.0),
        flip=own.get("flip_aug", False),
        crop="random" if own.get("random_crop") else "center",
        mask="alpha" if own.get("alpha_mask") else "none",
        weight=own.get("prior_loss_weight", 1.0) if own.get("is_reg") else 1.0,
    )


def _training(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a whole training, those in sections too, if it names folders of pictures."""
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    flat |= {key: value for section in values.values() if isinstance(section, dict) for key, value in section.items()}
    if other := flat.get("dataset_config"):
        raise ConfigError(f"its data sets are in {other}; convert that file.")
    return flat if flat.get("train_data_dir") else None


def _kohya_training(own: Mapping[str, Any], notes: list[str]) -> Iterator[dict[str, Any]]:
    """Folders that hold folders with repeats: of the subject, and of the class (reg_data_dir)."""
    if own.get("in_json"):
        notes.append("in_json: list the captions in metadata.jsonl or .txt files instead")
    for key, is_class in (("train_data_dir", False), ("reg_data_dir", True)):
        if own.get(key):
            yield _kohya_source({**own, "image_dir": own[key], "is_reg": is_class, "num_repeats": 1})
    data = {key: own[key] for key in (*_TRAINING_ELSEWHERE, *_TRAINING_ONLY) if key in own}
    notes.extend(_left_over(data, frozenset(), _TRAINING_ELSEWHERE))
    notes.append("settings of the training itself are not converted; sfumato train lora --help lists its own")


def _toolkit_datasets(values: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]] | None:
    """(data set, trigger word of its process) of each."""
    config = values.get("config", values)
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list):
        return None
    return [
        (dataset, process.get("trigger_word") or "")
        for process in processes
        if isinstance(process, dict)
        for dataset in _tables(process.get("datasets", []), "datasets")
    ]


def _toolkit(datasets: list[tuple[Mapping[str, Any], str]], notes: list[str]) -> Iterator[dict[str, Any]]:
    for said, trigger in datasets:
        own = _told(said)
        path = own.get("folder_path") or own.get("dataset_path")
        if not path:
            raise ConfigError("a data set has no folder_path, so there is nothing to read; give it one.")
        word = own.get("trigger_word") or trigger
        if word:
            notes.append(
                f"trigger_word {word!r}: put before each caption by a template, also before those that hold it; where "
                'captions say [trigger] themselves, set caption = "{caption}"'
            )
        if own.get("mask_path"):
            notes.append('mask_path: move the masks to masks/ in the picture folder, then set mask = "files"')
        yield _plain(
            path=path,
            repeats=own.get("num_repeats", 1),
            **{"class": bool(own.get("is_reg"))},
            words=own.get("default_caption") or "",
            caption="{trigger}, {caption}" if word else None,
            trigger=word or None,
            caption_suffix=_suffix(own.get("caption_ext", "txt")),
            shuffle_tags=own.get("shuffle_tokens", False),
            keep_tags=_number(own, "keep_tokens") + (1 if word and own.get("shuffle_tokens") else 0),
            caption_dropout=own.get("caption_dropout_rate", 0.0),
            tag_dropout=own.get("token_dropout_rate", 0.0),
            flip=own.get("flip_x", False),
            crop="random" if own.get("random_crop") else "center",
            mask="alpha" if own.get("alpha_mask") else "none",
            weight=own.get("loss_multiplier", 1.0),
        )
        notes.extend(_left_over(own, _TOOLKIT_USED | {"mask_path"}, _TOOLKIT_ELSEWHERE))


def _number(own: Mapping[str, Any], key: str) -> int:
    if not isinstance(value := own.get(key, 0), int):
        raise ConfigError(f"{key} is {value!r:.40}; wanted a whole number.")
    return value


def _left_over(own: Mapping[str, Any], used: frozenset[str], elsewhere: Mapping[str, str]) -> Iterator[str]:
    for key, value in own.items():
        if key in elsewhere:
            yield f"{key} = {value}: {elsewhere[key]}"
        elif key not in used and value not in (None, False, "", [], {}, 0):
            yield f"{key} = {value}: has no counterpart here and is left out"


def _plain(**values: Any) -> dict[str, Any]:
    """The values that are not the defaults of a source, in the order of datasets/README.md."""
    neutral = {"repeats": 1, "class": False, "words": "", "caption": None, "trigger": None, "caption_suffix": None}
    neutral |= {"shuffle_tags": False, "keep_tags": 0, "separator": ",", "caption_dropout": 0, "tag_dropout": 0}
    neutral |= {"flip": False, "crop": "center", "mask": "none", "weight": 1}
    return {key: value for key, value in values.items() if key == "path" or value != neutral[key]}


def _affixes(prefix: str | None, suffix: str | None) -> str | None:
    return f"{prefix or ''} {{caption}} {suffix or ''}".strip() if prefix or suffix else None


def _suffix(extension: str | None) -> str | None:
    """An ending that is not looked for first anyway."""
    if not extension:
        return None
    extension = extension if extension.startswith(".") else f".{extension}"
    return None if extension.lower() == CAPTION_SUFFIXES[0] else extension


def _relative(path: Any, source: Path, home: Path, notes: list[str]) -> str:
    """The folder as seen from `home`, to which a path is relative where it can be.

    kohya and ai-toolkit count from where they are started, which may be the config's folder or the present one.
    """
    found = Path(str(path).replace("\\", "/"))
    if found.is_absolute():
        return found.as_posix()
    there = next((place / found for place in (source, Path.cwd()) if (place / found).exists()), None)
    if there is None:
        notes.append(
            f"{found.as_posix()}: neither beside the config nor below the present folder; a dataset.toml counts from "
            "its own folder, so mend this path in it"
        )
        return found.as_posix()
    try:
        return there.resolve().relative_to(home).as_posix()
    except ValueError:
        return there.resolve().as_posix()


def _to_toml(entries: list[dict[str, Any]], name: str, tool: Tool) -> str:
    import tomlkit

    document = tomlkit.document()
    document.add(tomlkit.comment(f"Converted from {tool}'s {name}; datasets/README.md of sfumato lists the keys."))
    sources = tomlkit.aot()
    for entry in entries:
        sources.append(tomlkit.item(entry))
    document.add("source", sources)
    return tomlkit.dumps(document)
