"""Reduce the rank of a LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from sfumato.adapters.weights import Adapter
from sfumato.cli import run
from sfumato.config import TypedConfig, parse, to_dict
from sfumato.errors import AdapterError, ConfigError
from sfumato.generation.arguments.adapters import fitted_metadata
from sfumato.utils.atomic import check_overwrite
from sfumato.utils.formatting import say


@dataclass(frozen=True)
class Config(TypedConfig):
    """Make a LoRA smaller: keep the largest singular values of each module, by the SVD of its factors.

    Example: sfumato resize line.safetensors --keep-energy 0.99 -o small.safetensors
    """

    file: Path
    """LoRA to resize: a .safetensors file of any tool, or a folder of peft."""
    _: KW_ONLY
    output: Annotated[Path, Parameter(alias="-o")]
    """The .safetensors file to write."""
    rank: int | None = None
    """Largest rank of each module."""
    keep_energy: float | None = None
    """Keep the smallest rank that holds this share of the squared norm of each module's change, such as 0.99."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the written file."""
    family: Literal["pocket", "sd1", "sd2", "sdxl"] | None = None
    """Family of the base model. Set it if neither shapes nor metadata of the file say it."""
    overwrite: bool = False
    """Replace a file that exists."""


def resize_file(config: Config) -> Path:
    """Write the smaller LoRA. Returns its file."""
    if config.rank is None and config.keep_energy is None:
        raise ConfigError("say how much to keep: --rank 8 or --keep-energy 0.99.")
    check_overwrite(config.output, config.overwrite, ".safetensors")

    from sfumato.files.writing.kohya import write_lora
    from sfumato.generation.notes import no_effect_notes
    from sfumato.merging.extract import diffusers_warnings, resize
    from sfumato.merging.factors import Budget
    from sfumato.merging.sources import common_family, merged_metadata, read_source
    from sfumato.precision import DTYPES

    source, parent = read_source(Adapter(config.file), words=True)
    modules = {target: low for target, change in source.changes.items() if (low := change.low_rank()) is not None}
    if len(modules) < len(source.changes):
        raise AdapterError(
            f"{config.file.name}: {len(source.changes) - len(modules)} of {len(source.changes)} modules are no LoRA. "
            "Make it one first: sfumato convert --bake lora."
        )
    say(*no_effect_notes([source.name] if source.is_zero else []))
    smaller, share = resize(modules, Budget(config.rank, config.keep_energy))
    family = common_family([parent], said=config.family)
    # What the file said of its training stays; write_lora takes the rest from the tensors.
    metadata = dict(parent.metadata) | merged_metadata(
        [parent],
        title=config.output.stem,
        family=family,
        config=to_dict(config, public=True),
        extra={"sfumato.kept_energy": f"{share:.6f}"},
    )
    metadata.pop("lora_adapter_metadata", None)  # of the modules as they were scaled
    metadata = fitted_metadata(config.output, metadata, len(smaller))
    dtype = DTYPES[config.dtype]
    write_lora(config.output, smaller, family=family, metadata=metadata, dtype=dtype, words=source.words)
    say(*diffusers_warnings(config.output, smaller))
    before, after = (sum(module.rank for module in these.values()) for these in (modules, smaller))
    say(
        f"{config.output.name}: mean rank {before / len(modules):.1f} -> {after / len(smaller):.1f}, "
        f"{config.output.stat().st_size / 1e6:.2f} MB; keeps {share:.2%} of the energy"
    )
    return config.output


def main(argv: Sequence[str]) -> int:
    """Resize as the arguments say. Returns 0 if the file was written."""
    print(resize_file(parse(Config, argv, program="resize")))
    return 0


if __name__ == "__main__":
    run(main)
