"""kohya's sd-scripts: a config that lists data sets, and one of a whole training (sd-scripts' --config_file, kohya_ss's
saved settings), whose folder holds folders with repeats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop.datasets.settings import (
    OF_TRAINING,
    Sources,
    caption_suffix,
    check_tables,
    find_folder,
    folder_notes,
    multiline_captions,
    non_default,
    parsed_scalars,
    unused_notes,
)
from sfumato.utils.formatting import pluralize

_ELSEWHERE = {
    "resolution": "--resolution",
    "batch_size": "--batch",
    "enable_bucket": "buckets are always on",
    "min_bucket_reso": "buckets follow --resolution",
    "max_bucket_reso": "buckets follow --resolution",
    "bucket_no_upscale": "small images are enlarged, and sfumato check names them",
    "bucket_reso_steps": "buckets follow the base",
    "max_token_length": "--max-tokens",
    "conditioning_data_dir": 'masks go to masks/ in the image folder, with mask = "files" in its source',
    "cache_info": "headers are always read anew",
    "validation_split": "--validation-split, of all images together",
    "validation_seed": "which images are held out depends on their names",
    "debug_dataset": "sfumato check --sheet, or --dry-run",
}
_USED = frozenset(
    [
        "image_dir",
        "metadata_file",
        "num_repeats",
        "is_reg",
        "class_tokens",
        "caption_extension",
        "shuffle_caption",
        "keep_tokens",
        "keep_tokens_separator",
        "secondary_separator",
        "enable_wildcard",
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
_TRAINING_ELSEWHERE = _ELSEWHERE | {
    "max_resolution": "--resolution",
    "train_batch_size": "--batch",
    "masked_loss": "--mask files, with the masks in masks/ of each image folder",
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
)
"""Settings of a training that change what is seen of its pictures and have no counterpart."""
_TEXTS = frozenset(
    (
        *("image_dir", "class_tokens", "caption_extension", "caption_separator", "caption_prefix", "caption_suffix"),
        *("keep_tokens_separator", "secondary_separator"),
    )
)


def sources(values: Any, folder: Path, notes: list[str]) -> Sources | None:
    """What the config names, None for one that is not kohya's."""
    if not isinstance(values, dict):
        return None
    if isinstance(values.get("datasets"), list):
        return list(_subsets(values, folder, notes))
    training = _training(values)
    return None if training is None else list(_folders(training, folder, notes))


