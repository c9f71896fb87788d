"""Adapters and words that the shipped recipes learn, and the pictures they draw, kept on disk for the benches.

Each thing's file is named by a hash of what it was made from, so an interrupted bench takes up where it was; the
training that was cut short begins anew. The folder says which code made it, and is refused once the library or the
trainers do otherwise: what other code drew would stand beside what this draws.
"""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfumato
from sfumato import Adapter, cli, compose
from sfumato.adapters.embeddings import embedding
from sfumato.adapters.weights import parse_span
from sfumato.compose import adapter_guidance
from sfumato.data.preparation.latents import to_float
from sfumato.errors import ConfigError, RunError
from sfumato.generation.draw import draw_against
from sfumato.generation.placement import AdapterPlacement, placement_applied
from sfumato.models import Base
from sfumato.models.prompts.syntax import Syntax
from sfumato.utils.atomic import atomic_path, write_text

ROOT = Path(__file__).parents[1]
CONFIGS = ROOT / "trainers/configs"
DREAMBOOTH = {"lora": "dreambooth-subject.toml", "full": "dreambooth-subject-full.toml"}
"""The recipes of the DreamBooth trainer by --method."""


@dataclass(frozen=True)
class Learned:
    """What a training left: the adapter, new words, or both; in how many minutes, by the clock and of the processor."""

    adapter: Path | None
    words: tuple[Path, ...]
    minutes: float
    cpu_minutes: float

    @property
    def files(self) -> tuple[Path, ...]:
        return (*([self.adapter] if self.adapter else []), *self.words)

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


