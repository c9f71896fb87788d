"""Merge adapters into one file, or into a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from sfumato.cli import run
from sfumato.config import TypedConfig, parse, to_dict
from sfumato.errors import ConfigError
from sfumato.generation.arguments.adapters import parse_adapters
from sfumato.utils.atomic import check_overwrite
from sfumato.utils.formatting import option_flag, pluralize, say
from sfumato.utils.limits import checked_density, checked_seed

if TYPE_CHECKING:
    from sfumato.merging.merge import MergeSource
    from sfumato.merging.sources import Parent


@dataclass(frozen=True)
class Config(TypedConfig):
    """Merge adapters into one file, exactly or within a rank, by any of the known methods; or into a checkpoint.

    Example: sfumato merge line.safetensors:0.8 otter.safetensors:0.6 -o mix.safetensors
    """

    adapters: tuple[str, ...] = ()
    """Adapters and their weights: FILE:0.8, FILE:0.8:0.4 for U-Net and text encoders, LABEL=FILE:0.8. With --into also
    whole models (a checkpoint or a diffusers folder); what counts is their difference from the base model of --into."""
    _: KW_ONLY
    output: Annotated[Path, Parameter(alias="-o")] = Path("mix.safetensors")
    """The .safetensors file to write. With --into a diffusers folder: a folder."""
    method: Literal["linear", "ties", "dare", "dare-ties", "magnitude", "knots", "core-space", "np-lora"] = "linear"
    """Merging method. linear is the weighted sum, exactly the same as mixing when generating. docs/mixing.md describes
    the others."""
    rank: int | None = None
    """Largest rank of each module. Unset: ranks add up, and nothing is lost unless the method requires it."""
    keep_energy: float | None = None
    """Keep the smallest rank that holds this share of the squared norm of each module's change, such as 0.99."""
    density: float = 0.5
    """Share of the entries that ties, dare, dare-ties and magnitude keep, also inside knots and core-space."""
    inside: Literal["linear", "ties", "dare", "dare-ties", "magnitude"] = "ties"
    """Method that knots and core-space use in their joint basis."""
    null_energy: float = 0.99
    """np-lora: later adapters give up the directions that hold this share of each earlier adapter's energy. The first
    adapter is the style."""
    null_strength: float | None = None
    """np-lora: how strongly later adapters give up these directions (mu of the soft form). Unset: completely."""
    seed: int = 0
    """Seed for the random choices of dare and dare-ties."""
    blocks: tuple[str, ...] = ()
    """Modules to merge: up, down.1, mid, attn2, te, !up.0, ..., separated by commas. Or keep all modules and give
    factors on their weight: down:0.3,up.1:1.2, or a block-weight list of the web interfaces. LABEL=... for one adapter.
    Repeat the option for several."""
    base: str | None = None
    """Base model of the adapters. DoRA, OFT and other kinds without a low-rank form need its weights."""
    into: str | None = None
    """Merge the adapters into this checkpoint or diffusers folder, and write the result to --output. For linear, ties,
    dare, dare-ties and magnitude."""
    dtype: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of the written file. fp16 halves it at a relative error of 0.0003. Unset: fp32; --into keeps the
    base model's."""
    title: str = ""
    """Title in the file's metadata. Unset: the file's name."""
    family: Literal["pocket", "sd1", "sd2", "sdxl"] | None = None
    """Family of the base model. Set it if neither shapes nor metadata of the files say it."""
    partial: bool = False
    """Take the part of a file that is understood, and leave out the rest."""
    overwrite: bool = False
    """Replace a file that exists."""


_OF_INTO = {
    *("adapters", "output", "method", "density", "seed", "blocks"),
    *("into", "title", "family", "partial", "overwrite"),
}
"""Options that --into uses, with at least one method."""


