"""Adapter guidance: adapters that are active in the prediction for the prompt only, where guidance multiplies them.

    with adapter_guidance(mix, 2, guidance=7.5):
        pipe("a crab", guidance_scale=7.5)

Classifier-free guidance (Ho & Salimans 2022, eq. 6) generates by e(empty) + g (e(prompt) - e(empty)). If an adapter is
in both predictions, a change that is the same in both counts once, and a change that is in only one of them by mistake
counts g times. If it is in the prompt's prediction alone, all its changes count g times: guidance then leads away from
the base model without the adapter, as in autoguidance (Karras et al. 2024, arXiv 2406.02507). So a smaller weight gives
more of a style and fewer of its mistakes. It needs only the two predictions that are made anyway, now one after the
other. A subject that was learned from images in one or two styles is better in both predictions, where guidance leads
away from what they share: their style.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.adapters.weights import check_mix
from sfumato.compose.hooks import NonCopyableHook, calling_pipeline, serialized_calls, unconditional_rows
from sfumato.compose.match import compiled_parts, denoiser_of, denoiser_part, exclusive_row_split
from sfumato.errors import AdapterError
from sfumato.models import calls
from sfumato.precision.fast_unet import fast_forward
from sfumato.utils.limits import MAX_ADAPTER_GUIDANCE

if TYPE_CHECKING:
    from sfumato.compose.mix import Mix


@contextmanager
def adapter_guidance(
    mix: Mix, strength: float | Mapping[str, float] | None = None, *, guidance: float
) -> Iterator[None]:
    """Within the block adapters are active only in the prompt's half of each call of the U-Net, and count `strength`
    times.

    strength: how often an adapter's change counts in the image, for all adapters or by label; the adapter's U-Net
    weight is multiplied by strength / guidance. None: what the files ask for. Adapters at 0, or without a label in it,
    are in both halves as usual; so are all adapters at a guidance of at most 1, where only the prompt's prediction is
    used. guidance: the guidance scale that the images are generated with. Text encoders are adapted as usual. Raises
    AdapterError for a compiled U-Net and for a mix that was undone; and within the block for a call whose rows are not
    two halves, or that uses another guidance scale.
    """
    check_mix(mix, "adapter guidance")
    wanted = strengths_of(mix, strength, guidance=guidance)
    if wrong := [each for each in wanted.values() if each < 0]:
        raise AdapterError(f"adapter guidance {wrong[0]:g}: wanted 0 or more; 2 is usual.")
    pipe = mix.pipe  # which the mix lets go of, if it is undone within the block
    is_compiled = denoiser_part(pipe) in compiled_parts(pipe)
    if not wanted:
        is_asked = not is_compiled and strengths_of(mix, strength, guidance=math.inf)
        with _compared(pipe, guidance) if is_asked else nullcontext():
            yield
        return
    if is_compiled:
        raise AdapterError("the unet is compiled, and cannot have adapters in one half of a call. Use strength 0.")
    factors = {label: each / guidance for label, each in wanted.items()}

    def without(rows: int) -> int:
        return unconditional_rows(calling_pipeline(pipe), rows)

    unet = denoiser_of(pipe)
    with (
        exclusive_row_split(unet),
        mix.conditional_only(factors),
        serialized_calls(pipe),
        _compared(pipe, guidance),
        unconditional_half(unet, mix.without_conditional, without),
    ):
        yield


@contextmanager
def _compared(pipe: Any, guidance: float) -> Iterator[None]:
    """Within the block a call of the pipeline with another guidance scale is an AdapterError."""

    def check(*_: Any) -> None:
        drawn_with = getattr(calling_pipeline(pipe), "guidance_scale", None)
        if not isinstance(drawn_with, int | float) or drawn_with == guidance or max(drawn_with, guidance) <= 1:
            return
        raise AdapterError(
            f"the call draws with guidance {drawn_with:g}, and adapter_guidance was told {guidance:g}. Give both the "
            "same number."
        )

    with denoiser_of(pipe).register_forward_pre_hook(NonCopyableHook(check)):
        yield


def strengths_of(mix: Mix, strength: float | Mapping[str, float] | None, *, guidance: float) -> dict[str, float]:
    """The strength of each adapter, by label, as `adapter_guidance` understands it and as image files state it; without
    zeros.

    Raises AdapterError for what is not a number.
    """
    if not isinstance(guidance, Real) or math.isnan(guidance):
        raise AdapterError(f"guidance {guidance!r:.40}: wanted the number that images are drawn with, such as 7.5.")
    if isinstance(strength, Real):
        strength = dict.fromkeys(mix.weights, float(strength))
    by_label = mix.strengths if strength is None else strength
    numbers = by_label.values() if isinstance(by_label, Mapping) else [by_label]
    if wrong := [each for each in numbers if not isinstance(each, Real) or not abs(each) <= MAX_ADAPTER_GUIDANCE]:
        raise AdapterError(
            f"adapter guidance {wrong[0]!r:.40}: wanted a number of at most {MAX_ADAPTER_GUIDANCE:g}, or numbers by "
            "label, such as 2."
        )
    return {label: each for label, each in by_label.items() if each} if guidance > 1 else {}


@contextmanager
def unconditional_half(
    unet: nn.Module,
    within: Callable[[], AbstractContextManager[object]],
    without: Callable[[int], int] = lambda rows: rows // 2,
) -> Iterator[None]:
    """In the block each call of the U-Net predicts its first half of rows, which have no prompt, in `within`.

    without: from a call's number of rows to how many have no prompt; an AdapterError if they are not half.
    """
    halves = _Halves()

    def forward_by_halves(forward: Callable[..., Any], *args: Any, **options: Any) -> Any:
        sample = calls.sample_of(args, options)
        if 2 * without(len(sample)) != len(sample):
            raise AdapterError(
                f"the call has {len(sample)} rows, which are no two halves; draw with guidance above 1, and no other "
                "guidance beside it."
            )
        first, second = halves.of((args, options), len(sample))
        with within():
            other = forward(*first[0], **first[1])
        output = forward(*second[0], **second[1])
        both = torch.cat([other[0], output[0]])
        return (both,) if isinstance(output, tuple) else type(output)(sample=both)

    with _replaced_forward(unet, forward_by_halves):
        yield


@contextmanager
def _replaced_forward(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Within the block the module computes `function(forward, *args, **options)`; forward is its own.

    Where accelerate moves the weights between devices, the module's `forward` is accelerate's: it loads the weights and
    then calls `_old_forward`, the module's own. So the function takes that place, where the weights are loaded. After
    every image accelerate puts what it found in `_old_forward` back as `forward`, and the function with it. So both
    places are checked at the end.
    """
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = getattr(module, name)
    replacement = NonCopyableHook(partial(function, fast_forward(module, forward)))
    setattr(module, name, replacement)
    try:
        yield
    finally:
        for place in [place for place in ("_old_forward", "forward") if module.__dict__.get(place) is replacement]:
            if place == "forward" and getattr(forward, "__func__", None) is type(module).forward:
                del module.forward
            else:
                setattr(module, place, forward)


class _Halves:
    """Arguments of a call, halved by rows. The same text gives the same halves, so that a layer can recognise it."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Tensor, int, tuple[Tensor, Tensor]]] = {}

    def of(self, value: Any, rows: int) -> tuple[Any, Any]:
        """Both halves; what has no rows is in both."""
        if isinstance(value, Tensor) and value.ndim and len(value) == rows:
            return self._of_tensor(value)
        if isinstance(value, dict):
            pairs = {name: self.of(each, rows) for name, each in value.items()}
            return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}
        if type(value) in (tuple, list):
            each_pair = [self.of(each, rows) for each in value]
            return type(value)(pair[0] for pair in each_pair), type(value)(pair[1] for pair in each_pair)
        return value, value

    def _of_tensor(self, value: Tensor) -> tuple[Tensor, Tensor]:
        if value.ndim != 3 or value.is_inference():  # neither latents nor times come twice; no version tells a change
            return value[: len(value) // 2], value[len(value) // 2 :]
        held, version, halves = self._known.get(id(value), (None, 0, None))
        if held is not value or version != value._version or halves is None:
            halves = value[: len(value) // 2], value[len(value) // 2 :]
            self._known = {id(value): (value, value._version, halves)}
        return halves
