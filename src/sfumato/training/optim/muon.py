"""Muon, an optimizer of matrices: a base from nothing and a style's LoRA reach more with it in as many steps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.precision.choices import multiplies_bf16
from sfumato.precision.cpu_matmul import exact_matmul

SIZE = 0.2
"""Root mean square of an update, as a share of the rate (Liu et al. 2025, eq. 4): that of AdamW's usual ones."""
_FEW = 64
"""Rows or columns up to which a matrix is made orthogonal by its Gram matrix: the ranks of adapters."""
_AT_ONCE = 1 << 24
"""Numbers of matrices of one shape that are made orthogonal together: whole models have more."""
_BETAS, _EPS = (0.9, 0.99), 1e-8


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are subtracted (Jordan et al. 2024).

    A convolution's weight is read as the matrix (out, in * height * width). The rate means what it means to AdamW:
    updates have a root mean square of `SIZE` times it. What is no matrix, such as a bias or a norm, takes AdamW's steps
    (Loshchilov & Hutter 2019) at `SIZE` times the rate. So do groups with `is_table`, whose rows are things of their
    own, such as words, at the rate itself.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter] | Iterable[dict[str, Any]], *, lr: float = 0.0, momentum: float,
        weight_decay: float,
    ) -> None:  # fmt: skip
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every weight that has a gradient; matrices of one shape are made orthogonal together."""
        for group in self.param_groups:
            is_table = group.get("is_table", False)
            alike: dict[tuple[int, int], list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if is_table or not is_matrix(p.shape):
                    self._step_as_adamw(p, p.grad, group["lr"] * (1 if is_table else SIZE), group["weight_decay"])
                else:
                    alike.setdefault((p.shape[0], p[0].numel()), []).append(p)
            for shape, weights in alike.items():
                for part in _parts(weights, max(1, _AT_ONCE // (shape[0] * shape[1]))):
                    self._step_orthogonally(part, shape, group)

    def _step_orthogonally(self, weights: list[nn.Parameter], shape: tuple[int, int], group: dict[str, Any]) -> None:
        momenta = [self.state[p].setdefault("momentum", torch.zeros_like(p)) for p in weights]
        gradients = [p.grad for p in weights if p.grad is not None]
        torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
        ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov's
        updates = orthogonalize(torch.stack([m.reshape(shape) for m in ahead]))
        size = SIZE * max(shape) ** 0.5
        for p, update in zip(weights, updates, strict=True):
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(update.view_as(p), alpha=-group["lr"] * size)

    def _step_as_adamw(self, p: nn.Parameter, gradient: Tensor, rate: float, weight_decay: float) -> None:
        state = self.state[p]
        state["steps"] = count = state.get("steps", 0) + 1
        mean = state.setdefault("mean", torch.zeros_like(p)).lerp_(gradient, 1 - _BETAS[0])
        square = state.setdefault("square", torch.zeros_like(p)).lerp_(gradient.square(), 1 - _BETAS[1])
        p.mul_(1 - rate * weight_decay)
        root = square.div(1 - _BETAS[1] ** count).sqrt_().add_(_EPS)
        p.addcdiv_(mean, root, value=-rate / (1 - _BETAS[0] ** count))


def is_matrix(shape: Iterable[int]) -> bool:
    """Whether a weight of this shape has several rows and several columns."""
    rows, *rest = [*shape, 1]
    return rows > 1 and any(side > 1 for side in rest)


def _parts(weights: list[nn.Parameter], length: int) -> Iterator[list[nn.Parameter]]:
    for start in range(0, len(weights), length):
        yield weights[start : start + length]


def orthogonalize(matrices: Tensor) -> Tensor:
    """(k, m, n) matrices with their singular values brought near 1: five steps of a quintic Newton-Schulz iteration.

    fp32, in and out; between them bf16 where the device multiplies it and the matrices have many rows and columns.
    """
    few = min(matrices.shape[1:]) <= _FEW
    x = matrices.bfloat16() if multiplies_bf16(matrices.device) and not few else matrices
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    if few:
        with exact_matmul():
            x = _newton_schulz_by_gram(x)
    else:
        x = _newton_schulz(x)
    return (x if wide else x.mT).float()


def _newton_schulz(x: Tensor) -> Tensor:
    for _ in range(5):
        square = x @ x.mT
        x = torch.baddbmm(x, _polynomial(square), x, beta=3.4445)
    return x


def _newton_schulz_by_gram(x: Tensor) -> Tensor:
    """The same with two products of the matrices' own size instead of ten: each step multiplies from the left by a
    symmetric polynomial of the rows' products, and all of these commute.

    For exact products alone: what TF32 rounds off the largest direction would be as much as a small one has, and five
    steps would make a large one of it.
    """
    square = x @ x.mT
    whole = torch.eye(square.shape[1], dtype=x.dtype, device=x.device).expand_as(square)
    for _ in range(5):
        factor = _polynomial(square).add_(torch.eye(square.shape[1], dtype=x.dtype, device=x.device), alpha=3.4445)
        whole = factor @ whole
        square = factor @ square @ factor
    return whole @ x


def _polynomial(square: Tensor) -> Tensor:
    return torch.baddbmm(square, square, square, beta=-4.7750, alpha=2.0315)
