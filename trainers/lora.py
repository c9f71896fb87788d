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

from sfumato.config import fill, parse, to_dict
from sfumato.errors import ConfigError

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from torch import Tensor

    from sfumato.adapters import Lora
    from sfumato.bases import Base
    from sfumato.data import Batch, Dataset
    from sfumato.runs import Run


@dataclass(frozen=True, kw_only=True)
class Config:
    """Train a LoRA on the cross-attention of the U-Net, or on more of it.

    Example: `sfumato train lora trainers/configs/lora-style.toml --images datasets/line-style --output runs/line`
    """

    images: Path
    """Folder of pictures, with captions as datasets/README.md describes."""
    output: Path
    """Folder of the run: the adapter, its card, samples, log and plot."""
    name: str | None = None
    """Name of the adapter and of its file; unset, the name of the output folder."""
    base: str = "pocket"
    """The model to teach: pocket, a hub id, a diffusers folder, or a single .safetensors checkpoint."""

    trigger: str | None = None
    """The word that will call up what is learned; put it into the captions, or use --caption."""
    caption: str | None = None
    """Template for captions, such as "{caption}, {trigger} style"; {caption} is a picture's own, or its file's name."""
    caption_dropout: float = 0.0
    """Share of samples learned without a caption, 0 to 1."""
    resolution: int | None = None
    """Side in pixels of a square picture; others keep about as many pixels. Unset: the base's own."""
    flip: bool = False
    """Mirror half of the samples; not for faces, letters, or anything with a left and a right."""
    mask: Literal["none", "alpha", "files"] = "none"
    """Learn only a part of each picture: where it is opaque, or where NAME.mask.png is white."""
    skip_bad: bool = False
    """Go on without the pictures that cannot be read, instead of stopping."""

    steps: int | None = None
    """Optimizer steps. Unset: the base family's default."""
    epochs: int | None = None
    """Passes over the pictures, instead of --steps."""
    batch: int | None = None
    """Pictures at a time on each process. Unset: the base family's default."""
    accumulate: int = 1
    """Batches a step: gradients of that many are summed before the weights move."""
    seed: int = 0
    """Everything random is a function of this number: start, order, noise, timesteps, dropout of captions."""

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
    init_from: Path | None = None
    """Start from this adapter instead of from nothing; same targets and rank."""

    learning_rate: float | None = None
    """Peak learning rate. Unset: the base family's default, or 1 for prodigy."""
    text_learning_rate: float | None = None
    """Peak learning rate of the text encoders. Unset: a tenth of the U-Net's."""
    optimizer: Literal["adamw", "adamw8bit", "prodigy", "lion"] = "adamw"
    """adamw is built in; the others are extras (pip install 'sfumato[prodigy]')."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the optimizer."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """How the learning rate moves after the warm-up."""
    warmup: int = 0
    """Steps in which the learning rate rises from 0."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 lets it be."""
    min_snr: float | None = None
    """Gamma of min-SNR weighting (Hang et al. 2023); 0 weighs all timesteps alike. Unset: the base family's default."""
    noise_offset: float = 0.0
    """Strength of a constant added to each channel's noise, for very dark or bright pictures; 0.03 to 0.1 is usual."""
    ema: float = 0.0
    """Decay of a running mean of the adapter, which is then what is saved; 0 saves the adapter itself."""

    sample_prompts: tuple[str, ...] = ()
    """Prompts to draw while training. Unset: some captions and some prompts that were not trained."""
    sample_every: int | None = None
    """Steps between sample pictures, besides those at both ends; 0 draws none. Unset: a quarter of the run."""
    measure_every: int | None = None
    """Steps between measurements of fit and drift; 0 makes none. Unset: a quarter of the run."""
    tensorboard: bool = False
    """Write the log for TensorBoard, too (pip install 'sfumato[tensorboard]')."""

    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base; the adapter is always fp32."""
    save_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of the adapter's file. Unset: fp32 on pocket, fp16 elsewhere."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention of the U-Net; xformers is an extra."""
    gradient_checkpointing: bool = False
    """Compute activations twice to keep fewer of them."""
    clip_skip: int | None = None
    """Take the text encoder's output this many layers before its last."""
    vae: str | None = None
    """Another VAE: a hub id, a folder, or a single file."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, where a single file cannot tell."""

    push_to_hub: str | None = None
    """Upload adapter and card to this repository of the Hugging Face hub."""
    overwrite: bool = False
    """Replace a run that the output folder holds."""


