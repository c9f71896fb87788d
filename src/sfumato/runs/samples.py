"""Pictures drawn while training: a sheet that grows by a row at a time, with the same prompts and seeds in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import nn

from sfumato.data.captions import fill_template
from sfumato.drawing.sheet import contact_sheet, read_drawn
from sfumato.files.atomic import atomic_path
from sfumato.schedulers import timestep_of
from sfumato.words.placeholders import holds

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sfumato.adapters import Lora
    from sfumato.bases import Base
    from sfumato.runs.run import Run

UNRELATED = ("a ball", "a dog", "a house", "a car", "a tree", "a chair", "a bird", "a cup")
"""Plain things that any base can draw: samples show some, and all are prompts for the drift."""


def unrelated_to(prompts: Sequence[str]) -> list[str]:
    """The plain things without those that one of the prompts is about, as "a dog" is of no use beside the class dog."""
    found = [thing for thing in UNRELATED if not any(holds(thing.split()[-1], prompt) for prompt in prompts)]
    return found or list(UNRELATED)


Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]


class Samples:
    """The sample pictures of one run.

        RUN/samples/000060/0.png    each picture, by step and prompt
        RUN/samples.png             all of them on one sheet

    modules: what is set to evaluation while drawing. within: a context to draw in, such as a running mean's `applied`.
    draw: draws pictures for prompts and seeds, the base's own drawing by default. Only the main process draws.
    """

    def __init__(
        self,
        run: Run,
        base: Base,
        prompts: Sequence[str],
        seed: int,
        modules: Sequence[nn.Module] = (),
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
        draw: Draw | None = None,
    ):
        self._run, self._modules, self._within, self._seed = run, list(modules), within, seed
        self._draw = draw or drawing_of(base)
        self._folder = run.folder / "samples"
        self.prompts = list(prompts)

    @property
    def processes(self) -> int:
        """How many train; the main one draws."""
        return self._run.count

    @property
    def rows(self) -> list[list[Image.Image]]:
        """The pictures so far: a row a point in time, a column a prompt."""
        return list(self._whole().values())

    def draw(self, step: int) -> None:
        """Draw the prompts, keep the pictures and write the sheet anew."""
        if not self._run.is_main:
            return
        with self._within(), evaluating(self._modules):
            pictures = self._draw(self.prompts, [self._seed] * len(self.prompts))
        for number, picture in enumerate(pictures):
            with atomic_path(self._folder / f"{step:06d}" / f"{number}.png") as temporary:
                picture.save(temporary)
        rows = self._whole()
        labels = [f"step {each}" for each in rows]
        sheet = contact_sheet(list(rows.values()), row_labels=labels, column_labels=self.prompts)
        with atomic_path(self._run.folder / "samples.png") as temporary:
            sheet.save(temporary)

    def _whole(self) -> dict[int, list[Image.Image]]:
        """The rows that are whole, by step; a killed process may have left half of one, a disk a broken picture."""
        rows = {}
        for step in sorted(int(path.name) for path in self._folder.glob("[0-9]*") if path.name.isdigit()):
            row = [picture for path in self._paths(step) if (picture := read_drawn(path)) is not None]
            if len(row) == len(self.prompts):
                rows[step] = row
        return rows

    def _paths(self, step: int) -> list[Path]:
        return [self._folder / f"{step:06d}" / f"{number}.png" for number in range(len(self.prompts))]


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


@contextmanager
def evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the modules are in evaluation mode; afterwards in the mode that each had."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.train, module.training)
            module.eval()
        yield


def default_prompts(captions: Sequence[str], template: str | None, trigger: str | None) -> list[str]:
    """Two captions, and two plain things put into the caption template; none twice."""
    form = template or ("{caption}, {trigger}" if trigger else "{caption}")
    unseen = [fill_template(form, thing, trigger) for thing in UNRELATED[:2]]
    return list(dict.fromkeys([*captions[:2], *unseen]))
