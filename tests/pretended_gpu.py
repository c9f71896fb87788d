"""A GPU that is only pretended: its tensors lie in the CPU's memory, and meet no tensor of the CPU.

Within `pretended_gpu()` torch says that it has one, of CUDA or Apple's (MPS). Tensors made on it or moved to it call
themselves "cuda:0" or "mps:0"; each operation is computed by the CPU on what they hold, and an operation that a GPU
would refuse, because one of its tensors is still the CPU's, is refused here in the same words; on MPS so is fp64. So a
program that runs here has moved what it had to move, has the dtypes that each operation wants, and takes nothing for an
array that lies on a GPU. What only a GPU can show (speed, memory, its kernels' rounding, what its libraries lack) is
not shown.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from typing import Any, Literal
from unittest.mock import patch

import torch
import torch._dynamo  # which asks torch for its devices when it is first imported
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from sfumato.precision import quantization

aten = torch.ops.aten
DESCRIBING = {
    Tensor.dim, Tensor.size, Tensor.numel, Tensor.stride, Tensor.is_floating_point, Tensor.is_contiguous,
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "ndim", "layout", "requires_grad", "is_leaf")),
}  # fmt: skip
"""What computes nothing: the same of a GPU's tensor as of the CPU's."""
GPU = torch.device("cuda", 0)
"""The one that is pretended, or was last."""
CPU = torch.device("cpu")


def leaves_of(x: Any) -> list[Any]:
    """What a nest of tuples, lists and dicts holds. torch's own `tree_leaves` takes longer than most operations."""
    if isinstance(x, dict):
        x = x.values()
    elif not isinstance(x, tuple | list):
        return [x]
    found: list[Any] = []
    for each in x:
        if isinstance(each, tuple | list | dict):
            found += leaves_of(each)
        else:
            found.append(each)
    return found


def of_each(change: Any, x: Any) -> Any:
    """The same nest of what `change` makes of each leaf."""
    if isinstance(x, dict):
        return {key: of_each(change, each) for key, each in x.items()}
    if isinstance(x, tuple | list):
        kind = list if isinstance(x, list) else tuple
        return kind([of_each(change, each) for each in x])
    return change(x)


class OnGpu(Tensor):
    """A tensor that says it is on the GPU. held: the CPU's tensor with its numbers.

    In C++ it is one of the CPU: autograd has no queue for a GPU that is not there. Python takes it for one of the GPU.
    """

    held: Tensor
    device = property(lambda self: GPU)
    is_cuda = property(lambda self: GPU.type == "cuda")
    is_mps = property(lambda self: GPU.type == "mps")
    is_cpu = property(lambda self: False)

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool | None = None) -> OnGpu:
        if requires_grad is not None:  # accelerate makes a parameter of any tensor by the class of the one before
            return nn.Parameter(held, requires_grad)  # type: ignore[return-value]
        if GPU.type == "mps" and held.dtype == torch.float64:
            raise TypeError(
                "Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64."
            )
        made = Tensor._make_subclass(cls, held)
        made.held = held
        return made

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"OnGpu({self.held!r})"

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {})


class Generator(torch._C.Generator):
    """One of the CPU that says which device it was asked for."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = torch._C.Generator.__new__(cls, "cpu")
        made.asked = torch.device(numbered(device))
        return made

    device = property(lambda self: self.asked)


class Calls(TorchFunctionMode):
    """What Python asks of torch: a GPU has its number, and whatever an operation on the GPU makes lies there.

    running: for each call that runs, whether it stays on the GPU: it is of the GPU's tensors and asks for no other
    device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.running: list[bool] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in DESCRIBING:
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return moved(func, *args, **kwargs)
        if func is Tensor.tolist:
            return moved(Tensor.cpu, args[0]).tolist()
        if func in (Tensor.numpy, Tensor.data_ptr) and isinstance(args[0], OnGpu):
            raise TypeError("can't convert a GPU's tensor to numpy. Use Tensor.cpu() to copy it first.")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and numbered(kwargs.get("device")) == GPU:
            return moved(Tensor.to, func(*args, **{**kwargs, "device": CPU}), GPU)
        leaves = leaves_of((args, kwargs))
        if any(says_gpu(x) for x in leaves):
            args, kwargs = of_each(numbered, (args, kwargs))
        there = any(isinstance(x, OnGpu) for x in leaves)
        for drawn_by in (x for x in leaves if isinstance(x, Generator)):
            if says_gpu(drawn_by.device) != (there or says_gpu(kwargs.get("device"))):
                raise RuntimeError(f"Expected another device type for generator but found '{drawn_by.device}'")
        leaves_it = any(x in ("cpu", CPU) for x in leaves if isinstance(x, str | torch.device))
        self.running.append(there and not leaves_it)
        try:
            return func(*args, **kwargs)
        finally:
            self.running.pop()

    @property
    def stays(self) -> bool:
        """Whether the innermost call stays on the GPU."""
        return bool(self.running) and self.running[-1]


