"""What autograd keeps of a forward pass beside the weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def kept_bytes(model: nn.Module) -> Iterator[dict[int, int]]:
    """Within the block fills a dict with the size of each tensor that is saved, in bytes, by its address.

    What the forward pass returns has to be alive until the block ends, so that no two tensors had one address.
    """
    weights = {parameter.data_ptr() for parameter in model.parameters()}
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and not tensor.is_leaf:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that its own node kept would never be freed

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield seen
