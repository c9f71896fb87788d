"""The number formats by their names in options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch

Requested = Literal["auto", "fp32", "fp16", "bf16"]
"""What --precision takes."""
NAMES: Mapping[torch.dtype, str] = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
DTYPES: Mapping[str, torch.dtype] = {name: dtype for dtype, name in NAMES.items()}
"""The dtypes to compute and write weights in."""
