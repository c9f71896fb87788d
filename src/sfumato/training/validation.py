"""The pictures that are held out of a training, as they are measured."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from sfumato.data.options import Options
from sfumato.numerals import pluralize, some
from sfumato.training.metrics import VALIDATIONS

if TYPE_CHECKING:
    from sfumato.bases import Base
    from sfumato.data import Dataset, ExampleSet
    from sfumato.runs.processes import Processes
    from sfumato.training.options import TrainerOptions


def prepare_validation(
    config: TrainerOptions, base: Base, examples: ExampleSet, processes: Processes
) -> Dataset | None:
    """The pictures that are held out, each as it is: not mirrored, never cut at random, its caption whole, of
    wildcards with the first alternatives; None where there are none. config: resolved."""
    held_out = examples.in_group("validation")
    if not held_out:
        return None
    plain = Options(flip=False, caption_dropout=0.0, shuffle_tags=False, keep_tags=0, tag_dropout=0.0)
    as_they_are = []
    for each in held_out:
        crop = each.options.crop or config.crop
        crop = "center" if crop == "random" else crop
        options = dataclasses.replace(plain, crop=crop, resolution=each.options.resolution)
        caption, *further = each.said
        as_they_are.append(
            dataclasses.replace(each, repeats=1, options=options, caption=caption, further=tuple(further))
        )
    chosen = dataclasses.replace(held_out, examples=tuple(as_they_are))
    dataset = config.prepare(chosen, base, embed_text=False, measured=VALIDATIONS, processes=processes)
    names = some([each.path.name for each in held_out])
    dataset.notes.append(f"{pluralize(len(dataset), 'image is', 'images are')} held out for validation: {names}")
    return dataset
