"""Optimizers by name, and how their rate moves.

AdamW is torch's, Adafactor transformers', Muon our own. The others are extras that are asked for by name; what is not
installed says how to get it.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.errors import PrecisionError
from sfumato.files.module_names import DENOISERS
from sfumato.training.optim.settings import OptimizerName, settings
from sfumato.training.options import ScheduleName

# name -> (module, class, extra)
_EXTRAS = {
    "adamw8bit": ("bitsandbytes.optim", "AdamW8bit", "8bit"),
    "prodigy": ("prodigyopt", "Prodigy", "prodigy"),
    "lion": ("lion_pytorch", "Lion", "lion"),
}


def build_optimizer(
    name: OptimizerName, groups: Iterable[dict[str, Any]], *, weight_decay: float, args: Sequence[str] = ()
) -> torch.optim.Optimizer:
    """The optimizer called `name` over parameter groups, each with its own `lr`. args: NAME=VALUE of its settings that
    are not the usual ones.

    Prodigy finds its own step size: its `lr` is a factor, 1 by custom (Mishchenko & Defazio 2023). Adafactor (Shazeer &
    Stern 2018) takes `lr` as AdamW does.
    """
    own = settings(name, args)
    optimizer = _built(name, groups, {"weight_decay": weight_decay, **own})
    optimizer.__dict__["state_bytes"] = partial(state_bytes, name)  # for the room that its checkpoints will take
    optimizer.__dict__["given"] = ("weight_decay", *own)  # what a checkpoint does not change
    return optimizer


def _built(name: OptimizerName, groups: Iterable[dict[str, Any]], own: Mapping[str, Any]) -> torch.optim.Optimizer:
    groups = list(groups)
    if name == "adamw":
        # One launch for all tensors instead of ten each: an adapter has hundreds of small ones.
        return torch.optim.AdamW(groups, **own, fused=True)
    if name == "adafactor":
        from transformers.optimization import Adafactor

        adafactor: torch.optim.Optimizer = Adafactor(groups, **own, relative_step=False)
        return adafactor
    if name == "muon":
        from sfumato.training.optim.muon import Muon

        return Muon(groups, **own)
    module, kind, extra = _EXTRAS[name]
    try:
        optimizer_type = getattr(importlib.import_module(module), kind)
    except Exception as error:  # bitsandbytes raises what it likes where its own library cannot be loaded
        is_there = importlib.util.find_spec(module.partition(".")[0]) is not None
        what = f"cannot be loaded ({' '.join(str(error).split())[:100]})" if is_there else "is not installed"
        raise PrecisionError(
            f'--optimizer {name} needs a package that {what}: pip install "sfumato[{extra}]", or use adamw.'
        ) from None
    optimizer: torch.optim.Optimizer = optimizer_type(groups, **own)
    return optimizer


def state_bytes(name: OptimizerName, shape: Sequence[int]) -> int:
    """What the optimizer keeps of a weight of this shape, in bytes, besides a number or two.

    Adafactor keeps the mean square of each row and of each column of the last two dimensions; of a vector, all squares.
    Muon keeps a matrix's momentum; of a vector, what AdamW keeps.
    """
    numbers = math.prod(shape)
    if name == "muon":
        from sfumato.training.optim.muon import is_matrix

        return numbers * (4 if is_matrix(shape) else 8)
    if name == "adafactor":
        return 4 * (numbers // shape[-1] + numbers // shape[-2] if len(shape) > 1 else numbers)
    return numbers * {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "lion": 4}[name]


def parameter_groups(
    parts: Mapping[str, Iterable[nn.Parameter]],
    rate: float,
    text_rate: float | None,
    *,
    ups: Iterable[nn.Parameter] = (),
    up_ratio: float = 1.0,
    factors: Mapping[nn.Parameter, float] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Parameter groups for `build`: the U-Net's at `rate`, and the text encoders', if any, at theirs.

    parts: what is trained of each of "unet", "text_encoder", "text_encoder_2". ups: those of them whose rate is
    `up_ratio` times their part's, in groups of their own: LoRA+ (Hayou et al. 2024) gives B more than A. factors: what
    else the rate of some is multiplied with; groups of one factor are together, and say it as `factor`.
    """
    unet = [parameter for part in parts.keys() & set(DENOISERS) for parameter in parts[part]]
    text = [parameter for part, trained in parts.items() if part not in DENOISERS for parameter in trained]
    found: list[dict[str, Any]] = [{"params": unet, "lr": rate}, {"params": text, "lr": text_rate}]
    found = [part for group in found for part in _by_factor(group, factors)]
    if up_ratio != 1:
        faster = set(map(id, ups))
        found = [part for group in found for part in _split(group, faster, up_ratio)]
    return [group for group in found if group["params"]]


