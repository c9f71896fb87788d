"""A judge of concept and style: a small CNN, trained on real pictures only, that other benches share.

Two trunks that share nothing. Style is judged by strokes and palette, near at hand, from pictures in their own
colours: a judge of style that sees the whole learns which pictures it has seen. Concept is judged by the whole, from
pictures whose colours are shuffled, because another hand's bear has other colours.

The same pictures, settings and seed give the same judge on one machine; it is cached under a name made of their hash.

    python -m bench.judge --data pocket-data
"""

from __future__ import annotations

import ast
import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from bench.judge_pictures import Pictures, augment, read_others, read_pictures, recolour, withheld_cells
from bench.real import print_report
from sfumato import cli
from sfumato.data.preparation.latents import to_float
from sfumato.precision.choices import multiplies_bf16
from sfumato.utils import randomness
from sfumato.utils.atomic import atomic_path

BATCH, RATE = 64, 3e-3


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
    steps: int = 800
    """Optimizer steps of 64 pictures."""
    seed: int = 0
    """Seed of weights and augmentation."""


class Judge(nn.Module):
    """Pictures before two trunks.

    concepts: those that are asked about. classes: all that it tells apart, the concepts first; more classes teach it
    what changes from hand to hand and what stays.
    """

    def __init__(self, concepts: Sequence[str], styles: Sequence[str], classes: Sequence[str] = ()) -> None:
        super().__init__()
        self.concepts, self.styles, self.classes = tuple(concepts), tuple(styles), tuple(classes or concepts)
        self.near = nn.Sequential(convolution(3, 48, 2), convolution(48, 48))
        self.middle = nn.Sequential(convolution(48, 96, 2), convolution(96, 96))
        self.strokes = nn.Sequential(
            nn.Dropout(0.3), nn.Linear(2 * (48 + 96), 128), nn.ReLU(), nn.BatchNorm1d(128, affine=False)
        )
        self.style_head = nn.Sequential(nn.Dropout(0.3), nn.Linear(128, len(self.styles)))
        self.whole = nn.Sequential(
            *(convolution(3, 32, 2), convolution(32, 64, 2), Residual(64), convolution(64, 128, 2), Residual(128)),
            *(convolution(128, 256, 2), Residual(256)),
        )
        self.shape = nn.BatchNorm1d(256, affine=False)
        self.concept_head = nn.Sequential(nn.Dropout(0.3), nn.Linear(256, len(self.classes)))

    def see_style(self, pixels: Tensor) -> Tensor:
        """(b, 3, 64, 64) in [-1, 1] -> features of strokes and palette (b, 128), of unit variance on real pictures."""
        near = self.near(pixels)
        middle = self.middle(near)
        statistics = [f(grid.float()) for grid in (near, middle) for f in (mean_of, deviation_of)]
        return self.strokes(torch.cat(statistics, 1))

    def see_concept(self, pixels: Tensor) -> Tensor:
        """(b, 3, 64, 64) in [-1, 1] -> features of the whole (b, 256), of unit variance on real pictures."""
        grid = self.whole(pixels).float()
        return self.shape(grid.mean((2, 3)) + 0.5 * grid.amax((2, 3)))


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """3 x 3, batch norm, ReLU."""
    return nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())


class Residual(nn.Module):
    """x + what two 3 x 3 convolutions find in it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = convolution(width, width)
        self.second = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.second(self.first(x)))


def mean_of(grid: Tensor) -> Tensor:
    return grid.mean((2, 3))


def deviation_of(grid: Tensor) -> Tensor:
    return (grid.var((2, 3)) + 1e-4).sqrt()


@dataclass(frozen=True)
class Verdict:
    """What the judge says of n pictures.

    features: (n, 384), concept's and style's. class_logits: (n, classes). concept_logits: its first columns, those of
    the concepts. style_logits: (n, styles).
    """

    features: Tensor
    class_logits: Tensor
    concept_logits: Tensor
    style_logits: Tensor

    def right_concept(self, concept: Tensor, among: int = 1) -> Tensor:
        """(n,) 1 where the true concept is among the judge's first few, else 0."""
        most = min(among, self.concept_logits.shape[1])
        return (self.concept_logits.topk(most).indices == concept[:, None]).any(1).float()

    def right_style(self, style: Tensor) -> Tensor:
        """(n,) 1 where the true style is the judge's first, else 0."""
        return (self.style_logits.argmax(1) == style).float()

    def concept_accuracy(self, concept: Tensor, among: int = 1) -> float:
        """Share of pictures whose true concept is among the judge's first few."""
        return float(self.right_concept(concept, among).mean())

    def style_accuracy(self, style: Tensor) -> float:
        """Share of pictures whose true style is the judge's first."""
        return float(self.right_style(style).mean())

    def accuracies(self, true: Pictures) -> dict[str, float]:
        """Style accuracy, and concept top-1 and top-5, of pictures that ought to be the true ones."""
        return {
            "style": round(self.style_accuracy(true.style), 4),
            "concept_top1": round(self.concept_accuracy(true.concept), 4),
            "concept_top5": round(self.concept_accuracy(true.concept, 5), 4),
        }


