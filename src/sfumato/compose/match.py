"""Which weights of a pipeline an adapter's file speaks of. Nothing is changed here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sfumato.bases.family import recognise
from sfumato.compose.lowrank import fits
from sfumato.errors import AdapterError
from sfumato.files.family import FAMILIES
from sfumato.files.kohya import Target
from sfumato.files.lora_file import LoraFile, LoraModule

PARTS = ("unet", "text_encoder", "text_encoder_2")
_TEXT_LEVEL = "text_model."


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """The U-Net and text encoders of a diffusers pipeline or a Base, by name; without torch.compile's wrapper.

    Raises AdapterError for an object that has no U-Net, and for weights that are another library's to change.
    """
    found = {name: getattr(pipe, name, None) for name in PARTS}
    for name, encoder in zip(PARTS[1:], getattr(pipe, "text_encoders", ()), strict=False):
        found[name] = encoder
    parts = {name: getattr(part, "_orig_mod", part) for name, part in found.items() if isinstance(part, nn.Module)}
    if "unet" not in parts:
        raise AdapterError(f"compose wants a diffusers pipeline with a U-Net, got {type(pipe).__name__}.")
    for name, part in parts.items():
        if getattr(part, "peft_config", None):
            raise AdapterError(
                f"the {name} carries adapters that diffusers or peft loaded. "
                "Call pipe.unload_lora_weights() first, and give those files to compose as well."
            )
    return parts


class Modules:
    """The modules of a pipeline by (part, path), whichever transformers version spells the paths."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = {name: dict(part.named_modules()) for name, part in parts.items()}
        config: Mapping[str, Any] = getattr(parts["unet"], "config", {})
        self.family = recognise(config).name
        self.text_width: int | None = config.get("cross_attention_dim")

    def find(self, target: Target) -> tuple[Target, nn.Module] | None:
        """The module and the path it really has; None if the pipeline lacks it."""
        part, path = target
        modules = self._parts.get(part, {})
        for spelling in (path, _TEXT_LEVEL + path, path.removeprefix(_TEXT_LEVEL)):
            if spelling in modules:
                return (part, spelling), modules[spelling]
        return None


def match(file: LoraFile, label: str, modules: Modules, *, partial: bool) -> dict[Target, tuple[nn.Module, LoraModule]]:
    """The modules of the pipeline that the file changes, each with its change, by their real paths.

    partial: leave out what does not fit. Raises AdapterError, one line with counts, for a file of another family, one
    of which a part does not fit, and one of which nothing does.
    """
    fitting: dict[Target, tuple[nn.Module, LoraModule]] = {}
    lacking: list[str] = []
    misshapen: list[str] = []
    for target, change in file.modules.items():
        found = modules.find(target)
        if found is None:
            lacking.append(".".join(target))
            continue
        real, module = found
        weight = getattr(module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim not in (2, 4):
            lacking.append(".".join(target))
        elif not weight.is_floating_point() or weight.dtype.itemsize == 1:
            raise AdapterError(
                f"{'.'.join(real)} is quantised ({weight.dtype}), so nothing can be merged into it. "
                "Load the base in bf16."
            )
        elif not fits(change, weight.shape):
            misshapen.append(f"{'.'.join(target)} {_shape(change)} on {list(weight.shape)}")
        else:
            fitting[real] = module, change.plain()
    if (lacking or misshapen) and not (partial and fitting):
        raise AdapterError(_misfit(file, label, modules, len(fitting), lacking, misshapen))
    return fitting


def _shape(change: LoraModule) -> list[int]:
    return [change.up.shape[0], *change.down.shape[1:]]


def _misfit(
    file: LoraFile, label: str, modules: Modules, fitting: int, lacking: list[str], misshapen: list[str]
) -> str:
    total = len(file.modules)
    name = file.path.name if file.path.stem == label else f"{file.path.name} ({label})"
    some = f"the {fitting} of {total} modules that fit"
    partial = f", or pass partial=True (--partial) to apply {some}" if fitting else ""
    theirs, ours = file.text_width, modules.text_width
    other_width = theirs is not None and ours is not None and theirs != ours
    if other_width or (file.family is not None and file.family != modules.family):
        wanted = FAMILIES[file.family].title if file.family else "another base"
        widths = (f" (text width {theirs})", f" ({ours})") if other_width else ("", "")
        return (
            f"{name}: trained for {wanted}{widths[0]}, this pipeline is {FAMILIES[modules.family].title}{widths[1]}. "
            f"Load it on the base it was trained on{partial}."
        )
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} of {total} modules are not in this pipeline, first {', '.join(lacking[:3])}")
    if misshapen:
        problems.append(f"{len(misshapen)} of {total} modules have another shape, first {misshapen[0]}")
    return f"{name}: {'; '.join(problems)}. Load it on the base it was trained on{partial}."
