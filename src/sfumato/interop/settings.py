"""What a training of another tool was asked to do: its settings, taken one by one, and what is left of them.

What several tools call alike: optimizers, schedules, precision, resolution, prompts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sfumato.errors import ConfigError
from sfumato.models.prompts.files import read_prompts
from sfumato.training.optim.settings import DEFAULTS
from sfumato.utils.option_names import ABSENT, OPTIONS, UNASKED
from sfumato.utils.text_files import decode_text


@dataclass
class ForeignSettings:
    """script: the other tool's program, such as train_network.py. folder: where its paths count from, besides the
    present one. taken: settings that were looked at. notes: what its file says besides."""

    name: str
    script: str
    values: dict[str, Any]
    folder: Path
    taken: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    parts: dict[str, ForeignSettings] = field(default_factory=dict)

    def part(self, key: str) -> ForeignSettings:
        """The settings of a part of the model, or of another group of settings; none where it is unset."""
        if key not in self.parts:
            found = self.get(key)
            values = found if isinstance(found, dict) else {}
            self.parts[key] = ForeignSettings(f"{self.name}: {key}", self.script, values, self.folder)
        return self.parts[key]

    def with_parts(self) -> Iterator[ForeignSettings]:
        """These settings, and those of the parts that were looked at."""
        yield self
        for part in self.parts.values():
            yield from part.with_parts()

    def get(self, key: str, otherwise: Any = None) -> Any:
        """The setting as it is there, or `otherwise` where it is unset."""
        self.taken.add(key)
        value = self.values.get(key)
        return otherwise if value is None else value

    def find(self, given: str) -> Path | None:
        """The file or folder of a name, which counts from where the other tool is started: here, beside the file, or
        above its folder, as with SimpleTuner's config/NAME/config.json."""
        spelt = given.replace("\\", "/")
        places = (self.folder, Path.cwd(), *self.folder.parents[:2])
        return next((place / spelt for place in places if (place / spelt).exists()), None)

    def text(self, key: str, otherwise: str | None = None) -> str | None:
        """A setting that is a text, also where it looks like a number. Raises ConfigError for what is none."""
        value = self.get(key, otherwise)
        if value is True or isinstance(value, (list, dict)):
            quoted = " Put a name with spaces into quotes." if isinstance(value, list) and len(value) > 1 else ""
            raise ConfigError(f"{self.name}: {key} is {value!r:.40}; wanted a text.{quoted}")
        return None if value in (None, "", False) else str(value)

    def path(self, key: str) -> str | None:
        """A setting that names a file or folder, as it is seen from here where it lies beside the other tool's file."""
        given = self.text(key)
        there = None if given is None or Path(given).exists() else self.find(given)
        return given if there is None else there.as_posix()

    def number(self, key: str, otherwise: float | None = None) -> float | None:
        """A setting that is a number. Raises ConfigError for what is none."""
        value = self.get(key, otherwise)
        return otherwise if value is None or value == "" else self.as_number(key, value)

    def whole(self, key: str, otherwise: int | None = None) -> int | None:
        """A setting that is a whole number. Raises ConfigError for what is none."""
        value = self.number(key, otherwise)
        return None if value is None else self.as_whole(key, value)

    def as_number(self, key: str, value: Any) -> float:
        """The value of a setting, which is to be a number. Raises ConfigError for what is none."""
        try:
            if value is not True and math.isfinite(number := float(value)):
                return number
        except (TypeError, ValueError, OverflowError):
            pass
        raise ConfigError(f"{self.name}: {key} is {value!r:.40}; wanted a number.")

    def as_whole(self, key: str, value: Any) -> int:
        """The value of a setting, which is to be a whole number. Raises ConfigError for what is none."""
        if (number := self.as_number(key, value)) != int(number):
            raise ConfigError(f"{self.name}: {key} is {number:g}; wanted a whole number.")
        return int(number)

    def flag(self, key: str) -> bool:
        """Whether a setting is switched on."""
        value = self.get(key, False)
        return value.lower() not in ("", "false", "0", "no") if isinstance(value, str) else bool(value)

    def several(self, key: str) -> list[str]:
        """A setting of several texts, or of one."""
        value = self.get(key, [])
        return [str(each) for each in (value if isinstance(value, list) else [value]) if each != ""]

    def pairs(self, key: str) -> dict[str, str]:
        """A setting of several NAME=VALUE."""
        found = (text.partition("=") for text in self.several(key))
        return {name.strip(): value.strip() for name, _, value in found if name.strip()}

    def left(self, elsewhere: Collection[str], program: str) -> Iterator[str]:
        """A note on each setting that was not taken and does something. elsewhere: settings that others convert."""
        for key, value in self.values.items():
            if key in self.taken or key in elsewhere or value in (None, False, "", [], {}) or _is_in(key, UNASKED):
                continue
            why = next((why for names, why in ABSENT.items() if key in names.split()), None)
            here = next((ours for ours, names in OPTIONS.items() if key in names.split()), None)
            if why is None and here is not None:
                why = f"{here} of sfumato train {program} {'counts steps' if 'epoch' in key else 'is the nearest'}"
            shown = " ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{key} = {shown:.60}: {why or 'has no counterpart here and is left out'}"

    def is_settled(self, note: str) -> bool:
        """Whether a note is on a setting that a recipe says, or that needs none."""
        key = note.partition(" = ")[0]
        return key in self.taken or _is_in(key, UNASKED)


