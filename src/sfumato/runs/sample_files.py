"""The sample images in a run's folder. Imports no torch.

RUN/samples/000060/0.png    each by step and number
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from sfumato.drawing.sheet import read_drawn

PROMPT = "sfumato.prompt"
"""The text in an image's file that is its prompt: a run that goes on by --force may have others."""


def steps_drawn(samples: Path) -> list[int]:
    """The steps that have a folder of samples, in order."""
    return sorted(int(path.name) for path in samples.glob("[0-9]*") if path.name.isdigit())


def path_of(samples: Path, step: int, number: int) -> Path:
    return samples / f"{step:06d}" / f"{number}.png"


def row_of(samples: Path, step: int, prompts: Sequence[str]) -> list[Image.Image] | None:
    """The images of a step. None where one is missing or is of another prompt: a killed process may have left half of
    a row, a disk a broken image."""
    row = [picture for number in range(len(prompts)) if (picture := read_drawn(path_of(samples, step, number)))]
    told = [picture.info.get(PROMPT, prompt) for picture, prompt in zip(row, prompts, strict=False)]
    return row if told == list(prompts) else None


def last_samples(samples: Path) -> tuple[int, dict[tuple[str, int], Image.Image]]:
    """The last step with samples, and its images by prompt, and by how often the prompt has come before; step 0 and
    none where there are none."""
    for step in reversed(steps_drawn(samples)):
        found: dict[tuple[str, int], Image.Image] = {}
        paths = sorted((samples / f"{step:06d}").glob("[0-9]*.png"), key=lambda path: (len(path.name), path.name))
        for picture in filter(None, map(read_drawn, paths)):
            prompt = str(picture.info.get(PROMPT, ""))
            found[prompt, sum(each == prompt for each, _ in found)] = picture
        if found:
            return step, found
    return 0, {}
