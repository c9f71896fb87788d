"""What a file says about itself, in the usual conventions: kohya's ss_*, ModelSpec 1.0.1, and ours. No torch.

How files spell the model families, and how a family is told from a file. Imports no torch.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import os
import re
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal

from sfumato import __version__
from sfumato.errors import ConfigError
from sfumato.files.header import Header, read_header
from sfumato.utils.formatting import format_number, pluralize
from sfumato.utils.limits import MAX_ADAPTER_GUIDANCE
from sfumato.utils.schedulers import SAMPLERS
from sfumato.utils.text_files import parse_json, parse_json_object

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class FamilyLabels:
    """The names that files of this field use for one family.

    title: for people. architecture: ModelSpec's, without "/lora"; predicting v has another where v_architecture is
    set. base_model_version: kohya's; readers test it for the prefix "sdxl_". text_width: the width of the text
    embedding that cross-attention reads, None where it is no mark of the family. keys: "kohya" for kohya's names, which
    a U-Net of Stable Diffusion has; "diffusers" for the paths of the model's own modules after its part's name, as
    diffusers and peft write them for transformers.
    """

    title: str
    architecture: str
    base_model_version: str
    text_width: int | None
    v_architecture: str | None = None
    v_base_model_version: str | None = None
    keys: Literal["kohya", "diffusers"] = "kohya"


LABELS: dict[str, FamilyLabels] = {
    "pocket": FamilyLabels("pocket", "sfumato-pocket-v1", "sfumato_pocket", None),
    "sd1": FamilyLabels("SD 1.x", "stable-diffusion-v1", "sd_v1", 768),
    "sd2": FamilyLabels("SD 2.x", "stable-diffusion-v2-512", "sd_v2", 1024, "stable-diffusion-v2-768-v", "sd_v2_v"),
    "sdxl": FamilyLabels("SDXL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", 2048),
}


def family_mismatch(theirs: tuple[str | None, int | None], ours: tuple[str, int | None], what: str) -> str:
    """What is said of an adapter of another family than the base's, "trained for SDXL (text width 2048), this base is
    SD 1.x (768)"; empty where they agree as far as is known.

    theirs, ours: family and text width. what: what the base is called.
    """
    (family, width), (own, own_width) = theirs, ours
    other_width = width is not None and own_width is not None and width != own_width
    if not other_width and family in (None, own):
        return ""
    wanted = LABELS[family].title if family else "another base"
    widths = (f" (text width {width})", f" ({own_width})") if other_width else ("", "")
    return f"trained for {wanted}{widths[0]}, this {what} is {LABELS[own].title}{widths[1]}"


def family_from_metadata(metadata: Mapping[str, str]) -> str | None:
    """The family that the file says it was trained on; None where it says nothing or something unknown."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    for name, labels in LABELS.items():
        if version and version in (labels.base_model_version, labels.v_base_model_version):
            return name
        if architecture and architecture in (labels.architecture, labels.v_architecture):
            return name
    for prefix, name in (("sdxl", "sdxl"), ("sd_v2", "sd2"), ("sd_v1", "sd1"), ("sd_2", "sd2"), ("sd_1", "sd1")):
        if version.startswith(prefix):  # ai-toolkit has sd_1.5 and sd_2.1
            return name
    if metadata.get("ss_v2", "").lower() == "true":
        return "sd2"
    return None


def family_from_widths(widths: Iterable[int], *, second_encoder: bool = False) -> str | None:
    """The family that the shapes tell, None where they tell none.

    widths: the input widths of the cross-attention's keys and values in the file. second_encoder: whether the file
    changes a second text encoder, which only SDXL has.
    """
    found = set(widths)
    for name, labels in LABELS.items():
        if found == {labels.text_width}:
            return name
    return "sdxl" if second_encoder and not found else None


METADATA_LIMIT = 100_000
"""Largest metadata in a file, in bytes. Web pages that show models download about this much."""
THUMBNAIL_PX = 256
THUMBNAIL_LIMIT = 40_000
TAG_LIMIT, TAG_BYTES = 200, 15_000
"""Of the tags in a file; a caption without a comma is one tag, and may be long."""
SETTING_BYTES = 5_000
"""Largest setting in a file's config, in bytes. Lists of prompts may be longer; the run's config.toml has them."""


@dataclass(frozen=True)
class Sampling:
    """How images are sampled with an adapter that is distilled for few steps: by this sampler of
    `sfumato.utils.schedulers`, in so many steps, at this guidance scale."""

    sampler: str
    steps: int
    guidance: float

    def __str__(self) -> str:
        return f"{pluralize(self.steps, 'step')} of {self.sampler} at guidance {self.guidance:g}"


