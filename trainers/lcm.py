"""Train an adapter that draws in few steps: 4 instead of 30 or so, without guidance's second prediction (LCM-LoRA).

    python trainers/lcm.py --base BASE --prompts prompts.txt --output DIR
    accelerate launch trainers/lcm.py ...
    sfumato train lcm ...

All three run the same program. The adapter learns to say from any noise level where the base model's guided sampling
would end (latent consistency distillation, Luo et al. 2023). It mixes with styles and subjects that were trained on the
same base model. `train` is the whole method; what it calls is in the library.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfumato.adapters.prompt_tags import refuse_tags, split_flags
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.runs.folder import refuse_output_among
from sfumato.training import checks, config_defaults
from sfumato.training.entry_point import training_entry_point
from sfumato.training.options import AdapterOptions, TrainingOptions
from sfumato.utils.formatting import pluralize
from sfumato.utils.limits import checked_guidance

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from sfumato.adapters import Attached
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.runs.processes import Processes
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.additions.interface import Addition, Training
    from sfumato.training.methods.lcm import Distillation


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions, TrainingOptions):
    """Train an LCM-LoRA: an adapter with which its base model draws in four steps or so.

    Example: `sfumato train lcm trainers/configs/lcm-pocket.toml --output runs/fast`
    """

    prompts: tuple[str, ...] = ()
    """Prompts of images that the base model generates once, to learn on, or a file of them: a .txt with one on each
    line, or a .toml or .json as sd-scripts has them, whose settings are left out. Repeat the option for several. Name
    what you will draw: hundreds of different prompts are best. Unset: on pocket all that it knows."""
    drawn: int | None = None
    """Number of images that the base model generates, of all prompts in turn. Unset: the base family's default."""
    images: Path | None = None
    """Folder of your own images to learn on, with captions, instead of images that the base model generates."""
    caption: str | None = None
    """Template for the captions of --images, such as "a photo of a {caption}"."""
    guidance: float | None = None
    """Guidance scale (CFG scale) that is learned: the images look as the base model draws them with it. Unset: the base
    family's default."""
    solver_steps: int | None = None
    """Steps of DDIM from noise to image that are learned to be jumped over. At most so many steps can be drawn. The
    fewer they are, the sooner the ends are learned that lie many of them away. Unset: 50, on pocket 10."""
    drawn_steps: int | None = None
    """Sampling steps of the sample images, and those that the file asks for; 4 to 8 are usual. Unset: 4, or
    --solver-steps where that is fewer."""
    rank: int | None = None
    """LoRA rank: the inner dimension of each update B A. Unset: the base family's default, on SD and SDXL 64."""
    targets: str = "everything"
    """Layers to adapt: cross-attention, attention, attention+mlp, transformers (attention, MLP and the projections
    around them), everything (all layers of the U-Net's blocks), or a regular expression over module names."""
    init_from: Path | None = None
    """Start from this adapter instead of from scratch. It must have the same targets and ranks."""

    def __post_init__(self) -> None:
        """Read the prompts out of their files, so that a run keeps them, and not where they were."""
        from sfumato.models.prompts.files import expand_prompt_files

        super().__post_init__()
        object.__setattr__(self, "prompts", expand_prompt_files(self.prompts, "--prompts"))


