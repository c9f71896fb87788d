"""Options that the programs share that train a small base model, and the learning rate that follows from them."""

# No annotations as texts: a program that inherits the options reads them in its own module.
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from sfumato.runs.options import FolderOptions

if TYPE_CHECKING:
    from sfumato.precision import Precision
    from sfumato.runs.run import Step


@dataclass(frozen=True, kw_only=True)
class PretrainOptions(FolderOptions):
    """Images, steps, optimizer and device of the training of a base."""

    data: Path = Path("pocket-data")
    """Folder of training images: what bench/pocket_data.py built, or your own, laid out as docs/pocket.md describes."""
    steps: int = 2400
    """Number of optimizer steps."""
    batch: int = 16
    """Images per step."""
    learning_rate: float | None = None
    """Learning rate between the warm-up and the decay. Unset: 1e-3."""
    warmup: int | None = None
    """Steps over which the learning rate rises from 0. Unset: 100, or a tenth of the steps if they are fewer than a
    thousand."""
    fall_at: int | None = None
    """Step at which the learning rate begins its linear decay to 0 at the last step. Unset: after a third of the
    steps."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """Optimizer: AdamW for all weights, or Muon for the inner weights and AdamW for the rest."""
    weight_decay: float = 0.01
    """Weight decay of AdamW and of Muon."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 turns clipping off."""
    ema: float = 0.999
    """Decay of the running mean (EMA) of the weights, used for the samples and the exported model. It is smaller in the
    first steps."""
    seed: int = 0
    """Seed of the initial weights and of everything random."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda, cuda:1 or mps. auto takes a GPU if there is one."""
    precision: Literal["bf16", "fp32"] | None = None
    """Number format of the forward pass; weights are kept in fp32. Unset: bf16 where the device multiplies bf16 in
    hardware, else fp32."""
    checkpoint_every: int | None = 400
    """Steps between checkpoints, besides those at the start and the end. 0 saves only the last one, and one at an
    interruption."""
    sample_every: int = 400
    """Steps between sample sheets, besides those at the start and the end; 0 generates none."""


AnyPretraining = TypeVar("AnyPretraining", bound=PretrainOptions)


def resolve_for_device(config: AnyPretraining, learning_rate: float = 1e-3) -> tuple[AnyPretraining, "Precision"]:
    """Fill in what is unset, and return the config and its precision, now in effect.

    learning_rate: used if the config has none.
    """
    from sfumato.precision import decide
    from sfumato.precision.choices import multiplies_bf16

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
    """The learning rate of a step, as a share of its peak: warm-up, constant, linear decay to 0. config: with every
    field filled in."""
    assert config.warmup is not None
    assert config.fall_at is not None
    rising = (step + 1) / max(config.warmup, 1)
    falling = (config.steps - step) / max(config.steps - config.fall_at, 1)
    return max(0.0, min(1.0, rising, falling))


def learning_rate_at(step: "Step", config: PretrainOptions) -> float:
    """The learning rate of a step, lower after the run had to go back because numbers were no longer finite. config:
    with every field filled in."""
    assert config.learning_rate is not None
    return config.learning_rate * rate_at(step.number, config) * step.rate_factor
