"""Which weights of a pipeline an adapter's file speaks of, and how each can take it. Nothing is changed here."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal
from weakref import WeakSet

from torch import Tensor, nn

from sfumato.adapters.blocks import Blocks
from sfumato.adapters.weights import Adapter, Weight, is_zero_weight, public_name, weight_at, without_suffix
from sfumato.compose.layers.fused import Effect
from sfumato.compose.layers.unfused import can_be_unfused
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.keys import roles
from sfumato.files.kinds import Change, LoraModule, ModuleAdapter
from sfumato.files.kinds.ia3 import bias_change
from sfumato.files.metadata import family_mismatch
from sfumato.files.module_names import DENOISERS, PARTS, Target
from sfumato.models.family import family_of_denoiser
from sfumato.precision import quantization

ApplyMode = Literal["auto", "baked", "live"]
_TEXT_LEVEL = "text_model."
_COMPILED = "_orig_mod"
"""What `torch.compile` calls the module that it wraps, perhaps one block of a part."""


def pipeline_parts(pipe: Any) -> dict[str, nn.Module]:
    """The U-Net and text encoders of a diffusers pipeline or a Base, by name; without torch.compile's wrapper.

    Raises AdapterError for an object that has no U-Net, and for weights that are another library's to change.
    """
    parts = unwrapped_parts(pipe)
    for name, part in parts.items():
        if getattr(part, "peft_config", None):
            raise AdapterError(
                f"the {name} carries adapters that diffusers or peft loaded. "
                "Call pipe.unload_lora_weights() first, and give those files to compose as well."
            )
    return parts


def unwrapped_parts(pipe: Any) -> dict[str, nn.Module]:
    """As `parts_of`, whatever the parts carry."""
    parts = {name: getattr(part, _COMPILED, part) for name, part in _wrapped_parts(pipe).items()}
    if parts.keys().isdisjoint(DENOISERS):
        raise AdapterError(f"compose wants a diffusers pipeline with a U-Net, got {type(pipe).__name__}.")
    return parts


def denoiser_part(pipe: Any) -> str:
    """What the pipeline calls the part that denoises. Raises AdapterError where it has none."""
    parts = unwrapped_parts(pipe)
    return next(name for name in DENOISERS if name in parts)


def denoiser_of(pipe: Any) -> nn.Module:
    """The part of a pipeline or Base that denoises, without torch.compile's wrapper. Raises AdapterError for none."""
    return unwrapped_parts(pipe)[denoiser_part(pipe)]


def _wrapped_parts(pipe: Any) -> dict[str, nn.Module]:
    found = {name: getattr(pipe, name, None) for name in PARTS}
    if hasattr(pipe, "denoiser"):  # a Base
        found[pipe.family.denoiser] = pipe.denoiser
    for name, encoder in zip(PARTS[len(DENOISERS) :], getattr(pipe, "text_encoders", ()), strict=False):
        found[name] = encoder
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def compiled_parts(pipe: Any) -> set[str]:
    """The parts that torch.compile has taken, as a whole, in place or block by block."""
    found = set()
    for name, part in _wrapped_parts(pipe).items():
        modules = (part, *part.modules())
        if any(hasattr(m, _COMPILED) or getattr(m, "_compiled_call_impl", None) is not None for m in modules):
            found.add(name)
    return found


def refuse_compiled(pipe: Any, parts: Iterable[str]) -> None:
    """Raises AdapterError where one of the parts is compiled: its layers would not notice the hooks set on them."""
    for name in sorted(compiled_parts(pipe).intersection(parts)):
        raise AdapterError(
            f"the {name} is compiled, and a compiled layer does not notice adapters of one image or region. Draw "
            "before torch.compile, or each image by itself with sfumato.compose."
        )


_HALVED: WeakSet[nn.Module] = WeakSet()


@contextmanager
def exclusive_row_split(unet: nn.Module) -> Iterator[None]:
    """For a block that tells a call's rows without a prompt from those with; another one within would misread them."""
    if unet in _HALVED:
        raise AdapterError(
            "adapter guidance and regions each divide a call of the U-Net, and once only. Give all adapters or regions "
            "in one block, and not one in the other."
        )
    _HALVED.add(unet)
    try:
        yield
    finally:
        _HALVED.discard(unet)


