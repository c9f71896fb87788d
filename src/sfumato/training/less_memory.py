"""What a training whose step does not fit into memory goes on with: the same steps, computed in less."""

from __future__ import annotations

import dataclasses
from typing import Any

from sfumato import shell
from sfumato.errors import ConfigError, is_out_of_memory
from sfumato.runs import unfinished
from sfumato.training import fused


def in_less_memory(error: Exception) -> Any | None:
    """The config with which a training goes on from its last checkpoint, a step of which takes less memory and gives
    the same up to rounding. None where it did not end in a step for want of memory, where nothing is left to change,
    and of several processes, which would have to agree.

    One change at a time, in this order: activations are computed again (Chen et al. 2016) unless that was refused; a
    whole model's gradients are not kept, where nothing needs all of them at once; a batch is computed in halves, then
    in quarters, down to single samples.
    """
    run = unfinished.take_left_in_a_step()
    if run is None or not is_out_of_memory(error) or run.count > 1 or not hasattr(run.config, "micro_batch"):
        return None
    config: Any = run.config if run.dry is None else run.dry.asked
    change = _next_change(config)
    if change is None:
        return None
    told = " ".join(shell.option(name) + ("" if value is True else f" {value}") for name, value in change.items())
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
        fused.check(**given, processes=1, scaled=may_be_scaled)
    except ConfigError:
        return False
    return True
