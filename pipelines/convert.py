"""Convert an adapter to the file format of another tool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sfumato.adapters.weights import Adapter
from sfumato.cli import run
from sfumato.config import TypedConfig, parse
from sfumato.errors import AdapterError, ConfigError
from sfumato.generation.arguments.adapters import fitted_metadata
from sfumato.utils.atomic import check_overwrite
from sfumato.utils.formatting import pluralize, say

if TYPE_CHECKING:
    from sfumato.merging.merge import MergeSource
    from sfumato.merging.model_weights import StoredBase
    from sfumato.merging.sources import Parent


@dataclass(frozen=True)
class Config(TypedConfig):
    """Convert an adapter of any tool to the file format that another tool reads.

    Example: sfumato convert from-peft/ --to kohya -o line.safetensors
    """

    file: Path
    """Adapter to convert: a .safetensors file of any tool, or a folder of peft."""
    _: KW_ONLY
    output: Annotated[Path, Parameter(alias="-o")]
    """The .safetensors file to write; with --to peft, a folder."""
    to: Literal["kohya", "diffusers", "peft"] = "kohya"
    """Format to write. kohya: read by diffusers, ComfyUI, A1111/Forge, InvokeAI and sd-scripts. diffusers, peft: read
    by diffusers or peft only."""
    bake: Literal["lora", "diff"] | None = None
    """Convert kinds that are not LoRA. lora: to a LoRA within --rank or --keep-energy; the error is printed. diff: to
    full weight differences."""
    rank: int | None = None
    """With --bake lora: largest rank of each module."""
    keep_energy: float | None = None
    """With --bake lora: keep the smallest rank that holds this share of the squared norm of each module's change, such
    as 0.99."""
    base: str | None = None
    """With --bake: the base model that the adapter was made for. The change that most kinds make depends on its
    weights."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the written file."""
    family: Literal["pocket", "sd1", "sd2", "sdxl"] | None = None
    """Family of the base model. Set it if neither shapes nor metadata of the file say it."""
    partial: bool = False
    """Convert the part of a file that is understood, and leave out the rest."""
    overwrite: bool = False
    """Replace a file that exists."""


def convert(config: Config) -> Path:
    """Write the adapter as the config says. Returns the written file or folder."""
    check_overwrite(config.output, config.overwrite, folder=config.to == "peft", read=[config.base])
    if (config.output.suffix == ".safetensors") != (config.to != "peft"):
        raise ConfigError(
            f"--output {config.output}: wanted a {'folder' if config.to == 'peft' else '.safetensors file'}."
        )
    if config.bake != "lora" and (config.rank, config.keep_energy) != (None, None):
        raise ConfigError("--rank and --keep-energy belong to --bake lora; `sfumato resize` makes a LoRA smaller.")
    if config.bake is None and config.base is not None:
        raise ConfigError(f"--base {config.base}: nothing is taken on it without --bake; add --bake or leave it out.")

    from sfumato.generation.notes import no_effect_notes, skipped_key_notes
    from sfumato.merging.extract import as_lora, diffusers_warnings, write_format
    from sfumato.merging.factors import Budget
    from sfumato.merging.sources import common_family, optional_stored_base, read_source
    from sfumato.precision import DTYPES

    keeps_words = config.to == "kohya" and config.bake != "diff"
    source, parent = read_source(Adapter(config.file), partial=config.partial, words=keeps_words)
    say(*skipped_key_notes([(source.name, source.skipped)]))
    say(*no_effect_notes([source.name] if source.is_zero else []))
    base = optional_stored_base(config.base)
    family = common_family([parent], default=base.family.name if base else None, said=config.family)
    metadata = _metadata(config, parent, family)
    if config.bake == "diff":
        return _differences(config, source, base, family, metadata)
    others = {change.kind for change in source.changes.values() if change.low_rank() is None}
    if others and config.bake is None:
        raise AdapterError(
            f"{config.file.name}: holds {', '.join(sorted(others))}, which {_readers(config.to)} cannot all read. "
            "Bake it: --bake lora --rank 32, or --bake diff, and --base."
        )
    made = as_lora(source, Budget(config.rank, config.keep_energy), base.weight if base else None)
    metadata, dtype = fitted_metadata(config.output, metadata, len(made.modules)), DTYPES[config.dtype]
    words = source.words if keeps_words else None
    write_format(config.to, config.output, made.modules, family=family, metadata=metadata, dtype=dtype, words=words)
    other = "diffusers" if config.to == "kohya" else "kohya"
    say(*diffusers_warnings(config.output, made.modules, config.to, way=f"give --to {other}"))
    say(f"{config.output.name}: {pluralize(len(made.modules), 'module')} for {config.to}; {made}")
    return config.output


def _metadata(config: Config, parent: Parent, family: str) -> dict[str, str]:
    """The file's own metadata, by which other tools can tell the family."""
    from sfumato.files.metadata import Description, describe, family_from_metadata

    metadata = dict(parent.metadata) | {"sfumato.converted": config.to}
    metadata.pop("lora_adapter_metadata", None)  # of the modules as they were scaled
    told = describe(Description(config.output.stem, family))
    if any(key.startswith(("ss_", "modelspec.")) for key in metadata):  # by these two A1111 and Forge tell the family
        told = {key: told[key] for key in ("ss_base_model_version", "ss_v2")}
    metadata = told | metadata
    if family_from_metadata(metadata) != family:  # in another spelling, or a wrong one
        metadata |= {
            key: told[key] for key in ("ss_base_model_version", "ss_v2", "modelspec.architecture") if key in told
        }
    return metadata


def _readers(to: str) -> str:
    return {"kohya": "the readers of kohya's names", "diffusers": "diffusers", "peft": "peft"}[to]


def _differences(
    config: Config, source: MergeSource, base: StoredBase | None, family: str, metadata: Mapping[str, str]
) -> Path:
    """Write full differences of the base's weights. Returns the file."""
    from sfumato.files.header import read_header
    from sfumato.files.module_names import kohya_name
    from sfumato.files.writing.kohya import write_difference
    from sfumato.merging.extract import Deltas
    from sfumato.precision import DTYPES

    if config.to != "kohya" or base is None:
        raise ConfigError("--bake diff wants --base, the weights that differ, and --to kohya: nobody else reads it.")
    deltas = Deltas(source, base)
    metadata = fitted_metadata(config.output, metadata, len(deltas))
    write_difference(config.output, deltas, family=family, metadata=metadata, dtype=DTYPES[config.dtype])
    size = config.output.stat().st_size / 1e6
    kept = "exact" if config.dtype == "fp32" else f"rounded to {config.dtype}"
    say(
        f"{config.output.name}: {pluralize(len(deltas), 'full difference')}, {size:.1f} MB, {kept}; read by ComfyUI, "
        "A1111/Forge and InvokeAI"
    )
    written = read_header(config.output).tensors
    names = [kohya_name(family, *target) for target in deltas if target[0] != "unet" or target[1] == "conv_norm_out"]
    some = sum(len(found.shape) == 1 for name in names if (found := written.get(f"{name}.diff")) is not None)
    if some:
        say(
            f"{some} of them are norms of text encoders or the U-Net's last: InvokeAI applies them, ComfyUI, Forge and "
            "A1111 leave some or all of them out"
        )
    return config.output


def main(argv: Sequence[str]) -> int:
    """Convert as the arguments say. Returns 0 if the file was written."""
    print(convert(parse(Config, argv, program="convert")))
    return 0


if __name__ == "__main__":
    run(main)
