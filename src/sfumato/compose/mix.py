"""Adapters mixed into a live pipeline: W plus the sum of each adapter's own change of W times its weight.

The sum is baked into the weight where possible. This creates no modules. The original bytes are kept, new weights are
computed from them and not from the last mix, and undoing puts them back. Quantised layers, and all layers on request,
get one path for all adapters beside them instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self, TypeVar, cast, get_args

import torch
from torch import Tensor

from sfumato.adapters.weights import Adapter, Weight, check_by_label, check_labels, checked_weight, format_weight
from sfumato.compose import saving as table
from sfumato.compose.hooks import change_lock
from sfumato.compose.layers.fused import Effect, FusedWeight
from sfumato.compose.layers.original_weights import OriginalWeights, Place
from sfumato.compose.layers.unfused import RefusesSaving, UnfusedLayer
from sfumato.compose.match import (
    ApplyMode,
    MatchedWeight,
    PipelineModules,
    compiled_parts,
    count_unmatched,
    denoiser_of,
    denoiser_part,
    match_weights,
    pipeline_parts,
    unwrapped_parts,
)
from sfumato.compose.sites import (
    Site,
    SiteChange,
    apply_changes,
    make_site,
    refuse_new_paths_in_compiled,
    refuse_offloaded,
    refuse_replaced,
    refuse_taken,
)
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.metadata import adapter_guidance_of, negatives_of, over_steps_of
from sfumato.files.module_names import DENOISERS
from sfumato.merging.whole_model import read_adapter_or_model
from sfumato.precision import quantization
from sfumato.utils.formatting import format_list

Asked = TypeVar("Asked")
Method = TypeVar("Method", bound=Callable[..., Any])

_MARK = "_sfumato_mix"
"""Attribute of each mixed part. It shows that a part is mixed already, whatever pipeline object holds it."""

_SAVE = "save_pretrained"
"""Method of a part. A part with paths beside its layers refuses it, because it would silently save the base model
alone."""


def compose(
    pipe: Any,
    *adapters: Adapter,
    partial: bool = False,
    way: ApplyMode = "auto",
    verify: bool = False,
    words_known: bool = False,
) -> Mix:
    """Mix the adapters into a diffusers pipeline, in place. Says on stderr how they are applied.

    pipe: a diffusers pipeline (SD 1.x, 2.x, SDXL), or a Base. partial: if only a part of a file fits, apply that part;
    `mix.skipped` counts the rest. way: "baked" sums the adapters into the weights; "live" adds one low-rank path for
    all adapters beside each linear layer and convolution, so that changing weights costs almost nothing and each call
    costs a little; "auto" bakes, except for quantised weights. verify: refuse files that have no fingerprint in their
    metadata, or whose weights do not match it. words_known: do not mention new words that files bring, because the
    caller adds them with `sfumato.adapters.embeddings.embedding.bundled`. Everything is read and matched before the
    pipeline is
    changed; a failed call leaves it as it was. Raises AdapterError or FileError, one line, also for a pipeline that has
    a mix already (see `current(pipe)`).
    """
    if way not in get_args(ApplyMode):
        raise AdapterError(f"there is no way {way!r} to mix; there are {', '.join(get_args(ApplyMode))}.")
    with change_lock(pipe):  # until it is marked: of two threads one is refused
        earlier = current(pipe)
        if earlier is not None:
            raise AdapterError(
                f"this pipeline carries a mix already ({earlier.describe() or 'empty'}). Add to it, after `from "
                "sfumato.compose import current`, with current(pipe).add(...), or undo() it first."
            )
        copied = {mark for part in unwrapped_parts(pipe).values() if isinstance(mark := part.__dict__.get(_MARK), str)}
        mix = Mix(pipe, way)
        mix.add(*adapters, partial=partial, verify=verify)
    for carried in sorted(filter(None, copied)):
        print(
            f"this pipeline is a copy of one that carried a mix ({carried}), which stays in it for good, beneath this "
            "one. For the base copy it before compose, or after undo().",
            file=sys.stderr,
        )
    if adapters:
        print(f"{format_list(list(mix.weights), 4)}: {mix.reason}", file=sys.stderr)
    if not words_known:
        print_words(mix)
    return mix


def print_words(mix: Mix) -> None:
    """Say on stderr which new words the files of a mix bring, and how to use them in prompts."""
    for label, words in mix.embeddings.items():
        print(
            f"{label}: brings the words {', '.join(words)}, which a mix leaves out; prompts know them within "
            "`with embedding.bundled(pipe, mix.embeddings):` of sfumato.adapters.embeddings.embedding.",
            file=sys.stderr,
        )


def current(pipe: Any) -> Mix | None:
    """The mix in the pipeline's U-Net, whoever made it; None if there is none."""
    mix = denoiser_of(pipe).__dict__.get(_MARK)
    return mix if isinstance(mix, Mix) else None


