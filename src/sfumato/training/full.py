"""Training a base's own weights, and what is written of it: a whole folder, the difference, or an extracted LoRA."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sfumato.errors import AdapterError, FileError
from sfumato.files.fingerprint import KEY, Row, fingerprint_of, rows
from sfumato.files.kohya import Target, kohya_name
from sfumato.files.read import is_finite
from sfumato.files.save import cast, check_metadata, model_folder, write_one_by_one
from sfumato.numerals import so_many
from sfumato.precision.tensors import dtype_name

if TYPE_CHECKING:
    from sfumato.bases import Base
    from sfumato.precision import Precision


_LEAVES = {
    ("weight", False): "diff",
    ("bias", False): "diff_b",
    ("weight", True): "w_norm",
    ("bias", True): "b_norm",
}
"""(parameter's name, whether its module is a normalisation) -> LyCORIS' name for its change."""


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


def write_folder(base: Base, path: Path, dtype: torch.dtype) -> Path:
    """The base as a complete diffusers folder, whole or not at all. Its models are cast to `dtype` for good.

    An earlier base of that name is replaced. Raises FileError for another folder of the name, for weights that are not
    finite in `dtype`, and for a disk that does not take them.
    """
    if path.exists() and not (path / "model_index.json").is_file():
        raise FileError(f"{path}: holds something that is no base, so it was not replaced. Move it, or give --name.")
    pipe = base.pipeline()
    pipe.scheduler = base.scheduler  # the base's own, not what sfumato draws with
    for part in (base.unet, base.vae, *base.text_encoders):
        nn.Module.to(part, dtype)
        _check_finite(part, dtype, path)
    with model_folder(path) as temporary:
        pipe.save_pretrained(str(temporary), safe_serialization=True)
    return path


def _check_finite(module: nn.Module, dtype: torch.dtype, path: Path) -> None:
    broken = [name for name, tensor in module.state_dict().items() if not is_finite(tensor)]
    if broken:
        raise FileError(
            f"{path.name}: {so_many(len(broken), 'weight is', 'weights are')} not finite in {dtype_name(dtype)}, first "
            f"{broken[0]}, so nothing was written. Save in fp32, or use an earlier checkpoint."
        )


def changed_weights(after: Mapping[str, nn.Module], before: Mapping[str, nn.Module]) -> Iterator[tuple[Target, str]]:
    """((part, module path), "weight" or "bias") of every weight that is not what it was."""
    for part, module in after.items():
        old = dict(before[part].named_parameters())
        for name, tensor in module.named_parameters():
            if not torch.equal(tensor.detach(), old[name].detach().to(tensor)):
                path, _, leaf = name.rpartition(".")
                yield (part, path), leaf


def write_difference(
    path: Path,
    after: Mapping[str, nn.Module],
    before: Mapping[str, nn.Module],
    *,
    family: str,
    metadata: Mapping[str, str],
    dtype: torch.dtype,
) -> int:
    """What training changed, as one safetensors in LyCORIS' names (`.diff`, `.diff_b`, `.w_norm`); how many modules.

    A mix adds it to the base at any weight. after, before: models by part. One change is held at a time. Raises
    AdapterError where nothing changed or a module has no name in the grammar, FileError for values that are not finite
    in `dtype`.
    """

    def change(key: str) -> Tensor:
        (part, place), leaf = places[key]
        now, then = (models[part].get_parameter(f"{place}.{leaf}").detach() for models in (after, before))
        return cast(now.float().cpu() - then.float().cpu(), dtype, key, path)

    places: dict[str, tuple[Target, str]] = {}
    shapes: dict[str, Tensor] = {}
    found: dict[str, Row] = {}
    modules: set[str] = set()
    for target, leaf in changed_weights(after, before):
        part, place = target
        name = kohya_name(family, part, place)
        modules.add(name)
        is_norm = after[part].get_parameter(f"{place}.weight").ndim == 1
        key = f"{name}.{_LEAVES[leaf, is_norm]}"
        places[key] = target, leaf
        delta = change(key)
        shapes[key] = delta.to("meta")
        if delta.ndim > 1:
            # Of what is written: the change of a small rate may be near the least that fp16 holds.
            found |= rows({target: delta})
    if not shapes:
        raise AdapterError(f"{path.name}: no weight differs from the base's, so there is nothing to write.")
    described = {**metadata, "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo":"full"}'}
    described |= {"ss_network_dim": "", "ss_network_alpha": ""}
    described = {key: value for key, value in described.items() if value != ""}
    described[KEY] = fingerprint_of(found)
    check_metadata(described, path)
    write_one_by_one(path, shapes, change, described)
    return len(modules)


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
