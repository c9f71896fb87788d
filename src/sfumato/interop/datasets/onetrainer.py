"""OneTrainer's concepts: a list of them (training_concepts/*.json), or the config of a whole training with one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

from sfumato.data.listing import list_folder
from sfumato.errors import ConfigError
from sfumato.interop.datasets.settings import (
    BY_THE_BASE,
    FROM_NAMES,
    OF_TRAINING,
    Sources,
    check_tables,
    find_folder,
    folder_notes,
    folders_with_pictures,
    int_setting,
    multiline_captions,
    non_default,
    parsed_scalars,
    resolution_key,
    unused_notes,
    with_whole_repeats,
)
from sfumato.utils.text_files import decode_text

_MOST_REPEATS = 99_999
"""As a source of a dataset.toml has them."""
_VARIED = {
    "rotate": "random_rotate_max_angle",
    "brightness": "random_brightness_max_strength",
    "contrast": "random_contrast_max_strength",
    "saturation": "random_saturation_max_strength",
    "hue": "random_hue_max_strength",
}
"""How pictures are varied there and not here, and the setting that says how much."""
_ELSEWHERE = {
    "enable_fixed_flip": "mirror the files themselves",
    "image_variations": "crops and mirror images are drawn anew for each sample",
    "text_variations": "captions are drawn anew for each sample",
    "caps_randomize_enable": "captions keep their capitals",
    "caps_randomize_lowercase": "captions keep their capitals; write them in small letters",
    "enable_random_circular_mask_shrink": "masks are taken as they are",
    "enable_random_mask_rotate_crop": "masks are taken as they are",
}
_USED = frozenset(
    [
        *("__version", "name", "seed", "concept_stats", "path", "enabled", "type", "validation_concept"),
        *("include_subdirectories", "balancing", "balancing_strategy", "repeats", "loss_weight"),
        *("enable_crop_jitter", "enable_random_flip", "enable_resolution_override", "resolution_override"),
        *(f"enable_{how}_{what}" for what in _VARIED for how in ("random", "fixed")),
        *_VARIED.values(),
        *("prompt_source", "prompt_path", "enable_tag_shuffling", "tag_delimiter", "keep_tags_count"),
        *("tag_dropout_enable", "tag_dropout_mode", "tag_dropout_probability"),
        *("tag_dropout_special_tags_mode", "tag_dropout_special_tags", "tag_dropout_special_tags_regex"),
        *("caps_randomize_probability", "caps_randomize_mode"),
    ]
)
_TEXTS = frozenset(("name", "path", "prompt_path", "tag_delimiter", "tag_dropout_special_tags", "resolution_override"))
_TRAINING_ELSEWHERE = {
    "resolution": "--resolution",
    "batch_size": "--batch",
    "aspect_ratio_bucketing": "buckets are always on",
    "custom_conditioning_image": "an inpainting model sees what is left of the image itself",
    "unmasked_weight": "nothing is learned outside of a mask",
    "unmasked_probability": "masks hold for each sample",
}


def sources(values: Any, folder: Path, notes: list[str]) -> Sources | None:
    """What the concepts name, None for a config that is not OneTrainer's."""
    training: Mapping[str, Any] | None = None
    if isinstance(values, dict):
        if not (values.get("concept_file_name") or "concepts" in values):
            return None
        if "concepts" not in values:
            raise ConfigError(f"its concepts are in {values['concept_file_name']}; convert that file.")
        training, values = values, values["concepts"]
    elif not isinstance(values, list) or not any(isinstance(each, dict) and "path" in each for each in values):
        return None
    masked = None if training is None else bool(training.get("masked_training"))
    usual = "" if training is None else str(training.get("resolution", ""))
    concepts = [
        entry for own in check_tables(values, "concepts") for entry in _concept(own, masked, usual, folder, notes)
    ]
    if concepts and training is not None:
        notes.extend(_training_notes(training))
    return with_whole_repeats(concepts, "OneTrainer", notes)


def _training_notes(training: Mapping[str, Any]) -> Iterator[str]:
    data = {key: training[key] for key in _TRAINING_ELSEWHERE if key in training}
    idle = {"aspect_ratio_bucketing"} if data.get("aspect_ratio_bucketing", True) else set()
    if not data.get("custom_conditioning_image"):
        idle.add("custom_conditioning_image")
    if not training.get("masked_training"):
        idle |= {"unmasked_weight", "unmasked_probability"}
    yield from unused_notes(
        {key: value for key, value in data.items() if key not in idle}, frozenset(), _TRAINING_ELSEWHERE
    )
    encoder = training.get("text_encoder")
    if isinstance(encoder, dict) and (chance := encoder.get("dropout_probability")):
        yield f"text_encoder.dropout_probability = {chance}: --caption-dropout"
    yield OF_TRAINING


