"""What peft's config says beside the tensors: alphas, and how a rotation is built. No regex of a file is run."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sfumato.errors import AdapterError
from sfumato.files.header import Header
from sfumato.files.kohya import Target
from sfumato.json_text import value_of

_OTHER_BASES = ("pissa", "olora", "corda", "loftq", "lora_ga")
_UNUSUAL = (
    *("layer_replication", "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "megatron_config", "fan_in_fan_out"),
)


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
    values = value_of(text)
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
