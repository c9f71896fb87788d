"""How well a subject is learned: from two drawings of it by the shipped recipes, judged by a third, not shown.

Each subject is learned from its drawings by two hands and asked for in the style of a third, which the base knows. What
is drawn is compared with 61 true drawings in that style: the subject's own and 60 distractors, the other subjects and
things that the base knows. The rank of the true one, by the cosine of the judge's features, gives top-1 and top-5; the
judge also says which of the base's styles the picture is in. Before: the base, asked for the nearest thing that it has
a name for. Prints JSON.

    python -m bench.subject_fidelity --data emoji --subjects emoji-subjects

The judge has learned from real pictures only, and from none of the 61 things, in no style. Were it to know the
distractors, it would have a place in its features for each of them and none for the true drawing, and a blurred
picture would fall into one of those places; were it to know the two drawings that were taught, it would take a copy of
them for the subject. So all 61 are equally new to it. How far it can be trusted stands in the report: the ranks of
drawings of the subjects by other hands, the taught ones among them, and of the VAE's reconstructions of the true ones,
and the styles that it sees in those and in the true drawings. The rank of a true drawing says nothing: it is found
among drawings of which it is one ("true flat, itself among the 61"), so that its top-1 and top-5 are 1 by construction.

What is learned and drawn stays in the folder --work: run the command again after an interruption, and it goes on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.judge import Judge, cached_judge, look
from bench.judge_pictures import read_named
from bench.real import Cells, cells_of, check_least, known_concepts, print_report, styles_of
from bench.style_runs import DREAMBOOTH, Learned, Workshop, reconstruct, to_image
from bench.style_summary import paired
from sfumato import cli, load_base
from sfumato.adapters.weights import parse_span
from sfumato.errors import ConfigError, DataError
from sfumato.precision import decide
from sfumato.utils import randomness
from sfumato.utils.atomic import atomic_path
from sfumato.utils.image_grid import contact_sheet

NEAREST: Mapping[str, str] = MappingProxyType(
    {
        "accordion": "drum", "badger": "chipmunk", "broccoli": "deciduous tree", "bubble tea": "tropical drink",
        "cupcake": "birthday cake", "dodo": "turkey", "donkey": "goat", "flamingo": "bird", "garlic": "chestnut",
        "giraffe": "camel", "hedgehog": "mouse", "kangaroo": "deer", "kite": "balloon", "llama": "ewe",
        "magnet": "paperclip", "mango": "peach", "moose": "deer", "otter": "chipmunk", "teddy bear": "bear",
    }
)  # fmt: skip
"""Subject -> the nearest thing that the base has a name for, said before anything was drawn."""
DISTRACTORS = 60


@dataclass(frozen=True)
class Method:
    """A way to learn a subject: program, recipe, and further words of the command line.

    word: whether it learns a new word in place of "sks CLASS".
    """

    program: str
    recipe: str
    options: tuple[str, ...]
    word: bool


METHODS: Mapping[str, Method] = MappingProxyType(
    {
        # The difference from the base is what the mixer loads; a whole folder draws the same and is larger.
        "dreambooth-full": Method("dreambooth", DREAMBOOTH["full"], ("--save", "difference"), word=False),
        "dreambooth-lora": Method("dreambooth", DREAMBOOTH["lora"], (), word=False),
        "textual-inversion-1": Method("textual_inversion", "word.toml", ("--vectors", "1"), word=True),
        "textual-inversion-4": Method("textual_inversion", "word.toml", ("--vectors", "4"), word=True),
        "pivotal": Method("lora", "lora-pivotal.toml", (), word=True),
    }
)
GOALS = ("dreambooth-lora", "pivotal")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn subjects that the base has not seen, by the shipped recipes, and judge what comes out."""

    data: Path
    """Folder of STYLE/CONCEPT.png, with the base's styles and others."""
    subjects: Path
    """Folder of SUBJECT/STYLE.png, of things that neither the base nor --data knows."""
    methods: tuple[str, ...] = tuple(METHODS)
    """dreambooth-full, dreambooth-lora, textual-inversion-1, textual-inversion-4, pivotal. Repeat it for several."""
    subject: tuple[str, ...] = ()
    """The subjects to learn. Unset: the first --subject-count of the folder."""
    subject_count: int | None = None
    """How many subjects are learned. Unset: all."""
    seeds: int = 4
    """Training seeds of each subject."""
    pictures: int = 4
    """Pictures drawn after each training."""
    hands: tuple[str, ...] = ("noto", "twemoji")
    """Whose drawings are learned from."""
    style: str = "flat"
    """The style that is asked for."""
    styles: tuple[str, ...] = ("noto", "twemoji", "flat", "blob")
    """The styles among which the judge chooses: those that the base can be asked for."""
    nearest: tuple[str, ...] = ()
    """SUBJECT=NAME: the nearest thing that the base has a name for, the subject's class; unset, and for subjects that
    the bench does not know, the subject's own name."""
    options: tuple[str, ...] = ()
    """METHOD:steps=100, another setting of a method's trainer, to try it; without METHOD: of all."""
    over_steps: str | None = None
    """START-END: draw with each adapter in these steps alone, too, and tell the change. Unset: as its file asks."""
    base: str = "pocket"
    """The base that learns."""
    judge_steps: int = 2400
    """Optimizer steps of the judge: after 800 it sees a third of the true flat drawings in another style."""
    cache: Path = Path(".cache/judge")
    """Folder of trained judges."""
    work: Path = Path(".cache/subject_fidelity")
    """Folder that keeps what is learned and drawn; not made again, and refused if other code made it."""
    sheet: Path | None = None
    """File that receives a row for each subject: the taught drawings, the base's, each method's, and the true one."""
    out: Path | None = None
    """File that receives the JSON besides."""


