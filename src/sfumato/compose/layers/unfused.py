"""Adapters beside a layer instead of within its weight: y = base(x) + up (down x), all adapters in one stack.

The way on a quantised base, whose weights cannot be summed into. What a layer costs does not grow with the number of
adapters, and new weights scale `up` in place.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d, linear

from sfumato.compose.layers.fused import Applied, Effect, overflow_message
from sfumato.compose.layers.lowrank import Scratch
from sfumato.errors import AdapterError
from sfumato.files.module_names import DENOISERS
from sfumato.precision import quantization
from sfumato.precision.cpu_matmul import exact_matmul


class UnfusedLayer:
    """One linear layer or convolution with a low-rank path for all its adapters, and a dense one for what has no such.

    The layer and its weight stay as they are; a forward hook adds the path. It computes in the dtype of the layer's
    input, as the layer itself. Adapters at weight 0 stay in the stack; where all are at 0 the path is taken away.
    """

    way = "live"
    name = "weight"

    def __init__(self, part: str, path: str, module: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self.part = part
        self.path = path
        self.module = module
        self.effects: dict[str, Effect] = {}
        self.applied: Applied = ()
        self.place = (part, path, "weight")
        self._dtype = dtype
        self._device = device
        self._path: _Path | None = None
        self._handle: Any = None
        self.other: Applied | None = None
        self._exchanged = False
        # Keys and values of a caption are the same at every step, so what the adapters make of them is, too.
        self._of_caption = part in DENOISERS and path.endswith(("attn2.to_k", "attn2.to_v"))

    @property
    def title(self) -> str:
        return f"{self.part} module {self.path}"

    @property
    def is_bare(self) -> bool:
        """Whether nothing stands beside the layer yet."""
        return self._path is None and self._handle is None

    def check_untouched(self) -> None:
        """Nothing of the base is written, so nothing can have been changed beneath."""

    def forget(self, labels: Iterable[str]) -> None:
        """Drop the changes of these adapters, of which none is applied."""
        for label in labels:
            self.effects.pop(label, None)
        if self._path is not None and self.effects and self._stale:
            self._path = self._stacked()
            self._path.weigh(dict(self.applied))
            self._path.hold(dict(self.other) if self.other else None)

    def rebuilds(self, wanted: Applied) -> bool:
        """Whether these weights take another hook or path, not only other numbers in the one that is there."""
        return bool(wanted) and (self._stale or self._handle is None)

    @property
    def _stale(self) -> bool:
        return self._path is None or self._path.labels != tuple(sorted(self.effects))

    def _stacked(self) -> _Path:
        return _Path(self.module, dict(sorted(self.effects.items())), self._dtype, self._device)

    @torch.no_grad()
    def apply(self, wanted: Applied, scratch: Scratch) -> None:
        """Bring the path to these weights. Raises AdapterError for one whose numbers the dtype cannot hold."""
        self.applied = wanted
        if not wanted:
            self._silence()
            return
        if self._path is None or self._stale:
            self._path = self._stacked()
        self._path.weigh(dict(wanted))
        if not self._path.is_finite():
            raise overflow_message(self.title, self._path.dtype, wanted)
        if self._handle is None:
            self._handle = self.module.register_forward_hook(self._add)

    @torch.no_grad()
    def set_aside(self, other: Applied | None, scratch: Scratch) -> None:
        """Hold the path at these weights, for `exchange`; None for nothing."""
        self.other = other
        if self._path is not None:
            self._path.hold(dict(other) if other else None)

    def exchange(self) -> None:
        """The path at the weights that were set aside; at the next call as it was. Nothing is computed."""
        self._exchanged = not self._exchanged
        if self._path is not None and self.other:
            self._path.exchange()

    def restore(self) -> None:
        """Take the path away."""
        self.remove_hook()  # first, so that nothing is added any more whatever the path says
        self._silence()
        self.applied, self._path, self.other = (), None, None

    def remove_hook(self) -> None:
        """Take the hook away, so that a layer at weight 0 costs nothing; not where it is compiled into the layer."""
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    @torch.no_grad()
    def _silence(self) -> None:
        if self._path is not None:
            self._path.weigh({})  # a compiled layer has the hook within it for good, so the path itself adds 0

    def _add(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        path = self._path
        if path is None or (self._exchanged and self.other == ()):
            return output
        x = inputs[0]
        keeps = self._of_caption and not (torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_inference())
        last = path.now.answer  # once, as another thread may answer meanwhile
        if keeps and last is not None and last[0] is x and last[1] == x._version and last[2].dtype == output.dtype:
            return output + last[2]
        dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
        if path.dtype != dtype or path.device != x.device:  # the part was moved or cast since
            path.move(dtype, x.device)
        if not keeps:
            return path(x, output)
        added = path(x, torch.zeros_like(output))
        path.now.answer = (x, x._version, added)
        return output + added


_Answer = tuple[Tensor, int, Tensor]
"""An input, its version, and what the path adds to the layer's own product: that may be another the next time."""


