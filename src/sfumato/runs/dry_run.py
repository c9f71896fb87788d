"""A dry run: the first steps of a training in a folder that is removed again, to tell what the whole of it takes.

What is measured is the training itself, with its own pictures, samples, measurements and checkpoints. What its steps
learn from comes on a sheet: the pictures as the U-Net gets them, decoded again, under the captions as they were drawn.
"""

from __future__ import annotations

import dataclasses
import shutil
import tempfile
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import BaseModelError, is_out_of_memory
from sfumato.generation.decoding import to_pil
from sfumato.precision.memory import peak_process_memory
from sfumato.utils.atomic import atomic_path
from sfumato.utils.formatting import format_duration, pluralize
from sfumato.utils.image_grid import Cell, Label, labelled_sheet

if TYPE_CHECKING:
    from sfumato.data import Batch, Dataset
    from sfumato.runs.options import FolderOptions

STEPS = 4
"""That are made. The first, which chooses kernels and takes memory for the others, does not count."""
_MOST_SHOWN = 16
_CAPTION_LINES = 5
_SHADE = 0.85
"""Of white over what a mask leaves out, and of grey over what an inpainting model is not shown."""


class DryRunOver(Exception):
    """The steps of a dry run are made, and all is said. path: its sheet; without one the folder that was asked for."""

    def __init__(self, path: Path):
        super().__init__(str(path))
        self.path = path