def merge_files(config: Config) -> Path:
    """Merge what the config names. Returns the written file or folder."""
    if not config.adapters:
        raise ConfigError("there is no adapter; wanted such as: sfumato merge a.safetensors:0.8 b.safetensors:0.6.")
    adapters = parse_adapters(config.adapters)
    is_file = config.into is None or config.output.suffix == ".safetensors"
    models = [config.base] if config.into is None else [config.into, *(adapter.path for adapter in adapters)]
    check_overwrite(
        config.output, config.overwrite, ".safetensors" if is_file else None, folder=not is_file, read=models
    )
    _check_method(config)

    from sfumato.generation.notes import no_effect_notes, skipped_key_notes
    from sfumato.merging.sources import choose_blocks, read_sources

    sources, parents = read_sources(adapters, partial=config.partial, words=config.into is None)
    say(*skipped_key_notes((source.name, source.skipped) for source in sources))
    say(*no_effect_notes(source.name for source in sources if source.is_zero))
    sources = choose_blocks(sources, config.blocks)
    parents = [replace(parent, weight=source.weight) for parent, source in zip(parents, sources, strict=True)]
    if config.into is not None:
        return _bake(config, sources, parents)
    return _merge(config, sources, parents)


def _check_method(config: Config) -> None:
    """Raises ConfigError for options that the method, or --into, does not take."""
    chosen = [each.name for each in fields(config) if getattr(config, each.name) != each.default]
    idle = [option_flag(name) for name in chosen if name not in _OF_INTO]
    if config.into is not None and idle:
        raise ConfigError(
            "--into bakes all of it, in the base's own dtype: leave out "
            f"{', '.join(idle)}, or merge to a file first and bake that."
        )
    checked_density(config.density)
    checked_seed(config.seed)
    if not 0 < config.null_energy <= 1:
        raise ConfigError(f"--null-energy is {config.null_energy}; it must be above 0 and at most 1.")

    from sfumato.merging.methods import DENSE, METHOD_SETTINGS

    joint = config.method in METHOD_SETTINGS["inside"]
    for name, methods in METHOD_SETTINGS.items():
        if name in chosen and config.method not in methods:
            raise ConfigError(
                f"{option_flag(name)} has no effect on --method {config.method}; leave it out, or "
                f"choose one of "
                f"{', '.join(sorted(methods))}."
            )
        if name in chosen and joint and name != "inside" and config.inside not in methods:
            raise ConfigError(
                f"{option_flag(name)} has no effect on --method {config.method} --inside "
                f"{config.inside}; leave it "
                f"out, or give --inside one of {', '.join(sorted(methods - METHOD_SETTINGS['inside']))}."
            )
    if config.into is not None and config.method not in ("linear", *DENSE):
        raise ConfigError(
            f"--method {config.method} works on factors, which whole weights have not; with --into take linear or "
            f"{', '.join(DENSE)}, or merge to a file first and bake that."
        )


def _counted(sources: Sequence[MergeSource], parents: Sequence[Parent]) -> list[Parent]:
    """What the result is made of: the parents that change anything."""
    return [parent for source, parent in zip(sources, parents, strict=True) if source.counts]


def _merge(config: Config, sources: Sequence[MergeSource], parents: Sequence[Parent]) -> Path:
    from sfumato.files.adapter_file import merge_embeddings
    from sfumato.files.writing.kohya import write_lora
    from sfumato.merging.extract import diffusers_warnings
    from sfumato.merging.factors import Budget
    from sfumato.merging.merge import merge
    from sfumato.merging.methods import MethodSettings
    from sfumato.merging.sources import common_family, merged_metadata, optional_stored_base, prediction_type_notes
    from sfumato.precision import DTYPES

    base = optional_stored_base(config.base)
    family = common_family(parents, default=base.family.name if base else None, said=config.family)
    words = merge_embeddings({source.name: source.words for source in sources if source.counts})
    merged = merge(
        sources,
        method=config.method,
        settings=MethodSettings(config.density, config.inside, config.null_energy, config.null_strength),
        budget=Budget(config.rank, config.keep_energy),
        seed=config.seed,
        base=base.weight if base else None,
    )
    parents = _counted(sources, parents)
    metadata = merged_metadata(
        parents,
        title=config.title or config.output.stem,
        family=family,
        config=to_dict(config, public=True),
        extra={} if merged.is_exact else {"sfumato.kept_energy": f"{merged.share:.6f}"},
    )
    dtype = DTYPES[config.dtype or "fp32"]
    write_lora(config.output, merged.modules, family=family, metadata=metadata, dtype=dtype, words=words)
    _say_unasked(parents, _asked(metadata), f"others do not, so {config.output.name} does not")
    say(*prediction_type_notes(parents), *diffusers_warnings(config.output, merged.modules))
    ranks = sorted({module.rank for module in merged.modules.values()})
    of_rank = f"of rank {ranks[0]}" + (f" to {ranks[-1]}" if len(ranks) > 1 else "")
    size = config.output.stat().st_size / 1e6
    say(f"{config.output.name}: {pluralize(len(merged.modules), 'module')} {of_rank}, {size:.2f} MB; {merged}")
    return config.output


