"""Options that the programs share which train a small base, and the learning rate that they make."""

# No annotations as texts: a program that inherits the options reads them in its own module.
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sfumato.runs.options import FolderOptions

if TYPE_CHECKING:
    from sfumato.precision import Precision
    from sfumato.runs.step import Step


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(FolderOptions):
    """Pictures, steps, optimizer and device of a training that makes a base."""

    data: Path = Path("pocket-data")
    """The folder of pictures: what bench/pocket_data.py built, or your own, laid out as docs/pocket.md says."""
    steps: int = 2400
    """Optimizer steps in all."""
    batch: int = 16
    """Pictures per step."""
    learning_rate: float | None = None
    """The rate between the warm-up and the fall. Unset: 1e-3."""
    warmup: int | None = None
    """Steps over which the rate rises from 0. Unset: 100, or a tenth of fewer than a thousand steps."""
    fall_at: int | None = None
    """The step at which the rate begins to fall, linearly, to 0 at the last. Unset: after a third of the steps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the inner weights beside AdamW for the rest."""
    weight_decay: float = 0.01
    """Weight decay of AdamW, and of Muon."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is what draws samples and is exported; smaller in the first
    steps."""
    seed: int = 0
    """Seed of weights and of every draw."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps; auto takes a GPU where there is one."""
    precision: Literal["bf16", "fp32"] | None = None
    """Number format of the forward pass; weights are kept in fp32. Unset: bf16 where the device multiplies it."""
    checkpoint_every: int | None = 400
    """Steps between checkpoints, besides those at both ends; 0 saves only the last, and that of an
    interruption."""
    sample_every: int = 400
    """Steps between sample sheets, besides those at both ends; 0 draws none."""


AnyPretraining = TypeVar("AnyPretraining", bound=PretrainOptions)


def settled_for_device(config: AnyPretraining, learning_rate: float = 1e-3) -> tuple[AnyPretraining, "Precision"]:
    """The config with what was unset filled in, and its precision, which holds from here on.

    learning_rate: where none was given.
    """
    from sfumato.precision import decide, multiplies_bf16

    usual: dict[str, Any] = {
        "precision": "bf16" if multiplies_bf16(decide("fp32", device=config.device).device) else "fp32",
        "checkpoint_every": 400,
        "warmup": min(100, config.steps // 10),
        "fall_at": config.steps // 3,
        "learning_rate": learning_rate,
    }
    unset = {name: value for name, value in usual.items() if getattr(config, name) is None}
    config = dataclasses.replace(config, **unset)
    assert config.precision is not None
    precision = decide(config.precision, device=config.device)
    precision.apply()
    return config, precision


def rate_at(step: int, config: PretrainOptions) -> float:
    """The learning rate of a step, as a share of the highest: warm-up, flat, linear fall to 0. config: filled."""
    assert config.warmup is not None
    assert config.fall_at is not None
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.steps - config.fall_at, 1)
    return max(0.0, min(1.0, rising, falling))


def learning_rate_at(step: "Step", config: PretrainOptions) -> float:
    """The learning rate of a step, less where the run has turned back from broken numbers. config: filled."""
    assert config.learning_rate is not None
    return config.learning_rate * rate_at(step.number, config) * step.rate_factor
