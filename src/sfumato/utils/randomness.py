"""Randomness as a pure function of (seed, stream, step, index).

Nothing is remembered between two draws, so resuming restores an integer, and the number of processes, workers or
accumulation steps changes nothing. A stream is a word ("noise", "order"); an index is the sample's place in the global
batch.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def derive_seed(seed: int, stream: str, step: int = 0, index: int = 0) -> int:
    """What a generator that depends on nothing but these begins with."""
    digest = hashlib.blake2b(f"{seed}/{stream}/{step}/{index}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, stream: str, step: int = 0, index: int = 0) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(derive_seed(seed, stream, step, index))


def normal(shape: tuple[int, ...], seed: int, stream: str, step: int = 0, index: int = 0) -> Tensor:
    """Standard normal numbers of `shape`, fp32 on the CPU."""
    return torch.randn(shape, generator=generator(seed, stream, step, index))


def uniform(seed: int, stream: str, step: int = 0, index: int = 0) -> float:
    """One number in [0, 1)."""
    return float(torch.rand((), generator=generator(seed, stream, step, index), dtype=torch.float64))


def permutation(n: int, seed: int, stream: str, epoch: int = 0) -> list[int]:
    """The numbers 0 to n - 1 in an order of their own for each epoch."""
    return [int(i) for i in torch.randperm(n, generator=generator(seed, stream, epoch))]


@contextmanager
def seeded(device: torch.device, seed: int, stream: str, step: int = 0, index: int = 0) -> Iterator[None]:
    """Within the block torch's own generators depend on the arguments alone; afterwards they are as they were.

    For what can only be drawn by torch itself, such as dropout inside a layer.
    """
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, stream, step, index))
        yield