@torch.no_grad()
def look(judge: Judge, pixels: Tensor) -> Verdict:
    """The verdict on (n, 3, h, w): uint8, or floats in [-1, 1]; the mean over each picture and its mirror image.

    Other sizes than 64 px are resized to it.
    """
    floats = to_float(pixels) if pixels.dtype == torch.uint8 else pixels.float()
    if floats.shape[-2:] != (64, 64):
        floats = F.interpolate(floats, size=(64, 64), mode="bilinear", antialias=True, align_corners=False)
    judge.eval()
    parts: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in floats.split(128):
        both = torch.cat([chunk, chunk.flip(3)])
        concept, style = judge.see_concept(both), judge.see_style(both)
        said = (torch.cat([concept, style], 1), judge.concept_head(concept), judge.style_head(style))
        parts.append(tuple(t.unflatten(0, (2, -1)).mean(0) for t in said))
    features, classes, styles = (torch.cat(part) for part in zip(*parts, strict=True))
    return Verdict(features, classes, classes[:, : len(judge.concepts)], styles)


def train_judge(pictures: Pictures, *, steps: int, seed: int, others: Pictures | None = None) -> Judge:
    """A judge trained on `pictures` and `others`, AdamW whose rate rises for a tenth of the steps and falls to 0.

    others: pictures of further concepts in the same styles. Half of a batch is of the concepts that are asked about;
    all styles are as frequent. Computed in bf16 where the processor multiplies it, three times as fast; elsewhere it
    emulates that, many times as slow as fp32.
    """
    both = pictures if others is None or not len(others.pixels) else pictures.and_others(others)
    asked = both.concept < len(pictures.concepts)
    chance = torch.where(asked, 1 / asked.sum(), 1 / (~asked).sum().clamp(min=1))
    chance = chance / both.style.bincount(weights=chance)[both.style]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        untrained: Any = Judge(pictures.concepts, pictures.styles, both.concepts)  # torch types no `memory_format`
        judge: Judge = untrained.to(memory_format=torch.channels_last)
        optimizer = torch.optim.AdamW(judge.parameters(), lr=RATE, weight_decay=0.05)
        judge.train()
        for step in range(steps):
            generator = randomness.generator(seed, "judge", step)
            index = torch.multinomial(chance, BATCH, replacement=True, generator=generator)
            plain = augment(to_float(both.pixels[index]), generator)
            coloured = recolour(plain, generator).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16, enabled=multiplies_bf16(torch.device("cpu"))):
                concept = judge.concept_head(judge.see_concept(coloured))
                style = judge.style_head(judge.see_style(plain.contiguous(memory_format=torch.channels_last)))
            loss = F.cross_entropy(concept.float(), both.concept[index], label_smoothing=0.1)
            loss = loss + F.cross_entropy(style.float(), both.style[index], label_smoothing=0.05)
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
            loss.backward()
            nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % 50 == 49:
                print(f"judge: step {step + 1} of {steps}, loss {loss:.3f}", file=sys.stderr, flush=True)
    return judge.eval()


def cached_judge(
    pictures: Pictures, *, cache: Path, steps: int = 800, seed: int = 0, others: Pictures | None = None
) -> Judge:
    """The judge trained on `pictures` and `others`, from the cache if they and the settings were judged before."""
    key = hashlib.sha256(json.dumps([steps, seed]).encode())
    for program in (Path(__file__), Path(__file__).with_name("judge_pictures.py")):
        key.update(ast.dump(ast.parse(program.read_bytes())).encode())  # comments and layout change nothing
    for some in (pictures, others) if others else (pictures,):
        key.update(json.dumps([some.concepts, some.styles]).encode())
        key.update(some.pixels.numpy().tobytes() + torch.stack([some.concept, some.style]).numpy().tobytes())
    path = cache / f"judge-{key.hexdigest()[:16]}.safetensors"
    if path.exists():
        classes = (*pictures.concepts, *(others.concepts if others else ()))
        judge = Judge(pictures.concepts, pictures.styles, classes)
        judge.load_state_dict(load_file(path))
        return judge.eval()
    judge = train_judge(pictures, steps=steps, seed=seed, others=others)
    with atomic_path(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in judge.state_dict().items()}, temporary)
    return judge


def accuracies(judge: Judge, pictures: Pictures) -> dict[str, float | int]:
    """The judge's own figures on real pictures: how many, style accuracy, concept top-1 and top-5."""
    return {"pictures": len(pictures.pixels), **look(judge, pictures.pixels).accuracies(pictures)}


def measure(config: Config) -> dict[str, Any]:
    """The judge's own figures on the cells that it learned from and on those that are withheld."""
    pictures = read_pictures(config.data, config.styles, config.concepts)
    seen, withheld = pictures.apart(withheld_cells(config.data))
    others = read_others(config.data, pictures.styles)
    judge = cached_judge(seen, cache=config.cache, steps=config.steps, seed=config.seed, others=others)
    report = {"seen": accuracies(judge, seen)}
    if len(withheld.pixels):
        report["withheld"] = accuracies(judge, withheld)
    return report


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.judge")


if __name__ == "__main__":
    cli.run(main)
