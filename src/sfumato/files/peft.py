"""peft's folders: adapter_config.json beside adapter_model.safetensors, alone or one a part of the pipeline.

What peft's config says beside the tensors: alphas, and how a rotation is built. No regex of a file is run.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfumato.errors import AdapterError, FileError
from sfumato.files.header import Header, read_header
from sfumato.files.module_names import PARTS, Target
from sfumato.utils.text_files import parse_json

_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNUSUAL = (
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "megatron_config", "fan_in_fan_out"),
)

_ALPHAS = ("alpha", "lora_alpha", "alpha_pattern")


@dataclass(frozen=True)
class PeftSettings:
    """peft's config of each part of a pipeline. values: {"unet.lora_alpha": 8, ...}, as diffusers writes it.

    source: what the error names. folder: whether it is peft's own adapter_config.json, so that a key that is missing
    has peft's default; without it a file of LyCORIS may stand in the same spelling.
    """

    source: str
    values: Mapping[str, Any] = field(default_factory=dict)
    folder: bool = False

    def alpha(self, target: Target, rank: int) -> float:
        """The alpha that makes alpha / rank the scale of the module; rank where nothing is said (scale 1)."""
        part, path = target
        alpha = self._number(f"{part}.alpha", self._number(f"{part}.lora_alpha", rank))
        pattern = self._pattern(part, "alpha_pattern", path)
        if pattern is not None:
            alpha = self._number(f"{part}.alpha_pattern", rank, pattern)
        return alpha * rank**0.5 if self.values.get(f"{part}.use_rslora") is True else alpha

    @property
    def says_alpha(self) -> bool:
        """Whether an alpha is said of any module; by a folder always, if need be by peft's default."""
        return self.folder or any(key.rpartition(".")[2] in _ALPHAS for key in self.values)

    def rank(self, target: Target, default: int) -> int:
        """The rank that peft divides alpha by, where the tensors do not show it."""
        part, path = target
        pattern = self._pattern(part, "rank_pattern", path)
        rank = self._number(f"{part}.rank_pattern", default, pattern) if pattern is not None else None
        return int(rank if rank is not None else self._number(f"{part}.r", default)) or default

    def get(self, target: Target, key: str) -> Any:
        """The value of a key for the module's part, None where it is not said."""
        return self.values.get(f"{target[0]}.{key}")

    def _pattern(self, part: str, key: str, path: str) -> Any:
        # peft matches these as regular expressions on the path's end. A file does not get to run one here; what tools
        # write are plain paths, perhaps after "^", and anything else is refused.
        pattern = self.values.get(f"{part}.{key}") or {}
        for name, value in pattern.items() if isinstance(pattern, dict) else ():
            plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix("text_model.")
            full = path.removeprefix("text_model.")
            if not re.fullmatch(r"[\w.-]+", plain):
                raise AdapterError(
                    f"{self.source}: {key} has the regular expression {name!r:.60}, which is not run; wanted the names "
                    "of modules. Save it with them."
                )
            if full == plain or (full.endswith(f".{plain}") and not name.startswith("^")):
                return value
        return None

    def _number(self, key: str, default: float, value: Any = None) -> float:
        value = self.values.get(key, default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < 1e9:
            raise AdapterError(f"{self.source} gives {key} as {value!r:.40}, wanted a number. Save it again.")
        return float(value)


def header_settings(header: Header) -> PeftSettings:
    """The settings in a file's `lora_adapter_metadata`, diffusers' JSON of one peft config a part.

    What `unet.save_lora_adapter` writes names no part, neither there nor in its tensors: it is of the U-Net.
    """
    text = header.metadata.get("lora_adapter_metadata")
    source = f"{header.path.name}: lora_adapter_metadata"
    if text is None:
        return PeftSettings(source)
    values = check_peft_settings(parse_object(text, source), source)
    return PeftSettings(source, {key if "." in key else f"unet.{key}": value for key, value in values.items()})


def parse_object(text: str, source: str) -> dict[str, Any]:
    """A JSON object, or AdapterError that begins with `source`."""
    values = parse_json(text)
    if not isinstance(values, dict):
        raise AdapterError(f"{source} is not a JSON object. Save the file again.")
    return values


def check_peft_settings(values: dict[str, Any], source: str) -> dict[str, Any]:
    """The values, or AdapterError for settings under which the tensors do not say what the adapter does."""
    for key, value in values.items():
        name = key.rpartition(".")[2]
        if name == "init_lora_weights" and isinstance(value, str) and value.lower().startswith(_OTHER_BASES):
            raise AdapterError(
                f"{source}: init_lora_weights is {value!r:.30}, so the adapter belongs to a base that peft changed "
                "before training. Save it with path_initial_model_for_weight_conversion."
            )
        if name in _UNUSUAL and value:
            raise AdapterError(f"{source}: {name} is set, which is not read. Merge it with peft itself.")
    return values


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
