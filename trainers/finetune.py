"""Full fine-tuning: all weights of the U-Net, and on request the text encoders', from images and their captions.

    python trainers/finetune.py --images DIR --output DIR --steps N --seed S
    accelerate launch trainers/finetune.py ...
    sfumato train finetune ...

All three run the same program. The loss is the denoising error of the images under their own captions (Rombach et al.
2022, eq. 3), weighted by timestep. `train` is the whole method; what it calls is in the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.training import checks, config_defaults, recipe_defaults
from sfumato.training.entry_point import training_entry_point
from sfumato.training.options import FullOptions
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from torch import nn

    from sfumato.data import Dataset, ExampleSet
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.additions.interface import Addition, Training

DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        # By family, what differs from its own defaults.
        "pocket": {"learning_rate": 1e-4, "steps": 240, "batch": 8},
        # diffusers' guides have these rates, and pass over their images 50 times: so do 4,000 steps of 4 over 320.
        "sd1": {"learning_rate": 1e-5, "steps": 4000, "batch": 4},
        "sd2": {"learning_rate": 1e-5, "steps": 4000, "batch": 4},
        "sdxl": {"learning_rate": 1e-6, "steps": 4000, "batch": 2},
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(FullOptions):
    """Fine-tune the whole U-Net on images and their captions: a style, or a domain of hundreds of images.

    Example: `sfumato train finetune --images datasets/line-style --output runs/me`
    """

    caption: str | None = None
    """Template for captions, such as "{caption}, {trigger} style"; {caption} is the image's own caption, or its file
    name. Unset: "{caption}"."""
    flip: bool | None = None
    """Mirror half of the samples. Not for faces, letters, or anything else with a left and a right. Unset: they are
    mirrored."""

    inpainting: bool = False
    """Make an inpainting model of the base model: its U-Net gets inputs for the mask and for what the mask leaves of an
    image, and learns to use them. For a base model that is none."""
    prior_weight: float | None = None
    """Weight of class images (`class = true` in a dataset.toml) in the loss; the training images have weight 1. Each
    batch is joined by as many class images, so that an unset --batch is half of its default. Unset: 1."""


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the path of what was learned: a folder or a file."""
    import torch

    from sfumato.training.additions.interface import backward
    from sfumato.training.additions.table import additions_of
    from sfumato.training.loss.objective import draw_noised, per_sample_losses
    from sfumato.training.optim import optimizers
    from sfumato.training.optim.fused_backward import FusedBackwardPass
    from sfumato.utils import randomness

    check(config)
    training = prepare(config)
    config, base, run, processes = training.config, training.base, training.run, training.processes
    trained, dataset, precision, batches = training.trained, training.dataset, training.precision, training.batches
    added = additions_of(training)
    parameters, parts = training.parameters(), {part: model.parameters() for part, model in trained.items()}
    groups = [*optimizers.parameter_groups(parts, config.learning_rate, config.text_learning_rate), *added.groups()]
    optimizer = optimizers.build_optimizer(
        config.optimizer, groups, weight_decay=config.weight_decay, args=config.optimizer_args
    )
    schedule = optimizers.LearningRateSchedule(
        optimizer, config.schedule, config.steps, config.warmup, cycles=config.cycles
    )
    scaler = precision.scaler()
    fused = FusedBackwardPass(optimizer, scaler) if config.fused else None
    run.keep(trained=trained, optimizer=optimizer, scaler=scaler, **added.kept())
    finish = watch(training)
    noising, encode = config.noising(base), config.train_text_encoder
    trained.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss = torch.zeros((), device=precision.device)
        for micro in batches.of(step.number):
            noised = added.change(draw_noised(base, dataset, config.seed, micro, noising=noising), micro)
            further = added.samples(micro)
            dropped = randomness.seeded(precision.device, config.seed, "dropout", step.number, micro.first)
            with precision.autocast(), dropped:
                errors = per_sample_losses(base, [noised, *further], encode=encode, settings=config.loss())
                part = errors[: micro.count].sum() / batches.global_batch
                part = part + added.loss(errors[micro.count :], batches.global_batch)
            if fused is None:
                backward(scaler, part)
            else:  # it changes the weights, so it must not begin with a broken loss
                norm = fused.backward(part, limit=config.clip, healthy=partial(step.healthy, scaler))
            loss += part.detach()
            del errors, part  # with what led to them, which --fused keeps where it overflows
        added.after_gradients()
        if fused is None:
            # Before unscaling, so that all processes find the same overflow and skip the same steps.
            processes.sum_gradients(parameters, loss, *added.sums())
            scaler.unscale_(optimizer)
            norm = optimizers.clip_grad_norm(parameters, config.clip)
            if step.healthy(scaler, loss=loss, gradient_norm=norm):
                scaler.step(optimizer)
            optimizer.zero_grad()
        if not step.skipped:
            added.after_step()
        scaler.update()
        step.done(loss=loss, rate=schedule.rate, gradient_norm=norm, **added.figures())

    path = config.result_path()
    return training.end(path, lambda: finish(path))


