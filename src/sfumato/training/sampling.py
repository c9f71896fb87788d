"""How sample pictures are drawn: as what is learned will be drawn with, at the size of the training."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import nn

from sfumato.errors import ConfigError
from sfumato.models.calls import timestep_of
from sfumato.runs.reporting.samples import Draw

if TYPE_CHECKING:
    from sfumato.adapters import Attached
    from sfumato.models import Base


def make_sampler(
    base: Base,
    adapter: Attached | None = None,
    strength: float = 0.0,
    span: tuple[float, float] | None = None,
    *,
    negatives: Sequence[str] = (),
    resolution: int | None = None,
    own: Sequence[Mapping[str, Any]] = (),
    usual: Mapping[str, Any] = MappingProxyType({}),
) -> Draw:
    """The base's own drawing. adapter: what is attached to its U-Net, drawn with as it will be: with this adapter
    guidance, and in the span (start, end) of progress; None: in all steps. negatives: each is the negative prompt of
    prompts that hold it and more. resolution: that of the training, whose squares are drawn; None: the base's own. own:
    what each of the prompts that will be drawn says of its picture, of seed, negative, width, height, steps, guidance.
    usual: settings of `draw_each` for prompts that say nothing else. Raises ConfigError for more steps than the base
    or the sampler takes."""
    from sfumato.compose.guidance import unconditional_half
    from sfumato.data.preparation.planning import square_side
    from sfumato.generation import draw
    from sfumato.utils import schedulers

    side = None if resolution is None else square_side(base, resolution)
    if asked := [said["steps"] for said in own if "steps" in said]:
        scheduler = schedulers.make_scheduler(usual.get("sampler", base.defaults.sampler), base.scheduler.config)
        for steps in asked:
            try:
                draw.check_steps(steps, scheduler)
            except ConfigError as error:
                raise ConfigError(f"--s {steps} in a prompt: {error}") from None

    def alike(prompts: Sequence[str], seeds: Sequence[int], said: Mapping[str, Any]) -> list[Image.Image]:
        settings = {"width": side, "height": side, **usual, **said}
        with ExitStack() as stack:
            if adapter is not None and span is not None:
                stack.enter_context(_within_span(span, base, adapter.disabled))
            if adapter is not None and strength and (guidance := settings.get("guidance", base.defaults.guidance)) > 1:
                stack.enter_context(adapter.scaled(strength / guidance))
                stack.enter_context(unconditional_half(base.denoiser, adapter.disabled))
            # As they are, with their tags: perhaps captions, which were learned as text.
            if "negative" in said:
                return list(draw.draw_each(base, prompts, seeds, **settings))
            return draw.draw_against(base, prompts, seeds, negatives, **settings)

    def drawing(prompts: Sequence[str], seeds: Sequence[int]) -> list[Image.Image]:
        together: dict[frozenset[tuple[str, Any]], list[int]] = {}
        for place, said in enumerate(own or [{}] * len(prompts)):
            together.setdefault(frozenset(said.items() - {("seed", said.get("seed"))}), []).append(place)
        noises = [said.get("seed", seed) for said, seed in zip(own, seeds, strict=True)] if own else seeds
        drawn: dict[int, Image.Image] = {}
        with base.lazy_weights.restored_after():
            for settings, places in together.items():
                texts, those = [prompts[place] for place in places], [noises[place] for place in places]
                drawn |= zip(places, alike(texts, those, dict(settings)), strict=True)
        return [drawn[place] for place in range(len(prompts))]

    return drawing


@contextmanager
def _within_span(
    span: tuple[float, float], base: Base, otherwise: Callable[[], AbstractContextManager[object]]
) -> Iterator[None]:
    """Within the block each call of the U-Net at a progress outside of the span is made in `otherwise`."""
    from sfumato.compose.schedules import Ramp, progress_of

    counts, others = Ramp.within(*span, 1.0), ExitStack()

    def begin(module: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        if not counts(progress_of(timestep_of(args, options), base.scheduler)):
            others.enter_context(otherwise())

    with (
        base.denoiser.register_forward_pre_hook(begin, with_kwargs=True),
        base.denoiser.register_forward_hook(lambda *_: others.close(), always_call=True),
    ):
        yield
