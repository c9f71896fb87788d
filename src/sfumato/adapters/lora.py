"""LoRA for training: W' = W + scale B A beside frozen layers (Hu et al. 2021, section 4.1).

A layer's update lives outside the model it changes: the layer's `forward` adds it to the output, or computes both as
one product (see `sfumato.adapters.folded`). The model keeps its module names, its weights and its class, so that
drawing, saving and measuring see an ordinary U-Net, and detaching leaves no trace.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sfumato import randomness
from sfumato.adapters.folded import folded
from sfumato.errors import AdapterError
from sfumato.files.changes import LoraModule
from sfumato.numerals import pluralize
from sfumato.precision.products import linear

_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
_PROJECTIONS = r"\.attentions\.\d+\.proj_(in|out)$"
_MLP = r"\.ff\.net\.(0\.proj|2)$"
# What LyCORIS calls LoCon: all of the blocks, but neither the first and last convolution nor the time embedding, which
# sd-scripts would pass over in silence.
_BLOCKS = r"^(down_blocks|mid_block|up_blocks)\."

TARGETS: Mapping[str, str] = {
    "cross-attention": r"\.attn2\.to_(q|k|v|out\.0)$",
    "attention": _ATTENTION,
    "attention+mlp": rf"{_ATTENTION}|{_MLP}",
    "transformers": rf"{_ATTENTION}|{_MLP}|{_PROJECTIONS}",
    "everything": _BLOCKS,
}
"""Names of sets of U-Net layers, as regular expressions that are searched in a layer's module path. transformers
is what sd-scripts adapts unless told otherwise."""

TEXT_TARGETS = r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
CONV_TARGETS = r"\.(conv1|conv2|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv)$"


class LoraLayer(nn.Module):
    """One update scale B A; `down` is A, `up` is B. Both are fp32 whatever the model's dtype is.

    Linear: down (rank, in), up (out, rank). Convolution: down (rank, in, k, k), up (out, rank, 1, 1).
    """

    def __init__(self, host: nn.Linear | nn.Conv2d, rank: int, scale: float, generator: torch.Generator):
        super().__init__()
        self.scale = scale
        if isinstance(host, nn.Conv2d):
            down_shape: tuple[int, ...] = (rank, host.in_channels, *host.kernel_size)
            up_shape: tuple[int, ...] = (host.out_channels, rank, 1, 1)
        else:
            down_shape, up_shape = (rank, host.in_features), (host.out_features, rank)
        self.host_geometry = (host.stride, host.padding, host.dilation) if isinstance(host, nn.Conv2d) else None
        # Uniform in +-1/sqrt(fan in), PyTorch's and peft's start for A; B starts at zero, so that the start is a no-op.
        bound = 1 / math.sqrt(math.prod(down_shape[1:]))
        self.down = nn.Parameter((torch.rand(down_shape, generator=generator) * 2 - 1) * bound)
        self.up = nn.Parameter(torch.zeros(up_shape))

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def is_spatial(self) -> bool:
        """Whether the host is a convolution of more than 1x1."""
        return math.prod(self.down.shape[2:]) > 1

    def forward(self, x: Tensor) -> Tensor:
        """The update's share of the host's output, for the host's input x."""
        if not torch.is_autocast_enabled(x.device.type):  # a frozen text encoder in half precision is called so
            x = x.to(self.down.dtype)
        if self.host_geometry is None:
            return linear(linear(x, self.down) * self.scale, self.up)
        return F.conv2d(F.conv2d(x, self.down, None, *self.host_geometry) * self.scale, self.up)  # type: ignore[arg-type]


