"""What fills the unset fields of a trainer's config: the method's defaults, then those of the base's family."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Any, TypeVar

from sfumato.config import fill_unset
from sfumato.errors import ConfigError
from sfumato.files.keys import trained_kinds
from sfumato.training.options import FullOptions, TrainingOptions
from sfumato.utils.formatting import option_flag, pluralize

if TYPE_CHECKING:
    from sfumato.data import ExampleSet
    from sfumato.models import Base

LION_RATE_DIVISOR = 4
"""How many times smaller a rate is for Lion than for AdamW: 3 to 10, say Chen et al. 2023, section 5, since each of its
steps is as long as AdamW's longest."""
MUON_RATE_FACTOR = 3
"""How many times higher a rate is for Muon than for AdamW: the root mean square of its steps is a fifth of the rate,
that of AdamW's first steps the whole. Chosen by styles on pocket: at four times, one lost more of its things than it
gained (docs/subjects.md)."""
LARGEST_CHECKPOINT_INTERVAL = 1000
"""In steps, where none is given: what a power cut may cost, and no quarter of a run of days."""
AnyTrainer = TypeVar("AnyTrainer", bound=TrainingOptions)


def resolve(
    config: AnyTrainer, base: Base, examples: ExampleSet, processes: int, **defaults: Any
) -> tuple[AnyTrainer, list[str]]:
    """The config with its unset fields filled, and the names that the base's family or the method filled.

    examples: those of the subject make an epoch. defaults: the method's own for this family; they come before the
    family's. Fields that a trainer lacks are passed over.
    """
    known = dataclasses.asdict(base.defaults) | {name: value for name, value in defaults.items() if value is not None}
    known["learning_rate"] = _learning_rate(config, known["learning_rate"])
    if config.debiased:
        known["min_snr"] = 0.0
    if config.epochs is not None:
        batch = (config.batch or known["batch"]) * config.accumulate * processes
        samples = examples.in_group("instance").samples
        config = dataclasses.replace(config, steps=max(1, math.ceil(config.epochs * samples / batch)), epochs=None)
    config, filled = fill_unset(config, known)
    config.noising(base)  # which refuses timesteps that the base does not have
    steps = config.steps
    assert steps is not None
    config = dataclasses.replace(config, warmup=int(config.warmup * (steps if config.warmup < 1 else 1)))
    if config.warmup > steps:
        raise ConfigError(f"--warmup {config.warmup} is longer than the {steps} steps of the run; make it shorter.")
    check_cycles(config, steps)
    values: dict[str, Any] = {"name": config.name or config.output.resolve().name}
    values |= _intervals(config, steps, examples)
    if getattr(config, "train_text_encoder", False):
        assert config.learning_rate is not None
        # Whole weights take small steps as it is: sd-scripts' guides have a half to a fifth of the U-Net's for them.
        is_full = isinstance(config, FullOptions) and getattr(config, "method", "full") == "full"
        share = 0.4 if is_full else 0.1
        values["text_learning_rate"] = resolve_learning_rate(config, "text_learning_rate", config.learning_rate * share)
    if getattr(config, "save_precision", "") is None:
        values["save_precision"] = "fp32" if base.family.name == "pocket" else "fp16"
    return dataclasses.replace(config, **values), filled


def _learning_rate(config: TrainingOptions, usual: float) -> float:
    """The peak of the U-Net's rate. usual: that of AdamW, and of a LoRA where an adapter is trained."""
    if config.optimizer == "prodigy":
        return 1.0
    factor = {"lion": 1 / LION_RATE_DIVISOR, "muon": MUON_RATE_FACTOR}.get(config.optimizer, 1)
    return float(f"{usual * _kind_rate(config) * factor:.3g}")


def _intervals(config: TrainingOptions, steps: int, examples: ExampleSet) -> dict[str, int]:
    """The steps between samples, measurements and checkpoints; those that are unset by the steps of the run."""
    quarter = max(1, -(-steps // 4))
    # Not with a limit, which is looked at as often as is measured: holding out pictures would end it at another step.
    is_free = getattr(config, "drift_limit", None) is None
    often = -(-steps // 10) if examples.in_group("validation") and is_free else quarter
    checkpoints = min(quarter, LARGEST_CHECKPOINT_INTERVAL)
    usual = {"sample_every": quarter, "measure_every": often, "checkpoint_every": checkpoints}
    return {name: every if getattr(config, name) is None else getattr(config, name) for name, every in usual.items()}


def check_cycles(config: TrainingOptions, steps: int) -> None:
    """Raise ConfigError where the rate cannot fall so often within so many steps: a fall of one step stays at its peak.

    Not where a run goes on, which may have begun with an earlier version.
    """
    most = max(1, (steps - int(config.warmup)) // 2)
    if config.cycles > most and not config.resume:
        after = f" after --warmup {config.warmup}" if config.warmup else ""
        raise ConfigError(
            f"--cycles {config.cycles}: in {steps} steps{after} the learning rate can fall {pluralize(most, 'time')} "
            "at most, each over two steps or more; give fewer cycles, or more steps."
        )


def _kind_rate(config: TrainingOptions) -> float:
    """How many times a LoRA's rate is that of the kind of adapter that is trained; 1 where none is."""
    return trained_kinds()[getattr(config, "algo", "lora")].rate


def scale_defaults(config: Any, alpha: float | None = None, *, rank_stabilised: bool = False) -> dict[str, Any]:
    """alpha, and where either is given conv_rank and conv_alpha, filled; convolutions are layers as others else, and
    an OFT has no scale. config: of a trainer of adapters, with its rank. alpha: where none is given, None the rank."""
    if config.algo == "oft":
        return {"alpha": None, "conv_alpha": None}
    alpha = config.alpha or alpha or float(config.rank)
    if config.conv_rank is None and config.conv_alpha is None:
        return {"alpha": alpha}
    rank = config.rank if config.conv_rank is None else config.conv_rank
    alike = alpha if rank_stabilised else alpha * (rank / config.rank)
    return {"alpha": alpha, "conv_rank": rank, "conv_alpha": config.conv_alpha or alike}


def span_of(config: TrainingOptions, base: Base) -> tuple[float, float] | None:
    """(start, end) of progress, 0 at noise, in which an adapter is drawn with: --over-steps, or what it learned; None
    for all steps.

    --max-timestep 800, of a base whose timesteps are 0 to 999, gives (0.199, 1.0): timestep 999 is progress 0.
    """
    from sfumato.adapters.weights import parse_span

    given: str | None = getattr(config, "over_steps", None)
    if given is not None:
        span = parse_span(given)
        found = span.start, span.end
    else:
        timesteps, last = config.noising(base).timesteps, max(1, len(base.alpha_bar) - 1)
        start = max(0.0, 1 - timesteps.stop / last)
        found = start, max(1 - timesteps.start / last, start + 1 / last)  # one timestep is no span of nothing
    return None if found == (0.0, 1.0) else found


def resolve_learning_rate(config: TrainingOptions, name: str, otherwise: float) -> float:
    """The rate of what learns beside the U-Net: what the config has under `name`, or `otherwise`. config: resolved.

    Prodigy finds one step for all that learns, so that there it is the U-Net's. Raises ConfigError for another.
    """
    given: float | None = getattr(config, name)
    if config.optimizer != "prodigy":
        return otherwise if given is None else given
    assert config.learning_rate is not None
    if given not in (None, config.learning_rate):
        raise ConfigError(
            f"{option_flag(name)} {given} beside --learning-rate {config.learning_rate}: prodigy "
            f"finds one step "
            "for all that learns. Leave it out, or use --optimizer adamw."
        )
    return config.learning_rate