def moved(func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """`Tensor.to` and its short forms: the same tensor where nothing changes, and otherwise one that autograd knows."""
    if func is not Tensor.to:
        to, dtype, layout = (GPU if func is Tensor.cuda else CPU), None, kwargs.get("memory_format")
        copy = False
    elif args and isinstance(args[0], Tensor):
        to, dtype, layout, copy = args[0].device, args[0].dtype, None, False
    else:
        copy = kwargs.pop("copy", False)
        to, dtype, _, layout = torch._C._nn._parse_to(*of_each(numbered, args), **of_each(numbered, kwargs))
    to, there = to or tensor.device, isinstance(tensor, OnGpu)
    if there != says_gpu(to):
        tensor = (Down if there else Up).apply(tensor)
    layout = torch.preserve_format if layout is None else layout
    return tensor.to(None if says_gpu(to) else to, dtype or tensor.dtype, copy=copy, memory_format=layout)


class Up(torch.autograd.Function):
    """To the GPU."""

    @staticmethod
    def forward(context: Any, tensor: Tensor) -> Tensor:
        return OnGpu(tensor.detach().clone())

    @staticmethod
    def backward(context: Any, gradient: Any) -> Tensor:
        held: Tensor = gradient.held
        return held.clone()


class Down(torch.autograd.Function):
    """From the GPU."""

    @staticmethod
    def forward(context: Any, tensor: Any) -> Tensor:
        held: Tensor = tensor.held
        return held.clone()

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        return OnGpu(gradient.clone())


def numbered(x: Any) -> Any:
    """The GPU by its number, whatever it is called, and anything else as it is."""
    return GPU if says_gpu(x) else x


def says_gpu(x: Any) -> bool:
    """Whether this is a name of the GPU."""
    return x.type == GPU.type if isinstance(x, torch.device) else isinstance(x, str) and x in (GPU.type, str(GPU))


class Pretending(TorchDispatchMode):
    """Operations on the GPU's tensors, and those that make some, by the CPU."""

    def __init__(self, calls: Calls) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return compute(func, args, kwargs or {}, within=self.calls.stays)


DATA = Tensor.data  # type: ignore[attr-defined]


def get_data(tensor: Tensor) -> Tensor:
    return OnGpu(tensor.held) if isinstance(tensor, OnGpu) else DATA.__get__(tensor)


def set_data(tensor: Tensor, other: Tensor) -> None:
    """`tensor.data = other`, which moves the very tensor where the other lies."""
    if isinstance(tensor, OnGpu) != isinstance(other, OnGpu):
        twin = OnGpu(other.held) if isinstance(other, OnGpu) else nn.Parameter(other, requires_grad=False)
        torch.utils.swap_tensors(tensor, twin.requires_grad_(tensor.requires_grad))
        return
    DATA.__set__(tensor, other)
    if isinstance(tensor, OnGpu) and isinstance(other, OnGpu):
        tensor.held = other.held


COPIES = {aten.copy_.default, aten.copy.default, aten._copy_from.default}
"""What may read a tensor of one device and write one of another."""
INDEXED = {
    aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}  # fmt: skip
"""What takes indices that lie on the CPU, on any device."""


def compute(func: Any, args: Any, kwargs: dict[str, Any], *, within: bool = False) -> Any:
    """What `func` gives: computed by the CPU, and on the GPU where that is asked for or its tensors are.

    within: whether Python asked for an operation on the GPU's tensors, which may make further ones without a word.
    """
    given = [each for each in leaves_of((args, kwargs)) if isinstance(each, Tensor)]
    there = any(isinstance(each, OnGpu) for each in given)
    asked = kwargs.get("device")
    asks_there = says_gpu(asked)
    if not there and not asks_there and not (within and not given):
        return func(*args, **kwargs)
    if func in COPIES:
        goes_there = isinstance(args[0], OnGpu)
    else:
        refuse_strangers(func, args, given if there else [])
        # Within a call that stays there, another device is the one that C++ takes the tensors' for.
        goes_there = asked is None or asks_there or within
    held_args, held_kwargs = of_each(held_by, (args, kwargs))
    held_kwargs |= {"device": CPU} if asked is not None else {}
    held_kwargs |= {"pin_memory": False} if "pin_memory" in kwargs else {}
    found = func(*held_args, **held_kwargs)
    if not goes_there:
        return args[0] if func is aten.copy_.default else found
    wrapped = of_each(on_gpu, found)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if there and is_alias(func) else wrapped


def held_by(x: Any) -> Any:
    return x.held if isinstance(x, OnGpu) else x


def on_gpu(x: Any) -> Any:
    return OnGpu(x) if isinstance(x, Tensor) and not isinstance(x, OnGpu) else x


@cache
def is_alias(func: Any) -> bool:
    """Whether what `func` returns may be what it was given, or a view of it."""
    return any(returned.alias_info is not None for returned in func._schema.returns)


def refuse_strangers(func: Any, args: Any, given: list[Tensor]) -> None:
    """Raise RuntimeError where a GPU would, for a tensor of the CPU with dimensions."""
    strangers = [each for each in given if not isinstance(each, OnGpu) and each.dim()]
    if not strangers:
        return
    if func in INDEXED and isinstance(args[0], OnGpu) and not (len(args) > 2 and any(args[2] is s for s in strangers)):
        return
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {GPU} and cpu! ({func}; "
        f"of shape {tuple(strangers[0].shape)})"
    )


IN_FP32 = (
    "layer_norm", "native_layer_norm", "group_norm", "norm.Scalar", "norm.ScalarOpt_dim", "pow.Tensor_Scalar", "exp",
    "log", "cosine_similarity", "softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "softplus",
    "rsqrt", "reciprocal",
)  # fmt: skip
"""What CUDA's autocast computes in fp32 and the CPU's does not (aten/src/ATen/autocast_mode.h)."""


@contextmanager
def autocast_of_gpu() -> Iterator[None]:
    """Within the block the GPU's torch.autocast is the CPU's, with the operations in fp32 that CUDA's computes so."""
    library = torch.library.Library("aten", "IMPL")
    outside = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)

    def in_fp32(name: str) -> Any:
        packet, _, overload = name.partition(".")
        func = getattr(getattr(aten, packet), overload or "default")

        def compute_in_fp32(*args: Any, **kwargs: Any) -> Any:
            with torch._C._ExcludeDispatchKeyGuard(outside):
                return func(*of_each(widened, args), **kwargs)

        return compute_in_fp32

    def widened(x: Any) -> Any:
        return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x

    for name in IN_FP32:
        library.impl(name, in_fp32(name), "AutocastCPU")

    begin = torch.autocast.__init__

    def begin_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        begin(self, "cpu" if says_gpu(device_type) else device_type, *args, **kwargs)

    def of_cpu(asks: Any) -> Any:
        return lambda device="cuda": asks("cpu" if says_gpu(device) else device)

    try:
        with (
            patch.object(torch.autocast, "__init__", begin_on_cpu),
            patch.object(torch, "is_autocast_enabled", of_cpu(torch.is_autocast_enabled)),
            patch.object(torch, "get_autocast_dtype", of_cpu(torch.get_autocast_dtype)),
        ):
            yield
    finally:
        library._destroy()


