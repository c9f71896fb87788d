"""Backward and optimizer step in one: a weight steps as soon as its gradient is there, and the gradient is freed.

So there is never more than one gradient alive, instead of one for every weight: 3.4 GB less in a full fine-tune of
SD 1.5 (torch.Tensor.register_post_accumulate_grad_hook; "How to save memory by fusing the optimizer step into the
backward pass", PyTorch tutorials).

What a training whose step does not fit into memory goes on with: the same steps, computed in less.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sfumato.errors import ConfigError, is_out_of_memory
from sfumato.runs import progress
from sfumato.training.optim.optimizers import clip_coefficient, is_no_op_factor
from sfumato.utils.formatting import option_flag

NEED_ALL_GRADIENTS = ("prodigy",)
"""Optimizers that look at all gradients at once, and so cannot step weight by weight."""


class _Pass(NamedTuple):
    """What a backward pass does with each gradient. measures: note its norm; steps: let its weight step, by `factor`
    times the gradient where there is one."""

    measures: bool
    steps: bool
    factor: Tensor | None = None


_MEASURE = _Pass(measures=True, steps=False)
_MEASURE_AND_STEP = _Pass(measures=True, steps=True)


class FusedBackwardPass:
    """Lets `optimizer` step within `backward`: no `step` and no `zero_grad` afterwards.

    The optimizer, its groups and its state stay as they are, so a checkpoint of a fused run and of another are alike.
    Every weight must get its whole gradient in one backward pass. scaler: of fp16's gradients, to be updated after each
    step as elsewhere.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None = None):
        self.optimizer = optimizer
        self._scaler = scaler or torch.amp.GradScaler(enabled=False)
        self._norms: dict[int, Tensor] = {}
        self._pass = _MEASURE
        places = ((at, weight) for at, group in enumerate(optimizer.param_groups) for weight in group["params"])
        for number, (place, weight) in enumerate(places):
            weight.register_post_accumulate_grad_hook(self._hook(number, place))

    def backward(self, loss: Tensor, *, limit: float, healthy: Callable[..., bool]) -> Tensor:
        """Change the weights by the gradient of the scalar `loss`; returns its global norm before, on its device.

        limit: of the global norm. Above 0 there are two backward passes, the first for the norm alone, whose gradients
        are let go one by one as well (LOMO, Lv et al. 2023, section 3.3), and which finds an overflow of scaled ones; 0
        clips nothing, takes one, and cannot be scaled. healthy: told `loss`, and `gradient_norm` where it is known
        before, says whether the weights may change.
        """
        if limit <= 0:
            if healthy(loss=loss):
                self._run(_MEASURE_AND_STEP, loss)
            return self._norm()
        scaled = self._scaler.scale(loss)
        self._run(_MEASURE, scaled, retain_graph=True)
        norm = self._unscaled(self._norm())
        if healthy(loss=loss, gradient_norm=norm) and bool(norm.isfinite()):
            factor = clip_coefficient(norm, limit) / self._scaler.get_scale()
            self._run(_Pass(measures=False, steps=True, factor=factor), scaled)
        return norm

    def _run(self, each: _Pass, loss: Tensor, *, retain_graph: bool = False) -> None:
        self._norms, self._pass = {}, each
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]

    def _hook(self, number: int, place: int) -> Callable[[Tensor], None]:
        def step(weight: Tensor) -> None:
            assert weight.grad is not None
            measures, steps, factor = self._pass
            if measures:
                # Not the sum of squares, which would be another tensor of the weight's size.
                self._norms[number] = torch.linalg.vector_norm(weight.grad.detach(), dtype=torch.float32)
            if factor is not None and not is_no_op_factor(factor):
                weight.grad.mul_(factor)
            if steps:
                self._step(weight, place)
            weight.grad = None

        return step

    def _step(self, weight: Tensor, place: int) -> None:
        groups = self.optimizer.param_groups
        # The group as it is now: a schedule changes its rate between steps.
        self.optimizer.param_groups = [{**groups[place], "params": [weight]}]
        try:
            self.optimizer.step()
        finally:
            self.optimizer.param_groups = groups

    def _norm(self) -> Tensor:
        """The global norm of the gradients of the last pass, summed in the weights' order as elsewhere."""
        norms = [self._norms[number] for number in sorted(self._norms)]
        return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())

    def _unscaled(self, norm: Tensor) -> Tensor:
        """The norm of the gradients as they are. The scaler takes it for a gradient, and so knows of an overflow."""
        stand_in = nn.Parameter(torch.zeros_like(norm))
        stand_in.grad = norm
        self._scaler.unscale_(torch.optim.SGD([stand_in]))
        return norm


