"""Train a LoRA: a style or a subject from a dozen pictures, in one file of a few megabytes.

    python trainers/lora.py --images DIR --output DIR --steps N --seed S
    accelerate launch trainers/lora.py ...
    sfumato train lora ...

are one program. W' = W + (alpha / rank) B A on the frozen U-Net (Hu et al. 2021). `train` is the whole method; what it
calls is the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato import options
from sfumato.config import parse, to_dict
from sfumato.errors import ConfigError
from sfumato.options import TrainerOptions

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from sfumato.adapters import Lora
    from sfumato.bases import Base
    from sfumato.data import Dataset
    from sfumato.runs import Run
    from sfumato.runs.samples import Samples


@dataclass(frozen=True, kw_only=True)
class Config(TrainerOptions):
    """Train a LoRA on the cross-attention of the U-Net, or on more of it.

    Example: `sfumato train lora trainers/configs/lora-style.toml --images datasets/line-style --output runs/line`
    """

    rank: int | None = None
    """Inner dimension of each update B A. Four suits a face, sixteen a style. Unset: the base family's default."""
    alpha: float | None = None
    """The update is scaled by alpha / rank. Unset: the rank, for a scale of 1."""
    dropout: float = 0.0
    """Share of each update's inputs that is dropped while training."""
    rank_stabilised: bool = False
    """Scale by alpha / sqrt(rank), so that a high rank learns as fast as a low one."""
    targets: str = "cross-attention"
    """What is adapted: cross-attention, attention, attention+mlp, everything (in the U-Net's blocks), or a regular
    expression over module names."""
    conv: bool = False
    """Adapt the 3x3 convolutions of the blocks, too."""
    train_text_encoder: bool = False
    """Adapt the text encoders, too; captions are then encoded at each step."""
    text_learning_rate: float | None = None
    """Peak learning rate of the text encoders. Unset: a tenth of the U-Net's."""
    init_from: Path | None = None
    """Start from this adapter instead of from nothing; same targets and rank."""
    save_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of the adapter's file. Unset: fp32 on pocket, fp16 elsewhere."""


def train(config: Config) -> Path:
    """Train, and return the adapter's path."""
    import torch

    from sfumato import diffusion, optimizers, randomness
    from sfumato.adapters import attach
    from sfumato.ema import Average
    from sfumato.measure import Measures
    from sfumato.objective import denoising_errors, draw_noise
    from sfumato.processes import Processes
    from sfumato.runs import Run
    from sfumato.runs.samples import Samples, default_prompts

    check(config)
    processes = Processes.join(config.device)
    examples = config.read_examples()
    precision = config.decide_precision(processes, config.optimizer)
    base = config.load_base(precision)
    config, filled = resolve(config, base, examples.samples, processes.count)
    run = Run.start(config, program="lora", processes=processes)
    run.say(precision.table())
    run.say(f"{base.family.title} defaults: " + ", ".join(f"{name} {getattr(config, name)}" for name in filled))

    dataset = config.prepare(examples, base, embed_text=not config.train_text_encoder)
    for note in dataset.notes:
        run.say(note)
    lora = attach(
        hosts(base, config),
        rank=config.rank,
        alpha=config.alpha,
        dropout=config.dropout,
        rank_stabilised=config.rank_stabilised,
        seed=config.seed,
    )
    if config.init_from:
        start_from(lora, config.init_from)
    run.identify(data=dataset.fingerprint, base=base.quick_fingerprint())
    run.say(f"{len(dataset)} pictures, {len(lora.layers)} adapted layers, {lora.count():,} trained numbers")

    parameters = list(lora.parameters())
    optimizer = optimizers.build(config.optimizer, groups(lora, config), weight_decay=config.weight_decay)
    schedule = optimizers.Schedule(optimizer, config.schedule, config.steps, config.warmup)
    scaler = precision.scaler()
    average = Average(parameters, config.ema)
    run.keep(lora=lora, optimizer=optimizer, scaler=scaler, average=average)
    measures = Measures(base, dataset, pristine=lora.disabled, modules=[lora])
    prompts = config.sample_prompts or default_prompts(dataset.captions, config.caption, config.trigger)
    samples = Samples(run, base, prompts, config.seed, modules=[lora])

    def measure(step: int) -> None:
        with average.applied():
            run.log(step=step, **measures.values())

    def sample(step: int) -> None:
        with average.applied():
            samples.draw(step)

    run.every(config.measure_every, measure)
    run.every(config.sample_every, sample)
    global_batch, starts = processes.starts(config.batch, config.accumulate)
    lora.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        # Timesteps cover the schedule once in a global batch; each process takes its own part of them.
        timesteps = diffusion.stratified_timesteps(global_batch, len(base.alpha_bar), config.seed, step.number)
        timesteps = timesteps.to(precision.device)
        loss = torch.zeros((), device=precision.device)
        for start in starts:
            batch = dataset.batch(config.seed, step.number, global_batch, start, config.batch)
            noise = draw_noise(batch, config.seed, step.number, start, offset=config.noise_offset)
            mine = timesteps[start : start + config.batch]
            with precision.autocast(), randomness.seeded(precision.device, config.seed, "dropout", step.number, start):
                text = base.encode_text(batch.captions, grad=True) if config.train_text_encoder else batch.text
                errors = denoising_errors(base, batch, noise, mine, text, min_snr=config.min_snr)
                part = errors.sum() / global_batch
            scaler.scale(part).backward()
            loss += part.detach()
        # Before unscaling, so that all processes find the same overflow and skip the same steps.
        processes.sum([loss, *(p.grad for p in parameters if p.grad is not None)])
        scaler.unscale_(optimizer)
        norm = optimizers.clip(parameters, config.clip)
        if step.healthy(scaler, loss=loss, gradient_norm=norm):
            scaler.step(optimizer)
            average.update()
        scaler.update()
        optimizer.zero_grad()
        step.done(loss=loss, rate=schedule.rate, gradient_norm=norm)

    average.apply()
    path = config.output / f"{config.name}.safetensors"
    if processes.is_main:
        save(path, lora, base, config, dataset, run, samples)
    run.close()
    processes.wait()
    return path


