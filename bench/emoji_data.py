"""The pictures that the benches of styles, subjects and priors learn from and are judged on, out of seven emoji sets.

    python -m bench.emoji_data --out emoji

writes emoji/pictures/STYLE/CONCEPT.png, for --data, and emoji/subjects/CONCEPT/STYLE.png, for --subjects, 64 px on
white. Four of the styles are the pocket base's; glossy, joypixels and openmoji are what it has not seen, and nor has it
the subjects. `--further` adds four styles by which no recipe was chosen. Needs `npm` and the PyPI package `resvg-py`,
as `bench.pocket_data` does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.pocket_data import KEPT_FOR_SUBJECTS, SOURCES, Source, fetch, render, resolve
from sfumato import cli
from sfumato.config import parse

STYLES: Mapping[str, Source] = {
    **SOURCES,
    "glossy": Source("@iconify-json/fluent-emoji", "1.2.7", "MIT"),
    "joypixels": Source("@iconify-json/emojione", "1.2.3", "CC-BY-4.0"),
    "openmoji": Source("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0"),
}
"""Style name -> where its drawings come from."""

FURTHER: Mapping[str, Source] = {
    "emojione-v1": Source("@iconify-json/emojione-v1", "1.2.3", "CC-BY-SA-4.0"),
    "fxemoji": Source("@iconify-json/fxemoji", "1.2.2", "Apache-2.0"),
    "high-contrast": Source("@iconify-json/fluent-emoji-high-contrast", "1.2.6", "MIT"),
    "streamline": Source("@iconify-json/streamline-emojis", "1.2.4", "CC-BY-4.0"),
}
"""Styles by which no recipe was chosen, of fewer drawings."""

OF_SUBJECTS = ("noto", "twemoji", "flat", "openmoji")
"""The styles in which the subjects are drawn: two to learn from, one to ask for, one more."""

CONCEPTS = Path(__file__).with_name("emoji_concepts.txt")
SIZE_PX = 64


@dataclass(frozen=True)
class Config:
    """Draw the pictures for the benches of styles, subjects and priors."""

    out: Path = Path("emoji")
    """Folder that receives pictures/STYLE/CONCEPT.png and subjects/CONCEPT/STYLE.png."""
    packages: Path | None = None
    """Folder with the packages' .tgz files; fetched there where one is missing. Default: OUT/npm."""
    further: bool = False
    """Draw four more styles, by which no recipe was chosen. Fewer concepts are in all styles then, so give them an
    --out of their own."""


def build(config: Config) -> Path:
    """Draw everything and return the folder; a concept that a set lacks is left out of its style."""
    concepts = CONCEPTS.read_text(encoding="utf-8").split()
    for style, source in {**STYLES, **(FURTHER if config.further else {})}.items():
        icons = fetch(source, config.packages or config.out / "npm")
        for concept in concepts:
            _draw(icons, concept, config.out / "pictures" / style / f"{concept}.png")
        for concept in sorted(KEPT_FOR_SUBJECTS) if style in OF_SUBJECTS else ():
            _draw(icons, concept, config.out / "subjects" / concept / f"{style}.png")
    return config.out


def _draw(icons: Mapping[str, Any], concept: str, path: Path) -> None:
    icon = resolve(icons, concept)
    if icon is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(render(icons, icon, SIZE_PX, Image.Resampling.LANCZOS))


def main(argv: Sequence[str]) -> None:
    """Run the program; prints the folder and how many pictures it holds."""
    folder = build(parse(Config, argv, program="bench.emoji_data"))
    print(f"{folder}: {sum(1 for _ in folder.rglob('*.png'))} pictures")


if __name__ == "__main__":
    cli.run(main)
