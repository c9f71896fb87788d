"""What training and drawing take of a device's memory, told from a base's shapes before any weight is read.

A step is done with tensors that have shapes and no memory (imagined.py), layer by layer as the trainers do it, and at
each operation is counted what is alive: what the backward pass waits for, what lies between two layers, and gradients.
What is not seen by torch comes on top: the libraries, a GPU's context, the scratch space of its kernels.
"""

from __future__ import annotations

import os
import re
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sfumato.adapters import ByLayer, Kind, attach
from sfumato.adapters.kinds import LORA
from sfumato.adapters.targets import NO_LAYER_RULES
from sfumato.data.preparation.latents import encode_batch_size
from sfumato.errors import BaseModelError, ConfigError
from sfumato.generation.decoding import decode_batch_size
from sfumato.generation.draw import drawn_at_once
from sfumato.models.loading import base_skeleton, family_skeleton
from sfumato.precision import cpu_matmul, decide
from sfumato.precision.fake_tensors import FakeMode, storage_of
from sfumato.precision.layers import save_activation_memory
from sfumato.training.optim.optimizers import state_bytes
from sfumato.training.optim.settings import OptimizerName

if TYPE_CHECKING:
    from sfumato.models import Base
    from sfumato.precision import Precision

RUNTIME_BYTES = {"cpu": 0.85 * 2**30, "gpu": 0.75 * 2**30}
"""Bytes besides tensors: on a CPU the libraries and what the allocator keeps, as bench/forecast.py found it; a GPU's
context and scratch space are put at this, and were never measured."""
PICTURES, SAMPLES = 16, 4
"""Pictures of a data set and samples of a training, of which no more are encoded or drawn at once."""
PUBLISHED = ("sd1", "sd2", "sdxl")
"""Families whose configs travel with the package."""


@dataclass(frozen=True)
class TrainingTask:
    """One way to train: what is trained, and with which options.

    trained: what has gradients and an optimizer's state. pictures: that a step sees for one of the batch, two where
    half of them hold a class. text: the text encoders are in the loop.
    """

    options: str
    trained: Literal["words", "lora", "whole"]
    pictures: int = 1
    targets: str = "cross-attention"
    text: bool = False
    fused: bool = False
    optimizer: OptimizerName = "adamw"


def _of_all_weights(options: str, pictures: int) -> tuple[TrainingTask, ...]:
    """A trainer of a base's own weights, as it is and with all that saves memory. pictures: as of `Training`."""
    plain = TrainingTask(options, "whole", pictures=pictures)
    fused = replace(plain, options=f"{options} --fused", fused=True)
    smaller: tuple[OptimizerName, ...] = ("adamw8bit", "adafactor")
    lean = (replace(fused, options=f"{fused.options} --optimizer {name}", optimizer=name) for name in smaller)
    return (plain, fused, *lean)


TRAININGS = (
    TrainingTask("textual_inversion", "words", text=True),
    TrainingTask("lora --targets cross-attention", "lora"),
    TrainingTask("lora --targets everything", "lora", targets="everything"),
    TrainingTask("lora --targets cross-attention --train-words", "lora", text=True),
    TrainingTask("dreambooth --method lora", "lora", targets="everything", pictures=2),
    *_of_all_weights("dreambooth --method full", pictures=2),
    *_of_all_weights("finetune", pictures=1),
)


@dataclass(frozen=True)
class MemorySetting:
    """Where and in which size: precision of `forecast_precision`, side in pixels; batch, ranks and kind of adapters as
    of trainers. by_layer: what of it fits no layer of a way to train is passed over."""

    device: Literal["gpu", "cpu"]
    precision: Precision
    side: int
    batch: int
    rank: int
    conv_rank: int | None = None
    kind: Kind = LORA
    by_layer: ByLayer = NO_LAYER_RULES
    checkpointing: bool = False


