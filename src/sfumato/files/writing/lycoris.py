"""LoHa, LoKr and DoRA files in LyCORIS's grammar: kohya's names, each kind's own tensors, and how it was made.

ComfyUI, A1111 and Forge read all of it; LyCORIS does without magnitudes, and InvokeAI all but magnitudes of a LoHa or
LoKr and an SD 1.x or 2.x LoKr whose large factors are products. diffusers and sd-scripts do not: a LoRA without
magnitudes is for all, and `write_lora` writes it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.fingerprint import FINGERPRINT_KEY, fingerprint_with_weights
from sfumato.files.header import checked_path
from sfumato.files.kinds import Change, LoraModule, ModuleAdapter
from sfumato.files.kinds.dora import Dora
from sfumato.files.kinds.lokr import Loha, Lokr
from sfumato.files.kinds.oft import OutputOft
from sfumato.files.module_names import Target, file_names
from sfumato.files.save import cast, write_hashed
from sfumato.files.writing.embedding import bundled_tensors
from sfumato.files.writing.kohya import down_and_up, rebalance_for_fp16, write_lora
from sfumato.files.writing.modules import write_modules
from sfumato.utils.formatting import format_number
from sfumato.utils.text_files import parse_json_object


def write_adapter(
    path: str | os.PathLike[str],
    changes: Mapping[Target, Change],
    weights: Mapping[Target, Tensor],
    *,
    network: Mapping[str, str],
    args: Mapping[str, str] = MappingProxyType({}),
    metadata: Mapping[str, str] = MappingProxyType({}),
    **written_as: Any,
) -> Path:
    """Write changes of any kind: LoRAs by `write_lora`, kinds that change no weight by `write_modules`, others by
    `write_lycoris`; written_as is of all.

    args: what the metadata tell of the network besides, as sd-scripts tells its --network_args.
    """
    metadata, network = (_merge_network_args(told, args) for told in (metadata, network))
    modules = {target: change for target, change in changes.items() if isinstance(change, LoraModule)}
    if len(modules) == len(changes):
        return write_lora(path, modules, metadata=metadata, **written_as)
    beside = {target: change for target, change in changes.items() if isinstance(change, ModuleAdapter)}
    if len(beside) == len(changes):
        del written_as["family"]  # which no name in such a file depends on
        return write_modules(path, beside, network=network, metadata=metadata, **written_as)
    return write_lycoris(path, changes, weights, network=network, metadata=metadata, **written_as)


def _merge_network_args(told: Mapping[str, str], args: Mapping[str, str]) -> Mapping[str, str]:
    """Metadata with these beside their own arguments of the network."""
    if not args:
        return told
    own = parse_json_object(told.get("ss_network_args", "{}"))
    return {**told, "ss_network_args": json.dumps(own | dict(args), separators=(",", ":"))}


def write_lycoris(
    path: str | os.PathLike[str],
    changes: Mapping[Target, Change],
    weights: Mapping[Target, Tensor],
    *,
    family: str,
    network: Mapping[str, str],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    words: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write LoHa, LoKr, LoRA and DoRA of each; whole or not at all. The rest as of `write_lora`.

    weights: that were changed, on which the fingerprint of a DoRA depends. network: of `network_metadata`.
    """
    path = checked_path(path)
    tensors: dict[str, Tensor] = {}
    for target, name in file_names(family, changes, path.name).items():
        for suffix, value in _tensors(changes[target], dtype, weights[target]).items():
            key = f"{name}.{suffix}"
            tensors[key] = cast(value, torch.float32 if suffix in _IN_FP32 else dtype, key, path)
    tensors |= bundled_tensors(path, words or {})
    described = {**(metadata or {}), **network, FINGERPRINT_KEY: fingerprint_with_weights(changes, weights)}
    return write_hashed(path, tensors, described)


_IN_FP32 = ("alpha", "dora_scale")
"""Whatever the file's dtype is. A magnitude's rounding is multiplied with the whole weight, of which an adapter's
change is perhaps a hundredth: in bf16 it would be as large as that."""


def _tensors(change: Change, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    if type(change) not in _TENSORS:
        raise AdapterError(f"{change.kind} is not written; bake it (sfumato convert FILE --bake lora).")
    return _TENSORS[type(change)](change, dtype, weight)


def _of_lora(change: LoraModule, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    change = change.plain()
    down, up = down_and_up(change, dtype)
    return {"lora_down.weight": down, "lora_up.weight": up, "alpha": torch.tensor(change.alpha)}


def _of_loha(change: Loha, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for n, (a, b) in enumerate((change.first, change.second), start=1):
        b, a = rebalance_for_fp16(b, a, dtype)
        found |= {f"hada_w{n}_a": a, f"hada_w{n}_b": b}
    return {**found, "alpha": torch.tensor(change.scale * len(b))}


def _of_lokr(change: Lokr, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    first, second = change.first.whole, change.second
    assert first is not None
    if second.whole is not None:  # of two whole factors nobody reads the alpha, and LyCORIS wants one
        first, whole = rebalance_for_fp16(first, second.whole, dtype)
        return {"lokr_w1": first, "lokr_w2": whole, "alpha": torch.tensor(1.0)}
    assert second.left is not None
    assert second.right is not None
    left, right = rebalance_for_fp16(second.left, second.right, dtype)
    return {"lokr_w1": first, "lokr_w2_a": left, "lokr_w2_b": right, "alpha": torch.tensor(change.scale * len(right))}


def _of_oft(change: OutputOft, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    return {"oft_blocks": change.blocks, "alpha": torch.tensor(change.alpha or 0.0)}


def _of_dora(change: Dora, dtype: torch.dtype, weight: Tensor) -> dict[str, Tensor]:
    magnitude = change.magnitude.reshape(1, -1) if change.on_input else change.magnitude.reshape(-1, 1)
    scale = magnitude.reshape(*magnitude.shape, *(1,) * (weight.ndim - 2))
    return {**_tensors(change.inner, dtype, weight), "dora_scale": scale}


_TENSORS: Mapping[type, Callable[[Any, torch.dtype, Tensor], dict[str, Tensor]]] = MappingProxyType(
    {LoraModule: _of_lora, Loha: _of_loha, Lokr: _of_lokr, OutputOft: _of_oft, Dora: _of_dora}
)
"""What a file calls the tensors of a kind, after the module's name: by suffix."""


def network_metadata(
    algo: str,
    *,
    rank: int,
    alpha: float,
    conv: tuple[int, float] | None,
    factor: int | None,
    dora: bool,
    rank_stabilised: bool,
) -> dict[str, str]:
    """What sd-scripts writes of a network of LyCORIS's: its module, rank, alpha and --network_args.

    conv: rank and alpha of convolutions of more than 1x1, where they are others. A file of plain LoRAs has none of it.
    """
    args = {"algo": "diag-oft" if algo == "oft" else algo}
    args |= {} if conv is None else {"conv_dim": str(conv[0]), "conv_alpha": format_number(conv[1])}
    args |= {} if factor is None else {"factor": str(factor)}
    args |= {"dora_wd": "True", "wd_on_output": "False"} if dora else {}
    args |= {"rs_lora": "True"} if rank_stabilised else {}
    return {
        "ss_network_module": "lycoris.kohya",
        "ss_network_dim": str(rank),
        "ss_network_alpha": format_number(alpha),
        "ss_network_args": json.dumps(args, separators=(",", ":")),
    }
