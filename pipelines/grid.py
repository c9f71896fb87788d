"""An XY plot: pictures over two settings, to choose by. It fills coarse to fine and goes on where it was stopped."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.command_line.axes import CHECKS, PLAIN, Axis, coarse_to_fine, parse_axis
from sfumato.command_line.said import say
from sfumato.command_line.specs import checked_folder, parse_adapters, parse_embedding, public_embedding, without_tags
from sfumato.compose.adapter import Adapter, Weight, checked_weight, is_idle, swept
from sfumato.config import parse, to_dict
from sfumato.errors import ConfigError
from sfumato.prompts.negative import negative_for
from sfumato.prompts.syntax import checked_syntax, escaped

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.bases import Base
    from sfumato.compose import Mix
    from sfumato.words.embedding import Vectors, Words


FORMAT = 2
"""Of the cells' names; another where the same settings draw another picture than an earlier version's."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draw pictures over two settings as one labelled sheet.

    Example: sfumato grid --lora line.safetensors --x line=0,0.5,1 --y "prompt=a crab|an owl" -o grid

    Methods: sfumato grid --lora line.safetensors --lora otter.safetensors --x otter=0.5,0.75,1 --y method=linear,ties
    --prompt "an otter"
    """

    x: str
    """What varies from left to right: prompt=a crab|an owl, seed=1,2,3, LABEL=0,0.5,1 for an adapter's weight,
    adapter=a.safetensors,runs/*.safetensors for one adapter after another, method=linear,ties,np-lora for the adapters
    merged by each method as sfumato merge does it; also density (of a method), negative, steps, guidance,
    adapter_guidance, sampler."""
    y: str
    """What varies from top to bottom, in the same form."""
    lora: tuple[str, ...] = ()
    """FILE:0.8, an adapter and its weight, as for sfumato generate. Repeat to mix."""
    method: str | None = None
    """How sfumato merge puts the adapters into one, where no axis says it: linear, ties, dare, magnitude, np-lora, ...;
    unset, they are summed. For np-lora the first --lora is the style."""
    density: float | None = None
    """Share of the entries that ties, dare, dare-ties, magnitude, knots and core-space keep; 0.5 if unset."""
    rank: int | None = None
    """At most so many directions a module of what a method merges; unset, as many as the adapters have together."""
    embedding: tuple[str, ...] = ()
    """FILE or TOKEN=FILE, a textual inversion, here or on the hub: a new word for prompts. Repeat for several."""
    adapter_weight: float = 1.0
    """The weight of the adapters of an axis adapter=..., of those that have none of their own (FILE:0.8)."""
    prompt: str | None = None
    """What to draw, where no axis says it."""
    prompt_syntax: Literal["plain", "a1111", "compel"] = "plain"
    """How all prompts are written, as for sfumato generate. With a1111 a | in brackets is the prompt's own, as in
    prompt=a [red|blue] crab|an owl, which are two prompts; one outside them parts prompts."""
    seed: int = 0
    """Where the noise comes from, where no axis says it."""
    base: str = "pocket"
    """`pocket`, a hub id, a diffusers folder or a .safetensors checkpoint."""
    output: Annotated[Path, Parameter(alias="-o")] = Path("grid")
    """A folder: grid.png, grid.json, and cells/, all pictures with their settings. Cells that are there are kept."""
    negative: str | None = None
    """What the pictures should not show; what a file asks for if unset, as for sfumato generate."""
    steps: int | None = None
    """Steps of the sampler; the family's default if unset."""
    guidance: float | None = None
    """How strongly the prompt is followed (CFG scale); the family's default if unset."""
    adapter_guidance: float | None = None
    """How often the adapters count, as for sfumato generate; what each file asks for if unset."""
    sampler: str | None = None
    """The sampler's name; the family's default if unset."""
    partial: bool = False
    """Apply what fits of an adapter of which a part does not fit."""
    clip_skip: int | None = None
    """Layers of the text encoder to leave out, from its end (A1111 counts one more)."""
    vae: str | None = None
    """A folder, hub id or file whose VAE replaces the base's."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, where its file does not say."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """What the weights are computed in."""
    device: str = "auto"
    """`auto`, `cuda`, `cuda:1`, `mps` or `cpu`."""


@dataclass(frozen=True)
class Cell:
    """One picture: its settings, and the adapters' weights by label. Those of a method are in `settings` if one is."""

    settings: Mapping[str, Any]
    weights: Mapping[str, Weight]

    @property
    def counted(self) -> tuple[str, ...]:
        """The labels of the adapters whose weight is not 0; the others are as if they were not there."""
        return tuple(label for label, weight in self.weights.items() if not is_idle(weight))

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
        text = json.dumps(told, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def plan(config: Config) -> tuple[Axis, Axis, list[Adapter], list[list[Cell]]]:
    """The axes, all adapters, and the cells row by row. Raises ConfigError before anything heavy is loaded."""
    for name, check in CHECKS.items():
        if (value := getattr(config, name)) is not None:
            check(value)
    checked_weight("--adapter-weight", config.adapter_weight)
    checked_folder(config.output, f"--output {config.output}")
    adapters = list(parse_adapters(config.lora))
    labels = [adapter.label for adapter in adapters]
    x, y = (parse_axis(axis, labels, config.prompt_syntax) for axis in (config.x, config.y))
    _check_axes(config, x, y, adapters)
    _check_method(config, x, y, adapters)
    for where, texts in _prompts(config, x, y):
        for text in texts:
            checked_syntax(without_tags(text, where), config.prompt_syntax)
    # By side, too: one file on both counts twice.
    sides = (("x", x), ("y", y))
    places = dict.fromkeys((side, spec) for side, axis in sides if axis.kind == "adapter" for spec in axis.values)
    on_axes = parse_adapters([spec for _, spec in places], weight=config.adapter_weight, beside=adapters)
    extra = dict(zip(places, on_axes, strict=True))
    adapters += [Adapter(each.path, 0.0, each.label) for each in extra.values()]
    weights = {adapter.label: adapter.weight for adapter in adapters}
    rows = [
        [_cell(config, weights, extra, {"x": (x, right), "y": (y, below)}) for right in x.values] for below in y.values
    ]
    return x, y, adapters, rows


def _cell(
    config: Config,
    weights: Mapping[str, Weight],
    extra: Mapping[tuple[str, str], Adapter],
    at: Mapping[str, tuple[Axis, Any]],
) -> Cell:
    """The cell at these values of the axes. weights: where no axis says another. extra: adapters of the axes, by side
    and value. at: by side, its axis and the value."""
    settings = {name: getattr(config, name) for name in PLAIN}
    if config.prompt_syntax != "plain":  # so that cells that were drawn without the option are known again
        settings["prompt_syntax"] = config.prompt_syntax
    own = dict(weights)
    for side, (axis, value) in at.items():
        if axis.kind == "weight":
            own[axis.label] = swept(axis.label, weights[axis.label], value)
        elif axis.kind == "adapter":
            adapter = extra[side, value]
            own[adapter.label] = adapter.weight
        else:
            settings[axis.kind] = value
    return Cell(_with_method(settings, config.rank), own)


def _check_axes(config: Config, x: Axis, y: Axis, adapters: Sequence[Adapter]) -> None:
    if (x.kind, x.label) == (y.kind, y.label) and x.kind != "adapter":
        raise ConfigError(f"--x and --y both vary {x.label or x.kind}; give them different settings.")
    if config.prompt is None and "prompt" not in (x.kind, y.kind):
        raise ConfigError("there is no prompt; give --prompt, or an axis such as --y 'prompt=a crab|an owl'.")
    if config.adapter_weight != Config.adapter_weight and "adapter" not in (x.kind, y.kind):
        raise ConfigError(
            f"--adapter-weight {config.adapter_weight:g}: no axis is adapter=...; a --lora has its weight as FILE:0.8."
        )
    is_guided = config.adapter_guidance is not None or "adapter_guidance" in (x.kind, y.kind)
    if is_guided and not adapters and "adapter" not in (x.kind, y.kind):
        raise ConfigError("adapter guidance: there is no adapter that it could count for; give --lora FILE:0.8.")


def _prompts(config: Config, x: Axis, y: Axis) -> Iterator[tuple[str, Sequence[str]]]:
    """Where a prompt stands, and the prompts there."""
    yield "--prompt", [config.prompt] if config.prompt is not None else []
    yield "--negative", [config.negative or ""]
    for name, axis in (("--x", x), ("--y", y)):
        if axis.kind in ("prompt", "negative"):
            yield name, axis.values


def _check_method(config: Config, x: Axis, y: Axis, adapters: Sequence[Adapter]) -> None:
    if config.rank is not None and config.rank < 1:
        raise ConfigError(f"--rank {config.rank}: wanted at least 1.")
    kinds = (x.kind, y.kind)
    methods = next((set(axis.values) for axis in (x, y) if axis.kind == "method"), {config.method} - {None})
    if config.rank is not None and not methods:
        raise ConfigError("--rank is of a merging method; give --method ties, or --x method=ties,dare.")
    if config.density is not None or "density" in kinds:
        from sfumato.merging.methods import TAKEN_BY

        if methods.isdisjoint(TAKEN_BY["density"]):
            raise ConfigError(
                "--density is of a merging method that thins out; give --method ties, or --x method=ties,dare."
            )
    if not methods:
        return
    if not adapters and "adapter" not in kinds:
        raise ConfigError("a method wants adapters to merge; give --lora FILE:0.8, twice or more.")


def _with_method(settings: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """The settings of a cell, those of its method only where it has one that takes them."""
    method, density = settings.pop("method"), settings.pop("density")
    if method is None:
        return settings
    from sfumato.merging.methods import TAKEN_BY, Settings

    settings |= {"method": method, "rank": rank}
    if method not in TAKEN_BY["density"]:
        return settings
    return settings | {"density": Settings.density if density is None else density}


def draw_grid(config: Config) -> Path:
    """Draw what is missing; returns the sheet's path."""
    x, y, adapters, rows = plan(config)
    embeddings = [parse_embedding(spec) for spec in config.embedding]

    from sfumato.bases import load_base
    from sfumato.drawing.drawn import unguided
    from sfumato.drawing.sheet import read_drawn
    from sfumato.precision import decide

    base = load_base(
        config.base,
        precision=decide(config.precision, device=config.device),
        clip_skip=config.clip_skip,
        vae=config.vae,
        prediction_type=config.prediction_type,
    )
    _check_drawable(base, rows)
    filled = [_filled(base, cell) for cells in rows for cell in cells]
    say(*unguided((to["guidance"], to["negative"] or "", bool(to["adapter_guidance"])) for to in filled))
    # Before anything is mixed in: what a cell's name is made of.
    loaded = [base.quick_fingerprint(), str(base.precision.compute), str(base.clip_skip), str(config.partial)]
    files = {adapter.label: _digest(Path(adapter.path)) for adapter in adapters}
    digests = [(token or file.stem, _digest(file)) for token, file in embeddings]
    is_merged = "method" in rows[0][0].settings  # then all cells have one
    with _prepared(config, base, adapters, embeddings, is_merged=is_merged) as setup:
        rows = [[_against(setup, cell) for cell in cells] for cells in rows]
        paths = {
            (column, row): config.output / "cells" / f"{cell.key(loaded, files, digests)}.png"
            for row, cells in enumerate(rows)
            for column, cell in enumerate(cells)
        }
        say(*_notes(setup, [cell for cells in rows for cell in cells], embeddings))
        there = {path for path in paths.values() if read_drawn(path) is not None}
        for cells in coarse_to_fine(len(x.values), len(y.values)):
            missing = [place for place in cells if paths[place] not in there]
            for place, picture, how in _draw(setup, rows, missing):
                _save(setup, picture, paths[place], rows[place[1]][place[0]], how)
                there.add(paths[place])
            _write_sheet(config, x, y, rows, paths, there)
            say(f"{sum(path in there for path in paths.values())} of {len(paths)} pictures")
    return config.output / "grid.png"


@dataclass(frozen=True)
class Setup:
    """What the cells are drawn from and with.

    mix: of all adapters; None where cells have a method, which merges them for each batch. told, brought: the metadata
    and new words of the adapters' files, by label. words: those of --embedding. named: their files, and what they are
    called.
    """

    config: Config
    base: Base
    adapters: Sequence[Adapter]
    mix: Mix | None
    told: Mapping[str, Mapping[str, str]]
    brought: Mapping[str, Vectors]
    words: Sequence[Words]
    named: Sequence[tuple[Path, list[str]]]


@contextmanager
def _prepared(
    config: Config,
    base: Base,
    adapters: Sequence[Adapter],
    embeddings: Sequence[tuple[str | None, Path]],
    *,
    is_merged: bool,
) -> Iterator[Setup]:
    """Within the block the base has the new words, and the mix unless cells merge the adapters by a method."""
    from sfumato.compose import compose
    from sfumato.words import embedding

    with ExitStack() as stack:
        words = [stack.enter_context(embedding.load(base, file, token)) for token, file in embeddings]
        named = [(file, list(each.tokens)) for each, (_, file) in zip(words, embeddings, strict=True)]
        mix = None
        if not is_merged:
            mix = stack.enter_context(compose(base, *adapters, partial=config.partial, words_known=True))
        told, brought = _in_files(mix, adapters, partial=config.partial)
        yield Setup(config, base, adapters, mix, told, brought, words, named)


def _notes(setup: Setup, cells: Sequence[Cell], embeddings: Sequence[tuple[str | None, Path]]) -> list[str]:
    """What of the words has no effect, and what was learned on another base. Raises ConfigError as `_checked`."""
    from sfumato.drawing.drawn import (
        changes_nothing,
        learned_otherwise,
        misread_words,
        unknown_words,
        unread_marks,
        unused_words,
    )
    from sfumato.files.header import read_header

    base, syntax = setup.base, setup.config.prompt_syntax
    texts = [cell.settings[name] for name in ("prompt", "negative") for cell in cells]
    learned = _checked(setup, cells)
    of_words = {token or file.name: read_header(file).metadata for token, file in embeddings}
    known = [token for some in (*(each.tokens for each in setup.words), *setup.brought.values()) for token in some]
    lines = [
        *unread_marks(texts, syntax),
        *unused_words(setup.named, texts, syntax),
        *unknown_words(texts, known, base),
    ]
    lines += changes_nothing(setup.mix) if setup.mix else []
    return [*lines, *misread_words(known, texts, syntax), *learned, *learned_otherwise(of_words, base)]


def _in_files(
    mix: Mix | None, adapters: Sequence[Adapter], *, partial: bool
) -> tuple[Mapping[str, Mapping[str, str]], Mapping[str, Vectors]]:
    """(metadata, new words) of the adapters' files, by label. mix: None where cells merge them by a method, which takes
    no whole model."""
    if mix is not None:
        return mix.metadata, mix.embeddings
    from sfumato.merging.merge import refuse_model
    from sfumato.merging.whole_model import read_mixable

    read = {each.label: read_mixable(each.path, partial=partial) for each in adapters}
    for label, file in read.items():
        refuse_model(label, file.changes)
    told = {label: file.metadata for label, file in read.items()}
    return told, {label: file.embeddings for label, file in read.items()}


def _against(setup: Setup, cell: Cell) -> Cell:
    """The cell with the negative prompt that its adapters' files ask for, where nothing else is asked for."""
    if cell.settings["negative"] is not None:
        return cell
    from sfumato.files.metadata import negatives_of

    texts = [text for label in cell.counted for text in negatives_of(setup.told[label])]
    asked = [escaped(text) if setup.config.prompt_syntax == "a1111" else text for text in texts]
    return replace(cell, settings={**cell.settings, "negative": negative_for(cell.settings["prompt"], asked)})


def _check_drawable(base: Base, rows: Sequence[Sequence[Cell]]) -> None:
    """Raises ConfigError for steps or samplers that the base does not have, before the first cell is drawn."""
    from sfumato.drawing.pictures import check_steps
    from sfumato.schedulers import scheduler

    to = [cell.settings for cells in rows for cell in cells]
    for steps in {each["steps"] for each in to}:
        check_steps(steps, base.scheduler)
    for sampler in {each["sampler"] for each in to} - {None}:
        scheduler(sampler, base.scheduler.config)


def _checked(setup: Setup, cells: Iterable[Cell]) -> list[str]:
    """What `learned_otherwise` says of the adapters that count in any cell.

    Raises ConfigError for a prompt that words make too long, those that are loaded or those that its adapters bring.
    """
    from sfumato.drawing.drawn import learned_otherwise

    together: dict[tuple[str, ...], list[Cell]] = {}
    for cell in cells:
        together.setdefault(cell.counted, []).append(cell)
    lines: dict[str, None] = {}
    for labels, some in together.items():
        with _words(setup, some[0]) as words:
            known = [*setup.words, *([] if words is None else [words])]
            for each in known if setup.config.prompt_syntax == "plain" else []:  # the others take prompts of any length
                each.check([cell.settings[name] for name in ("prompt", "negative") for cell in some])
            lines |= dict.fromkeys(learned_otherwise({label: setup.told[label] for label in labels}, setup.base))
    return list(lines)


def _words(setup: Setup, cell: Cell, *, quiet: bool = False) -> AbstractContextManager[Words | None]:
    """Within the block the words are in use that the cell's adapters bring; those at 0 bring none."""
    from sfumato.words.embedding import bundled

    found = {label: words for label, words in setup.brought.items() if label in cell.counted}
    return bundled(setup.base, found, partial=setup.config.partial, quiet=quiet)


def _draw(
    setup: Setup, rows: Sequence[Sequence[Cell]], places: Sequence[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], Image, Mapping[str, Any]]]:
    """The pictures of the cells, and how their adapters count; those that differ in prompt and seed alone in one
    batch."""
    from sfumato.command_line.where_when import WhereWhen
    from sfumato.compose.guided import adapter_guidance, strengths_of
    from sfumato.compose.steps import over_asked_steps
    from sfumato.drawing.pictures import draw

    together: dict[str, list[tuple[int, int]]] = {}
    for place in places:
        cell = rows[place[1]][place[0]]
        shared = {name: value for name, value in cell.settings.items() if name not in ("prompt", "seed")}
        together.setdefault(json.dumps([shared, dict(cell.weights)], sort_keys=True), []).append(place)
    for group in together.values():
        cells = [rows[row][column] for column, row in group]
        to = _filled(setup.base, cells[0])
        with (
            _applied(setup, cells[0]) as applied,
            _words(setup, cells[0], quiet=True),
            adapter_guidance(applied, to["adapter_guidance"], guidance=to["guidance"]),
            over_asked_steps(applied),
        ):
            pictures = draw(
                setup.base,
                [cell.settings["prompt"] for cell in cells],
                [cell.settings["seed"] for cell in cells],
                syntax=to.get("prompt_syntax", "plain"),
                **{name: to[name] for name in ("negative", "steps", "guidance", "sampler")},
            )
            strengths = strengths_of(applied, to["adapter_guidance"], guidance=to["guidance"])
            how = {"adapter_guidance": strengths, **WhereWhen().with_asked(applied.spans).told()}
        for place, picture in zip(group, pictures, strict=True):
            yield place, picture, how


def _filled(base: Base, cell: Cell) -> dict[str, Any]:
    """The cell's settings, with the family's defaults for those that are unset."""
    to = cell.settings
    guidance = base.defaults.guidance if to["guidance"] is None else to["guidance"]
    return {**to, "steps": to["steps"] or base.defaults.sampling_steps, "guidance": guidance}


def _applied(setup: Setup, cell: Cell) -> AbstractContextManager[Mix]:
    """A context that gives the mix, with the adapters as the cell has them."""
    if setup.mix is not None:
        setup.mix.set_weights(dict(cell.weights))
        return nullcontext(setup.mix)
    from sfumato.compose.by_method import by_method
    from sfumato.merging.factors import Budget
    from sfumato.merging.methods import Settings

    to = cell.settings
    settings = Settings(density=to.get("density", Settings.density))
    return by_method(
        setup.base,
        *_used(setup, cell),
        method=to["method"],
        settings=settings,
        budget=Budget(rank=to["rank"]),
        partial=setup.config.partial,
        words_known=True,
    )


def _used(setup: Setup, cell: Cell) -> tuple[Adapter, ...]:
    """The adapters with the weights that the cell gives them."""
    return tuple(Adapter(each.path, cell.weights[each.label], each.label) for each in setup.adapters)


def _digest(path: Path) -> str:
    """sha256 of a file as it is, metadata included, which say how it is drawn with; of peft's folder, of all in it."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def _save(setup: Setup, picture: Image, path: Path, cell: Cell, how: Mapping[str, Any]) -> None:
    from sfumato.drawing.drawn import of_base, sampler_label, save_drawn

    config, base = setup.config, setup.base
    settings = {
        **_filled(base, cell),
        "prompt_syntax": config.prompt_syntax,
        "embeddings": [public_embedding(spec) for spec in config.embedding],
        **how,
        "width": picture.width,
        "height": picture.height,
        **of_base(base, config.vae),
    }
    sampler = sampler_label(cell.settings["sampler"], base)
    save_drawn(picture, _used(setup, cell), settings, path, sampler, setup.named)


def _write_sheet(
    config: Config,
    x: Axis,
    y: Axis,
    rows: Sequence[Sequence[Cell]],
    paths: Mapping[tuple[int, int], Path],
    there: Collection[Path],
) -> None:
    """grid.png with the cells so far, and grid.json with what each cell is. there: the files that are drawn.

    The sheet's file has the first cell's settings, the axes, and what draws the whole of it again.
    """
    from sfumato.drawing.pnginfo import read_picture_info, save_picture
    from sfumato.drawing.sheet import contact_sheet, read_drawn
    from sfumato.files.atomic import write_text

    def read(path: Path) -> Image | None:
        return read_drawn(path) if path in there else None

    cells = [[read(paths[column, row]) for column in range(len(x.values))] for row in range(len(y.values))]
    sheet = contact_sheet(cells, row_labels=y.labels, column_labels=x.labels)
    about, asked = read_picture_info(paths[0, 0]).parameters, _public(config)
    if about is not None:
        axes = {"Script": "sfumato grid", "X axis": asked["x"], "Y axis": asked["y"]}
        about = replace(about, settings={**about.settings, **axes})
    save_picture(sheet, config.output / "grid.png", about, {"grid": asked})
    listed = [
        {"column": column, "row": row, "file": f"cells/{path.name}", "drawn": path in there,
         **rows[row][column].settings, "weights": dict(rows[row][column].weights)}
        for (column, row), path in sorted(paths.items())
    ]  # fmt: skip
    told = {"x": x.labels, "y": y.labels, "cells": listed}
    write_text(config.output / "grid.json", json.dumps(told, indent=1) + "\n")


def _public(config: Config) -> dict[str, Any]:
    """What was asked for beside the defaults, without the folders of files and what depends on the machine."""
    usual = {each.name: each.default for each in fields(Config)}
    given = {
        name: value for name, value in to_dict(config, public=True).items() if getattr(config, name) != usual[name]
    }
    for name in ("x", "y"):
        if given[name].startswith("adapter="):
            given[name] = re.sub(r"[^,=]*[\\/]", "", getattr(config, name))
    return {name: value for name, value in given.items() if name not in ("output", "device")}


def main(argv: Sequence[str]) -> int:
    """Draw the plot, print its path, return 0."""
    print(draw_grid(parse(Config, argv, program="grid")))
    return 0


if __name__ == "__main__":
    run(main)
