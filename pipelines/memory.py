"""How much memory training and generating take, computed before anything is loaded."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import TYPE_CHECKING, Literal

from sfumato.cli import run
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.training.options import AlgoName
from sfumato.utils.formatting import option_flag

if TYPE_CHECKING:
    from sfumato.adapters import ByLayer, Kind
    from sfumato.models import Base
    from sfumato.training.memory import MemorySetting, StepMemory, TrainingTask

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Config:
    """Show the peak memory of each way to train, and which ones would fit, from the shapes of a base model alone.
    `slider` and `lcm` take what `lora` takes with the same targets, and `dpo` what it takes with twice the batch.

    Example: sfumato memory --base sdxl --within 12
    """

    base: str = "pocket"
    """Base model: pocket, a hub id, a diffusers folder, or a single .safetensors checkpoint. If you have no model yet,
    sd1, sd2 or sdxl stands for the family's usual shapes."""
    vae: str | None = None
    """Use another VAE: a hub id, a folder, or a single file."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts: noise (epsilon) or v. Set it where its file does not say."""
    resolution: int | None = None
    """Side in pixels of a square image; images of other shapes have about as many pixels. Unset: the base model's
    own."""
    batch: int = 1
    """Images that are computed at once: --batch of a training, or its --micro-batch, which learns the same."""
    rank: int | None = None
    """LoRA rank. Unset: the base family's default."""
    conv_rank: int | None = None
    """LoRA rank for convolutions larger than 1x1. Unset: --rank."""
    rank_of: tuple[str, ...] = ()
    """PATTERN=RANK: another LoRA rank for some layers, as for training; 0 leaves them out. Repeat the option for
    several."""
    algo: AlgoName = "lora"
    """Kind of adapter, as for training: lora, loha, lokr or oft. The rows of the table call all of them lora."""
    dora: bool = False
    """With weight decomposition (DoRA), as for training."""
    factor: int | None = None
    """With --algo lokr: size of the small factor, as for training."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Device to train on. This machine need not have a GPU."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base model. auto: bf16 on a GPU, fp32 on a CPU; but adapters train in bf16 on a CPU
    that multiplies bf16."""
    quantize: Literal["int8", "nf4"] | None = None
    """Format of the U-Net's large weights, as for training beside adapters and new words, and for generating."""
    within: float | None = None
    """Memory that you have, in GiB. What takes more is marked. In JSON its name is listed, judged by a step without
    gradient checkpointing."""
    json: bool = False
    """Print JSON."""


def check(config: Config) -> None:
    """Refuse impossible numbers, before anything is read."""
    for name in ("resolution", "batch", "rank", "conv_rank", "factor", "within"):
        value = getattr(config, name)
        if value is not None and not 0 < value < math.inf:
            raise ConfigError(f"{option_flag(name)} {value:g}: must be a number above 0.")
    if config.factor is not None and config.algo != "lokr":
        raise ConfigError("--factor has no effect without --algo lokr; leave it out, or give both.")


def check_ranks(base: Base, kind: Kind, rank: int, conv_rank: int | None, by_layer: ByLayer) -> None:
    """Refuse ranks that are too wide for all layers, rules that fit none, and rules that leave a way to train none."""
    from sfumato.training import memory

    parts = base.parts(text=False)
    kind.notes(by_layer.kept(kind.targets(parts, "everything")), rank, conv_rank, by_layer)
    for way in memory.TRAININGS:
        if way.trained == "lora" and not by_layer.without_excluded(kind.targets(parts, way.targets))["unet"]:
            raise ConfigError(f"--rank-of leaves out all that {way.options} adapts ({way.targets}); leave fewer out.")


def rows_of(
    base: Base, frozen: Base, adapting: MemorySetting, alone: MemorySetting
) -> Iterator[tuple[str, list[float]]]:
    """Each task, and the GiB that it takes; for a training step also with checkpointing. Each row takes seconds.

    frozen: the base as it is where its own weights do not learn. adapting: the setting for training those. alone: the
    setting for generating, and for training a whole model; its precision may differ.
    """
    from sfumato.training import memory

    @cache
    def of_step(way: TrainingTask, checkpointing: bool) -> StepMemory:
        of, setting = (base, alone) if way.trained == "whole" else (frozen, adapting)
        return memory.step_memory(of, way, replace(setting, checkpointing=checkpointing))

    for way in memory.TRAININGS:
        alike = replace(way, options="", fused=False, optimizer="adamw")
        steps = (of_step(alike, checkpointing) for checkpointing in (False, True))
        yield way.options, [step.total(way, alone.device) / GIB for step in steps]
    yield "encoding images, before the first step", [memory.encoding_memory(base, adapting) / GIB]
    yield "drawing an image", [memory.drawing_memory(frozen, alone) / GIB]
    if alone.device == "gpu":
        yield "drawing an image with --offload", [memory.drawing_memory(frozen, alone, offload=True) / GIB]
    if (count := memory.samples_at_once(base, adapting)) > 1:
        yield (
            f"drawing samples of a training, {count} at once",
            [memory.drawing_memory(frozen, adapting, count) / GIB],
        )