def train(config: Config) -> Path:
    """Train, and return the adapter's path."""
    import torch

    from sfumato import data, diffusion, optimizers, randomness
    from sfumato.adapters import attach
    from sfumato.bases import load_base
    from sfumato.measure import Measures
    from sfumato.precision import decide
    from sfumato.processes import Processes
    from sfumato.runs import Run

    check(config)
    processes = Processes.join(config.device)
    examples = data.read_folder(
        config.images,
        caption_template=config.caption,
        trigger=config.trigger,
        mask=config.mask,
        skip_bad=config.skip_bad,
    )
    precision = decide(
        config.precision,
        device=config.device if processes.count == 1 else processes.device,
        attention=config.attention,
        gradient_checkpointing=config.gradient_checkpointing,
        optimizer=config.optimizer,
    )
    precision.apply()
    base = load_base(
        config.base,
        precision=precision,
        clip_skip=config.clip_skip,
        vae=config.vae,
        prediction_type=config.prediction_type,
    )
    overwrite = config.overwrite
    config, filled = resolve(config, base, examples.samples, processes.count)
    run = Run.start(
        config.output,
        config,
        is_main=processes.is_main,
        overwrite=overwrite,
        tensorboard=config.tensorboard,
    )
    run.say(precision.table())
    run.say(f"{base.family.title} defaults: " + ", ".join(f"{name} {getattr(config, name)}" for name in filled))

    dataset = data.prepare(
        examples,
        base,
        resolution=config.resolution,
        flip=config.flip,
        caption_dropout=config.caption_dropout,
        embed_text=not config.train_text_encoder,
    )
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
    run.say(f"{len(dataset)} pictures, {len(lora.layers)} adapted layers, {lora.count():,} trained numbers")

    optimizer = optimizers.build(config.optimizer, groups(lora, config), weight_decay=config.weight_decay)
    schedule = optimizers.Schedule(optimizer, config.schedule, config.steps, config.warmup)
    scaler = precision.scaler()
    average = Average(lora, config.ema)
    measures = Measures(base, dataset, lora) if config.measure_every else None
    samples = Samples(run, base, lora, config, dataset) if config.sample_every else None
    alpha_bar = base.alpha_bar.to(precision.device)
    parameters = list(lora.parameters())
    global_batch = config.batch * config.accumulate * processes.count
    first, share = processes.slice(global_batch)

    def denoising_loss(batch: Batch, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The sum of this micro-batch's errors over the size of the global batch."""
        text = base.encode_text(batch.captions, grad=True) if config.train_text_encoder else batch.text
        a = alpha_bar[timesteps]
        noisy = diffusion.noise_latents(batch.latents, noise, a)
        prediction = base.predict(noisy, timesteps, text, batch.added(base, text))
        wanted = diffusion.target(base.prediction_type, batch.latents, noise, a)
        weight = diffusion.snr_weight(base.prediction_type, a, config.min_snr) if config.min_snr else torch.ones_like(a)
        return diffusion.weighted_error(prediction, wanted, weight, batch.mask).sum() / global_batch

    def look(step: int) -> None:
        """Measure and draw, with the adapter that would be saved."""
        with average.applied():
            if measures and due(step, config.measure_every, config.steps):
                run.log(step=step, fit=measures.fit(), drift=measures.drift())
            if samples and due(step, config.sample_every, config.steps) and processes.is_main:
                samples.draw(step)

    lora.train()
    look(0)
    for step in run.steps(config.steps):
        schedule.set(step.number)
        # Timesteps cover the schedule once in a global batch; each process takes its own part of them.
        timesteps = diffusion.stratified_timesteps(global_batch, len(alpha_bar), config.seed, step.number)
        loss = torch.zeros((), device=precision.device)
        for start in range(first, first + share, config.batch):
            batch = dataset.batch(config.seed, step.number, global_batch, start, config.batch)
            noise = draw_noise(batch, config, step.number, start)
            with precision.autocast(), randomness.seeded(precision.device, config.seed, "dropout", step.number, start):
                part = denoising_loss(batch, noise, timesteps[start : start + config.batch].to(precision.device))
            scaler.scale(part).backward()
            loss += part.detach()
        # Before unscaling, so that all processes find the same overflow and skip the same steps.
        processes.sum([loss, *(p.grad for p in parameters if p.grad is not None)])
        scaler.unscale_(optimizer)
        norm = optimizers.clip(parameters, config.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        average.update()
        step.done(loss=loss, rate=schedule.rate, gradient_norm=norm)
        look(step.number + 1)

    average.apply()
    path = config.output / f"{config.name}.safetensors"
    if processes.is_main:
        save(path, lora, base, config, dataset, run, samples)
    run.close()
    processes.wait()
    return path


def check(config: Config) -> None:
    """Refuse what makes no sense before anything is loaded."""
    if config.steps is not None and config.epochs is not None:
        raise ConfigError("--steps and --epochs are both given; they say the same, so give one of them.")
    for name in ("steps", "epochs", "batch", "accumulate", "rank", "resolution"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be at least 1.")
    for name in ("learning_rate", "text_learning_rate", "alpha"):
        value = getattr(config, name)
        if value is not None and not 0 < value < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be a positive number.")
    for name in ("dropout", "caption_dropout", "ema"):
        if not 0 <= getattr(config, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be in 0 ... 1, below 1.")
    for name in ("warmup", "clip", "min_snr", "sample_every", "measure_every"):
        if (getattr(config, name) or 0) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must not be negative.")
    if config.init_from and not config.init_from.exists():
        raise ConfigError(f"--init-from {config.init_from}: there is no such file.")


def resolve(config: Config, base: Base, images: int, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled, and the names that the base's family filled."""
    defaults = base.defaults
    if config.optimizer == "prodigy" and config.learning_rate is None:
        config = dataclasses.replace(config, learning_rate=1.0)
    if config.epochs is not None:
        batch = (config.batch or defaults.batch) * config.accumulate * processes
        config = dataclasses.replace(config, steps=max(1, round(config.epochs * images / batch)), epochs=None)
    config, filled = fill(config, defaults)
    quarter = max(1, -(-config.steps // 4))
    values: dict[str, Any] = {
        "overwrite": False,  # permission for this run, not for whoever runs its config again
        "name": config.name or config.output.name,
        "alpha": config.alpha or float(config.rank),
        "text_learning_rate": config.text_learning_rate or config.learning_rate / 10,
        "sample_every": quarter if config.sample_every is None else config.sample_every,
        "measure_every": quarter if config.measure_every is None else config.measure_every,
        "save_precision": config.save_precision or ("fp32" if base.family.name == "pocket" else "fp16"),
    }
    return dataclasses.replace(config, **values), filled


def due(step: int, every: int, steps: int) -> bool:
    """Whether something that happens every so many steps, and at both ends, happens at `step`."""
    return step % every == 0 or step == steps


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


def draw_noise(batch: Batch, config: Config, step: int, first: int) -> Tensor:
    """The batch's noise, each picture's a function of (seed, step, place in the global batch)."""
    import torch

    from sfumato import diffusion, randomness

    count, *shape = batch.latents.shape
    places = range(first, first + count)
    noise = torch.stack([randomness.normal(tuple(shape), config.seed, "noise", step, i) for i in places])
    if config.noise_offset:
        channel = (shape[0], 1, 1)
        offset = torch.stack([randomness.normal(channel, config.seed, "noise offset", step, i) for i in places])
        noise = diffusion.offset_noise(noise, offset, config.noise_offset)
    return noise.to(batch.latents)


class Average:
    """The running mean of an adapter's weights; with a decay of 0 it is the adapter itself."""

    def __init__(self, lora: Lora, decay: float):
        self.decay = decay
        self.parameters = list(lora.parameters())
        self.mean = [p.detach().clone() for p in self.parameters] if decay else []

    def update(self) -> None:
        """Take a step's weights in."""
        import torch

        if self.mean:
            torch._foreach_lerp_(self.mean, [p.detach() for p in self.parameters], 1 - self.decay)

    def apply(self) -> None:
        """Exchange the adapter's weights and their mean."""
        for parameter, mean in zip(self.parameters, self.mean, strict=bool(self.mean)):
            now = parameter.detach().clone()
            parameter.detach().copy_(mean)
            mean.copy_(now)

    def applied(self) -> Any:
        """Within the block the adapter is the mean."""
        from contextlib import contextmanager

        @contextmanager
        def exchange() -> Any:
            self.apply()
            yield
            self.apply()

        return exchange()


class Samples:
    """A sheet that grows by one row of pictures at a time, with the same prompts and seeds in each."""

    def __init__(self, run: Run, base: Base, lora: Lora, config: Config, dataset: Dataset):
        self.run, self.base, self.lora, self.config = run, base, lora, config
        self.prompts = list(config.sample_prompts) or default_prompts(dataset, config)
        self.rows: list[list[Any]] = []
        self.labels: list[str] = []

    def draw(self, step: int) -> None:
        """Draw the prompts and write the sheet anew."""
        from sfumato.drawing import draw
        from sfumato.files.atomic import atomic_path
        from sfumato.sheet import contact_sheet

        self.lora.eval()
        pictures = draw(self.base, self.prompts, [self.config.seed] * len(self.prompts))
        self.lora.train()
        self.rows.append(pictures)
        self.labels.append(f"step {step}")
        sheet = contact_sheet(self.rows, row_labels=self.labels, column_labels=self.prompts)
        with atomic_path(self.run.folder / "samples.png") as temporary:
            sheet.save(temporary)


def default_prompts(dataset: Dataset, config: Config) -> list[str]:
    """Two captions, and two plain things put into the caption template."""
    from sfumato.measure import UNRELATED

    template = config.caption or ("{caption}, {trigger}" if config.trigger else "{caption}")
    unseen = [template.format(caption=thing, trigger=config.trigger) for thing in UNRELATED[:2]]
    return [*dict.fromkeys(dataset.captions[:2]), *unseen]


def save(
    path: Path, lora: Lora, base: Base, config: Config, dataset: Dataset, run: Run, samples: Samples | None
) -> None:
    """Write the adapter, its card and the plot; upload them if asked."""
    from sfumato.card import write_card
    from sfumato.files import Description, LoraModule, describe, write_lora
    from sfumato.plot import plot_log
    from sfumato.precision import DTYPES

    run.flush()
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
        thumbnail=samples.rows[-1][-1] if samples and samples.rows else None,
        config=to_dict(config, public=True),
        dataset_sha256=dataset.fingerprint,
    )
    modules = {
        key: LoraModule.from_scale(layer.down.detach(), layer.up.detach(), layer.scale)
        for key, layer in lora.layers.items()
    }
    write_lora(
        path, modules, family=base.family.name, metadata=describe(description), dtype=DTYPES[config.save_precision]
    )
    plot_log(run.folder / "log.jsonl", run.folder / "plot.png")
    drawn = (samples.prompts, samples.rows) if samples else ([], [])
    card = write_card(run.folder, path, description, *drawn)
    run.say(f"\nadapter  {path}\ncard     {card}\nplot     {run.folder / 'plot.png'}")
    if samples:
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
