"""LoRA files in the one format that diffusers, ComfyUI, A1111/Forge, InvokeAI and sd-scripts all read completely.

It has kohya's names, and for every module lora_down, lora_up and alpha. The whole file has one alpha, because diffusers
scales every module by the file's most frequent one; any other scale is folded into lora_up.

Full differences in LyCORIS' names (`.diff`, `.diff_b`): any kind of adapter, or what a training changed, exactly, at
the size of its weights.

Normalisations have these names, too: A1111 reads LyCORIS' own for them, `.w_norm` and `.b_norm`, in pairs alone.

ComfyUI, A1111/Forge and InvokeAI read them; diffusers, peft and sd-scripts do not.
"""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.fingerprint import FINGERPRINT_KEY, Row, fingerprint, fingerprint_of_rows, probe_rows
from sfumato.files.header import checked_path
from sfumato.files.kinds import LoraModule
from sfumato.files.metadata import METADATA_LIMIT
from sfumato.files.module_names import Target, file_names, kohya_names
from sfumato.files.save import cast, check_metadata, write_hashed, write_streamed
from sfumato.files.writing.embedding import bundled_tensors
from sfumato.utils.formatting import format_number
from sfumato.utils.text_files import parse_json_object

_OF_THE_TENSORS, _OF_A_MODULE = 1_000, 22
"""Bytes of metadata that the writers add: hashes, rank and alpha at most; a row of the fingerprint in base64."""


def write_lora(
    path: str | os.PathLike[str],
    modules: Mapping[Target, LoraModule],
    *,
    family: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
    words: Mapping[str, Mapping[str, Tensor]] | None = None,
) -> Path:
    """Write `modules` as a LoRA for `family`, complete or not at all; equal content gives equal bytes.

    metadata: from `sfumato.files.metadata.describe`; rank, alpha, hashes and the fingerprint are computed from the
    tensors here. dtype: number format of down and up. The default fp32 is exact, so that another tool generates the
    same image. fp16 halves the file; this is worth it from SD 1.5 on. words: new words to bundle with it, by token, as
    for `write_embedding`; in fp32. Raises AdapterError for modules that other tools have no name for, and FileError for
    values that the file cannot hold.
    """
    path = checked_path(path)
    biased = [target for target, module in modules.items() if module.bias_delta is not None]
    if biased:
        raise AdapterError(
            f"{path.name}: {len(biased)} of {len(modules)} modules change a bias, first {'.'.join(biased[0])}, which "
            "this grammar cannot hold. Write them for diffusers or peft, or bake them into a checkpoint."
        )
    alpha, modules = unify_alpha({target: module.plain() for target, module in modules.items()})
    tensors: dict[str, Tensor] = {}
    for target, name in file_names(family, modules, path.name).items():
        for half, value in zip(("lora_down", "lora_up"), down_and_up(modules[target], dtype), strict=True):
            tensors[f"{name}.{half}.weight"] = cast(value, dtype, f"{name}.{half}", path)
        # fp32 whatever the dtype: a half would round sqrt(rank) and the like.
        tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    tensors |= bundled_tensors(path, words or {})
    described = {
        **(metadata or {}),
        FINGERPRINT_KEY: fingerprint(modules),  # of what was handed in, not of what `dtype` makes of it
        **_network(metadata or {}, modules, alpha),
        "ss_network_alpha": format_number(alpha),
    }
    return write_hashed(path, tensors, described)


def _network(metadata: Mapping[str, str], modules: Mapping[Target, LoraModule], alpha: float) -> dict[str, str]:
    """kohya's keys on the kind of network and its ranks; arguments of another kind, such as LyCORIS's algo, are not
    ours. Convolutions of more than 1x1 with a rank of their own are told as sd-scripts tells them."""
    kind = "networks.lora"
    same = metadata.get("ss_network_module", kind) == kind
    args = metadata.get("ss_network_args", "{}") if same else "{}"
    wide = {module.rank for module in modules.values() if math.prod(module.down.shape[2:]) > 1}
    others = {module.rank for module in modules.values() if math.prod(module.down.shape[2:]) == 1}
    ranks = wide | others
    if len(ranks) == 2 and len(wide) == len(others) == 1:
        ranks, conv = others, {"conv_dim": str(*wide), "conv_alpha": format_number(alpha)}
        args = json.dumps(parse_json_object(args) | conv, separators=(",", ":"))
    dim = str(*ranks) if len(ranks) == 1 else "Dynamic"
    return {"ss_network_module": kind, "ss_network_args": args, "ss_network_dim": dim}


