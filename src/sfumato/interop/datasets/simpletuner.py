"""SimpleTuner's list of data backends (multidatabackend.json)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop.datasets.settings import (
    BY_THE_BASE,
    FROM_NAMES,
    Sources,
    check_tables,
    folder_notes,
    folders_with_pictures,
    int_setting,
    multiline_captions,
    non_default,
    parsed_scalars,
    unused_notes,
    with_whole_repeats,
)

_CACHES = ("text_embeds", "image_embeds", "conditioning_image_embeds", "distillation_cache")
_SEPARATORS = {"comma": ",", "period": ".", "space": ""}
_THROUGHOUT = "every source is learned from in all steps"
_ENLARGED = "smaller images are enlarged, and named by sfumato check; move them away"
_LEFT_IN = "such images are left in; move them away"
_ELSEWHERE = {
    "train_batch_size": "--batch",
    "cache_dir_vae": "--cache DIR",
    "probability": "sources come in shuffled order; give repeats",
    "minimum_image_size": _ENLARGED,
    "minimum_aspect_ratio": _LEFT_IN,
    "maximum_aspect_ratio": _LEFT_IN,
    "max_num_samples": "all images are learned; move the others away",
    "start_epoch": _THROUGHOUT,
    "start_step": _THROUGHOUT,
    "end_epoch": _THROUGHOUT,
    "end_step": _THROUGHOUT,
    "delete_unwanted_images": "nothing is deleted here",
    "delete_problematic_images": "nothing is deleted here; --skip-bad goes on without them",
    "delete_nsfw_images": "nothing is deleted here",
}
_NEUTRAL = {"start_epoch": (1,), "start_step": (1,), "probability": (1,)}
_USED = frozenset(
    [
        *("id", "type", "dataset_type", "instance_data_dir", "instance_data_root", "repeats", "disabled", "disable"),
        *("caption_strategy", "instance_prompt", "prepend_instance_prompt", "only_instance_prompt"),
        *("disable_multiline_split", "caption_shuffle", "is_regularisation_data", "is_regularization_data"),
        *("resolution", "resolution_type", "crop", "crop_aspect", "crop_aspect_buckets", "crop_style"),
        *("maximum_image_size", "target_downsample_size", "max_upscale_threshold"),
        "conditioning_data",  # of which the data set that it names tells
        # Where and when caches are made.
        *(
            "text_embeds",
            "image_embeds",
            "conditioning_image_embeds",
            "cache_dir",
            "cache_dir_conditioning_image_embeds",
        ),
        *("cache_file_suffix", "compress_cache", "hash_filenames", "preserve_data_backend_cache"),
        *("skip_file_discovery", "scan_for_errors", "metadata_backend", "metadata_update_interval"),
        *("vae_batch_size", "vae_cache_clear_each_epoch", "vae_cache_disable", "vae_cache_ondemand"),
        *("vae_cache_scan_behaviour", "read_batch_size", "write_batch_size", "image_processing_batch_size"),
        *("conditioning_image_embed_batch_size", "max_workers", "disable_validation", "ignore_epochs"),
    ]
)
_TEXTS = frozenset(("id", "instance_data_dir", "instance_data_root", "instance_prompt", "cache_dir_vae"))
_SIDE_STEP = 64
"""Megapixels become sides that are a multiple of these pixels: 1.0 is 1024 px."""
OF_CONFIG = "caption_dropout_probability is not in this file but in config.json: --caption-dropout"
"""A note on what the list of data sets does not say."""


def sources(values: Any, folder: Path, notes: list[str]) -> Sources | None:
    """What the data backends name, None for a config that is not SimpleTuner's."""
    if isinstance(values, dict):
        if other := values.get("data_backend_config") or values.get("--data_backend_config"):
            raise ConfigError(f"its data sets are in {other}; convert that file.")
        return None
    if not isinstance(values, list) or not any(isinstance(each, dict) and "id" in each for each in values):
        return None
    backends = [entry for own in check_tables(values, "the list") for entry in _backend(own, folder, notes)]
    found = with_whole_repeats(backends, "SimpleTuner", notes)
    if found:
        notes.append(OF_CONFIG)
    return found


