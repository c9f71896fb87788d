"""What a call of `sfumato generate` asks for, checked before anything heavy is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path

from sfumato.drawing.hires import Hires
from sfumato.drawing.placement import AdapterPlacement
from sfumato.drawing.request import PictureRequest
from sfumato.weighting.adapter import Adapter, Weight, is_idle
from sfumato.weighting.span import Span


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
        found = {label for label, weight in weights.items() if not is_idle(weight)}
        given = {
            label: [weight for _, weight in way.points]
            for label, way in self.placement.by_step.items()
            if not isinstance(way, Span) and (label in found or label not in self.placement.tagged)
        }
        given |= {} if self.sweep is None else {self.sweep[0]: list(self.sweep[1])}
        found = (found - given.keys()) | {label for label, weights in given.items() if any(weights)}
        return found | {each.label for each in self.placement.regional if not is_idle(each.weight)}

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