def _is_in(key: str, names: Mapping[str, str]) -> bool:
    return any(key in several.split() for several in names)


_NOTHING_CHOSEN: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {"lora": {"learn": "plain"}, "finetune": {"flip": False}, "dreambooth": {"prior_prompts": []}}
)
"""What keeps our trainers from choosing what the other tool does not do."""


@dataclass
class Recipe:
    """told: options of our trainer that the other tool's settings say. usual: those that say what it does where
    nothing is said and ours does something else. ask: options that are left to the person."""

    program: str
    told: dict[str, Any] = field(default_factory=dict)
    usual: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ask: tuple[str, ...] = ()

    def say(self, option: str, value: Any, otherwise: Any = None) -> None:
        """Set an option to what is told, or to what is usual there; to neither where both are None."""
        if value is not None:
            self.told[option] = value
        elif otherwise is not None:
            self.usual[option] = otherwise

    @property
    def values(self) -> dict[str, Any]:
        """All of its options."""
        return {**_NOTHING_CHOSEN.get(self.program, {}), **self.usual, **self.told}


def text_of(path: Path) -> str:
    """The text of a file. Raises ConfigError for one that is not readable as text."""
    try:
        return decode_text(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name another file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not readable as text (not UTF-8). Save it as UTF-8.") from None


_LIKE = {
    "pagedadamw8bit": "adamw8bit", "pagedadamw": "adamw", "pagedadamw32bit": "adamw", "lion8bit": "lion",
    "pagedlion8bit": "lion", "adamwschedulefree": "adamw",
    "adamw8": "adamw8bit", "adam8": "adamw8bit", "adam8bit": "adamw8bit", "adam": "adamw",
}  # fmt: skip
_THERE: Mapping[str, Mapping[str, str]] = {
    "adamw": {"betas": "0.9,0.999", "weight_decay": "0.01"},
    "adamw8bit": {"betas": "0.9,0.999", "weight_decay": "0.01"},
    "lion": {"betas": "0.9,0.99", "weight_decay": "0"},
    "prodigy": {
        "betas": "0.9,0.999", "weight_decay": "0", "use_bias_correction": "False", "safeguard_warmup": "False",
    },
    "adafactor": {"weight_decay": "0", "scale_parameter": "True"},
    "muon": {"momentum": "0.95", "weight_decay": "0"},
}  # fmt: skip
"""The defaults of the optimizers' own packages, which the other tools leave as they are."""
_SAME: Mapping[str, str] = {"decouple": "true", "relative_step": "false", "warmup_init": "false", "amsgrad": "false"}
"""Settings of which only what is always so here has a counterpart, and what that is."""
LENGTHS = "one length is learned for each input here, which web interfaces read, and one for each output there"
"""Of a DoRA."""
_NARROWEST = 320
"""Outputs of the narrowest layers of SD's U-Nets that are adapted."""
WHOLE = 10_000
"""A rank that is more than any layer's width, with which a LoKr's factors are whole."""


def base_model(asked: ForeignSettings, recipe: Recipe) -> None:
    """The base model. Raises ConfigError where none is named, of which ours would train its own."""
    name = asked.path("pretrained_model_name_or_path")
    if name is None:
        raise ConfigError(f"{asked.name}: no pretrained_model_name_or_path, the base model; give it one.")
    recipe.say("base", name)


def trackers(recipe: Recipe, named: str | None, project: str, name: str | None) -> None:
    """Where the log goes. named: tensorboard, wandb, all or another; project and name: of the run at W&B."""
    if named in ("tensorboard", "all"):
        recipe.say("tensorboard", True)
    if named in ("wandb", "all"):
        recipe.say("wandb", project)
        recipe.say("wandb_name", name)


def without_scale(recipe: Recipe) -> None:
    """Take back what an OFT has no place for: alphas, lengths and a largest norm. Not of any other kind."""
    if recipe.told.get("algo") != "oft":
        return
    for option in ("alpha", "conv_alpha", "dora", "max_norm"):
        recipe.usual.pop(option, None)
        if recipe.told.pop(option, None) is not None and option == "max_norm":
            recipe.notes.append("scale_weight_norms: rotations have no such limit, so it is left out")
    if (rank := recipe.values["rank"]) ** 2 > _NARROWEST:
        recipe.notes.append(
            f"algo=diag-oft: in layers of fewer than {rank**2} outputs LyCORIS's blocks have other sizes"
        )


def optimizer_settings_of(name: str) -> frozenset[str]:
    """The settings of the optimizer of this name elsewhere that have a counterpart."""
    ours = our_optimizer(name)
    return frozenset(("weight_decay", *DEFAULTS[ours], *_SAME)) if ours in DEFAULTS else frozenset()  # type: ignore[index]


def our_optimizer(name: str) -> str:
    """What an optimizer is called here, or its name in small letters."""
    short = _short(name)
    # All of these set their own rate, beside which theirs is 1.
    return "prodigy" if short.startswith("dadapt") or "prodigy" in short else _LIKE.get(short, short)


def _short(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.rpartition(".")[2].lower())


def optimizer(
    asked: ForeignSettings, recipe: Recipe, name: str, told: Mapping[str, str], usual: Mapping[str, str]
) -> None:
    """The optimizer with its settings. usual: those that the other tool gives it where nothing is told."""
    ours = our_optimizer(name)
    if ours not in _THERE:
        recipe.notes.append(f"optimizer {name}: has no counterpart; adamw takes its place")
        ours = "adamw"
    elif ours != _short(name):
        recipe.notes.append(f"optimizer {name}: {ours} takes its place")
    recipe.say("optimizer", ours)
    defaults = {**_THERE[ours], **usual}
    if ours == "adafactor" and {**usual, **told}.get("relative_step") != "False":
        recipe.notes.append(
            "optimizer Adafactor without relative_step=False: it sets its own rate; learning_rate counts here"
        )
    decay = told.get("weight_decay", defaults.get("weight_decay"))
    if decay is not None:
        number = asked.as_number("weight_decay", decay)
        recipe.say("weight_decay", number if "weight_decay" in told else None, number)
    known = DEFAULTS[ours]  # type: ignore[index]
    args = {key: value for key, value in {**defaults, **told}.items() if key in known and not _is(known[key], value)}
    recipe.say("optimizer_args", [f"{key}={value}" for key, value in args.items()] or None)
    recipe.notes += [
        f"optimizer_args {key}={value}: has no counterpart here and is left out"
        for key, value in told.items()
        if key not in known and key not in ("weight_decay", "relative_step") and value.lower() != _SAME.get(key)
    ]


def _is(ours: object, written: str) -> bool:
    """Whether a setting is written as it is here by default."""
    if isinstance(ours, bool):
        return written.lower() == str(ours).lower()
    values = ours if isinstance(ours, tuple) else (ours,)
    try:
        return [float(part) for part in written.strip("()[]").split(",")] == list(values)
    except ValueError:
        return False


def schedule(asked: ForeignSettings, recipe: Recipe, *, cycles: str, power: str, warmup: int) -> None:
    """The schedule and its warm-up. warmup: steps that the tool has where none are given."""
    name = (asked.text("lr_scheduler", "constant") or "constant").lower()
    count = asked.number("lr_warmup_steps", warmup) or 0
    if name == "constant":
        count = 0  # which the others pass over
    elif name == "polynomial" and asked.number(power, 1.0) != 1:
        recipe.notes.append(
            f"lr_scheduler = polynomial with {power} {asked.number(power):g}: a straight line, whose power is 1"
        )
    ours = {"constant_with_warmup": "constant", "cosine_with_restarts": "cosine", "polynomial": "linear"}.get(
        name, name
    )
    if ours not in ("constant", "cosine", "linear"):
        recipe.notes.append(f"lr_scheduler = {name}: has no counterpart; cosine takes its place")
        ours = "cosine"
    recipe.say("schedule", ours if asked.text("lr_scheduler") else None, ours)
    turns = asked.whole(cycles, 1) or 1
    if name == "cosine_with_restarts" and turns > 1:
        recipe.say("cycles", turns)
    count = limit_warmup(recipe, "lr_warmup_steps", count)
    recipe.say("warmup", (count if count < 1 else int(count)) or None)  # a share is one here, too


def limit_warmup(recipe: Recipe, key: str, warmup: float) -> float:
    """The warm-up, or the steps of the run where these are fewer. key: what the other tool calls it, for the note."""
    steps: int | None = recipe.values.get("steps")
    if steps is None or warmup <= steps:
        return warmup
    recipe.notes.append(f"{key} = {warmup:g}: more than the {steps} steps, which all of them are here")
    return steps


def precision(asked: ForeignSettings, recipe: Recipe) -> None:
    """The number format of the frozen base."""
    name = asked.text("mixed_precision")
    recipe.say("precision", {"no": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(name or ""))
    if asked.flag("full_fp16") or asked.flag("full_bf16"):
        recipe.notes.append("full_fp16 or full_bf16: the weights that learn are always fp32")


def quantize(recipe: Recipe, key: str, kind: str) -> None:
    """The format of a frozen U-Net's weights, of which there are two here. kind: what it is called there."""
    ours = "nf4" if re.search("(?:nf|fp|int|float)4", kind) else "int8"
    recipe.say("quantize", ours)
    if not kind.startswith(ours):
        recipe.notes.append(f"{key} = {kind:.40}: {ours} takes its place")


def resolution(asked: ForeignSettings, recipe: Recipe, usual: int | None) -> None:
    """One number: of two sides that of the square with as many pixels."""
    given = asked.get("resolution")
    if given is None:
        recipe.say("resolution", None, usual)
        return
    parts = given if isinstance(given, list) else re.split(r"[,x ]+", str(given))
    sides = [asked.as_number("resolution", each) for each in parts if each != ""]
    if not sides or min(sides) < 1:
        raise ConfigError(f"{asked.name}: resolution is {given!r:.40}; wanted pixels, such as 512.")
    side = round(math.sqrt(sides[0] * sides[-1]) / 8) * 8
    if len(set(sides)) > 1:
        recipe.notes.append(
            f"resolution = {given}: {side}, of which images get about the square's pixels in their own shapes"
        )
    recipe.say("resolution", side)


def sample_prompts(asked: ForeignSettings, recipe: Recipe, key: str) -> None:
    """The lines of the file of prompts, or those that stand there themselves, but for comments."""
    if isinstance(asked.get(key), list):
        lines = asked.several(key)
    elif (given := asked.text(key)) is None:
        return
    else:
        file = asked.find(given)
        ending = "" if file is None or not file.is_file() else file.suffix.lower()
        if file is None or ending not in (".txt", ".toml", ".json"):
            recipe.notes.append(f"{key} = {given}: no file with prompts is there; give them as --sample-prompts")
            return
        try:
            lines = text_of(file).splitlines() if ending == ".txt" else read_prompts(file, key)
        except ConfigError as error:
            if ending == ".txt":
                raise
            recipe.notes.append(str(error))
            return
    prompts = [line for line in map(str.strip, lines) if line and not line.startswith("#")]
    recipe.say("sample_prompts", [with_known_flags(prompt, key, recipe.notes) for prompt in prompts] or None)


def with_known_flags(prompt: str, key: str, notes: list[str]) -> str:
    """The prompt without those settings of its own that have no counterpart, such as a sampler (--ss)."""
    text, *flags = prompt.split(" --")
    known = [flag for flag in flags if re.fullmatch(r"[whds] \d+|l \d+(\.\d*)?|n .+", flag.strip(), re.IGNORECASE)]
    notes += [f"{key}: --{flag:.40} has no counterpart and is left out" for flag in flags if flag not in known]
    return " --".join([text, *known])