def _by_factor(group: dict[str, Any], factors: Mapping[nn.Parameter, float]) -> list[dict[str, Any]]:
    """The group without those that have a factor, and those of each factor with the group's rate times that."""
    by_factor: dict[float, list[nn.Parameter]] = {1.0: []}
    for parameter in group["params"]:
        by_factor.setdefault(factors.get(parameter, 1.0), []).append(parameter)
    own = {factor: params for factor, params in by_factor.items() if factor != 1}
    multiplied = [{"params": params, "lr": group["lr"] * f, "factor": f} for f, params in own.items()]
    return [{**group, "params": by_factor[1.0]}, *multiplied]


def _split(group: dict[str, Any], faster: set[int], ratio: float) -> list[dict[str, Any]]:
    """The group without those whose ids are in `faster`, and these with a rate that is `ratio` times as high."""
    parts: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in group["params"]:
        parts[id(parameter) in faster].append(parameter)
    rates = group["lr"], None if group["lr"] is None else ratio * group["lr"]
    return [{**group, "params": params, "lr": rate} for params, rate in zip(parts, rates, strict=True)]


def rate_factor(schedule: ScheduleName, step: int, steps: int, warmup: float, cycles: int = 1) -> float:
    """What the learning rate is multiplied with at `step` (from 0) of `steps`.

    Rises linearly over `warmup` steps, then stays, or falls to 0 as half a cosine or a line, `cycles` times from its
    peak on (warm restarts, Loshchilov and Hutter 2017).
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    gone = (step - warmup) / max(1, steps - warmup) * cycles % 1.0
    return 0.5 * (1 + math.cos(math.pi * gone)) if schedule == "cosine" else 1 - gone


class LearningRateSchedule:
    """Sets each group's rate to its own `lr` times `rate_factor`; a function of the step alone, nothing to restore.

    second: the step at which a second turn begins, with its own rise and fall of the rate; 0: there is one turn. Of
    two turns the first is that of the last group alone.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        name: ScheduleName,
        steps: int,
        warmup: float,
        *,
        cycles: int = 1,
        second: int = 0,
    ):
        self.optimizer, self.name, self.steps, self.warmup = optimizer, name, steps, warmup
        self.cycles, self.second = cycles, second
        self._is_first_turn = False
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    @property
    def rate(self) -> float:
        """The first group's present rate, or that of the last one while it learns alone, without a factor of its own;
        Prodigy's is its factor times the step that it has found."""
        group = self.optimizer.param_groups[-1 if self._is_first_turn else 0]
        return float(group["lr"] / group.get("factor", 1.0) * group.get("d", 1.0))

    def set(self, step: int, scale: float = 1.0) -> None:
        """Prepare the optimizer for `step`, counted from 0, with all rates multiplied by `scale`."""
        self._is_first_turn = step < self.second
        begin, end = (0, self.second) if self._is_first_turn else (self.second, self.steps)
        factor = scale * rate_factor(self.name, step - begin, end - begin, self.warmup, self.cycles)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor


def clip_grad_norm(parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
    """Scale all gradients so that their global norm is at most `limit`; returns the norm before, on their device.

    A limit of 0 only measures. The parameters are listed first: a generator that was read once clips nothing, and
    nobody notices.
    """
    gradients = [p.grad for p in list(parameters) if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    if limit > 0 and not is_no_op_factor(factor := clip_coefficient(norm, limit)):
        torch._foreach_mul_(gradients, factor)
    return norm


def is_no_op_factor(factor: Tensor) -> bool:
    """Whether to multiply by it changes nothing, where that is known without waiting for a device: on a CPU."""
    return factor.device.type == "cpu" and float(factor) == 1


def clip_coefficient(norm: Tensor, limit: float) -> Tensor:
    """What brings gradients of this global norm to at most `limit`, as `torch.nn.utils.clip_grad_norm_` has it."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)
