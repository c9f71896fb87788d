"""Adapters in regions of the picture: a mask or a box for each, and a prompt of its own if wanted.

    with regions(pipe, Region((0, 0, 0.5, 1), Adapter("otter.safetensors"), prompt="an otter"),
                       Region((0.5, 0, 1, 1), Adapter("crab.safetensors"), prompt="a crab")):
        pipe("two animals on the beach")

A layer on pixels adds each adapter's change under its mask, at that layer's resolution. Keys and values of the
cross-attention come from the text, which has no pixels: there each region attends by itself, and the outputs are
blended by the mask at the querying pixel. What the time step adds to a channel is added under the mask, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from numbers import Real
from types import MappingProxyType
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import adaptive_avg_pool2d, conv2d, linear, scaled_dot_product_attention

from sfumato import prompts, schedulers
from sfumato.compose import tensors
from sfumato.compose.adapter import Adapter, with_unet
from sfumato.compose.match import Modules, halved, parts_of, refuse_compiled, say_unknown_words, weighed
from sfumato.compose.steps import Ramp, progress_of
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.changes.replacement import lora_command
from sfumato.files.fingerprint import verify as verify_deltas
from sfumato.merging.whole_model import read_mixable
from sfumato.prompt_steps import STEPS, changes
from sfumato.prompts import Syntax

Box = tuple[float, float, float, float]
"""left, top, right, bottom, each a share of the picture's side, 0 to 1."""

_GRID = 512
"""Pixels on a side of a box's mask, before it is averaged down to each layer's own resolution."""


