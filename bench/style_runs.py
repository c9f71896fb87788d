"""Adapters learned by the shipped recipes and the pictures they draw, kept on disk, for bench/style_fidelity.py.

Each thing's file is named by a hash of what it was made from, so an interrupted bench takes up where it was. The
trainer's own code is not in the hash: after changing it, give another folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato import Adapter, cli, compose
from sfumato.bases import Base
from sfumato.drawing import draw
from sfumato.errors import RunError
from sfumato.files.atomic import atomic_path

CONFIGS = Path(__file__).parents[1] / "trainers/configs"
POCKET = Path(__file__).parents[1] / "src/sfumato/pocket"


@dataclass(frozen=True)
class Workshop:
    """Learns and draws with one base; whatever is in `folder` already is not made again."""

    folder: Path
    base_name: str
    base: Base

    def learn(
        self, name: str, recipe: str, pictures: Mapping[str, Path], captions: Mapping[str, str], options: Sequence[str]
    ) -> Path:
        """Train by the shipped config as a person would, and return the adapter's path.

        pictures: file name -> picture. captions: file name -> caption; those without one are named by their file.
        options: further words of the command line.
        """
        told = [recipe, (CONFIGS / recipe).read_text("utf-8"), self._base_bytes(), list(captions.items()), *options]
        told += [[file, hashlib.sha256(path.read_bytes()).hexdigest()] for file, path in pictures.items()]
        folder = self.folder / f"{name}-{_hash(told)}"
        adapter = folder / "run" / "run.safetensors"
        if adapter.exists():
            return adapter
        shutil.rmtree(folder, ignore_errors=True)
        images = folder / "images"
        images.mkdir(parents=True)
        for file, path in pictures.items():
            shutil.copy(path, images / file)
            if file in captions:
                (images / file).with_suffix(".txt").write_text(captions[file], encoding="utf-8")
        words = ["train", "lora", str(CONFIGS / recipe), "--images", str(images), "--output", str(folder / "run")]
        words += ["--base", self.base_name, "--sample-every", "0", "--measure-every", "0", *options]
        if cli.main(words):
            raise RunError(f"{name}: the training failed; the lines above say why.")
        return adapter

    def drawn(self, name: str, prompts: Sequence[str], seeds: Sequence[int], weights: Mapping[Path, float]) -> Tensor:
        """(n, 3, h, w) uint8 pictures by `sfumato generate`'s settings, with adapters at these weights."""
        told = [list(prompts), list(seeds), self._base_bytes()]
        told += [[hashlib.sha256(path.read_bytes()).hexdigest(), weight] for path, weight in weights.items()]

        def make() -> Tensor:
            adapters = [Adapter(path, weight, f"a{i}") for i, (path, weight) in enumerate(weights.items())]
            if not adapters:
                return self._draw(prompts, seeds)
            with compose(self.base, *adapters):
                return self._draw(prompts, seeds)

        return self._kept(f"{name}-{_hash(told)}", make)

    def _draw(self, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
        return torch.stack([to_tensor(picture) for picture in draw(self.base, list(prompts), list(seeds))])

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            pictures = make()
            with atomic_path(path) as temporary:
                save_file({"pictures": pictures}, temporary)
        return load_file(path)["pictures"]

    def _base_bytes(self) -> str:
        folder = POCKET if self.base_name == "pocket" else Path(self.base_name)
        if not folder.exists():
            return self.base_name
        files = sorted(folder.rglob("*.safetensors")) if folder.is_dir() else [folder]
        return _hash([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)
