"""How well a style is learned: from 16 pictures by the shipped recipe, judged on other concepts.

For styles that the base has never seen, and for several training seeds: draws concepts outside the 16 with the base and
with the adapter, from the same seeds, and puts both before a judge that has learned from real pictures only. The
judge's own accuracy on real pictures it did not see, and the same figures of the VAE's reconstructions of the true
pictures, stand beside. Subjects are learned too, and mixed with each style. Prints JSON.

    python -m bench.style_fidelity --data emoji --subjects emoji-subjects

What is learned and drawn stays in the folder --work: run the command again after an interruption, and it goes on.
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.distances import paired_kernel_distance
from bench.judge import Judge, accuracies, cached_judge, look
from bench.judge_pictures import Pictures, chosen_tenth, read_named
from bench.real import Cells, cells_of, check_least, known_concepts, print_report, styles_of
from bench.style_runs import Learned, Workshop, reconstruct
from bench.style_summary import mix_summary, summary
from sfumato import cli, load_base
from sfumato.errors import ConfigError, DataError
from sfumato.models import Base
from sfumato.models.prompts.syntax import Syntax
from sfumato.precision import decide
from sfumato.utils import randomness


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn styles that the base has not seen, by the shipped recipe, and judge what comes out."""

    data: Path
    """Folder of STYLE/CONCEPT.png, with the base's styles and others."""
    subjects: Path | None = None
    """Folder of SUBJECT/STYLE.png; some are mixed with each style. Unset: no mix is judged."""
    styles: tuple[str, ...] = ("openmoji", "joypixels", "glossy")
    """The styles to learn."""
    seeds: int = 3
    """Training seeds of each style; each also chooses other 16 pictures."""
    first_seed: int = 0
    """The first of them."""
    concepts: int = 70
    """Concepts drawn for each style and seed."""
    images: int = 16
    """Pictures to learn from."""
    prompt: str = "{concept}"
    """What is asked for, in A1111's syntax, such as "{concept}[, noto style::0.3]"; of mixes the subject's words."""
    guidance: float | None = None
    """Scale of classifier-free guidance. Unset: the base's."""
    adapter_guidance: float | None = None
    """How often what a style's adapter changes counts in the pictures of the concepts. Unset: what its file asks
    for."""
    weights: tuple[float, float] = (1.0, 0.7)
    """Weights of style and subject in the mix: the README's."""
    mixed: int = 8
    """Pictures of each subject for each style and seed: style alone, subject alone, both."""
    base: str = "pocket"
    """The base that learns."""
    mix_with: tuple[str, ...] = ()
    """The subjects of the mixes. Unset: four of the folder's, drawn by lot."""
    style_options: tuple[str, ...] = ()
    """Other settings of the style's recipe, such as steps=480, to try them."""
    subject_options: tuple[str, ...] = ()
    """The same for the subject's recipe."""
    judge_steps: int = 2400
    """Optimizer steps of the judge: after 800 it sees a quarter of the withheld real pictures in another style."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    work: Path = Path(".cache/style_fidelity")
    """Folder that keeps the adapters and their pictures; not made again, and refused if other code made them."""
    out: Path | None = None
    """File that receives the JSON besides."""


@dataclass(frozen=True)
class Drawn:
    """What one adapter drew: the true pictures, and for each of them one by the base and one with the adapter.

    mix: subject -> name of a mixture -> its pictures, all uint8.
    """

    style: str
    seed: int
    true: Pictures
    before: Tensor
    after: Tensor
    mix: dict[str, dict[str, Tensor]]


def measure(config: Config) -> dict[str, Any]:
    """The whole report: first everything is learned and drawn, then judged."""
    check(config)
    pictures, others = read_real(config)
    if missing := [style for style in config.styles if style not in pictures.styles]:
        raise DataError(f"--styles {missing[0]}: {config.data} has {', '.join(pictures.styles)}.")
    if (known := len(pictures.concepts)) < config.images + config.concepts:
        raise DataError(
            f"{config.data}: {known} of the base's concepts have a picture in all of its styles; wanted --images "
            f"{config.images} and --concepts {config.concepts} others."
        )
    base = load_base(config.base, precision=decide("fp32"))
    workshop = Workshop(config.work, config.base, base)
    subjects = {name: learn_subject(config, workshop, name) for name in chosen_subjects(config)}
    seeds = range(config.first_seed, config.first_seed + config.seeds)
    runs = [draw_run(config, workshop, pictures, style, seed, subjects) for seed in seeds for style in config.styles]

    seen, hidden = pictures.apart(chosen_tenth(pictures))
    judge = cached_judge(seen, cache=config.cache, steps=config.judge_steps, seed=0, others=others)
    report: dict[str, Any] = {
        "judge_on_withheld_real": accuracies(judge, hidden),
        "concepts": len(pictures.concepts),
        "styles": {style: [] for style in config.styles},
    }
    scores: list[dict[str, Tensor]] = []
    for run in runs:
        result, score = judge_run(config, base, judge, run)
        report["styles"][run.style].append({"seed": run.seed, **result})
        scores.append(score)
    report["all"] = summary(scores, [run.style for run in runs])
    if subjects:
        mixes = [run["mix"] for of_style in report["styles"].values() for run in of_style]
        styles = [style for style, of_style in report["styles"].items() for _ in of_style]
        report["mix"] = mix_summary([[mix[name] for name in subjects] for mix in mixes], styles)
        report["mix_of"] = {name: mix_summary([[mix[name]] for mix in mixes], styles) for name in subjects}
    return report


def check(config: Config) -> None:
    """Refuse what makes no sense before anything is learned."""
    if "{concept}" not in config.prompt:
        raise ConfigError(f"--prompt {config.prompt!r} has no {{concept}}, where what is drawn is named; add it.")
    check_least(config, "seeds", "images", "mixed")
    check_least(config, "concepts", least=2)  # a distance wants two
    if config.subjects is None:
        if config.mix_with:
            raise ConfigError("--mix-with names subjects of a folder; give it with --subjects.")
        return
    found = sorted(folder.name for folder in config.subjects.glob("*") if any(folder.glob("*.png")))
    if not found:
        raise DataError(f"{config.subjects} holds no SUBJECT/STYLE.png; give --subjects a folder laid out so.")
    if unknown := [name for name in config.mix_with if name not in found]:
        raise ConfigError(f"--mix-with {unknown[0]}: not in {config.subjects}, which has {', '.join(found)}.")


def read_real(config: Config) -> tuple[Pictures, Pictures]:
    """The real pictures of the concepts that the base knows, and those of all other concepts and of the subjects."""
    files = of_whole_styles(cells_of(config.data), config)
    known, styles = known_concepts(files), styles_of(files)
    cells = {cell: file for cell, file in files.items() if cell[0] in known}
    more = {cell: file for cell, file in files.items() if cell[0] not in known}
    for folder in sorted(config.subjects.iterdir()) if config.subjects else ():
        more |= {(folder.name, f.stem): f for f in sorted(folder.glob("*.png")) if f.stem in styles}
    return read_named(cells, known, styles), read_named(more, sorted({name for name, _ in more}), styles)


def of_whole_styles(files: Cells, config: Config) -> Cells:
    """Without the folders, other than those of --styles, that have few of the base's concepts: a concept counts that
    every folder has, and one of odds and ends would leave none."""
    listed = known_concepts(files, everywhere=False)
    held = Counter(style for concept, style in files if concept in listed)
    whole = {style for style, count in held.items() if count >= config.images + config.concepts} | set(config.styles)
    return {cell: file for cell, file in files.items() if cell[1] in whole}


def draw_run(
    config: Config, workshop: Workshop, pictures: Pictures, style: str, seed: int, subjects: Mapping[str, Path]
) -> Drawn:
    """Learn one style with one seed, and draw what is to be judged.

    The split depends on the seed alone, so that the base draws the same pictures for all styles, once.
    """
    taught, asked = split(config, pictures, seed)
    adapter = learn_style(config, workshop, style, taught, seed)
    seeds = [1000 * seed + place for place in range(len(asked))]
    prompts = [config.prompt.replace("{concept}", concept) for concept in asked]
    syntax: Syntax = "plain" if prompts == asked else "a1111"
    scale, strength = config.guidance, config.adapter_guidance
    before = workshop.drawn(f"base-{seed}", prompts, seeds, {}, syntax=syntax, guidance=scale)
    after = workshop.drawn(
        f"{style}-{seed}-drawn", prompts, seeds, {adapter: 1.0}, syntax=syntax, guidance=scale, strength=strength
    )
    few, (a, b) = seeds[: config.mixed], config.weights
    mix = {}
    for name, subject in subjects.items():
        mixtures = {"style_alone": {adapter: 1.0}, "subject_alone": {subject: 1.0}, "mixed": {adapter: a, subject: b}}
        mix[name] = {
            what: workshop.drawn(f"mix-{name}-{seed}-{what}", [f"sks {name}"] * len(few), few, weights, guidance=scale)
            for what, weights in mixtures.items()
        }
    print(json.dumps({"drawn": style, "seed": seed}), file=sys.stderr, flush=True)
    return Drawn(style, seed, pictures.cells([(concept, style) for concept in asked]), before, after, mix)


def split(config: Config, pictures: Pictures, seed: int) -> tuple[list[str], list[str]]:
    """The concepts that are taught with a seed, and those that are drawn."""
    order = [pictures.concepts[i] for i in randomness.permutation(len(pictures.concepts), seed, "split")]
    return order[: config.images], order[config.images : config.images + config.concepts]


def learn_style(config: Config, workshop: Workshop, style: str, taught: Sequence[str], seed: int) -> Path:
    """A style, from its pictures of the taught concepts, by the shipped recipe."""
    files = [f"{concept.replace(' ', '-')}.png" for concept in taught]
    pictures = {file: config.data / style / file for file in files}
    options = ["--seed", str(seed), *words(config.style_options)]
    return adapter_of(workshop.learn(f"{style}-{seed}", "lora", "lora-style.toml", pictures, {}, options))


def chosen_subjects(config: Config) -> tuple[str, ...]:
    """The subjects of the mixes; none without their folder."""
    if not config.subjects:
        return ()
    names = sorted(folder.name for folder in config.subjects.iterdir() if folder.is_dir())
    return config.mix_with or tuple(names[i] for i in randomness.permutation(len(names), 0, "subjects")[:4])


def learn_subject(config: Config, workshop: Workshop, subject: str) -> Path:
    """A subject, from its pictures in styles that are not judged, with captions that name their style."""
    assert config.subjects is not None
    found = sorted((config.subjects / subject).glob("*.png"))
    files = {file.name: file for file in found if file.stem not in config.styles}
    captions = {name: f"sks {subject}, {file.stem} style" for name, file in files.items()}
    options = ["--seed", "0", "--trigger", f"sks {subject}", *words(config.subject_options)]
    return adapter_of(workshop.learn(subject, "lora", "lora-subject.toml", files, captions, options))


def adapter_of(learned: Learned) -> Path:
    """The adapter's file, which the LoRA trainer always leaves."""
    assert learned.adapter is not None
    return learned.adapter


