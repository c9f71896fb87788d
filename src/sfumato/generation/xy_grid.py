"""The cells of a grid: what each picture depends on, and the pictures, in as few batches as their settings allow.

Nothing heavy is imported before a cell is drawn: a grid is planned, and refused, without torch.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sfumato.adapters.weights import Adapter, Weight, is_zero_weight
from sfumato.models.prompts.syntax import Syntax, negative_for
from sfumato.utils.schedulers import find_sampler

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.adapters.embeddings.added_tokens import Vectors, Words
    from sfumato.compose import Mix
    from sfumato.files.metadata import Sampling
    from sfumato.models import Base

T = TypeVar("T")

FORMAT = 2
"""Of the cells' names; another where the same settings draw another picture than an earlier version's."""


@dataclass(frozen=True)
class GridCell:
    """One picture: its settings, and the adapters' weights by label. Those of a method are in `settings` if one is."""

    settings: Mapping[str, Any]
    weights: Mapping[str, Weight]

    @property
    def counted(self) -> tuple[str, ...]:
        """The labels of the adapters whose weight is not 0; the others are as if they were not there."""
        return tuple(label for label, weight in self.weights.items() if not is_zero_weight(weight))

    def key(self, base: Sequence[str], files: Mapping[str, str], words: Sequence[tuple[str, str]] = ()) -> str:
        """What the picture depends on, so that a cell drawn earlier is known again. base: which, and how it is loaded.
        files: sha256 by label. words: token and sha256 of each embedding."""
        used = {label: [files[label], self.weights[label]] for label in self.counted}
        told = [FORMAT, list(base), dict(self.settings), used]
        if self.settings.get("method"):
            # The order counts: np-lora keeps the first whole. 2: the words that adapters bring were not known once.
            told.append([2, *used])
        if words:
            told.append({"embeddings": list(words)})
        if options := self.settings.get("sampler") and find_sampler(self.settings["sampler"]).options:
            told.append({"sampler": dict(options)})
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class GridSetup:
    """What the cells are drawn from and with.

    mix: of all adapters; None where cells have a method, which merges them for each batch. told, brought: the metadata
    and new words of the adapters' files, by label. words: those of --embedding. named: their files, and what they are
    called. syntax: of all prompts. partial: apply what fits of an adapter of which a part does not.
    """

    base: Base
    adapters: Sequence[Adapter]
    mix: Mix | None
    told: Mapping[str, Mapping[str, str]]
    brought: Mapping[str, Vectors]
    words: Sequence[Words]
    named: Sequence[tuple[Path, list[str]]]
    syntax: Syntax
    partial: bool

    def notes(self, cells: Sequence[GridCell], embeddings: Sequence[tuple[str | None, Path]]) -> list[str]:
        """What of the words has no effect, and what was learned on another base. Raises ConfigError as `_checked`."""
        from sfumato.files.header import read_header
        from sfumato.generation.notes import (
            base_mismatch_notes,
            misread_word_notes,
            no_effect_notes,
            skipped_module_notes,
            unknown_word_notes,
            unread_syntax_notes,
            unused_word_notes,
        )

        base, syntax = self.base, self.syntax
        texts = [cell.settings[name] for name in ("prompt", "negative") for cell in cells]
        learned = self._checked(cells)
        of_words = {token or file.name: read_header(file).metadata for token, file in embeddings}
        known = [token for some in (*(each.tokens for each in self.words), *self.brought.values()) for token in some]
        lines = [
            *unread_syntax_notes(texts, syntax),
            *unused_word_notes(self.named, texts, syntax),
            *unknown_word_notes(texts, known, base),
        ]
        lines += (
            [*no_effect_notes(self.mix.without_effect), *skipped_module_notes(self.mix.skipped)] if self.mix else []
        )
        return [*lines, *misread_word_notes(known, texts, syntax), *learned, *base_mismatch_notes(of_words, base)]

    def _checked(self, cells: Iterable[GridCell]) -> list[str]:
        """What `learned_otherwise` says of the adapters that count in any cell.

        Raises ConfigError for a prompt that words make too long, loaded ones or those that its adapters bring.
        """
        from sfumato.generation.notes import base_mismatch_notes

        together: dict[tuple[str, ...], list[GridCell]] = {}
        for cell in cells:
            together.setdefault(cell.counted, []).append(cell)
        lines: dict[str, None] = {}
        for labels, some in together.items():
            with self._words(some[0]) as words:
                known = [*self.words, *([] if words is None else [words])]
                for each in known if self.syntax == "plain" else []:  # the others take prompts of any length
                    each.check([cell.settings[name] for name in ("prompt", "negative") for cell in some])
                lines |= dict.fromkeys(base_mismatch_notes({label: self.told[label] for label in labels}, self.base))
        return list(lines)

    def with_requested_sampling(self, cell: GridCell) -> GridCell:
        """The cell with the sampler, steps and guidance that the first of its adapters asks for whose file does, where
        nothing else is asked for."""
        from sfumato.generation.adapter_files import apply_sampling

        asked = next(iter(self._samplings_of(cell).values()), None)
        return cell if asked is None else replace(cell, settings=apply_sampling(cell.settings, asked))

    def requested_sampling_notes(self, cells: Iterable[GridCell]) -> list[str]:
        """Lines on the adapters of these cells whose files ask for a sampling."""
        from sfumato.generation.adapter_files import overridden_notes

        lines: dict[str, None] = {}
        for asked in map(self._samplings_of, cells):
            for label, each in list(asked.items())[:1]:
                lines[f"{label}: asks for {each}, in the images that it is in."] = None
            lines |= dict.fromkeys(overridden_notes(asked))
        return list(lines)

    def _samplings_of(self, cell: GridCell) -> dict[str, Sampling]:
        """What the files of the cell's adapters ask for, by label."""
        from sfumato.files.metadata import sampling_of

        return {label: asked for label in cell.counted if (asked := sampling_of(self.told[label])) is not None}

    def with_requested_negative(self, cell: GridCell) -> GridCell:
        """The cell with the negative prompt that its adapters' files ask for, where nothing else is asked for."""
        if cell.settings["negative"] is not None:
            return cell
        from sfumato.files.metadata import negatives_of

        is_guided = fill_defaults(self.base, cell)["guidance"] > 1
        asked = [text for label in cell.counted for text in negatives_of(self.told[label])] if is_guided else []
        negative = negative_for(cell.settings["prompt"], asked, self.syntax)
        return replace(cell, settings={**cell.settings, "negative": negative})

    def draw(
        self, rows: Sequence[Sequence[GridCell]], places: Sequence[tuple[int, int]]
    ) -> Iterator[tuple[tuple[int, int], Image, Mapping[str, Any]]]:
        """(place, picture, how its adapters count) of the cells at these places, (column, row).

        Cells that differ in prompt and seed alone are drawn in one batch.
        """
        from sfumato.compose.guidance import adapter_guidance, strengths_of
        from sfumato.compose.schedules import over_asked_steps
        from sfumato.generation.draw import draw
        from sfumato.generation.placement import AdapterPlacement

        together: dict[str, list[tuple[int, int]]] = {}
        for place in places:
            cell = rows[place[1]][place[0]]
            shared = {name: value for name, value in cell.settings.items() if name not in ("prompt", "seed")}
            together.setdefault(json.dumps([shared, dict(cell.weights)], sort_keys=True), []).append(place)
        for group in together.values():
            cells = [rows[row][column] for column, row in group]
            to = fill_defaults(self.base, cells[0])
            width, height = to.get("size", (None, None))
            with (
                self._applied(cells[0]) as applied,
                self._words(cells[0], quiet=True),
                adapter_guidance(applied, to["adapter_guidance"], guidance=to["guidance"]),
                over_asked_steps(applied),
            ):
                pictures = draw(
                    self.base,
                    [cell.settings["prompt"] for cell in cells],
                    [cell.settings["seed"] for cell in cells],
                    width=width,
                    height=height,
                    syntax=to.get("prompt_syntax", "plain"),
                    **{name: to[name] for name in ("negative", "steps", "guidance", "sampler")},
                )
                strengths = strengths_of(applied, to["adapter_guidance"], guidance=to["guidance"])
                placed = AdapterPlacement().with_requested(self._by_label(cells[0], applied.spans))
                how = {"adapter_guidance": self._by_label(cells[0], strengths), **placed.told()}
            for place, picture in zip(group, pictures, strict=True):
                yield place, picture, how

    def _applied(self, cell: GridCell) -> AbstractContextManager[Mix]:
        """A context that gives the mix, with the adapters as the cell has them."""
        if self.mix is not None:
            self.mix.set_weights(dict(cell.weights))
            return nullcontext(self.mix)
        from sfumato.compose.by_method import by_method
        from sfumato.merging.factors import Budget
        from sfumato.merging.methods import MethodSettings

        to = cell.settings
        settings = MethodSettings(density=to.get("density", MethodSettings.density))
        return by_method(
            self.base,
            *self.adapters_at(cell),
            method=to["method"],
            settings=settings,
            budget=Budget(rank=to["rank"]),
            partial=self.partial,
            words_known=True,
        )

    def _by_label(self, cell: GridCell, found: Mapping[str, T]) -> Mapping[str, T]:
        """What adapters of the cell's mix have; where a method has merged them, each has what the result has."""
        if self.mix is not None:
            return found
        return {label: value for value in found.values() for label in cell.counted}

    def _words(self, cell: GridCell, *, quiet: bool = False) -> AbstractContextManager[Words | None]:
        """Within the block the words are in use that the cell's adapters bring; those at 0 bring none."""
        from sfumato.adapters.embeddings.embedding import bundled

        found = {label: words for label, words in self.brought.items() if label in cell.counted}
        return bundled(self.base, found, partial=self.partial, quiet=quiet)

    def adapters_at(self, cell: GridCell) -> tuple[Adapter, ...]:
        """The adapters with the weights that the cell gives them."""
        return tuple(Adapter(each.path, cell.weights[each.label], each.label) for each in self.adapters)


