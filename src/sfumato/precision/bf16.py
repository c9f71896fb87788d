"""Which devices multiply bf16 in hardware. What emulates it takes longer than for fp32."""

from __future__ import annotations

import torch

from sfumato.precision import products


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes bf16 in hardware, a CPU set aside; old GPUs emulate it, more slowly than fp32."""
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
    return cpu_has_bf16() if device.type == "cpu" else has_bf16(device)