def _subsets(values: Mapping[str, Any], folder: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """A subset's settings fall back to its data set's, then to [general]."""
    (general,) = check_tables([values.get("general") or {}], "general")
    for dataset in check_tables(values["datasets"], "datasets"):
        if not dataset.get("subsets"):
            raise ConfigError("a data set has no subsets, which name the folders; give it one with an image_dir.")
        for subset in check_tables(dataset["subsets"], "subsets"):
            own = {**general, **{key: value for key, value in dataset.items() if key != "subsets"}, **subset}
            if "metadata_file" in own:
                notes.append("metadata_file: list the captions in metadata.jsonl or .txt files instead")
            if "image_dir" not in own:
                raise ConfigError("a subset has no image_dir, so there is nothing to read; give it one.")
            yield _source(own)
            notes.extend(folder_notes(own["image_dir"], folder))
            notes.extend(_unlike_lines(own["image_dir"], folder, own))
            notes.extend(_unread(own, folder))
            notes.extend(unused_notes(own, _USED, _TRAINING_ELSEWHERE))


def _source(own: Mapping[str, Any]) -> dict[str, Any]:
    own = parsed_scalars(own, _TEXTS)
    return non_default(
        path=own["image_dir"],
        repeats=own.get("num_repeats", 1),
        **{"class": bool(own.get("is_reg"))},
        words=own.get("class_tokens", ""),
        caption=_affixes(own.get("caption_prefix"), own.get("caption_suffix")),
        caption_suffix=caption_suffix(own, "caption_extension"),
        caption_lines=bool(own.get("enable_wildcard")),
        wildcards=bool(own.get("enable_wildcard")),
        shuffle_tags=own.get("shuffle_caption", False),
        keep_tags=own.get("keep_tokens", 0),
        separator=own.get("caption_separator") or ",",
        keep_tags_separator=own.get("keep_tokens_separator") or "|||",
        secondary_separator=own.get("secondary_separator") or "",
        caption_dropout=own.get("caption_dropout_rate", 0.0),
        tag_dropout=own.get("caption_tag_dropout_rate", 0.0),
        resolution=_side(own),
        flip=own.get("flip_aug", False),
        crop="random" if own.get("random_crop") else "center",
        mask="alpha" if own.get("alpha_mask") else "none",
        weight=own.get("prior_loss_weight", 1.0) if own.get("is_reg") else 1.0,
    )


def _side(own: Mapping[str, Any]) -> int | None:
    """The side of the square with as many pixels as its width by its height."""
    given = own.get("resolution")
    parts = given if isinstance(given, list) else str(given or "").split(",")
    try:
        sides = [int(part) for part in parts if str(part).strip()]
    except (TypeError, ValueError):
        return None  # which is told where the training is converted
    return round(math.sqrt(sides[0] * sides[-1]) / 8) * 8 if sides and min(sides) > 0 else None


def _unlike_lines(path: str, folder: Path, own: Mapping[str, Any]) -> Iterator[str]:
    """A note on captions of several lines, of which sd-scripts learns the first alone where nothing else is said."""
    if not own.get("enable_wildcard") and (several := multiline_captions(path, folder)):
        counted = pluralize(len(several), "caption has", "captions have")
        yield (
            f"{path}: {counted} several lines ({several[0]}), one caption here, where sd-scripts takes the first "
            "alone; leave one line in each"
        )


def _unread(own: Mapping[str, Any], folder: Path) -> Iterator[str]:
    """A note on captions that sd-scripts passed over, since it looks for .caption files where nothing else is said."""
    place = None if own.get("caption_extension") else find_folder(own["image_dir"], folder)
    if place is not None and any(True for pattern in ("*.txt", "*/*.txt") for _ in place.glob(pattern)):
        yield (
            f"{own['image_dir']}: caption_extension is unset, and sd-scripts reads .caption files alone then; here the "
            '.txt files are the captions, too, unless its source has caption_suffix = ".caption"'
        )


def _training(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The settings of a whole training, those in sections too, if it names folders of pictures."""
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    flat |= {key: value for section in values.values() if isinstance(section, dict) for key, value in section.items()}
    if other := flat.get("dataset_config"):
        raise ConfigError(f"its data sets are in {other}; convert that file.")
    return flat if flat.get("train_data_dir") else None


def _folders(own: Mapping[str, Any], folder: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """Folders that hold folders with repeats: of the subject, and of the class (reg_data_dir)."""
    if own.get("in_json"):
        notes.append(
            f"in_json = {own['in_json']}: captions are read from .txt files beside the images, or from a "
            "metadata.jsonl; list them there"
        )
    for key, is_class in (("train_data_dir", False), ("reg_data_dir", True)):
        if own.get(key):
            # Without the metadata the names of folders tell the repeats.
            repeats = own.get("dataset_repeats") or 1 if own.get("in_json") else 1
            one = {**own, "image_dir": own[key], "is_reg": is_class, "num_repeats": repeats}
            yield _source(one)
            there = find_folder(own[key], folder)
            for place in sorted(there.glob("*_*/")) if there else []:
                named = f"{own[key]}/{place.name}"
                notes.extend(folder_notes(named, folder))
                notes.extend(_unlike_lines(named, folder, own))
            notes.extend([] if own.get("in_json") else _unread(one, folder))
    data = {key: own[key] for key in (*_TRAINING_ELSEWHERE, *_TRAINING_ONLY) if key in own}
    notes.extend(unused_notes(data, frozenset(), _TRAINING_ELSEWHERE))
    notes.append(OF_TRAINING)


def _affixes(before: str | None, after: str | None) -> str | None:
    return f"{before or ''} {{caption}} {after or ''}".strip() if before or after else None
