"""The kinds of update that are trained, by LyCORIS's word for them (`algo`): what differs, in one table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch

from sfumato.adapters.layers import BaseLayer, UpdateLayer
from sfumato.adapters.targets import NO_LAYER_RULES, ByLayer, RankGroup, group_by_rank, narrow_notes
from sfumato.adapters.tuners.lokr import LohaLayer, LokrLayer, full_matrix_notes
from sfumato.adapters.tuners.lora import DoraLayer, LoraLayer
from sfumato.adapters.tuners.oft import OftLayer, block_notes


@dataclass(frozen=True)
class Algo:
    """layer: an update of a layer, from (layer, rank, scale, generator, factor). notes: lines on layers of one rank and
    on the factor, before any training. rate: how many times a LoRA's default learning rate its own is, by how fast a
    loss begins to fall (bench/adapter_kinds.py)."""

    layer: Callable[[BaseLayer, int, float, torch.Generator, int | None], UpdateLayer]
    notes: Callable[[RankGroup, int | None], list[str]]
    rate: float


ALGOS: Mapping[str, Algo] = MappingProxyType(
    {
        "lora": Algo(lambda *given: LoraLayer(*given[:4]), lambda some, _: narrow_notes(some), rate=1),
        "loha": Algo(lambda *given: LohaLayer(*given[:4]), lambda some, _: narrow_notes(some), rate=0.1),
        "lokr": Algo(LokrLayer, full_matrix_notes, rate=3),
        "oft": Algo(lambda host, rank, *_: OftLayer(host, rank), lambda some, _: block_notes(some), rate=0.2),
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

    def layer(self, host: BaseLayer, rank: int, scale: float, generator: torch.Generator) -> UpdateLayer:
        """A new update, which changes nothing yet."""
        made = ALGOS[self.algo].layer(host, rank, scale, generator, self.factor)
        return DoraLayer(host, made) if self.dora else made

    def notes(
        self,
        parts: Mapping[str, Mapping[str, BaseLayer]],
        rank: int,
        conv_rank: int | None = None,
        by_layer: ByLayer = NO_LAYER_RULES,
    ) -> list[str]:
        """Lines on layers that have no room for their rank, or are whole. parts, conv_rank, by_layer: as of `attach`.

        Raises AdapterError where no layer of a rank has room for it, or no layer is a convolution with its own.
        """
        groups = group_by_rank(parts, rank, conv_rank, by_layer)
        return [line for some in groups for line in ALGOS[self.algo].notes(some, self.factor)]


LORA = Kind()
