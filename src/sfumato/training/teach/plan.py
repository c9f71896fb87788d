"""What `sfumato teach` is about to do, in commands and figures, and the record by which a second one goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato.errors import RunError
from sfumato.models.prompts.syntax import has_phrase
from sfumato.training.teach.lesson import IDENTIFIER, WEIGHTS, Lesson
from sfumato.utils.atomic import require_disk_space, write_text
from sfumato.utils.formatting import format_list, join_command, quote_argument
from sfumato.utils.text_files import read_json_object

if TYPE_CHECKING:
    from sfumato.data.checks.report import Report

RECORD = "teach.json"
SHEET_SEED = 7
_CHECKPOINTS = 3
"""That lie in a run's folder at once."""
Recipe = tuple[str, str]
"""A trainer and its shipped config."""
_RECIPES: dict[str, Recipe] = {
    "style": ("lora", "lora-style.toml"),
    "subject": ("dreambooth", "dreambooth-subject.toml"),
    "word": ("textual_inversion", "word.toml"),
}
_TO_MIX: Recipe = ("lora", "lora-subject.toml")
"""For a subject whose captions name the style of each picture: in a mix with a style it keeps its shape better than by
DreamBooth. Photographs without such captions want the class preserved, which DreamBooth does."""


# --- the commands ----------------------------------------------------------------------------------------------------


def recipe_of(lesson: Lesson, captions: Sequence[str]) -> Recipe:
    """How it is trained. captions: of the pictures, empty for one without."""
    more = [caption for caption in captions if has_phrase(lesson.trigger, caption) and caption != lesson.trigger]
    to_mix = lesson.kind == "subject" and len(more) == len(captions)
    return _TO_MIX if to_mix else _RECIPES[lesson.kind]


def training_words(
    lesson: Lesson, recipe: str, images: Path, output: Path, captions: Sequence[str], options: Sequence[str]
) -> tuple[list[str], str]:
    """(the words of the training after `sfumato`, what it takes for captions).

    recipe: the config as a person names it here. captions: of the pictures, empty for one without. options: of the base
    model, the seed and the like, as they are.
    """
    words = ["train", recipe_of(lesson, captions)[0], recipe, "--images", str(images), "--output", str(output)]
    own, missing = [caption for caption in captions if caption], sum(not caption for caption in captions)
    if lesson.kind == "style":
        said = "the captions" if not missing else "the files' names" if not own else "the captions, else files' names"
        return [*words, *options], f"{said}, which name the things and not the style"
    if lesson.kind == "word":
        words += ["--placeholder", lesson.trigger]
        if own and not missing and all(has_phrase(lesson.of_class, caption) for caption in own):
            words += ["--stands-for", lesson.of_class]
            return [*words, *options], f'the captions, with {lesson.trigger} for "{lesson.of_class}"'
        aside = f"; the {len(own)} captions do not all say {lesson.of_class!r} and are left aside" if own else ""
        return [*words, *options], f'"{lesson.trigger}" for all{aside}'
    if recipe_of(lesson, captions) == _TO_MIX:
        words += ["--trigger", lesson.trigger]
        return [*words, *options], f'the captions, which say "{lesson.trigger}"'
    words += ["--class-name", lesson.of_class]
    identifier = lesson.trigger.removesuffix(f" {lesson.of_class}")
    if own and all(has_phrase(lesson.trigger, caption) for caption in own):
        words += ["--identifier", identifier] if identifier != IDENTIFIER else []
        more = f', and "{lesson.trigger}" for {missing} without' if missing else ""
        return [*words, *options], f'the captions, which say "{lesson.trigger}"{more}'
    words += ["--identifier", identifier] if identifier != IDENTIFIER else []
    if own and not missing:
        words += ["--caption", f"{lesson.trigger}, {{caption}}"]
        return [*words, *options], f'the captions, each after "{lesson.trigger}"'
    if own:
        words += ["--instance-prompt", lesson.trigger, "--class-prompt", lesson.of_class]
        return [*words, *options], f'"{lesson.trigger}" for all; only {len(own)} have captions, which are left aside'
    return [*words, *options], f'"{lesson.trigger}" for all'