def unify_alpha(modules: Mapping[Target, LoraModule]) -> tuple[float, dict[Target, LoraModule]]:
    """The modules with one alpha for all, and that alpha: the most frequent one, the smallest if several are.

    alpha_i / r * up_i = alpha / r * (alpha_i / alpha * up_i): for a module with another alpha the rest is folded into
    up; a module with this alpha is unchanged. Alphas are compared as fp32, as the file holds them.
    """
    rounded = {target: float(torch.tensor(module.alpha, dtype=torch.float32)) for target, module in modules.items()}
    counts = Counter(alpha for alpha in rounded.values() if alpha != 0)
    alpha = min(counts, key=lambda value: (-counts[value], value)) if counts else 1.0
    folded = {
        target: replace(module, alpha=alpha, up=module.up if own == alpha else module.up.float() * (own / alpha))
        for (target, module), own in zip(modules.items(), rounded.values(), strict=True)
    }
    return alpha, folded


def metadata_within_limit(metadata: Mapping[str, str], modules: int) -> tuple[dict[str, str], list[str]]:
    """The metadata without its largest texts, as many as make it fit beside what is computed from the tensors.

    modules: number of modules in the fingerprint. Returns also the keys left out: tags, data sets, thumbnails of other
    tools.
    """
    kept = {key: text for key, text in metadata.items() if key != FINGERPRINT_KEY}
    sizes = {key: len(key.encode()) + len(text.encode()) for key, text in kept.items()}
    excess = sum(sizes.values()) + _OF_THE_TENSORS + _OF_A_MODULE * modules - METADATA_LIMIT
    left_out: list[str] = []
    for key in sorted(sizes, key=lambda key: -sizes[key]):
        if excess <= 0:
            break
        del kept[key]
        left_out.append(key)
        excess -= sizes[key]
    return kept, left_out


def down_and_up(module: LoraModule, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(down, up) as files have them: up with as many axes as down, and both as `rebalance_for_fp16` leaves them."""
    up = module.up.reshape(*module.up.shape[:2], *(1,) * (module.down.ndim - 2))
    return rebalance_for_fp16(module.down, up, dtype)


def rebalance_for_fp16(down: Tensor, up: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two halves of an update, with a power of two moved from one to the other if fp16 would round one of them to
    nothing.

    B starts at zero: after a few steps its values may be 1e-6, and fp16 keeps only their first digit. The product stays
    the same.
    """
    sizes = [float(half.detach().float().square().mean().sqrt()) for half in (down, up)]
    tiny = torch.finfo(torch.float16).tiny
    if dtype != torch.float16 or not (0 < min(sizes) < tiny and max(sizes) < math.inf):
        return down, up
    shift = 2.0 ** round(math.log2(sizes[0] / sizes[1]) / 2)
    return down.float() / shift, up.float() * shift


def write_difference(
    path: str | os.PathLike[str],
    deltas: Mapping[Target, tuple[Tensor | None, Tensor | None]],
    *,
    family: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write (delta of the weight, delta of the bias) for each module, in their shapes; None for what stays. Else as
    `write_lora`.

    deltas: each is asked for twice and then let go, so that they may be taken when they are asked for.
    """
    path = checked_path(path)
    shapes: dict[str, Tensor] = {}
    places: dict[str, tuple[Target, int]] = {}
    found: dict[str, Row] = {}
    for target, name in kohya_names(family, deltas, path.name).items():
        weight, bias = deltas[target]
        for place, (suffix, delta) in enumerate((("diff", weight), ("diff_b", bias))):
            if delta is not None:
                key = f"{name}.{suffix}"
                written = cast(delta, dtype, key, path)
                places[key], shapes[key] = (target, place), written.to("meta")
                if delta.ndim > 1:
                    # Of what is written: a small change may be near the least that fp16 holds.
                    found |= probe_rows({target: written})
    described = {
        **(metadata or {}),
        "ss_network_module": "lycoris.kohya",
        "ss_network_args": '{"algo":"full"}',
        FINGERPRINT_KEY: fingerprint_of_rows(found),
    }
    for rank_of in ("ss_network_dim", "ss_network_alpha"):  # it has none
        described.pop(rank_of, None)
    check_metadata(described, path)
    at = lru_cache(maxsize=1)(deltas.__getitem__)  # a bias is written next to its weight

    def make(key: str) -> Tensor:
        target, place = places[key]
        delta = at(target)[place]
        assert delta is not None
        return cast(delta, dtype, key, path)

    return write_streamed(path, shapes, make, described)
