"""Nested state (an optimizer's, a module's) <-> named tensors and a JSON skeleton, exactly.

Checkpoints are safetensors and JSON and nothing else, so that reading one can run no code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import RunError
from sfumato.precision.tensors import dtype_name


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """The tensors of a tree of dicts, lists, tuples, numbers, texts and tensors, and the rest of it as JSON.

    A tensor's name is its path in the tree. Raises RunError for what neither format can hold.
    """
    tensors: dict[str, Tensor] = {}

    def visit(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            if node.numel() == 0:  # which a safetensors file of ours does not hold
                return {"empty": [list(node.shape), dtype_name(node.dtype)]}
            name = path
            while name in tensors:  # 1 and "1" are two keys of a dict and one path
                name += "'"
            tensors[name] = node.detach()
            return {"tensor": name}
        if isinstance(node, Mapping):
            return {"dict": [[visit(key, path), visit(value, f"{path}/{key}")] for key, value in node.items()]}
        if isinstance(node, list | tuple):
            kind = "list" if isinstance(node, list) else "tuple"
            return {kind: [visit(value, f"{path}/{place}") for place, value in enumerate(node)]}
        if node is None or isinstance(node, bool | int | float | str):
            return node
        raise RunError(f"{path or 'the state'} is a {type(node).__name__}, which a checkpoint cannot hold.")

    return tensors, visit(tree, "")


def unpack(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """The tree that `pack` took apart. Tensors are copies: a checkpoint's file may be pruned while they live."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        return tensors[content].clone()
    if kind == "empty":
        shape, dtype = content
        kind = getattr(torch, dtype)
        if 0 not in shape or not isinstance(kind, torch.dtype):
            raise ValueError("an empty tensor that is none")
        return torch.empty(shape, dtype=kind)
    if kind == "dict":
        return {unpack(tensors, key): unpack(tensors, value) for key, value in content}
    values = [unpack(tensors, value) for value in content]
    return values if kind == "list" else tuple(values)
