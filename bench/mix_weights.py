"""Which weights a style and a subject are to be mixed with: both learned by the shipped recipes, judged at each pair.

    python -m bench.mix_weights --data EMOJI --subjects EMOJI-SUBJECTS

Unlike `bench.style_fidelity`, which takes one pair of weights, it draws the same adapters at all of them. Prints JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import style_fidelity
from bench.judge import accuracies, cached_judge
from bench.judge_pictures import chosen_tenth
from bench.real import check_least, print_report
from bench.style_runs import Workshop
from bench.style_summary import mix_summary
from sfumato import cli, load_base
from sfumato.errors import ConfigError
from sfumato.precision import decide


@dataclass(frozen=True, kw_only=True)
class Config:
    """Mix styles and subjects that the base has not seen at several pairs of weights, before one judge."""

    data: Path
    """Folder of STYLE/CONCEPT.png, with the base's styles and others."""
    subjects: Path
    """Folder of SUBJECT/STYLE.png."""
    styles: tuple[str, ...] = ("openmoji", "glossy")
    """The styles to learn."""
    mix_with: tuple[str, ...] = ()
    """The subjects. Unset: four of the folder's, drawn by lot, those of `bench.style_fidelity`."""
    pairs: tuple[str, ...] = ("1:0.7", "0.7:1", "1:1", "0.7:0.7")
    """Weights of style and subject."""
    adapter_guidance: tuple[str, ...] = ("file", "0")
    """How often what a style changes counts: "file" is what its file asks for, 0 is as other programs draw."""
    mixed: int = 8
    """Pictures of each style and subject at each pair."""
    judge_steps: int = 2400
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    work: Path = Path(".cache/mix_weights")
    """Folder that keeps the adapters and their pictures; not made again, and refused if other code made them."""
    out: Path | None = None
    """File that receives the JSON besides."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report: first everything is learned and drawn, then judged."""
    check_least(config, "mixed")
    pairs = {pair: weights_of(pair) for pair in config.pairs}
    strengths = {told: strength_of(told) for told in config.adapter_guidance}
    common = style_fidelity.Config(
        data=config.data, subjects=config.subjects, styles=config.styles, mix_with=config.mix_with, seeds=1, concepts=2
    )
    style_fidelity.check(common)
    pictures, others = style_fidelity.read_real(common)
    base = load_base("pocket", precision=decide("fp32"))
    workshop = Workshop(config.work, "pocket", base)
    names = style_fidelity.chosen_subjects(common)
    subjects = {name: style_fidelity.learn_subject(common, workshop, name) for name in names}
    taught, _ = style_fidelity.split(common, pictures, 0)
    styles = {style: style_fidelity.learn_style(common, workshop, style, taught, 0) for style in config.styles}

    seen, hidden = pictures.apart(chosen_tenth(pictures))
    judge = cached_judge(seen, cache=config.cache, steps=config.judge_steps, seed=0, others=others)
    report: dict[str, Any] = {"judge_on_withheld_real": accuracies(judge, hidden), "subjects": list(names)}
    seeds = list(range(config.mixed))
    for told, strength in strengths.items():
        for pair, (a, b) in pairs.items():
            runs = []
            for style, adapter in styles.items():
                run = []
                for name, subject in subjects.items():
                    mixtures = {
                        "style_alone": {adapter: 1.0},
                        "subject_alone": {subject: 1.0},
                        "mixed": {adapter: a, subject: b},
                    }
                    drawn = {
                        what: workshop.drawn(
                            f"{style}-{name}", [f"sks {name}"] * len(seeds), seeds, weights, strength=strength
                        )
                        for what, weights in mixtures.items()
                    }
                    run.append(style_fidelity.judge_mix(common, judge, style, name, drawn))
                runs.append(run)
                print(json.dumps({"drawn": style, "weights": pair, "guidance": told}), file=sys.stderr, flush=True)
            report[f"weights {pair}, adapter guidance {told}"] = mix_summary(runs, list(styles))
    return report


def weights_of(pair: str) -> tuple[float, float]:
    """1:0.7 -> style at 1, subject at 0.7."""
    try:
        style, subject = map(float, pair.split(":"))
    except ValueError:
        raise ConfigError(f"--pairs {pair}: wanted the weights of style and subject, such as 1:0.7.") from None
    return style, subject


def strength_of(told: str) -> float | None:
    """None for "file": what the adapter's file asks for."""
    try:
        return None if told == "file" else float(told)
    except ValueError:
        raise ConfigError(f'--adapter-guidance {told}: wanted a number, or "file".') from None


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.mix_weights")


if __name__ == "__main__":
    cli.run(main)
