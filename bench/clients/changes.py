"""Random adapters for the models of `models.py`: LoRA, every other kind, differences of norms."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from sfumato.files.kinds import Change, LoraModule
from sfumato.files.kinds.dora import Dora, Glora
from sfumato.files.kinds.ia3 import Difference, Ia3
from sfumato.files.kinds.lokr import Factor, Loha, Lokr
from sfumato.files.kinds.oft import OutputBoft, OutputOft
from sfumato.files.module_names import Target
from sfumato.utils.randomness import generator

RANK = 4
TENTH = 0.1


def random_lora(parts: Mapping[str, nn.Module], only: str) -> dict[Target, LoraModule]:
    """A LoRA of mixed ranks and alphas on every layer whose name holds `only`."""
    modules: dict[Target, LoraModule] = {}
    for part, model in parts.items():
        for path, layer in model.named_modules():
            if not isinstance(layer, nn.Linear | nn.Conv2d) or path == "text_projection" or only not in path:
                continue
            draws, inner = generator(0, f"{part}/{path}"), layer.weight.shape[1:]
            rank = 2 + len(modules) % 3
            down = torch.randn(rank, *inner, generator=draws) / inner.numel() ** 0.5
            up = torch.randn(layer.weight.shape[0], rank, *(1 for _ in inner[1:]), generator=draws) * 0.1
            modules[part, path] = LoraModule(down, up, (2.0, 5.0, 1.5)[len(modules) % 3])
    return modules


def matrix(draws: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=draws) * TENTH


def _lora(weight: Tensor, draws: torch.Generator) -> LoraModule:
    inner = weight.shape[1:]
    up = matrix(draws, weight.shape[0], RANK, *(1 for _ in inner[1:]))
    return LoraModule(matrix(draws, RANK, *inner), up, 2.0)


def _tucker(weight: Tensor, draws: torch.Generator) -> LoraModule:
    if weight.ndim == 2 or weight.shape[2:].numel() == 1:
        return _lora(weight, draws)
    out, inner, *kernel = weight.shape
    down, up = matrix(draws, RANK, inner, 1, 1), matrix(draws, out, RANK, 1, 1)
    return LoraModule(down, up, 2.0, matrix(draws, RANK, RANK, *kernel))


def _pair(weight: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
    return matrix(draws, weight.shape[0], 2), matrix(draws, 2, weight[0].numel())


KINDS: dict[str, Callable[[Tensor, torch.Generator], Change]] = {
    "Tucker": _tucker,
    "DoRA": lambda w, g: Dora(_lora(w, g), torch.rand(w.shape[0], generator=g) + 1, on_input=False),
    "LoHa": lambda w, g: Loha(_pair(w, g), _pair(w, g), 0.5),
    "LoKr": lambda w, g: Lokr(
        Factor(matrix(g, 2, 2)), Factor(matrix(g, w.shape[0] // 2, w.shape[1] // 2, *w.shape[2:])), 1.0
    ),
    "IA3": lambda w, g: Ia3(matrix(g, w.shape[0]), on_input=False),
    "OFT": lambda w, g: OutputOft(matrix(g, 4, w.shape[0] // 4, w.shape[0] // 4), 0.0, kohya=False),
    "BOFT": lambda w, g: OutputBoft(matrix(g, 2, w.shape[0] // 4, 4, 4), None),
    "GLoRA": lambda w, g: Glora(matrix(g, w.shape[1], RANK), matrix(g, RANK, w.shape[1]), _lora(w, g)),
    "difference": lambda w, g: Difference(matrix(g, *w.shape), matrix(g, w.shape[0])),
}
"""An adapter of each kind for a weight."""


def random_changes(parts: Mapping[str, nn.Module], kind: str) -> dict[Target, Change]:
    """That kind on linear layers and convolutions of all parts."""
    found: dict[Target, Change] = {}
    for part, model in parts.items():
        for path, layer in model.named_modules():
            if path.endswith(("attn2.to_k", "ff.net.2", "conv1", "conv_shortcut", "mlp.fc1", "mlp.fc2")):
                change = KINDS[kind](layer.weight.detach(), generator(0, f"{part}/{path}"))
                found[part, path] = change if layer.bias is not None else without_bias(change)
    return found


def without_bias(change: Change) -> Change:
    """A LoRA cannot hold one, and some layers have none."""
    return Difference(change.value) if isinstance(change, Difference) else change


def norm_changes(parts: Mapping[str, nn.Module]) -> dict[Target, Change]:
    """Differences of the weight and bias of every norm."""
    return {
        (part, path): Difference(matrix(draws, *layer.weight.shape), matrix(draws, *layer.weight.shape))
        for part, model in parts.items()
        for path, layer in model.named_modules()
        if isinstance(layer, nn.LayerNorm | nn.GroupNorm) and (draws := generator(0, f"{part}/{path}"))
        if "pre_layrnorm" not in path
    }
