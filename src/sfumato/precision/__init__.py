"""Which dtype each part is stored and computed in, on which device, with which attention, and why.

`decide` decides once and gives its reasons; nothing else in the package knows about dtypes. Trainable weights are
always fp32: AdamW's updates at a learning rate of 1e-4 are below half a unit in the last place of most bf16 weights,
and would be lost.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import re
import shutil
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from sfumato.errors import PrecisionError
from sfumato.precision import layer_norms, products

if TYPE_CHECKING:
    from sfumato.precision.offload import Offload

Requested = Literal["auto", "fp32", "fp16", "bf16"]
Attention = Literal["sdpa", "xformers"]
Part = Literal["unet", "text", "vae"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
"""The dtypes to compute and write weights in, by their names in options."""
OPTIMIZERS_8BIT = frozenset({"adamw8bit"})
"""Optimizers that keep their state in 8 bits, by their names in a config."""
BITSANDBYTES_ON_CPU = (0, 50)
"""The first version of bitsandbytes whose optimizers run on a CPU."""


@dataclass(frozen=True)
class Precision:
    """The device and the number formats for one process. Made by `decide`.

    storage: dtype in which frozen weights of the U-Net and the text encoders are stored. compute: dtype of their matrix
    products. vae: dtype of the VAE, stored and computed. offload: where parts wait for their turn on the device; None
    if all are on it. reasons: one sentence for each row of `table`.
    """

    device: torch.device
    storage: torch.dtype
    compute: torch.dtype
    vae: torch.dtype
    attention: Attention
    tf32: bool
    products: str
    channels_last: bool
    gradient_checkpointing: bool
    optimizer_state: str
    reasons: Mapping[str, str]
    offload: Offload | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, decision, reason) for each part of the decision."""
        onoff = {True: "on", False: "off"}
        decided = {
            "device": str(self.device),
            "frozen weights": NAMES[self.storage],
            "compute": NAMES[self.compute],
            "VAE": NAMES[self.vae],
            "trained weights": "fp32",
            "optimizer state": self.optimizer_state,
            "attention": self.attention,
            "TF32": onoff[self.tf32],
            "fp32 products": self.products,
            "channels last": onoff[self.channels_last],
            "checkpointing": onoff[self.gradient_checkpointing],
        }
        if self.offload is not None:
            decided["offload"] = "on"
        return [(what, value, self.reasons.get(what, "")) for what, value in decided.items()]

    def table(self) -> str:
        """The decision as a small table, one line a row, without a trailing newline."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = (f"{what:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for what, value, reason in rows)
        return "\n".join(line.rstrip() for line in lines)

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which frozen and trained weights are computed together; nothing at all in fp32."""
        if self.compute == torch.float32:
            return nullcontext()
        # Its cache holds the cast of every fp32 weight that learns until the context ends. That spares adapters some
        # casts, and of a whole model it is a second one.
        is_cached = self.storage == self.compute
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=self.compute, cache_enabled=is_cached
        )
        return context

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler. It does nothing unless fp16 gradients would underflow without it."""
        return torch.amp.GradScaler(self.device.type, enabled=self.compute == torch.float16)

    def dtype(self, part: Part) -> torch.dtype:
        """The dtype in which the weights of a frozen part are stored."""
        return self.vae if part == "vae" else self.storage

    def place(self, module: ModuleT, part: Part = "unet") -> ModuleT:
        """The same module: frozen, in evaluation mode, in the part's dtype and memory format.

        It is on the device or, with `offload`, in main memory until its turn.
        """
        module.requires_grad_(False).eval()
        if self.channels_last and part != "text":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Not `module.to`: diffusers overrides it to warn of modules kept in fp32, of which these models have none.
        nn.Module.to(module, "cpu" if self.offload else self.device, self.dtype(part))
        if self.offload is not None:
            self.offload.add(module)
        if part == "unet" and self.gradient_checkpointing:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        if part != "text" and self.attention == "xformers":
            module.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        if self.device.type == "cpu":
            products.quicken(module)
            layer_norms.sum_in_fp32(module)
        return module

    def prepare_for_training(self, module: nn.Module) -> None:
        """Prepare a U-Net or text encoder for training: on a CPU in bf16 it gets attention with a faster backward pass.

        In fp32 torch's own attention is as fast (`bench/cpu_training.py`), and stays.
        """
        if self.device.type == "cpu":
            layer_norms.sum_in_fp32(module)
        if self.device.type == "cpu" and self.compute == torch.bfloat16 and self.attention == "sdpa":
            from sfumato.precision.attention import learn_on_cpu

            learn_on_cpu(module)

    def compiled(self, module: nn.Module) -> Callable[..., Any]:
        """The module compiled by `torch.compile`; it shares the module's weights.

        On a CPU in bf16 the module's memory layouts are kept. With the layouts that torch 2.13 chooses, gradients are
        zero everywhere below the last nearest-neighbour upsampling that a concatenation and a SiLU follow, as in every
        U-Net.
        """
        keeps_layouts = self.device.type == "cpu" and self.compute == torch.bfloat16
        return torch.compile(module, options={"layout_optimization": False} if keeps_layouts else None)

    def apply(self) -> None:
        """Set the switches of the whole process: TF32 on CUDA; on a CPU, keep freed memory for the next tensor."""
        if self.device.type == "cuda":
            if self.device.index is not None:  # else what asks for "cuda" opens the first one, too
                torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        if self.device.type == "cpu":
            _keep_freed_memory()


def _keep_freed_memory() -> None:
    """Tell glibc to keep freed memory: tensors come and go with each step, and fresh pages cost time.

    Arrays over 32 MB, the most that glibc allows, still go back to the system at once. Without glibc nothing happens.
    """
    mallopt = _of_glibc("mallopt")
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 32 * 2**20)


def give_back_freed_memory() -> None:
    """Return to the system the freed memory that `apply` and the GPU's allocator keep. For when a part of a model is
    released."""
    malloc_trim = _of_glibc("malloc_trim")
    if malloc_trim is not None:
        malloc_trim(0)
    cuda: Any = torch.cuda
    if cuda.is_initialized():
        torch.cuda.empty_cache()
    if torch.backends.mps.is_available():
        torch.mps.empty_cache()


def _of_glibc(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def decide(
    requested: Requested = "auto",
    *,
    device: str | torch.device = "auto",
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    adapting: bool = False,
    offload: bool = False,
) -> Precision:
    """Decide on the precision for this machine.

    requested: `--precision`. device: `auto` takes CUDA, then MPS, then the CPU. optimizer: its name; the optimizer's
    state depends on it. adapting: whether something small is trained beside frozen weights; many CPUs do this faster in
    bf16. offload: `--offload`, the parts of a base model take turns on a GPU. Raises PrecisionError, one line, for what
    this machine cannot do.
    """
    if requested not in ("auto", *DTYPES):
        raise PrecisionError(f"--precision {requested}: unknown; wanted auto, fp32, fp16 or bf16.")
    reasons: dict[str, str] = {"trained weights": "bf16 would lose most of the optimizer's small updates"}
    place, reasons["device"] = _device(device)
    compute, reasons["compute"] = _compute(requested, place, adapting)
    storage, reasons["frozen weights"] = _storage(compute, place, adapting)
    vae, reasons["VAE"] = _vae(compute, place)
    reasons["attention"] = _check_attention(attention, place, compute)
    state, reasons["optimizer state"] = _optimizer_state(optimizer, place)
    tf32, reasons["TF32"] = _tf32(requested, place)
    by, reasons["fp32 products"] = _products(place)
    channels_last = place.type == "cuda" and compute != torch.float32
    reasons["channels last"] = _channels_last_reason(channels_last, place)
    reasons["checkpointing"] = "asked for: less memory, more time" if gradient_checkpointing else "not asked for"
    if offload:
        reasons["offload"] = "asked for: each part is on the GPU only while it computes"
    return Precision(
        device=place,
        storage=storage,
        compute=compute,
        vae=vae,
        attention=attention,
        tf32=tf32,
        products=by,
        channels_last=channels_last,
        gradient_checkpointing=gradient_checkpointing,
        optimizer_state=state,
        reasons=reasons,
        offload=_offload(place) if offload else None,
    )


def forecast_precision(requested: Requested, kind: Literal["gpu", "cpu"], *, adapting: bool) -> Precision:
    """What `decide` would choose for weights and products on a device of this kind. The result has the CPU as its
    device, so that no GPU is needed: for programs that only count bytes."""
    here = decide("fp32", device="cpu")
    there = torch.device("cuda" if kind == "gpu" else "cpu")
    if kind == "gpu":
        compute = DTYPES["bf16" if requested == "auto" else requested]
    else:
        compute, _ = _compute(requested, there, adapting)
    return replace(here, compute=compute, storage=_storage(compute, there, adapting)[0], vae=_vae(compute, there)[0])


def _device(wanted: str | torch.device) -> tuple[torch.device, str]:
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"found {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "found an Apple GPU, no CUDA"
        return torch.device("cpu"), f"found neither CUDA nor MPS{_unused_gpu()}"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise PrecisionError(f"--device {wanted}: unknown; wanted auto, cuda, cuda:0, mps or cpu.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PrecisionError(
            f"--device cuda: torch finds no CUDA device{_unused_gpu()}. Install a CUDA build of torch, or use cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PrecisionError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PrecisionError("--device mps: this machine has no Apple GPU that torch can use. Use cpu.")
    if device.type not in ("cuda", "mps", "cpu"):
        raise PrecisionError(f"--device {device}: not supported; wanted auto, cuda, mps or cpu.")
    return device, "asked for"


def _unused_gpu() -> str:
    """What to add where torch finds no GPU and there is an NVIDIA driver; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    if torch.version.cuda is None:
        return ", though an NVIDIA driver is installed: this torch is a build without CUDA"
    return f", though an NVIDIA driver is installed: torch for CUDA {torch.version.cuda} may want a newer one"


