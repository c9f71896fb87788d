"""Where in the image and at which steps adapters count, in one drawing. Imports no torch by itself."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.adapters.weights import Adapter, Span, is_zero_weight, unet_weight
from sfumato.errors import ConfigError
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from sfumato.compose import Mix
    from sfumato.compose.regions import Box
    from sfumato.compose.schedules import Ramp
    from sfumato.models.prompts.syntax import Syntax


@dataclass(frozen=True)
class RegionSpec:
    """Adapters that count in one region. where: a box, or the file of a mask. prompt: the region's own; None: the
    prompt of the call."""

    adapters: tuple[Adapter, ...]
    where: Box | Path
    prompt: str | None


@dataclass(frozen=True)
class AdapterPlacement:
    """Where (regions) and at which steps (ramps, spans, turns) each adapter of one drawing counts.

    regions: their adapters are in no mix. by_step: label -> how its weight changes; for an adapter in a region, a span.
    switch_labels: adapters that take turns, each for `switch_every` steps (LoRA-Switch). tagged: adapters that are
    named in prompts' tags alone; at weight 0 their prompt is not the one that is being generated.
    """

    regions: tuple[RegionSpec, ...] = ()
    by_step: Mapping[str, Ramp | Span] = field(default_factory=dict)
    switch_labels: tuple[str, ...] = ()
    switch_every: int | None = None
    tagged: frozenset[str] = frozenset()

    @property
    def follows_steps(self) -> bool:
        """Whether any weight of the mix changes from step to step. Adapters in regions are not in the mix."""
        return not self.by_step.keys() <= {each.label for each in self.regional} or self.switch_every is not None

    @property
    def regional(self) -> tuple[Adapter, ...]:
        """The adapters of the regions, each once."""
        return tuple(dict.fromkeys(each for region in self.regions for each in region.adapters))

    @property
    def ramps(self) -> frozenset[str]:
        """The labels whose weight is given for every step, whatever the mix says."""
        return frozenset(label for label, way in self.by_step.items() if not isinstance(way, Span))

    def check_turns(self, steps: int) -> None:
        """Raises ConfigError where an image of so many steps ends before the turn of the last adapter."""
        if self.switch_every is not None and steps <= self.switch_every * (len(self.switch_labels) - 1):
            turn = self.switch_labels[-(-steps // self.switch_every)]
            raise ConfigError(
                f"--switch {self.switch_every}: the turn of {turn} does not come in {pluralize(steps, 'step')}; give "
                "a smaller number, or more --steps."
            )

    def with_requested(self, spans: Mapping[str, tuple[float, float]]) -> AdapterPlacement:
        """The same, but adapters without a setting count in the steps that their files ask for, by label."""
        said = {*self.by_step, *self.switch_labels}
        asked = {label: Span(*span) for label, span in spans.items() if label not in said}
        return dataclasses.replace(self, by_step={**asked, **self.by_step})

    def told(self) -> dict[str, Any]:
        """The same as JSON, what is not used left out."""
        from sfumato.generation.settings import adapter_settings

        found: dict[str, Any] = {}
        if self.regions:
            found["regions"] = [
                {
                    "where": each.where.name if isinstance(each.where, Path) else list(each.where),
                    "prompt": each.prompt,
                    "adapters": [adapter_settings(adapter) for adapter in each.adapters],
                }
                for each in self.regions
            ]
        if self.by_step:
            found["over_steps"] = {
                label: {"span": [way.start, way.end]} if isinstance(way, Span) else {"points": list(way.points)}
                for label, way in self.by_step.items()
            }
        if self.switch_every is not None:
            found["switch"] = {"labels": list(self.switch_labels), "every": self.switch_every}
        return found


@contextmanager
def placement_applied(
    pipe: Any,
    mix: Mix,
    wanted: AdapterPlacement,
    *,
    syntax: Syntax = "plain",
    partial: bool = False,
    verify: bool = False,
) -> Iterator[None]:
    """Within the block regions have their adapters, and the mix's weights follow the steps of each image.

    pipe: what the mix is mixed into; `sfumato.draw` generates from it. syntax: the syntax of the regions' prompts.
    """
    with ExitStack() as stack:
        if wanted.regions:
            from sfumato.compose.regions import Region, regions

            parts = [Region(_open_mask(each.where), *each.adapters, prompt=each.prompt) for each in wanted.regions]
            spans = {label: (way.start, way.end) for label, way in wanted.by_step.items() if isinstance(way, Span)}
            said: dict[str, Any] = {"syntax": syntax, "partial": partial, "verify": verify}
            own = {each.label: spans[each.label] for each in wanted.regional if each.label in spans}
            stack.enter_context(regions(pipe, *parts, over_steps=own, **said))
        if wanted.follows_steps:
            from sfumato.compose.schedules import Ramp, Switch, follow_steps

            ways = {
                label: way
                if isinstance(way, Ramp)
                else Ramp.within(way.start, way.end, unet_weight(mix.weights[label]))
                for label, way in wanted.by_step.items()
                if label in mix.weights and not (label in wanted.tagged and is_zero_weight(mix.weights[label]))
            }
            switch = None if wanted.switch_every is None else Switch(wanted.switch_labels, wanted.switch_every)
            stack.enter_context(follow_steps(mix, ways, switch))
        yield


def _open_mask(where: Box | Path) -> Any:
    if not isinstance(where, Path):
        return where
    from sfumato.data.images import open_mask

    return open_mask(where, any_ratio=True)