@dataclass(frozen=True)
class Drawn:
    """What one method gave: pictures (subjects, pictures of all seeds, 3, h, w) uint8, and its trainings.

    in_span: the same drawn with the adapters in --over-steps alone.
    """

    pictures: Tensor
    trainings: tuple[Learned, ...]
    in_span: Tensor | None = None


def measure(config: Config) -> dict[str, Any]:
    """The whole report: first everything is learned and drawn, then judged."""
    check(config)
    real, known = read_subjects(config), cells_of(config.data)
    names = list(dict.fromkeys(name for name, _ in real))
    rivals = distractors(known, names, config.styles)
    subjects = chosen(config, names)
    workshop = Workshop(config.work, config.base, load_base(config.base, precision=decide("fp32")))
    before = draw_before(config, workshop, subjects)
    after = {method: learn_all(config, workshop, method, subjects, real) for method in config.methods}
    if config.sheet:
        save_sheet(config, subjects, real, before, after)

    judge = judge_without(config, known, {*names, *rivals})
    true = {(name, config.style): (known | real)[name, config.style] for name in (*names, *rivals)}
    gallery = look(judge, read_named(true, (*names, *rivals), judge.styles).pixels).features
    places = [names.index(subject) for subject in subjects]
    asked = (gallery, places, config.style, config.styles)
    outcome = {name: scores(judge, drawn.pictures, *asked) for name, drawn in after.items()}
    spanned = {name: scores(judge, drawn.in_span, *asked) for name, drawn in after.items() if drawn.in_span is not None}
    first = scores(judge, before, *asked)
    return {
        "subjects": len(subjects),
        "seeds": config.seeds,
        "pictures_of_each": before.shape[1],
        "candidates": DISTRACTORS + 1,
        "judge": trust(config, workshop, judge, gallery, names, real),
        "methods": {name: figures(subjects, first, outcome[name], after[name].trainings) for name in after},
        "over_steps": {name: changes(outcome[name], spanned[name]) for name in spanned},
        "goals": {name: goals(outcome[name]) for name in GOALS if name in after},
    }


