"""Pictures drawn while training: a sheet that grows by a row at a time, with the same prompts and seeds in each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import nn

from sfumato.runs.reporting.plot import PROMPT, sample_path, sample_row, steps_drawn
from sfumato.utils.atomic import atomic_path
from sfumato.utils.image_grid import contact_sheet, shrink_for_sheet

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from sfumato.runs.run import Run

Draw = Callable[[Sequence[str], Sequence[int]], list[Image.Image]]

MOST_ROWS = 40
"""Of a sheet, which is drawn anew each time: with more it would take longer each time, and no program would show it."""


class Samples:
    """The sample pictures of one run.

        RUN/samples/000060/0.png    each picture, by step and prompt
        RUN/samples.png             all of them on one sheet, or MOST_ROWS of the steps

    modules: what is set to evaluation while drawing. within: a context to draw in, such as a running mean's `applied`.
    draw: draws pictures for prompts and seeds. Only the main process does. labels: what stands above the sheet's
    columns; unset, the prompts.
    """

    def __init__(
        self,
        run: Run,
        prompts: Sequence[str],
        seed: int,
        draw: Draw,
        modules: Sequence[nn.Module] = (),
        within: Callable[[], AbstractContextManager[object]] = nullcontext,
        labels: Sequence[str] | None = None,
    ):
        self._run, self._modules, self._within, self._seed = run, list(modules), within, seed
        self._draw = draw
        self._folder = run.folder / "samples"
        self.prompts = list(prompts)
        self.labels = self.prompts if labels is None else list(labels)

    @property
    def processes(self) -> int:
        """How many train; the main one draws."""
        return self._run.count

    @property
    def ends(self) -> list[list[Image.Image]]:
        """The pictures from before the first step and of the last time, a column a prompt; of one alone, those."""
        first = next(self._rows([0]), None)
        last = next(self._rows(reversed(steps_drawn(self._folder))), None)
        return [row for _, row in dict([end for end in (first, last) if end]).items()]

    def draw(self, step: int) -> None:
        """Draw the prompts, keep the pictures and write the sheet anew."""
        if not self._run.is_main:
            return
        with self._within(), eval_mode(self._modules):
            pictures = self._draw(self.prompts, [self._seed] * len(self.prompts))
        for number, picture in enumerate(pictures):
            told = PngInfo()
            told.add_itxt(PROMPT, self.prompts[number])
            with atomic_path(sample_path(self._folder, step, number)) as temporary:
                picture.save(temporary, pnginfo=told)
        side, steps = max(max(picture.size) for picture in pictures), thin_steps(steps_drawn(self._folder), MOST_ROWS)
        count = len(steps) * len(pictures)
        rows = [(each, [shrink_for_sheet(picture, side, count) for picture in row]) for each, row in self._rows(steps)]
        times = [f"step {each}" for each, _ in rows]
        sheet = contact_sheet([row for _, row in rows], row_labels=times, column_labels=self.labels)
        with atomic_path(self._run.folder / "samples.png") as temporary:
            sheet.save(temporary)
        self._run.show(step, pictures, self.labels)

    def _rows(self, steps: Iterable[int]) -> Iterator[tuple[int, list[Image.Image]]]:
        """(step, pictures) of the rows that are whole and of these prompts."""
        for step in steps:
            row = sample_row(self._folder, step, self.prompts)
            if row is not None:
                yield step, row


def thin_steps(steps: Sequence[int], most: int) -> list[int]:
    """The first, the last, and every so manieth between, so that there are at most `most` (two or more)."""
    stride = max(1, -(-(len(steps) - 1) // (most - 1)))
    return [*steps[:-1][::stride], *steps[-1:]]


@contextmanager
def eval_mode(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Within the block the modules are in evaluation mode; afterwards in the mode that each had."""
    with ExitStack() as stack:
        for module in modules:
            stack.callback(module.train, module.training)
            module.eval()
        yield