@dataclass
class _PathWeights:
    """A path at some weights: these numbers by label, up (out, rank), and dense, of the weight's shape.

    answer: the last one about a caption at these weights, which goes where they go in an exchange.
    """

    numbers: dict[str, float] = field(default_factory=dict)
    up: Tensor | None = None
    dense: Tensor | None = None
    answer: _Answer | None = None


class _Path:
    """The stacked factors of one layer, at some weights, and held at others. labels: of the adapters within, sorted."""

    def __init__(self, module: nn.Module, effects: dict[str, Effect], dtype: torch.dtype, device: torch.device) -> None:
        self.labels = tuple(effects)
        self.dtype = dtype
        self.device = device
        self._effects = effects
        self._module = module
        self._convolution = module if isinstance(module, nn.Conv2d) else None
        self._low = {label: effect.low_rank for label, effect in effects.items() if effect.low_rank is not None}
        self._dense_labels = [label for label, effect in effects.items() if effect.low_rank is None]
        self._down: Tensor | None = None
        self.now = _PathWeights()
        self._held: _PathWeights | None = None
        self._stack()

    def _stack(self) -> None:
        """down: (rank, in) or (rank, in, height, width); up of all weights, without numbers yet."""
        if not self._low:
            return
        shape = quantization.module_weight_shape(self._module)
        assert shape is not None
        # Made in inference mode, they could not be given other numbers outside it.
        with torch.inference_mode(False), torch.no_grad():
            down = torch.cat([low.down.reshape(low.rank, *shape[1:]).float() for low in self._low.values()])
            self._down = down.to(self.device, self.dtype)
        self.now.up = self._empty_up(self._down)
        if self._held is not None:
            self._held.up = self._empty_up(self._down)

    def _empty_up(self, down: Tensor) -> Tensor:
        out = (quantization.module_weight_shape(self._module) or ())[0]
        with torch.inference_mode(False):
            return torch.empty(out, len(down), dtype=self.dtype, device=self.device)

    def weigh(self, numbers: dict[str, float]) -> None:
        """New weights by label, 0 where there is none; the factors' memory stays where it is."""
        self._weigh(self.now, numbers)

    def hold(self, numbers: dict[str, float] | None) -> None:
        """Have the path at other weights ready for `exchange`; None for none."""
        self._held = None
        if numbers is not None:
            self._held = _PathWeights(up=None if self._down is None else self._empty_up(self._down))
            self._weigh(self._held, numbers)

    def exchange(self) -> None:
        """The weights that are held, and these held."""
        if self._held is not None:
            self.now, self._held = self._held, self.now

    def _weigh(self, weighed: _PathWeights, numbers: dict[str, float]) -> None:
        weighed.numbers, weighed.answer = numbers, None
        if weighed.up is not None:
            start = 0
            for label, low in self._low.items():
                number, columns = numbers.get(label, 0.0) * low.scale, weighed.up[:, start : start + low.rank]
                if number == 0:  # without a look at the file, which may be another by now
                    columns.zero_()
                else:
                    columns.copy_(low.up.reshape(len(weighed.up), low.rank).float() * number)
                start += low.rank
        weighed.dense = self._dense(numbers)

    def _dense(self, numbers: dict[str, float]) -> Tensor | None:
        used = [label for label in self._dense_labels if numbers.get(label, 0.0) != 0]
        if not used:
            return None
        weight = base_weight(self._module, needed=any(self._effects[label].change.needs_weight for label in used))
        total = torch.zeros_like(weight, dtype=torch.float32)
        with exact_matmul():
            for label in used:
                total.add_(self._effects[label].change.delta(weight), alpha=numbers[label])
        return total.to(self.device, self.dtype)

    def is_finite(self) -> bool:
        """Whether the dtype holds the numbers."""
        found = [tensor for tensor in (self._down, self.now.up, self.now.dense) if tensor is not None]
        return all(bool(torch.isfinite(tensor).all()) for tensor in found)

    def move(self, dtype: torch.dtype, device: torch.device) -> None:
        """The path in another dtype or on another device, from the file's own numbers."""
        self.dtype, self.device = dtype, device
        with torch.no_grad():
            self._stack()
            for weighed in (self.now, self._held):
                if weighed is not None:
                    self._weigh(weighed, weighed.numbers)

    def __call__(self, x: Tensor, output: Tensor) -> Tensor:
        if self._convolution is not None:
            return self._convolve(self._convolution, x, output)
        up, dense = self.now.up, self.now.dense
        if dense is not None:
            output = output + linear(x, dense)
        if self._down is None or up is None:
            return output
        narrow = torch.mm(x.flatten(0, -2), self._down.t())
        if output.dtype != narrow.dtype:  # a layer that answers in another dtype than it is asked in
            return output + linear(narrow, up).view(output.shape).to(output.dtype)
        if torch.is_grad_enabled() or not is_fresh_output(self._module):
            return torch.addmm(output.flatten(0, -2), narrow, up.t()).view(output.shape)
        output.view(-1, output.shape[-1]).addmm_(narrow, up.t())
        return output

    def _convolve(self, layer: nn.Conv2d, x: Tensor, output: Tensor) -> Tensor:
        up, dense = self.now.up, self.now.dense
        if dense is not None:
            output = output + conv2d(x, dense, None, layer.stride, layer.padding, layer.dilation)
        if self._down is None or up is None:
            return output
        narrow = conv2d(x, self._down, None, layer.stride, layer.padding, layer.dilation)
        return output + conv2d(narrow, up[..., None, None]).to(output.dtype)


