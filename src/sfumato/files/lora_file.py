"""LoRA files of other tools and our own, read strictly into one form: {(part, path): LoraModule}."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.header import Header, read_header
from sfumato.files.keys import Layout, ModuleKeys, describe_foreign, guess_family, read_layout, text_widths
from sfumato.files.kohya import Target
from sfumato.files.read import read_tensors


@dataclass(frozen=True)
class LoraModule:
    """One module's update, alpha / rank * up down (Hu et al. 2021).

    down: (rank, in) or for a convolution (rank, in, height, width). up: (out, rank) or (out, rank, 1, 1).
    mid: (rank, rank, height, width) of a Tucker convolution, whose down is (rank, in, 1, 1).
    """

    down: Tensor
    up: Tensor
    alpha: float
    mid: Tensor | None = None

    @classmethod
    def from_scale(cls, down: Tensor, up: Tensor, scale: float) -> LoraModule:
        """The module whose update is scale * up down: whatever a trainer's scaling rule is, this is its effect."""
        return cls(down, up, scale * down.shape[0])

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def plain(self) -> LoraModule:
        """The same update without `mid`, exactly: a Tucker convolution is a convolution of the same rank."""
        if self.mid is None:
            return self
        down = torch.einsum("pqhw,qi->pihw", self.mid.float(), self.down.float().flatten(1))
        return LoraModule(down.to(self.down.dtype), self.up, self.alpha)

    def delta(self) -> Tensor:
        """The update in fp32, (out, in) or (out, in, height, width)."""
        module = self.plain()
        down, up = module.down.float(), module.up.float()
        return module.scale * (up.flatten(1) @ down.flatten(1)).view(up.shape[0], *down.shape[1:])


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read. modules: by (part, path), paths as in `named_modules()` of transformers >= 5.6.

    family: "sd1", "sd2", "sdxl", "pocket" or None where neither shapes nor metadata tell. text_width: the input width
    of the cross-attention's keys, None without such modules. skipped: keys left out because `partial` allowed it.
    """

    path: Path
    modules: Mapping[Target, LoraModule]
    metadata: Mapping[str, str]
    family: str | None
    text_width: int | None
    spellings: tuple[str, ...]
    skipped: tuple[str, ...] = ()


def read_lora(path: str | os.PathLike[str], *, partial: bool = False) -> LoraFile:
    """The LoRA at `path`, in kohya's, diffusers' or peft's grammar, with every key accounted for.

    partial: leave out keys that are not understood and modules that lack a half, and list them in `skipped`; without
    it they are errors. Raises FileError for a broken file and AdapterError for one that is no LoRA or not a whole one.
    """
    header = read_header(path)
    layout = read_layout(header.tensors)
    _check_layout(layout, header, partial)
    alphas = _metadata_alphas(header)
    tensors = read_tensors(header.path, header=header)
    modules: dict[Target, LoraModule] = {}
    skipped = list(layout.unknown)
    for target, keys in layout.modules.items():
        if keys.names.keys() >= {"down", "up"}:
            modules[target] = _module(target, keys, tensors, alphas, header)
        else:
            skipped.extend(keys.names.values())
    return LoraFile(
        header.path,
        MappingProxyType(modules),
        header.metadata,
        guess_family(layout, header),
        next(iter(text_widths(layout, header)), None),
        layout.spellings,
        tuple(skipped),
    )


def _check_layout(layout: Layout, header: Header, partial: bool) -> None:
    file, total = header.path.name, len(header.tensors)
    if not layout.modules:
        what = describe_foreign(header.tensors)
        if what:
            raise AdapterError(f"{file}: this is {what} ({total:,} tensors), not a LoRA. Name a LoRA file.")
        raise AdapterError(
            f"{file}: 0 of {total:,} keys are a LoRA's for SD or SDXL, first {_first(layout.unknown)}. "
            "Name a LoRA file."
        )
    others = {kind: count for kind, count in layout.kinds.items() if kind != "LoRA"}
    if others:
        counts = ", ".join(f"{kind} in {count} modules" for kind, count in others.items())
        raise AdapterError(
            f"{file}: the file holds {counts} of {len(layout.modules)}; only LoRA can be applied yet. "
            "Convert it to a LoRA with the tool that made it."
        )
    if layout.repeated:
        raise AdapterError(
            f"{file}: {len(layout.repeated)} of {total:,} keys name a module that another spelling names too, first "
            f"{_first(layout.repeated)}. Which is meant is not said; take the file from its source again."
        )
    if partial:
        if not any(keys.names.keys() >= {"down", "up"} for keys in layout.modules.values()):
            raise AdapterError(
                f"{file}: none of {len(layout.modules)} modules is whole. Take the file from its source again."
            )
        return
    if layout.unknown:
        raise AdapterError(
            f"{file}: {len(layout.unknown)} of {total:,} keys are not understood, first {_first(layout.unknown)}. "
            "Accept the rest with partial=True (--partial), or take another file."
        )
    for half, other in (("up", "down"), ("down", "up")):
        lacking = [
            keys.names[other] for keys in layout.modules.values() if other in keys.names and half not in keys.names
        ]
        if lacking:
            raise AdapterError(
                f"{file}: lora_{half} is missing for {len(lacking)} of {len(layout.modules)} modules, first beside "
                f"{lacking[0]}. Take the file from its source again, or accept the rest with partial=True (--partial)."
            )


def _module(
    target: Target, keys: ModuleKeys, tensors: Mapping[str, Tensor], alphas: _Alphas, header: Header
) -> LoraModule:
    down, up = tensors[keys.names["down"]], tensors[keys.names["up"]]
    mid = tensors[keys.names["mid"]] if "mid" in keys.names else None
    fits = down.ndim in (2, 4) and up.ndim in (2, 4) and down.is_floating_point() and up.is_floating_point()
    if not fits or up.shape[1] != down.shape[0] or up.shape[1:].numel() != down.shape[0]:
        raise AdapterError(
            f"{header.path.name}: the halves of {'.'.join(target)} do not fit: lora_down {list(down.shape)}, lora_up "
            f"{list(up.shape)}; wanted (rank, in) and (out, rank). Take the file from its source again."
        )
    rank = down.shape[0]
    if mid is not None and (mid.ndim != 4 or mid.shape[:2] != (rank, rank) or down.shape[1:].numel() != down.shape[1]):
        raise AdapterError(
            f"{header.path.name}: lora_mid of {'.'.join(target)} is {list(mid.shape)}; wanted ({rank}, {rank}, height, "
            "width). Take the file from its source again."
        )
    if "alpha" not in keys.names:
        return LoraModule(down, up, alphas.of(target, rank), mid)
    alpha = tensors[keys.names["alpha"]]
    if alpha.numel() != 1:
        raise AdapterError(
            f"{header.path.name}: alpha of {'.'.join(target)} is {list(alpha.shape)}; wanted one number. "
            "Take the file from its source again."
        )
    return LoraModule(down, up, float(alpha), mid)


@dataclass(frozen=True)
class _Alphas:
    """The alphas of `lora_adapter_metadata`, diffusers' JSON of one peft config a part: {"unet.lora_alpha": 8, ...}."""

    file: str
    values: Mapping[str, Any]

    def of(self, target: Target, rank: int) -> float:
        """The alpha that makes alpha / rank the scale of the module; rank where the file says nothing (scale 1)."""
        part, path = target
        alpha = self._number(f"{part}.lora_alpha", rank)
        pattern = self.values.get(f"{part}.alpha_pattern") or {}
        for name, value in pattern.items() if isinstance(pattern, dict) else ():
            # peft matches these as regular expressions on the path's end. A file does not get to run one here; what
            # tools write are plain paths, perhaps after "^".
            plain = name.removeprefix("^").removesuffix("$").replace("\\.", ".").removeprefix("text_model.")
            full = path.removeprefix("text_model.")
            if full == plain or (full.endswith(f".{plain}") and not name.startswith("^")):
                alpha = self._number(f"{part}.alpha_pattern", rank, value)
                break
        return alpha * rank**0.5 if self.values.get(f"{part}.use_rslora") is True else alpha

    def _number(self, key: str, default: float, value: Any = None) -> float:
        value = self.values.get(key, default) if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < float("inf"):
            raise AdapterError(
                f"{self.file}: lora_adapter_metadata gives {key} as {value!r:.40}, wanted a number. Save it again."
            )
        return float(value)


def _metadata_alphas(header: Header) -> _Alphas:
    text = header.metadata.get("lora_adapter_metadata")
    if text is None:
        return _Alphas(header.path.name, {})
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        raise AdapterError(f"{header.path.name}: lora_adapter_metadata is not a JSON object. Save the file again.")
    return _Alphas(header.path.name, values)


def _first(names: tuple[str, ...]) -> str:
    return ", ".join(names[:3])
