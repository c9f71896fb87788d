"""A judge of concept and style: a small CNN, trained on real pictures only, that other benches share.

Reads pictures laid out as STYLE/CONCEPT.png. The same pictures, settings and seed give the same judge, which is cached
under a name made of their hash.

    python -m bench.judge --data pocket-data
"""

from __future__ import annotations

import hashlib
import itertools
import json
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfumato import randomness
from sfumato.config import parse
from sfumato.errors import DataError
from sfumato.files.atomic import atomic_path

FEATURES = 192


@dataclass(frozen=True)
class Config:
    """Train the judge, or find it in the cache, and print its own accuracy as JSON."""

    data: Path = Path("pocket-data")
    """Folder of STYLE/CONCEPT.png. Cells that its manifest.json withholds, if it has one, are not trained on."""
    styles: tuple[str, ...] = ()
    """Styles to tell apart. Default: every folder of the data that the manifest, if there is one, lists."""
    concepts: tuple[str, ...] = ()
    """Concepts to tell apart. Default: every one that has a picture in all the styles."""
    cache: Path = Path(".cache/judge")
    """Folder that keeps trained judges."""
    steps: int = 1200
    """Optimizer steps of 64 pictures."""
    seed: int = 0
    """Seed of weights and augmentation."""


@dataclass(frozen=True)
class Pictures:
    """Named pictures: pixels (n, 3, 64, 64) uint8, and for each its place in `concepts` and in `styles`, (n,) long."""

    pixels: Tensor
    concept: Tensor
    style: Tensor
    concepts: tuple[str, ...]
    styles: tuple[str, ...]

    def where(self, cells: Collection[tuple[str, str]], inside: bool) -> Pictures:
        """Those whose (concept, style) is among `cells`, or is not."""
        chosen = [
            (self.concepts[c], self.styles[s]) in cells
            for c, s in zip(self.concept.tolist(), self.style.tolist(), strict=True)
        ]
        index = torch.tensor([i for i, is_in in enumerate(chosen) if is_in == inside], dtype=torch.long)
        return Pictures(self.pixels[index], self.concept[index], self.style[index], self.concepts, self.styles)


class Judge(nn.Module):
    """(b, 3, 64, 64) in [-1, 1] -> features (b, 192), concept logits (b, concepts), style logits (b, styles)."""

    def __init__(self, concepts: Sequence[str], styles: Sequence[str]) -> None:
        super().__init__()
        self.concepts, self.styles = tuple(concepts), tuple(styles)
        widths = (32, 64, 128, FEATURES)
        layers: list[nn.Module] = [nn.Conv2d(3, widths[0], 5, 2, 2), nn.GroupNorm(8, widths[0]), nn.SiLU()]
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(8, after), nn.SiLU(), Residual(after)]
        self.near, self.far = nn.Sequential(*layers[:7]), nn.Sequential(*layers[7:])
        self.dropout = nn.Dropout(0.2)
        self.concept_head = nn.Linear(FEATURES, len(concepts))
        self.style_head = nn.Sequential(
            nn.Linear(2 * widths[1], 128), nn.SiLU(), nn.Dropout(0.2), nn.Linear(128, len(styles))
        )

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # Style is judged by strokes, concept by the whole picture. A judge of style that sees the whole learns
        # which pictures it has seen: of a bear that was withheld in one style, it says that the style is another.
        strokes = self.near(pixels)
        style = torch.cat([strokes.mean((2, 3)), strokes.std((2, 3))], 1)
        grid = self.far(strokes)
        features = grid.mean((2, 3)) + grid.amax((2, 3))
        return features, self.concept_head(self.dropout(features)), self.style_head(style)


class Residual(nn.Module):
    """x + what a 3 x 3 convolution finds in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(width, width, 3, 1, 1), nn.GroupNorm(8, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.silu(self.norm(self.convolution(x)))


@dataclass(frozen=True)
class Verdict:
    """What the judge says of n pictures: features (n, 192), logits (n, concepts) and (n, styles)."""

    features: Tensor
    concept_logits: Tensor
    style_logits: Tensor

    def concept_accuracy(self, concept: Tensor, among: int = 1) -> float:
        """Share of pictures whose true concept is among the judge's first few."""
        return float((self.concept_logits.topk(among).indices == concept[:, None]).any(1).float().mean())

    def style_accuracy(self, style: Tensor) -> float:
        """Share of pictures whose true style is the judge's first."""
        return float((self.style_logits.argmax(1) == style).float().mean())


