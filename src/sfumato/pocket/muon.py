"""Muon, an optimizer for training from nothing: on two cores it reaches a loss in fewer steps than AdamW."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sfumato.precision import multiplies_bf16


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are subtracted (Jordan et al. 2024).

    For weights of two dimensions and more; a convolution's is read as (out, in * height * width). The rate means what
    it means to AdamW: updates have a root mean square of 0.2 times it (Liu et al. 2025, eq. 4).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight; those of one shape are made orthogonal together."""
        for group in self.param_groups:
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for shape, weights in alike.items():
                momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
                gradients = [p.grad for p in weights if p.grad is not None]
                torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
                ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
                updates = orthogonal(torch.stack([m.view(shape) for m in ahead]))
                size = 0.2 * max(shape) ** 0.5
                for p, update in zip(weights, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"])
                    p.add_(update.view_as(p), alpha=-group["lr"] * size)


def orthogonal(matrices: Tensor) -> Tensor:
    """(k, m, n) matrices with their singular values brought near 1: five steps of a quintic Newton-Schulz iteration.

    fp32, in and out; between them bf16 where the device multiplies it.
    """
    x = matrices.bfloat16() if multiplies_bf16(matrices.device) else matrices
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        polynomial = torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
        x = torch.baddbmm(x, polynomial, x, beta=3.4445)
    return (x if wide else x.mT).float()