@dataclass(frozen=True, init=False)
class Region:
    """A part of the picture, its adapters, and what is drawn there.

    where: a picture that is white where the adapters count (grey counts in part), or a box. prompt: of this region's
    cross-attention, read with the call's `clip_skip`; None for the call's own. Its words may change between the steps
    of `sfumato.draw`, see `sfumato.prompt_steps`. An adapter that changes the text encoders wants a prompt here.
    Raises AdapterError for what is no place and no adapter.
    """

    where: Image.Image | Box
    adapters: tuple[Adapter, ...]
    prompt: str | None = None

    def __init__(self, where: Image.Image | Box, *adapters: Adapter, prompt: str | None = None) -> None:
        is_box = isinstance(where, tuple | list) and len(where) == 4 and all(isinstance(side, Real) for side in where)
        if not is_box and not isinstance(where, Image.Image):
            raise AdapterError(
                f"a region at {where!r:.60}: wanted a picture that is white there, or (left, top, right, bottom) as "
                "shares of the side."
            )
        if wrong := [adapter for adapter in adapters if not isinstance(adapter, Adapter)]:
            raise AdapterError(f"an adapter of a region is given as Adapter(file, weight), got {wrong[0]!r:.60}.")
        object.__setattr__(self, "where", where)
        object.__setattr__(self, "adapters", adapters)
        object.__setattr__(self, "prompt", prompt)

    def mask(self) -> Tensor:
        """(1, 1, height, width) in [0, 1]. Raises AdapterError for a region that is empty."""
        if isinstance(self.where, Image.Image):
            grey = self.where.convert("L")
            values = torch.frombuffer(bytearray(grey.tobytes()), dtype=torch.uint8).view(1, 1, grey.height, grey.width)
            mask = values.float() / 255
        else:
            left, top, right, bottom = self.where
            if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
                raise AdapterError(f"a box is (left, top, right, bottom) as shares of the side, got {self.where}.")
            mask = torch.zeros(1, 1, _GRID, _GRID)
            rows, columns = (slice(round(a * _GRID), round(b * _GRID)) for a, b in ((top, bottom), (left, right)))
            mask[..., rows, columns] = 1
        if not mask.any():
            raise AdapterError("a region is black all over; its mask is white where the adapters count.")
        return mask


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
    without the prompt, as classifier-free guidance has them, where neither the pipeline nor `sfumato.draw` says it.
    syntax: how weighted words of the regions' prompts are
    written, see `sfumato.prompts`; it wants a Base. over_steps: by an adapter's label the progress, from and to, in
    which it changes the U-Net, 0 at pure noise and 1 at the finished picture. partial, verify: as of `compose`. Where
    regions overlap, changes on pixels add up and attentions share. Raises AdapterError for adapters without a low-rank
    form, for one that changes the text encoders in a region without a prompt, for a compiled U-Net, and for a pipeline
    with an IP-Adapter.
    """
    if not parts:
        raise AdapterError("there is no region; give at least one.")
    if wrong := [part for part in parts if not isinstance(part, Region)]:
        raise AdapterError(f"a region is given as Region(where, Adapter(file)), got {wrong[0]!r:.60}.")
    if syntax != "plain" and not hasattr(pipe, "encode_text"):
        raise AdapterError(f"the prompt syntax {syntax} wants a Base of sfumato.load_base, not a pipeline.")
    for part in parts:
        prompts.refuse_tags(part.prompt or "", f"the region's prompt {part.prompt!r:.60}", "give Region the adapter")
    unet = parts_of(pipe)["unet"]
    _check_no_picture_prompt(unet)
    refuse_compiled(pipe, ["unet"])
    masks = _Masks([region.mask() for region in parts])
    files = _read(parts, partial=partial, verify=verify)

    def encoded(clip_skip: int | None, steps: int) -> list[Told | None]:
        return [
            None if region.prompt is None else _encode(pipe, region, syntax, clip_skip, steps, partial=partial)
            for region in parts
        ]

    texts = _Texts(pipe, encoded, follows=syntax == "a1111" and any(changes(each.prompt or "") for each in parts))
    labels = {each.label for region in parts for each in region.adapters}
    if unknown := sorted(over_steps.keys() - labels):
        raise AdapterError(f"over_steps names {unknown[0]!r}, which is in no region; there are {sorted(labels)}.")
    spans = _Spans(pipe, over_steps)
    layers = _layers(pipe, parts, files, spans, partial=partial)
    say_unknown_words(pipe, files)

    def is_guided() -> bool:
        """As the pipeline that is called says; a Base that `sfumato.draw` does not draw leaves it to the caller."""
        return bool(getattr(schedulers.CALLED.get() or pipe, "do_classifier_free_guidance", guided))

    with halved(unet):
        seen = (lambda unet, *_: _check_no_picture_prompt(unet), masks.see, texts.see, spans.see)
        handles = [unet.register_forward_pre_hook(see, with_kwargs=True) for see in seen]
        processors: list[tuple[Any, Any]] = []
        try:
            for path, module in unet.named_modules():
                if path.endswith("attn2"):
                    keys, values = (layers.pop(f"{path}.{name}", None) for name in ("to_k", "to_v"))
                    if keys or values or any(text is not None for text in texts.now):
                        processors.append((module, module.processor))
                        module.set_processor(_Attention(masks, texts, keys, values, is_guided))
            for path, paths in layers.items():
                handles += _hooks(unet, path, paths, masks)
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, processor in processors:
                if isinstance(module.processor, _Attention):  # another may have been set meanwhile
                    module.set_processor(processor)


class _Spans:
    """Which adapters count at the current step."""

    def __init__(self, pipe: Any, spans: Mapping[str, tuple[float, float]]) -> None:
        self._pipe = pipe
        self._ways = {label: Ramp.within(*span, 1.0) for label, span in spans.items()}
        self._now: dict[str, float] = {}

    def see(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note a call's step."""
        if self._ways:
            now = schedulers.asked_timestep(args, options)
            progress = progress_of(now, schedulers.DRAWING.get() or self._pipe.scheduler)
            self._now = {label: way(progress) for label, way in self._ways.items()}

    def held(self, narrow: Tensor, owners: Sequence[str]) -> Tensor:
        """What `_Path.narrow` gave, 0 where its owner does not count at this step."""
        if all(self._now.get(owner, 1.0) == 1 for owner in owners):
            return narrow
        counts = torch.tensor([self._now.get(owner, 1.0) for owner in owners], device=narrow.device, dtype=narrow.dtype)
        return narrow * (counts[:, None, None] if narrow.ndim == 4 else counts)


class _Near:
    """A tensor that is moved once to each device and dtype that it is wanted on."""

    def __init__(self, tensor: Tensor) -> None:
        self._there = {(tensor.device, tensor.dtype): tensor}
        self._tensor = tensor

    def like(self, other: Tensor) -> Tensor:
        """On the device and in the dtype of `other`."""
        key = (other.device, other.dtype)
        if key not in self._there:
            self._there[key] = self._tensor.to(*key)
        return self._there[key]