def sheet_words(lesson: Lesson, learned: Path, prompts: Sequence[str], base: Sequence[str], sheet: Path) -> list[str]:
    """The words of the command that draws the sheet. base: the options that name the base model."""
    seed = ["--seed", str(SHEET_SEED)]
    if lesson.kind == "word":  # which has no weight: beside each prompt stands what the base makes of plain words
        pairs = [form for prompt in prompts for form in (prompt.replace(lesson.trigger, lesson.of_class), prompt)]
        seeds = ",".join(str(SHEET_SEED + place) for place in range(3))
        axes = ["--x", f"prompt={'|'.join(pairs)}", "--y", f"seed={seeds}"]
        return ["grid", *axes, "--embedding", str(learned), *base, "-o", str(sheet.with_suffix(""))]
    weights = ",".join(f"{weight:g}" for weight in WEIGHTS)
    adapter = ["--lora", str(learned), "--sweep", f"{learned.stem}={weights}"]
    return ["generate", *prompts, *adapter, *base, *seed, "-o", str(sheet)]


def sheet_file(lesson: Lesson, output: Path) -> Path:
    """Where the sheet is."""
    return output / "sheet" / "grid.png" if lesson.kind == "word" else output / "sheet.png"


def next_commands(
    lesson: Lesson, learned: Path, prompts: Sequence[str], base: Sequence[str], others: Sequence[Path]
) -> list[str]:
    """Three commands to go on with. others: adapters that were taught on the same base."""
    program, prompt = program_word(), prompts[0]
    option = "--embedding" if lesson.kind == "word" else "--lora"
    here = [option, str(learned), *base]
    picture = str(learned.with_name("one.png"))
    found = [["generate", prompt, *here, "--seed", "3", "-o", picture]]
    if others:
        mixed = ["generate", prompt, *here, "--lora", f"{others[0]}", "--seed", "3"]
        found.append([*mixed, "-o", str(learned.with_name("mixed.png"))])
    else:
        axes = ["--x", f"prompt={'|'.join(prompts[:3])}", "--y", "seed=1,2,3"]
        found.append(["grid", *axes, *here, "-o", str(learned.with_name("grid"))])
    found.append(["inspect", str(learned)])
    return [f"{program} {join_command(words)}" for words in found]


def program_word() -> str:
    """What calls sfumato from this shell: by its path, if it was called so and no environment is active."""
    called = Path(sys.argv[0])
    if called.is_relative_to(Path.cwd()):  # PowerShell runs nothing in quotes, which a space above may need
        called = called.relative_to(Path.cwd())
    return quote_argument(str(called)) if called.name == "sfumato" and shutil.which("sfumato") is None else "sfumato"


# --- what it takes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Costs:
    """Bytes. memory: at the peak of a step, or of encoding and drawing where these take more. device: where it is.
    disk: all that lies in the output folder at once."""

    memory: int
    device: Literal["gpu", "cpu"]
    disk: int


