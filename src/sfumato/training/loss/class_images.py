"""Pictures of a class, drawn once by the base and kept under a name that knows all they depend on.

    FOLDER/KEY/00000.png ...    each from the seed that is its number
    FOLDER/KEY/about.json       what KEY is a hash of: base, prompt, sampler, steps, guidance, size

Every picture is a function of KEY and its number, so a larger count draws the missing ones only, a smaller one takes
the first, and a drawing that was interrupted goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.errors import DataError
from sfumato.generation.draw import draw_each, drawn_at_once
from sfumato.precision.quantization import dtype_name
from sfumato.runs.progress import progress_bar
from sfumato.utils import schedulers
from sfumato.utils.atomic import atomic_path, write_text
from sfumato.utils.image_grid import read_image_or_none

if TYPE_CHECKING:
    from sfumato.data import ExampleSet
    from sfumato.models import Base
    from sfumato.runs.processes import Processes

_KEPT_AT_ONCE = 8
"""Pictures that are drawn, and so may be lost, together: a base of small ones draws hundreds at once."""
FORMAT = 2
"""To be raised when the same key would give other pictures."""


def class_folder(base: Base, prompt: str, *, resolution: int, folder: Path) -> Path:
    """Where the pictures of `prompt` lie, or will lie."""
    return folder / _key(class_image_key(base, prompt, resolution))


def class_image_key(base: Base, prompt: str, resolution: int) -> dict[str, Any]:
    """All that a class picture depends on, besides its number."""
    return {
        "format": FORMAT,
        "base": base.name,
        "fingerprint": base.fingerprint(),
        "prompt": prompt,
        "sampler": base.defaults.sampler,
        "schedule": _schedule(base),
        "steps": base.defaults.sampling_steps,
        "guidance": base.defaults.guidance,
        "size_px": resolution,
        "clip_skip": base.clip_skip,
        "prediction_type": base.prediction_type,
        "compute": dtype_name(base.precision.compute),
        **({"max_tokens": base.max_tokens} if base.max_tokens else {}),  # unset, the pictures of before serve
    }


def _schedule(base: Base) -> dict[str, Any]:
    """All that the sampler goes by: betas, spacing and the like, of which some are the base's."""
    config = schedulers.make_scheduler(base.defaults.sampler, base.scheduler.config).config
    return {key: value for key, value in sorted(config.items()) if not key.startswith("_")}


def pictures_of_class(
    base: Base,
    counts: Mapping[str, int],
    *,
    resolution: int,
    folder: Path,
    processes: Processes,
    what: str = "the class",
    option: str = "--class-cache",
) -> tuple[ExampleSet, int]:
    """As many pictures of each prompt as `counts` says, with it as their caption, and how many had to be drawn.

    All processes draw, each its share. what: is drawn, as the person is told. option: names the folder.
    """
    where: dict[str, Any] = {"resolution": resolution, "folder": folder, "what": what, "option": option}
    drawn = draw_class(base, counts, rank=processes.rank, processes=processes.count, shown=processes.is_main, **where)
    processes.wait()
    return read_class(base, counts, resolution=resolution, folder=folder, what=what), drawn


def draw_class(
    base: Base,
    counts: Mapping[str, int],
    *,
    resolution: int,
    folder: Path,
    rank: int = 0,
    processes: int = 1,
    shown: bool = True,
    what: str = "the class",
    option: str = "--class-cache",
) -> int:
    """Draw what is missing of so many pictures of each prompt; returns how many were drawn.

    rank, processes: this process draws only its share. shown: with progress on stderr. what, option: as of
    `pictures_of_class`.
    Raises DataError where the folder cannot be written.
    """
    wanted: list[tuple[str, Path, int]] = []
    for prompt, count in counts.items():
        place = class_folder(base, prompt, resolution=resolution, folder=folder)
        wanted += [(prompt, _file(place, number), number) for number in range(count)]
    # Shared before looking what is there, which the other processes are changing.
    missing = [entry for entry in wanted[rank::processes] if not _is_whole(entry[1], resolution)]
    if not missing:
        return 0
    pictures = draw_each(
        base,
        [prompt for prompt, _, _ in missing],
        [number for _, _, number in missing],
        width=resolution,
        height=resolution,
        batch=min(_KEPT_AT_ONCE, drawn_at_once((resolution // base.vae_factor) ** 2)),
    )
    try:
        seen = progress_bar(missing, f"drawing {what}", unit="image", shown=shown)
        for (prompt, path, _), picture in zip(seen, pictures, strict=True):
            with atomic_path(path) as temporary:
                picture.save(temporary)
            note = path.parent / "about.json"
            if not note.exists():
                write_text(note, json.dumps(class_image_key(base, prompt, resolution), indent=1) + "\n")
    except OSError as error:
        raise DataError(
            f"{folder}: images of {what} cannot be written ({error.strerror}); give another folder with {option}."
        ) from None
    return len(missing)


def read_class(
    base: Base, counts: Mapping[str, int], *, resolution: int, folder: Path, what: str = "the class"
) -> ExampleSet:
    """The drawn pictures as examples, each with its prompt as caption. Raises DataError if one is missing."""
    from sfumato.data import Example, ExampleSet

    examples = []
    for prompt, count in counts.items():
        place = class_folder(base, prompt, resolution=resolution, folder=folder)
        examples += [Example(_file(place, number), prompt, group="class") for number in range(count)]
    absent = [example.path for example in examples if not example.path.is_file()]
    if absent:
        raise DataError(
            f"{absent[0]}: {len(absent)} of {len(examples)} images of {what} are missing; start again to draw them."
        )
    return ExampleSet(tuple(examples))


def _key(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _file(folder: Path, number: int) -> Path:
    return folder / f"{number:05d}.png"


def _is_whole(path: Path, resolution: int) -> bool:
    picture = read_image_or_none(path)
    return picture is not None and picture.size == (resolution, resolution)
