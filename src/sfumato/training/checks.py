"""What of a trainer's config can be refused before anything is loaded: numbers, names, options without effect.

Fields that a trainer lacks are passed over, so that one list of what numbers have to be serves all.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.adapters.embeddings.tokens import contains_placeholder
from sfumato.adapters.prompt_tags import refuse_tags, split_flags
from sfumato.adapters.weights import parse_span
from sfumato.data.options import Options
from sfumato.errors import ConfigError, web_address_error
from sfumato.files.keys import KIND_KEYS, kind_named
from sfumato.files.metadata import creation_time
from sfumato.generation.arguments.images import checked_flags
from sfumato.runs.folder import WRITTEN
from sfumato.runs.reporting.trackers import check_project
from sfumato.training.optim import settings
from sfumato.utils.formatting import option_flag
from sfumato.utils.limits import checked_seed

if TYPE_CHECKING:
    from sfumato.data import ExampleSet
    from sfumato.runs.options import FolderOptions
    from sfumato.training.options import FullOptions, KindOptions, TrainerOptions, TrainingOptions

_AT_LEAST_ONE = (
    *("steps", "epochs", "batch", "accumulate", "micro_batch", "rank", "conv_rank", "factor", "resolution", "drawn"),
    *("vectors", "word_vectors", "class_count", "cycles"),
)
_POSITIVE = (
    *("learning_rate", "text_learning_rate", "word_learning_rate"),
    *("alpha", "conv_alpha", "loraplus_ratio", "strength", "beta"),
)
_NOT_NEGATIVE = (
    *("warmup", "clip", "max_norm", "min_snr", "noise_offset", "input_perturbation", "huber", "weight_decay"),
    *("keep_tags", "prior_weight", "drift_limit", "sample_every", "measure_every", "save_every"),
    *("checkpoint_every", "keep"),
)
_RANGES: tuple[tuple[tuple[str, ...], Callable[[float], bool], str], ...] = (
    (_AT_LEAST_ONE, lambda value: value >= 1, "be at least 1"),
    (_AT_LEAST_ONE, lambda value: value < 2**31, f"be below {2**31:,}"),  # torch would end in a trace of its C++
    (_POSITIVE, lambda value: 0 < value < math.inf, "be a positive number"),
    (
        ("caption_dropout", "tag_dropout", "crossed_share", "pyramid_noise", "inpaint_whole_share"),
        lambda value: 0 <= value <= 1,
        "be 0 to 1",
    ),
    (("validation_split",), lambda value: 0 <= value <= 0.5, "be 0 to 0.5"),
    (("dropout", "rank_dropout", "module_dropout", "ema"), lambda value: 0 <= value < 1, "be at least 0 and below 1"),
    (_NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "not be negative"),
)
"""(fields of any trainer, what their values have to be, and how that is said)."""
_FOLDERS_OF_A_RUN = frozenset(("checkpoints", "samples", "tensorboard", "wandb", "model"))
_NAMES_OF_A_RUN = _FOLDERS_OF_A_RUN.union(map(str.casefold, WRITTEN), ("adapters", "class", "run.json", "log.jsonl"))
_NOT_IN_NAMES = '/\\:*?"<>|'
_DEVICES = {"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(1, 10))}


def check_trainer(config: TrainingOptions) -> None:
    """Raises ConfigError for numbers, names and options that make no sense, whatever the base and the pictures."""
    if getattr(config, "validation_split", 0) and config.measure_every == 0:
        raise ConfigError(
            "--validation-split holds images out to be measured, and --measure-every 0 measures none; leave one out."
        )
    if config.steps is not None and config.epochs is not None:
        and_so = " (the run has its steps already)" if config.resume else ""
        raise ConfigError(f"--steps and --epochs are both given{and_so}; they say the same, so give one of them.")
    if config.optimizer == "prodigy" and getattr(config, "loraplus_ratio", 1) != 1:
        raise ConfigError(
            "--loraplus-ratio with --optimizer prodigy: it finds one step for all that learns. Leave it out, or use "
            "--optimizer adamw."
        )
    settings.settings(config.optimizer, config.optimizer_args)
    if config.warmup > 1 and config.warmup % 1:
        raise ConfigError(f"--warmup {config.warmup:g}: wanted whole steps, or below 1 a share of the run's steps.")
    if config.schedule == "constant":
        only_with(config, "--schedule cosine or linear", "cycles")
    if config.debiased and config.min_snr:
        raise ConfigError("--debiased and --min-snr both weight the timesteps; give one of them.")
    for option in ("cache", "class_cache"):
        folder = getattr(config, option, None)
        for part in () if folder is None else (folder, *folder.parents):
            if part.is_file():
                raise ConfigError(f"{option_flag(option)} {folder}: {part} is a file; name a folder, or another place.")
    check_run(config)


def check_words_are_seen(config: TrainerOptions) -> None:
    """Of new words that learn: refuse to drop them from every caption."""
    for option, share in (("--caption-dropout", config.caption_dropout), ("--tag-dropout", config.tag_dropout)):
        if share == 1 and (option == "--caption-dropout" or not config.keep_tags):
            raise ConfigError(f"{option} 1 drops the new word from every caption, so it would learn nothing; lower it.")


def refuse_dropped_words(config: TrainerOptions, examples: ExampleSet, words: Sequence[str]) -> None:
    """Refuse a new word of which every caption is dropped, by the trainer's options or by those of its sources."""
    given = Options(caption_dropout=config.caption_dropout, tag_dropout=config.tag_dropout, keep_tags=config.keep_tags)
    for word in words:
        told = [
            each.options.over(given)
            for each in examples
            if any(contains_placeholder(word, said) for said in each.captions)
        ]
        if told and all(to.caption_dropout == 1 or (to.tag_dropout == 1 and not to.keep_tags) for to in told):
            raise ConfigError(
                f"{config.images}: caption_dropout or tag_dropout of 1 drops {word} from every caption, so it would "
                "learn nothing; lower it."
            )