def _backend(said: Mapping[str, Any], folder: Path, notes: list[str]) -> Iterator[dict[str, Any]]:
    """A source for each folder and prompt."""
    own = {key: value for key, value in parsed_scalars(said, _TEXTS).items() if value != ""}
    name = own.get("id", "a data set without an id")
    if reason := _skip_reason(own):
        notes.append(f"{name}: {reason}")
        return
    if own.get("dataset_type") in _CACHES:
        if "caption_filter_list" in own:
            notes.append(f"{name}: caption_filter_list: captions are not filtered; mend their files")
        return
    path = own.get("instance_data_dir", own.get("instance_data_root"))
    if not path:
        raise ConfigError(f"{name}: has no instance_data_dir, so there is nothing to read; give it one.")
    if (repeats := int_setting(own, "repeats")) < 0:
        raise ConfigError(f"{name}: repeats is {repeats}; wanted 0, which is once, or more.")
    taught = bool(own.get("is_regularisation_data", own.get("is_regularization_data")))
    is_held_out = own.get("dataset_type") == "eval"
    if taught and not is_held_out:
        notes.append(f"{name}: is_regularisation_data: {BY_THE_BASE}")
    prompts = _prompts(own, name, notes)
    by_line = own.get("caption_strategy") == "textfile" and not own.get("disable_multiline_split")
    varied = _tags(own, notes)
    for place in folders_with_pictures(path, folder):
        notes.extend(folder_notes(place, folder))
        several = by_line and bool(multiline_captions(place, folder))
        for prompt in prompts:
            yield non_default(
                path=place,
                repeats=Fraction(repeats + 1, len(prompts)),
                **{"class": taught and not is_held_out},
                validation=is_held_out,
                caption=prompt,
                caption_lines=several,
                **varied,
                resolution=None if (side := _side(own)) is None else int(side),
                crop=_crop(own, notes),
            )
    notes.extend(_size_notes(own))
    in_effect = {key: value for key, value in own.items() if value and value not in _NEUTRAL.get(key, ())}
    notes.extend(unused_notes(in_effect, _USED, _ELSEWHERE))


def _skip_reason(own: Mapping[str, Any]) -> str:
    """Why nothing is learned from this one; empty if it is, or if it is a cache."""
    kind, store = own.get("dataset_type", "image"), own.get("type", "local")
    if own.get("disabled", own.get("disable")):
        return "is disabled, so it is left out"
    if kind in _CACHES:
        return ""
    if kind == "conditioning" and own.get("conditioning_type") in ("mask", "segmentation"):
        return (
            "holds masks; move them as PNG to masks/ in the folder of their images, under the same names, then set "
            'mask = "files"'
        )
    if kind == "conditioning":
        return f"is for conditioning by {own.get('conditioning_type', 'controlnet')}, which no adapter here has"
    if kind not in ("image", "eval"):
        return f"dataset_type = {kind}: images only, so it is left out"
    if store != "local":
        return f"type = {store}: its images are in no folder; download them and name that one in a [[source]]"
    if own.get("probability") == 0:
        return "probability = 0, so it is left out"
    return ""


def _prompts(own: Mapping[str, Any], name: str, notes: list[str]) -> list[str | None]:
    """The templates of the captions, which come equally often; None for the captions beside the pictures."""
    strategy, prompt = own.get("caption_strategy"), own.get("instance_prompt")
    if strategy is None:
        notes.append(f"{name}: no caption_strategy, so captions are the names of files, as --caption_strategy is unset")
        strategy = "filename"
    if strategy not in ("textfile", "filename", "instanceprompt", "parquet"):
        raise ConfigError(
            f"{name}: caption_strategy is {strategy!r}; wanted textfile, filename, instanceprompt or parquet."
        )
    prepended = own.get("prepend_instance_prompt")
    alone = strategy == "instanceprompt" or own.get("only_instance_prompt")
    if not prompt and (alone or prepended):
        raise ConfigError(f"{name}: there is no instance_prompt, which its captions are to be made of. Write it.")
    if alone:
        return [str(each).strip() for each in (prompt if isinstance(prompt, list) else [prompt])]
    if strategy == "filename":
        notes.append(f"caption_strategy = filename: {FROM_NAMES}")
    if strategy == "parquet":
        notes.append("caption_strategy = parquet: list the captions in metadata.jsonl or .txt files instead")
    if prepended:
        return [f"{prompt} {{caption}}"]
    return ["{caption}"] if strategy == "filename" else [None]


