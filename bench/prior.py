"""Whether the prior keeps a class: DreamBooth with it and without, at the shipped defaults, before the judge.

The subject is a thing that the base knows, drawn by hands that it has never seen: "sks dog" is learned from two
drawings of a dog, and "dog" is its class. Then the class (in each of the base's styles) and unrelated concepts are
drawn by the base and by both runs, which differ in --prior-weight alone, from the same seeds. Prints JSON: the judge's
concept top-5 on both kinds of prompt, with intervals of the paired bootstrap over pictures.

    python -m bench.prior --data emoji [--method full] [--sheet docs/prior.png]
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from bench.judge import Judge, cached_judge, look
from bench.judge_pictures import read_named
from bench.style_summary import interval
from sfumato import Adapter, cli, compose, load_base, randomness
from sfumato.config import parse
from sfumato.drawing import draw
from sfumato.errors import DataError, RunError
from sfumato.files.atomic import atomic_path, write_text
from sfumato.precision import decide
from sfumato.sheet import contact_sheet

BASE_CONCEPTS = Path(__file__).parents[1] / "src/sfumato/pocket/concepts.json"
WEIGHTS = {"with": "1", "without": "0"}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Measure what the prior keeps."""

    data: Path
    """Folder of STYLE/CONCEPT.png, with the base's styles and others."""
    method: Literal["full", "lora"] = "lora"
    """What is trained."""
    prior: Literal["pictures", "base"] = "pictures"
    """Which prior."""
    options: tuple[str, ...] = ()
    """Other settings of the trainer, such as steps=100, to try them."""
    subjects: int = 6
    """How many things are learned, each in its own run."""
    styles: tuple[str, ...] = ("noto", "twemoji", "flat", "blob")
    """The base's styles, in which the class is drawn."""
    hands: tuple[str, ...] = ("openmoji", "joypixels")
    """Styles that the base has not seen: the subject's pictures."""
    unrelated: int = 12
    """Other concepts that are drawn after each run."""
    seeds: int = 2
    """Pictures of each prompt."""
    base: str = "pocket"
    """The base that learns."""
    judge_steps: int = 800
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    sheet: Path | None = None
    """File that receives the pictures of the first subject."""
    out: Path | None = None
    """File that receives the JSON besides."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    styles = (*config.styles, *config.hands)
    files = {(f.stem.replace("-", " "), s): f for s in styles for f in sorted((config.data / s).glob("*.png"))}
    listed = json.loads(BASE_CONCEPTS.read_text(encoding="utf-8"))
    known = [name for name in listed if all((name, style) in files for style in styles)]
    if len(known) < config.subjects + config.unrelated:
        raise DataError(f"{config.data}: {len(known)} concepts have a picture in all of {', '.join(styles)}; too few.")
    cells = {(name, style): files[name, style] for style in styles for name in known}
    judge = cached_judge(read_named(cells, known, styles), cache=config.cache, steps=config.judge_steps, seed=0)
    order = [known[place] for place in randomness.permutation(len(known), 0, "prior subjects")]
    rows, scores = [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, subject in enumerate(order[: config.subjects]):
            others = order[config.subjects :][: config.unrelated]
            right, drawn = one_subject(config, judge, subject, others, files, Path(folder))
            scores.append(right)
            means = {name: {kind: round(float(t.mean()), 4) for kind, t in r.items()} for name, r in right.items()}
            rows.append({"subject": subject, **means})
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            if number == 0 and config.sheet:
                save_sheet(config.sheet, drawn, prompts_of(config, subject, others), config.seeds)
    return {"method": config.method, "prior": config.prior, "options": config.options, "runs": rows, **summary(scores)}


def one_subject(
    config: Config, judge: Judge, subject: str, others: Sequence[str], files: dict[tuple[str, str], Path], work: Path
) -> tuple[dict[str, dict[str, Tensor]], dict[str, list[Image.Image]]]:
    """{base, with, without} -> {class, unrelated} -> (pictures,) 1 where the concept is in the judge's top 5."""
    images = work / f"{subject.replace(' ', '-')}-images"
    images.mkdir()
    for hand in config.hands:
        shutil.copy(files[subject, hand], images / f"{hand}.png")
    prompts = prompts_of(config, subject, others)
    asked = [prompt for prompt in prompts for _ in range(config.seeds)]
    seeds = [place for _ in prompts for place in range(config.seeds)]
    named = [subject] * (1 + len(config.styles)) + list(others)
    concept = torch.tensor([judge.concepts.index(name) for name in named for _ in range(config.seeds)])
    of_class = config.seeds * (1 + len(config.styles))
    right: dict[str, dict[str, Tensor]] = {}
    drawn: dict[str, list[Image.Image]] = {}
    for name in ("base", *WEIGHTS):
        made = None if name == "base" else learn(config, subject, images, work / f"{images.name}-{name}", name)
        with loaded(config, made) as source:
            drawn[name] = [picture.convert("RGB") for picture in draw(source, asked, seeds)]
            drawn[f"sks, {name}"] = [picture.convert("RGB") for picture in draw(source, f"sks {subject}", 0)]
        found = look(judge, pixels(drawn[name])).right_concept(concept, 5)
        right[name] = {"class": found[:of_class], "unrelated": found[of_class:]}
    return right, drawn


