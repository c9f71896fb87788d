"""Train a slider: a LoRA whose weight moves images between two ends, such as young and old, or flat and shaded.

    python trainers/slider.py --concept "a person" --more "an old person" --less "a young person" --output DIR
    accelerate launch trainers/slider.py ...
    sfumato train slider ...

All three run the same program. At weight 1 the adapter predicts for the concept what moves it one way, at weight -1
what moves it the other way (Gandikota et al. 2024). Prompts name the two ends, without any image, or pairs of images
show them. `train` is the whole method; what it calls is in the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.runs.folder import refuse_output_among
from sfumato.training import checks, config_defaults
from sfumato.training.entry_point import training_entry_point
from sfumato.training.options import AdapterOptions, TrainingOptions
from sfumato.utils.formatting import pluralize, quote_argument

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from PIL.Image import Image

    from sfumato.adapters import Attached
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.runs.processes import Processes
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.additions.interface import Addition, Training
    from sfumato.training.methods.slider import SliderObjective, SliderPrompts


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions, TrainingOptions):
    """Train a LoRA whose weight, from -1 to 1 and beyond, moves images between two ends that prompts or pairs of images
    give.

    Example: `sfumato train slider trainers/configs/slider-flat.toml --output runs/flat`
    """

    concept: tuple[str, ...] = ()
    """Prompt whose images the slider moves, such as "a person". Repeat the option for several: the slider then learns
    what their ends have in common, and works on other concepts, too."""
    more: tuple[str, ...] = ()
    """Prompt of what weight 1 moves the concept to, such as "{concept}, old, with wrinkles". {concept} stands for the
    concept. Give one prompt for all concepts, or repeat the option for each."""
    less: tuple[str, ...] = ()
    """Prompt of what weight -1 moves the concept to, such as "{concept}, young". "" is nothing at all. Give one prompt
    for all concepts, or one for each. Unset: the concept itself."""
    strength: float = 1.0
    """How far weight 1 moves the concept, as a multiple of the difference between the base model's predictions for
    --more and --less."""
    drawn: int | None = None
    """Number of images that the base model generates once, with the concept and both ends as prompts; the slider
    learns on their noised forms. Unset: the base family's default."""
    images: Path | None = None
    """Folder of your own images of the one concept, to learn on instead of images that the base model generates. Their
    captions are not used."""
    more_images: Path | None = None
    """Folder of images of what weight 1 moves to, instead of prompts. Each has a partner of the same name and size in
    --less-images, which shows the same without it."""
    less_images: Path | None = None
    """Folder of the partners of --more-images: what weight -1 moves to."""
    caption: str | None = None
    """Template for the captions of pairs, such as "a photo of a {caption}". {caption} stands for the caption of the
    image in --more-images, or for its file name."""
    targets: str = "cross-attention"
    """Layers to adapt: cross-attention, attention, attention+mlp, transformers (attention, MLP and the projections
    around them), everything (all layers of the U-Net's blocks), or a regular expression over module names."""
    prior_prompts: tuple[str, ...] = ()
    """Prompts whose images should stay as the base model generates them, at any weight. Each training batch is joined
    by one of the same size for these prompts, whose target is the frozen base model's prediction. Repeat the option for
    several."""
    prior_weight: float | None = None
    """Weight of the prior-preservation samples in the loss; the slider's samples have weight 1. Unset: 1."""
    init_from: Path | None = None
    """Start from this adapter instead of from scratch. It must have the same targets and ranks."""
    over_steps: str | None = None
    """START-END: the part of the sampling steps in which the adapter is active, from 0 (noise) to 1 (finished image).
    Sample images use it, and the file asks for it (see sfumato generate --over-steps). With 0.2-1 the base model makes
    the layout, which stays the same at all weights. Unset: the steps that were trained, see --min-timestep."""


DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "pocket": {"steps": 120, "batch": 4, "drawn": 48, "min_snr": 0.0},
        # The paper's 500 steps; its loss is not weighted.
        "sd1": {"steps": 500, "batch": 1, "drawn": 40, "min_snr": 0.0},
        "sd2": {"steps": 500, "batch": 1, "drawn": 40, "min_snr": 0.0},
        "sdxl": {"steps": 500, "batch": 1, "drawn": 40, "min_snr": 0.0},
    }
)
"""Defaults of this method, by family, for what a config leaves unset."""
SHOWN = (-1.0, 1.0)
"""The weights of the sample images; the row before the first step shows 0."""


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the path of the adapter."""
    import torch

    from sfumato.training.adapter import groups_of
    from sfumato.training.additions.interface import backward
    from sfumato.training.additions.table import additions_of
    from sfumato.training.loss.objective import per_sample_losses
    from sfumato.training.methods.slider import WEIGHTS
    from sfumato.training.optim import optimizers

    ends = check(config)
    training, way = prepare(config, ends)
    config, base, run, processes = training.config, training.base, training.run, training.processes
    lora, precision, batches = training.trained, training.precision, training.batches
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
    learned, samples = watch(training, ends, way)
    lora.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss = torch.zeros((), device=precision.device)
        for micro in batches.of(step.number):
            further = added.samples(micro)
            lora.set_dropout_samples(config.seed, step.number, micro.places)
            for weight, noised in zip(WEIGHTS, way.draw(config.seed, micro), strict=True):
                # The backward pass, too: with gradient checkpointing it computes the layers again.
                with lora.scaled(weight):
                    with precision.autocast():
                        parts = [added.change(noised, micro), *further]
                        errors = per_sample_losses(base, parts, encode=False, settings=config.loss())
                        shares = errors / (len(WEIGHTS) * batches.global_batch)
                        part = shares[: micro.count].sum() + added.loss(shares[micro.count :], 1)
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
    return training.end(path, lambda: save(path, config, learned, samples, run))


def prepare(config: Config, ends: Sequence[SliderPrompts]) -> tuple[Training, SliderObjective]:
    """Read or draw the images, load the base model, fill in the config, open the run, and attach the adapter."""
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.adapter import adapted_layers, init_from_file, new_adapter
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import BasePrediction
    from sfumato.training.methods.pairs import prepare_sets

    processes = Processes.join(config.device)
    given = read_images(config)
    precision = config.decide_precision(processes, config.optimizer)
    base = config.load_base(precision)
    config, filled = resolve(config, base, given, processes.count)
    adapted, notes = adapted_layers(config, base)
    run = Run.start(config, program="slider", processes=processes, writes=["adapters"] if config.save_every else [])
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)
    run.say(*notes)

    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    encoding = partial(
        config.prepare_as,
        base=base,
        processes=processes,
        will_draw=(config.seed, config.steps, batches.global_batch),
        together=config.batch,
    )
    sets = prepare_sets(given or [draw_ends(config, base, ends, run, processes)], encoding)
    run.say_notes(*sets)
    base.lazy_weights.load_only("unet")  # the others rest until something asks for them
    lora = new_adapter(adapted, config)
    way = way_of(config, base, ends, sets, lora)
    training = Training(config, processes, precision, base, run, batches, sets[0], lora)
    if config.prior_prompts:
        shared: dict[str, Any] = {"order": config.seed, "pristine": lora.disabled, "noising": config.noising(base)}
        training.priors.append(BasePrediction(base, sets[0], config.prior_prompts, config.seed, **shared))
    facts = {"data": sets[0], "partners": sets[1] if sets[1:] else "none"}
    run.identify(**facts, **init_from_file(config.init_from, run, base, lora), base=base.fingerprint())
    pictures = pluralize(len(sets[0]), "image" if ends else "pair")
    layers = pluralize(len(lora.layers), "adapted layer")
    run.say(f"{pictures}, {layers}, {lora.count():,} trained numbers")
    return training, way


def watch(training: Training, ends: Sequence[SliderPrompts], way: SliderObjective) -> tuple[TrainedAdapter, Samples]:
    """Let the run measure, draw and save the adapter now and then. Returns what is written at the end, and what it is
    shown with."""
    from sfumato.runs.options import Request
    from sfumato.training.loss.validation import unrelated_to
    from sfumato.training.methods.slider import SliderMetrics

    config, base, run, lora = training.config, training.base, training.run, training.trained
    dataset, added = training.dataset, training.added
    unrelated = unrelated_to([prompt for one in ends for prompt in one.prompts])
    watched = {"drift": unrelated} if config.measure_every else {}
    metrics = SliderMetrics(base, dataset, watched, lora, way, config.batch, within=added.applied)
    samples = samples_of(config, base, lora, ends, dataset, run, added)
    learned = trained_adapter_of(config, base, lora, dataset, samples, added)
    run.every(config.measure_every, lambda step: run.log(step=step, **metrics.values()))
    run.every(config.sample_every, samples.draw)
    run.every(config.save_every, lambda step: learned.keep(run, config.name, step), on=Request.SAVE)
    return learned, samples


def check(config: Config) -> list[SliderPrompts]:
    """Refuse options that make no sense, before anything is loaded. Returns the ends that prompts name; none where
    pairs of images show them."""
    checks.check_trainer(config)
    checks.check_kind(config)
    if config.dora:
        raise ConfigError("--dora: it learns lengths of weights, which have no opposite at weight -1; leave it out.")
    if not config.prior_prompts:
        checks.only_with(config, "--prior-prompts", "prior_weight")
    folders = {"--more-images": config.more_images, "--less-images": config.less_images}
    if not any(folders.values()):
        return check_words(config)
    for option, folder in folders.items():
        if folder is None:
            raise ConfigError(f"{option} is missing; pairs need both folders, of images with the same names.")
        if not folder.is_dir() and not config.resume:
            raise ConfigError(f"{option} {folder}: no such folder; give one that holds an image of each pair.")
    checks.only_with(config, "--concept", "more", "less", "strength", "drawn", "images")
    if config.concept:
        raise ConfigError(
            "--concept and --more-images are both given; name the ends by prompts, or show them by pairs."
        )
    return []


def check_words(config: Config) -> list[SliderPrompts]:
    """The ends that the prompts name. Raises ConfigError where they name none."""
    from sfumato.training.methods.slider import slider_prompts

    if not config.concept or not config.more:
        missing = "--more" if config.concept else "--concept"
        raise ConfigError(
            f"{missing} is missing; wanted --concept with the prompt that the slider moves and --more with what to, or "
            "pairs of images by --more-images and --less-images."
        )
    checks.only_with(config, "--more-images", "caption")
    if config.images is None and config.epochs is not None:
        raise ConfigError("--epochs: prompts are learned from, and no images of yours; give --steps.")
    if config.images is not None and config.drawn is not None and not config.resume:
        raise ConfigError("--images and --drawn are both given; learn on your own images, or on generated ones.")
    if config.images is not None and len(set(config.concept)) > 1:
        raise ConfigError("--images are of one concept, and --concept is given several times; give it once.")
    return slider_prompts(config.concept, config.more, config.less)


def read_images(config: Config) -> list[ExampleSet]:
    """The images that are given: those of the concept, or both folders of pairs; none where the base draws them."""
    from sfumato import data
    from sfumato.training.methods.pairs import pair_folders
    from sfumato.training.methods.slider import of_concept

    if config.images is not None:
        folders = [config.images]
        # Captions are not used, and need not be there.
        examples = data.read_folder(config.images, caption_template="{caption}", skip_bad=None).in_group("instance")
        found = [of_concept(examples, config.concept[0])]
    elif config.more_images is not None and config.less_images is not None:
        folders = [config.more_images, config.less_images]
        templates = (config.caption, "{caption}")  # nor those of the partners
        read = (
            data.read_folder(path, caption_template=form, skip_bad=None)
            for path, form in zip(folders, templates, strict=True)
        )
        found = [*pair_folders(*read)]
    else:
        return []
    if not config.resume:
        refuse_output_among(config.output, folders)
    return found


def resolve(config: Config, base: Base, given: Sequence[ExampleSet], processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the base family or the method
    filled. given: the images of `read_images`."""
    from sfumato.data import ExampleSet

    defaults = dict(DEFAULTS[base.family.name])
    if given:
        del defaults["drawn"]
    of_epoch = given[0] if given else ExampleSet(())
    config, filled = config_defaults.resolve(config, base, of_epoch, processes, **defaults)
    values = config_defaults.scale_defaults(config)
    if config.prior_prompts:
        values["prior_weight"] = 1.0 if config.prior_weight is None else config.prior_weight
    return dataclasses.replace(config, **values), filled