@dataclass(frozen=True)
class Description:
    """All that an adapter's file says about how it was made. Unset fields are left out of the file.

    base: the base model's public name. base_fingerprint: from `Base.adapted_fingerprint`. resolution: (width, height)
    in pixels. drawn_at: size of the images that are generated with it, if that is not the base model's own; only the
    model card states it. images: number of training images. trigger: the trigger words. captions: those of the training
    images; their words are counted. config: the program's resolved config, without private paths
    (`sfumato.config.to_dict(config, public=True)`); settings of at most SETTING_BYTES are kept. parents: for a mix, one
    {"name", "hash", "weight"} for each file. adapter_guidance: how often the adapter's change counts unless the user
    sets it, see `sfumato.compose.guidance`. over_steps: (start, end) of progress, 0 at pure noise and 1 at the finished
    image, in which it is active unless the user sets it; None: always. negatives: each is the negative prompt of
    prompts that contain it and more, see `sfumato.models.prompts.syntax`. sampling: what it is distilled for; the
    user's own settings come before it. word_files: for each new word that was learned
    with it, the name of the word's own file. clip_skip: as for `load_base`; None if it was not set. timesteps: (first,
    the one to stop before) that were trained; None: all. inpaints: whether the base is an inpainting model, which the
    model card states.
    """

    title: str
    family: str
    base: str = ""
    base_fingerprint: str = ""
    prediction_type: str = ""
    resolution: tuple[int, int] | None = None
    drawn_at: tuple[int, int] | None = None
    images: int | None = None
    steps: int | None = None
    batch: int | None = None
    seed: int | None = None
    learning_rate: float | None = None
    optimizer: str | None = None
    trigger: Sequence[str] = ()
    captions: Sequence[str] = ()
    author: str = ""
    license: str = ""
    thumbnail: Image | None = None
    config: Mapping[str, Any] | None = None
    dataset_sha256: str = ""
    adapter_guidance: float = 0.0
    over_steps: tuple[float, float] | None = None
    negatives: Sequence[str] = ()
    sampling: Sampling | None = None
    word_files: Mapping[str, str] = field(default_factory=dict)
    clip_skip: int | None = None
    timesteps: tuple[int, int] | None = None
    inpaints: bool = False
    parents: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, str] = field(default_factory=dict)


_PREDICTIONS = ("epsilon", "v_prediction", "flow_prediction")


def describe(description: Description) -> dict[str, str]:
    """The metadata of an adapter's file, texts by key. `write_lora` adds rank, alpha and hashes from the tensors."""
    if description.family not in LABELS:
        raise ConfigError(f"unknown family {description.family!r}; known are {', '.join(LABELS)}.")
    if description.prediction_type not in ("", *_PREDICTIONS):
        raise ConfigError(
            f"unknown prediction type {description.prediction_type!r}; known are {', '.join(_PREDICTIONS)}."
        )
    now = creation_time()
    found = _training(description, now) | _model_spec(description, now) | _own(description)
    return {key: value for key, value in {**found, **description.extra}.items() if value != ""}


def _training(description: Description, now: float) -> dict[str, str]:
    """kohya's keys: A1111 and Forge read the family, the alias and the tags from these."""
    labels = LABELS[description.family]
    v = description.prediction_type == "v_prediction"
    tags = {description.title: count_tags(description.captions)} if description.captions else None
    return {
        "ss_v2": str(description.family == "sd2"),
        "ss_base_model_version": (v and labels.v_base_model_version) or labels.base_model_version,
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": description.title,
        "ss_sd_model_name": description.base,
        "ss_resolution": str(description.resolution) if description.resolution else "",
        "ss_num_train_images": _text(description.images),
        "ss_steps": _text(description.steps),
        "ss_max_train_steps": _text((description.config or {}).get("steps", description.steps)),
        "ss_total_batch_size": _text(description.batch),
        "ss_seed": _text(description.seed),
        "ss_learning_rate": _text(description.learning_rate),
        "ss_optimizer": _text(description.optimizer),
        "ss_training_finished_at": str(now),
        "ss_clip_skip": "" if description.family == "sdxl" else _layer(description),  # which sd-scripts has none of
        "ss_tag_frequency": _json(tags) if tags else "",
    }