def _concept(
    said: Mapping[str, Any], masked: bool | None, usual: str, folder: Path, notes: list[str]
) -> Iterator[dict[str, Any]]:
    """A source for each folder and prompt. masked: whether masks are learned by, None where nothing says so. usual: the
    resolution of concepts without one of their own."""
    own, image, text = (
        parsed_scalars(section, _TEXTS) for section in (said, _section(said, "image"), _section(said, "text"))
    )
    name = own.get("name") or own.get("path") or "a concept without a name"
    if not own.get("enabled", True):
        notes.append(f"{name}: is not enabled, so it is left out")
        return
    kind = own.get("type", "VALIDATION" if own.get("validation_concept") else "STANDARD")
    if kind not in ("STANDARD", "VALIDATION", "PRIOR_PREDICTION"):
        raise ConfigError(f"{name}: type is {kind!r}; wanted STANDARD, VALIDATION or PRIOR_PREDICTION.")
    if not own.get("path"):
        raise ConfigError(f"{name}: has no path, so there is nothing to read; give it one.")
    if kind == "PRIOR_PREDICTION":
        notes.append(f"{name}: type = {kind}: {BY_THE_BASE}")
    prompts = _prompts(text, folder, notes)
    places = folders_with_pictures(own["path"], folder) if own.get("include_subdirectories") else [str(own["path"])]
    share = _share(own, places, folder, notes) / len(prompts)
    for place in places:
        notes.extend(folder_notes(place, folder))
        by_line = prompts == [None] and bool(multiline_captions(place, folder))
        masks = _has_masks(place, folder, masked, notes)
        for prompt in prompts:
            yield non_default(
                path=place,
                repeats=share,
                **{"class": kind == "PRIOR_PREDICTION"},
                validation=kind == "VALIDATION",
                caption=prompt,
                caption_lines=by_line,
                **_tags(text, notes),
                resolution=resolution_key(_sides(image, usual)),
                flip=bool(image.get("enable_random_flip")),
                crop="random" if image.get("enable_crop_jitter", True) else "center",
                mask="files" if masks else "none",
                weight=own.get("loss_weight", 1.0),
            )
    notes.extend(unused_notes(_in_effect(own, image, text, masked), _USED, _ELSEWHERE))
    for what, most in _VARIED.items():
        if image.get(most) and (image.get(f"enable_random_{what}") or image.get(f"enable_fixed_{what}")):
            notes.append(f"{most} = {image[most]}: images are not varied so; put varied copies beside them")


def _sides(image: Mapping[str, Any], usual: str) -> list[int]:
    """The sides of the squares of "512,768" or "512x640", of which it draws one for each sample."""
    given = str(image.get("resolution_override", "")) if image.get("enable_resolution_override") else usual
    try:
        sides = [[int(side) for side in each.split("x")] for each in given.split(",") if each.strip()]
    except ValueError:
        raise ConfigError(f"its resolution is {given!r:.40}; wanted pixels, such as 512 or 512,768.") from None
    return [round(math.sqrt(each[0] * each[-1]) / 8) * 8 for each in sides if min(each) > 0]


