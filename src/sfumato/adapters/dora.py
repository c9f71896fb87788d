"""DoRA for training: W' = m (W + delta) / ||W + delta||, eq. 5 of Liu et al. 2024, of any other kind's delta.

The norms are those of the columns, one of each input channel and over its kernel, which is older LyCORIS's axis: the
only one of which ComfyUI, A1111, Forge and InvokeAI make the same weight. (The paper's, and LyCORIS's today, is one of
each output.) In the gradient they are constants, as in section 4.3 of the paper and unlike LyCORIS, which saves the
memory and costs no quality there.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sfumato.adapters.layer import UpdateLayer
from sfumato.adapters.whole import Host
from sfumato.errors import AdapterError
from sfumato.files.changes import Change
from sfumato.files.changes.dora import Dora

EPSILON = torch.finfo(torch.float32).eps
"""Added to the norms, by LyCORIS and all who read its files."""


class DoraLayer(UpdateLayer):
    """Rescales what `inner` makes of the weight to learned lengths m = start + shift, (1, in) or (1, in, 1, 1).

    The shift is what is trained, so that weight decay leads back to the base and not to a weight of zeros. start: the
    lengths of W itself, guard included, by which W' is W to the bit before any training.
    """

    def __init__(self, host: Host, inner: UpdateLayer) -> None:
        super().__init__()
        self.inner = inner
        self.rank, self.scale = inner.rank, inner.scale
        self.kind = "DoRA" if inner.kind == "LoRA" else f"DoRA of {inner.kind}"
        self.start: Tensor
        self.register_buffer("start", lengths(host.weight.detach()))
        self.shift = nn.Parameter(torch.zeros_like(self.start))

    def factors(self) -> tuple[Tensor, ...]:
        return self.shift, *self.inner.factors()

    def delta(self, weight: Tensor, *factors: Tensor) -> Tensor:
        shift, *inner = factors
        weight = weight.float()
        update = self.inner.delta(weight, *inner)
        ratio = (self.start + shift) / lengths((weight + update).detach())
        return (ratio - 1) * weight + ratio * update

    def limit_norm(self, host: Host, most: float) -> Tensor:
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


def lengths(weight: Tensor) -> Tensor:
    """The norm of each input's column, guard included: (1, in), of a convolution (1, in, 1, 1)."""
    axes = [axis for axis in range(weight.ndim) if axis != 1]
    norm: Tensor = torch.linalg.vector_norm(weight.float(), dim=axes, keepdim=True)
    return norm + EPSILON
