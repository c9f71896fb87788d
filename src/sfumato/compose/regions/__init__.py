"""Adapters in regions of the picture: a mask or a box for each, and a prompt of its own if wanted.

    with regions(pipe, Region((0, 0, 0.5, 1), Adapter("otter.safetensors"), prompt="an otter"),
                       Region((0.5, 0, 1, 1), Adapter("crab.safetensors"), prompt="a crab")):
        pipe("two animals on the beach")

A layer on pixels adds each adapter's change under its mask, at that layer's resolution. Keys and values of the
cross-attention come from the text, which has no pixels: there each region attends by itself, and the outputs are
blended by the mask at the querying pixel. What the time step adds to a channel is added under the mask, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from sfumato.adapters.prompt_tags import refuse_tags
from sfumato.compose.hooks import serialized_calls
from sfumato.compose.layers.modules import under_masks
from sfumato.compose.match import (
    denoiser_of,
    denoiser_part,
    exclusive_row_split,
    refuse_compiled,
    warn_unknown_words,
    without_peft,
)
from sfumato.compose.regions.attention import Attention, check_no_picture_prompt
from sfumato.compose.regions.layers import RegionChanges, RegionModules, Spans, changes_by_layer, read_region_adapters
from sfumato.compose.regions.prompts import RegionPrompts
from sfumato.compose.regions.region import Box, Masks, Region
from sfumato.errors import AdapterError
from sfumato.files.kinds.modules import Call, first_output, with_first
from sfumato.files.metadata import over_steps_of
from sfumato.models.prompts.syntax import Syntax, check_syntax

__all__ = ["Box", "Region", "regions"]


@contextmanager
def regions(
    pipe: Any,
    *parts: Region,
    guided: bool = True,
    syntax: Syntax = "plain",
    over_steps: Mapping[str, tuple[float, float]] = MappingProxyType({}),
    partial: bool = False,
    verify: bool = False,
) -> Iterator[None]:
    """Within the block each region has its adapters and prompt; the rest is the base's picture of the call's prompt.

    pipe: a diffusers pipeline (SD 1.x, 2.x, SDXL) or a Base. guided: whether a call's first half of rows are those
    without the prompt, as classifier-free guidance has them, where no pipeline that is called says it.
    syntax: how weighted words of the regions' prompts are written, see `sfumato.models.prompts.syntax`; it wants a
    Base.
    over_steps: by an adapter's label the progress, from and to, in which it changes the U-Net, 0 at pure noise and 1 at
    the finished picture; of others those that their files ask for. partial, verify: as of `compose`. Where regions
    overlap, changes on pixels add up and attentions share. What diffusers' `load_lora_weights` loaded counts
    everywhere. Raises AdapterError for adapters without a low-rank form, for one that changes the text encoders in a
    region without a prompt or beside what diffusers loaded, for a compiled U-Net, for a pipeline with an IP-Adapter,
    and for prompts in one that guides by a picture, too; ConfigError for a syntax or a prompt that is none.
    """
    _check(pipe, parts, syntax)
    unet = denoiser_of(pipe)
    check_no_picture_prompt(unet)
    refuse_compiled(pipe, [denoiser_part(pipe)])
    masks = Masks([region.mask() for region in parts])
    files = read_region_adapters(parts, partial=partial, verify=verify)
    texts = RegionPrompts(pipe, parts, files, syntax, guided=guided, partial=partial)
    labels = {each.label for region in parts for each in region.adapters}
    asked = {each.label: span for each, file in files.items() if (span := over_steps_of(file.metadata))}
    spans = Spans(pipe, over_steps, asked)
    if unknown := sorted(over_steps.keys() - labels):
        raise AdapterError(f"over_steps names {unknown[0]!r}, which is in no region; there are {sorted(labels)}.")
    layers, beside = changes_by_layer(pipe, parts, files, spans, partial=partial)
    warn_unknown_words(pipe, files)

    with exclusive_row_split(unet), serialized_calls(pipe), ExitStack() as stack:
        for see in (
            lambda unet, *_: check_no_picture_prompt(unet),
            masks.on_unet_call,
            texts.on_unet_call,
            spans.on_unet_call,
        ):
            stack.enter_context(unet.register_forward_pre_hook(see, with_kwargs=True))
        for path, module in [named for named in unet.named_modules() if named[0].endswith("attn2")]:
            keys, values = (layers.pop(f"{path}.{name}", None) for name in ("to_k", "to_v"))
            if keys or values or any(text is not None for text in texts.now):
                stack.callback(_restore_processor, module, module.processor)
                module.set_processor(Attention(masks, texts, keys, values))
        for path, paths in layers.items():
            for handle in _hooks(unet, path, paths, masks):
                stack.enter_context(handle)
        for path, modules in beside.items():
            stack.enter_context(_module_hook(unet.get_submodule(path), modules, masks))
        yield


def _check(pipe: Any, parts: Sequence[Region], syntax: Syntax) -> None:
    """Raises AdapterError or ConfigError for what are no regions, or none that this pipeline can draw."""
    if not parts:
        raise AdapterError("there is no region; give at least one.")
    if wrong := [part for part in parts if not isinstance(part, Region)]:
        raise AdapterError(f"a region is given as Region(where, Adapter(file)), got {wrong[0]!r:.60}.")
    check_syntax(syntax)
    if syntax != "plain" and not hasattr(pipe, "encode_text"):
        raise AdapterError(f"the prompt syntax {syntax} wants a Base of sfumato.load_base, not a pipeline.")
    for part in parts:
        refuse_tags(part.prompt or "", f"the region's prompt {part.prompt!r:.60}", "give Region the adapter")


def _restore_processor(module: Any, processor: Any) -> None:
    if isinstance(module.processor, Attention):  # another may have been set meanwhile
        module.set_processor(processor)


def _hooks(unet: nn.Module, path: str, paths: RegionChanges, masks: Masks) -> list[Any]:
    """The hooks that add the regions' changes of one layer under their masks."""
    if path.startswith(("time_embedding", "add_embedding")):
        raise AdapterError(
            f"{path} has no pixels, so its change cannot be kept to a region. Use an adapter without it."
        )
    if path.endswith("time_emb_proj"):
        return _time_hooks(unet, path, paths, masks)
    module = unet.get_submodule(path)
    layer = without_peft(module)

    def add(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        for place, change in enumerate(paths):
            if change is None:
                continue
            narrow = change.narrow(layer, inputs[0])
            if narrow.ndim == 4:
                narrow = narrow * masks.at(narrow.shape[-2], narrow.shape[-1], narrow)[place]
            else:
                narrow = narrow * masks.on_tokens(narrow.shape[1], narrow)[place, :, None]
            output = output + change.widen(narrow).to(output.dtype)
        return output

    return [module.register_forward_hook(add)]


def _module_hook(module: nn.Module, modules: RegionModules, masks: Masks) -> Any:
    """The hook that adds what adapters beside a module add, each under its region's mask."""

    def under(output: Tensor) -> Tensor:
        if output.ndim == 4:
            return masks.at(output.shape[-2], output.shape[-1], output)
        return masks.on_tokens(output.shape[1], output)[..., None]

    def answer(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any], given: Any) -> Any:
        if (output := first_output(given)) is None:
            return given
        return with_first(given, under_masks(Call(module, args, options, output), modules.now(), under))

    return module.register_forward_hook(answer, with_kwargs=True)


def _time_hooks(unet: nn.Module, path: str, paths: RegionChanges, masks: Masks) -> list[Any]:
    """What the time step adds to each channel has no pixels yet: its change is kept, and added where it gets them."""
    block = unet.get_submodule(path.rpartition(".")[0])
    if getattr(block, "time_embedding_norm", "default") != "default":
        raise AdapterError(f"{path}: a scale by time cannot be kept to a region. Use an adapter without it.")
    kept: list[Tensor | None] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        kept[:] = [None if change is None else change.widen(change.narrow(layer, inputs[0])) for change in paths]

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        under = masks.at(hidden.shape[-2], hidden.shape[-1], hidden)
        for place, change in enumerate(kept):
            if change is not None:
                hidden = hidden + change.to(hidden.dtype)[:, :, None, None] * under[place]
        return (hidden, *inputs[1:])

    return [
        unet.get_submodule(path).register_forward_hook(keep),
        block.get_submodule("norm2").register_forward_pre_hook(add),
    ]