_DIFFUSERS: Mapping[str, Any] = MappingProxyType(
    {"steps": 1000, "drawn": 200, "drawn_steps": 4, "rank": 64, "learning_rate": 1e-4, "solver_steps": 50}
)
"""The rank, rate and solver of diffusers' example, and its steps, which are of 12 images each there."""
DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # Of 50 solver steps neighbours' ends hardly differ: so short a training then makes all but pure noise worse.
        "pocket": {"steps": 600, "batch": 8, "drawn": 192, "drawn_steps": 4, "learning_rate": 2e-4, "solver_steps": 10},
        "sd1": {**_DIFFUSERS, "batch": 4},
        "sd2": {**_DIFFUSERS, "batch": 4},
        "sdxl": {**_DIFFUSERS, "batch": 2},
    }
)
"""Defaults of this method, by family, for what a config leaves unset."""
SAMPLER = "lcm"
"""What is drawn with: its steps are those that are learned."""
OF_NOISE = (
    *("min_snr", "debiased", "noise_offset", "pyramid_noise", "input_perturbation", "huber"),
    *("min_timestep", "max_timestep"),
)
"""Options of trainings whose loss is an error of noise."""
OF_DRAWN = ("prompts", "drawn")


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the path of the adapter."""
    import torch

    from sfumato.training.adapter import groups_of
    from sfumato.training.additions.interface import backward
    from sfumato.training.additions.table import additions_of
    from sfumato.training.finish import finish_adapter
    from sfumato.training.methods.lcm import Distillation
    from sfumato.training.optim import optimizers

    check(config)
    training = prepare(config)
    config, base, run, processes = training.config, training.base, training.run, training.processes
    lora, dataset, precision, batches = training.trained, training.dataset, training.precision, training.batches
    distillation = Distillation(
        base, dataset, guidance=config.guidance, solver_steps=config.solver_steps, pristine=lora.disabled
    )
    added = additions_of(training)
    parameters, groups = training.parameters(), [*groups_of(config, lora), *added.groups()]
    optimizer = optimizers.build_optimizer(
        config.optimizer, groups, weight_decay=config.weight_decay, args=config.optimizer_args
    )
    schedule = optimizers.LearningRateSchedule(
        optimizer, config.schedule, config.steps, config.warmup, cycles=config.cycles
    )
    scaler = precision.scaler()
    run.keep(lora=lora, optimizer=optimizer, scaler=scaler, **added.kept())
    learned, samples = watch(training, distillation)
    lora.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss = torch.zeros((), device=precision.device)
        for micro in batches.of(step.number):
            lora.set_dropout_samples(config.seed, step.number, micro.places)
            with precision.autocast():
                errors = distillation.errors(distillation.draw(config.seed, micro))
                part = errors.sum() / batches.global_batch + added.loss(errors[:0], batches.global_batch)
            backward(scaler, part)
            loss += part.detach()
        added.after_gradients()
        # Before unscaling, so that all processes find the same overflow and skip the same steps.
        processes.sum_gradients(parameters, loss, *added.sums())
        scaler.unscale_(optimizer)
        norm = optimizers.clip_grad_norm(parameters, config.clip)
        if step.healthy(scaler, loss=loss, gradient_norm=norm):
            scaler.step(optimizer)
            added.after_step()
        scaler.update()
        optimizer.zero_grad()
        step.done(loss=loss, rate=schedule.rate, gradient_norm=norm, **added.figures())

    path = config.output / f"{config.name}.safetensors"
    return training.end(path, lambda: finish_adapter(run, config, path, learned, samples))


def prepare(config: Config) -> Training:
    """Read or draw the images, load the base model, fill in the config, open the run, and attach the adapter."""
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.adapter import adapted_layers, init_from_file, new_adapter
    from sfumato.training.additions.interface import Training

    processes = Processes.join(config.device)
    given = read_images(config)
    precision = config.decide_precision(processes, config.optimizer)
    base = config.load_base(precision)
    config, filled = resolve(config, base, given, processes.count)
    adapted, notes = adapted_layers(config, base)
    run = Run.start(config, program="lcm", processes=processes, writes=["adapters"] if config.save_every else [])
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)
    run.say(*notes)

    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    dataset = config.prepare_as(
        given or draw_prompts(config, base, run, processes),
        base,
        processes=processes,
        will_draw=(config.seed, config.steps, batches.global_batch),
        together=config.batch,
    )
    run.say_notes(dataset)
    base.lazy_weights.load_only("unet")  # the others rest until something asks for them
    lora = new_adapter(adapted, config)
    run.identify(data=dataset, **init_from_file(config.init_from, run, base, lora), base=base.fingerprint())
    layers = pluralize(len(lora.layers), "adapted layer")
    run.say(f"{pluralize(len(dataset), 'image')}, {layers}, {lora.count():,} trained numbers")
    return Training(config, processes, precision, base, run, batches, dataset, lora)


def watch(training: Training, distillation: Distillation) -> tuple[TrainedAdapter, Samples]:
    """Let the run measure, draw and save the adapter now and then. Returns what is written at the end, and what it is
    shown with."""
    from sfumato.runs.options import Request
    from sfumato.training.methods.lcm import ConsistencyMetrics

    config, base, run, lora = training.config, training.base, training.run, training.trained
    dataset, added = training.dataset, training.added
    metrics = ConsistencyMetrics(base, dataset, lora, distillation, config.batch, within=added.applied)
    samples = samples_of(config, base, lora, dataset, run, added)
    learned = trained_adapter_of(config, base, lora, dataset, samples, added)
    run.every(config.measure_every, lambda step: run.log(step=step, **metrics.values()))
    run.every(config.sample_every, samples.draw)
    run.every(config.save_every, lambda step: learned.keep(run, config.name, step), on=Request.SAVE)
    return learned, samples


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    checks.check_trainer(config)
    checks.check_kind(config)
    checks.refuse_given(config, "has no effect here, where the loss is no error of noise; leave it out", *OF_NOISE)
    if config.guidance is not None:
        checked_guidance(config.guidance)
    if config.images is None and config.epochs is not None:
        raise ConfigError("--epochs: prompts are learned from, and no images of yours; give --steps.")
    check_steps(config)
    if config.images is None:
        checks.only_with(config, "--images", "caption")
        if not config.prompts and config.base != "pocket":
            raise ConfigError(
                "--prompts is missing; give prompts of what you will draw, a file of them, or --images with captions."
            )
        for prompt in config.prompts:
            text, _ = split_flags(prompt)
            refuse_tags(text, "--prompts", "leave it out")
            if not text.strip():
                raise ConfigError(f"--prompts {prompt!r:.60}: no words in it; write what is to be drawn.")
    else:
        checks.refuse_given(
            config, "is for images that are generated, and --images are given; leave one out", *OF_DRAWN
        )


def check_steps(config: Config) -> None:
    """Refuse more steps than there are."""
    for name, most in (("solver_steps", 1000), ("drawn_steps", min(50, config.solver_steps or 50))):
        if (value := getattr(config, name)) is not None and not 1 <= value <= most:
            raise ConfigError(f"--{name.replace('_', '-')} is {value}; it must be 1 to {most}.")


def read_images(config: Config) -> ExampleSet | None:
    """The images that are given; None where the base draws them."""
    from sfumato import data

    if config.images is None:
        return None
    examples = data.read_folder(config.images, caption_template=config.caption, skip_bad=None).in_group("instance")
    if not config.resume:
        refuse_output_among(config.output, [config.images])
    return examples


def resolve(config: Config, base: Base, given: ExampleSet | None, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the base family or the method
    filled. given: the images of `read_images`."""
    from sfumato.data import ExampleSet

    defaults = {"guidance": base.defaults.guidance, **DEFAULTS[base.family.name], "min_snr": 0.0}
    if config.solver_steps is not None:
        defaults["drawn_steps"] = min(config.solver_steps, defaults["drawn_steps"])
    if given is not None:
        del defaults["drawn"]
    config, filled = config_defaults.resolve(config, base, given or ExampleSet(()), processes, **defaults)
    check_steps(config)
    filled = [name for name in filled if name != "min_snr"]
    return dataclasses.replace(config, **config_defaults.scale_defaults(config)), filled


