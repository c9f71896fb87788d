"""Which pipeline is calling a U-Net that several share, as diffusers' `from_pipe` makes them of one. Its rows and turn.

How a picture is drawn, with which guidance, scheduler and `clip_skip`, is the calling pipeline's to say, and the U-Net
is not told. `sfumato.draw` calls another than it was handed, too, where it begins from a picture.

Hooks of a module that no copy of it takes along: there they would go on acting on the first.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from threading import RLock
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from sfumato.compose.match import compiled_parts, denoiser_of, denoiser_part
from sfumato.errors import AdapterError


class NonCopyableHook:
    """A function on a module, or in its place, for as long as a block lasts; copying or pickling the module raises
    AdapterError meanwhile."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._function(*args, **options)

    def __reduce__(self) -> Any:
        raise AdapterError(
            "a copy of a pipeline made within adapter_guidance, over_steps, per_picture, composite or regions would go "
            "on acting on the first; copy it before the block, or after."
        )


_LOCKS: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()
_CHANGING: WeakKeyDictionary[nn.Module, RLock] = WeakKeyDictionary()


def calling_pipeline(pipe: Any) -> Any:
    """The pipeline whose call of this one's U-Net is under way; `pipe` itself where a loop of one's own calls it."""
    unet, part = denoiser_of(pipe), denoiser_part(pipe)
    # No hook of a module tells who calls it, and a pipeline announces its calls to nobody.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            theirs = getattr(owner, part, None)
            if callable(owner) and hasattr(owner, "scheduler") and getattr(theirs, "_orig_mod", theirs) is unet:
                return owner
        frame = frame.f_back
    return pipe


def unet_lock(pipe: Any) -> RLock:
    """What one thread at a time holds while it draws with this U-Net, whichever pipeline it has it by."""
    return _LOCKS.setdefault(denoiser_of(pipe), RLock())


def change_lock(pipe: Any) -> RLock:
    """What one thread at a time holds while it changes what is mixed into this U-Net. Not that of its calls, which a
    thread that was ended within one never lets go of."""
    return _CHANGING.setdefault(denoiser_of(pipe), RLock())


@contextmanager
def serialized_calls(pipe: Any) -> Iterator[None]:
    """Within the block, where weights change from call to call, threads that call the U-Net wait for one another."""
    unet, lock = denoiser_of(pipe), unet_lock(pipe)
    begin, end = (
        uncompiled_hook(pipe, hook) for hook in (lambda *_: lock.acquire() and None, lambda *_: lock.release())
    )
    handles = [
        unet.register_forward_pre_hook(
            NonCopyableHook(begin), prepend=True
        ),  # before another refuses the call, which ends it, too
        unet.register_forward_hook(NonCopyableHook(end), always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        with suppress(RuntimeError):  # an interruption ends a call without its hooks
            while True:
                lock.release()


def uncompiled_hook(pipe: Any, hook: Callable[..., Any]) -> Callable[..., Any]:
    """A hook for the pipeline's U-Net; of a compiled one torch would compile it with all that it calls, for minutes."""
    if denoiser_part(pipe) not in compiled_parts(pipe):
        return hook
    disabled: Callable[..., Any] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
    return disabled


_OTHER_ROWS = ("SemanticStableDiffusionPipeline", "StableDiffusionSAGPipeline", "LEditsPPPipelineStableDiffusion")
"""Pipelines, and those made of them, whose calls have further rows or other latents beside those of guidance."""


def _check_rows(pipe: Any) -> None:
    names = [kind.__name__ for kind in type(pipe).__mro__]
    if any(name.startswith(_OTHER_ROWS) for name in names):
        raise AdapterError(
            f"{names[0]} calls the U-Net with rows that adapter guidance, regions and adapters by image do not "
            "follow. Draw with another pipeline, or without these."
        )


def rows_per_picture(pipe: Any) -> int | None:
    """How many rows a call of the U-Net has for each picture; None where the pipeline does not say how it draws.

    Raises AdapterError for a pipeline whose rows are no multiple of these.
    """
    _check_rows(pipe)
    guided = getattr(pipe, "do_classifier_free_guidance", None)
    if guided is None:
        return None
    return 1 + bool(guided) + _is_by_picture(pipe) + bool(getattr(pipe, "do_perturbed_attention_guidance", False))


def unconditional_rows(pipe: Any, rows: int, *, guided: bool = True) -> int:
    """How many of a call's rows, its first, are without the prompt, for classifier-free guidance.

    guided: whether there is such guidance where the pipeline does not say. Raises AdapterError for a pipeline that has
    them in another order.
    """
    if _is_by_picture(pipe):
        raise AdapterError(
            f"{type(pipe).__name__} guides by an image, too, and has the rows without the prompt last, which adapter "
            "guidance and regions do not follow. Draw with another pipeline, or without these."
        )
    each = rows_per_picture(pipe)
    if each is None:
        return rows // 2 if guided else 0
    return rows // each if pipe.do_classifier_free_guidance else 0


def _is_by_picture(pipe: Any) -> bool:
    """Whether it draws as InstructPix2Pix, by two guidances."""
    return bool(getattr(pipe, "do_classifier_free_guidance", False)) and hasattr(pipe, "image_guidance_scale")
