"""What a pre-training teaches, with its optimizers and its moving average: one step of all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sfumato.pocket.options import PretrainOptions
from sfumato.runs.samples import evaluating
from sfumato.runs.step import Step
from sfumato.training.ema import Ema
from sfumato.training.muon import Muon
from sfumato.training.optimizers import clip

_AT_THE_ENDS = ("conv_in.", "conv_out.", "embedding", "time_emb")
"""In the names of weights that AdamW steps beside Muon: those of the first and last layers, and of embeddings."""


class PretrainState:
    """Modules being trained, with their optimizers and the moving average of their weights.

    optimizer: AdamW for all weights, or Muon for the inner matrices beside AdamW for the rest. ema: the average's
    decay. largest_norm: what the gradient's norm is clipped to. first_share: of the weights as they are given here,
    in the result.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        device: torch.device,
        *,
        optimizer: Literal["adamw", "muon"],
        learning_rate: float,
        weight_decay: float,
        ema: float,
        largest_norm: float,
        first_share: float = 0.0,
    ) -> None:
        self.device, self.rate, self.largest_norm = device, 0.0, largest_norm
        self.modules = {name: module.to(device).train() for name, module in modules.items()}
        named = {f"{part}.{name}": p for part, module in modules.items() for name, p in module.named_parameters()}
        named = {name: p for name, p in named.items() if p.requires_grad}
        self.named, self.parameters = named, list(named.values())
        self._steps_before_look = 10
        self._first_share = first_share
        self._first = [p.detach().clone() for p in self.parameters] if first_share else []
        self.average = Ema(self.parameters, ema)
        inner = [p for name, p in named.items() if p.ndim > 1 and not any(word in name for word in _AT_THE_ENDS)]
        orthogonal = inner if optimizer == "muon" else []
        rest = [p for p in self.parameters if not any(p is q for q in orthogonal)]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers: dict[str, torch.optim.Optimizer] = {
            "adamw": torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.99), fused=True)
        }
        if orthogonal:
            self.optimizers["muon"] = Muon(orthogonal, lr=learning_rate, momentum=0.95, weight_decay=weight_decay)

    def parts(self) -> dict[str, Any]:
        """What a checkpoint holds."""
        return {**self.modules, **self.optimizers, "average": self.average}

    def set_rate(self, rate: float) -> None:
        """The learning rate of the steps from here on."""
        self.rate = rate
        for group in [group for optimizer in self.optimizers.values() for group in optimizer.param_groups]:
            group["lr"] = rate

    def learn(self, step: Step, loss: Tensor) -> None:
        """The backward pass, then one step of the optimizers and of the moving average, unless a number is broken."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self._steps_before_look and self._begun():
            self._steps_before_look = 0
            self._say_what_rests(step)
        self._steps_before_look = max(0, self._steps_before_look - 1)
        norm = clip(self.parameters, self.largest_norm)
        if step.healthy(loss=loss, gradient_norm=norm):
            for optimizer in self.optimizers.values():
                optimizer.step()
            self.average.update()
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        step.done(loss=loss, rate=self.rate, gradient_norm=norm)

    def _begun(self) -> bool:
        """Whether every weight can have a gradient: no branch is still at the zeros that it begins with, by which those
        before it have none; or whether that has lasted so long that it will not change."""
        return self._steps_before_look == 1 or all(bool(p.any()) for p in self.parameters if p.ndim > 1)

    def _say_what_rests(self, step: Step) -> None:
        """Tell of weights that no gradient reaches, as torch's compiled kernels once left two thirds of a U-Net."""
        rests = [name for name, weight in self.named.items() if weight.grad is None or not weight.grad.any()]
        if rests:
            step.run.say(
                f"{len(rests)} of {len(self.named)} weights have no gradient and do not learn, such as {rests[0]}; "
                "stop here, and go on with --no-compile or --precision fp32."
            )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The modules hold their averaged weights, in evaluation mode, for as long as the block lasts."""
        with self.average.applied(), evaluating(list(self.modules.values())), torch.no_grad():
            yield

    @contextmanager
    def result(self) -> Iterator[None]:
        """As `averaged`, with their share of the first weights (Wortsman et al. 2022)."""
        with self.averaged():
            for weight, first in zip(self.parameters, self._first, strict=True) if self._first else ():
                weight.lerp_(first, self._first_share)
            yield


def trained_of(
    modules: Mapping[str, nn.Module], config: PretrainOptions, device: torch.device, *, first_share: float = 0.0
) -> PretrainState:
    """The modules with what makes them learn, as the config says. first_share: as of `PretrainState`."""
    assert config.learning_rate is not None
    return PretrainState(
        modules,
        device,
        optimizer=config.optimizer,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        ema=config.ema,
        largest_norm=config.clip,
        first_share=first_share,
    )
