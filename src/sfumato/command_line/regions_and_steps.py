"""Where in the picture and at which steps an adapter counts, as a command line says it. Imports no torch by itself.

    otter=left                  a half of the picture: left, right, top or bottom
    otter=0,0,0.5,1             a box: left, top, right, bottom as shares of the side
    otter=mask.png              a picture that is white where the adapter counts
    otter+line=left:an otter    two adapters there, and what is drawn there
    line=0:0,0.4:1              weights by points PROGRESS:WEIGHT, straight between them
    line=0-0.4                  the adapter's own weight from progress 0 to 0.4, none at other steps

Progress is 0 at pure noise and 1 at the finished picture.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.command_line.specs import without_tags
from sfumato.config import at_home
from sfumato.drawing.placement import RegionSpec
from sfumato.errors import AdapterError, ConfigError
from sfumato.weighting.adapter import Adapter, checked_weight
from sfumato.weighting.span import Span, parse_span

if TYPE_CHECKING:
    from sfumato.compose.regions import Box
    from sfumato.compose.steps import Ramp

HALVES: Mapping[str, Box] = {
    "left": (0.0, 0.0, 0.5, 1.0),
    "right": (0.5, 0.0, 1.0, 1.0),
    "top": (0.0, 0.0, 1.0, 0.5),
    "bottom": (0.0, 0.5, 1.0, 1.0),
}


def parse_region(text: str, adapters: Sequence[Adapter]) -> RegionSpec:
    """The region of LABEL=WHERE or LABEL=WHERE:PROMPT, several labels joined by +. Raises ConfigError, one line."""
    known = {each.label: each for each in adapters}
    for at in re.finditer("=", text):  # a label may have one of its own
        names, rest = text[: at.start()], text[at.end() :]
        labels = [names] if names in known else names.split("+")
        if all(label in known for label in labels):
            if repeated := [label for label in labels if labels.count(label) > 1]:
                raise ConfigError(f"--region {text}: {repeated[0]} is in it twice; its weight says how much it counts.")
            break
    else:
        raise ConfigError(
            f"--region {text}: wanted LABEL=WHERE, with the label of a --lora ({', '.join(known) or 'none are given'})."
        )
    splits = [(rest, None), *((rest[: at.start()], rest[at.end() :]) for at in re.finditer(":", rest))]
    for place, prompt in splits:
        if (where := _where(place, text)) is not None:
            own = None if prompt is None else without_tags(prompt.strip(), f"--region {text}")
            if own == "":
                raise ConfigError(f"--region {text}: no prompt follows the colon; write one, or leave the colon out.")
            return RegionSpec(tuple(known[label] for label in labels), where, own)
    raise ConfigError(
        f"--region {text}: {splits[min(1, len(splits) - 1)][0]!r} is no place; wanted {', '.join(HALVES)}, a box such "
        "as 0,0,0.5,1, or an image that exists; a prompt follows a colon."
    )


def _where(place: str, text: str) -> Box | Path | None:
    if place in HALVES:
        return HALVES[place]
    try:
        numbers = [float(number) for number in place.split(",")]
    except ValueError:
        return Path(at_home(place)) if isfile(at_home(place)) else None  # which a prompt is too long for, perhaps
    if len(numbers) != 4 or not (0 <= numbers[0] < numbers[2] <= 1 and 0 <= numbers[1] < numbers[3] <= 1):
        raise ConfigError(f"--region {text}: a box is left,top,right,bottom as shares of the side, such as 0,0,0.5,1.")
    return (numbers[0], numbers[1], numbers[2], numbers[3])


def parse_steps(text: str, labels: Sequence[str]) -> tuple[str, Ramp | Span]:
    """(label, how its weight goes) of LABEL=PROGRESS:WEIGHT,... or LABEL=START-END. Raises ConfigError, one line."""
    label, equals, rest = text.rpartition("=")
    if not equals or label not in labels:
        known = ", ".join(labels) or "none are given"
        raise ConfigError(f"--over-steps {text}: wanted LABEL=WEIGHTS, with the label of a --lora ({known}).")
    if re.fullmatch(r"[\d.]+-[\d.]+", rest):
        return label, parse_span(rest, f"{label}=")
    from sfumato.compose.steps import Ramp

    try:
        ramp = Ramp.parse(rest)
        for _, weight in ramp.points:
            checked_weight(label, weight)
    except AdapterError as error:
        raise ConfigError(f"--over-steps {text}: {error} Or a span of steps, such as {label}=0-0.5.") from None
    return label, ramp