class PipelineModules:
    """The modules of a pipeline by (part, path), whichever transformers version spells the paths."""

    def __init__(self, parts: Mapping[str, nn.Module]) -> None:
        self._parts = dict(parts)
        denoiser = next(name for name in DENOISERS if name in parts)
        self._attentions = [module for module in parts[denoiser].modules() if hasattr(module, "fused_projections")]
        self.check_unfused()
        config: Mapping[str, Any] = getattr(parts[denoiser], "config", {})
        self.family = family_of_denoiser(denoiser, type(parts[denoiser]).__name__, config).name
        self.text_width: int | None = config.get("cross_attention_dim")

    def check_unfused(self) -> None:
        """Refuse a U-Net whose queries, keys and values are computed by a copy of the weights that a mix changes."""
        # What unfuses them leaves `fused_projections` as it is, and puts the earlier processors back.
        if any(m.fused_projections and type(m.processor).__name__.startswith("Fused") for m in self._attentions):
            raise AdapterError(
                "the U-Net's projections are fused, so it has no to_q. Call unfuse_qkv_projections() first."
            )

    def check_blocks(self, weights: Mapping[str, Weight]) -> None:
        """Refuse weights, by label, for a block that the pipeline does not have, and so would count for nothing."""
        by_block = {label: weight for label, weight in weights.items() if isinstance(weight, Blocks)}
        if not by_block:
            return
        known = [
            (part, path.replace(f"{_COMPILED}.", ""))
            for part, module in self._parts.items()
            for path, _ in module.named_modules()
        ]
        for label, weight in by_block.items():
            if unknown := weight.unnamed(known):
                raise AdapterError(
                    f"{label}: blocks {', '.join(unknown)}: no module of this pipeline is called that. Wanted such as "
                    "down, mid, up.1, te, attn2, or IN04, M00, OUT07, BASE."
                )

    def has(self, part: str) -> bool:
        """Whether the pipeline has this part; one that is given texts encoded may lack its text encoders."""
        return part in self._parts

    def find(self, target: Target) -> tuple[Target, nn.Module] | None:
        """The module and the path it really has; None if the pipeline lacks it."""
        part, path = target
        if part in self._parts:
            for spelling in dict.fromkeys((path, _TEXT_LEVEL + path, path.removeprefix(_TEXT_LEVEL))):
                if (module := _module_at(self._parts[part], spelling)) is not None:
                    return (part, spelling), without_peft(module)
        return None


def without_peft(module: nn.Module) -> nn.Module:
    """The layer within the one that peft, or diffusers' `load_lora_weights`, puts around it; else the layer itself."""
    inner = getattr(module, "base_layer", None)
    return inner if isinstance(inner, nn.Module) else module


def _module_at(module: nn.Module, path: str) -> nn.Module | None:
    """The module at a path, None if there is none; blocks that are compiled each by itself are gone through."""
    for name in path.split("."):
        child = module._modules.get(name)
        if child is None:
            return None
        module = child._modules.get(_COMPILED) or child
    return module


@dataclass(frozen=True)
class MatchedWeight:
    """A weight or bias of the pipeline that a file changes, or a module's output that it adds to.

    name: "weight", "bias" or "output". live: whether beside the layer, not within the weight.
    """

    part: str
    path: str
    name: str
    module: nn.Module
    effect: Effect
    live: bool

    @property
    def beside(self) -> ModuleAdapter | None:
        """The adapter beside the module, of a kind that changes no weight."""
        return self.effect.change if isinstance(self.effect.change, ModuleAdapter) else None

    @property
    def live_form(self) -> LoraModule | None:
        """The low-rank form in which it can stand beside the layer, if there is one."""
        return self.effect.low_rank if self.name == "weight" and can_be_unfused(self.module) else None


def match_weights(
    file: AdapterFile, label: str, modules: PipelineModules, *, weight: Weight, partial: bool, way: ApplyMode
) -> list[MatchedWeight]:
    """The weights and biases that the file changes.

    weight: of the adapter; what is for a part that the pipeline does not have counts for nothing where it is 0 there.
    partial: leave out what does not fit. Raises AdapterError, one line with counts, for a file of another family, one
    of which a part does not fit, one of which nothing does, and for a layer that can take it in neither way.
    """
    found: list[MatchedWeight] = []
    fitting = 0
    lacking: list[str] = []
    misshapen: list[str] = []
    biased: list[str] = []
    for target, change in file.changes.items():
        place = modules.find(target)
        shape = None if place is None else quantization.module_weight_shape(place[1])
        if not modules.has(target[0]) and not weight_at(weight, *target):
            continue
        if place is not None and isinstance(change, ModuleAdapter):
            (part, path), module = place
            if not change.fits_module(module):
                misshapen.append(f"{'.'.join(target)}, a {change.kind} beside {type(module).__name__}")
                continue
            if way == "baked":
                raise AdapterError(
                    f"{label} is a {change.kind} adapter, which changes no weight, so nothing can be baked. Say "
                    "way='auto', or 'live'."
                )
            fitting += 1
            found.append(MatchedWeight(part, path, "output", module, Effect(change, None), True))
            continue
        if place is None or shape is None:
            lacking.append(".".join(target))
            continue
        (part, path), module = place
        bias = bias_change(change)
        if not change.fits(shape):
            misshapen.append(f"{'.'.join(target)} {_shape(change)} on {list(shape)}")
        elif bias is not None and bias.value is not None and not bias.fits(_bias_shape(module)):
            biased.append(".".join(target))
        else:
            fitting += 1
            if getattr(change, "value", change) is not None:  # a difference of the bias alone has no value
                live = _is_live(module, f"{part}.{path}", change, way)
                found.append(MatchedWeight(part, path, "weight", module, Effect.of(change), live))
            if bias is not None and _bias_shape(module):
                found.append(MatchedWeight(part, path, "bias", module, Effect(bias, None), False))
    if (lacking or misshapen or biased) and not (partial and fitting):
        raise AdapterError(_mismatch_error(file, label, modules, fitting, lacking, misshapen, biased))
    return found