def _locked(method: Method) -> Method:
    """Only one thread at a time changes the weights."""

    @wraps(method)
    def called(mix: Mix, *args: Any, **options: Any) -> Any:
        with mix._lock:
            return method(mix, *args, **options)

    return cast(Method, called)


class Mix:
    """The adapters of one pipeline and their weights; made by `compose`.

    As a context manager it undoes itself at the end. Every method makes its whole change, or none if it raises.
    """

    def __init__(self, pipe: Any, way: ApplyMode = "auto") -> None:
        self._pipe = pipe
        self._lock = change_lock(pipe)
        self._way: ApplyMode = way
        self._parts = pipeline_parts(pipe)
        self._denoiser = denoiser_part(pipe)
        if hasattr(pipe, "lazy_weights"):  # of a Base, whose weights may not have been needed before
            pipe.lazy_weights.load("unet", "text")
        self._modules = PipelineModules(self._parts)
        self._family = self._modules.family
        self._originals = OriginalWeights(self._parts, tuple(getattr(pipe, "files", ()) or ()))
        self._sites: dict[Place, Site] = {}
        self._adapters: dict[str, Adapter] = {}
        self._weights: dict[str, Weight] = {}
        self._muted: frozenset[str] = frozenset()
        self._factors: Mapping[str, float] = {}
        self._is_streamed = False
        self._files: dict[str, AdapterFile] = {}
        self._skipped: dict[str, int] = {}
        self._undone = False

    @property
    def pipe(self) -> Any:
        """The pipeline or Base with this mix; None after `undo`."""
        return self._pipe

    @property
    def weights(self) -> Mapping[str, Weight]:
        """The weight of each adapter by its label, in the order of adding. A muted adapter keeps its weight."""
        return MappingProxyType(dict(self._weights))

    @property
    def muted(self) -> frozenset[str]:
        """The labels of the adapters that are muted."""
        return self._muted

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by label, with the weights they were added with."""
        return MappingProxyType(dict(self._adapters))

    @property
    def skipped(self) -> Mapping[str, int]:
        """How many modules of each file were left out because `partial` allowed it. Files with none are not listed."""
        return MappingProxyType({label: count for label, count in self._skipped.items() if count})

    @property
    def strengths(self) -> Mapping[str, float]:
        """The adapter guidance that files ask for, by label. Files that ask for none are not listed."""
        return self._asked(adapter_guidance_of)

    @property
    def spans(self) -> Mapping[str, tuple[float, float]]:
        """The sampling steps that files ask for, by label: (start, end), from 0 (noise) to 1 (finished image). Files
        that ask for none are not listed."""
        return self._asked(over_steps_of)

    @property
    def without_effect(self) -> list[str]:
        """The labels of adapters that change nothing at any weight, because all their factors are zero."""
        found: dict[str, list[Effect]] = {}
        for site in self._sites.values():
            for label, effect in site.effects.items():
                found.setdefault(label, []).append(effect)
        return [label for label, effects in found.items() if all(effect.is_zero for effect in effects)]

    @property
    def negatives(self) -> Mapping[str, tuple[str, ...]]:
        """The negative prompts that files ask for, by label. Files that ask for none are not listed. `sfumato generate`
        uses one for prompts that contain it and more; in a pipeline of your own pass `negative_prompt=`."""
        return self._asked(negatives_of)

    def _asked(self, read: Callable[[Mapping[str, str]], Asked | None]) -> Mapping[str, Asked]:
        """What `read` finds in the files' metadata, by label. Files in which it finds nothing are not listed."""
        return MappingProxyType({label: found for label, file in self._files.items() if (found := read(file.metadata))})

    @property
    def metadata(self) -> Mapping[str, Mapping[str, str]]:
        """The metadata of each file, by label."""
        return MappingProxyType({label: file.metadata for label, file in self._files.items()})

    @property
    def embeddings(self) -> Mapping[str, Mapping[str, Mapping[str, Tensor]]]:
        """New words that the files bring: {label: {token: {text encoder: (vectors, width)}}}.

        A mix changes weights and leaves the tokenizer alone. Prompts know these words within
        `with embedding.bundled(pipe, mix.embeddings):` of `sfumato.adapters.embeddings.embedding`.
        """
        return MappingProxyType({label: file.embeddings for label, file in self._files.items() if file.embeddings})

    @property
    def family(self) -> str:
        """The pipeline's family: "sd1", "sd2", "sdxl" or "pocket"."""
        return self._family

    @property
    def reason(self) -> str:
        """How the adapters are applied, and why."""
        return table.apply_reason([site.way for site in self._sites.values()], self._way)

    def describe(self) -> str:
        """The mix in one line: "line 0.8, otter 0.6 (muted)"."""
        return ", ".join(
            f"{label} {format_weight(weight)}{' (muted)' if label in self._muted else ''}"
            for label, weight in self._weights.items()
        )

    def show(self) -> str:
        """The mix as a table: one line for each adapter, and how they are applied."""
        sites = [(label, site) for site in self._sites.values() for label in site.effects]
        return table.mix_table(self._weights, self._muted, self._files, sites, self.reason)

    def __repr__(self) -> str:
        return f"Mix({'undone' if self._undone else self.describe()})"

    @_locked
    def add(self, *adapters: Adapter, partial: bool = False, verify: bool = False) -> Self:
        """Mix in more adapters. The arguments are those of `compose`."""
        self.check_open()
        pipeline_parts(self._pipe)  # refuses what diffusers or peft has loaded since
        refuse_taken(self._weights, adapters)
        self._modules.check_blocks({adapter.label: adapter.weight for adapter in adapters})
        files = {adapter.label: read_adapter_or_model(adapter.path, partial=partial) for adapter in adapters}
        if verify:
            from sfumato.files.fingerprint import verify as verify_deltas  # not needed otherwise, as with `save`

            for file in files.values():
                verify_deltas(file.metadata, file.changes, file.path.name)
        given = {adapter.label: adapter.weight for adapter in adapters}
        matched = {
            label: match_weights(file, label, self._modules, weight=given[label], partial=partial, way=self._way)
            for label, file in files.items()
        }
        self._check_shared({one.part for found in matched.values() for one in found})
        weights = self._weights | given
        sites = dict(self._sites)
        try:
            for label, found in matched.items():
                self._place(label, found, sites)
            changed = [site for site in sites.values() if not files.keys().isdisjoint(site.effects)]
            self._apply(weights, self._muted, changed)
        except BaseException:
            for site in sites.values():
                site.forget(files)
            raise
        self._sites, self._weights = sites, weights
        self._adapters |= {adapter.label: adapter for adapter in adapters}
        self._files |= files
        self._skipped |= {label: count_unmatched(file, matched[label]) for label, file in files.items()}
        self._mark_parts()
        for label in [label for label, file in files.items() if file.without_alpha]:
            print(f"{label}: the file has no alpha, so the rank is taken for it (a scale of 1)", file=sys.stderr)
        return self

    def _place(self, label: str, found: Iterable[MatchedWeight], sites: dict[Place, Site]) -> None:
        """Note what this adapter does at each of its sites, some of them new."""
        for one in found:
            place = (one.part, one.path, one.name)
            if place not in sites:
                sites[place] = make_site(one, self._parts[one.part])
            sites[place].effects[label] = one.effect

    def _mark_parts(self) -> None:
        """Mark the mixed parts; parts with paths beside layers refuse to be saved."""
        for part in {self._denoiser, *(site.part for site in self._sites.values())}:
            self._parts[part].__dict__[_MARK] = self
        for module in (self._parts[site.part] for site in self._sites.values() if isinstance(site, UnfusedLayer)):
            if hasattr(type(module), _SAVE):
                module.__dict__.setdefault(_SAVE, RefusesSaving(module))

    def set(self, /, **weights: Weight) -> Self:
        """Set new weights by label: `mix.set(line=0.3)`. Only modules whose sum changes are computed again, from the
        base model."""
        return self.set_weights(weights)

    @_locked
    def set_weights(self, weights: Mapping[str, Weight]) -> Self:
        """Set new weights by label, for labels that are no Python names. Other adapters keep their weights."""
        self.check_open()
        check_by_label(weights, self._weights)
        wanted = self._weights | {label: checked_weight(label, weight) for label, weight in weights.items()}
        self._modules.check_blocks({label: wanted[label] for label in weights})
        self._change(wanted, self._muted, [label for label in weights if wanted[label] != self._weights[label]])
        return self

    def mute(self, *labels: str) -> Self:
        """Leave out these adapters as if their weights were 0, but remember the weights. Without labels: all
        adapters."""
        return self._mute(labels, lambda named: self._muted | named)

    def unmute(self, *labels: str) -> Self:
        """Bring muted adapters back with their weights. Without labels: all adapters."""
        return self._mute(labels, lambda named: self._muted - named)

    @_locked
    def _mute(self, labels: Sequence[str], change: Callable[[frozenset[str]], frozenset[str]]) -> Self:
        self.check_open()
        check_labels(labels, self._weights)
        muted = change(frozenset(labels or self._weights))
        self._change(self._weights, muted, muted ^ self._muted)
        return self

    @contextmanager
    def conditional_only(self, factors: Mapping[str, float]) -> Iterator[None]:
        """Within the block these adapters' U-Net weights are multiplied by `factors`, and `without_conditional`
        switches them off.

        factors: by label. Weights may change within the block.
        """
        self.check_open()
        check_by_label(factors, self._weights)
        before = self._factors
        # Asked here, since `without_conditional` is entered at each of the U-Net's calls.
        self._is_streamed = "stream" in quantization.group_offloading(self._parts[self._denoiser])
        try:
            self._part(factors)
            yield
        finally:
            self._part(before)

    @_locked
    def _part(self, factors: Mapping[str, float]) -> None:
        before, self._factors = self._factors, dict(factors)
        if self._undone:  # within the block: there is nothing to bring back
            return
        try:
            self._apply(self._weights, self._muted, self._of_unet())
        except BaseException:
            self._factors = before
            raise

    @contextmanager
    def without_conditional(self) -> Iterator[None]:
        """In this block, inside that of `conditional_only`, the U-Net has all adapters but those. Nothing is
        computed."""
        done: list[Site] = []
        try:
            for site in self._of_unet():
                self._exchange(site)
                done.append(site)
            yield
        finally:
            for site in done:
                self._exchange(site)

    def _exchange(self, site: Site) -> None:
        if isinstance(site, FusedWeight):
            site.exchange(in_place=self._is_streamed)
        else:
            site.exchange()

    def _of_unet(self) -> list[Site]:
        return [site for site in self._sites.values() if site.part in DENOISERS]

    @_locked
    def remove(self, *labels: str) -> Self:
        """Remove adapters from the mix. A weight that no adapter changes any more gets the base model's exact bytes
        back.

        Raises AdapterError without labels; `undo` removes all adapters.
        """
        self.check_open()
        if not labels:
            raise AdapterError("remove() names no adapter; give the labels of some, or undo() the mix to take out all.")
        check_labels(labels, self._weights)
        touched = [site for site in self._sites.values() if not site.effects.keys().isdisjoint(labels)]
        refuse_new_paths_in_compiled(self._pipe, (site for site in touched if isinstance(site, UnfusedLayer)))
        weights = {label: weight for label, weight in self._weights.items() if label not in labels}
        self._change(weights, self._muted - frozenset(labels), labels)
        for place, site in list(self._sites.items()):
            site.forget(labels)
            if not site.effects:
                site.restore()
                del self._sites[place]
        for label in set(labels):
            del self._adapters[label], self._skipped[label], self._files[label]
        return self

    @_locked
    def undo(self) -> None:
        """Restore the base model's exact bytes and release the pipeline. A second call does nothing."""
        if self._undone:
            return
        self._modules.check_unfused()
        refuse_offloaded(self._parts, self._sites.values())
        refuse_replaced(self._parts, (site for site in self._sites.values() if site.applied))
        for site in self._sites.values():
            site.restore()
        for part in self._parts.values():
            if part.__dict__.get(_MARK) is self:
                del part.__dict__[_MARK]
            if isinstance(saves := part.__dict__.get(_SAVE), RefusesSaving) and not saves.sites():
                del part.__dict__[_SAVE]
        self._sites, self._weights, self._adapters, self._skipped, self._undone = {}, {}, {}, {}, True
        self._files, self._muted = {}, frozenset()
        # In a notebook the name of a mix outlives its block, and with it the pipeline would.
        del self._modules, self._originals
        self._pipe, self._parts = None, {}

    def save(
        self, path: str | os.PathLike[str], *, dtype: torch.dtype = torch.float32, title: str | None = None
    ) -> Path:
        """Write the mix, with its weights, as one LoRA file; returns the path. Says on stderr what diffusers, unlike
        other tools, does not read in it.

        The file's rank is the sum of the adapters' ranks, so that nothing is lost in fp32. Muted adapters and those at
        weight 0 are left out. Raises AdapterError for kinds that have no low-rank form, and for a file name that does
        not end in .safetensors.
        """
        self.check_open()
        numbers = {label: 0.0 if label in self._muted else weight for label, weight in self._weights.items()}
        from sfumato.compose import saving  # which imports all that merges: most mixes are never saved

        return saving.save_mix(path, self.family, self._sites.values(), numbers, self._files, dtype, title)

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled model has no mix, only a text that says what it carries and that can be read without this
        package. Its weights stay as they are; they cannot be undone."""
        return str, (self.describe() if any(site.applied for site in self._sites.values()) else "",)

    def __enter__(self) -> Self:
        self.check_open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.undo()

    def _change(self, weights: Mapping[str, Weight], muted: frozenset[str], labels: Iterable[str]) -> None:
        """Apply the weights at the sites of these adapters, then store the weights."""
        touched = set(labels)
        self._apply(weights, muted, [site for site in self._sites.values() if not touched.isdisjoint(site.effects)])
        self._weights, self._muted = dict(weights), muted

    def _apply(self, weights: Mapping[str, Weight], muted: frozenset[str], sites: Iterable[Site]) -> None:
        """Apply the weights at the sites; at all of them, or at none if it raises."""
        self._modules.check_unfused()
        heard = {label: weight for label, weight in weights.items() if label not in muted}
        wanted = [SiteChange.to(site, heard, self._factors) for site in sites]
        changes = [change for change in wanted if change.changes_anything]
        live = [(c.site, c.applied) for c in changes if c.rewrites and isinstance(c.site, UnfusedLayer)]
        for label in weights.keys() & self._files.keys() if changes else ():
            self._files[label].check_unwritten()
        refuse_offloaded(self._parts, (change.site for change in changes))
        refuse_replaced(self._parts, (change.site for change in changes))
        refuse_new_paths_in_compiled(self._pipe, (site for site, applied in live if site.rebuilds(applied)))
        apply_changes(changes, self._originals)
        idle = [site for site, applied in live if not applied]
        compiled = compiled_parts(self._pipe) if idle else set()
        for site in idle:
            if site.part not in compiled:
                site.remove_hook()

    def check_open(self) -> None:
        """Raise AdapterError if the mix was undone, or if its pipeline has another U-Net or text encoder now."""
        if self._undone:
            raise AdapterError("this mix was undone. Call compose again.")
        there = unwrapped_parts(self._pipe)
        if other := [name for name, part in self._parts.items() if there.get(name, part) is not part]:
            raise AdapterError(
                f"the pipeline has another {other[0]} than the one that this mix is in. undo() it, and call compose "
                "again."
            )

    def _check_shared(self, parts: Iterable[str]) -> None:
        for part in parts:
            other = self._parts[part].__dict__.get(_MARK)
            if isinstance(other, Mix) and other is not self:
                raise AdapterError(
                    f"this {part} carries the mix of another pipeline that shares it. Undo that first, or give this "
                    f"pipeline its own: pipe.{part} = copy.deepcopy(pipe.{part}) before anything is mixed in."
                )
