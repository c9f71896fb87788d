"""The kinds of adapter that are trained, by LyCORIS's word for them (`algo`): how a layer of each is made.

Of those that change weights the table is here, beside their rows in `sfumato.files.keys`; of the others the class
that their row there names is all there is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, cast

import torch
from torch import nn

from sfumato.adapters.layers import BaseLayer, UpdateLayer
from sfumato.adapters.targets import (
    NO_LAYER_RULES,
    ByLayer,
    RankGroup,
    group_by_rank,
    modules_around,
    narrow_notes,
    target_layers,
)
from sfumato.adapters.tuners.lokr import LohaLayer, LokrLayer, full_matrix_notes
from sfumato.adapters.tuners.lora import DoraLayer, LoraLayer
from sfumato.adapters.tuners.oft import OftLayer, block_notes
from sfumato.files.keys import kind_named, module_class
from sfumato.files.kinds import ModuleAdapter


@dataclass(frozen=True)
class Algo:
    """layer: an update of a layer, from (layer, rank, scale, generator, factor). notes: lines on layers of one rank and
    on the factor, before any training."""

    layer: Callable[[BaseLayer, int, float, torch.Generator, int | None], UpdateLayer]
    notes: Callable[[RankGroup, int | None], list[str]]


ALGOS: Mapping[str, Algo] = MappingProxyType(
    {
        "lora": Algo(lambda *given: LoraLayer(*given[:4]), lambda some, _: narrow_notes(some)),
        "loha": Algo(lambda *given: LohaLayer(*given[:4]), lambda some, _: narrow_notes(some)),
        "lokr": Algo(LokrLayer, full_matrix_notes),
        "oft": Algo(lambda host, rank, *_: OftLayer(host, rank), lambda some, _: block_notes(some)),
    }
)


@dataclass(frozen=True)
class Kind:
    """A kind with its options: of LoKr the size of the first factor, and whether the change is a DoRA."""

    algo: str = "lora"
    dora: bool = False
    factor: int | None = None

    @classmethod
    def of(cls, config: Any) -> Kind:
        """What a config's `algo`, `dora` and `factor` say."""
        return cls(config.algo, config.dora, config.factor)

    @property
    def module(self) -> type[ModuleAdapter] | None:
        """The class of a kind that changes no weight; None for the others."""
        return module_class(kind_named(self.algo))

    def targets(
        self,
        parts: Mapping[str, nn.Module],
        targets: str,
        *,
        conv: bool = False,
        named: Mapping[str, str] | None = None,
    ) -> dict[str, dict[str, nn.Module]]:
        """What `attach` adapts of each part, by path: the layers of `target_layers`, or the modules around them that a
        kind which changes no weight stands beside. named: as of `select`."""
        layers = target_layers(parts, targets, conv=conv, named=named)
        if self.module is None:
            return {part: dict(some) for part, some in layers.items()}
        return modules_around(layers, parts, self.module, self.algo)

    def layer(
        self, host: nn.Module, rank: int, scale: float, generator: torch.Generator
    ) -> UpdateLayer | ModuleAdapter:
        """A new update, which changes nothing yet."""
        if self.module is not None:
            return self.module.new(host, rank, scale, generator)
        layer = cast(BaseLayer, host)
        made = ALGOS[self.algo].layer(layer, rank, scale, generator, self.factor)
        return DoraLayer(layer, made) if self.dora else made

    def notes(
        self,
        parts: Mapping[str, Mapping[str, Any]],
        rank: int,
        conv_rank: int | None = None,
        by_layer: ByLayer = NO_LAYER_RULES,
    ) -> list[str]:
        """Lines on layers that have no room for their rank, or are whole. parts, conv_rank, by_layer: as of `attach`.

        Raises AdapterError where no layer of a rank has room for it, or no layer is a convolution with its own.
        """
        if self.module is not None:
            return []
        groups = group_by_rank(parts, rank, conv_rank, by_layer)
        return [line for some in groups for line in ALGOS[self.algo].notes(some, self.factor)]


LORA = Kind()
