"""The processes of one training: who this one is, and sums over all of them.

Started by `accelerate launch`, a run has several; otherwise one. A sample's randomness depends on its place in the
global batch, so each process takes its slice of that batch and the gradients are summed.

The one process of a training that `accelerate launch` did not start: what `Processes` is to several.

How the samples of a step are parted: over the processes, and over the passes whose gradients are summed.
"""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from torch import Tensor, nn

from sfumato.errors import RunError


class SingleProcess:
    """Has nobody to wait for, or to ask."""

    is_main, count = True, 1

    def wait(self) -> None:
        """Everybody is here."""

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        return number


@dataclass(frozen=True)
class MicroBatch:
    """What one pass of a step computes: `count` samples of its global batch, from place `first` on."""

    step: int
    global_batch: int
    first: int
    count: int

    @property
    def places(self) -> range:
        """Its samples' places in the global batch."""
        return range(self.first, self.first + self.count)


@dataclass(frozen=True)
class MicroBatches:
    """Those of one process. global_batch: samples of a step, of all processes together. firsts: where each of the
    process's batches of `count` begins. at_once: the most of a batch that one pass computes; unset, all."""

    global_batch: int
    firsts: tuple[int, ...]
    count: int
    at_once: int | None = None

    def of(self, step: int) -> list[MicroBatch]:
        """The micro-batches of a step, in order."""
        size = self.at_once or self.count
        return [
            MicroBatch(step, self.global_batch, first + done, min(size, self.count - done))
            for first in self.firsts
            for done in range(0, self.count, size)
        ]


_AS_LONG_AS_IT_TAKES = timedelta(days=30)
_WHILE_THE_MAIN_ONE_WRITES = timedelta(hours=3)
"""The others wait while the main process writes tens of gigabytes, or uploads them; NCCL's default is ten minutes."""
_MESSAGE_BYTES = 2**26
_OF_LAUNCHERS = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
"""The variables by which processes find each other."""


@contextmanager
def _alone_on_its_gpu() -> Iterator[None]:
    """For one process, that accelerate does not ask whether the machine's GPUs reach each other: it refuses some."""
    unset = [name for name in ("NCCL_P2P_DISABLE", "NCCL_IB_DISABLE") if name not in os.environ]
    os.environ |= dict.fromkeys(unset, "1")
    try:
        yield
    finally:
        for name in unset:
            del os.environ[name]