def draw_ends(config: Config, base: Base, ends: Sequence[SliderPrompts], run: Run, processes: Processes) -> ExampleSet:
    """The base model's images of the concepts and their ends, each with the concept as its caption; generated once and
    kept in the run's folder."""
    from sfumato.data.preparation.planning import square_side
    from sfumato.training.loss.class_images import pictures_of_class
    from sfumato.training.methods.slider import drawn_images, learned_as_concepts, prompt_counts

    images = drawn_images(ends, config.drawn)
    drawn, now = pictures_of_class(
        base,
        prompt_counts(images),
        resolution=square_side(base, config.resolution),
        folder=config.output / "drawn",
        processes=processes,
        what="the prompts",
        option="--output",
    )
    run.say(f"drawn: {pluralize(len(images), 'image')} of the concepts and their ends ({now} now)")
    return learned_as_concepts(images, drawn)


def way_of(
    config: Config, base: Base, ends: Sequence[SliderPrompts], sets: Sequence[Dataset], lora: Attached
) -> SliderObjective:
    """How the slider is told its two ways."""
    from sfumato.training.methods.slider import ImagePairObjective, PromptObjective

    noising = config.noising(base)
    if not ends:
        return ImagePairObjective(base, sets[0], sets[1], noising=noising)
    return PromptObjective(base, sets[0], ends, config.strength, pristine=lora.disabled, noising=noising)


