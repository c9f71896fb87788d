"""One module's tensors as a file gives them, on the way to a Change. Looks at shapes only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from torch import Tensor

from sfumato.errors import AdapterError
from sfumato.files.kohya import Target
from sfumato.files.peft_settings import PeftSettings

KERNEL_LIMIT = 1024
"""Values in a convolution's kernel. Those of SD have nine; more would let a small file ask for much memory."""


@dataclass(frozen=True)
class ModuleTensors:
    """tensors: by role, views of the mapped file. names: what the file calls them. settings: peft's, if it has any.

    by_onetrainer: whether the file says that OneTrainer wrote it.
    """

    file: str
    target: Target
    kind: str
    names: Mapping[str, str]
    tensors: Mapping[str, Tensor]
    settings: PeftSettings
    by_onetrainer: bool = False

    def __getitem__(self, role: str) -> Tensor:
        return self.tensors[role]

    def get(self, role: str) -> Tensor | None:
        return self.tensors.get(role)

    def matrix(self, role: str) -> Tensor:
        """The tensor of a role, (rows, columns) or a convolution of 1x1."""
        value = self.tensors[role]
        if value.ndim not in (2, 4) or (value.ndim == 4 and prod(value.shape[2:]) != 1):
            raise self.shape_error(role, "(rows, columns)")
        return value.reshape(value.shape[:2])

    def core(self, role: str, rank: int) -> Tensor | None:
        """The Tucker core of a role, (rank, rank, height, width); None where the file has none."""
        value = self.tensors.get(role)
        if value is not None and (value.ndim != 4 or tuple(value.shape[:2]) != (rank, rank)):
            raise self.shape_error(role, f"({rank}, {rank}, height, width)")
        if value is not None and prod(value.shape[2:]) > KERNEL_LIMIT:
            raise self.shape_error(role, f"a kernel of at most {KERNEL_LIMIT:,} values")
        return value

    def number(self, role: str) -> float | None:
        """The one value of a role, None where the file has none."""
        value = self.tensors.get(role)
        if value is None:
            return None
        if value.numel() != 1:
            raise self.shape_error(role, "one number")
        return float(value)

    def alpha(self, rank: int) -> float:
        """The module's own alpha, else that of peft's config, else the rank (scale 1)."""
        own = self.number("alpha")
        return self.settings.alpha(self.target, rank) if own is None else own

    def vector(self, role: str) -> Tensor | None:
        """The tensor of a role of which one axis only is longer than 1, as (length,); None where there is none."""
        value = self.tensors.get(role)
        if value is not None and max(value.shape, default=1) != value.numel():
            raise self.shape_error(role, "one value a channel")
        return None if value is None else value.reshape(-1)

    def shape_error(self, role: str, wanted: str) -> AdapterError:
        shape = list(self.tensors[role].shape)
        return self.error(f"{self.names[role].rpartition('.')[2] or role} ({role}) is {shape}; wanted {wanted}")

    def error(self, what: str) -> AdapterError:
        """The error that this module's tensors make no adapter, what: found and wanted."""
        return AdapterError(f"{self.file}: {'.'.join(self.target)}: {what}. Take the file from its source again.")