def check(config: Config) -> None:
    """Refuse what makes no sense before anything is loaded."""
    options.check(config)
    if config.init_from and not config.init_from.exists():
        raise ConfigError(f"--init-from {config.init_from}: there is no such file.")


def resolve(config: Config, base: Base, samples: int, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled, and the names that the base's family filled."""
    config, filled = options.resolve(config, base, samples, processes)
    values: dict[str, Any] = {
        "alpha": config.alpha or float(config.rank),
        "text_learning_rate": config.text_learning_rate or config.learning_rate / 10,
        "save_precision": config.save_precision or ("fp32" if base.family.name == "pocket" else "fp16"),
    }
    return dataclasses.replace(config, **values), filled


def hosts(base: Base, config: Config) -> dict[str, Any]:
    """The layers to adapt, by part."""
    from sfumato.adapters.lora import TEXT_TARGETS, select

    parts = {"unet": select(base.unet, config.targets, conv=config.conv)}
    if config.train_text_encoder:
        for number, encoder in enumerate(base.text_encoders, start=1):
            parts["text_encoder" if number == 1 else f"text_encoder_{number}"] = select(encoder, TEXT_TARGETS)
    return parts


def groups(lora: Lora, config: Config) -> list[dict[str, Any]]:
    """Parameter groups: the U-Net's, and the text encoders' with their own rate."""
    unet = [p for (part, _), layer in lora.layers.items() if part == "unet" for p in layer.parameters()]
    text = [p for (part, _), layer in lora.layers.items() if part != "unet" for p in layer.parameters()]
    found = [{"params": unet, "lr": config.learning_rate}, {"params": text, "lr": config.text_learning_rate}]
    return [group for group in found if group["params"]]


def start_from(lora: Lora, path: Path) -> None:
    """Copy another adapter's values into this one."""
    from sfumato.files import read_lora

    modules = read_lora(path).modules
    lora.load({key: (m.down, m.up, m.alpha) for key, m in modules.items()}, path.name)


def save(path: Path, lora: Lora, base: Base, config: Config, dataset: Dataset, run: Run, samples: Samples) -> None:
    """Write the adapter, its card and the plot; upload them if asked."""
    from sfumato.card import write_card
    from sfumato.files import Description, LoraModule, describe, write_lora
    from sfumato.plot import plot_log
    from sfumato.precision import DTYPES

    rows = samples.rows
    description = Description(
        title=config.name,
        family=base.family.name,
        base=base.name,
        prediction_type=base.prediction_type,
        resolution=(config.resolution, config.resolution),
        images=len(dataset),
        steps=config.steps,
        batch=config.batch * config.accumulate,
        seed=config.seed,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer,
        trigger=[config.trigger] if config.trigger else [],
        captions=dataset.captions,
        thumbnail=rows[-1][-1] if rows else None,
        config=to_dict(options.settled(config), public=True),
        dataset_sha256=dataset.fingerprint,
    )
    modules = {
        key: LoraModule.from_scale(layer.down.detach(), layer.up.detach(), layer.scale)
        for key, layer in lora.layers.items()
    }
    write_lora(
        path, modules, family=base.family.name, metadata=describe(description), dtype=DTYPES[config.save_precision]
    )
    run.log_file.flush()
    plot_log(run.folder / "log.jsonl", run.folder / "plot.png")
    card = write_card(run.folder, path, description, samples.prompts if rows else [], rows)
    run.say(f"\nadapter  {path}\ncard     {card}\nplot     {run.folder / 'plot.png'}")
    if rows:
        run.say(f"samples  {run.folder / 'samples.png'}")
    if config.push_to_hub:
        from sfumato.card import push

        run.say(f"uploaded to {push(run.folder, path, config.push_to_hub)}")


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train lora"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
