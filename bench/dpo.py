"""What preferences change: images with and without an adapter that learned a taste from pairs, by a rule and a judge.

    python -m bench.dpo --data pocket-data --out dpo.json

A taste is a rule that needs no judge, such as warm colors. The base draws things from several seeds, and of each thing
the images that the rule puts first are preferred to those that it puts last. `sfumato train dpo` learns from these
pairs. Beside it `sfumato train lora` learns from the preferred images alone. Then other things are drawn from other
seeds, by the base and with each adapter. The rule counts how often the image with an adapter has more of the taste than
the base's from the same seed; a judge that has learned from real images tells whether it still shows the thing. Prints
JSON.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.judge import Judge, look
from bench.judge_pictures import read_pictures
from bench.pocket_runs import every_nth, images_of, judge_of, learn, places_of, shown
from bench.real import print_report
from bench.style_runs import to_image
from sfumato import Adapter, cli, compose
from sfumato.errors import ConfigError
from sfumato.models import Base, load_base
from sfumato.utils import randomness

INK = 0.08
"""How far from white a number of a pixel is that shows the thing."""
RESAMPLED = 2000


def warmth(pixels: Tensor) -> Tensor:
    """(n,): red less blue, the mean over what is not background. pixels: (n, 3, h, w) in [0, 1]."""
    shown = _shown(pixels)
    return ((pixels[:, 0] - pixels[:, 2]) * shown).sum((1, 2)) / shown.sum((1, 2)).clamp(min=1)


def size(pixels: Tensor) -> Tensor:
    """(n,): the share of the image that is not background."""
    return _shown(pixels).mean((1, 2))


def _shown(pixels: Tensor) -> Tensor:
    return ((1 - pixels).amax(1) > INK).float()


TASTES: Mapping[str, Callable[[Tensor], Tensor]] = {"warm": warmth, "large": size}
"""What is preferred, by name: a rule that gives each image a number."""


@dataclass(frozen=True)
class Config:
    """Judge what preferences teach the pocket base."""

    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    taste: tuple[str, ...] = tuple(TASTES)
    """What is preferred: warm (colors), large (things)."""
    taught: int = 50
    """How many things the pairs show."""
    seeds: int = 4
    """Images of each of them that are compared, an even number: two are a pair."""
    things: int = 80
    """How many other things are drawn to be judged."""
    train_seed: tuple[int, ...] = (0, 1)
    """Seeds of trainings."""
    options: tuple[str, ...] = ()
    """Further options of `train dpo`, each as NAME=VALUE."""
    lora: bool = True
    """Also train a LoRA on the preferred images."""
    judge_steps: int = 800
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    keep: Path | None = None
    """Folder that keeps images and adapters; what is there is not made again."""
    out: Path | None = None
    """File that receives the JSON besides."""


def drawn(base: Base, prompts: Sequence[str], first_seed: int, file: Path) -> Tensor:
    """An image of each prompt, the seeds from `first_seed` on: (n, 3, 64, 64) uint8; from the file if it is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.save(images_of(base, prompts, first_seed), file)
    images: Tensor = torch.load(file, weights_only=True)
    return images


def write_pairs(images: Tensor, things: Sequence[str], rule: Callable[[Tensor], Tensor], folder: Path) -> None:
    """Pairs of each thing's images, (things, seeds, 3, 64, 64): the first by the rule with the last, and so on."""
    for name in ("preferred", "rejected"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    for place, (thing, own) in enumerate(zip(things, images, strict=True)):
        order = rule(own.float() / 255).argsort(descending=True).tolist()
        for rank in range(len(order) // 2):
            for name, which in (("preferred", order[rank]), ("rejected", order[-1 - rank])):
                to_image(own[which]).save(folder / name / f"{place:03}-{rank}.png")
            (folder / "preferred" / f"{place:03}-{rank}.txt").write_text(thing, encoding="utf-8")


@dataclass(frozen=True)
class Question:
    """What is asked of images of the things, one each. before: the base's own, from the same seeds."""

    judge: Judge
    places: Tensor
    rule: Callable[[Tensor], Tensor]
    before: Tensor

    def answers(self, images: Tensor) -> dict[str, Any]:
        """The share that has the taste, the share that has more of it than the base's image from the same seed, with
        the interval that 95 % of resampled things give, and of those that show the thing."""
        own, theirs = (self.rule(each.float() / 255) for each in (images, self.before))
        wins = (own > theirs).float() + 0.5 * (own == theirs).float()
        picks = torch.randint(len(wins), (RESAMPLED, len(wins)), generator=randomness.generator(0, "bootstrap"))
        low, high = torch.quantile(wins[picks].mean(1), torch.tensor([0.025, 0.975])).tolist()
        return {
            "have_it": round(float((own > theirs.median()).float().mean()), 4),
            "mean": round(float(own.mean()), 4),
            "win_rate": round(float(wins.mean()), 4),
            "win_rate_95": [round(low, 4), round(high, 4)],
            **shown(look(self.judge, images), self.places),
        }


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    if other := set(config.taste) - TASTES.keys():
        raise ConfigError(f"--taste {min(other)}: wanted {', '.join(TASTES)}.")
    pictures = read_pictures(config.data)
    judge = judge_of(pictures, config.data, cache=config.cache, steps=config.judge_steps)
    taught = every_nth(pictures.concepts, config.taught)
    things = every_nth([concept for concept in pictures.concepts if concept not in taught], config.things)
    places = places_of(pictures, things)
    base = load_base("pocket")
    report: dict[str, Any] = {"taught": len(taught), "pairs": len(taught) * (config.seeds // 2), "things": len(things)}
    with ExitStack() as stack:
        folder = config.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        shown = drawn(base, [thing for thing in taught for _ in range(config.seeds)], 0, folder / "taught.pt")
        shown = shown.view(len(taught), config.seeds, *shown.shape[1:])
        before = drawn(base, things, 100_000, folder / "before.pt")
        ways: dict[str, list[str]] = {"dpo": [word for each in config.options for word in _words(each)]}
        if config.lora:
            ways["lora"] = ["--learn", "plain"]
        for taste in config.taste:
            write_pairs(shown, taught, TASTES[taste], folder / taste)
            question = Question(judge, places, TASTES[taste], before)
            found: dict[str, Any] = {"base": question.answers(before)}
            good, bad = str(folder / taste / "preferred"), str(folder / taste / "rejected")
            images = {"dpo": ["--preferred", good, "--rejected", bad], "lora": ["--images", good]}
            for way, options in ways.items():
                runs = []
                for seed in config.train_seed:
                    name = "-".join([way, str(seed), *(config.options if way == "dpo" else ())]).replace("/", "_")
                    path, minutes = learn(way, folder / taste / name, *images[way], *options, "--seed", str(seed))
                    with compose(base, Adapter(path)):
                        after = drawn(base, things, 100_000, path.with_name("after.pt"))
                    runs.append({"seed": seed, "minutes": minutes, **question.answers(after)})
                names = ("have_it", "mean", "win_rate", "concept_top1", "concept_top5")
                means = {name: round(statistics.mean(run[name] for run in runs), 4) for name in names}
                found[way] = {"mean_of_runs": means, "runs": runs}
            report[taste] = found
    return report


def _words(option: str) -> list[str]:
    name, _, value = option.partition("=")
    return [f"--{name}", value]


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.dpo")


if __name__ == "__main__":
    cli.run(main)
