"""Training a base's own weights, and what is written of it: a whole folder, the difference, or an extracted LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sfumato.errors import AdapterError, ConfigError, FileError
from sfumato.files.module_names import Target
from sfumato.files.read import is_finite
from sfumato.files.save import atomic_model_folder
from sfumato.models.text import make_portable
from sfumato.precision import DTYPES, decide
from sfumato.precision.quantization import dtype_name
from sfumato.training.optim import fused_backward
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.precision import Precision
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.options import FullOptions


def decide_precision(config: FullOptions, processes: Processes, *, adapting: bool = False) -> Precision:
    """The precision of a base whose own weights are trained, or with `adapting` of one beside an adapter. Raises
    ConfigError where --fused is impossible."""
    precision = config.decide_precision(processes, config.optimizer, adapting=adapting)
    if not adapting:
        precision = full_precision(precision, eight_bit=config.optimizer == "adamw8bit")
    if config.fused:
        fused_backward.check_fused(
            accumulate=config.accumulate,
            micro_batch=config.micro_batch,
            processes=processes.count,
            optimizer=config.optimizer,
            scaled=precision.scaler().is_enabled() and not config.clip,
        )
    return precision


def full_precision(precision: Precision, *, eight_bit: bool = False) -> Precision:
    """The same decision for a base whose own weights are trained: they are read and kept in fp32, and still computed
    with in `compute`. A start rounded to half precision would be a change of the base that nobody asked for; so would
    be a VAE rounded so, which is written again with the whole folder.

    eight_bit: whether an 8-bit optimizer trains them: bitsandbytes lays weights out anew at its first step, and its
    moments then are where the weights were, so that they are never channels_last.
    """
    reasons = {
        **precision.reasons,
        "frozen weights": "the base's own weights are trained, so they are read in fp32",
        "VAE": "written again beside the trained weights, so it is read in fp32",
    }
    if eight_bit and precision.channels_last:
        reasons["channels last"] = "the 8-bit optimizer undoes it"
    channels_last = precision.channels_last and not eight_bit
    return dataclasses.replace(
        precision,
        storage=torch.float32,
        vae=torch.float32,
        channels_last=channels_last,
        reasons=MappingProxyType(reasons),
    )


def unfreeze(base: Base, *, text: bool) -> nn.ModuleDict:
    """The base's own U-Net, and with `text` its text encoders, to be trained; their weights must be fp32."""
    parts = base.parts(text=text)
    for name, module in parts.items():
        halves = [parameter.dtype for parameter in module.parameters() if parameter.dtype != torch.float32]
        if halves:
            raise AdapterError(f"{name} is held in {halves[0]}; load the base with full_precision() to train it.")
        module.requires_grad_(True)
    return nn.ModuleDict(parts)


@torch.no_grad()
def make_inpainting(base: Base) -> None:
    """Widen the U-Net's first layer by what `Base.known` gives, with weights of zero: it predicts as before, whatever
    is known, until it has learned. Raises ConfigError for a base that is an inpainting model already."""
    if base.inpaints:
        raise ConfigError(f"--inpainting: {base.name} is an inpainting model already; leave it out.")
    base.lazy_weights.load("unet")
    layer, channels = base.denoiser.conv_in, base.vae.config.latent_channels
    new = layer.weight.new_zeros(len(layer.weight), channels + 1, *layer.weight.shape[2:])
    layer.weight = nn.Parameter(torch.cat([layer.weight, new], dim=1), requires_grad=False)
    layer.in_channels += channels + 1
    base.denoiser.register_to_config(in_channels=layer.in_channels)


def write_model(path: Path, base: Base, config: FullOptions, run: Run, about: Description) -> None:
    """Write the base's own weights after training, in the form that was asked for. config: resolved."""
    from sfumato.files import describe

    assert config.save_precision is not None
    dtype = DTYPES[config.save_precision]
    if config.save == "folder":
        write_folder(base, path, dtype)
        return
    # On the CPU: beside what has learned, with its optimizer's state, a GPU may have no room for another.
    original = config.load_base(full_precision(decide("fp32", device="cpu")))
    original.lazy_weights.load_only("unet", *(("text",) if config.train_text_encoder else ()))
    after, before = (one.parts(text=config.train_text_encoder) for one in (base, original))
    as_file: dict[str, Any] = {"family": base.family.name, "metadata": describe(about), "dtype": dtype}
    if config.save == "difference":
        count = write_changes(path, after, before, **as_file)
        run.say(f"{pluralize(count, 'module differs', 'modules differ')} from the base's")
    else:
        run.say(write_extracted(path, after, before, rank=config.rank, keep_energy=config.keep_energy, **as_file))