def fake_base(
    source: str | os.PathLike[str], device: str, vae: str | None = None, prediction_type: str | None = None
) -> Base:
    """The base at rest, its U-Net as trainers on this device have it. Raises as `load_base`.

    source: as of `load_base`, or the name of a family for its published shapes, of which no file need be there.
    """
    if source in PUBLISHED and not Path(source).exists():
        if vae is not None:
            raise ConfigError(
                f"--vae {vae}: --base {source} names no model, only its family's shapes; leave --vae out."
            )
        base = family_skeleton(str(source), prediction_type)
    elif re.fullmatch(r"\w+", str(source)) and source != "pocket" and not Path(source).exists():
        raise BaseModelError(
            f"--base {source}: no model here, and no family. Wanted pocket, a diffusers folder, a hub id (owner/name), "
            f"a .safetensors file, or {', '.join(PUBLISHED)} for a family's usual shapes."
        )
    else:
        base = base_skeleton(source, precision=decide("fp32", device="cpu"), vae=vae, prediction_type=prediction_type)
    if device == "cpu":
        cpu_matmul.use_fast_matmul(base.denoiser)
        save_activation_memory(base.denoiser)
    return base


@dataclass(frozen=True)
class StepMemory:
    """What a training step takes, in bytes: `weights` that are there all the time, the most that is alive beside them,
    with all gradients until its end or, `fused`, with one at a time; and the shapes of what is `trained`."""

    weights: int
    alive: int
    fused: int
    trained: tuple[torch.Size, ...]

    def total(self, way: TrainingTask, device: Literal["gpu", "cpu"]) -> int:
        """With the optimizer's state and what torch does not see."""
        state = sum(state_bytes(way.optimizer, shape) for shape in self.trained)
        return int(self.weights + state + (self.fused if way.fused else self.alive) + RUNTIME_BYTES[device])


def step_memory(base: Base, way: TrainingTask, setting: MemorySetting) -> StepMemory:
    """A training step at its peak. base: of `shapes_of`, which stays as it is.

    `way.fused` and `way.optimizer` make no difference here, see `StepMemory.total`.
    """
    whole = way.trained == "whole"
    base.denoiser.requires_grad_(whole)
    if setting.checkpointing:
        base.denoiser.enable_gradient_checkpointing()
    adapter = None
    if way.trained == "lora":
        ranks: dict[str, Any] = {"rank": setting.rank, "alpha": float(setting.rank), "conv_rank": setting.conv_rank}
        adapted = setting.by_layer.without_excluded(setting.kind.targets(base.parts(text=False), way.targets))
        adapter = attach(adapted, **ranks, kind=setting.kind, by_layer=setting.by_layer)
    texts = list(base.text_encoders) if way.text else []
    if whole:
        setting = replace(setting, precision=replace(setting.precision, storage=torch.float32))
    try:
        stored = setting.precision.storage
        with _fake_weights(base.denoiser, stored), _fake_weights(adapter), _cast_all(texts, stored):
            learned = [
                p for module in (adapter or base.denoiser, *texts) for p in module.parameters() if p.requires_grad
            ]
            with _norms_in_fp32(base.denoiser, setting):
                alive = _step(base, way, setting, learned)
            return StepMemory(
                weights=_bytes_of(base.denoiser, *texts, *([adapter] if adapter else [])) + _vae_in_loop(base, setting),
                alive=alive.peak_with_gradients,
                fused=alive.peak,
                trained=tuple(p.shape for p in learned),
            )
    finally:
        base.denoiser.requires_grad_(False)
        base.denoiser.disable_gradient_checkpointing()
        if adapter is not None:
            adapter.detach()


def _vae_in_loop(base: Base, setting: MemorySetting) -> int:
    """Bytes of the VAE beside a training of an inpainting model, which hides another part of an image at each step."""
    with _cast_all([base.vae], setting.precision.vae):
        return _bytes_of(base.vae) if base.inpaints else 0