def count_unmatched(file: AdapterFile, found: Iterable[MatchedWeight]) -> int:
    """How many modules of the file are not among what of it was found in the pipeline."""
    there = {(one.part, one.path) for one in found}
    return len(file.changes) - len(there) + len({_module_of(key) for key in file.skipped})


def _module_of(key: str) -> str:
    """The module that a key of an adapter's file names: what stands before the tensor's role; else the key itself."""
    words, known = key.split("."), roles()
    ends = (end for end in range(1, len(words)) if ".".join(words[end:]) in known)
    return ".".join(words[: next(ends, len(words))])


def weighted_matches(
    adapter: Adapter, file: AdapterFile, modules: PipelineModules, *, partial: bool
) -> Iterator[tuple[float, MatchedWeight]]:
    """What an adapter changes, with its weight there, for what stands beside layers; without what has a weight of 0."""
    modules.check_blocks({adapter.label: adapter.weight})
    for found in match_weights(file, adapter.label, modules, weight=adapter.weight, partial=partial, way="live"):
        number = weight_at(adapter.weight, found.part, found.path)
        if number:
            yield number, found


def warn_unknown_words(pipe: Any, files: Mapping[Adapter, AdapterFile]) -> None:
    """Say on stderr which words of adapters that count are not in use, and how prompts come to know them."""
    for adapter, file in files.items():
        if not file.embeddings or is_zero_weight(adapter.weight):
            continue
        from sfumato.adapters.embeddings.embedding import is_in_use

        if words := [token for token, parts in file.embeddings.items() if not is_in_use(pipe, token, parts)]:
            print(
                f"{adapter.label}: brings the words {', '.join(words)}, which are left out; prompts know them within "
                f"`with embedding.bundled(pipe, {{{adapter.label!r}: read_adapter(FILE).embeddings}}):` of "
                "sfumato.adapters.embeddings.embedding and sfumato.files.",
                file=sys.stderr,
            )


def _bias_shape(module: nn.Module) -> tuple[int, ...]:
    bias = quantization.stored_tensor(module, "bias")
    return tuple(bias.shape) if bias is not None and quantization.is_plain_float(bias) else ()


def _is_live(module: nn.Module, title: str, change: Change, way: ApplyMode) -> bool:
    """Whether the layer takes its adapters beside it. Raises AdapterError for one that cannot take this one at all."""
    stored = quantization.stored_tensor(module, "weight")
    if quantization.is_plain_float(stored):
        return way == "live" and can_be_unfused(module)  # norms and embeddings have no layer to stand beside
    weight = getattr(module, "weight", None)
    what = (
        f"quantised ({quantization.dtype_name(weight.dtype) if isinstance(weight, Tensor) else type(module).__name__})"
    )
    if way == "baked":
        raise AdapterError(
            f"{title} is {what}, so nothing can be merged into it. Say way='live', or load the base in bf16."
        )
    is_hidden = isinstance(module, nn.Conv2d) and not quantization.is_layerwise_cast(module, stored)
    if not can_be_unfused(module) or (change.needs_weight and is_hidden):
        raise AdapterError(
            f"{title} is {what}, and a {change.kind} there has no path beside the layer. Load the base in bf16."
        )
    return True


def _shape(change: Change) -> str:
    shape = getattr(change, "shape", None)
    return str(list(shape)) if shape is not None else f"({change.kind})"


def _mismatch_error(
    file: AdapterFile,
    label: str,
    modules: PipelineModules,
    fitting: int,
    lacking: list[str],
    misshapen: list[str],
    biased: list[str],
) -> str:
    total = len(file.changes)
    name = public_name(file.path)
    name = name if without_suffix(name) == label else f"{name} ({label})"
    theirs, ours = (file.family, file.text_width), (modules.family, modules.text_width)
    if other := family_mismatch(theirs, ours, "pipeline"):
        return f"{name}: {other}. Load it on a base of that family."
    some = f"the {fitting} of {total} modules that fit"
    partial = f", or pass partial=True (--partial) to apply {some}" if fitting else ""
    absent = [name for name in lacking if not modules.has(name.partition(".")[0])]
    if biased and not lacking and not misshapen:
        return (
            f"{name}: {len(biased)} of {total} modules change a bias that their layers do not have, first {biased[0]}, "
            f"which peft computes beside them (lora_bias). Train it without{partial}."
        )
    misshapen = [*misshapen, *biased]
    if absent and len(absent) == len(lacking) and not misshapen:
        part = absent[0].partition(".")[0]
        return (
            f"{name}: {len(absent)} of {total} modules change the {part}, which this pipeline does not have. Give the "
            f"adapter a weight for the U-Net alone, such as (0.8, 0){partial}."
        )
    problems = []
    if lacking:
        problems.append(f"{len(lacking)} of {total} modules are not in this pipeline, first {', '.join(lacking[:3])}")
    if misshapen:
        problems.append(f"{len(misshapen)} of {total} modules have another shape, first {misshapen[0]}")
    return f"{name}: {'; '.join(problems)}. Load it on the base it was trained on{partial}."