def prompts_of(config: Config, subject: str, others: Sequence[str]) -> list[str]:
    """The class, the class in each style, and the unrelated concepts."""
    return [subject, *(f"{subject}, {style} style" for style in config.styles), *others]


def learn(config: Config, subject: str, images: Path, folder: Path, name: str) -> Path:
    """Train with the prior's weight of this name; returns what was written."""
    words = ["train", "dreambooth", "--images", str(images), "--output", str(folder), "--class-name", subject]
    words += ["--method", config.method, "--prior", config.prior, "--prior-weight", WEIGHTS[name]]
    words += ["--class-cache", str(folder.parent / "class"), "--base", config.base, "--checkpoint-every", "0"]
    words += ["--sample-every", "0", "--measure-every", "0", *(f"--{option}" for option in config.options)]
    if cli.main(words):
        raise RunError(f"{subject}: the training failed; the lines above say why.")
    return folder / folder.name if config.method == "full" else folder / f"{folder.name}.safetensors"


@contextmanager
def loaded(config: Config, made: Path | None) -> Iterator[Any]:
    """The base, with what was learned if anything was."""
    whole = made is not None and made.is_dir()
    base = load_base(str(made) if whole else config.base, precision=decide("fp32"))
    if made is None or whole:
        yield base
        return
    with compose(base, Adapter(made)):
        yield base


def pixels(pictures: Sequence[Image.Image]) -> Tensor:
    """(n, 3, h, w) uint8."""
    import numpy as np

    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2).contiguous()


def summary(scores: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
    """Over all subjects: the shares, their differences with 95 % intervals, and the goals."""
    found: dict[str, Any] = {}
    good = True
    for kind in ("class", "unrelated"):
        all_of = {name: torch.cat([score[name][kind] for score in scores]) for name in ("base", *WEIGHTS)}
        count = len(all_of["base"])
        lost, kept = all_of["base"] - all_of["with"], all_of["with"] - all_of["without"]
        found[kind] = {
            "pictures": count,
            **{name: round(float(values.mean()), 4) for name, values in all_of.items()},
            "base_minus_with_95": interval(lambda i, d=lost: d[i].mean(), count),  # type: ignore[misc]
            "with_minus_without_95": interval(lambda i, d=kept: d[i].mean(), count),  # type: ignore[misc]
        }
        good = good and float(lost.mean()) <= 0.05
    found["goals"] = {
        "at most 0.05 under the base": good,
        "above the run without, beyond the interval": found["class"]["with_minus_without_95"][0] > 0,
    }
    return found


def save_sheet(path: Path, drawn: dict[str, list[Image.Image]], prompts: Sequence[str], seeds: int) -> None:
    """A row each for the base and both runs: the subject, its class in each style, and unrelated things."""
    names = {"base": "base", "with": "with the prior", "without": "without"}
    rows = [[*drawn[f"sks, {name}"], *drawn[name][::seeds]] for name in names]
    labels = [f"sks {prompts[0]}", *prompts]
    with atomic_path(path) as temporary:
        contact_sheet(rows, row_labels=list(names.values()), column_labels=labels).save(temporary)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; prints JSON."""
    config = parse(Config, sys.argv[1:] if argv is None else argv, program="prior")
    report = json.dumps(measure(config), indent=1)
    print(report)
    if config.out is not None:
        write_text(config.out, report + "\n")


if __name__ == "__main__":
    main()