def _bake(config: Config, sources: Sequence[MergeSource], parents: Sequence[Parent]) -> Path:
    from sfumato.files.header import read_header
    from sfumato.merging.bake import bake
    from sfumato.merging.methods import MethodSettings
    from sfumato.merging.model_weights import stored_base
    from sfumato.merging.sources import baked_metadata, common_family, prediction_type_notes

    assert config.into is not None
    base = stored_base(config.into)
    if config.title and base.root.is_dir():
        raise ConfigError(f"--title {config.title}: {base.name} is a folder, which has no metadata. Leave it out.")
    family = common_family(parents, default=base.family.name, said=config.family)
    if family != base.family.name:
        raise ConfigError(
            f"--into {base.name}: is {base.family.title}, the adapters are for {family}; name a base of theirs."
        )
    parents = _counted(sources, parents)
    told = read_header(base.root).metadata if base.root.is_file() else {}
    metadata = baked_metadata(
        parents,
        title=config.title or config.output.stem,
        base=base.name,
        family=family,
        predicts=base.prediction_type,
        told=told,
        config=to_dict(config, public=True),
    )
    bake(
        base,
        sources,
        config.output,
        metadata,
        method=config.method,
        settings=MethodSettings(config.density),
        seed=config.seed,
    )
    count = pluralize(len(parents), "adapter")
    say(f"{config.output.name}: {base.name} with {count} baked in")
    if base.root.is_file() and any(key.startswith("model_ema.") for key in read_header(base.root).tensors):
        say(f"{config.output.name}: its second weights, the running mean (model_ema), are {base.name}'s as they were")
    say(*prediction_type_notes(parents, base.name, base.prediction_type))
    _say_unasked(parents, (), "which a base cannot; baked in, it is in all steps of both predictions")
    return config.output


def _say_unasked(parents: Sequence[Parent], asked: Sequence[str], why: str) -> None:
    """Say what parents ask for when generating that the result does not ask for. why: the end of the sentence."""
    for parent in parents:
        if lost := [each for each in _asked(parent.metadata) if each not in asked]:
            say(f"{parent.name}: asks for {' and '.join(lost)}, {why}.")


def _asked(metadata: Mapping[str, str]) -> list[str]:
    """What a file asks for when generating with it."""
    from sfumato.files.metadata import adapter_guidance_of, negatives_of, over_steps_of, sampling_of

    strength, span, sampling = adapter_guidance_of(metadata), over_steps_of(metadata), sampling_of(metadata)
    return [
        *([f"adapter guidance {strength:g}"] if strength else []),
        *([f"the steps {span[0]:g}-{span[1]:g}"] if span else []),
        *(f"the negative prompt {text!r}" for text in negatives_of(metadata)),
        *([str(sampling)] if sampling else []),
    ]


def main(argv: Sequence[str]) -> int:
    """Merge as the arguments say. Returns 0 if the file was written."""
    print(merge_files(parse(Config, argv, program="merge")))
    return 0


if __name__ == "__main__":
    run(main)