@contextmanager
def grid_setup(
    base: Base,
    adapters: Sequence[Adapter],
    embeddings: Sequence[tuple[str | None, Path]],
    *,
    is_merged: bool,
    syntax: Syntax,
    partial: bool,
) -> Iterator[GridSetup]:
    """Within the block the base has the new words, and the mix unless cells merge the adapters by a method.

    embeddings: (token, file) of new words; a token of None is the file's own. is_merged: whether cells have a method.
    """
    from sfumato.adapters.embeddings import embedding
    from sfumato.compose import compose
    from sfumato.generation.prompt_adapters import choose_apply_mode

    with ExitStack() as stack:
        words = [stack.enter_context(embedding.load(base, file, token)) for token, file in embeddings]
        named = [(file, list(each.tokens)) for each, (_, file) in zip(words, embeddings, strict=True)]
        mix = None
        if not is_merged:
            way = choose_apply_mode(base, adapters)
            mix = stack.enter_context(compose(base, *adapters, way=way, partial=partial, words_known=True))
        told, brought = _in_files(mix, adapters, partial=partial)
        yield GridSetup(base, adapters, mix, told, brought, words, named, syntax, partial)


def _in_files(
    mix: Mix | None, adapters: Sequence[Adapter], *, partial: bool
) -> tuple[Mapping[str, Mapping[str, str]], Mapping[str, Vectors]]:
    """(metadata, new words) of the adapters' files, by label. mix: None where cells merge them by a method, which takes
    no whole model."""
    if mix is not None:
        return mix.metadata, mix.embeddings
    from sfumato.merging.merge import refuse_model
    from sfumato.merging.whole_model import read_adapter_or_model

    read = {each.label: read_adapter_or_model(each.path, partial=partial) for each in adapters}
    for label, file in read.items():
        refuse_model(label, file.changes)
    told = {label: file.metadata for label, file in read.items()}
    return told, {label: file.embeddings for label, file in read.items()}


def check_drawable(base: Base, rows: Sequence[Sequence[GridCell]]) -> None:
    """Raises ConfigError for steps or samplers that the base does not have, before the first cell is drawn."""
    from sfumato.generation.draw import check_steps
    from sfumato.utils.schedulers import make_scheduler

    to = [cell.settings for cells in rows for cell in cells]
    for steps, sampler in {(each["steps"] or base.defaults.sampling_steps, each["sampler"]) for each in to}:
        check_steps(steps, make_scheduler(sampler or base.defaults.sampler, base.scheduler.config))


def fill_defaults(base: Base, cell: GridCell) -> dict[str, Any]:
    """The cell's settings, with the family's defaults for those that are unset."""
    to = cell.settings
    guidance = base.defaults.guidance if to["guidance"] is None else to["guidance"]
    return {**to, "steps": to["steps"] or base.defaults.sampling_steps, "guidance": guidance}


def adapter_digest(path: Path) -> str:
    """What an adapter is, metadata included, which say how it is drawn with: the sha256 of its files' sha256 in their
    order, one for a plain file, all of peft's folder."""
    files = [path] if path.is_file() else sorted(filter(Path.is_file, path.rglob("*")), key=lambda file: file.parts)
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