def samples_of(
    config: Config,
    base: Base,
    lora: Attached,
    ends: Sequence[SliderPrompts],
    data: Dataset,
    run: Run,
    average: Addition,
) -> Samples:
    """The run's sample images: each prompt at each of the weights SHOWN."""
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.loss.validation import default_prompts, recognizable_first, unrelated_to
    from sfumato.training.methods.slider import drawing_at_weights
    from sfumato.training.sampling import make_sampler

    asked, own = config.asked_samples()
    concepts = [one.concept for one in ends if one.concept]
    prompts = asked or (
        [*concepts[:2], recognizable_first(unrelated_to(concepts))[0]]
        if concepts
        else default_prompts(data.captions, None, None)
    )
    draw = make_sampler(base, lora, span=config_defaults.span_of(config, base), resolution=config.resolution, own=own)
    return Samples(
        run,
        prompts * len(SHOWN),
        config.seed,
        drawing_at_weights(lora, draw, SHOWN),
        modules=[lora],
        within=average.applied,
        labels=[f"{prompt} ({weight:+g})" for weight in SHOWN for prompt in prompts],
    )


def samples_by_weight(samples: Samples) -> tuple[list[str], list[tuple[float, list[Image]]]]:
    """The prompts of the sample images, and (weight, an image for each prompt) of the finished slider; without images
    where none were generated."""
    rows, count = samples.ends, len(samples.prompts) // len(SHOWN)
    if not rows:
        return [], []
    found = [(weight, rows[-1][place * count : (place + 1) * count]) for place, weight in enumerate(SHOWN)]
    before = [(0.0, rows[0][:count])] if len(rows) > 1 else []
    return samples.prompts[:count], sorted([*found, *before], key=lambda row: row[0])


def trained_adapter_of(
    config: Config, base: Base, lora: Attached, data: Dataset, samples: Samples, average: Addition
) -> TrainedAdapter:
    """The result of the training, and what its file says about itself."""
    from sfumato.precision import DTYPES
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.finish import describe_run

    about = partial(
        describe_run, config, base, data, samples, trigger=(), over_steps=config_defaults.span_of(config, base)
    )
    if config.concept:
        about = partial(about, captions=())  # which are the concepts
    if config.drawn is not None:  # images that the base model generated are no training images
        about = partial(about, images=None, dataset_sha256="")
    return TrainedAdapter(lora, None, base.family.name, about, DTYPES[config.save_precision], average)


def save(path: Path, config: Config, learned: TrainedAdapter, samples: Samples, run: Run) -> None:
    """Write the adapter, its model card and the plot; upload them if asked."""
    from sfumato.training.cards.methods import write_slider_card
    from sfumato.training.finish import drawing_command, plot_and_tell, upload

    description, _ = learned.write(path, run.step)
    prompts, rows = samples_by_weight(samples)
    card = write_slider_card(run.folder, path, description, prompts, rows)
    command = drawing_command(config, description, prompts[0] if prompts else "a dog", lora=path)
    several = quote_argument(f"{path.stem}=-1,0,1")
    plot_and_tell(run, f"slider   {path}", card, f"{command} --sweep {several}", has_samples=bool(rows))
    upload(run, [path], config.push_to_hub)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train slider"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
