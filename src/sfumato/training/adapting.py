"""The adapter that a trainer's options ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sfumato.adapters import Attached, ByLayer, Kind, attach


def new_adapter(layers: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]], config: Any) -> Attached:
    """A new adapter of these layers, by part and path, that changes nothing yet.

    config: resolved, of a trainer with `KindOptions`, ranks and alphas, and perhaps `rank_stabilised`.
    """
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
