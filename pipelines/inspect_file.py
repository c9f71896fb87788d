"""What an adapter file of any kind holds: family, kinds, targets, ranks, norms per block, trigger words, hashes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.cli import run
from sfumato.config import parse
from sfumato.files.inspect import inspect_file, render


@dataclass(frozen=True)
class Config:
    """Look into an adapter file: family, kinds, targets, ranks, alphas, norms per block, trigger words, hashes.

    LoRA, LoCon, DoRA, LoHa, LoKr, IA3, OFT, BOFT, GLoRA and full differences, in the spellings of kohya, LyCORIS,
    diffusers, peft, OneTrainer and ai-toolkit.

    Example: sfumato inspect line.safetensors
    """

    file: Path
    """The .safetensors file, or peft's folder. Anything else is refused with a word on what it really is."""
    json: bool = False
    """Print JSON, metadata included, for other programs."""


def main(argv: Sequence[str]) -> int:
    """Print what the file holds; 0 if it could be read."""
    config = parse(Config, argv, program="inspect")
    found = inspect_file(config.file)
    print(json.dumps(found.to_dict(), indent=2) if config.json else render(found))
    return 0


if __name__ == "__main__":
    run(main)