def look(judge: Judge, pixels: Tensor) -> Verdict:
    """The judge's verdict on (n, 3, h, w): uint8, or floats in [-1, 1]; other sizes than 64 px are resized to it."""
    floats = pixels.float() / 127.5 - 1 if pixels.dtype == torch.uint8 else pixels.float()
    if floats.shape[-2:] != (64, 64):
        floats = F.interpolate(floats, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
    judge.eval()
    with torch.no_grad():
        parts = [judge(chunk) for chunk in floats.split(128)]
    return Verdict(*(torch.cat(part) for part in zip(*parts, strict=True)))


def read_pictures(data: Path, styles: Sequence[str] = (), concepts: Sequence[str] = ()) -> Pictures:
    """Every picture of the styles and concepts. Raises DataError where one is missing.

    Names in `concepts` are written with spaces, their files with hyphens.
    """
    listed = read_manifest(data).get("styles")
    found = sorted(f.name for f in data.iterdir() if f.is_dir()) if data.is_dir() else []
    styles = tuple(styles or listed or found)
    if not styles:
        raise DataError(f"{data} holds no folder of pictures; give --data a folder laid out as STYLE/CONCEPT.png.")
    if not concepts:
        per_style = [{f.stem for f in (data / style).glob("*.png")} for style in styles]
        concepts = [name.replace("-", " ") for name in sorted(set.intersection(*per_style))]
    pixels, concept, style_index = [], [], []
    for s, style in enumerate(styles):
        for c, name in enumerate(concepts):
            path = data / style / f"{name.replace(' ', '-')}.png"
            if not path.exists():
                raise DataError(f"{path} is missing; take {name!r} off --concepts, or {style!r} off --styles.")
            pixels.append(np.asarray(Image.open(path).convert("RGB").resize((64, 64), Image.Resampling.LANCZOS)))
            concept.append(c)
            style_index.append(s)
    stacked = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
    return Pictures(stacked, torch.tensor(concept), torch.tensor(style_index), tuple(concepts), styles)


def read_manifest(data: Path) -> dict[str, list[str]]:
    """The data's manifest.json; empty where there is none."""
    path = data / "manifest.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def withheld_cells(data: Path) -> set[tuple[str, str]]:
    """The (concept, style) cells that neither the base nor the judge may learn from."""
    return {(concept, style) for concept, style in read_manifest(data).get("withheld", [])}


def augment(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifted, scaled, turned, mirrored, blurred, recoloured copies of (b, 3, h, w) in [-1, 1]; outside is white.

    Blur matters: it keeps the judge from mistaking a decoder's softness for another style.
    """
    b = len(pixels)

    def draw(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(b, *shape, generator=generator)

    turn, scale = draw(-0.17, 0.17), draw(0.85, 1.2)
    mirror = torch.where(draw(0, 1) < 0.5, 1.0, -1.0)
    rows = [turn.cos() * scale * mirror, -turn.sin() * scale, draw(-0.12, 0.12)]
    columns = [turn.sin() * scale * mirror, turn.cos() * scale, draw(-0.12, 0.12)]
    affine = torch.stack([torch.stack(rows, 1), torch.stack(columns, 1)], 1)
    grid = F.affine_grid(affine, list(pixels.shape), align_corners=False)
    moved = F.grid_sample(pixels - 1, grid, align_corners=False) + 1
    soft = F.interpolate(F.avg_pool2d(moved, 2), scale_factor=2, mode="bilinear", align_corners=False)
    moved = moved.lerp(soft, draw(0, 1, 1, 1, 1).square())
    moved = (moved + 1) * draw(0.9, 1.1, 1, 1, 1) * draw(0.93, 1.07, 3, 1, 1) - 1
    return (moved + 0.03 * torch.randn(moved.shape, generator=generator)).clamp(-1, 1)


def read_others(data: Path, styles: Sequence[str]) -> tuple[Tensor, Tensor]:
    """The pictures under DATA/other/STYLE, which have a style and no concept: pixels (n, 3, 64, 64) uint8, style (n,).

    They teach the judge what a style is apart from the concepts; n is 0 where there is no such folder.
    """
    paths = [(path, s) for s, style in enumerate(styles) for path in sorted((data / "other" / style).glob("*.png"))]
    arrays = [np.asarray(Image.open(path).convert("RGB").resize((64, 64))) for path, _ in paths]
    pixels = np.stack(arrays) if arrays else np.zeros((0, 64, 64, 3), np.uint8)
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous(), torch.tensor([s for _, s in paths]).long()


def train_judge(pictures: Pictures, *, steps: int, seed: int, others: tuple[Tensor, Tensor] | None = None) -> Judge:
    """A judge trained on `pictures`: 64 a step, AdamW whose rate rises for a tenth of the steps and falls to 0.

    others: pixels and styles of further pictures, from which style alone is learned, 32 a step.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(pictures.concepts, pictures.styles)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
        floats = pictures.pixels.float() / 127.5 - 1
        for step in range(steps):
            generator = randomness.generator(seed, "judge", step)
            index = torch.randint(len(floats), (64,), generator=generator)
            batch, styles = floats[index], pictures.style[index]
            if others is not None and len(others[0]):
                more = torch.randint(len(others[0]), (32,), generator=generator)
                batch = torch.cat([batch, others[0][more].float() / 127.5 - 1])
                styles = torch.cat([styles, others[1][more]])
            _, concept, style = judge(augment(batch, generator))
            loss = F.cross_entropy(concept[:64], pictures.concept[index], label_smoothing=0.1)
            loss = loss + 0.5 * F.cross_entropy(style, styles, label_smoothing=0.05)
            for group in optimizer.param_groups:
                group["lr"] = 3e-3 * min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
            loss.backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return judge.eval()


def cached_judge(
    pictures: Pictures, *, cache: Path, steps: int = 1200, seed: int = 0, others: tuple[Tensor, Tensor] | None = None
) -> Judge:
    """The judge trained on `pictures` and `others`, from the cache if they and the settings were judged before."""
    names = json.dumps([pictures.concepts, pictures.styles, steps, seed]).encode()
    labels = torch.stack([pictures.concept, pictures.style]).numpy().tobytes()
    program = Path(__file__).read_bytes()
    seen = pictures.pixels.numpy().tobytes() + b"".join(t.numpy().tobytes() for t in others or ())
    key = hashlib.sha256(names + labels + seen + program).hexdigest()[:16]
    path = cache / f"judge-{key}.safetensors"
    if path.exists():
        judge = Judge(pictures.concepts, pictures.styles)
        judge.load_state_dict(load_file(path))
        return judge.eval()
    judge = train_judge(pictures, steps=steps, seed=seed, others=others)
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, temporary)
    return judge


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """KID of features (n, d) and (m, d): the unbiased squared MMD with kernel (x.y/d + 1)^3, Binkowski et al. 2018."""
    a, b = a.double(), b.double()
    n, m, d = len(a), len(b), a.shape[1]
    within_a, within_b, across = (a @ a.T / d + 1) ** 3, (b @ b.T / d + 1) ** 3, (a @ b.T / d + 1) ** 3
    first = (within_a.sum() - within_a.trace()) / (n * (n - 1))
    second = (within_b.sum() - within_b.trace()) / (m * (m - 1))
    return float(first + second - 2 * across.mean())


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Frechet distance of two Gaussians fitted to features (n, d) and (m, d), Heusel et al. 2017, eq. 6."""
    a, b = a.double(), b.double()
    first, second = torch.cov(a.T), torch.cov(b.T)
    # trace((AB)^1/2) is the sum of the roots of AB's eigenvalues, and AB's are those of the symmetric A^1/2 B A^1/2.
    values, vectors = torch.linalg.eigh(first)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ second @ root).clamp(min=0).sqrt().sum()
    return float((a.mean(0) - b.mean(0)).square().sum() + first.trace() + second.trace() - 2 * crossed)


def accuracies(judge: Judge, pictures: Pictures) -> dict[str, float | int]:
    """The judge's own figures on real pictures: how many, style accuracy, concept top-1 and top-5."""
    verdict = look(judge, pictures.pixels)
    return {
        "pictures": len(pictures.pixels),
        "style": round(verdict.style_accuracy(pictures.style), 4),
        "concept_top1": round(verdict.concept_accuracy(pictures.concept), 4),
        "concept_top5": round(verdict.concept_accuracy(pictures.concept, 5), 4),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; prints JSON."""
    config = parse(Config, sys.argv[1:] if argv is None else argv, program="judge")
    pictures = read_pictures(config.data, config.styles, config.concepts)
    hidden = withheld_cells(config.data)
    seen, withheld = pictures.where(hidden, inside=False), pictures.where(hidden, inside=True)
    others = read_others(config.data, pictures.styles)
    judge = cached_judge(seen, cache=config.cache, steps=config.steps, seed=config.seed, others=others)
    report = {"seen": accuracies(judge, seen)}
    if len(withheld.pixels):
        report["withheld"] = accuracies(judge, withheld)
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
