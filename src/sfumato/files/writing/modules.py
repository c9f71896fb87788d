"""Files of adapters that change no weight: `PART.PATH.ROLE`, with the names that the model's modules have.

No other program has names for them, so there is one grammar for every kind: a tensor's name is its part, the path of
the module that it stands beside, and its role, such as `unet.mid_block.attentions.0.transformer_blocks.0.attn2.prefix`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.files.fingerprint import FINGERPRINT_KEY, fingerprint_with_weights
from sfumato.files.header import checked_path
from sfumato.files.kinds.modules import ModuleAdapter
from sfumato.files.module_names import Target
from sfumato.files.save import cast, write_hashed
from sfumato.files.writing.embedding import bundled_tensors
from sfumato.utils.formatting import format_number


def write_modules(
    path: str | os.PathLike[str],
    adapters: Mapping[Target, ModuleAdapter],
    *,
    network: Mapping[str, str],
    metadata: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    words: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write the adapters, complete or not at all; equal content gives equal bytes.

    network: of `module_metadata`. metadata, dtype, words: as of `sfumato.files.write_lora`. Raises FileError for values
    that the file cannot hold.
    """
    path = checked_path(path)
    tensors: dict[str, Tensor] = {}
    for (part, place), adapter in adapters.items():
        for role, value in adapter.tensors().items():
            key = f"{part}.{place}.{role}"
            tensors[key] = cast(value, dtype, key, path)
    tensors |= bundled_tensors(path, words or {})
    return write_hashed(path, tensors, {**metadata, **network, FINGERPRINT_KEY: fingerprint_with_weights(adapters, {})})


def module_metadata(algo: str, *, rank: int, alpha: float) -> dict[str, str]:
    """What a file says of how its adapters were made, by kohya's keys. algo: what `--algo` calls the kind."""
    return {
        "ss_network_module": "sfumato.adapters",
        "ss_network_dim": str(rank),
        "ss_network_alpha": format_number(alpha),
        "ss_network_args": json.dumps({"algo": algo}, separators=(",", ":")),
    }