@dataclass(frozen=True)
class Workshop:
    """Learns and draws with one base; whatever is in `folder` already is not made again.

    Raises ConfigError where other code made that.
    """

    folder: Path
    base_name: str
    base: Base

    def __post_init__(self) -> None:
        record, code = self.folder / "code.txt", f"sfumato {sfumato.__version__}, code {code_hash()}"
        found = record.read_text("utf-8").strip() if record.exists() else code
        if found != code:
            raise ConfigError(
                f"{self.folder}: made by {found}; this is {code}. Give another folder with --work, or delete {record} "
                "if what has changed since makes no difference to what is kept."
            )
        write_text(record, code + "\n")

    def learn(
        self,
        name: str,
        program: str,
        recipe: str,
        pictures: Mapping[str, Path],
        captions: Mapping[str, str],
        options: Sequence[str],
    ) -> Learned:
        """Train by the program and its shipped config as a person would.

        pictures: file name -> picture. captions: file name -> caption; those without one are named by their file.
        options: further words of the command line. Class pictures are shared by all trainings of the folder.
        """
        text = (CONFIGS / recipe).read_text("utf-8")
        told = [program, recipe, text, self.base.fingerprint(), list(captions.items()), *options]
        told += [[file, hashlib.sha256(path.read_bytes()).hexdigest()] for file, path in pictures.items()]
        folder = self.folder / f"{name}-{_hash(told)}"
        if not (folder / "learned.json").exists():
            shutil.rmtree(folder, ignore_errors=True)
            images = folder / "images"
            images.mkdir(parents=True)
            for file, path in pictures.items():
                shutil.copy(path, images / file)
                if file in captions:
                    (images / file).with_suffix(".txt").write_text(captions[file], encoding="utf-8")
            words = ["train", program, str(CONFIGS / recipe), "--images", str(images), "--output", str(folder / "run")]
            words += ["--base", self.base_name, "--sample-every", "0", "--measure-every", "0"]
            words += ["--class-cache", str(self.folder / "class")] if program == "dreambooth" else []
            began, began_cpu = time.perf_counter(), time.process_time()
            if cli.main([*words, "--checkpoint-every", "0", *options]):
                raise RunError(f"{name}: the training failed; the lines above say why.")
            took = {"minutes": time.perf_counter() - began, "cpu_minutes": time.process_time() - began_cpu}
            took = {unit: round(seconds / 60, 3) for unit, seconds in took.items()}
            write_text(folder / "learned.json", json.dumps(took) + "\n")
        files = sorted((folder / "run").glob("*.safetensors"))
        adapter = None if program == "textual_inversion" else folder / "run" / "run.safetensors"
        took = json.loads((folder / "learned.json").read_text("utf-8"))
        return Learned(adapter, tuple(file for file in files if file != adapter), **took)

    def drawn(
        self,
        name: str,
        prompts: Sequence[str],
        seeds: Sequence[int],
        weights: Mapping[Path, float],
        words: Sequence[Path] = (),
        syntax: Syntax = "plain",
        span: str | None = None,
        guidance: float | None = None,
        strength: float | None = None,
    ) -> Tensor:
        """(n, 3, h, w) uint8 pictures by `sfumato generate`'s settings, with these adapters, weights and words.

        span: START-END, the steps in which the adapters count. None: those that their files ask for. guidance: the
        scale. None: the base's. strength: the adapters' guidance. None: what their files ask for.
        """
        told = [list(prompts), list(seeds), self.base.fingerprint()]
        told += [[hashlib.sha256(path.read_bytes()).hexdigest(), weight] for path, weight in weights.items()]
        told += [hashlib.sha256(path.read_bytes()).hexdigest() for path in words]
        told += [syntax] if syntax != "plain" else []
        told += [["over steps", span]] if span else []
        told += [["guidance", guidance]] if guidance is not None else []
        told += [["adapter guidance", strength]] if strength is not None and weights else []

        def make() -> Tensor:
            adapters = [Adapter(path, weight, f"a{i}") for i, (path, weight) in enumerate(weights.items())]
            with ExitStack() as stack:
                for path in words:
                    stack.enter_context(embedding.load(self.base, path))
                if adapters:
                    mix = stack.enter_context(compose(self.base, *adapters))
                    scale = self.base.defaults.guidance if guidance is None else guidance
                    stack.enter_context(adapter_guidance(mix, strength, guidance=scale))
                    by_step = dict.fromkeys(mix.weights, parse_span(span)) if span else {}
                    wanted = AdapterPlacement(by_step=by_step).with_requested(mix.spans)
                    stack.enter_context(placement_applied(self.base, mix, wanted))
                asked = [text for texts in mix.negatives.values() for text in texts] if adapters else []
                pictures = draw_against(self.base, list(prompts), list(seeds), asked, syntax=syntax, guidance=guidance)
                return to_tensors(pictures)

        return self._kept(f"{name}-{_hash(told)}", make)

    def _kept(self, name: str, make: Callable[[], Tensor]) -> Tensor:
        path = self.folder / f"{name}.safetensors"
        if not path.exists():
            pictures = make()
            with atomic_path(path) as temporary:
                save_file({"pictures": pictures}, temporary)
        return load_file(path)["pictures"]


@cache
def code_hash() -> str:
    """Of the library's and the trainers' code as Python runs it: comments, docstrings and layout are not in it."""
    files = sorted([*(ROOT / "src/sfumato").rglob("*.py"), *(ROOT / "trainers").rglob("*.py")])
    return _hash([[str(file.relative_to(ROOT)), code_of(file.read_text("utf-8"))] for file in files])


def code_of(text: str) -> str:
    """Python's own reading of a file, without comments, docstrings and layout."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [each for each in body if not _is_docstring(each)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_docstring(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _hash(told: Any) -> str:
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()[:12]


def to_tensor(picture: Image.Image) -> Tensor:
    """(3, h, w) uint8."""
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)


def to_tensors(pictures: Iterable[Image.Image]) -> Tensor:
    """(n, 3, h, w) uint8, of pictures of one size."""
    return torch.stack([to_tensor(picture) for picture in pictures])


def to_image(picture: Tensor) -> Image.Image:
    """From (3, h, w) uint8."""
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


@torch.no_grad()
def reconstruct(base: Base, pixels: Tensor) -> Tensor:
    """What the VAE makes of uint8 pictures, (n, 3, h, w) in [-1, 1]."""
    parts = [base.decode(base.encode_pixels(to_float(chunk))[0]).float() for chunk in pixels.split(64)]
    return torch.cat(parts).clamp(-1, 1)
