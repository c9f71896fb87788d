"""How well a style is learned: from 16 pictures by the shipped recipe, judged on other concepts.

For styles that the base has never seen, and for several training seeds: draws concepts outside the 16 with the base and
with the adapter, from the same seeds, and puts both before a judge that has learned from real pictures only. The
judge's own accuracy on real pictures it did not see, and the same figures of the VAE's reconstructions of the true
pictures, stand beside. Prints JSON.

    python -m bench.style_fidelity --data emoji --subjects emoji-subjects
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.judge import Judge, Pictures, Verdict, accuracies, cached_judge, kernel_distance, look, read_pictures
from sfumato import Adapter, cli, compose, load_base, randomness
from sfumato.bases import Base
from sfumato.config import parse
from sfumato.drawing import draw
from sfumato.errors import RunError
from sfumato.files.atomic import write_text
from sfumato.precision import decide

CONFIGS = Path(__file__).parents[1] / "trainers/configs"
BASE_CONCEPTS = Path(__file__).parents[1] / "src/sfumato/pocket/concepts.json"


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn styles that the base has not seen, by the shipped recipe, and judge what comes out."""

    data: Path
    """Folder of STYLE/CONCEPT.png, with the base's styles and others."""
    subjects: Path | None = None
    """Folder of SUBJECT/STYLE.png; the first is mixed with each style. Unset: no mix is judged."""
    styles: tuple[str, ...] = ("openmoji", "joypixels", "glossy")
    """The styles to learn."""
    seeds: int = 3
    """Training seeds of each style; each also chooses other 16 pictures."""
    concepts: int = 70
    """Concepts drawn for each style and seed."""
    images: int = 16
    """Pictures to learn from."""
    weights: tuple[float, float] = (0.7, 1.0)
    """Weights of style and subject in the mix: the README's."""
    base: str = "pocket"
    """The base that learns."""
    subject: str = "flamingo"
    """The subject of the mix."""
    judge_steps: int = 1500
    """Optimizer steps of the judge."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    out: Path | None = None
    """File that receives the JSON besides."""


def measure(config: Config) -> dict[str, Any]:
    """The whole report."""
    known = list(json.loads(BASE_CONCEPTS.read_text(encoding="utf-8")))
    all_styles = sorted(folder.name for folder in config.data.iterdir() if folder.is_dir())
    present = [n for n in known if all((config.data / s / f"{n.replace(' ', '-')}.png").exists() for s in all_styles)]
    pictures = read_pictures(config.data, all_styles, present)
    hidden = withheld(pictures)
    judge = cached_judge(pictures.where(hidden, inside=False), cache=config.cache, steps=config.judge_steps, seed=0)
    base = load_base(config.base, precision=decide("fp32"))
    report: dict[str, Any] = {
        "judge_on_withheld_real": accuracies(judge, pictures.where(hidden, inside=True)),
        "concepts": len(present),
        "styles": {},
    }
    scores: list[dict[str, Tensor]] = []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        subject = learn_subject(config, work) if config.subjects else None
        for style in config.styles:
            runs = []
            for seed in range(config.seeds):
                result, score = judge_run(config, base, judge, pictures, style, seed, work, subject)
                runs.append(result)
                scores.append(score)
                print(json.dumps({"style": style, "seed": seed, **result}), file=sys.stderr, flush=True)
            report["styles"][style] = runs
    report["all"] = summary(scores)
    if config.subjects:
        report["mix"] = mix_summary([run["mix"] for runs in report["styles"].values() for run in runs])
    return report


def withheld(pictures: Pictures) -> set[tuple[str, str]]:
    """One cell in ten, for the judge's own test."""
    cells = [(concept, style) for concept in pictures.concepts for style in pictures.styles]
    return {cells[place] for place in randomness.permutation(len(cells), 0, "judge withheld")[: len(cells) // 10]}


def judge_run(
    config: Config,
    base: Base,
    judge: Judge,
    pictures: Pictures,
    style: str,
    seed: int,
    work: Path,
    subject: Path | None,
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One style, one training seed: its figures, and the outcome of every single picture for the intervals."""
    order = [pictures.concepts[i] for i in randomness.permutation(len(pictures.concepts), seed, f"split/{style}")]
    taught, asked = order[: config.images], order[config.images : config.images + config.concepts]
    images = work / f"{style}-{seed}-images"
    images.mkdir()
    for concept in taught:
        file = f"{concept.replace(' ', '-')}.png"
        shutil.copy(config.data / style / file, images / file)
    adapter = learn("lora-style.toml", images, work / f"{style}-{seed}", seed, config.base)

    true = pictures.where({(concept, style) for concept in asked}, inside=True)
    true = reordered(true, asked)
    real = look(judge, true.pixels)
    rebuilt = look(judge, reconstruct(base, true.pixels))
    seeds = [1000 * seed + place for place in range(len(asked))]
    before = look(judge, drawn(base, asked, seeds))
    with compose(base, Adapter(adapter, 1.0, "style")) as mix:
        after = look(judge, drawn(base, asked, seeds))
        mixed = judge_mix(config, base, judge, mix, subject, pictures.styles.index(style), seeds) if subject else None
    distances = {name: kernel_distance(v.features, real.features) for name, v in
                 {"base": before, "adapter": after, "reconstruction": rebuilt}.items()}  # fmt: skip
    closed = (distances["base"] - distances["adapter"]) / (distances["base"] - distances["reconstruction"])
    outcome = {
        "style_before": right_style(before, true),
        "style_after": right_style(after, true),
        "top5_before": right_concept(before, true),
        "top5_after": right_concept(after, true),
    }
    result = {
        "base": figures(before, true, distances["base"]),
        "adapter": figures(after, true, distances["adapter"]),
        "reconstruction": figures(rebuilt, true, distances["reconstruction"]),
        "distance_closed": round(closed, 3),
        **({"mix": mixed} if mixed else {}),
    }
    return result, outcome | {"closed": torch.tensor([closed])}


def learn(recipe: str, images: Path, output: Path, seed: int, base: str, *options: str) -> Path:
    """Train by the shipped config, as a person would."""
    words = ["train", "lora", str(CONFIGS / recipe), "--images", str(images), "--output", str(output)]
    words += ["--seed", str(seed), "--base", base, "--sample-every", "0", "--measure-every", "0", *options]
    if cli.main(words):
        raise RunError(f"{output.name}: the training failed; the lines above say why.")
    return output / f"{output.name}.safetensors"


def learn_subject(config: Config, work: Path) -> Path:
    """The subject, from its pictures in styles that are not judged, with captions that name their style."""
    images = work / "subject-images"
    images.mkdir()
    assert config.subjects is not None
    for file in sorted((config.subjects / config.subject).glob("*.png")):
        if file.stem not in config.styles:
            shutil.copy(file, images / file.name)
            (images / f"{file.stem}.txt").write_text(f"sks {config.subject}, {file.stem} style")
    return learn("lora-subject.toml", images, work / "subject", 0, config.base, "--trigger", f"sks {config.subject}")


def judge_mix(
    config: Config, base: Base, judge: Judge, mix: Any, subject: Path, style: int, seeds: Sequence[int]
) -> dict[str, float]:
    """Style and subject alone and together. A picture shows the subject if its features are nearer to the mean of the
    subject's real pictures than to that of any other subject's."""
    assert config.subjects is not None
    names = sorted(folder.name for folder in config.subjects.iterdir() if folder.is_dir())
    means = []
    for name in names:
        files = sorted((config.subjects / name).glob("*.png"))
        means.append(look(judge, torch.stack([pixels_of(file) for file in files])).features.mean(0))
    centres = torch.nn.functional.normalize(torch.stack(means), dim=1)
    prompt = [f"sks {config.subject}"] * len(seeds)

    def scores() -> tuple[float, float]:
        verdict = look(judge, drawn(base, prompt, seeds))
        nearest = (torch.nn.functional.normalize(verdict.features, dim=1) @ centres.T).argmax(1)
        shows = float((nearest == names.index(config.subject)).float().mean())
        return float((verdict.style_logits.argmax(1) == style).float().mean()), shows

    style_alone, _ = scores()
    mix.add(Adapter(subject, 1.0, "subject"))
    mix.set_weights({"style": 0.0})
    _, subject_alone = scores()
    mix.set_weights({"style": config.weights[0], "subject": config.weights[1]})
    style_mixed, subject_mixed = scores()
    values = (style_alone, subject_alone, style_mixed, subject_mixed)
    names_of = ("style_alone", "subject_alone", "style_mixed", "subject_mixed")
    return {name: round(value, 4) for name, value in zip(names_of, values, strict=True)}


def drawn(base: Base, prompts: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """(n, 3, h, w) uint8 pictures, with the settings that `sfumato generate` has."""
    return torch.stack([to_tensor(picture) for picture in draw(base, list(prompts), list(seeds))])


def to_tensor(picture: Any) -> Tensor:
    return torch.from_numpy(np.asarray(picture.convert("RGB")).copy()).permute(2, 0, 1)


def pixels_of(file: Path) -> Tensor:
    from PIL import Image

    with Image.open(file) as picture:
        return to_tensor(picture.convert("RGB").resize((64, 64)))


@torch.no_grad()
def reconstruct(base: Base, pixels: Tensor) -> Tensor:
    """What the VAE makes of uint8 pictures, (n, 3, h, w) in [-1, 1]."""
    parts = [base.decode(base.encode_pixels(chunk.float() / 127.5 - 1)[0]).float() for chunk in pixels.split(64)]
    return torch.cat(parts).clamp(-1, 1)


def reordered(pictures: Pictures, concepts: Sequence[str]) -> Pictures:
    """The pictures in the order of `concepts`, one each."""
    places = {pictures.concepts[int(c)]: i for i, c in enumerate(pictures.concept)}
    index = torch.tensor([places[concept] for concept in concepts])
    return dataclasses.replace(
        pictures, pixels=pictures.pixels[index], concept=pictures.concept[index], style=pictures.style[index]
    )


def right_style(verdict: Verdict, true: Pictures) -> Tensor:
    return (verdict.style_logits.argmax(1) == true.style).float()


def right_concept(verdict: Verdict, true: Pictures) -> Tensor:
    return (verdict.concept_logits.topk(5).indices == true.concept[:, None]).any(1).float()


def figures(verdict: Verdict, true: Pictures, distance: float) -> dict[str, float]:
    return {
        "style": round(verdict.style_accuracy(true.style), 4),
        "concept_top5": round(verdict.concept_accuracy(true.concept, 5), 4),
        "kid_x1000": round(1000 * distance, 2),
    }


def summary(scores: Sequence[dict[str, Tensor]]) -> dict[str, Any]:
    """Figures over all pictures, with 95 % intervals of the paired bootstrap over pictures."""
    joined = {name: torch.cat([score[name] for score in scores]) for name in scores[0]}

    def interval(value: Callable[[Tensor], Tensor], count: int) -> list[float]:
        generator = randomness.generator(0, "bootstrap")
        drawn = torch.stack([value(torch.randint(count, (count,), generator=generator)) for _ in range(2000)])
        low, high = drawn.quantile(torch.tensor([0.025, 0.975])).tolist()
        return [round(low, 4), round(high, 4)]

    count = len(joined["style_after"])
    found: dict[str, Any] = {"pictures": count}
    for kind in ("style", "top5"):
        before, after = joined[f"{kind}_before"], joined[f"{kind}_after"]
        found[kind] = {
            "before": round(float(before.mean()), 4),
            "after": round(float(after.mean()), 4),
            "change_95": interval(lambda i, b=before, a=after: (a[i] - b[i]).mean(), count),  # type: ignore[misc]
        }
    closed = joined["closed"]
    found["distance_closed"] = {
        "mean": round(float(closed.mean()), 3),
        "mean_95": interval(lambda i: closed[i].mean(), len(closed)),
    }
    found["goals"] = {
        "style at least 0.90": bool(found["style"]["after"] >= 0.9),
        "concept top-5 at most 0.10 under the base": bool(found["top5"]["before"] - found["top5"]["after"] <= 0.1),
        "half the distance closed": bool(found["distance_closed"]["mean"] >= 0.5),
    }
    return found


def mix_summary(runs: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means over the runs, and what the mix keeps of each solo score."""
    mean = {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}
    kept = {
        "style_kept": mean["style_mixed"] / max(mean["style_alone"], 1e-9),
        "subject_kept": mean["subject_mixed"] / max(mean["subject_alone"], 1e-9),
    }
    return {name: round(value, 4) for name, value in (mean | kept).items()}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; prints JSON."""
    config = parse(Config, sys.argv[1:] if argv is None else argv, program="style_fidelity")
    report = json.dumps(measure(config), indent=1)
    print(report)
    if config.out is not None:
        write_text(config.out, report + "\n")


if __name__ == "__main__":
    main()
