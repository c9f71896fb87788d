"""How sample pictures are drawn: as what is learned will be drawn with, at the size of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import nn

from sfumato.runs.samples import Draw
from sfumato.unet_calls import timestep_of

if TYPE_CHECKING:
    from sfumato.adapters import Lora
    from sfumato.bases import Base


def drawing_of(
    base: Base,
    lora: Lora | None = None,
    strength: float = 0.0,
    span: tuple[float, float] | None = None,
    *,
    negatives: Sequence[str] = (),
    resolution: int | None = None,
) -> Draw:
    """The base's own drawing. lora: what is attached to its U-Net, drawn with as it will be: with this adapter
    guidance, and in the span (start, end) of progress; None: in all steps. negatives: each is the negative prompt of
    prompts that hold it and more. resolution: that of the training, whose squares are drawn; None: the base's own."""
    from sfumato.compose.guided import unconditional_half
    from sfumato.data.preparing import square_side
    from sfumato.drawing.pictures import draw_against

    side = None if resolution is None else square_side(base, resolution)

    def drawing(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        with base.lazy_weights.restored_after(), ExitStack() as stack:
            if lora is not None and span is not None:
                stack.enter_context(_only_within(span, base, lora.disabled))
            if lora is not None and strength and (guidance := base.defaults.guidance) > 1:
                stack.enter_context(lora.scaled(strength / guidance))
                stack.enter_context(unconditional_half(base.unet, lora.disabled))
            # As they are, with their tags: perhaps captions, which were learned as text.
            return draw_against(base, prompts, seeds, negatives, width=side, height=side)

    return drawing


@contextmanager
def _only_within(
    span: tuple[float, float], base: Base, otherwise: Callable[[], AbstractContextManager[object]]
) -> Iterator[None]:
    """Within the block each call of the U-Net at a progress outside of the span is made in `otherwise`."""
    from sfumato.compose.steps import Ramp, progress_of

    counts, others = Ramp.within(*span, 1.0), ExitStack()

    def begin(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not counts(progress_of(timestep_of(args, options), base.scheduler)):
            others.enter_context(otherwise())

    with (
        base.unet.register_forward_pre_hook(begin, with_kwargs=True),
        base.unet.register_forward_hook(lambda *_: others.close(), always_call=True),
    ):
        yield
