"""Adapters merged into the weights of a live pipeline: W + sum of w_i (alpha_i / r_i) up_i down_i.

No modules are created. The original of every touched weight is kept, so that new weights are computed from the base
and not from the last mix, and undoing puts back the base's very bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType, TracebackType
from typing import Any, Self

from sfumato.compose.adapter import Adapter, Weight, checked_weight, part_weight
from sfumato.compose.lowrank import Scratch
from sfumato.compose.match import Modules, match, parts_of
from sfumato.compose.site import Applied, Site
from sfumato.errors import AdapterError
from sfumato.files.kohya import Target
from sfumato.files.lora_file import read_lora

_MARK = "_sfumato_mix"
"""Attribute of each mixed part, so that a second mix over the first is noticed whatever pipeline object it comes by."""


def compose(pipe: Any, *adapters: Adapter, partial: bool = False) -> Mix:
    """Merge the weighted sum of the adapters' changes into a diffusers pipeline, in place.

    pipe: a diffusers pipeline (SD 1.x, 2.x, SDXL), or a Base. partial: apply what fits of a file of which a part does
    not fit; `mix.skipped` counts the rest. Everything is read and matched before the pipeline is touched, and a failed
    call leaves it as it was. Raises AdapterError or FileError, one line; so for a pipeline that carries a mix already
    (`current(pipe)` is that mix).
    """
    earlier = current(pipe)
    if earlier is not None:
        raise AdapterError(
            f"this pipeline carries a mix already ({earlier.describe() or 'empty'}). "
            "Add to it with sfumato.compose.current(pipe).add(...), or undo() it first."
        )
    mix = Mix(pipe)
    mix.add(*adapters, partial=partial)
    return mix


def current(pipe: Any) -> Mix | None:
    """The mix that the pipeline's U-Net or a text encoder carries, whoever made it; None if there is none."""
    for part in parts_of(pipe).values():
        mix = part.__dict__.get(_MARK)
        if isinstance(mix, Mix):
            return mix
    return None