class Lora(nn.Module):
    """All updates of one adapter, by (part, module path); parts are "unet", "text_encoder", "text_encoder_2".

    dropout: share of each update's inputs that is dropped while training, see `set_dropout_samples`.
    """

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.layers: dict[tuple[str, str], LoraLayer] = {}
        self.dropout = dropout
        self._samples: tuple[int, int, Sequence[int]] | None = None
        self._store = nn.ModuleList()
        self._adapted: list[_ForwardPatch] = []
        self.enabled = True

    def add(self, part: str, path: str, host: nn.Linear | nn.Conv2d, layer: LoraLayer) -> None:
        """Let `layer` update `host`, which is `part`'s module at `path`."""
        self.layers[part, path] = layer
        self._store.append(layer)

        adapted = _ForwardPatch(self, host, layer, part, path)
        adapted.install()
        self._adapted.append(adapted)

    def set_dropout_samples(self, seed: int, step: int, places: Sequence[int]) -> None:
        """Say which samples come next: what is dropped of each is a function of (seed, layer, step, its place).

        places: of the batch's samples in the global batch, so that the same is dropped however that is split, and again
        where activations are computed twice. A batch of several times as many samples has others at the same places
        after them, such as a prior's. Text encoders are given distinct captions and not samples: of all captions of a
        step the same numbers are dropped.
        """
        self._samples = (seed, step, places)

    def dropped(self, x: Tensor, part: str, path: str) -> Tensor:
        """A layer's input (rows, ...) with a share of its numbers 0 and the others larger by as much."""
        if self._samples is None:
            raise AdapterError(
                "dropout wants to know which samples these are; call set_dropout_samples() before each batch."
            )
        seed, step, places = self._samples
        count = len(places)
        rows = [(row // count, places[row % count]) for row in range(len(x))] if part == "unet" else [(0, 0)]
        draws, drawn = torch.Generator(x.device), torch.empty(len(rows), *x.shape[1:], device=x.device)
        for numbers, (again, place) in zip(drawn, rows, strict=True):
            draws.manual_seed(randomness.seed_of(seed, f"dropout {again}/{part}/{path}", step, place))
            torch.rand(numbers.shape, generator=draws, out=numbers)
        return (x / (1 - self.dropout)).masked_fill(drawn < self.dropout, 0)

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
        return [layer.up for layer in self.layers.values()]

    def modules_by_target(self) -> dict[tuple[str, str], LoraModule]:
        """The updates as `sfumato.files.write_lora` takes them; they share the layers' memory."""
        return {
            key: LoraModule.from_scale(layer.down.detach(), layer.up.detach(), layer.scale)
            for key, layer in self.layers.items()
        }

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
        layers = [layer for (part, _), layer in self.layers.items() if part == "unet"]
        before = [layer.scale for layer in layers]
        try:
            for layer in layers:
                layer.scale *= factor
            yield
        finally:
            for layer, scale in zip(layers, before, strict=True):
                layer.scale = scale

    def detach(self) -> None:
        """Let the layers compute as they did before; the model is the base for good."""
        while self._adapted:
            self._adapted.pop().remove()

    def load(self, values: Mapping[tuple[str, str], tuple[Tensor, Tensor, float]], name: str) -> None:
        """Start from another adapter: (down, up, alpha) for every layer, which must match in place and rank.

        The other's scale is folded into `up`, so that the delta is the other's to fp32 rounding.
        """
        missing, extra = self.layers.keys() - values.keys(), values.keys() - self.layers.keys()
        if missing or extra:
            first = sorted(missing or extra)[0]
            raise AdapterError(
                f"{name}: has {len(values)} modules, this run trains {len(self.layers)}; {len(missing)} missing and "
                f"{len(extra)} extra, first {'.'.join(first)}. Give the --targets, --conv and --train-text-encoder it "
                "was trained with."
            )
        for key, (down, up, alpha) in values.items():
            layer = self.layers[key]
            if down.shape != layer.down.shape or up.shape != layer.up.shape:
                own = "--conv-rank" if layer.is_spatial else "--rank"
                raise AdapterError(
                    f"{name}: {'.'.join(key)} has rank {down.shape[0]} and shape {tuple(up.shape)}, this run has rank "
                    f"{layer.rank} and shape {tuple(layer.up.shape)}. Give its own {own}, and its own base."
                )
            with torch.no_grad():
                layer.down.copy_(down)
                layer.up.copy_(up * (alpha / layer.rank / layer.scale))


class _ForwardPatch:
    """A layer's `forward` with its update. An object and not a function, so that a copy of the model is of its own."""

    def __init__(self, lora: Lora, host: nn.Linear | nn.Conv2d, layer: LoraLayer, part: str, path: str) -> None:
        self._lora, self._host, self._layer, self._part, self._path = lora, host, layer, part, path
        self._as_it_is, self._had_its_own = host.forward, "forward" in vars(host)

    def install(self) -> None:
        """Compute in the layer's place."""
        self._host.forward = self  # type: ignore[method-assign, assignment]

    def remove(self) -> None:
        """Let the layer compute as it did."""
        del self._host.forward
        if self._had_its_own:
            self._host.forward = self._as_it_is  # type: ignore[method-assign]

    def __call__(self, x: Tensor) -> Tensor:
        lora, host, layer = self._lora, self._host, self._layer
        drops = lora.dropout and lora.training
        if lora.enabled and not drops:
            both = folded(host, layer.down, layer.up, layer.scale, x)
            if both is not None:
                return both
        output = self._as_it_is(x)
        if not lora.enabled:
            return output
        update: Tensor = layer(lora.dropped(x, self._part, self._path) if drops else x)
        return output + update.to(output.dtype)


def select(model: nn.Module, pattern: str, *, conv: bool = False) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of `model` whose module path matches `pattern`; with `conv` also its blocks'
    convolutions, whatever the pattern.

    1x1 convolutions count as linear ones, which they are. An empty choice is an AdapterError.
    """
    if not pattern.strip():
        raise AdapterError(f"--targets is empty; give one of {', '.join(TARGETS)}, or a regular expression.")
    expression = TARGETS.get(pattern, pattern)
    try:
        compiled = re.compile(f"(?:{expression})" + (f"|(?:{CONV_TARGETS})" if conv else ""))
    except re.error as error:
        raise AdapterError(
            f"--targets {pattern!r} is neither one of {', '.join(TARGETS)} nor a regular expression ({error})."
        ) from None
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and compiled.search(name)
    }
    if not chosen:
        raise AdapterError(
            f"--targets {pattern!r} matches none of the model's layers; use one of {', '.join(TARGETS)} or a "
            r"regular expression over names such as down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q."
        )
    return chosen


def target_layers(
    parts: Mapping[str, nn.Module], targets: str, *, conv: bool = False
) -> dict[str, dict[str, nn.Linear | nn.Conv2d]]:
    """What `attach` adapts of each part: by `targets` and `conv` of the U-Net, all of the text encoders' blocks."""
    return {
        part: select(model, targets, conv=conv) if part == "unet" else select(model, TEXT_TARGETS)
        for part, model in parts.items()
    }


def rank_notes(
    parts: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]], rank: int, conv_rank: int | None = None
) -> list[str]:
    """A line on the layers that are narrower than their rank. parts, conv_rank: as of `attach`.

    Raises AdapterError where all are: the update would hold more numbers than the layers, and learn no more. And where
    no layer has the convolutions' rank.
    """
    every = [host for some in parts.values() for host in some.values()]
    if conv_rank is None:
        return _rank_notes("--rank", rank, "layer", every)
    wide = [host for host in every if is_spatial(host)]
    if not wide:
        raise AdapterError(
            "--conv-rank and --conv-alpha are for convolutions of more than 1x1, and none is adapted; add --targets "
            "everything, or leave them out."
        )
    others = [host for host in every if not is_spatial(host)]
    of_others = _rank_notes("--rank", rank, "layer", others) if others else []
    return of_others + _rank_notes("--conv-rank", conv_rank, "convolution", wide)


