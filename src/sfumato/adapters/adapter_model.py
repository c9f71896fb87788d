"""An adapter attached to a frozen model: the updates beside its layers, whatever their kind.

A layer's update lives outside the model it changes: the layer's `forward` adds it to the output, or computes both as
one product. The model keeps its module names, its weights and its class, so that drawing, saving and measuring see an
ordinary U-Net, and detaching leaves no trace.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from sfumato.adapters.kinds import LORA, Kind
from sfumato.adapters.layers import BaseLayer, UpdateLayer
from sfumato.adapters.targets import NO_LAYER_RULES, ByLayer, is_spatial
from sfumato.errors import AdapterError
from sfumato.files.kinds import Change, LoraModule, ModuleAdapter
from sfumato.files.kinds.modules import Call, first_output, with_first
from sfumato.files.module_names import DENOISERS, Target
from sfumato.files.writing.lycoris import network_metadata, write_adapter
from sfumato.files.writing.modules import module_metadata
from sfumato.utils import randomness


class Attached(nn.Module):
    """All updates of one adapter, by (part, module path); parts are "unet", "text_encoder", "text_encoder_2".

    dropout, rank_dropout: shares of each update's inputs and of its ranks that are dropped of a sample while training;
    module_dropout: share of the updates that are left out of a step, see `set_dropout_samples`. network: what a file's
    metadata tell of the kind, where it is not that of its tensors alone, see `sfumato.files.writing.lycoris`. by_layer:
    the ranks and rates that layers have of their own.
    """

    def __init__(self, dropout: float = 0.0, rank_dropout: float = 0.0, module_dropout: float = 0.0) -> None:
        super().__init__()
        self.layers: dict[tuple[str, str], UpdateLayer | ModuleAdapter] = {}
        self.dropout, self.rank_dropout, self.module_dropout = dropout, rank_dropout, module_dropout
        self.network: dict[str, str] = {}
        self.by_layer = NO_LAYER_RULES
        self._hosts: dict[tuple[str, str], nn.Module] = {}
        self._samples: tuple[int, int, Sequence[int]] | None = None
        self._left_out: frozenset[tuple[str, str]] = frozenset()
        self._store = nn.ModuleList()
        self._adapted: list[_ForwardPatch] = []
        self.enabled = True

    def add(self, part: str, path: str, host: nn.Module, layer: UpdateLayer | ModuleAdapter) -> None:
        """Let `layer` update `host`, which is `part`'s module at `path`."""
        self.layers[part, path] = layer
        self._hosts[part, path] = host
        self._store.append(layer)

        patch = _ModulePatch if isinstance(layer, ModuleAdapter) else _ForwardPatch
        adapted = patch(self, host, layer, part, path)
        adapted.install()
        self._adapted.append(adapted)

    def set_dropout_samples(self, seed: int, step: int, places: Sequence[int]) -> None:
        """Say which samples come next: what is dropped of each is a function of (seed, layer, step, its place).

        places: of the batch's samples in the global batch, so that the same is dropped however that is split, and again
        where activations are computed twice. A batch of several times as many samples has others at the same places
        after them, such as a prior's. Text encoders are given distinct captions and not samples: of all captions of a
        step the same numbers are dropped. A whole update is left out of a step, of all its samples.
        """
        self._samples = (seed, step, places)
        self._left_out = self._draw_module_dropout(seed, step) if self.module_dropout else frozenset()

    def _draw_module_dropout(self, seed: int, step: int) -> frozenset[tuple[str, str]]:
        """The updates that module dropout leaves out of a step; never all of the U-Net's, of which nothing would have
        a gradient."""
        drawn = {key: randomness.uniform(seed, "module dropout/{}/{}".format(*key), step) for key in self.layers}
        kept = max((key for key in drawn if key[0] in DENOISERS), key=lambda key: drawn[key], default=None)
        return frozenset(key for key, number in drawn.items() if number < self.module_dropout and key != kept)

    def is_excluded(self, part: str, path: str) -> bool:
        """Whether a layer computes as the base's, without its update."""
        if not self.enabled:
            return True
        if not (self.module_dropout and self.training):
            return False
        self._known_samples()
        return (part, path) in self._left_out

    def dropped(self, x: Tensor, part: str, path: str) -> Tensor:
        """A layer's input (rows, ...) with a share of its numbers 0 and the others larger by as much."""
        drawn = self._drawn("dropout", x, tuple(x.shape[1:]), part, path)
        return (x / (1 - self.dropout)).masked_fill(drawn < self.dropout, 0)

    def dropped_ranks(self, x: Tensor, part: str, path: str) -> Tensor:
        """What is within an update, (rows, ..., ranks) or of a convolution (rows, ranks, height, width), with a share
        of each row's ranks 0 and the others larger by as much, as sd-scripts has it."""
        axis = 1 if isinstance(self._hosts[part, path], nn.Conv2d) else x.ndim - 1
        shape = tuple(size if place == axis else 1 for place, size in enumerate(x.shape))
        drawn = self._drawn("rank dropout", x, shape[1:], part, path)
        return (x / (1 - self.rank_dropout)).masked_fill(drawn < self.rank_dropout, 0)

    def _drawn(self, stream: str, x: Tensor, shape: tuple[int, ...], part: str, path: str) -> Tensor:
        """Numbers in [0, 1), (rows, *shape), for each of the rows of x; of text encoders (1, *shape) for all."""
        seed, step, places = self._known_samples()
        count = len(places)
        rows = [(row // count, places[row % count]) for row in range(len(x))] if part in DENOISERS else [(0, 0)]
        draws, drawn = torch.Generator(x.device), torch.empty(len(rows), *shape, device=x.device)
        for numbers, (again, place) in zip(drawn, rows, strict=True):
            draws.manual_seed(randomness.derive_seed(seed, f"{stream} {again}/{part}/{path}", step, place))
            torch.rand(numbers.shape, generator=draws, out=numbers)
        return drawn

    def _known_samples(self) -> tuple[int, int, Sequence[int]]:
        if self._samples is None:
            raise AdapterError(
                "dropout wants to know which samples these are; call set_dropout_samples() before each batch."
            )
        return self._samples

    def count(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters())

    def by_part(self) -> dict[str, list[nn.Parameter]]:
        """What is trained, by the part that it changes."""
        found: dict[str, list[nn.Parameter]] = {}
        for (part, _), layer in self.layers.items():
            found.setdefault(part, []).extend(layer.parameters())
        return found

    def ups(self) -> list[nn.Parameter]:
        """The factors B, which LoRA+ gives a rate of their own."""
        return [up for layer in self.layers.values() for up in layer.ups()]

    def rate_factors(self) -> dict[nn.Parameter, float]:
        """What the learning rate of each is multiplied with, for those that have another than their part's."""
        factors = {key: self.by_layer.factor_at(*key) for key in self.layers}
        return {p: factors[key] for key, layer in self.layers.items() if factors[key] != 1 for p in layer.parameters()}

    def limit_norms(self, most: float) -> Tensor:
        """Shrink every update whose norm is larger than `most` to that; the share of the updates that were."""
        updates = {key: layer for key, layer in self.layers.items() if isinstance(layer, UpdateLayer)}
        limited = [layer.limit_norm(self._host(key), most) for key, layer in updates.items()]
        return torch.stack([each.to(limited[0].device) for each in limited]).float().mean()

    def changes(self) -> dict[Target, Change]:
        """The updates as files have them; they share the layers' memory."""
        return {key: layer.change() for key, layer in self.layers.items()}

    def weights(self) -> Mapping[Target, Tensor]:
        """The frozen weights that the updates change."""
        return _Weights({key: self._host(key) for key, layer in self.layers.items() if isinstance(layer, UpdateLayer)})

    def _host(self, key: Target) -> BaseLayer:
        """The layer whose weight an update changes."""
        return cast(BaseLayer, self._hosts[key])

    def write(self, path: Path, **written_as: Any) -> Path:
        """Write the adapter; written_as: family, metadata, dtype and words as of `sfumato.files.write_lora`."""
        args = self.by_layer.as_network_args()
        return write_adapter(path, self.changes(), self.weights(), network=self.network, args=args, **written_as)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Within the block the model is the base again."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    @contextmanager
    def scaled(self, factor: float) -> Iterator[None]:
        """Within the block the U-Net's updates are `factor` times what they are."""
        layers = [layer for (part, _), layer in self.layers.items() if part in DENOISERS]
        before = [layer.strength for layer in layers]
        try:
            for layer in layers:
                layer.strength *= factor
            yield
        finally:
            for layer, strength in zip(layers, before, strict=True):
                layer.strength = strength

    def detach(self) -> None:
        """Let the layers compute as they did before; the model is the base for good."""
        while self._adapted:
            self._adapted.pop().remove()

    def load(self, values: Mapping[Target, Change], name: str) -> None:
        """Start from another adapter, which must have the same layers, kinds and ranks."""
        missing, extra = self.layers.keys() - values.keys(), values.keys() - self.layers.keys()
        if missing or extra:
            first = sorted(missing or extra)[0]
            raise AdapterError(
                f"{name}: has {len(values)} modules, this run trains {len(self.layers)}; {len(missing)} missing and "
                f"{len(extra)} extra, first {'.'.join(first)}. Give the --targets, --conv and --train-text-encoder it "
                "was trained with, and the --rank-of or --rate-of that left layers out."
            )
        ranks = sorted({change.rank for change in values.values() if isinstance(change, LoraModule)})
        for key, change in values.items():
            where, kind = f"{name}: {'.'.join(key)}", self.layers[key].kind
            if change.kind != kind:
                raise AdapterError(
                    f"{where} is {change.kind}, this run trains {kind}. Give the --algo and --dora it was trained with."
                )
            if change.bias_delta is not None:
                raise AdapterError(f"{where} changes a bias as well, which is not trained. Take another adapter.")
            layer = self.layers[key]
            is_by_layer = len(ranks) > 1 or bool(self.by_layer.ranks)
            if isinstance(change, LoraModule) and is_by_layer and change.rank != self.layers[key].rank:
                raise AdapterError(
                    f"{where} has rank {change.rank}, this run has {self.layers[key].rank} there; the file has "
                    f"{', '.join(map(str, ranks))}. Give the --rank, --conv-rank and --rank-of it was trained with."
                )
            layer.load(change, where)


class _Weights(Mapping[Target, Tensor]):
    """Those of layers, each when it is asked for: a quantised layer makes it anew."""

    def __init__(self, hosts: Mapping[Target, BaseLayer]) -> None:
        self._hosts = hosts

    def __getitem__(self, key: Target) -> Tensor:
        return self._hosts[key].weight.detach()

    def __iter__(self) -> Iterator[Target]:
        return iter(self._hosts)

    def __len__(self) -> int:
        return len(self._hosts)


class _ForwardPatch:
    """A layer's `forward` with its update. An object and not a function, so that a copy of the model is of its own."""

    def __init__(self, adapter: Attached, host: Any, layer: Any, part: str, path: str) -> None:
        self._adapter, self._host, self._layer, self._part, self._path = adapter, host, layer, part, path
        self._as_it_is, self._had_its_own = host.forward, "forward" in vars(host)

    def install(self) -> None:
        """Compute in the layer's place."""
        self._host.forward = self

    def remove(self) -> None:
        """Let the layer compute as it did."""
        del self._host.forward
        if self._had_its_own:
            self._host.forward = self._as_it_is

    def __call__(self, x: Tensor) -> Any:
        adapter, host, layer, where = self._adapter, self._host, self._layer, (self._part, self._path)
        if adapter.is_excluded(*where):
            return self._as_it_is(x)
        of_inputs, of_ranks = adapter.training and adapter.dropout, adapter.training and adapter.rank_dropout
        if not (of_inputs or of_ranks):
            both = layer.together(host, x)
            if both is not None:
                return both
        output: Tensor = self._as_it_is(x)
        drop = partial(adapter.dropped_ranks, part=self._part, path=self._path) if of_ranks else None
        update: Tensor = layer(host, adapter.dropped(x, *where) if of_inputs else x, drop)
        return output + update.to(output.dtype)


class _ModulePatch(_ForwardPatch):
    """A module's `forward` with what an adapter beside it adds."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        answer = self._as_it_is(*args, **options)
        output = first_output(answer)
        if output is None or self._adapter.is_excluded(self._part, self._path):
            return answer
        added: Tensor = self._layer.added(Call(self._host, args, options, output), self._layer.strength)
        return with_first(answer, output + added.to(output.dtype))


def attach(
    parts: Mapping[str, Mapping[str, nn.Module]],
    *,
    rank: int,
    alpha: float,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    dropout: float = 0.0,
    rank_dropout: float = 0.0,
    module_dropout: float = 0.0,
    rank_stabilised: bool = False,
    kind: Kind = LORA,
    by_layer: ByLayer = NO_LAYER_RULES,
    seed: int = 0,
) -> Attached:
    """A new adapter on the selected layers of each part; it changes nothing until it is trained.

    parts: "unet", "text_encoder", ... -> what `Kind.targets` chose in it. The scale is alpha / rank, or alpha /
    sqrt(rank) when rank-stabilised (Kalajdzievski 2023). conv_rank, conv_alpha: of convolutions of more than 1x1, where
    they have their own. by_layer: ranks and rates of single layers, of which `ByLayer.kept` gave `parts`; a rank
    without an alpha has the scale that the layer has otherwise, or when rank-stabilised the alpha. dropout,
    rank_dropout, module_dropout: see `Attached`. Each layer's start is a function of (seed, part, path): adding a
    target does not change how the others start.
    """
    adapter = Attached(dropout, rank_dropout, module_dropout)
    adapter.by_layer = by_layer
    wide = (rank if conv_rank is None else conv_rank, alpha if conv_alpha is None else conv_alpha)
    for part, chosen in parts.items():
        for path, host in chosen.items():
            own_rank, own_alpha = wide if is_spatial(host) else (rank, alpha)
            if (rule := by_layer.rank_at(part, path)) is not None:
                alike = own_alpha if rank_stabilised else own_alpha * (rule.value / own_rank)
                own_rank, own_alpha = int(rule.value), alike if rule.alpha is None else rule.alpha
            scale = own_alpha / (math.sqrt(own_rank) if rank_stabilised else own_rank)
            layer = kind.layer(host, own_rank, scale, randomness.generator(seed, f"{kind.algo}/{part}/{path}"))
            device = next(host.parameters()).device if kind.module else cast(BaseLayer, host).weight.device
            adapter.add(part, path, host, layer.to(device))
    if kind.module is not None:
        adapter.network = module_metadata(kind.algo, rank=rank, alpha=alpha)
        return adapter
    adapter.network = network_metadata(
        kind.algo,
        rank=rank,
        alpha=alpha,
        conv=None if wide == (rank, alpha) else wide,
        factor=kind.factor,
        dora=kind.dora,
        rank_stabilised=rank_stabilised,
    )
    return adapter
