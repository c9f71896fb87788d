"""Whether the prior keeps a class: DreamBooth with it and without, at the shipped defaults, before the judge.

The subject is a thing that the base knows, drawn by hands that it has never seen: "sks dog" is learned from two
drawings of a dog, and "dog" is its class. Then the class (in each of the base's styles) and unrelated concepts are
drawn by the base and by both runs, which differ in --prior-weight alone, from the same seeds. Prints JSON: the judge's
concept top-5 on each kind of prompt and on both together, with intervals of the paired bootstrap over subjects. Beside
them stands how many real pictures are told by a judge that has learned alike, but from nine in ten of them.

    python -m bench.prior --data emoji [--method full] [--sheet docs/prior.png]

What is learned and drawn stays in the folder --work: run the command again after an interruption, and it goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bench.judge import Judge, accuracies, cached_judge, look
from bench.judge_pictures import Pictures, chosen_tenth, read_named
from bench.real import Cells, cells_of, check_least, known_concepts, print_report, styles_of
from bench.style_runs import DREAMBOOTH, Learned, Workshop, to_image
from bench.style_summary import paired
from sfumato import cli, load_base
from sfumato.errors import DataError
from sfumato.precision import decide
from sfumato.utils import randomness
from sfumato.utils.atomic import atomic_path
from sfumato.utils.image_grid import contact_sheet

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
    subjects: int = 8
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
    work: Path = Path(".cache/prior")
    """Folder that keeps what is learned and drawn; refused if other code made it."""
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
    check_least(config, "subjects", "unrelated", "seeds")
    files = cells_of(config.data, (*config.styles, *config.hands))
    known = known_concepts(files)
    if len(known) < config.subjects * (1 + config.unrelated):
        raise DataError(f"{config.data}: {len(known)} concepts have a picture in all of its styles; too few.")
    cells = {cell: file for cell, file in files.items() if cell[0] in known}
    pictures = read_named(cells, known, styles_of(files))
    seen, hidden = pictures.apart(chosen_tenth(pictures))
    judge, alike = learn_judge(config, pictures), learn_judge(config, seen)
    order = [known[place] for place in randomness.permutation(len(known), 0, "prior subjects")]
    workshop = Workshop(config.work, config.base, load_base(config.base, precision=decide("fp32")))
    rows, scores = [], []
    for number, subject in enumerate(order[: config.subjects]):
        first = config.subjects + number * config.unrelated  # others for each, so that the base is asked each but once
        others = order[first : first + config.unrelated]
        right, drawn = one_subject(config, workshop, judge, subject, others, files)
        scores.append(right)
        means = {name: {kind: round(float(t.mean()), 4) for kind, t in r.items()} for name, r in right.items()}
        rows.append({"subject": subject, **means})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
        if number == 0 and config.sheet:
            save_sheet(config.sheet, drawn, prompts_of(config, subject, others), config.seeds)
    return {
        "method": config.method,
        "prior": config.prior,
        "options": config.options,
        "judge_alike_on_withheld_real": accuracies(alike, hidden),
        "runs": rows,
        **summary(scores),
    }


def learn_judge(config: Config, pictures: Pictures) -> Judge:
    """A judge of these pictures' concepts and styles."""
    return cached_judge(pictures, cache=config.cache, steps=config.judge_steps, seed=0)


def one_subject(
    config: Config, workshop: Workshop, judge: Judge, subject: str, others: Sequence[str], files: Cells
) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Twice {base, with, without} -> something: {class, unrelated} -> (pictures,) 1 where the concept is in the judge's
    top 5; and the pictures, uint8, the subject's own before them."""
    prompts = prompts_of(config, subject, others)
    asked = [f"sks {subject}", *(prompt for prompt in prompts for _ in range(config.seeds))]
    seeds = [0, *(place for _ in prompts for place in range(config.seeds))]
    named = [subject] * (1 + len(config.styles)) + list(others)
    concept = torch.tensor([judge.concepts.index(name) for name in named for _ in range(config.seeds)])
    of_class = config.seeds * (1 + len(config.styles))
    right: dict[str, dict[str, Tensor]] = {}
    drawn: dict[str, Tensor] = {}
    for name in ("base", *WEIGHTS):
        weights = {} if name == "base" else {file: 1.0 for file in learn(config, workshop, subject, files, name).files}
        drawn[name] = workshop.drawn(f"{subject}-{name}-drawn", asked, seeds, weights)
        found = look(judge, drawn[name][1:]).right_concept(concept, 5)
        right[name] = {"class": found[:of_class], "unrelated": found[of_class:]}
    return right, drawn


def prompts_of(config: Config, subject: str, others: Sequence[str]) -> list[str]:
    """The class, the class in each style, and the unrelated concepts."""
    return [subject, *(f"{subject}, {style} style" for style in config.styles), *others]


def learn(config: Config, workshop: Workshop, subject: str, files: Cells, name: str) -> Learned:
    """Train with the prior's weight of this name, from the subject's pictures by both hands, without captions."""
    options = ["--class-name", subject, "--prior", config.prior, "--prior-weight", WEIGHTS[name]]
    options += ["--save", "difference"] if config.method == "full" else []
    options += [f"--{option}" for option in config.options]
    pictures = {f"{hand}.png": files[subject, hand] for hand in config.hands}
    return workshop.learn(f"{subject}-{name}", "dreambooth", DREAMBOOTH[config.method], pictures, {}, options)


def summary(scores: Sequence[dict[str, dict[str, Tensor]]]) -> dict[str, Any]:
    """Over all subjects: the shares, their differences with 95 % intervals over subjects, and the goals.

    "both" is the class's and the unrelated pictures together.
    """
    found: dict[str, Any] = {}
    for kind, parts in {"class": ["class"], "unrelated": ["unrelated"], "both": ["class", "unrelated"]}.items():
        rows = {
            name: torch.stack([torch.cat([score[name][part] for part in parts]) for score in scores])
            for name in ("base", *WEIGHTS)
        }
        found[kind] = {
            "pictures": rows["base"].numel(),
            **{name: round(float(values.mean()), 4) for name, values in rows.items()},
            "base_minus_with_95": paired(rows["with"], rows["base"])["change_95"],
            "with_minus_without_95": paired(rows["without"], rows["with"])["change_95"],
        }
    found["goals"] = {
        "at most 0.05 under the base": {kind: each["base"] - each["with"] <= 0.05 for kind, each in found.items()},
        "above the run without, beyond the interval": {
            kind: each["with_minus_without_95"][0] > 0 for kind, each in found.items()
        },
    }
    return found


def save_sheet(path: Path, drawn: dict[str, Tensor], prompts: Sequence[str], seeds: int) -> None:
    """A row each for the base and both runs: the subject, its class in each style, and unrelated things."""
    names = {"base": "base", "with": "with the prior", "without": "without"}
    chosen = [0, *range(1, 1 + len(prompts) * seeds, seeds)]
    rows = [[to_image(picture) for picture in drawn[name][chosen]] for name in names]
    labels = [f"sks {prompts[0]}", *prompts]
    with atomic_path(path) as temporary:
        contact_sheet(rows, row_labels=list(names.values()), column_labels=labels).save(temporary)


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.prior")


if __name__ == "__main__":
    cli.run(main)