@dataclass
class _Path:
    """One region's change of one layer.

    down: (rank, in, ...), up: (out, rank), the weights within it. owners: the label of each rank's adapter.
    """

    down: Tensor
    up: Tensor
    owners: list[str]
    spans: _Spans

    def __post_init__(self) -> None:
        self._down, self._up = _Near(self.down), _Near(self.up)

    def narrow(self, module: nn.Module, x: Tensor) -> Tensor:
        """down x: (rows, tokens, rank), or (rows, rank, height, width) of a convolution."""
        down = self._down.like(x)
        if isinstance(module, nn.Conv2d):
            found = conv2d(x, down, None, module.stride, module.padding, module.dilation)
        else:
            found = linear(x, down)
        return self.spans.held(found, self.owners)

    def widen(self, narrow: Tensor) -> Tensor:
        """up of what `narrow` gave."""
        up = self._up.like(narrow)
        return conv2d(narrow, up[..., None, None]) if narrow.ndim == 4 else linear(narrow, up)


Paths = list[_Path | None]
"""By region."""


@dataclass
class _Masks:
    """The masks at every resolution of the current call."""

    full: list[Tensor]
    _latents: tuple[int, int] = (0, 0)
    _known: dict[tuple[int, int], _Near] = field(default_factory=dict)

    def see(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the size of a call's latents."""
        sample = options["sample"] if "sample" in options else args[0]
        self._latents = (sample.shape[-2], sample.shape[-1])

    def at(self, height: int, width: int, like: Tensor) -> Tensor:
        """(regions, height, width), on the device and in the dtype of `like`."""
        if (height, width) not in self._known:
            pooled = [adaptive_avg_pool2d(mask, (height, width))[0, 0] for mask in self.full]
            self._known[height, width] = _Near(torch.stack(pooled))
        return self._known[height, width].like(like)

    def on_tokens(self, count: int, like: Tensor) -> Tensor:
        """(regions, count): the masks on the tokens of a level, whose size follows from their number."""
        height, width = self._latents
        while height * width > count:
            height, width = -(-height // 2), -(-width // 2)
        if height * width != count:
            raise AdapterError(f"{count} tokens are no level of {self._latents[0]}x{self._latents[1]} latents.")
        return self.at(height, width, like).flatten(1)


Told = list[tuple[int, Tensor]]
"""(last step, counted from 1, the text until then, (1, tokens, width)), in order."""


class _Texts:
    """The regions' texts at the current step, encoded anew where a call's `clip_skip` or number of steps is another.

    encode: from these two to what each region is told, None for one without a prompt. follows: whether words change
    between the steps; otherwise all pictures are of one.
    """

    def __init__(self, pipe: Any, encode: Callable[[int | None, int], list[Told | None]], *, follows: bool) -> None:
        self._pipe, self._encode, self._follows = pipe, encode, follows
        self._clock = schedulers.Clock()
        self._asked = self._ask(steps=1)
        self._told = encode(*self._asked)
        self.now = self._at(1)

    def _ask(self, steps: int) -> tuple[int | None, int]:
        """`clip_skip` that a Base has, or the pipeline's call under way or last made, and the steps."""
        is_base = hasattr(self._pipe, "encode_text")
        return getattr(self._pipe if is_base else schedulers.CALLED.get() or self._pipe, "clip_skip", None), steps

    def _at(self, step: int) -> list[Tensor | None]:
        return [
            None if told is None else next((text for last, text in told if step <= last), told[-1][1])
            for told in self._told
        ]

    def see(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note the call's `clip_skip`, and its step."""
        scheduler, steps = schedulers.DRAWING.get(), STEPS.get()
        if self._follows and (scheduler is None or steps is None):
            raise AdapterError(
                "words of a region's prompt that change between the steps are counted by sfumato.draw, and this "
                "pipeline is called by itself. Draw with sfumato.draw, or leave one of the words."
            )
        asked = self._ask(steps if self._follows and steps else 1)
        if asked != self._asked:
            self._asked, self._told = asked, self._encode(*asked)
        step = self._clock.step(schedulers.asked_timestep(args, options), scheduler) if self._follows else 0
        self.now = self._at(step + 1)


def _check_no_picture_prompt(unet: Any) -> None:
    if getattr(unet.config, "encoder_hid_dim_type", None) == "ip_image_proj":
        raise AdapterError(
            "the U-Net has an IP-Adapter, whose picture is attended to where regions are told apart. Call "
            "pipe.unload_ip_adapter() first, or draw without regions."
        )


def _hooks(unet: nn.Module, path: str, paths: Paths, masks: _Masks) -> list[Any]:
    """The hooks that add the regions' changes of one layer under their masks."""
    module = unet.get_submodule(path)
    if path.startswith(("time_embedding", "add_embedding")):
        raise AdapterError(
            f"{path} has no pixels, so its change cannot be kept to a region. Use an adapter without it."
        )
    if path.endswith("time_emb_proj"):
        return _time_hooks(unet, path, module, paths, masks)

    def add(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
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


def _time_hooks(unet: nn.Module, path: str, module: nn.Module, paths: Paths, masks: _Masks) -> list[Any]:
    """What the time step adds to each channel has no pixels yet: its change is kept, and added where it gets them."""
    block = unet.get_submodule(path.rpartition(".")[0])
    if getattr(block, "time_embedding_norm", "default") != "default":
        raise AdapterError(f"{path}: a scale by time cannot be kept to a region. Use an adapter without it.")
    kept: list[Tensor | None] = []

    def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        kept[:] = [None if change is None else change.widen(change.narrow(layer, inputs[0])) for change in paths]

    def add(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden = inputs[0]
        under = masks.at(hidden.shape[-2], hidden.shape[-1], hidden)
        for place, change in enumerate(kept):
            if change is not None:
                hidden = hidden + change.to(hidden.dtype)[:, :, None, None] * under[place]
        return (hidden, *inputs[1:])

    return [module.register_forward_hook(keep), block.get_submodule("norm2").register_forward_pre_hook(add)]


class _Attention:
    """The processor of a cross-attention in which every region attends to keys and values of its own."""

    def __init__(
        self,
        masks: _Masks,
        texts: _Texts,
        keys: Paths | None,
        values: Paths | None,
        is_guided: Callable[[], bool],
    ) -> None:
        self._masks, self._texts, self._is_guided = masks, texts, is_guided
        self._keys = keys or [None] * len(texts.now)
        self._values = values or [None] * len(texts.now)

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *_: Any,
        **__: Any,
    ) -> Tensor:
        if attention_mask is not None or encoder_hidden_states is None:
            raise AdapterError("regions want cross-attention without a mask, as Stable Diffusion has it.")
        text = encoder_hidden_states
        query = self._heads(attn, attn.to_q(hidden_states))
        outputs = self._attend(attn, query, attn.to_k(text), attn.to_v(text))
        under = self._masks.on_tokens(hidden_states.shape[1], outputs)
        shares = under / under.sum(0).clamp(min=1)
        base = outputs
        for place, own in enumerate(self._texts.now):
            key_change, value_change = self._keys[place], self._values[place]
            if own is None and key_change is None and value_change is None:
                continue
            here = text if own is None else self._with_own(text, own)
            keys = self._changed(attn.to_k, here, key_change)
            values = self._changed(attn.to_v, here, value_change)
            outputs = outputs + shares[place, :, None] * (self._attend(attn, query, keys, values) - base)
        projected: Tensor = attn.to_out[0](outputs)
        projected = attn.to_out[1](projected)
        if attn.residual_connection:
            projected = projected + hidden_states
        rescaled: Tensor = projected / attn.rescale_output_factor
        return rescaled

    def _with_own(self, text: Tensor, own: Tensor) -> Tensor:
        """The region's text in the rows with a prompt, (rows, tokens, width).

        Texts of different lengths are repeated to one: attention over the same keys twice is the same mean of values.
        """
        tokens = math.lcm(text.shape[1], own.shape[1])
        text, own = (some.repeat(1, tokens // some.shape[1], 1) for some in (text, own))
        rows = text.shape[0]
        first = rows // 2 if rows > 1 and self._is_guided() else 0
        own = own.to(text.device, text.dtype).expand(rows - first, -1, -1)
        return torch.cat([text[:first], own])

    @staticmethod
    def _changed(layer: nn.Module, text: Tensor, change: _Path | None) -> Tensor:
        output: Tensor = layer(text)
        return output if change is None else output + change.widen(change.narrow(layer, text)).to(output.dtype)

    @staticmethod
    def _heads(attn: Any, x: Tensor) -> Tensor:
        return x.view(x.shape[0], x.shape[1], attn.heads, -1).transpose(1, 2)

    def _attend(self, attn: Any, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        found = scaled_dot_product_attention(query, self._heads(attn, keys), self._heads(attn, values))
        return found.transpose(1, 2).flatten(2).to(query.dtype)


def _read(parts: Sequence[Region], *, partial: bool, verify: bool) -> dict[Adapter, AdapterFile]:
    """The files of all regions' adapters, each once."""
    found = {}
    for adapter in dict.fromkeys(each for region in parts for each in region.adapters):
        file = found[adapter] = read_mixable(adapter.path, partial=partial)
        if verify:
            verify_deltas(file.metadata, file.changes, file.path.name)
    return found


def _layers(
    pipe: Any, parts: Sequence[Region], files: Mapping[Adapter, AdapterFile], spans: _Spans, *, partial: bool
) -> dict[str, Paths]:
    """By the path of a layer of the U-Net: what each region changes there."""
    modules = Modules(parts_of(pipe))
    layers: dict[str, Paths] = {}
    for place, region in enumerate(parts):
        for adapter in region.adapters:
            for number, found in weighed(adapter, files[adapter], modules, partial=partial):
                if found.part != "unet":
                    if region.prompt is None:
                        raise AdapterError(
                            f"{adapter.label} changes {found.part}, and its region has no prompt of its own. Give the "
                            "Region a prompt, or the adapter a weight (0.8, 0)."
                        )
                    continue
                low = found.beside
                if low is None:
                    raise AdapterError(
                        f"{adapter.label}: {found.path} is changed by a {found.effect.change.kind}, which has no "
                        "low-rank form to keep to a region. Make it a LoRA: "
                        f"{lora_command(found.effect.change)}."
                    )
                shape = tensors.shape(found.module)
                assert shape is not None
                down = low.down.float().reshape(low.rank, *shape[1:])
                up = low.up.float().flatten(1) * (number * low.scale)
                paths = layers.setdefault(found.path, [None] * len(parts))
                owners = [adapter.label] * low.rank
                before = paths[place]
                if before is not None:
                    down, up = torch.cat([before.down, down]), torch.cat([before.up, up], dim=1)
                    owners = before.owners + owners
                paths[place] = _Path(down, up, owners, spans)
    return layers


@torch.no_grad()
def _encode(pipe: Any, region: Region, syntax: Syntax, clip_skip: int | None, steps: int, *, partial: bool) -> Told:
    """The region's prompt as its adapters' text encoders read it, in pictures of so many steps.

    clip_skip: of a pipeline; a Base has its own.
    """
    prompt = region.prompt
    assert prompt is not None
    in_text = [
        Adapter(each.path, with_unet(each.weight, 0.0), f"{each.label} in its region") for each in region.adapters
    ]
    with _added(pipe, in_text, partial=partial) if in_text else nullcontext():
        if syntax == "a1111":
            return [(each.last, each.text.hidden) for each in prompts.encode_stages(pipe, [prompt], "", steps)]
        if syntax == "compel":
            hidden: Tensor = prompts.encode(pipe, [prompt], "", syntax)[0].hidden
        elif hasattr(pipe, "encode_text"):
            hidden = pipe.encode_text([prompt]).hidden
        else:
            encoded = pipe.encode_prompt(
                prompt,
                device=pipe._execution_device,  # an offloaded pipeline's own is none to compute on
                num_images_per_prompt=1,
                do_classifier_free_guidance=False,
                clip_skip=clip_skip,
            )
            hidden = encoded[0]
    return [(steps, hidden.clone())]


@contextmanager
def _added(pipe: Any, adapters: Sequence[Adapter], *, partial: bool) -> Iterator[None]:
    """Within the block the pipeline has these too, beside the mix that it carries."""
    from sfumato.compose.mix import Mix, current

    mix = current(pipe)
    if mix is None:
        with Mix(pipe).add(*adapters, partial=partial):
            yield
        return
    mix.add(*adapters, partial=partial)
    try:
        yield
    finally:
        mix.remove(*(each.label for each in adapters))