def check(config: Config) -> None:
    """Refuse what makes no sense before anything is learned."""
    unknown = [method for method in config.methods if method not in METHODS]
    if unknown:
        raise ConfigError(f"--methods {unknown[0]}: unknown; wanted {', '.join(METHODS)}.")
    check_least(config, "seeds", "pictures", "subject_count")
    if config.subject and config.subject_count is not None:
        raise ConfigError("--subject and --subject-count are both given; each chooses the subjects, so give one.")
    for text in config.options:
        split_option(text)
    for pair in config.nearest:
        if not all(pair.partition("=")):
            raise ConfigError(f"--nearest {pair}: wanted SUBJECT=NAME, such as lynx=cat.")
    if config.over_steps is not None:
        parse_span(config.over_steps)
    if config.style not in config.styles:
        raise ConfigError(f"--style {config.style} is not among --styles {', '.join(config.styles)}; add it there.")
    if config.style in config.hands:
        raise ConfigError(f"--style {config.style} is one of --hands; ask for a style that is not taught.")


def read_subjects(config: Config) -> Cells:
    """(subject, style) -> picture, names with spaces. Raises DataError where one lacks a drawing that is needed."""
    folders = sorted(f for f in config.subjects.iterdir() if f.is_dir()) if config.subjects.is_dir() else []
    if not folders:
        raise DataError(f"{config.subjects} holds no folder; give --subjects a folder laid out as SUBJECT/STYLE.png.")
    for folder in folders:
        missing = [style for style in (*config.hands, config.style) if not (folder / f"{style}.png").exists()]
        if missing:
            raise DataError(f"{folder / missing[0]}.png is missing; add it, or take the subject's folder away.")
    return {(f.name.replace("-", " "), file.stem): file for f in folders for file in sorted(f.glob("*.png"))}


def chosen(config: Config, names: Sequence[str]) -> list[str]:
    """The subjects to learn."""
    asked = [name.replace("-", " ") for name in config.subject]
    unknown = [name for name in asked if name not in names]
    if unknown:
        raise ConfigError(f"--subject {unknown[0]}: not in {config.subjects}, which has {', '.join(names)}.")
    return asked or list(names[: config.subject_count])


def distractors(known: Cells, names: Sequence[str], styles: Sequence[str]) -> list[str]:
    """The base's concepts that fill up 60 distractors, where the other subjects are fewer."""
    missing = [style for style in styles if style not in styles_of(known)]
    if missing:
        raise DataError(f"--data has no style {missing[0]}; it has {', '.join(styles_of(known))}.")
    concepts = [name for name in known_concepts(known) if name not in names]
    order = [concepts[place] for place in randomness.permutation(len(concepts), 0, "distractors")]
    wanted = max(0, DISTRACTORS + 1 - len(names))
    if len(order) < wanted:
        raise DataError(f"--data has {len(order)} of the base's concepts in all its styles; wanted {wanted}.")
    return order[:wanted]


def judge_without(config: Config, known: Cells, names: set[str]) -> Judge:
    """The judge that has learned from no picture of these things."""
    seen = {cell: file for cell, file in known.items() if cell[0] not in names}
    concepts, styles = known_concepts(seen), styles_of(known)
    asked = {cell: file for cell, file in seen.items() if cell[0] in concepts}
    more = {cell: file for cell, file in seen.items() if cell[0] not in concepts}
    others, pictures = read_named(more, sorted({name for name, _ in more}), styles), read_named(asked, concepts, styles)
    return cached_judge(pictures, cache=config.cache, steps=config.judge_steps, seed=0, others=others)


def nearest(config: Config, subject: str) -> str:
    """What the base would call it: the subject's class."""
    given = dict(pair.replace("-", " ").split("=", 1) for pair in config.nearest)
    return given.get(subject, NEAREST.get(subject, subject))


def draw_before(config: Config, workshop: Workshop, subjects: Sequence[str]) -> Tensor:
    """The base's pictures of the nearest thing: (subjects, pictures, 3, h, w), from the seeds of those after."""
    seeds = [seed for training in range(config.seeds) for seed in drawing_seeds(config, training)]
    rows = []
    for subject in subjects:
        prompts = [f"{nearest(config, subject)}, {config.style} style"] * len(seeds)
        rows.append(workshop.drawn(f"{subject}-before", prompts, seeds, {}))
    return torch.stack(rows)


