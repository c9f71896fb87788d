"""Full differences in kohya's names (`.diff`, `.diff_b`): any kind of adapter exactly, at the size of its weights.

ComfyUI, A1111/Forge and InvokeAI read them; diffusers, peft and sd-scripts do not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.fingerprint import KEY, fingerprint
from sfumato.files.kohya import Target, kohya_name
from sfumato.files.save import hashes, write_tensors
from sfumato.files.write import cast, check_metadata


def write_difference(
    path: str | os.PathLike[str],
    deltas: Mapping[Target, tuple[Tensor, Tensor | None]],
    *,
    family: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write (delta of the weight, delta of the bias or None) for each module, in their shapes; else as `write_lora`."""
    path = Path(path)
    if not deltas:
        raise AdapterError(f"{path.name}: there are no modules to write; the adapter is attached to nothing.")
    tensors: dict[str, Tensor] = {}
    for target, (weight, bias) in deltas.items():
        name = kohya_name(family, *target)
        if f"{name}.diff" in tensors:
            raise AdapterError(f"{path.name}: two modules are both called {name} in the file; give each module once.")
        tensors[f"{name}.diff"] = cast(weight, dtype, f"{name}.diff", path)
        if bias is not None:
            tensors[f"{name}.diff_b"] = cast(bias, dtype, f"{name}.diff_b", path)
    described = {
        **(metadata or {}),
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo":"full"}',
        KEY: fingerprint({target: weight for target, (weight, _) in deltas.items() if weight.ndim > 1}),
    }
    described.update(hashes(tensors, described))
    check_metadata(described, path)
    return write_tensors(path, tensors, described)