def check_fused(
    *, accumulate: int, processes: int, optimizer: str, micro_batch: int | None = None, scaled: bool = False
) -> None:
    """Raise ConfigError, which names the option, where a step needs the gradients of all weights at once.

    scaled: whether the loss is scaled, as for fp16, and nothing is clipped.
    """
    why = "--fused steps each weight before the others have their gradients"
    if accumulate > 1:
        raise ConfigError(f"--accumulate {accumulate}: {why}, so none are left to be summed; raise --batch instead.")
    if micro_batch is not None:
        raise ConfigError(f"--micro-batch {micro_batch}: {why}, so none are left to be summed; lower --batch instead.")
    if processes > 1:
        raise ConfigError(f"{processes} processes: {why}, and processes sum theirs; start one, or leave --fused out.")
    if optimizer in NEED_ALL_GRADIENTS:
        raise ConfigError(f"--optimizer {optimizer}: {why}, and it sets its rate by all of them; use adamw.")
    if scaled:
        raise ConfigError(
            f"--precision fp16: with --clip 0 {why}, so an overflow is seen too late; clip, or use bf16 or fp32."
        )


def reduce_memory(error: Exception) -> Any | None:
    """The config with which a training goes on from its last checkpoint, a step of which takes less memory and gives
    the same up to rounding. None where it did not end in a step for want of memory, where nothing is left to change,
    and of several processes, which would have to agree.

    One change at a time, in this order: activations are computed again (Chen et al. 2016) unless that was refused; a
    whole model's gradients are not kept, where nothing needs all of them at once; a batch is computed in halves, then
    in quarters, down to single samples.
    """
    run = progress.take_interrupted()
    if run is None or not is_out_of_memory(error) or run.count > 1 or not hasattr(run.config, "micro_batch"):
        return None
    config: Any = run.config if run.dry is None else run.dry.asked
    change = _next_change(config)
    if change is None:
        return None
    told = " ".join(option_flag(name) + ("" if value is True else f" {value}") for name, value in change.items())
    reason = " ".join(str(error).split())[:120] or "that of this machine"
    run.say(f"step {run.step + 1} does not fit into memory ({reason}); going on with {told}, which takes less")
    if run.dry is not None:
        return dataclasses.replace(config, **change)
    return dataclasses.replace(config, **change, resume=True, overwrite=False, force=False)


def _next_change(config: Any) -> dict[str, bool | int] | None:
    if config.gradient_checkpointing is None:
        return {"gradient_checkpointing": True}
    if getattr(config, "fused", False):  # which wants all of a batch at once
        return None
    if _can_be_fused(config):
        return {"fused": True}
    at_once = min(config.micro_batch or config.batch, config.batch)
    return {"micro_batch": at_once // 2} if at_once > 1 else None


def _can_be_fused(config: Any) -> bool:
    if not hasattr(config, "fused") or getattr(config, "method", "full") != "full":
        return False
    may_be_scaled = config.precision in ("auto", "fp16") and not config.clip
    given: dict[str, Any] = {name: getattr(config, name) for name in ("accumulate", "micro_batch", "optimizer")}
    try:
        check_fused(**given, processes=1, scaled=may_be_scaled)
    except ConfigError:
        return False
    return True