def _leave() -> None:
    """Take leave of the other processes while the interpreter is whole, as torch asks for. Left to the interpreter's
    end, a process that had done all was aborted now and then."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@dataclass(frozen=True)
class Processes:
    """rank: this process's number. count: how many there are. device: what this process computes on."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def join(cls, device: str = "auto") -> Processes:
        """Meet the other processes, if `accelerate launch` started any."""
        on_cpu = device == "cpu" or (device == "auto" and not _has_accelerator())
        try:
            with nullcontext() if "LOCAL_RANK" in os.environ else _alone_on_its_gpu():
                state = PartialState(cpu=on_cpu, timeout=_WHILE_THE_MAIN_ONE_WRITES)
        except NotImplementedError as error:  # of GPUs that do not reach each other
            raise RunError(f"several processes cannot meet: {' '.join(str(error).split())}") from None
        except ValueError as error:  # a launcher's variables, of which some are left over
            given = ", ".join(name for name in _OF_LAUNCHERS if name in os.environ)
            raise RunError(
                f"several processes cannot meet ({' '.join(str(error).split())[:120]}); found {given or 'no variable'} "
                "in the environment. Start them by `accelerate launch`, or unset these for one process."
            ) from None
        if state.num_processes > 1 and ":" in device:
            raise RunError(f"--device {device} is one device for {state.num_processes} processes; give auto, or cuda.")
        found = state.device if device == "auto" else torch.device(device)
        if found.type == "cpu":
            found = torch.device("cpu")  # accelerate numbers it, and "cpu:1" would be another device than "cpu"
            if state.num_processes > 1:
                atexit.register(_leave)
        return cls(state.process_index, state.num_processes, found)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def slice(self, global_batch: int) -> tuple[int, int]:
        """(first, count): this process's part of a batch that divides evenly."""
        share = global_batch // self.count
        return self.rank * share, share

    def sum(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the processes; small ones share a message, an adapter's are one."""
        if self.count == 1:
            return
        for listed in _messages(tensors):
            flat = torch.cat([t.detach().reshape(-1) for t in listed])
            torch.distributed.all_reduce(flat)
            for tensor, total in zip(listed, torch.split(flat, [t.numel() for t in listed]), strict=True):
                tensor.detach().copy_(total.view_as(tensor))

    def sum_gradients(self, parameters: Iterable[nn.Parameter], *figures: Tensor) -> None:
        """Replace each gradient, and each of the figures, by its sum over the processes.

        Where a parameter has a gradient in some processes only, as a text encoder's where one of them met no caption,
        the others count as zeros. Where it has none in any, as a layer's whose output is not used, it keeps none: an
        optimizer would let it decay.
        """
        if self.count == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        lacking = [place for place, p in enumerate(trained) if p.grad is None]
        has = torch.ones(len(trained), device=self.device)
        has[lacking] = 0
        for place in lacking:
            trained[place].grad = torch.zeros_like(trained[place])
        self.sum([*figures, has, *(p.grad for p in trained if p.grad is not None)])
        nowhere = (has == 0).tolist() if lacking else []  # one wait for the device, not one for each
        for place in lacking:
            if nowhere[place]:
                trained[place].grad = None

    def micro_batches(self, batch: int, accumulate: int, at_once: int | None = None) -> MicroBatches:
        """What this process computes of each step: `accumulate` batches of `batch` samples, of which at most `at_once`
        in one pass; unset, a whole batch."""
        global_batch = batch * accumulate * self.count
        first, share = self.slice(global_batch)
        return MicroBatches(global_batch, tuple(range(first, first + share, batch)), batch, at_once)

    def largest(self, number: int) -> int:
        """The largest of the processes' numbers."""
        if self.count == 1:
            return number
        found = torch.tensor([number], device=self.device)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return int(found)

    def is_everywhere(self, number: int) -> bool:
        """Whether it is the same in all processes."""
        return self.largest(number) == -self.largest(-number)

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The block is run by the main process, and then by the others, which find what it has written.

        However long that takes: the other barriers give up after minutes. Where the block fails in the main process, it
        is run by no other; they raise RunError.
        """
        if self.count == 1:
            yield
            return
        # Met before the block, so that a process that never came is noticed as everywhere else.
        agree = self._agreement_without_limit()
        if not self.is_main:
            if agree(False):
                raise RunError("the main process could not prepare the images; its own line says why.")
            yield
            return
        failed = True
        try:
            yield
            failed = False
        finally:
            agree(failed)

    def _agreement_without_limit(self) -> Callable[[bool], bool]:
        """A function that waits, as long as it takes, for all to call it: whether any of them said yes."""
        self.wait()
        group: Any = torch.distributed.new_group(backend="gloo", timeout=_AS_LONG_AS_IT_TAKES)

        def any_of_all(mine: bool) -> bool:
            found = torch.tensor([int(mine)])
            torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX, group=group)
            return bool(found)

        return any_of_all

    def wait(self) -> None:
        """Until every process is here."""
        PartialState().wait_for_everyone()


def _has_accelerator() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()


def _messages(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in their order, as many at a time as make a message: all gradients at once would be there twice."""
    listed: list[Tensor] = []
    size = 0
    for tensor in tensors:
        if listed and size + tensor.nbytes > _MESSAGE_BYTES:
            yield listed
            listed, size = [], 0
        listed.append(tensor)
        size += tensor.nbytes
    if listed:
        yield listed