def is_fresh_output(module: nn.Module) -> bool:
    """Whether what a hook gets as the layer's output is that for sure, new memory, to be added to in place: another
    hook may have put a tensor there that it keeps."""
    return len(module._forward_hooks) == 1


class RefusesSaving:
    """In place of `save_pretrained` of a part with paths beside its layers, none of which that would write."""

    def __init__(self, part: nn.Module) -> None:
        self._part = part

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self._own)  # by which a pipeline knows what it may ask for

    @property
    def _own(self) -> Any:
        kind: Any = type(self._part)
        return MethodType(kind.save_pretrained, self._part)

    def sites(self) -> list[UnfusedLayer]:
        """The paths that add something, of a mix or of one that the part was copied with."""
        hooks = [hook for module in self._part.modules() for hook in module._forward_hooks.values()]
        return [
            site for hook in hooks if isinstance(site := getattr(hook, "__self__", None), UnfusedLayer) and site.applied
        ]

    def __call__(self, *args: Any, **options: Any) -> Any:
        """Raises AdapterError while any path adds something; else the part's own."""
        if sites := self.sites():
            raise AdapterError(
                f"adapters are live beside the {sites[0].part}'s layers, and save_pretrained writes the base without "
                "them. Write them with mix.save(file), or undo() the mix before you save the base; in a copy that was "
                "made meanwhile they are for good."
            )
        return self._own(*args, **options)


def can_be_unfused(module: nn.Module) -> bool:
    """Whether the module is a layer that a path can stand beside: y = W x + b, or a convolution with zeros around."""
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    return isinstance(getattr(module, "in_features", None), int)


@torch.no_grad()
def base_weight(module: nn.Module, *, needed: bool) -> Tensor:
    """The weight of a layer in fp32; of a quantised linear layer as it computes with it, asked by unit vectors.

    needed: whether its values matter; otherwise a tensor of its shape will do. Raises AdapterError where they matter
    and cannot be had.
    """
    weight, shape = quantization.stored_tensor(module, "weight"), quantization.module_weight_shape(module)
    assert shape is not None
    is_there = weight is not None and (
        quantization.is_plain_float(weight) or quantization.is_layerwise_cast(module, weight)
    )
    if weight is not None and is_there and weight.device.type != "meta":
        return weight.float()
    parameter = next(module.parameters(), None)
    device = torch.device("cpu") if parameter is None else parameter.device
    if not needed:
        return torch.empty(shape, dtype=torch.float32, device=device)
    if len(shape) != 2:
        raise AdapterError(
            "a change that depends on the weight cannot stand beside a quantised convolution. Load the base in bf16."
        )
    hooks, module._forward_hooks = module._forward_hooks, type(module._forward_hooks)()
    try:
        units = torch.eye(shape[1], dtype=compute_dtype(module), device=device)
        bias = module(torch.zeros_like(units[:1]))
        answers: Tensor = module(units).float() - bias.float()
        return answers.t().contiguous()
    finally:
        module._forward_hooks = hooks


def compute_dtype(module: nn.Module) -> torch.dtype:
    """What a quantised layer is fed with: what it says itself, else its bias' dtype, else fp32."""
    said = getattr(module, "compute_dtype", None)
    if isinstance(said, torch.dtype):
        return said
    bias = getattr(module, "bias", None)
    return bias.dtype if isinstance(bias, Tensor) and bias.is_floating_point() else torch.float32