def _model_spec(description: Description, now: float) -> dict[str, str]:
    """ModelSpec 1.0.1 (Stability-AI/ModelSpec): what it says MUST, SHOULD, and of CAN what we know."""
    labels = LABELS[description.family]
    v = description.prediction_type == "v_prediction"
    values = {
        "sai_model_spec": "1.0.1",
        "architecture": f"{(v and labels.v_architecture) or labels.architecture}/lora",
        "implementation": "diffusers",
        "title": description.title,
        "resolution": "x".join(map(str, description.resolution)) if description.resolution else "",
        "author": description.author,
        "date": datetime.fromtimestamp(int(now), UTC).isoformat().replace("+00:00", "Z"),
        "license": description.license,
        "trigger_phrase": ", ".join(description.trigger),
        "prediction_type": "v" if v else description.prediction_type,
        "thumbnail": "" if description.thumbnail is None else thumbnail_uri(description.thumbnail),
        "merged_from": ", ".join(str(parent["name"]) for parent in description.parents),
        "encoder_layer": _layer(description),
        "timestep_range": ",".join(map(str, description.timesteps or ())),
    }
    return {f"modelspec.{key}": value for key, value in values.items()}


def _layer(description: Description) -> str:
    """The text encoder's layer that was learned with, counted from its end, where the last is 1; "" if unsaid."""
    if description.clip_skip is None:
        return ""
    return str(description.clip_skip + (2 if description.family == "sdxl" else 1))


def _own(description: Description) -> dict[str, str]:
    config = {key: value for key, value in (description.config or {}).items() if _size(value) <= SETTING_BYTES}
    return {
        "sfumato.version": __version__,
        "sfumato.config": "" if description.config is None else _json(config),
        "sfumato.base_fingerprint": description.base_fingerprint,
        "sfumato.dataset_sha256": description.dataset_sha256,
        "sfumato.adapter_guidance": format_number(description.adapter_guidance) if description.adapter_guidance else "",
        "sfumato.over_steps": "-".join(map(format_number, description.over_steps or ())),
        "sfumato.negatives": _json(list(description.negatives)) if description.negatives else "",
        "sfumato.sampling": "" if description.sampling is None else _json(asdict(description.sampling)),
        "sfumato.word_files": _json(dict(description.word_files)) if description.word_files else "",
        "sfumato.clip_skip": _text(description.clip_skip),
        "sfumato.trigger": _json(list(description.trigger)) if description.trigger else "",
        "sfumato.parents": _json(list(description.parents)) if description.parents else "",
    }


def prediction_type_of(metadata: Mapping[str, str]) -> str:
    """What the base model predicts that the file was trained on, "epsilon", "v_prediction" or "flow_prediction"; empty
    if the metadata does not say."""
    found = metadata.get("modelspec.prediction_type", "")
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "").partition("/")[0]
    by_family = any(
        version == labels.v_base_model_version or architecture == labels.v_architecture
        for labels in LABELS.values()
        if labels.v_base_model_version is not None
    )
    known = {"v": "v_prediction", **{name: name for name in _PREDICTIONS}}
    return known.get(found, "v_prediction" if by_family else "")


def adapter_guidance_of(metadata: Mapping[str, str]) -> float:
    """The adapter guidance that the file asks for; 0 if it asks for none, or for an impossible one."""
    try:
        strength = float(metadata.get("sfumato.adapter_guidance", "0"))
    except ValueError:
        return 0.0
    return strength if 0 <= strength <= MAX_ADAPTER_GUIDANCE else 0.0


_LONGEST_SPAN = 50
"""Letters of two numbers to their last digit and what is between them."""


def over_steps_of(metadata: Mapping[str, str]) -> tuple[float, float] | None:
    """The sampling steps that the file asks for, as in a Description; None for all, or if what it says is
    impossible."""
    text = metadata.get("sfumato.over_steps", "")
    number = r"((?:\d+(?:\.\d+)?|\.\d+)(?:e-\d+)?)"
    found = re.fullmatch(f"{number}-{number}", text) if len(text) <= _LONGEST_SPAN else None
    start, end = (float(found[1]), float(found[2])) if found else (0.0, 1.0)
    return (start, end) if 0 <= start < end <= 1 and (start, end) != (0.0, 1.0) else None