class Mix:
    """The adapters of one pipeline and their weights; made by `compose`.

    As a context manager it undoes itself at the end. Every method changes all it should or, when it raises, nothing.
    """

    def __init__(self, pipe: Any) -> None:
        self._parts = parts_of(pipe)
        self._modules = Modules(self._parts)
        self._sites: dict[Target, Site] = {}
        self._adapters: dict[str, Adapter] = {}
        self._weights: dict[str, Weight] = {}
        self._skipped: dict[str, int] = {}
        self._undone = False

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weight of each adapter by its label, in the order in which they were added."""
        return MappingProxyType(dict(self._weights))

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by their labels, with the weights they were added with."""
        return MappingProxyType(dict(self._adapters))

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many modules of each file were left out because `partial` allowed it; without those that have none."""
        return MappingProxyType({label: count for label, count in self._skipped.items() if count})

    def describe(self) -> str:
        """The mix in one line: "line 0.8, otter 0.6"."""
        return ", ".join(f"{label} {_text(weight)}" for label, weight in self._weights.items())

    def __repr__(self) -> str:
        return f"Mix({'undone' if self._undone else self.describe()})"

    def add(self, *adapters: Adapter, partial: bool = False) -> Self:
        """Mix in more adapters; as `compose`."""
        self._check_open()
        labels = list(self._weights)
        for adapter in adapters:
            if not isinstance(adapter, Adapter):
                raise AdapterError(f"an adapter is given as Adapter(file, weight), got {adapter!r:.60}.")
            if adapter.label in labels:
                raise AdapterError(
                    f"two adapters are called {adapter.label!r}. Tell them apart with Adapter(file, weight, name=...)."
                )
            labels.append(adapter.label)
        files = {adapter.label: read_lora(adapter.path, partial=partial) for adapter in adapters}
        fitting = {label: match(file, label, self._modules, partial=partial) for label, file in files.items()}
        sites = dict(self._sites)
        for label, matched in fitting.items():
            for target, (module, change) in matched.items():
                sites.setdefault(target, Site(*target, module)).changes[label] = change
        weights = self._weights | {adapter.label: adapter.weight for adapter in adapters}
        try:
            self._apply(weights, [site for site in sites.values() if any(label in site.changes for label in files)])
        except BaseException:
            for site in sites.values():
                site.forget(files)
            raise
        self._sites, self._weights = sites, weights
        self._adapters |= {adapter.label: adapter for adapter in adapters}
        self._skipped |= {
            label: len(file.modules) - len(fitting[label]) + len(file.skipped) for label, file in files.items()
        }
        for part in self._parts.values():
            part.__dict__[_MARK] = self
        return self

    def set(self, /, **weights: Weight) -> Self:
        """New weights by label: `mix.set(line=0.3)`. Only modules whose sum changes are computed, from the base."""
        return self.set_weights(weights)

    def set_weights(self, weights: Mapping[str, Weight]) -> Self:
        """New weights by label, for labels that are no Python names; adapters not named keep theirs."""
        self._check_open()
        self._check_labels(weights)
        wanted = self._weights | {label: checked_weight(label, weight) for label, weight in weights.items()}
        changed = [label for label in weights if wanted[label] != self._weights[label]]
        self._apply(wanted, [site for site in self._sites.values() if any(label in site.changes for label in changed)])
        self._weights = wanted
        return self

    def remove(self, *labels: str) -> Self:
        """Take adapters out of the mix; a weight that no adapter changes any more has the base's very bytes again."""
        self._check_open()
        self._check_labels(labels)
        weights = {label: weight for label, weight in self._weights.items() if label not in labels}
        self._apply(weights, [site for site in self._sites.values() if any(label in site.changes for label in labels)])
        for site in self._sites.values():
            site.forget(labels)
        self._sites = {target: site for target, site in self._sites.items() if site.changes}
        self._weights = weights
        for label in labels:
            del self._adapters[label], self._skipped[label]
        return self

    def undo(self) -> None:
        """Put back the base's very bytes and let go of the pipeline. A second call does nothing."""
        if self._undone:
            return
        scratch = Scratch()
        for site in self._sites.values():
            site.apply((), scratch)
        for part in self._parts.values():
            if part.__dict__.get(_MARK) is self:
                del part.__dict__[_MARK]
        self._sites, self._weights, self._adapters, self._skipped, self._undone = {}, {}, {}, {}, True

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def _apply(self, weights: Mapping[str, Weight], sites: Iterable[Site]) -> None:
        """Bring the sites to the weights; all of them, or none when it raises."""
        wanted = [(site, _wanted(site, weights)) for site in sites]
        todo = [(site, applied) for site, applied in wanted if applied != site.applied]
        for site, _ in todo:
            site.check_untouched()
        scratch = Scratch()
        done: list[tuple[Site, Applied]] = []
        try:
            for site, applied in todo:
                done.append((site, site.applied))
                site.apply(applied, scratch)
        except BaseException:
            for site, before in done:
                site.apply(before, scratch)
            raise

    def _check_open(self) -> None:
        if self._undone:
            raise AdapterError("this mix was undone. Call compose again.")

    def _check_labels(self, labels: Iterable[str]) -> None:
        for label in labels:
            if label not in self._weights:
                known = ", ".join(map(repr, self._weights)) or "nothing"
                raise AdapterError(f"no adapter of this mix is called {label!r}; it holds {known}.")


def _wanted(site: Site, weights: Mapping[str, Weight]) -> Applied:
    numbers = {label: part_weight(weights[label], site.part) for label in sorted(site.changes) if label in weights}
    return tuple((label, number) for label, number in numbers.items() if number != 0)


def _text(weight: Weight) -> str:
    return f"{weight[0]:g}:{weight[1]:g}" if isinstance(weight, tuple) else f"{weight:g}"
