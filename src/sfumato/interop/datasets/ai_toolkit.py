"""ai-toolkit's config of a job: the data sets of its processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop.datasets.settings import (
    Sources,
    caption_suffix,
    check_tables,
    folder_notes,
    folders_with_pictures,
    int_setting,
    non_default,
    parsed_scalars,
    resolution_key,
    unused_notes,
)

_ELSEWHERE = {
    "resolution": "--resolution",
    "batch_size": "--batch",
    "buckets": "buckets are always on",
    "bucket_tolerance": "buckets follow the base",
    "cache_latents": "latents are always computed once",
    "cache_latents_to_disk": "--cache DIR",
    "cache_text_embeddings": "embeddings are always computed once",
    "type": "images only",
    "num_workers": "needs none",
    "prefetch_factor": "needs none",
}
_USED = frozenset(
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
        "mask_path",
        "num_repeats",
        "loss_multiplier",
    ]
)
_NEUTRAL = {
    "buckets": True, "cache_latents": False, "cache_latents_to_disk": False, "cache_text_embeddings": False,
    "network_weight": 1, "num_frames": 1, "scale": 1, "shrink_video_to_frames": True,
    "trim_auto_frame_count_tail": True,
}  # fmt: skip
"""Settings that its window saves, and the value with which they change nothing."""
_TEXTS = frozenset(("folder_path", "dataset_path", "caption_ext", "trigger_word", "default_caption"))


def sources(values: Any, folder: Path, notes: list[str]) -> Sources | None:
    """What the config names, None for one that is not ai-toolkit's."""
    datasets = _datasets(values) if isinstance(values, dict) else None
    return None if datasets is None else list(_sources(datasets, folder, notes))


def _datasets(values: Mapping[str, Any]) -> list[tuple[Mapping[str, Any], str]] | None:
    """(data set, trigger word of its process) of each."""
    config = values.get("config", values)
    processes = config.get("process") if isinstance(config, dict) else None
    if not isinstance(processes, list):
        return None
    return [
        (dataset, process.get("trigger_word") or "")
        for process in processes
        if isinstance(process, dict)
        for dataset in check_tables(process.get("datasets", []), "datasets")
    ]


def _sides(own: Mapping[str, Any]) -> list[int]:
    """The sizes at each of which it learns an image."""
    given = own.get("resolution", 512)
    each = given if isinstance(given, list) else [given]
    return [int_setting({"resolution": side}, "resolution") for side in each]


def _sources(datasets: list[tuple[Mapping[str, Any], str]], folder: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    for said, trigger in datasets:
        own = parsed_scalars(said, _TEXTS)
        path = own.get("folder_path") or own.get("dataset_path")
        if not path:
            raise ConfigError("a data set has no folder_path, so there is nothing to read; give it one.")
        is_class = bool(own.get("is_reg"))
        word = "" if is_class else own.get("trigger_word") or trigger  # which is not put before a class's captions
        if word:
            notes.append(
                f"trigger_word {word!r}: put before each caption by a template, also before those that hold it; where "
                'captions say [trigger] themselves, set caption = "{caption}"'
            )
        if own.get("mask_path"):
            notes.append('mask_path: move the masks to masks/ in the image folder, then set mask = "files"')
        if own.get("shuffle_tokens") and own.get("keep_tokens"):
            notes.append(
                f"keep_tokens = {own['keep_tokens']}: these tags stay in front here, where ai-toolkit only never drops "
                "them, and shuffles them, too; to have that, set keep_tags = 0"
            )
        # It lists an image that is to be mirrored twice, and repeats for more than one only.
        repeats = max(1, int_setting({"num_repeats": 1, **own}, "num_repeats")) * (2 if own.get("flip_x") else 1)
        # Which it puts before a caption after it has dropped or shuffled the tags.
        is_first = bool(word and (own.get("shuffle_tokens") or own.get("token_dropout_rate")))
        for place in folders_with_pictures(
            path, folder
        ):  # it walks through all that is below, but for what it made itself
            if PurePath(place).name == "_controls":
                continue
            notes.extend(folder_notes(place, folder))
            ending = str(own.get("caption_ext", "txt")).removeprefix(".").lower()
            if ending == "json":
                notes.append(f'{place}: captions in .json files are not read; list them as "text" in metadata.jsonl')
            yield non_default(
                path=place,
                repeats=repeats,
                **{"class": is_class},
                words=own.get("default_caption") or "",
                caption="{trigger}, {caption}" if word else None,
                trigger=word or None,
                caption_suffix=None if ending == "json" else caption_suffix(own, "caption_ext"),
                shuffle_tags=own.get("shuffle_tokens", False),
                keep_tags=int_setting(own, "keep_tokens") + is_first,
                caption_dropout=own.get("caption_dropout_rate", 0.0),
                tag_dropout=own.get("token_dropout_rate", 0.0),
                resolution=resolution_key(_sides(own)),
                flip=own.get("flip_x", False),
                crop="random" if own.get("random_crop") else "center",
                mask="alpha" if own.get("alpha_mask") else "none",
                weight=own.get("loss_multiplier", 1.0),
            )
        in_effect = {key: value for key, value in own.items() if value != _NEUTRAL.get(key)}
        if not own.get("mask_path"):
            in_effect.pop("mask_min_value", None)
        notes.extend(unused_notes(in_effect, _USED, _ELSEWHERE))
