"""Adapters of its own for every picture of one batch, the U-Net called once a step.

    with per_picture(pipe, [[Adapter("line.safetensors", 0.8)], [Adapter("otter.safetensors")], []]):
        pipe(["a crab", "an otter", "a boat"])

Beside each layer stands one batched low-rank product, up_b (down_b x_b) for picture b (S-LoRA's and Punica's gathering,
Sheng et al. 2023, Chen et al. 2023), so that the cost is that of one adapter, however many different ones there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from sfumato.adapters.weights import Adapter, check_adapters
from sfumato.compose.hooks import NonCopyableHook, calling_pipeline, rows_per_picture, unet_lock
from sfumato.compose.layers.modules import Placed, with_rows
from sfumato.compose.layers.unfused import is_fresh_output
from sfumato.compose.match import (
    PipelineModules,
    denoiser_of,
    refuse_compiled,
    unwrapped_parts,
    warn_unknown_words,
    weighted_matches,
)
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.kinds import LoraModule, ModuleAdapter
from sfumato.files.kinds.ia3 import extract_command
from sfumato.files.kinds.modules import Call, first_output, with_first
from sfumato.files.module_names import DENOISERS
from sfumato.merging.whole_model import read_adapter_or_model
from sfumato.models import calls
from sfumato.precision import quantization
from sfumato.utils.formatting import pluralize

Index = Callable[[int], Sequence[int]]
"""From the number of rows in a call to the picture of each row."""

TermsByPicture = list[list[tuple[float, LoraModule]]]
"""For each picture the adapters of one layer, each with its weight."""

ModulesByPicture = list[list[tuple[float, ModuleAdapter]]]
"""The same of one module and of adapters that change no weight."""


@contextmanager
def per_picture(pipe: Any, adapters: Sequence[Sequence[Adapter]], *, partial: bool = False) -> Iterator[None]:
    """Within the block picture i of every call has the adapters `adapters[i]`; an empty list is the base's picture.

    pipe: a diffusers pipeline (SD 1.x, 2.x, SDXL) or a Base; called with as many prompts as there are lists, and one
    picture each, which `sfumato.draw` may draw in several batches. Text encoders are adapted by picture, too. Equal to
    single runs but for rounding. What diffusers' `load_lora_weights` loaded counts in all, and a block within another
    adds to it. Raises AdapterError for adapters without a low-rank form, for a compiled part, while another thread is
    within such a block, within a composite's, and within the block for a call with another number of pictures.
    """
    _check_lists(adapters)
    count = len(adapters)
    if not count:
        raise AdapterError("there are no images; give a list of adapters for each, an empty one for the base.")

    rows = _PicturesOfRows(pipe, count)
    # Before `forward`, in which adapter guidance halves the call.
    checked = denoiser_of(pipe).register_forward_pre_hook(NonCopyableHook(rows.check), with_kwargs=True)
    with checked, _hooked(pipe, adapters, rows.index, partial=partial):
        yield


class _PicturesOfRows:
    """Which picture each row of a call is of.

    With 3 pictures and guidance a call of the U-Net has 6 rows, those without prompt first: [0, 1, 2, 0, 1, 2]. Where
    `sfumato.draw` draws the last two in a batch of their own, its calls have 4 rows: [1, 2, 1, 2].
    """

    def __init__(self, pipe: Any, count: int) -> None:
        self._pipe, self._count = pipe, count
        # Of a drawing whose pipeline came here, with the pictures of one of its calls.
        self._outside = calls.CURRENT_IMAGES.get()

    def index(self, rows: int) -> Sequence[int]:
        """The picture of each of a call's rows."""
        # Guidance puts the pictures without prompt in front of those with, and so twice (a perturbed one, three times)
        # the same order; several pictures of a prompt would be another order.
        batch = self._batch()
        here = range(self._count) if batch is None else batch
        if rows % len(here) or (batch is None and rows > 3 * self._count):
            raise _row_count_error(rows, self._count, None)
        return [*here] * (rows // len(here))

    def check(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Raises AdapterError for a call of the U-Net with another number of rows."""
        rows = len(calls.sample_of(args, options))
        each = rows_per_picture(calling_pipeline(self._pipe))
        if each is None:
            self.index(rows)
        elif rows != each * len(self._batch() or range(self._count)):
            raise _row_count_error(rows, self._count, each)

    def _batch(self) -> Sequence[int] | None:
        """The pictures that `sfumato.draw` draws at once at present; None where it does not say."""
        told = calls.CURRENT_IMAGES.get()
        if told is None or told is self._outside:
            return None
        places, count = told
        if count != self._count:
            raise _row_count_error(count, self._count, 1)
        return places


def _check_lists(adapters: Any) -> None:
    """Raises AdapterError for what is no list of lists of adapters."""
    lists = adapters if isinstance(adapters, Sequence) else [adapters]
    for each in lists:
        wrong = [one for one in each if not isinstance(one, Adapter)] if isinstance(each, list | tuple) else [each]
        if wrong or lists is not adapters:
            raise AdapterError(
                f"{(wrong or [adapters])[0]!r:.60} in place of adapters; give a list of Adapter(file, weight) for each "
                "image, such as [[Adapter(file)], []]."
            )


def _row_count_error(rows: int, count: int, each: int | None) -> AdapterError:
    """each: rows of a picture, where that is known."""
    if each is None or rows % each:
        found = f"the call has {rows} rows"
    else:
        found = f"the call draws {pluralize(rows // each, 'image')}"
    return AdapterError(
        f"{found} and the adapters are for {pluralize(count, 'image')}; give each prompt its list, and draw one "
        "image of each in one call."
    )


def texts_by_picture(base: Any) -> bool:
    """Whether any text encoder of a Base has adapters by picture at present."""
    modules = [module for encoder in base.text_encoders for module in encoder.modules()]
    return any(isinstance(hook, _ByPicture) for module in modules for hook in module._forward_hooks.values())


@contextmanager
def composite(pipe: Any, *adapters: Adapter, partial: bool = False) -> Iterator[None]:
    """LoRA-Composite (Zhong et al. 2024, arXiv 2402.16843): each adapter predicts for itself, and the mean is followed.

    One call of the U-Net predicts for all of them. Each adapter is applied at its own weight. Raises AdapterError for
    an adapter that changes the text encoders, which see one prompt for all: give it a weight (0.8, 0).
    """
    if not adapters:
        raise AdapterError("a composite wants at least one adapter.")
    check_adapters(adapters)
    unet, count = denoiser_of(pipe), len(adapters)

    def index(rows: int) -> Sequence[int]:
        return [row % count for row in range(rows)]

    def repeat(value: Any, rows: int) -> Any:
        """Each row for every adapter; so the rows without prompt stay the first half, as others read them. What is one
        for all, such as a timestep, stays so."""
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            return value.repeat_interleave(count, 0)
        if isinstance(value, dict):
            return {name: repeat(each, rows) for name, each in value.items()}
        if type(value) in (tuple, list):  # a ControlNet's, a level each
            return type(value)(repeat(each, rows) for each in value)
        return value

    def before(_: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, Any]:
        rows = len(calls.sample_of(args, options))
        return repeat(args, rows), repeat(options, rows)

    def after(_: nn.Module, __: Any, output: Any) -> Any:
        sample = output[0]
        mean = sample.view(-1, count, *sample.shape[1:]).mean(1)
        return (mean,) if isinstance(output, tuple) else type(output)(sample=mean)

    with (
        _hooked(pipe, [[adapter] for adapter in adapters], index, partial=partial, unet_only=True),
        unet.register_forward_pre_hook(NonCopyableHook(before), with_kwargs=True),
        unet.register_forward_hook(NonCopyableHook(after)),
    ):
        yield


@contextmanager
def _hooked(
    pipe: Any, adapters: Sequence[Sequence[Adapter]], index: Index, *, partial: bool, unet_only: bool = False
) -> Iterator[None]:
    """Everything is read and matched before the first hook is set, and all hooks are gone at the end."""
    layers, beside = _layers(pipe, adapters, partial=partial)
    for part, path in (*layers, *beside):
        if unet_only and part not in DENOISERS:
            raise AdapterError(
                f"an adapter changes {part}.{path}, and one text is encoded for all. Give it a weight (0.8, 0), which "
                "is for the U-Net alone."
            )
    refuse_compiled(pipe, {part for part, _ in (*layers, *beside)})
    gathered = [(module, _BatchedLora(module, terms, index, divides=unet_only)) for module, terms in layers.values()]
    modules = [(module, _Modules(terms, index, divides=unet_only)) for module, terms in beside.values()]
    with ExitStack() as hooks:
        with unet_lock(pipe):
            _check_others(pipe, divides=unet_only)
            for module, hook in gathered:
                hooks.enter_context(module.register_forward_hook(hook))
            for module, beside_it in modules:
                hooks.enter_context(module.register_forward_hook(beside_it, with_kwargs=True))
        yield


def _owner() -> tuple[int, object]:
    """The thread and, within a loop of asyncio, the task that asks."""
    try:
        return get_ident(), asyncio.current_task()
    except RuntimeError:
        return get_ident(), None


def _check_others(pipe: Any, *, divides: bool) -> None:
    """Raises AdapterError where another thread has adapters by picture, which would be added to this one's pictures,
    and where a composite, which divides rows among its adapters, would meet others that count rows otherwise.

    divides: whether it is a composite that is asked about.
    """
    modules = [module for part in unwrapped_parts(pipe).values() for module in part.modules()]
    hooks: list[Any] = [
        hook for module in modules for hook in module._forward_hooks.values() if isinstance(hook, _ByPicture)
    ]
    if any(hook.owner != _owner() for hook in hooks):
        raise AdapterError(
            "another thread or task draws with adapters by image on this U-Net or its text encoders. Let them "
            "wait for one another by a lock around per_picture, or draw all images in one call."
        )
    if any(divides or hook.divides for hook in hooks):
        raise AdapterError(
            "a composite divides each row of a call among its adapters, and others by image do not know whose a row "
            "is then. End the outer block before this one, or give a composite all adapters."
        )


def _layers(
    pipe: Any, adapters: Sequence[Sequence[Adapter]], *, partial: bool
) -> tuple[
    dict[tuple[str, str], tuple[nn.Module, TermsByPicture]], dict[tuple[str, str], tuple[nn.Module, ModulesByPicture]]
]:
    """By (part, path): the layer, and what each picture has there; and the same of kinds that change no weight."""
    modules = PipelineModules(unwrapped_parts(pipe))
    files: dict[str, AdapterFile] = {}
    layers: dict[tuple[str, str], tuple[nn.Module, TermsByPicture]] = {}
    beside: dict[tuple[str, str], tuple[nn.Module, ModulesByPicture]] = {}
    for picture, each in enumerate(adapters):
        for adapter in each:
            key = str(adapter.path)
            if key not in files:
                files[key] = read_adapter_or_model(adapter.path, partial=partial)
                warn_unknown_words(pipe, {adapter: files[key]})
            for number, found in weighted_matches(adapter, files[key], modules, partial=partial):
                place = (found.part, found.path)
                if found.beside is not None:
                    _, modules_there = beside.setdefault(place, (found.module, [[] for _ in adapters]))
                    modules_there[picture].append((number, found.beside))
                    continue
                low = found.live_form
                if low is None:
                    raise AdapterError(
                        f"{adapter.label}: {found.part}.{found.path} is changed by a {found.effect.change.kind}, which "
                        "has no low-rank form. Draw this image by itself, or make it a LoRA: "
                        f"{extract_command(found.effect.change)}."
                    )
                _, terms = layers.setdefault(place, (found.module, [[] for _ in adapters]))
                terms[picture].append((number, low))
    return layers, beside


class _ByPicture:
    """A hook with adapters by picture. owner: the thread that set it. divides: whether it is a composite's."""

    def __init__(self, index: Index, *, divides: bool) -> None:
        self.owner, self.divides = _owner(), divides
        self._index = index


class _Modules(_ByPicture):
    """The hook of one module with adapters that change no weight, each in the rows of its pictures."""

    def __init__(self, terms: ModulesByPicture, index: Index, *, divides: bool) -> None:
        super().__init__(index, divides=divides)
        placed = {id(adapter): Placed(adapter) for each in terms for _, adapter in each}
        self._terms = [[(number, placed[id(adapter)]) for number, adapter in each] for each in terms]

    def __call__(self, module: nn.Module, args: tuple[Any, ...], options: dict[str, Any], answer: Any) -> Any:
        if (output := first_output(answer)) is None:
            return answer
        call = Call(module, args, options, output)
        return with_first(answer, with_rows(call, self._index(len(output)), self._terms))


class _BatchedLora(_ByPicture):
    """The hook of one layer. down: (pictures, rank, in, ...), up: (pictures, out, rank), padded to the largest rank."""

    def __init__(self, module: nn.Module, terms: TermsByPicture, index: Index, *, divides: bool) -> None:
        shape = quantization.module_weight_shape(module)
        assert shape is not None
        rank = max(sum(low.rank for _, low in each) for each in terms)
        super().__init__(index, divides=divides)
        self._down = torch.zeros(len(terms), rank, *shape[1:])
        self._up = torch.zeros(len(terms), shape[0], rank)
        for picture, each in enumerate(terms):
            start = 0
            for number, low in each:
                end = start + low.rank
                self._down[picture, start:end] = low.down.float().reshape(low.rank, *shape[1:])
                self._up[picture, :, start:end] = low.up.float().flatten(1) * (number * low.scale)
                start = end
        self._ready: tuple[Any, tuple[Tensor, Tensor]] | None = None

    def _factors(self, rows: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """down and up of every row, gathered anew where the pictures of the rows are others."""
        index = self._index(rows)
        key = (index, like.dtype, like.device)
        ready = self._ready  # once, as another thread may gather others meanwhile
        if ready is None or ready[0] != key:
            down, up = (factors[index].to(like.device, like.dtype) for factors in (self._down, self._up))
            ready = self._ready = (key, (down, up))
        return ready[1]

    def __reduce__(self) -> Any:
        return NonCopyableHook(self).__reduce__()

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        x = inputs[0]
        device = x.device.type
        if torch.is_autocast_enabled(device):
            x = x.to(torch.get_autocast_dtype(device))
        down, up = self._factors(len(x), x)
        if isinstance(module, nn.Conv2d):
            return output + _grouped_conv(module, x, down, up).to(output.dtype)
        tokens = x.reshape(len(x), -1, x.shape[-1])
        narrow = torch.bmm(tokens, down.transpose(1, 2))
        is_new = output.is_contiguous() and is_fresh_output(module)
        if torch.is_grad_enabled() or output.dtype != narrow.dtype or not is_new:
            return output + torch.bmm(narrow, up.transpose(1, 2)).view(output.shape).to(output.dtype)
        output.view(len(x), -1, output.shape[-1]).baddbmm_(narrow, up.transpose(1, 2))
        return output


def _grouped_conv(layer: nn.Conv2d, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
    """up_b (down_b * x_b) of every picture b, as one grouped convolution."""
    rows, rank = down.shape[:2]
    narrow = conv2d(
        x.reshape(1, -1, *x.shape[2:]),
        down.flatten(0, 1),
        None,
        layer.stride,
        layer.padding,
        layer.dilation,
        groups=rows,
    )
    size = narrow.shape[2:]
    return torch.bmm(up, narrow.view(rows, rank, -1)).view(rows, -1, *size)