def words(options: Sequence[str]) -> list[str]:
    """steps=480 -> --steps=480."""
    return [f"--{option}" for option in options]


def judge_run(config: Config, base: Base, judge: Judge, run: Drawn) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One style, one training seed: its figures, and the outcome of every single picture for the intervals."""
    true = run.true
    real, rebuilt = look(judge, true.pixels), look(judge, reconstruct(base, true.pixels))
    before, after = look(judge, run.before), look(judge, run.after)
    named = {"base": before, "adapter": after, "reconstruction": rebuilt}
    distances = {name: paired_kernel_distance(verdict.features, real.features) for name, verdict in named.items()}
    closed = (distances["base"] - distances["adapter"]) / (distances["base"] - distances["reconstruction"])
    outcome = {
        "style_of_real": real.right_style(true.style),
        "style_of_reconstruction": rebuilt.right_style(true.style),
        "style_before": before.right_style(true.style),
        "style_after": after.right_style(true.style),
        "top5_before": before.right_concept(true.concept, 5),
        "top5_after": after.right_concept(true.concept, 5),
        "closed": torch.tensor([closed]),
    }
    result: dict[str, Any] = {
        name: verdict.accuracies(true) | {"kid_x1000": round(1000 * distances[name], 2)}
        for name, verdict in named.items()
    }
    result |= {"real": real.accuracies(true), "distance_closed": round(closed, 3)}
    if run.mix:
        result["mix"] = {name: judge_mix(config, judge, run.style, name, drawn) for name, drawn in run.mix.items()}
    return result, outcome


def judge_mix(
    config: Config, judge: Judge, style: str, subject: str, mixtures: Mapping[str, Tensor]
) -> dict[str, float]:
    """Style and subject alone and together. A picture shows the subject if, of all subjects, the judge names it."""
    assert config.subjects is not None
    names = sorted(folder.name for folder in config.subjects.iterdir() if folder.is_dir())
    places = torch.tensor([judge.classes.index(name) for name in names])

    def shares(pictures: Tensor) -> tuple[float, float]:
        verdict = look(judge, pictures)
        named = verdict.class_logits[:, places].argmax(1) == names.index(subject)
        styled = verdict.style_logits.argmax(1) == judge.styles.index(style)
        return float(styled.float().mean()), float(named.float().mean())

    style_alone, subject_in_style = shares(mixtures["style_alone"])
    style_in_subject, subject_alone = shares(mixtures["subject_alone"])
    style_mixed, subject_mixed = shares(mixtures["mixed"])
    return {
        "style_alone": round(style_alone, 4),
        "subject_alone": round(subject_alone, 4),
        "style_mixed": round(style_mixed, 4),
        "subject_mixed": round(subject_mixed, 4),
        "style_without_its_adapter": round(style_in_subject, 4),
        "subject_without_its_adapter": round(subject_in_style, 4),
    }


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.style_fidelity")


if __name__ == "__main__":
    cli.run(main)