def learn_all(config: Config, workshop: Workshop, method: str, subjects: Sequence[str], real: Cells) -> Drawn:
    """Learn each subject with each seed, and draw it after each."""
    rows: dict[str | None, list[Tensor]] = {span: [] for span in (None, *filter(None, [config.over_steps]))}
    trainings = []
    for subject in subjects:
        parts: dict[str | None, list[Tensor]] = {span: [] for span in rows}
        for seed in range(config.seeds):
            learned = learn(config, workshop, method, subject, seed, real)
            seeds = drawing_seeds(config, seed)
            called = word_for(subject) if METHODS[method].word else f"sks {nearest(config, subject)}"
            prompts = [f"{called}, {config.style} style"] * len(seeds)
            weights = {learned.adapter: 1.0} if learned.adapter else {}
            name = f"{subject}-{method}-{seed}-drawn"
            for span, drawn in parts.items():
                drawn.append(workshop.drawn(name, prompts, seeds, weights, learned.words, span=span))
            trainings.append(learned)
            print(json.dumps({"method": method, "drawn": subject, "seed": seed}), file=sys.stderr, flush=True)
        for span, drawn in parts.items():
            rows[span].append(torch.cat(drawn))
    pictures, *in_span = (torch.stack(drawn) for drawn in rows.values())
    return Drawn(pictures, tuple(trainings), *in_span)


def learn(config: Config, workshop: Workshop, method: str, subject: str, seed: int, real: Cells) -> Learned:
    """One training, from the hands' drawings with captions that name the subject and the hand."""
    how, of_class, word = METHODS[method], nearest(config, subject), word_for(subject)
    options = ["--seed", str(seed), *how.options]
    if how.word:
        options += ["--train-words" if how.program == "lora" else "--placeholder", word]
        options += ["--stands-for", f"sks {of_class}", "--initial-words", of_class]
    else:
        options += ["--class-name", of_class]
    for text in config.options:
        name, setting = split_option(text)
        options += [f"--{setting}"] if name in ("", method) else []
    pictures = {f"{hand}.png": real[subject, hand] for hand in config.hands}
    captions = {f"{hand}.png": f"sks {of_class}, {hand} style" for hand in config.hands}
    return workshop.learn(f"{subject}-{method}-{seed}", how.program, how.recipe, pictures, captions, options)


def split_option(text: str) -> tuple[str, str]:
    """pivotal:rank=4 -> ("pivotal", "rank=4"); rank=4 -> ("", "rank=4"). Raises ConfigError for an unknown method."""
    key, equals, value = text.partition("=")
    method, _, setting = key.rpartition(":")
    if method and method not in METHODS:
        raise ConfigError(f"--options {text}: there is no method {method}; wanted {', '.join(METHODS)}.")
    return method, f"{setting}{equals}{value}"


def word_for(subject: str) -> str:
    """The new word that means it."""
    return f"<{subject.replace(' ', '-')}>"


def drawing_seeds(config: Config, training: int) -> list[int]:
    """The seeds of the pictures that are drawn after the training with this seed; no two trainings share one."""
    return [1000 * training + place for place in range(config.pictures)]


def scores(
    judge: Judge, pictures: Tensor, gallery: Tensor, places: Sequence[int], style: str, among: Sequence[str]
) -> dict[str, Tensor]:
    """For pictures (subjects, pictures, 3, h, w) the outcome of each: top1, top5 and style, (subjects, pictures) of 0
    and 1. gallery: (candidates, features) of true drawings. places: each subject's own among them. among: styles."""
    verdict = look(judge, pictures.flatten(0, 1))
    features = verdict.features.unflatten(0, pictures.shape[:2])
    rank = torch.stack([ranks(some, gallery, place) for some, place in zip(features, places, strict=True)])
    right = verdict.style_logits[:, [judge.styles.index(name) for name in among]].argmax(1) == among.index(style)
    return {
        "top1": (rank < 1).float(),
        "top5": (rank < 5).float(),
        "style": right.float().unflatten(0, pictures.shape[:2]),
    }