def negatives_of(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The negative prompts that the file asks for; none if what it says is impossible."""
    found = parse_json(metadata.get("sfumato.negatives", "[]"))
    return tuple(text for text in found if isinstance(text, str)) if isinstance(found, list) else ()


def sampling_of(metadata: Mapping[str, str]) -> Sampling | None:
    """How the file asks to be sampled with; None if it does not ask, or for what is impossible."""
    match parse_json_object(metadata.get("sfumato.sampling", "{}")):
        case {"sampler": str(sampler), "steps": int(steps), "guidance": int(guidance) | float(guidance)}:
            known = steps >= 1 and 0 <= guidance < math.inf and sampler in SAMPLERS
            return Sampling(sampler, steps, float(guidance)) if known else None
    return None


def clip_skip_of(metadata: Mapping[str, str]) -> int | None:
    """Layers of the text encoder that were skipped in the training of a file, counted as --clip-skip; None if the
    metadata does not say.

    sd-scripts counts as A1111 does; for SDXL it skips none, whatever the file says.
    """
    config = parse_json_object(metadata.get("sfumato.config", "{}"))
    told = metadata.get("sfumato.clip_skip", config.get("clip_skip"))
    if told is None and "steps" in config:  # a trainer's, which leaves unset settings out
        return 0
    if told is None and not metadata.get("ss_base_model_version", "").startswith("sdxl"):
        theirs = metadata.get("ss_clip_skip", "")
        return int(theirs) - 1 if re.fullmatch("[1-9][0-9]?", theirs) else None
    return int(str(told)) if re.fullmatch("[0-9]{1,2}", str(told)) else None


def embedding_files_of(metadata: Mapping[str, str]) -> dict[str, str]:
    """For each new word that was learned with the adapter of a file, or with those that it is merged from, the name of
    the word's own file. Empty if the metadata does not say, as before 0.5.0, or in a bundle. A word's own file has no
    such words."""
    if "sfumato.token" in metadata:
        return {}
    words = parse_json_object(metadata.get("sfumato.config", "{}")).get("train_words")
    files = parse_json_object(metadata.get("sfumato.word_files", "{}"))
    learned = [word for word in words if isinstance(word, str)] if isinstance(words, list) else []
    return {word: str(files.get(word, "")) for word in dict.fromkeys([*learned, *files])}


_LAST_SECOND = 253_402_300_799
"""The end of the year 9999, later than which a date is not written."""


def creation_time() -> float:
    """Unix time in seconds that is written into files as their date: SOURCE_DATE_EPOCH, else now."""
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    if epoch:
        if not re.fullmatch(r"[0-9]{1,12}", epoch) or int(epoch) > _LAST_SECOND:
            raise ConfigError(f"SOURCE_DATE_EPOCH is {epoch!r:.40}; wanted whole seconds since 1970.")
        return float(epoch)
    return time.time()


def count_tags(captions: Sequence[str]) -> dict[str, int]:
    """How often each comma-separated tag occurs in the captions, the most frequent first: at most TAG_LIMIT tags, and
    what fits into TAG_BYTES."""
    counts = Counter(tag.strip() for caption in captions for tag in caption.split(",") if tag.strip())
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:TAG_LIMIT]
    ends = accumulate(_size({tag: count}) for tag, count in most)
    return {tag: count for (tag, count), end in zip(most, ends, strict=True) if end <= TAG_BYTES}


def thumbnail_uri(image: Image) -> str:
    """The image as a JPEG data URI, THUMBNAIL_PX on its longer side, at most THUMBNAIL_LIMIT bytes of text."""
    scale = THUMBNAIL_PX / max(image.size)
    small = image.convert("RGB").resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    for quality in range(90, 0, -10):
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        uri = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
        if len(uri) <= THUMBNAIL_LIMIT:
            break
    return uri


def short_hash(source: Header | str | os.PathLike[str]) -> str:
    """The 12 hex digits by which A1111's `Lora hashes` names a file: from sshs_model_hash, computed if it is
    missing."""
    header = source if isinstance(source, Header) else read_header(source)
    stated = header.metadata.get("sshs_model_hash", "")
    if len(stated) == 64 and all(letter in "0123456789abcdef" for letter in stated):
        return stated[:12]
    return data_sha256(header)[:12]


def joint_hash(digests: Iterable[str]) -> str:
    """The 12 hex digits that name a folder, from the `data_sha256` of its weight files."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()[:12]


def data_sha256(header: Header) -> str:
    """The sha256 of the file's bytes after the header, 64 hex digits."""
    digest = hashlib.sha256()
    with header.path.open("rb") as file:
        file.seek(header.data_start)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _size(value: object) -> int:
    return len(_json(value).encode())


def trigger_words(metadata: Mapping[str, str]) -> list[str]:
    """The trigger words of the adapter: our own list, else ModelSpec's trigger phrase, split at its commas."""
    words = parse_json(metadata.get("sfumato.trigger", ""))
    if isinstance(words, list) and all(isinstance(word, str) for word in words):
        return words
    return [word.strip() for word in metadata.get("modelspec.trigger_phrase", "").split(",") if word.strip()]