def costs_of(lesson: Lesson, recipe: Recipe, base_source: str, prediction_type: str | None, copied: int) -> Costs:
    """What the lesson takes, told from the base's shapes before any weight is read. copied: bytes of pictures that are
    copied. Raises as `load_base`."""
    import torch

    from sfumato.precision import forecast_precision
    from sfumato.training import memory as forecast

    device: Literal["gpu", "cpu"] = "gpu" if torch.cuda.is_available() else "cpu"
    base = forecast.fake_base(base_source, device, None, prediction_type)
    defaults, is_word = base.defaults, lesson.kind == "word"
    # As the shipped configs have it: a style's rank is 32, and half of a subject's step holds its class.
    rank = 32 if lesson.kind == "style" else defaults.rank
    draws_class = recipe[0] == "dreambooth"
    subject_batch = 1 if draws_class and base_source != "pocket" else max(1, defaults.batch // 2)
    batch = subject_batch if lesson.kind == "subject" else defaults.batch
    way = forecast.TrainingTask(
        "",
        "words" if is_word else "lora",
        pictures=2 if lesson.kind == "subject" else 1,
        targets="everything",
        text=is_word,
    )
    precision = forecast_precision("auto", device, adapting=True)
    setting = forecast.MemorySetting(device, precision, base.resolution, batch, rank)
    step = forecast.step_memory(base, way, setting)
    drawing = forecast.drawing_memory(base, setting, forecast.samples_at_once(base, setting))
    memory = max(step.total(way, device), forecast.encoding_memory(base, setting), drawing)
    trained = 4 * sum(shape.numel() for shape in step.trained) if not is_word else 2**16
    drawn = (200 if base_source != "pocket" else 64) * draws_class + 40
    return Costs(memory, device, (1 + 3 * _CHECKPOINTS) * trained + drawn * 2 * base.resolution**2 + copied)


def memory_here(device: Literal["gpu", "cpu"]) -> int | None:
    """Bytes that the GPU or the machine has; None where that cannot be told."""
    if device == "gpu":
        import torch

        return int(torch.cuda.mem_get_info()[1])
    import os

    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def require_room(output: Path, costs: Costs) -> int:
    """Bytes that are free on the disk of the output folder. Raises RunError where that is too little."""
    place = next(each for each in (output.absolute(), *output.absolute().parents) if each.is_dir())
    try:
        require_disk_space(place, costs.disk)
    except OSError as error:
        raise RunError(f"{output}: {error.strerror}. Make room, or give an --output on another disk.") from None
    return shutil.disk_usage(place).free


def size(count: int) -> str:
    """Bytes as a person reads them."""
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.0f} MiB"


# --- the record ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What was taught in a folder. words: of the training. pictures: by label a digest of pixels and caption."""

    name: str
    words: tuple[str, ...]
    pictures: Mapping[str, str]

    @classmethod
    def of(cls, name: str, words: Sequence[str], report: Report) -> Record:
        """Of what is about to be taught."""
        pictures = {
            label: hashlib.sha256(look.content + "\n".join(example.captions).encode()).hexdigest()[:16]
            for label, look, example in zip(report.labels, report.looks, report.examples, strict=True)
        }
        return cls(name, tuple(words), pictures)

    @classmethod
    def read(cls, output: Path) -> Record | None:
        """That of the folder; None if there is none that can be read."""
        found = read_json_object(output / RECORD)
        words, pictures = found.get("words"), found.get("pictures")
        if not isinstance(words, list) or not isinstance(pictures, dict):
            return None
        return cls(str(found.get("name", "")), tuple(map(str, words)), {k: str(v) for k, v in pictures.items()})

    def write(self, output: Path) -> None:
        """Into the folder."""
        facts = {"name": self.name, "words": list(self.words), "pictures": dict(self.pictures)}
        write_text(output / RECORD, json.dumps(facts, indent=2) + "\n")

    def changes(self, now: Record) -> str:
        """What is otherwise now, in one clause; empty if nothing is."""
        old, new = self.pictures, now.pictures
        parts = [
            f"{what} {format_list(names)}"
            for what, names in (
                ("new", [name for name in new if name not in old]),
                ("gone", [name for name in old if name not in new]),
                ("changed", [name for name in new if name in old and old[name] != new[name]]),
            )
            if names
        ]
        found = [f"pictures: {'; '.join(parts)}"] if parts else []
        was, is_now = _options(self.words), _options(now.words)
        found += [
            f"{option} {is_now.get(option, 'unset')}, then {was.get(option, 'unset')}"
            for option in sorted(was.keys() | is_now.keys())
            if was.get(option) != is_now.get(option)
        ]
        return ", ".join(found)


def _options(words: Sequence[str]) -> dict[str, str]:
    """The options among the words of a command, each with its value; what comes before them by the word itself."""
    found, option = dict[str, str](), ""
    for word in words:
        if word.startswith("--"):
            option = word
            found[option] = "given"
        elif option:
            found[option], option = word, ""
        else:
            found[word] = "given"
    return found
