"""An XY plot: images over two settings, to choose from. It fills coarse to fine, and resumes after an interruption."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from sfumato.adapters.weights import Adapter, Weight, checked_weight, scale_unet_weight
from sfumato.cli import run
from sfumato.config import parse, to_dict
from sfumato.errors import ConfigError, DataError
from sfumato.generation.arguments.adapters import parse_adapters, parse_embedding, public_embedding, refuse_prompt_tags
from sfumato.generation.arguments.axes import CHECKS, PLAIN, Axis, coarse_to_fine, parse_axis
from sfumato.generation.arguments.base import DrawingBaseOptions
from sfumato.generation.arguments.images import parse_size
from sfumato.generation.xy_grid import GridCell, GridSetup, adapter_digest, check_drawable, fill_defaults, grid_setup
from sfumato.models.prompts.syntax import Syntax, checked_syntax
from sfumato.utils.atomic import checked_folder
from sfumato.utils.formatting import option_flag, pluralize, say

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True, kw_only=True)
class Config(DrawingBaseOptions):
    """Generate images over two settings as one labelled sheet (XY plot).

    Example: sfumato grid --lora line.safetensors --x line=0,0.5,1 --y "prompt=a crab|an owl" -o grid

    One row: sfumato grid --lora line.safetensors --x line=0,0.5,1 --prompt "a crab"

    Methods: sfumato grid --lora line.safetensors --lora otter.safetensors --x otter=0.5,0.75,1 --y method=linear,ties
    --prompt "an otter"
    """

    x: str
    """What varies from left to right: prompt=a crab|an owl; seed=1,2,3; LABEL=0,0.5,1 for an adapter's weight;
    adapter=a.safetensors,runs/*.safetensors for one adapter after another; method=linear,ties,np-lora to merge the
    adapters by each method, as sfumato merge does. Also density (of a method), negative, steps, guidance,
    adapter_guidance, sampler."""
    y: str | None = None
    """What varies from top to bottom, in the same form. Unset: nothing does, and the sheet has one row."""
    lora: tuple[str, ...] = ()
    """Adapter and its weight, FILE:0.8, as for sfumato generate. Repeat the option to mix several."""
    method: str | None = None
    """Merge the adapters into one by this method of sfumato merge, unless an axis varies it: linear, ties, dare,
    magnitude, np-lora, ... For np-lora the first --lora is the style. Unset: the adapters are summed."""
    density: float | None = None
    """Share of the entries that ties, dare, dare-ties, magnitude, knots and core-space keep. Unset: 0.5."""
    rank: int | None = None
    """Largest rank of each module that a method merges. Unset: the sum of the adapters' ranks."""
    embedding: tuple[str, ...] = ()
    """Load a textual inversion embedding, a new word for prompts: FILE or TOKEN=FILE, local or on the hub. Repeat the
    option for several."""
    adapter_weight: float = 1.0
    """Weight of adapters on an axis adapter=... that have none of their own (FILE:0.8)."""
    prompt: str | None = None
    """Prompt, unless an axis varies it."""
    prompt_syntax: Syntax = "plain"
    """Syntax of all prompts, as for sfumato generate. With a1111 a | in brackets belongs to the prompt, and a | outside
    brackets separates prompts: prompt=a [red|blue] crab|an owl is two prompts."""
    seed: int | None = None
    """Seed of the noise, unless an axis varies it. Unset: 0."""
    output: Annotated[Path, Parameter(alias="-o")] = Path("grid")
    """Folder for grid.png, grid.json, and cells/ with all images and their settings. Cells that exist are kept; the
    sheet of an earlier plot is replaced."""
    negative: str | None = None
    """Negative prompt: what the images should not show. Unset: what an adapter's file asks for, as for sfumato
    generate."""
    steps: int | None = None
    """Number of sampling steps. Unset: the base family's default."""
    guidance: float | None = None
    """Guidance scale (CFG scale): how strongly the prompt is followed. Unset: the base family's default."""
    adapter_guidance: float | None = None
    """Adapter guidance, as for sfumato generate. Unset: what each adapter's file asks for."""
    sampler: str | None = None
    """Sampler, by name. Unset: the base family's default."""
    partial: bool = False
    """Apply the part of an adapter that fits if the rest does not."""
    size: str | None = None
    """Size in pixels: WIDTHxHEIGHT, or one number for a square. Unset: the size that the base model was trained on."""


def with_rows(config: Config) -> Config:
    """The config with a --y. One that has none gets that of its seed, or of its prompt where --x varies seeds."""
    if config.y is not None:
        return config
    if not config.x.startswith("seed="):
        return replace(config, y=f"seed={config.seed or 0}", seed=None)
    if "|" in (config.prompt or "|"):
        raise ConfigError('there is no --y; give what varies from top to bottom, such as --y "prompt=a crab|an owl".')
    return replace(config, y=f"prompt={config.prompt}", prompt=None)


def plan(config: Config) -> tuple[Axis, Axis, list[Adapter], list[list[GridCell]]]:
    """The axes, all adapters, and the cells row by row. Raises ConfigError before anything heavy is loaded."""
    config = with_rows(config)
    assert config.y is not None
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
    for where, texts, is_negative in _prompts(config, x, y):
        for text in texts:
            checked_syntax(refuse_prompt_tags(text, where), config.prompt_syntax, is_negative=is_negative)
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
    for side, axis in sides:
        if axis.kind in PLAIN and getattr(config, axis.kind) is not None:
            option = option_flag(axis.kind)
            raise ConfigError(f"--{side} varies {axis.kind}, so that {option} has no effect; leave it out.")
    return x, y, adapters, rows


def _cell(
    config: Config,
    weights: Mapping[str, Weight],
    extra: Mapping[tuple[str, str], Adapter],
    at: Mapping[str, tuple[Axis, Any]],
) -> GridCell:
    """The cell at these values of the axes. weights: used unless an axis varies them. extra: adapters of the axes, by
    side and value. at: by side, its axis and the value."""
    settings = {name: getattr(config, name) for name in PLAIN} | {"seed": config.seed or 0}
    if config.prompt_syntax != "plain":  # so that cells that were drawn without the option are known again
        settings["prompt_syntax"] = config.prompt_syntax
    if config.size is not None:
        settings["size"] = list(parse_size(config.size))
    own = dict(weights)
    for side, (axis, value) in at.items():
        if axis.kind == "weight":
            own[axis.label] = scale_unet_weight(axis.label, weights[axis.label], value)
        elif axis.kind == "adapter":
            adapter = extra[side, value]
            own[adapter.label] = adapter.weight
        else:
            settings[axis.kind] = value
    return GridCell(_with_method(settings, config.rank), own)


def _check_axes(config: Config, x: Axis, y: Axis, adapters: Sequence[Adapter]) -> None:
    if (x.kind, x.label) == (y.kind, y.label) and x.kind != "adapter":
        raise ConfigError(f"--x and --y both vary {x.label or x.kind}; give them different settings.")
    if config.prompt is None and "prompt" not in (x.kind, y.kind):
        raise ConfigError('there is no prompt; give --prompt, or an axis such as --y "prompt=a crab|an owl".')
    if config.adapter_weight != Config.adapter_weight and "adapter" not in (x.kind, y.kind):
        raise ConfigError(
            f"--adapter-weight {config.adapter_weight:g}: no axis is adapter=...; a --lora has its weight as FILE:0.8."
        )
    is_guided = config.adapter_guidance is not None or "adapter_guidance" in (x.kind, y.kind)
    if is_guided and not adapters and "adapter" not in (x.kind, y.kind):
        raise ConfigError("adapter guidance: there is no adapter that it could count for; give --lora FILE:0.8.")


def _prompts(config: Config, x: Axis, y: Axis) -> Iterator[tuple[str, Sequence[str], bool]]:
    """Each place where prompts stand, the prompts there, and whether they are negative ones."""
    yield "--prompt", [config.prompt] if config.prompt is not None else [], False
    yield "--negative", [config.negative or ""], True
    for name, axis in (("--x", x), ("--y", y)):
        if axis.kind in ("prompt", "negative"):
            yield name, axis.values, axis.kind == "negative"


def _check_method(config: Config, x: Axis, y: Axis, adapters: Sequence[Adapter]) -> None:
    if config.rank is not None and config.rank < 1:
        raise ConfigError(f"--rank {config.rank}: wanted at least 1.")
    kinds = (x.kind, y.kind)
    methods = next((set(axis.values) for axis in (x, y) if axis.kind == "method"), {config.method} - {None})
    if config.rank is not None and not methods:
        raise ConfigError("--rank is of a merging method; give --method ties, or --x method=ties,dare.")
    if config.density is not None or "density" in kinds:
        from sfumato.merging.methods import METHOD_SETTINGS

        if methods.isdisjoint(METHOD_SETTINGS["density"]):
            raise ConfigError(
                "--density is of a merging method that thins out; give --method ties, or --x method=ties,dare."
            )
    if not methods:
        return
    if not adapters and "adapter" not in kinds:
        raise ConfigError("a method wants adapters to merge; give --lora FILE:0.8, twice or more.")


def _with_method(settings: dict[str, Any], rank: int | None) -> dict[str, Any]:
    """The settings of a cell. Settings of a merging method are kept only if the cell has a method that takes them."""
    method, density = settings.pop("method"), settings.pop("density")
    if method is None:
        return settings
    from sfumato.merging.methods import METHOD_SETTINGS, MethodSettings

    settings |= {"method": method, "rank": rank}
    if method not in METHOD_SETTINGS["density"]:
        return settings
    return settings | {"density": MethodSettings.density if density is None else density}


def draw_grid(config: Config) -> Path:
    """Generate the cells that are missing. Returns the path of the sheet."""
    config = with_rows(config)
    x, y, adapters, rows = plan(config)
    _refuse_others(config.output)
    embeddings = [parse_embedding(spec) for spec in config.embedding]

    from sfumato.generation.notes import requested_negative_notes, unguided_notes
    from sfumato.utils.image_grid import read_image_or_none

    base = config.load_base()
    check_drawable(base, rows)
    in_full = [fill_defaults(base, cell) for cell in chain(*rows)]
    say(*unguided_notes((to["guidance"], to["negative"] or "", bool(to["adapter_guidance"])) for to in in_full))
    # Before anything is mixed in: what a cell's name is made of.
    loaded = [base.quick_fingerprint(), str(base.precision.compute), str(base.clip_skip), str(config.partial)]
    loaded += [f"{base.max_tokens} tokens"] if base.max_tokens else []  # so that the others' names stay
    files = {adapter.label: adapter_digest(Path(adapter.path)) for adapter in adapters}
    digests = [(token or file.stem, adapter_digest(file)) for token, file in embeddings]
    is_merged = "method" in rows[0][0].settings  # then all cells have one
    with grid_setup(
        base, adapters, embeddings, is_merged=is_merged, syntax=config.prompt_syntax, partial=config.partial
    ) as setup:
        rows = [[setup.with_requested_sampling(cell) for cell in cells] for cells in rows]
        say(*setup.requested_sampling_notes(chain(*rows)))
        check_drawable(base, rows)
        given, rows = rows, [[setup.with_requested_negative(cell) for cell in cells] for cells in rows]
        both = zip(chain(*given), chain(*rows), strict=True)
        say(
            *requested_negative_notes(new.settings["negative"] for old, new in both if old.settings["negative"] is None)
        )
        paths = {
            (column, row): config.output / "cells" / f"{cell.key(loaded, files, digests)}.png"
            for row, cells in enumerate(rows)
            for column, cell in enumerate(cells)
        }
        say(*setup.notes(list(chain(*rows)), embeddings))
        there = {path for path in paths.values() if read_image_or_none(path) is not None}
        for cells in coarse_to_fine(len(x.values), len(y.values)):
            missing = [place for place in cells if paths[place] not in there]
            for place, picture, how in setup.draw(rows, missing):
                _save(config, setup, picture, paths[place], rows[place[1]][place[0]], how)
                there.add(paths[place])
            _write_sheet(config, x, y, rows, paths, there)
            say(f"{sum(path in there for path in paths.values())} of {pluralize(len(paths), 'image')}")
    return config.output / "grid.png"


def _refuse_others(folder: Path) -> None:
    """Raise ConfigError if grid.png or grid.json exist and belong to no plot."""
    from sfumato.generation.metadata.png_info import read_picture_info

    sheet, listed = folder / "grid.png", folder / "grid.json"
    try:
        is_ours = not listed.exists() or {"x", "y", "cells"} <= json.loads(listed.read_bytes()).keys()
        is_ours = is_ours and (not sheet.exists() or "grid" in (read_picture_info(sheet).own or {}))
    except (OSError, ValueError, AttributeError, RecursionError, DataError):
        is_ours = False
    if not is_ours:
        raise ConfigError(f"{folder} holds a grid.png or grid.json of something else; name another folder.")


def _save(config: Config, setup: GridSetup, picture: Image, path: Path, cell: GridCell, how: Mapping[str, Any]) -> None:
    from sfumato.generation.settings import base_settings, sampler_label, save_with_settings

    base = setup.base
    settings = {
        **{name: value for name, value in fill_defaults(base, cell).items() if name != "size"},
        "prompt_syntax": config.prompt_syntax,
        "embeddings": [public_embedding(spec) for spec in config.embedding],
        **how,
        "width": picture.width,
        "height": picture.height,
        **base_settings(base, config.vae),
        "options": config.drawn_with(partial=config.partial),
    }
    sampler = sampler_label(cell.settings["sampler"], base)
    used = [adapter for adapter in setup.adapters_at(cell) if adapter.label in cell.counted]
    save_with_settings(picture, used, settings, path, sampler, setup.named)


def _write_sheet(
    config: Config,
    x: Axis,
    y: Axis,
    rows: Sequence[Sequence[GridCell]],
    paths: Mapping[tuple[int, int], Path],
    there: Collection[Path],
) -> None:
    """Write grid.png with the cells so far, and grid.json with what each cell is. there: the files that exist.

    The sheet's file contains the settings of the first cell, the axes, and what generates the whole sheet again.
    """
    from sfumato.generation.metadata.png_info import read_picture_info, save_picture
    from sfumato.utils.atomic import write_text
    from sfumato.utils.image_grid import contact_sheet, read_image_or_none, shrink_for_sheet

    def read(path: Path) -> Image | None:
        picture = read_image_or_none(path) if path in there else None
        return None if picture is None else shrink_for_sheet(picture, max(picture.size), len(paths))

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
    """The options that differ from the defaults, without folders of files and without what depends on the machine."""
    usual = {each.name: each.default for each in fields(Config)}
    given = {
        name: value for name, value in to_dict(config, public=True).items() if getattr(config, name) != usual[name]
    }
    for name in ("x", "y"):
        if given[name].startswith("adapter="):
            given[name] = re.sub(r"[^,=]*[\\/]", "", getattr(config, name))
    return {name: value for name, value in given.items() if name not in ("output", "device", "offload")}


def main(argv: Sequence[str]) -> int:
    """Generate the plot, print its path, return 0."""
    print(draw_grid(parse(Config, argv, program="grid")))
    return 0


if __name__ == "__main__":
    run(main)
