"""All pictures of one call: one after another, or as a sheet of weights, or of pairs without and with the adapters."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from PIL.Image import Image

from sfumato.bases import Base
from sfumato.compose import Mix
from sfumato.compose.adapter import Adapter, Weight, swept, weight_text
from sfumato.compose.guided import adapter_guidance
from sfumato.drawing import Start, draw_each
from sfumato.drawn import used_in
from sfumato.sheet import contact_sheet
from sfumato.where_when import WhereWhen, applied

Sheet = tuple[Image, tuple[Adapter, ...], dict[str, Any]]
"""A sheet, the adapters in it with their weights, and its settings."""


_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Desk:
    """What the pictures of one call are drawn from and with.

    pictures: (prompt, seed) of each. tagged: the adapters' weights by label for each picture whose prompt has tags,
    else None. settings: what all pictures share, defaults filled in. own: what each picture has otherwise. start: a
    picture to begin from. allowed: partial and verify, as of `compose`, for the adapters of regions.
    """

    base: Base
    mix: Mix
    pictures: Sequence[tuple[str, int]]
    tagged: Sequence[dict[str, Weight] | None]
    settings: Mapping[str, Any]
    own: Sequence[Mapping[str, Any]]
    start: Start | None
    where_when: WhereWhen
    allowed: Mapping[str, bool]

    def draw(
        self, pictures: Sequence[tuple[str, int]], own: Mapping[str, Any] = _NOTHING, *, plain: bool = False
    ) -> Iterator[Image]:
        """The pictures with the mix as it is. own: settings besides. plain: without regions and weights by step."""
        settings = {**self.settings, **own}
        names = ("negative", "steps", "guidance", "width", "height", "sampler")
        chosen = {name: settings[name] for name in names}
        prompts, seeds = [prompt for prompt, _ in pictures], [seed for _, seed in pictures]
        asked = WhereWhen() if plain else self.where_when
        guidance = settings["guidance"]
        with (
            adapter_guidance(self.mix, settings["adapter_guidance"], guidance=guidance),
            applied(
                self.base,
                self.mix,
                asked,
                guided=guidance > 1,  # as diffusers decides it
                syntax=settings["prompt_syntax"],
                **self.allowed,
            ),
        ):
            yield from draw_each(
                self.base, prompts, seeds, start=self.start, syntax=settings["prompt_syntax"], **chosen
            )

    def with_adapters(self) -> Iterator[tuple[Image, tuple[Adapter, ...]]]:
        """Each picture, and the adapters of the mix as they were for it; the weights that a prompt's tags give it."""
        for same in _runs_of_equal(list(zip(self.tagged, self.own, strict=True))):
            if weights := self.tagged[same.start]:
                self.mix.set_weights(weights)
            elif any(self.tagged):
                self.mix.set_weights({each.label: each.weight for each in self.mix.adapters.values()})
            used = used_in(self.mix)
            for picture in self.draw(self.pictures[same.start : same.stop], self.own[same.start]):
                yield picture, used

    def labels(self) -> list[str]:
        """What stands beside each picture on a sheet: the prompt, and the seed where there are several."""
        several = len({seed for _, seed in self.pictures}) > 1
        return [f"{prompt} ({seed})" if several else prompt for prompt, seed in self.pictures]

    def sheet_settings(self, **more: Any) -> dict[str, Any]:
        """The settings of a sheet of all pictures."""
        prompts, seeds = [prompt for prompt, _ in self.pictures], [seed for _, seed in self.pictures]
        return {**self.settings, "prompt": prompts[0], "seed": seeds[0], **more, "prompts": prompts, "seeds": seeds}

    def sweep(self, label: str, weights: Sequence[float]) -> Sheet:
        """A row for each weight: the base stays loaded, and each weight recomputes only what that adapter changes."""
        rows, before = [], self.mix.weights[label]
        for weight in weights:
            self.mix.set_weights({label: swept(label, before, weight)})
            rows.append(list(self.draw(self.pictures)))
            print(f"{label} {weight:g}", file=sys.stderr)
        sheet = contact_sheet(
            rows, row_labels=[f"{label} {weight:g}" for weight in weights], column_labels=self.labels()
        )
        return sheet, used_in(self.mix), self.sheet_settings(sweep={label: list(weights)})

    def before_after(self) -> Sheet:
        """A row for each picture: drawn without the adapters and with them, from the same noise."""
        used = used_in(self.mix)
        self.mix.mute()
        before = list(self.draw(self.pictures, plain=True))
        self.mix.unmute()
        after = [picture for picture, _ in self.with_adapters()]
        everywhere = [each for each in used if each.weight != 0]
        shown = dict.fromkeys([*everywhere, *self.where_when.regional])
        of_all = ", ".join(f"{each.label} {weight_text(each.weight)}" for each in shown)
        rows = [f"{label}\n{_tags(own)}".strip() for label, own in zip(self.labels(), self.tagged, strict=True)]
        sheet = contact_sheet(
            list(zip(before, after, strict=True)), row_labels=rows, column_labels=["without", f"with {of_all}".strip()]
        )
        return sheet, used, self.sheet_settings(before_after=True)


def _runs_of_equal(weights: Sequence[object]) -> Iterator[range]:
    """Neighbours with the same weights and settings, which are drawn in one batch."""
    first = 0
    for place in range(1, len(weights) + 1):
        if place == len(weights) or weights[place] != weights[first]:
            yield range(first, place)
            first = place


def _tags(weights: Mapping[str, Weight] | None) -> str:
    return "" if weights is None else ", ".join(f"{label} {weight_text(own)}" for label, own in weights.items() if own)
