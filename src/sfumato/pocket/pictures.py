"""The pictures that the pocket base is trained on, as bench/pocket_data.py lays them out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sfumato.errors import DataError


@dataclass(frozen=True)
class Pictures:
    """What is trained on: pixels (n, 3, h, w) uint8, and a (concept, style) for each; ("", "") for a nameless one."""

    pixels: Tensor
    names: list[tuple[str, str]]

    def floats(self, indices: Sequence[int] | Tensor) -> Tensor:
        """(b, 3, h, w) in [-1, 1]."""
        return self.pixels[indices].float() / 127.5 - 1

    def named(self) -> Pictures:
        """Those that have a name."""
        places = [i for i, name in enumerate(self.names) if name != ("", "")]
        return Pictures(self.pixels[places], [self.names[i] for i in places])

    def mirrored(self) -> Pictures:
        """The same, left for right."""
        return Pictures(self.pixels.flip(3), self.names)


def read_pictures(data: Path, *, others: bool, withheld: bool = False) -> Pictures:
    """The named pictures that may be trained on (or, if `withheld`, those that may not), and the nameless `others`."""
    manifest = read_manifest(data)
    hidden = {tuple(cell) for cell in manifest["withheld"]}
    cells = [(c, s) for s in manifest["styles"] for c in manifest["concepts"] if ((c, s) in hidden) == withheld]
    paths = [data / style / f"{concept.replace(' ', '-')}.png" for concept, style in cells]
    if others:
        nameless = sorted((data / "other").rglob("*.png"))
        paths, cells = paths + nameless, cells + [("", "")] * len(nameless)
    arrays = [np.asarray(Image.open(path).convert("RGB")) for path in paths]
    return Pictures(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous(), cells)


def read_manifest(data: Path) -> dict[str, Any]:
    """The manifest of a folder that bench/pocket_data.py built; raises DataError where there is none."""
    path = data / "manifest.json"
    if not path.exists():
        raise DataError(f"{path} is missing; build the pictures with python -m bench.pocket_data --out {data}.")
    manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return manifest