def write_folder(base: Base, path: Path, dtype: torch.dtype) -> Path:
    """The base as a complete diffusers folder, whole or not at all. Its models are cast to `dtype` for good.

    An earlier base of that name is replaced. Raises FileError for another folder of the name, for weights that are not
    finite in `dtype`, and for a disk that does not take them.
    """
    if path.exists() and not (path / "model_index.json").is_file():
        raise FileError(f"{path}: holds something that is no base, so it was not replaced. Move it, or give --name.")
    pipe = base.pipeline()
    pipe.scheduler = base.scheduler  # the base's own, not what sfumato draws with
    for part in (base.denoiser, base.vae, *base.text_encoders):
        nn.Module.to(part, dtype)
        _check_finite(part, dtype, path)
    with atomic_model_folder(path) as temporary:
        pipe.save_pretrained(str(temporary), safe_serialization=True)
        make_portable(temporary, pipe)
    return path


def _check_finite(module: nn.Module, dtype: torch.dtype, path: Path) -> None:
    broken = [name for name, tensor in module.state_dict().items() if not is_finite(tensor)]
    if broken:
        raise FileError(
            f"{path.name}: {pluralize(len(broken), 'weight is', 'weights are')} not finite in {dtype_name(dtype)}, "
            f"first {broken[0]}, so nothing was written. Save in fp32, or use an earlier checkpoint."
        )


class ModuleDifferences(Mapping[Target, tuple[Tensor | None, Tensor | None]]):
    """What training changed: for each module, by part and path, the differences of its weight and of its bias in fp32
    on the CPU, None for what is what it was. Each is taken when it is asked for.

    after, before: models by part, of the same shapes.
    """

    def __init__(self, after: Mapping[str, nn.Module], before: Mapping[str, nn.Module]) -> None:
        self._after, self._before = after, before
        self._leaves: dict[Target, set[str]] = {}
        for part, module in after.items():
            old = dict(before[part].named_parameters())
            for name, tensor in module.named_parameters():
                if not torch.equal(tensor.detach(), old[name].detach().to(tensor)):
                    path, _, leaf = name.rpartition(".")
                    self._leaves.setdefault((part, path), set()).add(leaf)

    def __getitem__(self, target: Target) -> tuple[Tensor | None, Tensor | None]:
        part, path = target
        leaves = self._leaves[target]
        now, then = (models[part].get_submodule(path) for models in (self._after, self._before))
        return _difference("weight", leaves, now, then), _difference("bias", leaves, now, then)

    def __iter__(self) -> Iterator[Target]:
        return iter(self._leaves)

    def __len__(self) -> int:
        return len(self._leaves)


def _difference(leaf: str, leaves: Collection[str], now: nn.Module, then: nn.Module) -> Tensor | None:
    if leaf not in leaves:
        return None
    new, old = (module.get_parameter(leaf).detach().float().cpu() for module in (now, then))
    return new - old


def write_changes(
    path: Path,
    after: Mapping[str, nn.Module],
    before: Mapping[str, nn.Module],
    *,
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> int:
    """What training changed, as one safetensors that a mix adds to the base at any weight; how many modules.

    after, before: models by part. Raises AdapterError where nothing changed, else as `write_difference`.
    """
    from sfumato.files.writing.kohya import write_difference

    differences = ModuleDifferences(after, before)
    if not differences:
        raise AdapterError(f"{path.name}: no weight differs from the base's, so there is nothing to write.")
    write_difference(path, differences, family=family, metadata=metadata, dtype=dtype)
    return len(differences)


def write_extracted(
    path: Path,
    after: Mapping[str, nn.Module],
    before: Mapping[str, nn.Module],
    *,
    rank: int | None,
    keep_energy: float | None,
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> str:
    """The best LoRA of what training changed, layer by layer (Eckart & Young 1936); a line on what it keeps.

    rank, keep_energy: how much of each layer's change is kept, see `sfumato.merging.factors.Budget`. Biases and norms
    have no low-rank form; the line says how much they hold. Raises as `write_lora` and `extract` do.
    """
    from sfumato.files import write_lora
    from sfumato.merging.extract import extract
    from sfumato.merging.factors import Budget

    pairs = (
        ((part, name), before[part].get_parameter(name), tensor)
        for part, module in after.items()
        for name, tensor in module.named_parameters()
    )
    modules, kept = extract(pairs, Budget(rank, keep_energy))
    described = {**metadata, "sfumato.kept_energy": f"{kept.share:.4f}"}
    write_lora(path, modules, family=family, metadata=described, dtype=dtype)
    ranks = sorted(module.rank for module in modules.values())
    return f"the LoRA of rank {ranks[0]} to {ranks[-1]} in {len(ranks)} layers {kept}"
