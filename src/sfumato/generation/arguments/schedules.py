"""Where in the picture and at which steps an adapter counts, as a command line says it. Imports no torch by itself.

    otter=left                  a half of the picture: left, right, top or bottom
    otter=0,0,0.5,1             a box: left, top, right, bottom as shares of the side
    otter=mask.png              a picture that is white where the adapter counts
    otter+line=left:an otter    two adapters there, and what is drawn there
    line=0:0,0.4:1              weights by points PROGRESS:WEIGHT, straight between them
    line=0-0.4                  the adapter's own weight from progress 0 to 0.4, none at other steps

Progress is 0 at pure noise and 1 at the finished picture.

What a call of `sfumato generate` asks for, checked before anything heavy is loaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import compress
from os.path import isfile
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.adapters.weights import Adapter, Span, Weight, checked_weight, is_zero_weight, parse_span
from sfumato.config import expand_home
from sfumato.errors import AdapterError, ConfigError
from sfumato.generation.arguments.adapters import refuse_prompt_tags
from sfumato.generation.image_options import Hires, PictureRequest
from sfumato.generation.placement import AdapterPlacement, RegionSpec

if TYPE_CHECKING:
    from sfumato.compose.regions import Box
    from sfumato.compose.schedules import Ramp


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
            own = None if prompt is None else refuse_prompt_tags(prompt.strip(), f"--region {text}")
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
        return (
            Path(expand_home(place)) if isfile(expand_home(place)) else None
        )  # which a prompt is too long for, perhaps
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
    from sfumato.compose.schedules import Ramp

    try:
        ramp = Ramp.parse(rest)
        for _, weight in ramp.points:
            checked_weight(label, weight)
    except AdapterError as error:
        raise ConfigError(f"--over-steps {text}: {error} Or a span of steps, such as {label}=0-0.5.") from None
    return label, ramp


@dataclass(frozen=True)
class Plan:
    """The images to generate, what they are generated with, and where they are saved.

    negative: negative prompt of every image that has none of its own. strengths: the adapter guidance that was asked
    for, by label. embeddings: (token, file) of each new word. size: (width, height) in pixels, or unset. hires: the
    second pass, or none. files: one for
    each image, or the one of the sheet. sweep: (label, weights). placement: weights by step, and regions; the adapters
    of regions are not in `adapters`.
    """

    pictures: tuple[PictureRequest, ...]
    negative: str
    adapters: tuple[Adapter, ...]
    strengths: Mapping[str, float]
    embeddings: tuple[tuple[str | None, Path], ...]
    size: tuple[int, int] | None
    hires: Hires | None
    files: tuple[Path, ...]
    sweep: tuple[str, tuple[float, ...]] | None
    placement: AdapterPlacement

    @property
    def texts(self) -> list[str]:
        """All prompts: of images and regions, and the negative prompts."""
        of_regions = [region.prompt for region in self.placement.regions if region.prompt is not None]
        negatives = [each.overrides["negative"] for each in self.pictures if "negative" in each.overrides]
        return [*(each.prompt for each in self.pictures), *of_regions, self.negative, *negatives]

    @property
    def counted(self) -> set[str]:
        """The labels of the adapters that have a weight other than 0 anywhere in what is generated."""
        return {label for picture in self.pictures for label in self.counted_in(picture)}

    @property
    def counted_in_all(self) -> set[str]:
        """The labels of the adapters that have a weight other than 0 in every image."""
        return set.intersection(*(self.counted_in(picture) for picture in self.pictures))

    def counted_in(self, picture: PictureRequest) -> set[str]:
        """The labels of the adapters that have a weight other than 0 in this image, at any step, in any region, in any
        row of a sweep."""
        weights = self.weights_of(picture)
        found = {label for label, weight in weights.items() if not is_zero_weight(weight)}
        given = {
            label: [weight for _, weight in way.points]
            for label, way in self.placement.by_step.items()
            if not isinstance(way, Span) and (label in found or label not in self.placement.tagged)
        }
        given |= {} if self.sweep is None else {self.sweep[0]: list(self.sweep[1])}
        found = (found - given.keys()) | {label for label, weights in given.items() if any(weights)}
        return found | {each.label for each in self.placement.regional if not is_zero_weight(each.weight)}

    def weights_of(self, picture: PictureRequest) -> Mapping[str, Weight]:
        """The adapters' weights in an image, by label, before steps, sweeps and regions change them."""
        return (
            {each.label: each.weight for each in self.adapters} if picture.tag_weights is None else picture.tag_weights
        )


def without_existing(plan: Plan) -> Plan:
    """The plan without the images whose files exist; a sheet's are all there or all wanted."""
    wanted = [not file.exists() for file in plan.files]
    of_pictures = wanted if len(wanted) == len(plan.pictures) else wanted * len(plan.pictures)
    pictures, files = compress(plan.pictures, of_pictures), compress(plan.files, wanted)
    return replace(plan, pictures=tuple(pictures), files=tuple(files))
