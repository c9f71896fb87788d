"""The adapter that a trainer's options ask for.

A config is that of a trainer with `KindOptions`, ranks, alphas and `targets`, resolved, and perhaps with `conv`,
`rank_stabilised` and `train_text_encoder`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sfumato.adapters import Attached, ByLayer, Kind, attach, target_layers
from sfumato.adapters.whole import Host
from sfumato.training.checks import check_module_dropout

if TYPE_CHECKING:
    from sfumato.bases import Base

Layers = Mapping[str, Mapping[str, Host]]
"""By part and path."""


def adapted_layers(config: Any, base: Base) -> tuple[Layers, list[str]]:
    """The layers that are adapted, and what there is to say of them before any training.

    Raises AdapterError and ConfigError for options that fit none of the layers, or too few.
    """
    by_layer = ByLayer.of(config)
    parts = base.parts(text=getattr(config, "train_text_encoder", False))
    layers = by_layer.kept(target_layers(parts, config.targets, conv=getattr(config, "conv", False)))
    check_module_dropout(config, sum(map(len, layers.values())))
    return layers, Kind.of(config).notes(layers, config.rank, config.conv_rank, by_layer)


def new_adapter(layers: Layers, config: Any) -> Attached:
    """A new adapter of these layers that changes nothing yet."""
    return attach(
        layers,
        rank=config.rank,
        alpha=config.alpha or float(config.rank),  # an OFT has none, and no scale
        conv_rank=config.conv_rank,
        conv_alpha=config.conv_alpha,
        dropout=config.dropout,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        rank_stabilised=getattr(config, "rank_stabilised", False),
        kind=Kind.of(config),
        by_layer=ByLayer.of(config),
        seed=config.seed,
    )