def ranks(features: Tensor, gallery: Tensor, place: int) -> Tensor:
    """How many of 60 distractors are nearer, by the cosine, than the true drawing, which is at `place` of the gallery.

    features: (n, d). gallery: (candidates, d). Returns (n,).
    """
    rivals = [other for other in range(len(gallery)) if other != place][:DISTRACTORS]
    near = F.normalize(features, dim=1) @ F.normalize(gallery, dim=1).T
    return (near[:, rivals] > near[:, [place]]).sum(1)


def figures(
    subjects: Sequence[str], before: dict[str, Tensor], after: dict[str, Tensor], trainings: Sequence[Learned]
) -> dict[str, Any]:
    """One method: shares before and after with intervals over subjects, its cost, and each subject's shares."""
    costs: dict[str, list[float]] = {
        "minutes": [training.minutes for training in trainings],
        "cpu_minutes": [training.cpu_minutes for training in trainings],
        "size_bytes": [training.size_bytes for training in trainings],
    }
    return {
        **changes(before, after),
        **{name: round(sum(values) / len(values), 3) for name, values in costs.items()},
        "each": {
            subject: {name: round(float(values[place].mean()), 4) for name, values in after.items()}
            for place, subject in enumerate(subjects)
        },
    }


def changes(before: dict[str, Tensor], after: dict[str, Tensor]) -> dict[str, Any]:
    """What another way of drawing the same adapters changes, with intervals over subjects."""
    return {name: paired(before[name], after[name]) for name in after}


def goals(after: dict[str, Tensor]) -> dict[str, bool]:
    """What ought to be reached by this method, and whether it is."""
    return {
        "true drawing in the top 5 at least 0.70": float(after["top5"].mean()) >= 0.7,
        "style at least 0.85": float(after["style"].mean()) >= 0.85,
    }


def trust(
    config: Config, workshop: Workshop, judge: Judge, gallery: Tensor, subjects: Sequence[str], real: Cells
) -> dict[str, dict[str, float]]:
    """The same shares for real drawings of all subjects, the first of the gallery: the true ones, whose top-1 and top-5
    are 1 by construction, what the VAE makes of them, and those by other hands."""
    found = {}
    for style in config.styles:
        if not all((subject, style) in real for subject in subjects):
            continue
        cells = {(subject, style): real[subject, style] for subject in subjects}
        pixels = read_named(cells, subjects, judge.styles).pixels
        named = {f"true {style}": pixels}
        if style == config.style:
            rebuilt = (reconstruct(workshop.base, pixels) + 1) * 127.5
            named = {f"true {style}, itself among the 61": pixels, f"reconstructed {style}": rebuilt.round().byte()}
        for name, pictures in named.items():
            score = scores(judge, pictures[:, None], gallery, range(len(subjects)), style, config.styles)
            found[name] = {kind: round(float(values.mean()), 4) for kind, values in score.items()}
    return found


def save_sheet(
    config: Config, subjects: Sequence[str], real: Cells, before: Tensor, after: Mapping[str, Drawn]
) -> None:
    """A row for each subject: the taught drawings, the base's picture, each method's first, and the true drawing."""
    shown = (*config.hands, config.style)
    rows = []
    for place, subject in enumerate(subjects):
        cells = {(subject, style): real[subject, style] for style in shown}
        *taught, true = (to_image(picture) for picture in read_named(cells, [subject], shown).pixels)
        drawn = [before[place, 0], *(each.pictures[place, 0] for each in after.values())]
        rows.append([*taught, *(to_image(picture) for picture in drawn), true])
    labels = [*config.hands, "base", *after, f"true {config.style}"]
    assert config.sheet is not None
    with atomic_path(config.sheet) as temporary:
        contact_sheet(rows, row_labels=subjects, column_labels=labels).save(temporary)


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, measure, argv, "bench.subject_fidelity")


if __name__ == "__main__":
    cli.run(main)
