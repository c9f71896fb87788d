"""What every kind of update is to the layer beside which it learns."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from sfumato.adapters import whole
from sfumato.adapters.whole import Host
from sfumato.files.changes import Change


class UpdateLayer(nn.Module):
    """A trained change of one frozen weight, in fp32 whatever the model's dtype is, which begins as none.

    kind: of its `Change`, a key of `sfumato.files.changes.KINDS`, or "DoRA", "DoRA of LoHa", ... rank: of its factors.
    scale: what their product is multiplied with. strength: how often the whole change counts, see `Attached.scaled`.
    """

    kind: str
    rank: int
    scale: float
    strength: float = 1.0

    def factors(self) -> tuple[Tensor, ...]:
        """What is trained, in the order in which `delta` takes it."""
        raise NotImplementedError

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        """What these factors add to the frozen `weight`: fp32, of its shape; torch knows the gradients."""
        raise NotImplementedError

    def together(self, host: Host, x: Tensor) -> Tensor | None:
        """What the layer and its update make of x as one product; None where each has its own, see `forward`."""
        return whole.changed(self, host, x) if whole.is_exact(host, x) else None

    def forward(self, host: Host, x: Tensor, drop: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """The update's share of the layer's output, for the layer's input x.

        drop: leaves ranks out of what is within the update, see `Attached.dropped_ranks`. A matrix has none of its own,
        and so its rows are left out, as by LyCORIS: its outputs.
        """
        share = whole.share(self, host, x)
        return share if drop is None else drop(share)

    def ups(self) -> tuple[nn.Parameter, ...]:
        """The factors B, which LoRA+ gives a rate of their own; none where no factor is what B is to A."""
        return ()

    def norm(self, host: Host) -> Tensor:
        """The Frobenius norm of the update, as a file will have it; of no elements, on the layer's device."""
        norm: Tensor = torch.linalg.vector_norm(self.delta(host.weight, *self.factors()))
        return norm

    @torch.no_grad()
    def limit_norm(self, host: Host, most: float) -> Tensor:
        """Shrink the factors, all by one ratio, where the update's norm is larger than `most`; whether it was.

        Max norm regularization as sd-scripts has it (scale_weight_norms). Waits for no GPU.
        """
        factors = self.factors()
        norm = self.norm(host)
        ratio = (most / norm.clamp(min=most)) ** (1 / len(factors))
        for factor in factors:
            factor.mul_(ratio)
        return norm > most

    def change(self) -> Change:
        """The update as files have it; it shares the factors' memory, and does not know `strength`."""
        raise NotImplementedError

    def load(self, change: Change, where: str) -> None:
        """Start from a change of this kind. where: whose it is, which an AdapterError for another shape begins with."""
        raise NotImplementedError


def uniform(*shape: int, generator: torch.Generator) -> nn.Parameter:
    """A factor that starts uniform in +-1 / sqrt(inputs), as PyTorch and peft start a linear layer or a convolution."""
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    return nn.Parameter((torch.rand(shape, generator=generator) * 2 - 1) * bound)