def check_kind(config: TrainingOptions) -> None:
    """Of an adapter: refuse what has no effect on one of its kind, what is no rule by layer or no span of the steps,
    and a file to start from that is not there.

    LoRA+ is for a factor that starts at zero beside one of unit scale, which LoHa's and LoKr's are not. OFT's rotations
    have no scale, and keep the lengths that DoRA learns.
    """
    from sfumato.adapters.targets import ByLayer

    by_layer = ByLayer.of(config)
    rules = by_layer.rates
    if config.optimizer == "prodigy" and (other := next((rule for rule in rules if rule.value not in (0, 1)), None)):
        raise ConfigError(
            f"{other} with --optimizer prodigy: it finds one step for all that learns. Give a factor of 0, which "
            "leaves layers out, or use --optimizer adamw."
        )
    algo = getattr(config, "algo", "lora")
    if algo != "lokr":
        only_with(config, "--algo lokr", "factor")
    if algo != "lora":
        only_with(config, "--algo lora", "loraplus_ratio")
    if algo == "oft":
        others = ("rank_stabilised", "max_norm", "dora")
        only_with(config, "--algo lora, loha or lokr", *(name for name in others if hasattr(config, name)))
        if rule := next((rule for rule in by_layer.ranks if rule.alpha is not None), None):
            raise ConfigError(f"{rule}: --algo oft has no scale; give the rank alone.")
    if (
        KIND_KEYS[kind_named(algo)].module is not None
    ):  # beside a module, which has no weight to scale or to drop ranks of
        of_weights = (
            "rank_stabilised",
            "max_norm",
            "dora",
            "conv",
            "conv_rank",
            "conv_alpha",
            "dropout",
            "rank_dropout",
        )
        only_with(config, "an --algo that changes weights", *(name for name in of_weights if hasattr(config, name)))
    if (init_from := getattr(config, "init_from", None)) is not None and not config.resume:
        refuse_missing(init_from)
    if (over_steps := getattr(config, "over_steps", None)) is not None:
        parse_span(over_steps)


def check_full(config: FullOptions) -> None:
    """Of a trainer that may train a base's own weights: refuse what has no effect, and a share that is none."""
    if not config.train_text_encoder:
        only_with(config, "--train-text-encoder", "text_learning_rate")
    if not config.ema:
        only_with(config, "--ema", "ema_on_cpu")
    if config.keep_energy is not None and not 0 < config.keep_energy <= 1:
        raise ConfigError(f"--keep-energy is {config.keep_energy}; it must be above 0 and at most 1.")
    if config.drift_limit is not None and config.measure_every == 0:
        raise ConfigError("--drift-limit looks at the measurements, and --measure-every 0 makes none; leave one out.")


def check_module_dropout(config: KindOptions, layers: int) -> None:
    """Raises ConfigError where module dropout has nothing to leave out. layers: how many are adapted."""
    if config.module_dropout and layers < 2:
        raise ConfigError(
            f"--module-dropout {config.module_dropout:g}: one layer is adapted, and it is never left out; leave the "
            "option out, or adapt more layers with --targets."
        )