def prepare(config: Config) -> Training:
    """Read the images, load the base model, fill in the config, open the run, and let the weights learn."""
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import ClassPictures, prepare_datasets
    from sfumato.training.loss.validation import prepare_validation
    from sfumato.training.methods.full import decide_precision, make_inpainting, unfreeze

    processes = Processes.join(config.device)
    examples = read_examples(config)
    subjects, of_class = examples.in_group("instance"), examples.in_group("class")
    precision = decide_precision(config, processes)
    base = config.load_base(precision)
    if config.inpainting:
        make_inpainting(base)
    config, filled = resolve(config, base, examples, processes.count)
    run = Run.start(config, program="finetune", processes=processes, writes=written(config))
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)

    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    embed, drawn = not config.train_text_encoder, batches.global_batch
    dataset, class_set = prepare_datasets(config, base, subjects, of_class, drawn, processes, embed_text=embed)
    held_out = prepare_validation(config, base, examples, processes)
    run.say_notes(dataset, class_set, held_out)
    # The VAE has given its latents; it rests until something is drawn.
    base.lazy_weights.load_only("unet", *(("text",) if config.train_text_encoder else ()))
    trained = unfreeze(base, text=config.train_text_encoder)
    facts = {"data": dataset, "class": class_set or "none", "validation": held_out or "none"}
    run.identify(**facts, base=base.fingerprint())
    size = sum(p.numel() for p in trained.parameters())
    beside = f"{len(class_set)} of the class, " if class_set else ""
    run.say(f"{pluralize(len(dataset), 'image')}, {beside}{size:,} trained numbers")
    training = Training(config, processes, precision, base, run, batches, dataset, trained, subjects)
    training.class_set, training.held_out = class_set, held_out
    if class_set:
        training.priors.append(ClassPictures(base, class_set, config.seed, noising=config.noising(base)))
        training.class_captions = list(dict.fromkeys(of_class.captions))
    return training


def watch(training: Training) -> Callable[[Path], None]:
    """Let the run measure and draw now and then. Returns what writes the model to a path, with its card."""
    from sfumato.training.finish import describe_run
    from sfumato.training.loss.validation import DriftLimit, Metrics, unrelated_to

    config, base, run, trained = training.config, training.base, training.run, training.trained
    subjects, dataset, captions = training.subjects, training.dataset, training.class_captions
    assert subjects is not None
    watched = {"drift": unrelated_to(captions)} | ({"class_drift": captions} if captions else {})
    # Nothing has been trained yet, so that the base predicts as it did before.
    shared: dict[str, Any] = {"within": training.added.applied, "modules": [trained], "held_out": training.held_out}
    metrics = Metrics(base, dataset, watched if config.measure_every else {}, **shared)
    limit = DriftLimit(config.drift_limit, run.rows())
    samples = samples_of(config, base, trained, subjects, dataset, run, training.added)
    run.every(config.measure_every, limit.watching(run, metrics, training.processes))
    run.every(config.sample_every, samples.draw)

    def finish(path: Path) -> None:
        limit.tell(run, config.steps)
        about = describe_run(config, base, dataset, samples, trigger=subjects.triggers, steps=run.step)
        save(path, config, base, about, samples, run)

    return finish


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    checks.check_trainer(config)
    checks.check_full(config)
    checks.refuse_given(config, "is for frozen weights, and here all learn; leave it out, or train a LoRA", "quantize")
    if config.save in (None, "folder"):
        checks.check_name(config, folder=True)
    elif config.inpainting:
        raise ConfigError(
            f"--inpainting with --save {config.save}: the base has no such inputs, to which a difference could be "
            "added; leave --save out, for a whole folder."
        )
    if config.save != "lora":
        checks.only_with(config, "--save lora", "rank", "keep_energy")


def read_examples(config: Config) -> ExampleSet:
    """Read the images and captions. Raises ConfigError for a --prior-weight of no class."""
    run = recipe_defaults.of_run(config)
    is_named = config.caption is None and (run is None or run.get("caption") == recipe_defaults.NAMED)
    examples = recipe_defaults.read_named(config) if is_named else config.read_examples()
    if config.prior_weight is not None and not examples.in_group("class"):
        raise ConfigError(
            "--prior-weight is for images of a class; give these in a dataset.toml, with class = true, or leave it out."
        )
    return examples


def resolve(config: Config, base: Base, examples: ExampleSet, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the method or the base family
    filled."""
    defaults, has_class = dict(DEFAULTS[base.family.name]), bool(examples.in_group("class"))
    if has_class:
        defaults["batch"] = max(1, defaults["batch"] // 2)
    extracts_by_rank = config.save == "lora" and config.keep_energy is None
    rank = config.rank
    run = recipe_defaults.of_run(config) or {"caption": recipe_defaults.NAMED, "flip": True}
    defaults |= {"caption": run.get("caption"), "flip": run.get("flip")}
    config, filled = config_defaults.resolve(config, base, examples, processes, **defaults)
    values: dict[str, Any] = {"save": config.save or "folder"}
    if not extracts_by_rank:
        values["rank"] = rank
        filled = [name for name in filled if name != "rank"]
    if has_class:
        values["prior_weight"] = 1.0 if config.prior_weight is None else config.prior_weight
    return dataclasses.replace(config, **values), filled


def written(config: Config) -> list[str]:
    """The names of what is written into the run's folder, besides what every run writes."""
    return [config.name] if config.save == "folder" else []


def samples_of(
    config: Config, base: Base, trained: nn.Module, subjects: ExampleSet, dataset: Dataset, run: Run, average: Addition
) -> Samples:
    """The run's sample images: of some captions and of some plain things, if none are asked for."""
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.loss.validation import default_prompts
    from sfumato.training.sampling import make_sampler

    first = subjects[0]  # sources may have templates and triggers of their own
    asked, own = config.asked_samples()
    prompts = asked or default_prompts(dataset.captions, first.template, first.trigger)
    draw = make_sampler(base, resolution=config.resolution, own=own)
    return Samples(run, prompts, config.seed, draw, modules=[trained], within=average.applied)


def save(path: Path, config: Config, base: Base, about: Description, samples: Samples, run: Run) -> None:
    """Write the model, its card and the plot; upload them if asked."""
    from sfumato.training.finish import finish, upload
    from sfumato.training.methods.full import write_model

    write_model(path, base, config, run, about)
    finish(run, config, path, about, samples, kind=config.save)
    upload(run, [path], config.push_to_hub)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train finetune"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