@dataclasses.dataclass
class _TimedCallback:
    """What is looked at every so many steps, and at the last. seconds: what that took the last time."""

    every: int
    seconds: float = 0.0

    def seconds_of(self, count: int) -> float:
        """In a run of so many steps."""
        return self.seconds * (1 + -(-count // self.every))


@dataclasses.dataclass(frozen=True)
class _SeenSample:
    """A sample that a step learned from. latents: (1, channels, height/f, width/f). mask, hidden: (1, height/f,
    width/f), what is learned of it and what an inpainting model is not shown, or None. All are on the CPU."""

    data: Dataset
    label: str
    caption: str
    latents: Tensor
    mask: Tensor | None
    hidden: Tensor | None


class DryRun:
    """asked: the config of the run that is tried, whose folder stays as it is. config: the same in a folder beside."""

    def __init__(self, asked: FolderOptions):
        self.asked = asked
        self._wanted = asked.output.absolute()
        folder = tempfile.mkdtemp(prefix=f".{self._wanted.name}-dry-run-", dir=self._wanted.parent)
        unlogged: dict[str, Any] = {"tensorboard": False, "wandb": None, "wandb_name": None}
        self.config = dataclasses.replace(asked, output=Path(folder), **unlogged)
        self._began_s = time.perf_counter()
        self._looks: list[_TimedCallback] = []
        self._seen: list[_SeenSample] = []
        self._samples: tuple[int, int] | None = None  # of a step, and of a pass over the images

    def remove(self) -> None:
        """Remove its folder, with all that was written."""
        shutil.rmtree(self.config.output, ignore_errors=True)

    def timed(self, every: int, look: Callable[[int], None]) -> Callable[[int], None]:
        """The look, of which it is noted what it takes."""
        noted = _TimedCallback(every)
        self._looks.append(noted)

        def timing(step: int) -> None:
            began_s = time.perf_counter()
            look(step)
            noted.seconds = time.perf_counter() - began_s

        return timing

    def listen(self, depends_on: Mapping[str, Any]) -> None:
        """Note the first samples that are taken from the data sets among these."""
        for name, data in depends_on.items():
            if hasattr(data, "listen"):
                data.listen(partial(self._hear, name, data))

    def _hear(self, name: str, data: Dataset, global_batch: int, batch: Batch) -> None:
        if name == "data":
            self._samples = global_batch, data.samples
        for row, index in enumerate(batch.indices[: _MOST_SHOWN - len(self._seen)]):
            label = data.names[index] if name == "data" else f"{name}: {data.names[index]}"
            mask = None if batch.mask is None else batch.mask[row].cpu()
            hidden = None if batch.known is None else batch.known[row, :1].cpu()
            self._seen.append(
                _SeenSample(data, label, batch.captions[row], batch.latents[row : row + 1].cpu(), mask, hidden)
            )

    def first_of(
        self,
        steps: Generator[Any],
        count: int,
        say: Callable[..., None],
        checkpoints: Callable[[], tuple[int, int]],
    ) -> Generator[Any]:
        """The first of the steps, after which DryRunOver is raised.

        count: how many the run that is tried has. say: tells the person lines. checkpoints: gives how many there are at
        once, and the bytes of each.
        """
        prepared_s, began_s, made_s = time.perf_counter() - self._began_s, time.perf_counter(), list[float]()
        saved_s = 0.0
        with closing(steps):
            for step in steps:
                if not made_s:
                    saved_s = max(0.0, time.perf_counter() - began_s - sum(look.seconds for look in self._looks))
                began_s = time.perf_counter()
                yield step
                made_s.append(time.perf_counter() - began_s)
                if len(made_s) == STEPS:
                    break
        say(f"\ndry run  {len(made_s)} of {pluralize(count, 'step')}, of which nothing is kept")
        say(*self._times(count, median(made_s[1:] or made_s), saved_s, prepared_s), *self._passes(count), *_memory())
        most, bytes_each = checkpoints()
        free = shutil.disk_usage(self._wanted.parent).free
        say(f"disk     {pluralize(most, 'checkpoint')} of {_size(bytes_each)} at once; {_size(free)} are free")
        raise DryRunOver(self._shown(say) or self.asked.output)

    def _times(self, count: int, step_s: float, saved_s: float, prepared_s: float) -> list[str]:
        saves = 1 + (count // self.asked.checkpoint_every if self.asked.checkpoint_every else 1)
        parts = {
            "of steps": count * step_s,
            "of samples and measurements": sum(look.seconds_of(count) for look in self._looks),
            "of checkpoints": saves * saved_s,
            "before the first step": prepared_s,
        }
        told = ", ".join(f"{format_duration(seconds)} {what}" for what, seconds in parts.items() if seconds)
        return [f"a step   {format_duration(step_s)}", f"all      about {format_duration(sum(parts.values()))}: {told}"]

    def _passes(self, count: int) -> list[str]:
        if self._samples is None:
            return []
        of_step, of_pass = self._samples
        passes, images = count * of_step / of_pass, pluralize(of_pass, "image")
        return [f"images   {pluralize(count, 'step')} of {of_step} are {passes:,.3g} passes over {images}"]

    def _shown(self, say: Callable[..., None]) -> Path | None:
        """The sheet of what the steps learned from, if there is any and memory holds a picture beside the training."""
        if not self._seen:
            return None
        try:
            cells = [Cell(_decoded(each), _labels(each)) for each in self._seen]
        except (RuntimeError, BaseModelError) as error:
            if isinstance(error, RuntimeError) and not is_out_of_memory(error):
                raise
            reason = "memory does not hold one beside the training" if is_out_of_memory(error) else str(error)
            say(f"seen     no sheet of the images: {reason}")
            return None
        path = self.asked.output.parent / f"{self._wanted.name}.dry-run.png"
        with atomic_path(path) as temporary:
            labelled_sheet(cells).save(temporary)
        say(f"seen     {path}: what these steps learned from")
        return path


def _decoded(seen: _SeenSample) -> Image.Image:
    """The picture, white over what its mask leaves out and grey over what is hidden, in part each."""
    pixels = seen.data.decode(seen.latents)[0].cpu()
    over = [(1.0, None if seen.mask is None else 1 - seen.mask), (0.0, seen.hidden)]
    for shade, part in over:
        if part is not None:
            large = torch.nn.functional.interpolate(part[None], pixels.shape[1:])[0]
            pixels = pixels + large * _SHADE * (shade - pixels)
    return to_pil(pixels)


def _labels(seen: _SeenSample) -> list[Label]:
    return [Label(seen.label), Label(seen.caption or "(no caption)", lines=_CAPTION_LINES)]


def _memory() -> list[str]:
    """What was taken so far, of the GPU and of main memory."""
    cuda: Any = torch.cuda  # whose functions have no types
    found = []
    if cuda.is_initialized():
        found.append(f"{_size(cuda.max_memory_reserved())} of the GPU's {_size(cuda.mem_get_info()[1])}")
    if peak := peak_process_memory():
        found.append(f"{_size(peak)} of main memory")
    return [f"memory   {' and '.join(found)} at the peak"] if found else []


def _size(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
