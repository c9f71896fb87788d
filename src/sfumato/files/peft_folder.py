"""peft's folders: adapter_config.json beside adapter_model.safetensors, alone or one a part of the pipeline."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import FileError
from sfumato.files.header import Header, read_header
from sfumato.files.kohya import PARTS
from sfumato.files.peft_settings import PeftSettings, check_peft_settings, header_settings, parse_object

CONFIG, MODEL = "adapter_config.json", "adapter_model.safetensors"
CONFIG_LIMIT = 1_000_000
_KINDS = ("LORA", "LOHA", "LOKR", "OFT", "BOFT", "IA3")
_CLASSES = {
    "UNet2DConditionModel": "unet",
    "CLIPTextModel": "text_encoder",
    "CLIPTextModelWithProjection": "text_encoder_2",
}


@dataclass(frozen=True)
class WeightFile:
    """One weight file of an adapter. part: of the pipeline, where the file beside it says; settings: peft's."""

    header: Header
    part: str | None
    settings: PeftSettings


def adapter_sources(path: Path) -> list[WeightFile]:
    """The weight files of the adapter at `path`: a file, peft's folder, or a folder of one such a part.

    Raises FileError for a folder that is neither, or a config that says what the tensors do not hold.
    """
    if not os.path.isdir(path):  # False, where pathlib raises: too long a name, in a folder that may not be entered
        header = read_header(path)
        return [WeightFile(header, None, header_settings(header))]
    return [_source(folder, folder.name if folder != path else None) for folder in folders_in(path)]


def folders_in(path: Path) -> list[Path]:
    """The folders of an adapter's weight files: peft's folder itself, or those within it, one a part of the pipeline.

    Raises FileError for a folder that has no adapter_config.json in these places.
    """
    folders = (
        [path] if (path / CONFIG).is_file() else [path / part for part in PARTS if (path / part / CONFIG).is_file()]
    )
    if not folders:
        read_header(path)  # which refuses the folder and names the files in it
    return folders


def adapter_folders_below(path: Path) -> list[Path]:
    """The folders of adapters at any depth: of one that has a folder for each part, that which holds these."""
    holding = [config.parent for config in path.rglob(CONFIG)]
    return sorted({folder.parent if folder.name in PARTS else folder for folder in holding})


def is_adapter_folder(path: Path) -> bool:
    """Whether peft's config is in the folder, or in one of a part within it."""
    return any(os.path.isfile(folder / CONFIG) for folder in (path, *(path / part for part in PARTS)))


def _source(folder: Path, part: str | None) -> WeightFile:
    config = folder / CONFIG
    name = f"{folder.name}/{CONFIG}"
    if config.stat().st_size > CONFIG_LIMIT:
        raise FileError(
            f"{name}: the file has more than {CONFIG_LIMIT:,} bytes. No config needs that; do not trust it."
        )
    try:
        text = config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FileError(f"{name}: the file cannot be read as text ({error}). Save the adapter again.") from None
    values = check_peft_settings(parse_object(text, name), name)
    kind = values.get("peft_type")
    if kind not in _KINDS:
        raise FileError(f"{name}: peft_type is {kind!r:.40}; read are {', '.join(_KINDS)}. Merge it with peft itself.")
    if not (folder / MODEL).is_file():
        raise FileError(f"{folder.name}: there is no {MODEL} beside {CONFIG}. Save with safe_serialization=True.")
    part = part or _part(values)
    named = {f"{each}.{key}": value for each in ([part] if part else PARTS) for key, value in values.items()}
    return WeightFile(read_header(folder / MODEL), part, PeftSettings(name, named, folder=True))


def _part(values: dict[str, Any]) -> str | None:
    """The part by the class that peft wrapped; it says so only where it has no task of its own for the model."""
    mapping = values.get("auto_mapping")
    return _CLASSES.get(str(mapping.get("base_model_class"))) if isinstance(mapping, dict) else None
