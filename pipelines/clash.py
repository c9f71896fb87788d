"""Where adapters conflict, computed from their files before any image is generated."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.config import TypedConfig, parse
from sfumato.errors import ConfigError
from sfumato.generation.arguments.adapters import parse_adapters
from sfumato.utils.atomic import check_overwrite
from sfumato.utils.formatting import escape_control

if TYPE_CHECKING:
    from sfumato.merging.overlap import Pair


@dataclass(frozen=True)
class Config(TypedConfig):
    """Show, block by block, how many input and output directions adapters share, and where their changes conflict.

    Example: sfumato clash line.safetensors otter.safetensors -o clash.png
    """

    adapters: tuple[str, ...] = ()
    """Two or more adapters: FILE, FILE:0.8, LABEL=FILE:0.8."""
    _: KW_ONLY
    output: Annotated[Path | None, Parameter(alias="-o")] = None
    """PNG file for a heat map of conflict and overlap, with a row for each pair of adapters and a column for each
    block."""
    blocks: tuple[str, ...] = ()
    """Modules to compare: up, down.1, mid, attn2, te, !up.0, ..., separated by commas; LABEL=... for one adapter.
    Repeat the option for several."""
    json: bool = False
    """Print JSON."""
    overwrite: bool = False
    """Replace an image file that exists."""


def clash(config: Config) -> list[Pair]:
    """The figures of every pair and block. Writes the heat map if one is asked for."""
    if len(config.adapters) < 2:
        raise ConfigError("wanted two adapters or more: sfumato clash a.safetensors b.safetensors.")
    if config.output is not None and config.output.suffix.lower() != ".png":
        raise ConfigError(f"--output {config.output}: wanted a .png.")
    if config.output is not None:
        check_overwrite(config.output, config.overwrite)
    adapters = parse_adapters(config.adapters)

    from sfumato.merging.overlap import clashes
    from sfumato.merging.sources import choose_blocks, common_family, read_sources

    sources, parents = read_sources(adapters, words=True)
    common_family(parents, default="")
    pairs = clashes(choose_blocks(sources, config.blocks))
    if config.output is not None:
        from sfumato.merging.overlap import heat_map

        heat_map(pairs, config.output)
    return pairs


def table(pairs: Sequence[Pair]) -> str:
    """The figures as lines of text, with a heading for each pair of adapters."""
    from sfumato.merging.overlap import conflict_by_pair

    width = max(len(pair.block) for pair in pairs)
    lines = []
    for (first, second), conflict in conflict_by_pair(pairs).items():
        lines += ["", f"{first} and {second}: {conflict:.1%} of the energy in conflict"]
        lines.append(f"{'block':<{width}}  modules  cosine  inputs  outputs  angles      conflict")
        for pair in pairs:
            if (pair.first, pair.second) == (first, second):
                angles = f"{pair.row_angle:.0f}/{pair.column_angle:.0f} deg"
                lines.append(
                    f"{pair.block:<{width}}  {pair.modules:>7}  {pair.cosine:>6.2f}  {pair.rows:>6.1%}  "
                    f"{pair.columns:>7.1%}  {angles:<10}  {pair.conflict:>8.2%}"
                )
    return "\n".join(map(escape_control, lines[1:]))


def main(argv: Sequence[str]) -> int:
    """Report as the arguments say. Returns 0 if the files could be read."""
    config = parse(Config, argv, program="clash")
    pairs = clash(config)
    print(json.dumps([asdict(pair) for pair in pairs], indent=2) if config.json else table(pairs))
    if config.output is not None:
        print(config.output, file=sys.stderr)
    return 0


if __name__ == "__main__":
    run(main)