def _rank_notes(option: str, rank: int, kind: str, hosts: Sequence[nn.Linear | nn.Conv2d]) -> list[str]:
    widths = [min(host.weight.shape[0], host.weight[0].numel()) for host in hosts]
    narrow = [width for width in widths if width < rank]
    if len(narrow) == len(widths):
        raise AdapterError(
            f"{option} {rank}: the widest {kind} has {max(widths)} directions, and a change of it no more; wanted at "
            "most that, of which 4 to 128 is usual."
        )
    if not narrow:
        return []
    are, least, most = "is" if len(narrow) == 1 else "are", min(narrow), max(narrow)
    between = f"{least}" if least == most else f"{least} to {most}"
    return [
        f"{option} {rank}: {len(narrow)} of {pluralize(len(widths), kind)} {are} narrower ({between}), where it takes "
        "memory and learns no more"
    ]


def is_spatial(host: nn.Linear | nn.Conv2d) -> bool:
    """Whether the layer is a convolution of more than 1x1, which is what has conv_dim in sd-scripts."""
    return isinstance(host, nn.Conv2d) and math.prod(host.kernel_size) > 1


def attach(
    parts: Mapping[str, Mapping[str, nn.Linear | nn.Conv2d]],
    *,
    rank: int,
    alpha: float,
    conv_rank: int | None = None,
    conv_alpha: float | None = None,
    dropout: float = 0.0,
    rank_stabilised: bool = False,
    seed: int = 0,
) -> Lora:
    """A new adapter on the selected layers of each part; it changes nothing until it is trained.

    parts: "unet", "text_encoder", ... -> what `select` chose in it. The scale is alpha / rank, or alpha / sqrt(rank)
    when rank-stabilised (Kalajdzievski 2023). conv_rank, conv_alpha: of convolutions of more than 1x1, where they have
    their own. Each layer's start is a function of (seed, part, path): adding a target does not change how the others
    start.
    """
    lora = Lora(dropout)
    wide = (rank if conv_rank is None else conv_rank, alpha if conv_alpha is None else conv_alpha)
    for part, chosen in parts.items():
        for path, host in chosen.items():
            own_rank, own_alpha = wide if is_spatial(host) else (rank, alpha)
            scale = own_alpha / (math.sqrt(own_rank) if rank_stabilised else own_rank)
            layer = LoraLayer(host, own_rank, scale, randomness.generator(seed, f"lora/{part}/{path}"))
            lora.add(part, path, host, layer.to(host.weight.device))
    return lora
