"""(IA)^3 (Liu et al. 2022): a factor on each input or output."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sfumato.files.changes.change import WithoutLowRank, check_fits
from sfumato.files.changes.module_tensors import ModuleTensors


@dataclass(frozen=True)
class Ia3(WithoutLowRank):
    """W * gain along one axis, gain: the factor less 1, (out,) or, where on_input, (in,).

    LyCORIS stores the gain and leaves the bias alone. peft stores the factor, and on outputs it multiplies the bias
    with it as well: scales_bias, so that the bias changes by gain * bias.
    """

    gain: Tensor
    on_input: bool
    scales_bias: bool = False
    bias_delta: Tensor | None = None

    kind: ClassVar[str] = "IA3"
    needs_weight: ClassVar[bool] = True

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Ia3:
        bias = parts.vector("bias")
        if parts.get("ia3_l") is None:
            gain, on_input = parts.vector("ia3_weight"), parts.number("on_input")
            assert gain is not None
            if on_input not in (0, 1):
                raise parts.shape_error("on_input", "0 or 1")
            return cls(gain, bool(on_input), bias_delta=bias)
        factor, vector = parts["ia3_l"], parts.vector("ia3_l")
        assert vector is not None
        if factor.ndim < 2:
            raise parts.shape_error("ia3_l", "(out, 1) or (1, in)")
        if factor.ndim == 2:
            on_input = factor.shape[0] == 1
        else:  # a convolution's is [1, channels, 1, 1] whatever the channels are
            names = parts.settings.get(parts.target, "feedforward_modules") or []
            if not parts.settings.folder:
                raise parts.error("ia3_l of a convolution, whose axis only peft's config tells; wanted peft's folder")
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise parts.error("peft's feedforward_modules is a pattern; wanted a list of names")
            path = parts.target[1]
            on_input = any(path == name or path.endswith(f".{name}") for name in names)
        return cls(vector.float() - 1, on_input, scales_bias=not on_input, bias_delta=bias)

    def fits(self, shape: Sequence[int]) -> bool:
        return len(shape) > 1 and self.gain.numel() == shape[1 if self.on_input else 0]

    def delta(self, weight: Tensor) -> Tensor:
        check_fits(self, weight.shape)
        sizes = [1] * weight.ndim
        sizes[1 if self.on_input else 0] = -1
        return weight.float() * self.gain.to(weight.device).float().view(sizes)