def encoding_memory(base: Base, setting: MemorySetting) -> int:
    """Bytes at the peak of encoding pictures, before the first step: the VAE and the text encoders are there."""
    precision, count = setting.precision, min(PICTURES, encode_batch_size(setting.side, setting.side))
    with _cast_all([base.vae], precision.vae), _cast_all(base.text_encoders, precision.storage):
        weights = _bytes_of(base.vae, *base.text_encoders)
        with torch.no_grad(), _Alive(base.vae) as alive:
            base.vae.encode(_zeros(count, 3, setting.side, setting.side, dtype=precision.vae))
    return int(weights + alive.peak + RUNTIME_BYTES[setting.device])


def samples_at_once(base: Base, setting: MemorySetting) -> int:
    """How many of a training's samples are drawn at once."""
    return min(SAMPLES, drawn_at_once((setting.side // base.vae_factor) ** 2))


def drawing_memory(base: Base, setting: MemorySetting, count: int = 1, *, offload: bool = False) -> int:
    """Bytes at the peak of drawing `count` pictures at once with guidance, all parts of the base being there, or with
    `offload` the one that computes."""
    precision = setting.precision
    with _cast_all([base.denoiser, *base.text_encoders], precision.storage), _cast_all([base.vae], precision.vae):
        encoders = [_bytes_of(encoder) for encoder in base.text_encoders]
        unet, vae = _bytes_of(base.denoiser), _bytes_of(base.vae)
        with torch.no_grad(), _Alive(base.denoiser) as drawn, precision.autocast():
            _predict(base, setting, 2 * count, _text(base, setting, 2 * count))
        with torch.no_grad(), _Alive(base.vae) as decoded:
            latents = _latents(base, setting, count).to(precision.vae)
            base.vae.decode(latents[: decode_batch_size(latents)] if setting.device == "gpu" else latents)
    if offload:
        return int(max(*encoders, unet + drawn.peak, vae + decoded.peak) + RUNTIME_BYTES[setting.device])
    return int(sum(encoders) + unet + vae + max(drawn.peak, decoded.peak) + RUNTIME_BYTES[setting.device])


def _step(base: Base, way: TrainingTask, setting: MemorySetting, learned: list[nn.Parameter]) -> _Alive:
    count = setting.batch * way.pictures
    leaves: list[Tensor] = []
    alive = _Alive(base.denoiser, *base.text_encoders, *learned)
    with alive:
        with setting.precision.autocast():
            text = _encoded(base, count, leaves) if way.text else _text(base, setting, count)
            error = _predict(base, setting, count, text).float().square().mean()
        for weight in learned:
            weight.register_hook(alive.is_gradient)  # type: ignore[no-untyped-call]
        gradients = torch.autograd.grad(error, [*learned, *leaves], allow_unused=True)
        del gradients
    return alive


@contextmanager
def _norms_in_fp32(unet: nn.Module, setting: MemorySetting) -> Iterator[None]:
    """As a GPU's autocast has normalisations, whose inputs are kept in fp32; a CPU's leaves them in half precision."""
    is_cast = setting.device == "gpu" and setting.precision.compute != torch.float32
    norms = [module for module in unet.modules() if isinstance(module, nn.GroupNorm | nn.LayerNorm)]
    with ExitStack() as hooks:
        for norm in norms if is_cast else ():
            hooks.enter_context(norm.register_forward_pre_hook(lambda _, inputs: (inputs[0].float(),)))
        yield


def _predict(base: Base, setting: MemorySetting, count: int, text: tuple[Tensor, Tensor | None]) -> Tensor:
    hidden, pooled = text
    added = None if pooled is None else {"time_ids": _zeros(count, 6), "text_embeds": pooled}
    side = setting.side // base.vae_factor
    latents, times = _zeros(count, base.denoiser.config.in_channels, side, side), _zeros(count, dtype=torch.long)
    output: Tensor = base.denoiser(latents, times, hidden, added_cond_kwargs=added, return_dict=False)[0]
    return output


def _text(base: Base, setting: MemorySetting, count: int) -> tuple[Tensor, Tensor | None]:
    """Embeddings that were computed beforehand."""
    dtype, last = setting.precision.storage, base.text_encoders[-1].config
    hidden = _zeros(count, base.token_limit + 2, base.denoiser.config.cross_attention_dim, dtype=dtype)
    pooled = _zeros(count, last.projection_dim, dtype=dtype) if len(base.text_encoders) > 1 else None
    return hidden, pooled


def _encoded(base: Base, count: int, leaves: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    """Embeddings through which gradients flow back to the words, which join `leaves`."""

    def words(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    outputs = []
    for encoder in base.text_encoders:
        with encoder.get_input_embeddings().register_forward_hook(words):
            ids = _zeros(count, base.token_limit + 2, dtype=torch.long)
            outputs.append(encoder(ids, output_hidden_states=True))
    if len(outputs) == 1:
        return outputs[0].last_hidden_state, None
    return torch.cat([output.hidden_states[-2] for output in outputs], dim=-1), outputs[-1].text_embeds


def _latents(base: Base, setting: MemorySetting, count: int) -> Tensor:
    side = setting.side // base.vae_factor
    return _zeros(count, base.vae.config.latent_channels, side, side)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def _bytes_of(*modules: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for module in modules for p in [*module.parameters(), *module.buffers()])


@contextmanager
def _cast_all(modules: Sequence[nn.Module], dtype: torch.dtype) -> Iterator[None]:
    with nullcontext() if not modules else _fake_weights(nn.ModuleList(modules), dtype):
        yield


@contextmanager
def _fake_weights(module: nn.Module | None, dtype: torch.dtype = torch.float32) -> Iterator[None]:
    """Within the block the module's numbers, which are on the device `meta`, seem to be there, and of this dtype."""
    kept = []
    for owner in module.modules() if module is not None else ():
        for name, value in [*owner.named_parameters(recurse=False), *owner.named_buffers(recurse=False)]:
            kept.append((owner, name, value))
    with FakeMode():
        for owner, name, value in kept:
            new = torch.zeros(value.shape, dtype=dtype if value.is_floating_point() else value.dtype)
            is_weight = isinstance(value, nn.Parameter)
            setattr(owner, name, nn.Parameter(new, requires_grad=value.requires_grad) if is_weight else new)
        try:
            yield
        finally:
            for owner, name, value in kept:
                setattr(owner, name, value)


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of tensors that operations within the block made and that are still there: `peak` is the most,
    without the gradients of weights, `peak_with_gradients` with them.

    known: modules and tensors that are there already, whose views are not counted.
    """

    def __init__(self, *known: nn.Module | Tensor):
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak, self.peak_with_gradients = 0, 0
        self._now, self._gradients = 0, 0
        tensors = [t for k in known for t in ([k] if isinstance(k, Tensor) else [*k.parameters(), *k.buffers()])]
        self._sizes: dict[int, int] = dict.fromkeys((storage_of(tensor)._cdata for tensor in tensors), 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else (result,):
            if isinstance(value, Tensor):
                self._count(storage_of(value))
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._sizes:
            self._sizes[key] = storage.nbytes()
            self._now += storage.nbytes()
            self.peak = max(self.peak, self._now)
            self.peak_with_gradients = max(self.peak_with_gradients, self._now + self._gradients)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self._now -= self._sizes.pop(key)

    def is_gradient(self, tensor: Tensor) -> None:
        """Count this one among the gradients, which stay until a step's end."""
        key = storage_of(tensor)._cdata
        # Size 0 from now on: `_now` is without it already, so that it loses nothing more when the tensor goes.
        size, self._sizes[key] = self._sizes[key], 0
        self._now -= size
        self._gradients += size
