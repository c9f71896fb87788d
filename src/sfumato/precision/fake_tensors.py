"""Tensors that have shapes and no numbers, on a CPU as it seems: for programs that count bytes.

torch's FakeTensorMode does the same, with checks for compilers, and takes several times as long
(`python -m bench.forecast_time`). What is `meta` in a tensor of here is computed on torch's device of that name;
autograd, autocast and the choice of kernels see a tensor of the CPU.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_CPU, _META = torch.device("cpu"), torch.device("meta")


class FakeTensor(Tensor):
    """A tensor of the CPU without memory. meta: one of its shape and strides on the device `meta`, whose storage is
    that of its views."""

    meta: Tensor

    @staticmethod
    def __new__(cls, meta: Tensor) -> FakeTensor:
        imagined: FakeTensor = Tensor._make_wrapper_subclass(
            cls, meta.shape, meta.stride(), meta.storage_offset(), dtype=meta.dtype, device=_CPU
        )
        imagined.meta = meta
        return imagined

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Outside of `Imagining` there is nothing to compute with. Raises RuntimeError."""
        raise RuntimeError(f"{func}: a tensor without numbers outside of the block that imagines it.")


class FakeMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Within the block every tensor that is made is `Imagined`. Blocks may be nested."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """What the operation gives for such shapes: from the last time where it makes new tensors, else asked anew."""
        kwargs = kwargs or {}
        if FakeTensor not in types:
            if not _is_factory(func) or kwargs.get("device") == _META:
                return func(*args, **kwargs)
            kwargs = {**kwargs, "device": _META}
        if not _returns_new_tensors(func):
            return _computed(func, args, kwargs)
        asked = (func, _describe(args), _describe(tuple(kwargs.items())))
        if asked in _OUTPUT_CACHE:
            return _make_outputs(_OUTPUT_CACHE[asked])
        result = _computed(func, args, kwargs)
        _OUTPUT_CACHE[asked] = _describe(result)
        return result


_OUTPUT_CACHE: dict[tuple[Any, ...], Any] = {}
"""(operation, its arguments as `_described`) -> its result as `_described`. The layers of a model repeat themselves."""


class _TensorSpec(tuple[Any, ...]):
    """(shape, strides, dtype) of a tensor."""

    __slots__ = ()


def _describe(value: Any) -> Any:
    """The value with each tensor as its description, and with the types of numbers: 1 is not 1.0 to torch."""
    if isinstance(value, Tensor):
        return _TensorSpec((value.shape, value.stride(), value.dtype))
    if isinstance(value, tuple | list):
        return tuple(map(_describe, value))
    return value if value is None else (type(value), value)


def _make_outputs(described: Any) -> Any:
    """New tensors of a result's descriptions."""
    if isinstance(described, _TensorSpec):
        shape, strides, dtype = described
        return FakeTensor(torch.empty_strided(shape, strides, dtype=dtype, device=_META))
    return described if described is None else tuple(map(_make_outputs, described))


@cache
def _is_factory(func: Any) -> bool:
    arguments = func._schema.arguments
    return any(a.name == "device" for a in arguments) and not any("Tensor" in str(a.type) for a in arguments)


@cache
def _returns_new_tensors(func: Any) -> bool:
    """Whether all that it returns are tensors of their own, and it changes none."""
    schema = func._schema
    return not schema.is_mutable and all(
        str(each.type) in ("Tensor", "Optional[Tensor]", "List[Tensor]") and each.alias_info is None
        for each in schema.returns
    )


def _computed(func: Any, args: Any, kwargs: Any) -> Any:
    of_meta: dict[int, FakeTensor] = {}
    result = func(*_to_meta(args, of_meta), **{name: _to_meta(value, of_meta) for name, value in kwargs.items()})
    return _from_meta(result, of_meta)


def _to_meta(value: Any, of_meta: dict[int, FakeTensor]) -> Any:
    """The value on the device `meta`; in `of_meta` the imagined tensors of it by the id of what they became."""
    if isinstance(value, FakeTensor):
        of_meta[id(value.meta)] = value
        return value.meta
    if isinstance(value, Tensor):  # a number that a program made before or by itself
        return value.to(_META)
    if isinstance(value, tuple | list):
        return type(value)(_to_meta(each, of_meta) for each in value)
    return _META if isinstance(value, torch.device) else value


def _from_meta(result: Any, of_meta: dict[int, FakeTensor]) -> Any:
    """The result imagined; what is an argument changed in place is that argument."""
    if isinstance(result, Tensor):
        changed = of_meta.get(id(result))
        return FakeTensor(result) if changed is None else changed
    if isinstance(result, tuple | list):
        return type(result)(_from_meta(each, of_meta) for each in result)
    return result


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The memory that a tensor and its views have in common, be it imagined."""
    return (tensor.meta if isinstance(tensor, FakeTensor) else tensor).untyped_storage()
