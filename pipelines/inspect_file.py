"""Look into an adapter file, a whole model, or the settings inside an image."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from sfumato.cli import run
from sfumato.config import parse
from sfumato.files.inspect import inspect_file, render
from sfumato.generation.metadata import redraw
from sfumato.models import inspect as inspect_model

_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Config:
    """Look into an adapter file: family, kinds, targets, ranks, alphas, norms per block, trigger words, hashes.

    Reads LoRA, LoCon, DoRA, LoHa, LoKr, IA3, OFT, BOFT, GLoRA and full differences, as named by kohya, LyCORIS,
    diffusers, peft, OneTrainer and ai-toolkit. For a whole model it shows family, prediction type, parts and their
    number formats. For an image it shows the settings that A1111, Forge, ComfyUI, InvokeAI or sfumato wrote into it,
    and the command that generates it again.

    Example: sfumato inspect line.safetensors
    """

    file: Path
    """The .safetensors file, a folder of peft or diffusers, or an image. For anything else it says what the file is."""
    _: KW_ONLY
    json: bool = False
    """Print JSON for other programs, including the metadata."""


def main(argv: Sequence[str]) -> int:
    """Print what the file contains. Returns 0 if it could be read."""
    config = parse(Config, argv, program="inspect")
    if config.file.suffix.lower() in _PICTURES and config.file.is_file():
        about = redraw.redraw(config.file)
        print(json.dumps(about.to_dict(), indent=2) if config.json else redraw.render(about))
        return 0
    found = inspect_model.inspect_model(config.file) or inspect_file(config.file)
    text = inspect_model.render(found) if isinstance(found, inspect_model.ModelInspection) else render(found)
    print(json.dumps(found.to_dict(), indent=2) if config.json else text)
    return 0


if __name__ == "__main__":
    run(main)
