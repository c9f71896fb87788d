"""The sheet of learned styles in docs/styles.md: some of the pictures of `bench.style_fidelity`, beside the true ones.

    python -m bench.style_sheet --data EMOJI --styles high-contrast --styles fxemoji --work WORK --out docs/styles.png

What the folder --work has of that bench is not learned again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from bench.mixing_sheets import save_small
from bench.style_fidelity import Config as Bench
from bench.style_fidelity import draw_run, read_real
from bench.style_runs import Workshop
from sfumato import cli, load_base
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.precision import decide
from sfumato.utils.image_grid import contact_sheet


@dataclass(frozen=True, kw_only=True)
class Config:
    """Draw the sheet of learned styles."""

    data: Path
    """Folder of STYLE/CONCEPT.png, as of bench.style_fidelity."""
    styles: tuple[str, ...]
    """The styles, two rows each: learned, true. Repeat it for several."""
    seed: int = 0
    """The training seed."""
    columns: int = 12
    """Concepts, the first of those that the bench draws."""
    concepts: int = 70
    """As of bench.style_fidelity, whose pictures are taken, and so those below."""
    images: int = 16
    """Pictures to learn from."""
    style_options: tuple[str, ...] = ()
    """Other settings of the style's recipe."""
    base: str = "pocket"
    """The base that learns."""
    work: Path = Path(".cache/style_fidelity")
    """That bench's --work."""
    limit_kib: int = 400
    """Largest size of the file; colors are made fewer until it fits."""
    out: Path = Path("docs/styles.png")
    """The sheet's file."""


def make_sheet(config: Config) -> Path:
    """Learn and draw what is not there yet, and write the sheet; returns its file."""
    if not 1 <= config.columns <= config.concepts:
        raise ConfigError(f"--columns is {config.columns}; it must be 1 to the {config.concepts} of --concepts.")
    same = ("data", "styles", "concepts", "images", "style_options", "base", "work")
    bench = Bench(**{name: getattr(config, name) for name in same})
    pictures, _ = read_real(bench)
    workshop = Workshop(config.work, bench.base, load_base(bench.base, precision=decide("fp32")))
    runs = [draw_run(bench, workshop, pictures, style, config.seed, {}) for style in config.styles]
    rows = [("base", runs[0].before)]
    for run in runs:
        rows += [(f"{run.style}, learned", run.after), (f"{run.style}, true", run.true.pixels)]
    sheet = contact_sheet([_images(row[: config.columns]) for _, row in rows], row_labels=[label for label, _ in rows])
    save_small(sheet, config.out, config.limit_kib * 1024)
    return config.out


def _images(pixels: Tensor) -> list[Image.Image]:
    """(n, 3, h, w) uint8."""
    return [Image.fromarray(each.permute(1, 2, 0).numpy()) for each in pixels]


def main(argv: Sequence[str]) -> None:
    """Run the program; prints the file."""
    print(make_sheet(parse(Config, argv, program="bench.style_sheet")))


if __name__ == "__main__":
    cli.run(main)
