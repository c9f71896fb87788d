"""All pictures of one call: one after another, or as a sheet of weights, or of pairs without and with the adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from PIL.Image import Image

from sfumato.adapters.weights import Adapter, Weight, format_weight, is_zero_weight, scale_unet_weight
from sfumato.compose import Mix
from sfumato.compose.guidance import adapter_guidance
from sfumato.generation.draw import Hires, Start, draw_each
from sfumato.generation.image_options import PictureRequest
from sfumato.generation.placement import AdapterPlacement, placement_applied
from sfumato.generation.settings import adapters_in_use
from sfumato.models import Base
from sfumato.utils.image_grid import contact_sheet, sheet_size, shrink_for_sheet

Drawn = tuple[Image, tuple[Adapter, ...], dict[str, Any]]
"""A picture or sheet, the adapters in it with their weights, and its settings."""


@dataclass(frozen=True)
class DrawingSession:
    """What the pictures of one call are drawn from and with.

    settings: what all pictures share, defaults filled in. start: a picture to begin from. hires: the second pass, if
    there is one. allowed: partial and verify, as of `compose`, for the adapters of regions.
    """

    base: Base
    mix: Mix
    pictures: Sequence[PictureRequest]
    settings: Mapping[str, Any]
    start: Start | None
    hires: Hires | None
    placement: AdapterPlacement
    allowed: Mapping[str, bool]

    def draw(self, pictures: Sequence[PictureRequest], *, plain: bool = False) -> Iterator[Image]:
        """The pictures with the mix as it is; neighbours of one setting in one batch. plain: without regions and
        weights by step."""
        for _, run in groupby(pictures, key=lambda each: each.overrides):
            yield from self._draw_alike(list(run), plain=plain)

    def _draw_alike(self, pictures: Sequence[PictureRequest], *, plain: bool) -> Iterator[Image]:
        """The pictures, of one setting."""
        settings = {**self.settings, **pictures[0].overrides}
        names = ("negative", "steps", "guidance", "width", "height", "sampler")
        chosen = {name: settings[name] for name in names}
        prompts, seeds = [each.prompt for each in pictures], [each.seed for each in pictures]
        asked = AdapterPlacement() if plain else self.placement
        guidance = settings["guidance"]
        with (
            adapter_guidance(self.mix, settings["adapter_guidance"], guidance=guidance),
            placement_applied(self.base, self.mix, asked, syntax=settings["prompt_syntax"], **self.allowed),
        ):
            chosen |= {"start": self.start, "hires": self.hires, "syntax": settings["prompt_syntax"]}
            yield from draw_each(self.base, prompts, seeds, **chosen)

    def with_adapters(self) -> Iterator[Drawn]:
        """Each picture, with the weights that its prompt's tags give it; neighbours of one setting in one batch."""
        for (weights, _), run in groupby(self.pictures, key=lambda each: (each.tag_weights, each.overrides)):
            if weights:
                self.mix.set_weights(weights)
            elif any(each.tag_weights for each in self.pictures):
                self.mix.set_weights({each.label: each.weight for each in self.mix.adapters.values()})
            used, same = adapters_in_use(self.mix), list(run)
            for picture, each in zip(self.draw(same), same, strict=True):
                told = self._with_hires({**self.settings, **each.overrides, "prompt": each.prompt, "seed": each.seed})
                yield picture, used, self._without_other_tags(told, used)

    def _with_hires(self, told: dict[str, Any]) -> dict[str, Any]:
        """A picture's settings with what the second pass had."""
        return told if self.hires is None else {**told, "hires": self.hires.told(told["steps"])}

    def _without_other_tags(self, told: dict[str, Any], used: Sequence[Adapter]) -> dict[str, Any]:
        """A picture's settings without the weights by step of adapters that other prompts' tags alone name."""
        absent = {each.label for each in used if each.label in self.placement.tagged and is_zero_weight(each.weight)}
        ways = told.get("over_steps", {})
        if absent.isdisjoint(ways):
            return told
        return {**told, "over_steps": {label: way for label, way in ways.items() if label not in absent}}

    def labels(self) -> list[str]:
        """What stands beside each picture on a sheet: the prompt, and the seed where there are several."""
        several = len({each.seed for each in self.pictures}) > 1
        return [f"{each.prompt} ({each.seed})" if several else each.prompt for each in self.pictures]

    def sheet_settings(self, **more: Any) -> dict[str, Any]:
        """The settings of a sheet of all pictures, where they differ those of the first."""
        prompts, seeds = [each.prompt for each in self.pictures], [each.seed for each in self.pictures]
        first = {**self.settings, **self.pictures[0].overrides}
        first = self._with_hires({**first, "prompt": prompts[0], "seed": seeds[0]})
        return {**first, **more, "prompts": prompts, "seeds": seeds}

    def sizes(self, sweep: tuple[str, Sequence[float]] | None, *, before_after: bool) -> list[tuple[int, int]]:
        """The pixels of each picture that will be drawn, or of the sheet: of a sweep, or before and after."""
        each = [{**self.settings, **picture.overrides} for picture in self.pictures]
        sizes = [(settings["width"], settings["height"]) for settings in each]
        sizes = sizes if self.hires is None else [self.hires.size(*size) for size in sizes]
        if sweep is None and not before_after:
            return sizes
        rows, columns = self._pair_labels() if sweep is None else self._sweep_labels(*sweep)
        return [sheet_size(sizes[0], row_labels=rows, column_labels=columns)]

    def _sweep_labels(self, label: str, weights: Sequence[float]) -> tuple[list[str], list[str]]:
        """Of the rows and columns."""
        return [f"{label} {weight:g}" for weight in weights], self.labels()

    def _pair_labels(self) -> tuple[list[str], list[str]]:
        """Of the rows and columns; the adapters as the mix has them now."""
        everywhere = [each for each in adapters_in_use(self.mix) if not is_zero_weight(each.weight)]
        shown = dict.fromkeys([*everywhere, *self.placement.regional])
        of_all = ", ".join(f"{each.label} {format_weight(each.weight)}" for each in shown)
        rows = [
            f"{label}\n{_tags(each.tag_weights)}".strip()
            for label, each in zip(self.labels(), self.pictures, strict=True)
        ]
        return rows, ["without", f"with {of_all}".strip()]

    def sweep(self, label: str, weights: Sequence[float]) -> Drawn:
        """A row for each weight: the base stays loaded, and each weight recomputes only what that adapter changes.

        The adapters are told as in the first row in which the one that is swept counts.
        """
        drawn, before, count = [], self.mix.weights[label], len(weights) * len(self.pictures)
        side = max(max(size) for size in self.sizes(None, before_after=False))
        for weight in weights:
            self.mix.set_weights({label: scale_unet_weight(label, before, weight)})
            drawn.append([shrink_for_sheet(each, side, count) for each in self.draw(self.pictures)])
            print(f"{label} {weight:g}", file=sys.stderr)
        rows, columns = self._sweep_labels(label, weights)
        sheet = contact_sheet(drawn, row_labels=rows, column_labels=columns)
        self.mix.set_weights({label: scale_unet_weight(label, before, next(filter(None, weights), 0.0))})
        return sheet, adapters_in_use(self.mix), self.sheet_settings(sweep={label: list(weights)})

    def before_after(self) -> Drawn:
        """A row for each picture: drawn without the adapters and with them, from the same noise.

        The adapters are told as the first picture has them, whose prompt the sheet tells.
        """
        rows, columns = self._pair_labels()
        self.mix.mute()
        before = list(self.draw(self.pictures, plain=True))
        self.mix.unmute()
        after, used, _ = zip(*self.with_adapters(), strict=True)
        sheet = contact_sheet(list(zip(before, after, strict=True)), row_labels=rows, column_labels=columns)
        return sheet, used[0], self.sheet_settings(before_after=True)


def _tags(weights: Mapping[str, Weight] | None) -> str:
    used = {label: own for label, own in (weights or {}).items() if not is_zero_weight(own)}
    return ", ".join(f"{label} {format_weight(own)}" for label, own in used.items())