def _tags(own: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """How a caption's parts vary."""
    shuffle = own.get("caption_shuffle", {})
    if not isinstance(shuffle, dict):
        raise ConfigError(f"caption_shuffle is {shuffle!r:.40}; wanted a table of settings.")
    if not shuffle.get("enable") or own.get("caption_strategy") == "instanceprompt":
        return {}
    between = str(shuffle.get("split_on", "comma"))
    if between not in _SEPARATORS:
        raise ConfigError(f"caption_shuffle.split_on is {between!r}; wanted comma, period or space.")
    if not _SEPARATORS[between]:
        notes.append("caption_shuffle.split_on = space: words are not shuffled here; separate tags by commas")
        return {}
    keep = int_setting(shuffle, "position_start")
    if own.get("prepend_instance_prompt") and keep == 0:
        notes.append("caption_shuffle.position_start = 0: the first tag stays behind instance_prompt; keep_tags is 1")
        keep = 1
    notes.append(f"caption_shuffle.count = {shuffle.get('count', 1)}: tags come in a new order each time")
    return {"shuffle_tags": True, "keep_tags": keep, "separator": _SEPARATORS[between]}


def _crop(own: Mapping[str, Any], notes: list[str]) -> str:
    """Which part is seen of a picture that fits no bucket."""
    style, aspect = own.get("crop_style", "random"), own.get("crop_aspect", "square")
    if style not in ("random", "center", "centre", "corner", "face"):
        raise ConfigError(f"crop_style is {style!r}; wanted random, center, corner or face.")
    if aspect not in ("square", "preserve", "closest", "random"):
        raise ConfigError(f"crop_aspect is {aspect!r}; wanted square, preserve, closest or random.")
    if not own.get("crop"):
        return "center"
    if aspect != "preserve":
        notes.append(f"crop_aspect = {aspect}: each image keeps the nearest of some shapes; cut the files themselves")
    if style in ("corner", "face"):
        notes.append(f"crop_style = {style}: crops are from the centre; cut the files themselves")
    return "random" if style == "random" else "center"


def sides(backends: Iterable[Mapping[str, Any]]) -> list[int]:
    """The sides, in pixels, at which the images of the data sets are learned, as far as they say. Raises ConfigError
    for one that is none."""
    read = [parsed_scalars(said, _TEXTS) for said in backends]
    learned = (own for own in read if own.get("dataset_type", "image") == "image" and not _skip_reason(own))
    return [int(side) for own in learned if (side := _side(own)) is not None]


def _side(own: Mapping[str, Any]) -> float | None:
    size, kind = own.get("resolution"), _kind_of_size(own)
    if size is None:
        return None
    if isinstance(size, bool) or not isinstance(size, (int, float)) or not 0 < size < math.inf:
        raise ConfigError(f"resolution is {size!r:.40}; wanted a number above 0.")
    return round((size * 1e6) ** 0.5 / _SIDE_STEP) * _SIDE_STEP if kind == "area" else size


def _kind_of_size(own: Mapping[str, Any]) -> str:
    kind = own.get("resolution_type", "pixel_area")
    if kind not in ("pixel", "area", "pixel_area"):
        raise ConfigError(f"resolution_type is {kind!r}; wanted pixel, area or pixel_area.")
    return str(kind)


def _size_notes(own: Mapping[str, Any]) -> Iterator[str]:
    size, kind, side = own.get("resolution"), _kind_of_size(own), _side(own)
    if side is not None:
        by = ", which is by area here, not the shorter side" if kind == "pixel" else ""
        yield f"resolution = {size}, {kind}: --resolution {side}{by}"
    downsampled = own.get("target_downsample_size")
    if own.get("crop") and own.get("maximum_image_size") and downsampled and downsampled != size:
        yield f"target_downsample_size = {downsampled}: crops are as large as they fit into the image"