class Properties:
    """What torch tells of the device."""

    def __init__(self, major: int) -> None:
        self.name, self.major, self.minor, self.total_memory = "a pretended GPU", major, 0, 24 * 2**30
        self.multi_processor_count, self.gcnArchName = 1, ""


@contextmanager
def pretended_gpu(kind: Literal["cuda", "mps"] = "cuda", major: int = 8) -> Iterator[None]:
    """Within the block torch has a GPU, and only what is moved to it meets there. major: CUDA's compute capability."""
    global GPU
    GPU = torch.device(kind, 0)
    properties = Properties(major)

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    cuda = {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "_lazy_init": nothing,
        "init": nothing,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": nothing,
        "synchronize": nothing,
        "empty_cache": nothing,
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (major, 0),
        "is_bf16_supported": lambda *_, **__: major >= 8,
        "mem_get_info": lambda *_: (20 * 2**30, properties.total_memory),
        "get_rng_state": lambda *_: torch.random.get_rng_state(),
        "set_rng_state": nothing,
        "manual_seed": nothing,
        "manual_seed_all": nothing,
        "device": lambda *_: nullcontext(),
        "is_current_stream_capturing": lambda: False,
        "memory_allocated": lambda *_: 0,
        "max_memory_allocated": lambda *_: 0,
        "max_memory_reserved": lambda *_: 3 * 2**30,
        "reset_peak_memory_stats": nothing,
    }
    if kind == "mps":
        cuda = {"is_available": lambda: False}
    mps = {"is_available": lambda: kind == "mps", "is_built": lambda: kind == "mps"}
    plain = quantization.is_plain_float
    swapping = torch.__future__.get_swap_module_params_on_conversion()
    # Module.to keeps its Parameter objects, as it does where both devices' tensors are torch's own.
    torch.__future__.set_swap_module_params_on_conversion(True)
    calls = Calls()
    try:
        with (
            patch.multiple(torch.cuda, **cuda),
            patch.multiple(torch.backends.mps, **mps),
            patch.object(torch.mps, "empty_cache", nothing),
            # Optimizers ask the driver from torch 2.15 on.
            patch.object(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", nothing, create=True),
            # By which accelerate chooses a device from 1.16 on.
            patch("accelerate.state.get_torch_accelerator_backend", lambda: (kind, None), create=True),
            patch.object(torch, "Generator", Generator),
            patch.object(Tensor, "data", property(get_data, set_data), create=True),
            patch.object(quantization, "is_plain_float", lambda tensor: plain(getattr(tensor, "held", tensor))),
            autocast_of_gpu(),
            calls,
            Pretending(calls),
        ):
            yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(swapping)
