"""The single choices of a decision on precision, each with its reason, as its table gives it.

Each raises PrecisionError, one line, for what this machine cannot do.

Which devices multiply bf16 in hardware. What emulates it takes longer than for fp32.

The number formats by their names in options.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import shutil
from collections.abc import Mapping
from typing import Literal

import torch

from sfumato.errors import PrecisionError
from sfumato.precision import cpu_matmul


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware, a CPU set aside; old GPUs emulate it, more slowly than fp32."""
    if device.type != "cuda":
        return True
    return torch.version.hip is not None or torch.cuda.get_device_properties(device).major >= 8


def cpu_has_bf16() -> bool:
    """Whether this is an x86 processor that multiplies bf16 in hardware. Others emulate it, more slowly than fp32."""
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_matmul.processor().split())


def multiplies_bf16(device: torch.device) -> bool:
    """Whether bf16 is faster than fp32 on the device: in hardware, not emulated, which is many times slower."""
    if device.type == "mps":  # where it was never measured
        return False
    return cpu_has_bf16() if device.type == "cpu" else has_bf16(device)


Requested = Literal["auto", "fp32", "fp16", "bf16"]
"""What --precision takes."""
NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
"""The dtypes to compute and write weights in."""


OPTIMIZERS_8BIT = frozenset({"adamw8bit"})
"""Optimizers that keep their state in 8 bits, by their names in a config."""
BITSANDBYTES_ON_CPU = (0, 50)
"""The first version of bitsandbytes whose optimizers run on a CPU."""


def choose_device(wanted: str | torch.device) -> tuple[torch.device, str]:
    """The device, of auto the first there is of CUDA, MPS and the CPU."""
    if wanted == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda"), f"found {torch.cuda.get_device_name()}"
        if torch.backends.mps.is_available():
            return torch.device("mps"), "found an Apple GPU, no CUDA"
        return torch.device("cpu"), f"found neither CUDA nor MPS{_unused_gpu_hint()}"
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise PrecisionError(f"--device {wanted}: unknown; wanted auto, cuda, cuda:0, mps or cpu.") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PrecisionError(
            f"--device cuda: torch finds no CUDA device{_unused_gpu_hint()}. Install a CUDA build of torch, or use cpu."
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise PrecisionError(f"--device {device}: there are {torch.cuda.device_count()} CUDA devices, counted from 0.")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise PrecisionError("--device mps: this machine has no Apple GPU that torch can use. Use cpu.")
    if device.type not in ("cuda", "mps", "cpu"):
        raise PrecisionError(f"--device {device}: not supported; wanted auto, cuda, mps or cpu.")
    return device, "asked for"


def _unused_gpu_hint() -> str:
    """What to add where torch finds no GPU and there is an NVIDIA driver; empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ""
    if torch.version.cuda is None:
        return ", though an NVIDIA driver is installed: this torch is a build without CUDA"
    return f", though an NVIDIA driver is installed: torch for CUDA {torch.version.cuda} may want a newer one"


def choose_compute_dtype(requested: Requested, device: torch.device, adapting: bool) -> tuple[torch.dtype, str]:
    """The dtype of products. adapting: whether the base is frozen, and an adapter is trained beside it."""
    if requested == "auto":
        if device.type == "cpu" and adapting and cpu_has_bf16():
            return torch.bfloat16, "this CPU multiplies bf16: a step takes two thirds of the time that fp32 takes"
        if device.type == "cpu":
            where = "where an adapter is trained" if cpu_has_bf16() else "on CPUs built for it"
            return torch.float32, f"exact; bf16 gains only {where}"
        if device.type == "mps":
            return torch.float32, "on MPS: fp16 and bf16 were never measured here; ask for them to try"
        if has_bf16(device):
            return torch.bfloat16, "this GPU has bf16, which needs no loss scaling"
        if "GTX 16" in torch.cuda.get_device_name(device):
            return torch.float32, "this GPU's fp16 convolutions give NaN (pytorch #58123); ask for fp16 to try"
        return torch.float16, "this GPU has no bf16; the loss is scaled"
    if requested == "fp16" and device.type == "cpu":
        raise PrecisionError("--precision fp16: is for GPUs. On a CPU use auto, fp32 or bf16.")
    if requested == "bf16" and not has_bf16(device):
        raise PrecisionError("--precision bf16: this GPU has none (it takes compute capability 8.0). Use auto or fp16.")
    return DTYPES[requested], "asked for"


def choose_storage_dtype(compute: torch.dtype, device: torch.device, adapting: bool) -> tuple[torch.dtype, str]:
    """The dtype that frozen weights are kept in."""
    if device.type == "cpu" and compute != torch.float32 and not adapting:
        return torch.float32, "cast for each product; exact weights to merge into"
    if compute == torch.float32:
        return compute, "as computed"
    return compute, "as computed: half the memory of fp32, and frozen weights are never updated"


def choose_vae_dtype(compute: torch.dtype, device: torch.device) -> tuple[torch.dtype, str]:
    """The dtype that the VAE is kept in and computes in."""
    if compute == torch.float32 or device.type == "cpu":
        return torch.float32, "runs once an image, so exactness is cheap"
    if compute == torch.bfloat16:
        return torch.bfloat16, "has fp32's range; SDXL's VAE overflows in fp16"
    return torch.float32, "SDXL's VAE overflows in fp16"


def attention_reason(attention: str, device: torch.device, compute: torch.dtype) -> str:
    """The reason; raises PrecisionError where the attention cannot be had."""
    if attention == "sdpa":
        # Whose way back is slow, so `learn_on_cpu` gives it plain products.
        is_slow = device.type == "cpu" and compute == torch.bfloat16
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


def optimizer_state_format(optimizer: str, device: torch.device) -> tuple[str, str]:
    """What the optimizer of this name keeps its state in, "fp32" or "8 bit"."""
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
                f"--optimizer {optimizer}: bitsandbytes {found} steps on CUDA alone. Run "
                '`pip install "bitsandbytes>=0.50"`, which does on a CPU, too, or use adamw.'
            )
        return "8 bit", f"{optimizer} was named: a quarter of the memory, and on a CPU many times the time"
    return "8 bit", f"{optimizer} was named"


def choose_tf32(requested: Requested, device: torch.device) -> tuple[bool, str]:
    """Whether fp32 products may be rounded to TF32."""
    if device.type != "cuda":
        return False, "only CUDA has it"
    if torch.version.hip is not None or torch.cuda.get_device_properties(device).major < 8:
        return False, "this GPU does not have it"
    if requested == "fp32":
        return False, "fp32 was asked for, and TF32 keeps 10 of its 23 bits"
    return True, "for what stays in fp32 beside autocast"


def choose_matmul(device: torch.device) -> tuple[str, str]:
    """What multiplies fp32 matrices, "oneDNN" or "torch"."""
    if device.type == "cpu" and cpu_matmul.mkl_is_slow() and cpu_matmul.onednn() is not None:
        return "oneDNN", "MKL leaves this AMD processor's AVX-512 unused, and takes twice the time"
    return "torch", "torch's own choice"


def channels_last_reason(used: bool, device: torch.device) -> str:
    """Why convolutions have their channels last in memory, or not."""
    if used:
        return "half-precision convolutions run on tensor cores in this layout"
    return "only gains with half precision" if device.type == "cuda" else "no gain measured on a CPU"
