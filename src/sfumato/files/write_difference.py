"""Full differences in LyCORIS' names (`.diff`, `.diff_b`): any kind of adapter, or what a training changed, exactly, at
the size of its weights.

Normalisations have these names, too: A1111 reads LyCORIS' own for them, `.w_norm` and `.b_norm`, in pairs alone.

ComfyUI, A1111/Forge and InvokeAI read them; diffusers, peft and sd-scripts do not.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from sfumato.files.fingerprint import FINGERPRINT_KEY, Row, fingerprint_of, probe_rows
from sfumato.files.header import path_of
from sfumato.files.kohya import Target, kohya_names
from sfumato.files.save import cast, check_metadata, write_streamed


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
    path = path_of(path)
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
        FINGERPRINT_KEY: fingerprint_of(found),
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