def _has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware; old GPUs emulate it, more slowly than fp32."""
    if device.type != "cuda":
        return True
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def cpu_has_bf16() -> bool:
    """Whether this is an x86 processor that multiplies bf16 in hardware. Others emulate it, more slowly than fp32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(products.processor().split())


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on the device: in hardware, not emulated, which is many times slower."""
    if device.type == "mps":  # where it was never measured
        return False
    return cpu_has_bf16() if device.type == "cpu" else _has_bf16(device)


def _compute(requested: Requested, device: torch.device, adapting: bool) -> tuple[torch.dtype, str]:
    if requested == "auto":
        if device.type == "cpu" and adapting and cpu_has_bf16():
            return torch.bfloat16, "this CPU multiplies bf16: a step takes two thirds of the time that fp32 takes"
        if device.type == "cpu":
            where = "where an adapter is trained" if cpu_has_bf16() else "on CPUs built for it"
            return torch.float32, f"exact; bf16 gains only {where}"
        if device.type == "mps":
            return torch.float32, "on MPS: fp16 and bf16 were never measured here; ask for them to try"
        if _has_bf16(device):
            return torch.bfloat16, "this GPU has bf16, which needs no loss scaling"
        return torch.float16, "this GPU has no bf16; the loss is scaled"
    if requested == "fp16" and device.type == "cpu":
        raise PrecisionError("--precision fp16: is for GPUs. On a CPU use auto, fp32 or bf16.")
    if requested == "bf16" and not _has_bf16(device):
        raise PrecisionError("--precision bf16: this GPU has none (it takes compute capability 8.0). Use auto or fp16.")
    return DTYPES[requested], "asked for"


def _storage(compute: torch.dtype, device: torch.device, adapting: bool) -> tuple[torch.dtype, str]:
    if device.type == "cpu" and compute != torch.float32 and not adapting:
        return torch.float32, "cast for each product; exact weights to merge into"
    if compute == torch.float32:
        return compute, "as computed"
    return compute, "as computed: half the memory of fp32, and frozen weights are never updated"


def _vae(compute: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    if compute == torch.float32 or device.type == "cpu":
        return torch.float32, "runs once an image, so exactness is cheap"
    if compute == torch.bfloat16:
        return torch.bfloat16, "has fp32's range; SDXL's VAE overflows in fp16"
    return torch.float32, "SDXL's VAE overflows in fp16"


def _check_attention(attention: str, device: torch.device, compute: torch.dtype) -> str:
    """The reason; raises PrecisionError where the attention cannot be had."""
    if attention == "sdpa":
        is_slow = (
            device.type == "cpu" and compute == torch.bfloat16
        )  # backward, so `learn_on_cpu` gives it plain products
        return "part of torch; plain products where gradients are wanted" if is_slow else "part of torch"
    if attention != "xformers":
        raise PrecisionError(f"--attention {attention}: unknown; wanted sdpa or xformers.")
    if importlib.util.find_spec("xformers") is None:
        raise PrecisionError(
            '--attention xformers: the package is not installed. Run `pip install "sfumato[xformers]"`, or use sdpa, '
            "which needs nothing."
        )
    if device.type != "cuda":
        raise PrecisionError(f"--attention xformers: needs a CUDA device, this one is {device.type}. Use sdpa.")
    return "asked for"


def _offload(device: torch.device) -> Offload:
    """Raises PrecisionError where a device has no memory of its own."""
    from sfumato.precision.offload import Offload

    if device.type != "cuda":
        where = "an Apple GPU has" if device.type == "mps" else "a CPU has"
        raise PrecisionError(f"--offload: keeps a GPU's own memory free, and {where} none. Leave it out.")
    return Offload(device)


def _optimizer_state(optimizer: str, device: torch.device) -> tuple[str, str]:
    if optimizer not in OPTIMIZERS_8BIT:
        return "fp32", "as the trained weights"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise PrecisionError(
            f'--optimizer {optimizer}: needs bitsandbytes, which is not installed. Run `pip install "sfumato[8bit]"`, '
            "or use adamw."
        )
    if device.type not in ("cuda", "cpu"):
        raise PrecisionError(
            f"--optimizer {optimizer}: needs a CUDA device or a CPU, this one is {device.type}. Use adamw."
        )
    if device.type == "cpu":
        found = importlib.metadata.version("bitsandbytes")
        if tuple(int(number) for number in re.findall(r"\d+", found)[:2]) < BITSANDBYTES_ON_CPU:
            raise PrecisionError(
                f"--optimizer {optimizer}: bitsandbytes {found} steps on CUDA alone. Run `pip install "
                "'bitsandbytes>=0.50'`, which does on a CPU, too, or use adamw."
            )
        return "8 bit", f"{optimizer} was named: a quarter of the memory, and on a CPU many times the time"
    return "8 bit", f"{optimizer} was named"


def _tf32(requested: Requested, device: torch.device) -> tuple[bool, str]:
    if device.type != "cuda":
        return False, "only CUDA has it"
    if torch.version.hip is not None or torch.cuda.get_device_properties(device).major < 8:
        return False, "this GPU does not have it"
    if requested == "fp32":
        return False, "fp32 was asked for, and TF32 keeps 10 of its 23 bits"
    return True, "for what stays in fp32 beside autocast"


def _products(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu" and products.mkl_is_slow() and products.onednn() is not None:
        return "oneDNN", "MKL leaves this AMD processor's AVX-512 unused, and takes twice the time"
    return "torch", "torch's own choice"


def _channels_last_reason(used: bool, device: torch.device) -> str:
    if used:
        return "half-precision convolutions run on tensor cores in this layout"
    return "only gains with half precision" if device.type == "cuda" else "no gain measured on a CPU"
