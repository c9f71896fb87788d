"""Parts of a base that give their memory back while nothing needs them, and are read from their files again.

A training computes latents and embeddings before its loop, where U-Net and optimizer need the memory, and draws and
measures now and then. So VAE and text encoders need not stay: SD 1.5's take 0.8 GiB in fp32, SDXL's 3.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from typing import TYPE_CHECKING

from torch import nn

from sfumato.precision.memory import give_back_freed_memory
from sfumato.precision.quantized import empty

if TYPE_CHECKING:
    from sfumato.bases.weights import LazyModel
    from sfumato.precision import Part


class LazyWeights:
    """Which parts rest: their modules stay what they are, hooks and all, and their weights are on the device `meta`.

    shells: by part; all of them rest at first. place: puts a module that was read where it belongs. A part that is
    trained must not rest: it would come back as it was.
    """

    def __init__(self, shells: Mapping[Part, Sequence[LazyModel]], place: Callable[[nn.Module, Part], object]):
        self._shells, self._place = shells, place
        self._at_rest = set(shells)

    def load(self, *parts: Part) -> None:
        """Read and place the weights of those of the parts that rest."""
        for part in self._at_rest.intersection(parts):
            for shell in self._shells[part]:
                shell.read()
                self._place(shell.model, part)
            self._at_rest.discard(part)

    def check_files(self) -> None:
        """Raises FileError for a file of any part that changed since the base was loaded."""
        for shells in self._shells.values():
            for shell in shells:
                shell.check_files()

    def first_pages(self, *parts: Part, as_stored: bool = False) -> Iterator[bytes]:
        """As of each part's `LazyModel`, awake or not."""
        for shell in (shell for part in parts for shell in self._shells.get(part, ())):
            yield from shell.first_pages(as_stored=as_stored)

    def load_only(self, *parts: Part) -> None:
        """Wake these parts, and let the others rest until something wakes them."""
        self._rest(self._shells.keys() - set(parts))
        self.load(*parts)

    @contextmanager
    def restored_after(self) -> Iterator[None]:
        """What rests before the block rests after it, whatever the block wakes."""
        before = set(self._at_rest)
        try:
            yield
        finally:
            self._rest(before)

    def _rest(self, parts: Set[Part]) -> None:
        awake = parts - self._at_rest
        for part in awake:
            for shell in self._shells[part]:
                for module in shell.model.modules():
                    empty(module)
            self._at_rest.add(part)
        if awake:
            give_back_freed_memory()
