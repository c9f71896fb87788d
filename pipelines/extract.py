"""Extract an adapter from a fine-tuned model and its base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.config import TypedConfig, parse, to_dict
from sfumato.errors import AdapterError, ConfigError
from sfumato.utils.atomic import check_overwrite
from sfumato.utils.formatting import pluralize, say

if TYPE_CHECKING:
    from torch import Tensor

    from sfumato.files.kinds.ia3 import Replacement
    from sfumato.files.module_names import Target
    from sfumato.merging.model_weights import StoredBase


@dataclass(frozen=True)
class Config(TypedConfig):
    """Write what a fine-tuned model differs from its base model in, as a LoRA or exactly. Says how much is kept.

    Example: sfumato extract tuned.safetensors --base base.safetensors --rank 32 -o tuned-lora.safetensors
    """

    tuned: str
    """Fine-tuned model: a diffusers folder, a hub id or a .safetensors checkpoint."""
    _: KW_ONLY
    base: str
    """Base model that it was trained from: a diffusers folder, a hub id or a .safetensors checkpoint."""
    output: Annotated[Path, Parameter(alias="-o")]
    """The .safetensors file to write."""
    rank: int | None = None
    """Largest rank of each module."""
    keep_energy: float | None = None
    """Keep the smallest rank that holds this share of the squared norm of each module's difference, such as 0.99."""
    exact: bool = False
    """Write the whole difference. It is as large as the model, and can be added exactly to any other base model."""
    parts: tuple[Literal["unet", "text_encoder", "text_encoder_2"], ...] = ()
    """Parts of the model to extract. Unset: all that differ. Repeat the option for several."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of the written file. Unset: fp16, with --exact fp32."""
    trigger: tuple[str, ...] = ()
    """Trigger word for what the model learned. Repeat the option for several."""
    overwrite: bool = False
    """Replace a file that exists."""


def extract_file(config: Config) -> Path:
    """Write the adapter. Returns its file."""
    if config.exact and (config.rank, config.keep_energy) != (None, None):
        raise ConfigError("--exact keeps all: leave out --rank and --keep-energy.")
    if not config.exact and config.rank is None and config.keep_energy is None:
        raise ConfigError("say how much to keep: --rank 32, --keep-energy 0.99, or --exact for all of it.")
    check_overwrite(config.output, config.overwrite, ".safetensors", read=(config.tuned, config.base))

    from sfumato.merging.model_weights import stored_base

    tuned, base = stored_base(config.tuned), stored_base(config.base)
    if tuned.family != base.family or tuned.places.keys() != base.places.keys():
        raise AdapterError(
            f"{tuned.name} is {tuned.family.title}, {base.name} is {base.family.title}, and their weights are not the "
            "same ones. Name the base that it was trained from."
        )
    there = {part for part, _ in base.places}
    if lacking := [part for part in config.parts if part not in there]:
        raise ConfigError(
            f"--parts {lacking[0]}: {base.family.title} has {', '.join(sorted(there))} alone; name some of these."
        )
    count, kept = (_write_difference if config.exact else _write_lora)(config, tuned, base)
    size = config.output.stat().st_size / 1e6
    say(f"{config.output.name}: {pluralize(count, 'module')}, {size:.2f} MB; {kept}")
    return config.output


def _write_lora(config: Config, tuned: StoredBase, base: StoredBase) -> tuple[int, str]:
    """Write the LoRA. Returns the number of modules, and what they keep."""
    from sfumato.files.writing.kohya import write_lora
    from sfumato.merging.extract import diffusers_warnings, extract
    from sfumato.merging.factors import Budget
    from sfumato.precision import DTYPES

    modules, kept = extract(_pairs(tuned, base, config.parts), Budget(config.rank, config.keep_energy))
    metadata = _described(config, tuned, base, {"sfumato.kept_energy": f"{kept.share:.6f}"})
    write_lora(config.output, modules, family=base.family.name, metadata=metadata, dtype=DTYPES[config.dtype or "fp16"])
    say(*diffusers_warnings(config.output, modules))
    return len(modules), str(kept)


def _write_difference(config: Config, tuned: StoredBase, base: StoredBase) -> tuple[int, str]:
    """Write all that differs. Returns the number of modules, and what they keep."""
    from sfumato.files.writing.kohya import write_difference
    from sfumato.merging.extract import Deltas
    from sfumato.merging.merge import MergeSource
    from sfumato.merging.whole_model import weight_replacements
    from sfumato.precision import DTYPES

    dtype = DTYPES[config.dtype or "fp32"]
    of_parts = {
        target: change
        for target, change in weight_replacements(tuned).items()
        if (not config.parts or target[0] in config.parts) and _differs(tuned, base, target)
    }
    differing: dict[Target, Replacement] = {}
    for target, (weight, bias) in Deltas(MergeSource(tuned.name, of_parts), base, dtype).items():
        has_bias = bias is not None and bool(bias.any())
        if has_bias or (weight is not None and weight.any()):
            differing[target] = of_parts[target] if has_bias else replace(of_parts[target], bias=None)
    if not differing:
        raise AdapterError(
            "no weight differs, so there is nothing to extract. Name the fine-tuned model first, and with --base what "
            "it was trained from."
        )
    metadata = _described(config, tuned, base, {})
    deltas = Deltas(MergeSource(tuned.name, differing), base, dtype)
    write_difference(config.output, deltas, family=base.family.name, metadata=metadata, dtype=dtype)
    return len(deltas), "all that differs; diffusers, peft and sd-scripts read no such file"


def _differs(tuned: StoredBase, base: StoredBase, target: Target) -> bool:
    """Whether the weight or bias of a module differs from the base model's, compared as the tuned model would save
    it."""
    import torch

    from sfumato.merging.extract import round_like

    for which in ("weight", "bias"):
        before, after = base.parameter(target, which), tuned.parameter(target, which)
        if before is None or after is None:
            continue
        old, new = base.read(before), tuned.read(after)
        if old.shape != new.shape or not torch.equal(round_like(old, new), new):
            return True
    return False


def _described(config: Config, tuned: StoredBase, base: StoredBase, extra: Mapping[str, str]) -> dict[str, str]:
    from sfumato.files.metadata import Description, describe

    return describe(
        Description(
            title=config.output.stem,
            family=base.family.name,
            base=base.name,
            prediction_type=tuned.prediction_type or base.prediction_type,
            trigger=config.trigger,
            config=to_dict(config, public=True),
            extra=extra,
        )
    )


def _pairs(
    tuned: StoredBase, base: StoredBase, parts: Sequence[str]
) -> Iterator[tuple[tuple[str, str], Tensor, Tensor]]:
    for parameter in base.places:
        if not parts or parameter[0] in parts:
            yield parameter, base.read(parameter), tuned.read(parameter)


def main(argv: Sequence[str]) -> int:
    """Extract as the arguments say. Returns 0 if the file was written."""
    print(extract_file(parse(Config, argv, program="extract")))
    return 0


if __name__ == "__main__":
    run(main)