def _section(own: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(section := own.get(name, {}), dict):
        raise ConfigError(f"{name} is {section!r:.40}; wanted a table of settings.")
    return section


def _in_effect(
    own: Mapping[str, Any], image: Mapping[str, Any], text: Mapping[str, Any], masked: bool | None
) -> dict[str, Any]:
    """The concept's settings without those that change nothing there."""
    idle = {"image", "text"} | {key for key in ("image_variations", "text_variations") if own.get(key) == 1}
    if not image.get("enable_resolution_override"):
        idle.add("resolution_override")
    if image.get("enable_random_flip"):  # which comes before the fixed one
        idle.add("enable_fixed_flip")
    if not text.get("caps_randomize_probability"):
        idle.add("caps_randomize_enable")
    if masked is False:
        idle |= {"enable_random_circular_mask_shrink", "enable_random_mask_rotate_crop"}
    return {key: value for key, value in {**own, **image, **text}.items() if key not in idle and value is not False}


def _prompts(text: Mapping[str, Any], folder: Path, notes: list[str]) -> list[str | None]:
    """The templates of the captions, which come equally often; None for the captions beside the pictures."""
    origin = text.get("prompt_source", "sample")
    if origin == "sample":
        return [None]
    if origin == "filename":
        notes.append(f"prompt_source = filename: {FROM_NAMES}")
        return ["{caption}"]
    if origin != "concept":
        raise ConfigError(f"prompt_source is {origin!r}; wanted sample, concept or filename.")
    path = str(text.get("prompt_path", ""))
    file = find_folder(path, folder) or Path(path)
    if file.exists() and not (file.is_file() or file.is_dir()):  # a pipe or device: bytes without end, or none
        raise ConfigError(f"prompt_path {path!r}: is no plain file. Name the file of prompts.")
    try:
        lines = decode_text(file.read_bytes()).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"prompt_path {path!r}: not readable as text ({reason}). Name the file of prompts.") from None
    prompts: list[str | None] = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise ConfigError(f"prompt_path {path!r}: there is no prompt in it. Write one.")
    return prompts


def _share(own: Mapping[str, Any], places: list[str], folder: Path, notes: list[str]) -> Fraction:
    """How often an epoch holds each picture, to the hundredth, or once in so many epochs."""
    balancing = own.get("balancing", own.get("repeats", 1))
    strategy = own.get("balancing_strategy", "REPEATS")
    if isinstance(balancing, bool) or not isinstance(balancing, (int, float)) or not 0 <= balancing < math.inf:
        raise ConfigError(f"balancing is {balancing!r:.40}; wanted a number that is not negative.")
    if strategy not in ("REPEATS", "SAMPLES"):
        raise ConfigError(f"balancing_strategy is {strategy!r}; wanted REPEATS or SAMPLES.")
    count = 1
    if strategy == "SAMPLES":
        there = [place for place in (find_folder(place, folder) for place in places) if place]
        count = sum(len(list_folder(place).pictures) for place in there)
        if not count:
            notes.append(f"balancing = {balancing} samples: there are no images here to count; set repeats")
            return Fraction(1)
    if balancing > _MOST_REPEATS * count:
        raise ConfigError(f"balancing is {balancing!r:.40}; wanted at most {_MOST_REPEATS:,} repeats of an image.")
    share = balancing / count
    if 0 < share < 0.1:  # in hundredths too little would be left of it
        return Fraction(1, round(1 / Fraction(share)))  # exact: of 5e-324 the inverse is no float
    return Fraction(round(share * 100), 100)


def _has_masks(place: str, folder: Path, masked: bool | None, notes: list[str]) -> bool:
    there = find_folder(place, folder)
    found = there is not None and any(there.glob("*-masklabel.png"))
    if found and masked is None:
        notes.append(f'{place}: holds masks; where masked_training was on, set mask = "files"')
    if there is None and masked:
        notes.append(f'{place}: masked_training: where it holds masks, set mask = "files"')
    return found and bool(masked)


def _tags(text: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """How a caption's parts vary."""
    shuffle = bool(text.get("enable_tag_shuffling"))
    keep = int_setting({"keep_tags_count": 1, **text}, "keep_tags_count")
    chance = text.get("tag_dropout_probability", 0) if text.get("tag_dropout_enable") else 0
    mode, special = text.get("tag_dropout_mode", "FULL"), text.get("tag_dropout_special_tags_mode", "NONE")
    dropout = {}
    if chance and special == "NONE" and mode == "RANDOM":
        dropout = {"tag_dropout": chance}
    elif chance and special == "NONE" and mode == "FULL" and keep == 0:
        dropout = {"caption_dropout": chance}
    elif chance:
        notes.append(
            f"tag_dropout_probability = {chance}, {mode}, special tags {special}: single tags are dropped here, each "
            "alike, or whole captions; set tag_dropout or caption_dropout"
        )
    if not shuffle and "tag_dropout" not in dropout:
        return dropout
    if not (separator := str(text.get("tag_delimiter", ",")).strip()):
        notes.append("tag_delimiter is a space, which separates no tags here, so captions stay as they are; use commas")
        return {}
    return {"shuffle_tags": shuffle, "keep_tags": keep, "separator": separator, **dropout}