def main(argv: Sequence[str]) -> int:
    """Print the table, each row as soon as it is known. Returns 0."""
    config = parse(Config, argv, program="memory")
    check(config)
    from sfumato.adapters import ByLayer, Kind
    from sfumato.data.preparation.planning import square_side
    from sfumato.precision import NAMES, forecast_precision
    from sfumato.training import memory

    beside, alone = (forecast_precision(config.precision, config.device, adapting=each) for each in (True, False))
    base = memory.fake_base(config.base, config.device, config.vae, config.prediction_type)
    side = square_side(base, config.resolution or base.resolution)  # refuses what is too small
    rank, computed = config.rank or base.defaults.rank, NAMES[beside.compute]
    kind, by_layer = Kind.of(config), ByLayer.of(config)
    check_ranks(base, kind, rank, config.conv_rank, by_layer)
    setting = memory.MemorySetting(config.device, beside, side, config.batch, rank, config.conv_rank, kind, by_layer)
    frozen = base
    if config.quantize:
        from sfumato.precision.quantization import quantize

        frozen = copy.deepcopy(base)
        quantize(frozen.unet, config.quantize)
    rows = rows_of(base, frozen, setting, replace(setting, precision=alone))
    if config.json:
        about = {"base": base.name, "family": base.family.title, "resolution": side, "batch": config.batch}
        about |= {"algo": config.algo, "dora": config.dora, "factor": config.factor}
        about |= {"rank": rank, "conv_rank": config.conv_rank or rank, "rank_of": list(config.rank_of)}
        about |= {"device": config.device, "precision": computed}
        print(_as_json(config, about | {"precision_without_adapters": NAMES[alone.compute]}, dict(rows)))
        return 0
    where = "a GPU" if config.device == "gpu" else "a CPU"
    if alone.compute != beside.compute:
        computed += f" ({NAMES[alone.compute]} where no adapter is trained)"
    ranks = f"rank {rank}" + (f", {config.conv_rank} of convolutions" if config.conv_rank else "")
    ranks += "".join(f", {text}" for text in config.rank_of)
    if config.algo != "lora" or config.dora:
        ranks += f", {config.algo}" + (f" factor {config.factor}" if config.factor else "") + " with dora" * config.dora
    print(f"{base.name} ({base.family.title}), {side} px, batch {config.batch}, {ranks}, {computed} on {where}")
    _print_table(rows, config.within)
    return 0


def _as_json(config: Config, about: Mapping[str, object], rows: Mapping[str, Sequence[float]]) -> str:
    """What `--json` prints. about: the setting."""
    gib = {name: [round(each, 2) for each in row] for name, row in rows.items()}
    over = [name for name, row in gib.items() if config.within is not None and row[0] > config.within]
    judged = {} if config.within is None else {"within": config.within, "more_than_within": over}
    return json.dumps({**about, **judged, "gib": gib}, indent=2)


def _print_table(rows: Iterable[tuple[str, Sequence[float]]], within: float | None) -> None:
    """A line for each task, as soon as it is known. within: GiB; what takes more is marked."""
    print(f"\n{'GiB at the peak, about':<54}{'a step':>8}   --gradient-checkpointing")
    for name, row in rows:
        cells = [f"{gib:.1f}{'*' if within and gib > within else ' '}" for gib in row]
        line = f"{name:<54}" + "".join(f"{cell:>{width}}" for cell, width in zip(cells, (9, 27), strict=False))
        print(line.rstrip(), flush=True)
    print("\nDreamBooth's steps hold an image of the class beside each of the subject's.")
    if within:
        print(f"* more than {within:g} GiB")


if __name__ == "__main__":
    run(main)