def check_run(config: FolderOptions) -> None:
    """Of any trainer's config: its name, its numbers, and which options exclude each other."""
    if config.resume and config.overwrite:
        raise ConfigError("--resume and --overwrite are both given; go on with the run, or replace it.")
    if config.finish and not config.resume:
        raise ConfigError("--finish ends a run that was stopped; name it: sfumato resume RUN --finish.")
    if config.resume and config.dry_run:
        raise ConfigError("--resume and --dry-run are both given; a dry run makes the first steps of a new run.")
    only_with(config, "--resume", "force")
    if config.wandb is None:
        only_with(config, "--wandb", "wandb_name")
    else:
        check_project(config.wandb)
    check_name(config)
    creation_time()  # whose date what is learned will have
    if (repository := getattr(config, "push_to_hub", None)) is not None:
        _check_repository(repository)
    for prompt in () if config.resume else getattr(config, "sample_prompts", ()):
        text, own = split_flags(prompt)
        refuse_tags(text, "--sample-prompts", "leave it out")
        checked_flags(own, sheet=False)
    for name in ("author", "license"):
        if (told := getattr(config, name, None)) is not None and not (told.strip() and told.isprintable()):
            raise ConfigError(f"--{name} {told!r:.60}: empty, or not one line of text; write one, or leave it out.")
    device = getattr(config, "device", "auto")
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d{1,3})?", device):
        raise ConfigError(f"--device {device!r:.60}: unknown; wanted auto, cuda, cuda:0, mps or cpu.")
    if (seed := getattr(config, "seed", None)) is not None:
        checked_seed(seed)
    for names, is_good, wanted in _RANGES:
        for name in names:
            value = getattr(config, name, None)
            if value is not None and not is_good(value):
                raise ConfigError(f"{option_flag(name)} is {value}; it must {wanted}.")


def check_name(config: FolderOptions, *, folder: bool = False) -> None:
    """Refuse a --name, or an --output that gives the name, that is no plain file name on every system.

    folder: what is learned is a folder of that name, which a run must not have for itself.
    """
    if not str(config.output).isprintable():
        raise ConfigError(f"--output {str(config.output)!a}: holds characters that are not seen; name another folder.")
    named = getattr(config, "name", None)
    name, option = (config.output.resolve().name, "--output") if named is None else (named, "--name")
    reason = ""
    if not name.strip() or name.startswith("."):
        reason = "is empty or begins with a dot"
    elif any(c in _NOT_IN_NAMES or not (c.isprintable() or c == " ") for c in name):
        reason = f"holds a character that is not for file names ({' '.join(_NOT_IN_NAMES)} or one that is not seen)"
    elif name[-1] in ". " or name.split(".")[0].strip().upper() in _DEVICES:
        reason = "ends in a dot or a space, or is a device on Windows"
    elif len(name.encode("utf-8", "replace")) > 150:
        reason = "is longer than 150 bytes"
    elif option == "--name" and name.casefold() in _FOLDERS_OF_A_RUN:
        reason = "is what a run calls a folder of its own"
    elif folder and name.casefold() in _NAMES_OF_A_RUN:
        reason = "is what a run calls a file or folder of its own, beside which the model would lie"
    if reason:
        raise ConfigError(
            f"{option} {ascii(name) if not name.isprintable() else repr(name)}: it {reason}. Give --name a "
            "plain file name, such as otter-v1."
        )


def _check_repository(name: str) -> None:
    """Refuse what the hub would refuse, before the training instead of after it."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]  # it is public all the same

    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"--push-to-hub {name}: no repository of the hub ({' '.join(str(error).split())}).") from None


def refuse_missing(init_from: Path) -> None:
    """Raise ConfigError if the adapter to start from does not exist."""
    if not init_from.exists():
        if said := web_address_error(str(init_from)):
            raise ConfigError(f"--init-from {said}")
        raise ConfigError(f"--init-from {init_from}: there is no such file; name the adapter to begin with.")


def only_with(config: FolderOptions, needed: str, *names: str) -> None:
    """Refuse what is given under these names, which has no effect without `needed`."""
    refuse_given(config, f"has no effect without {needed}; leave it out, or give both", *names)


def refuse_given(config: FolderOptions, why: str, *names: str) -> None:
    """Refuse what is given under these names.

    Not where a run goes on: earlier versions filled these fields in, and so they stand in its config.
    """
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    given = [name for name in names if name in defaults and getattr(config, name) != defaults[name]]
    if given and not config.resume:
        raise ConfigError(f"{option_flag(given[0])} {why}.")