def draw_prompts(config: Config, base: Base, run: Run, processes: Processes) -> ExampleSet:
    """The base model's images of the prompts, which are their captions; generated once and kept in the run's folder."""
    from sfumato.data.preparation.planning import square_side
    from sfumato.training.loss.class_images import pictures_of_class
    from sfumato.training.methods.lcm import prompts_to_draw
    from sfumato.training.pretrain.dataset import known_prompts

    told = [split_flags(prompt) for prompt in config.prompts]
    if any(settings for _, settings in told):
        run.say("--prompts: settings in prompts are left out; all images are generated alike")
    prompts = prompts_to_draw([text for text, _ in told] or known_prompts(), config.drawn, config.seed)
    drawn, now = pictures_of_class(
        base,
        Counter(prompts),
        resolution=square_side(base, config.resolution),
        folder=config.output / "drawn",
        processes=processes,
        what="the prompts",
        option="--output",
    )
    run.say(f"drawn: {pluralize(len(prompts), 'image')} of {pluralize(len(set(prompts)), 'prompt')} ({now} now)")
    return drawn


def samples_of(config: Config, base: Base, lora: Attached, dataset: Dataset, run: Run, average: Addition) -> Samples:
    """The run's sample images, drawn in few steps."""
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.loss.validation import default_prompts
    from sfumato.training.sampling import make_sampler

    asked, own = config.asked_samples()
    prompts = asked or default_prompts(dataset.captions, None, None)
    few = {"sampler": SAMPLER, "steps": config.drawn_steps, "guidance": 1.0}
    draw = make_sampler(base, lora, resolution=config.resolution, own=own, usual=few)
    return Samples(run, prompts, config.seed, draw, modules=[lora], within=average.applied)


def trained_adapter_of(
    config: Config, base: Base, lora: Attached, data: Dataset, samples: Samples, average: Addition
) -> TrainedAdapter:
    """The result of the training, and what its file says about itself."""
    from sfumato.files import Sampling
    from sfumato.precision import DTYPES
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.finish import describe_run

    about = partial(
        describe_run,
        config,
        base,
        data,
        samples,
        trigger=(),
        captions=(),  # which call nothing up
        sampling=Sampling(SAMPLER, config.drawn_steps, 1.0),
    )
    if config.images is None:  # images that the base model generated are no training images
        about = partial(about, images=None, dataset_sha256="")
    return TrainedAdapter(lora, None, base.family.name, about, DTYPES[config.save_precision], average)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train lcm"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
