"""LoRA for training: W' = W + scale B A beside a frozen layer (Hu et al. 2021, section 4.1).

DoRA for training: W' = m (W + delta) / ||W + delta||, eq. 5 of Liu et al. 2024, of any other kind's delta.

The norms are those of the columns, one of each input channel and over its kernel, which is older LyCORIS's axis: the
only one of which ComfyUI, A1111, Forge and InvokeAI make the same weight. (The paper's, and LyCORIS's today, is one of
each output.) In the gradient they are constants, as in section 4.3 of the paper and unlike LyCORIS, which saves the
memory and costs no quality there.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.layers import BaseLayer, UpdateLayer, fused_output, geometry_of, init_uniform
from sfumato.errors import AdapterError
from sfumato.files.kinds import Change, LoraModule
from sfumato.files.kinds.dora import Dora
from sfumato.precision.cpu_matmul import linear


class LoraLayer(UpdateLayer):
    """One update scale B A; `down` is A, `up` is B.

    Linear: down (rank, in), up (out, rank). Convolution: down (rank, in, k, k), up (out, rank, 1, 1).
    """

    kind = "LoRA"

    def __init__(self, host: BaseLayer, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        if isinstance(host, nn.Conv2d):
            down_shape: tuple[int, ...] = (rank, host.in_channels, *host.kernel_size)
            up_shape: tuple[int, ...] = (host.out_channels, rank, 1, 1)
        else:
            down_shape, up_shape = (rank, host.in_features), (host.out_features, rank)
        self.host_geometry = geometry_of(host)
        self.down = init_uniform(*down_shape, generator=generator)
        self.up = nn.Parameter(torch.zeros(up_shape))  # so that the start is a no-op

    @property
    def rank(self) -> int:  # type: ignore[override]  # that of what is trained
        return self.down.shape[0]

    def factors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        down, up = factors
        return (self.scale * (up.flatten(1) @ down.flatten(1))).view(weight.shape)

    def together(self, host: BaseLayer, x: Tensor) -> Tensor | None:
        return fused_output(host, self.down, self.up, self.scale * self.strength, x)

    def forward(self, host: BaseLayer, x: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        scale = self.scale * self.strength
        if not torch.is_autocast_enabled(x.device.type):  # a frozen text encoder in half precision is called so
            x = x.to(self.down.dtype)
        if self.host_geometry is None:
            low = linear(x, self.down) * scale
        else:
            low = F.conv2d(x, self.down, None, *self.host_geometry) * scale
        low = low if drop is None else drop(low)
        return linear(low, self.up) if self.host_geometry is None else F.conv2d(low, self.up)

    def norm(self, host: BaseLayer) -> Tensor:
        """From the factors' Gram matrices, (rank, rank), instead of a product of the weight's size."""
        up, down = self.up.flatten(1), self.down.flatten(1)
        return self.scale * ((up.T @ up) * (down @ down.T)).sum().clamp(min=0).sqrt()

    def ups(self) -> tuple[nn.Parameter, ...]:
        return (self.up,)

    def change(self) -> Change:
        return LoraModule.from_scale(self.down.detach(), self.up.detach(), self.scale)

    def load(self, change: Change, where: str) -> None:
        """The other's scale is folded into `up`, so that the delta is the other's to fp32 rounding."""
        assert isinstance(change, LoraModule)
        change = change.plain()  # without a Tucker core
        down, up = change.down, change.up
        if down.shape != self.down.shape or up.shape != self.up.shape:
            own = "--conv-rank" if math.prod(self.down.shape[2:]) > 1 else "--rank"
            raise AdapterError(
                f"{where} has rank {down.shape[0]} and shape {tuple(up.shape)}, this run has rank {self.rank} and "
                f"shape {tuple(self.up.shape)}. Give its own {own}, and its own base."
            )
        with torch.no_grad():
            self.down.copy_(down)
            self.up.copy_(up * (change.alpha / self.rank / self.scale))


EPSILON = torch.finfo(torch.float32).eps
"""Added to the norms, by LyCORIS and all who read its files."""


class DoraLayer(UpdateLayer):
    """Rescales what `inner` makes of the weight to learned lengths m = start + shift, (1, in) or (1, in, 1, 1).

    The shift is what is trained, so that weight decay leads back to the base and not to a weight of zeros. start: the
    lengths of W itself, guard included, by which W' is W to the bit before any training.
    """

    def __init__(self, host: BaseLayer, inner: UpdateLayer) -> None:
        super().__init__()
        self.inner = inner
        self.rank, self.scale = inner.rank, inner.scale
        self.kind = "DoRA" if inner.kind == "LoRA" else f"DoRA of {inner.kind}"
        self.start: Tensor
        self.register_buffer("start", weight_norm(host.weight.detach()))
        self.shift = nn.Parameter(torch.zeros_like(self.start))

    def factors(self) -> tuple[Tensor, ...]:
        return self.shift, *self.inner.factors()

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        shift, *inner = factors
        weight = weight.float()
        update = self.inner.delta(weight, *inner)
        ratio = (self.start + shift) / weight_norm((weight + update).detach())
        return (ratio - 1) * weight + ratio * update

    def limit_norm(self, host: BaseLayer, most: float) -> Tensor:
        """Of the update within: what a length makes of the weight has no norm that a limit could be for."""
        return self.inner.limit_norm(host, most)

    def ups(self) -> tuple[nn.Parameter, ...]:
        return self.inner.ups()

    def change(self) -> Change:
        return Dora(self.inner.change(), (self.start + self.shift.detach()).flatten(), on_input=True, epsilon=EPSILON)

    def load(self, change: Change, where: str) -> None:
        assert isinstance(change, Dora)
        if not change.on_input:
            raise AdapterError(
                f"{where} has a length for each output, and those of inputs are trained. Take another adapter, or bake "
                "this one (sfumato convert FILE --bake lora) and leave --dora out."
            )
        self.inner.load(change.inner, where)
        with torch.no_grad():
            self.shift.copy_(change.magnitude.to(self.start).view_as(self.start) - self.start)


def weight_norm(weight: Tensor) -> Tensor:
    """The norm of each input's column, guard included: (1, in), of a convolution (1, in, 1, 1)."""
    axes = [axis for axis in range(weight.ndim) if axis != 1]
    norm: Tensor = torch.linalg.vector_norm(weight.float(), dim=axes, keepdim=True)
    return norm + EPSILON
