"""LoRA for training: W' = W + scale B A beside a frozen layer (Hu et al. 2021, section 4.1)."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato.adapters.folded import folded, geometry_of
from sfumato.adapters.layer import UpdateLayer, uniform
from sfumato.adapters.whole import Host
from sfumato.errors import AdapterError
from sfumato.files.changes import Change, LoraModule
from sfumato.precision.products import linear


class LoraLayer(UpdateLayer):
    """One update scale B A; `down` is A, `up` is B.

    Linear: down (rank, in), up (out, rank). Convolution: down (rank, in, k, k), up (out, rank, 1, 1).
    """

    kind = "LoRA"

    def __init__(self, host: Host, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        self.scale = scale
        if isinstance(host, nn.Conv2d):
            down_shape: tuple[int, ...] = (rank, host.in_channels, *host.kernel_size)
            up_shape: tuple[int, ...] = (host.out_channels, rank, 1, 1)
        else:
            down_shape, up_shape = (rank, host.in_features), (host.out_features, rank)
        self.host_geometry = geometry_of(host)
        self.down = uniform(*down_shape, generator=generator)
        self.up = nn.Parameter(torch.zeros(up_shape))  # so that the start is a no-op

    @property
    def rank(self) -> int:  # type: ignore[override]  # that of what is trained
        return self.down.shape[0]

    def factors(self) -> tuple[Tensor, ...]:
        return self.down, self.up

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        down, up = factors
        return (self.scale * (up.flatten(1) @ down.flatten(1))).view(weight.shape)

    def together(self, host: Host, x: Tensor) -> Tensor | None:
        return folded(host, self.down, self.up, self.scale * self.strength, x)

    def forward(self, host: Host, x: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        scale = self.scale * self.strength
        if not torch.is_autocast_enabled(x.device.type):  # a frozen text encoder in half precision is called so
            x = x.to(self.down.dtype)
        if self.host_geometry is None:
            low = linear(x, self.down) * scale
        else:
            low = F.conv2d(x, self.down, None, *self.host_geometry) * scale
        low = low if drop is None else drop(low)
        return linear(low, self.up) if self.host_geometry is None else F.conv2d(low, self.up)

    def norm(self, host: Host) -> Tensor:
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
