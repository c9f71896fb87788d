"""Kinds of adapter that change no weight: a module beside one of the model's, which adds to what that answers.

One class does all of such a kind: it is trained, it is what a file's tensors become, and it is what a mix applies. Its
row in `sfumato.files.keys.KIND_KEYS` names the class and its tensors. Examples are bottleneck adapters beside the
attention and the feed-forward of a block, and learned keys and values beside an attention's own.

Whatever the kind, a mix adds the share of each adapter to the module's own answer, so that the order does not matter,
strength 0 is the base, and the share can be kept to some pictures of a batch or to a region.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sfumato.errors import AdapterError
from sfumato.files.kinds.base import ModuleTensors, WithoutLowRank


@dataclass(frozen=True)
class Call:
    """A call of one of the model's modules: what it was given, and what it answered by itself.

    args, options: the call's positional and named arguments. output: (rows, ...), the answer without any adapter.
    """

    module: nn.Module
    args: tuple[Any, ...]
    options: Mapping[str, Any]
    output: Tensor

    @property
    def input(self) -> Tensor:
        """The module's first argument, such as the hidden states (rows, tokens, width)."""
        found: Tensor = self.args[0] if self.args else next(iter(self.options.values()))
        return found

    def of_rows(self, rows: Sequence[int]) -> Call:
        """The same call, as if it had been of these rows of the batch alone."""
        count, index = len(self.output), torch.tensor(rows, device=self.output.device)

        def chosen(value: Any) -> Any:
            if isinstance(value, Tensor) and value.ndim and len(value) == count:
                return value[index.to(value.device)]
            return value

        options = {name: chosen(value) for name, value in self.options.items()}
        return replace(self, args=tuple(map(chosen, self.args)), options=options, output=chosen(self.output))


class ModuleAdapter(WithoutLowRank, nn.Module):
    """An adapter beside one module, in fp32 while it is trained, which begins as none.

    A kind is a subclass that says `kind` and `hosts` and defines `new`, `added` and `fits_module`. Its parameters are
    named as the tensors in files (the roles of its row), unless `tensors` and `from_tensors` say otherwise.

    kind: its key in `sfumato.files.keys.KIND_KEYS`. hosts: a regular expression, searched in a module's path, of the
    modules that it stands beside; of these `--targets` takes the ones that contain a layer which it names. strength:
    how often the whole counts while it is trained, see `sfumato.adapters.Attached.scaled`.
    """

    kind: ClassVar[str]
    hosts: ClassVar[str]
    needs_weight: ClassVar[bool] = False
    bias_delta: ClassVar[None] = None
    strength: float = 1.0
    scale: float = 1.0

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """tensors: by role."""
        super().__init__()
        for role, value in tensors.items():
            self.register_parameter(role, nn.Parameter(value, requires_grad=value.is_floating_point()))

    # What a kind defines

    @classmethod
    def new(cls, module: nn.Module, rank: int, scale: float, generator: torch.Generator) -> Self:
        """One for training beside `module` that adds zeros. rank, scale: as of `sfumato.adapters.attach`; the start is
        a function of the generator."""
        raise NotImplementedError

    def added(self, call: Call, strength: float) -> Tensor:
        """What it adds to `call.output`, of the same shape; zeros at strength 0. It computes in the input's dtype, or
        under autocast in that, whatever the dtype of its own tensors."""
        raise NotImplementedError

    def fits_module(self, module: nn.Module) -> bool:
        """Whether it can stand beside this module, by its widths."""
        raise NotImplementedError

    # What it can do without more

    @classmethod
    def from_tensors(cls, parts: ModuleTensors) -> Self:
        """The adapter that a file's tensors are. Raises AdapterError for shapes that do not fit together."""
        return cls(parts.tensors)

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds of it, by role; it shares the memory of what is trained."""
        return {name: value.detach() for name, value in self.named_parameters()}

    def change(self) -> ModuleAdapter:
        """As files have it: itself, as `sfumato.adapters.UpdateLayer.change`."""
        return self

    def load(self, change: Any, where: str) -> None:
        """Start from another of this kind. where: whose it is, with which an AdapterError for other shapes begins."""
        theirs = change.tensors()
        ours = self.tensors()
        shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (theirs, ours)]
        if shapes[0] != shapes[1]:
            raise AdapterError(f"{where} has {shapes[0]}, this run {shapes[1]}. Give its own rank, and its own base.")
        with torch.no_grad():
            for name, value in ours.items():
                value.copy_(theirs[name])

    def ups(self) -> tuple[nn.Parameter, ...]:
        """None: LoRA+ is for factors of a weight."""
        return ()

    def fits(self, shape: Sequence[int]) -> bool:
        """False: it changes no weight, of whatever shape."""
        return False

    def delta(self, weight: Tensor) -> Tensor:
        """Raises AdapterError: there is none."""
        raise without_delta(f"this {self.kind}", self.kind)


def without_delta(what: str, kind: str) -> AdapterError:
    """The error that an adapter has no change of a weight, where one is wanted. what: it is called."""
    return AdapterError(
        f"{what} is a {kind} adapter, which changes no weight, so nothing of it can be merged, baked or converted. Mix "
        "it as it is: sfumato generate --lora FILE, or sfumato.compose."
    )


def refuse_modules(name: str, changes: Mapping[Any, Any]) -> None:
    """Raise AdapterError where some of an adapter's changes are modules beside the model's, and weights are wanted."""
    for change in changes.values():
        if isinstance(change, ModuleAdapter):
            raise without_delta(name, change.kind)


def first_output(output: Any) -> Tensor | None:
    """The tensor that a module's answer is or begins with; None for another answer."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, Tensor) else None


def with_first(output: Any, first: Tensor) -> Any:
    """The answer with another tensor for the one that `first_output` gave."""
    return (first, *output[1:]) if isinstance(output, tuple) else first
