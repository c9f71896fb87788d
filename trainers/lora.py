"""Train a LoRA: a style or a subject from a dozen images, in one file of a few megabytes.

    python trainers/lora.py --images DIR --output DIR --steps N --seed S
    accelerate launch trainers/lora.py ...
    sfumato train lora ...

All three run the same program. It trains W' = W + (alpha / rank) B A on the frozen U-Net (Hu et al. 2021). With --algo
and --dora it trains another kind of small update. `train` is the whole method; what it calls is in the library.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.adapters.embeddings.tokens import (
    DEFAULT_LEARNING_RATES,
    DEFAULT_VECTORS,
    MAX_VECTORS,
    check_stands_for,
    contains_placeholder,
    embedding_files,
    placeholder_warnings,
    truncation_notes,
)
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.training import checks, config_defaults, recipe_defaults
from sfumato.training.entry_point import training_entry_point
from sfumato.training.options import KindOptions, TrainerOptions
from sfumato.training.recipe_defaults import Learned
from sfumato.utils.formatting import pluralize
from sfumato.utils.limits import checked_adapter_guidance

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from sfumato.adapters import Attached
    from sfumato.adapters.embeddings.added_tokens import Words
    from sfumato.data import Dataset, ExampleSet
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import BasePrediction, ClassPictures


@dataclass(frozen=True, kw_only=True)
class Config(KindOptions, TrainerOptions):
    """Train a LoRA: a style, a subject or a new word, in a file of a few megabytes.

    A style: `sfumato train lora --images datasets/line-style --output runs/line`

    A subject: `sfumato train lora --images datasets/flamingo --trigger "sks flamingo" --output runs/flamingo`
    """

    learn: Learned | None = None
    """What is learned, and so what the options that are unset become: style, subject, word, or plain (cross-attention
    alone, and no further choices). Unset: word with --train-words, subject with --trigger or --prior-prompts, else
    style."""
    caption: str | None = None
    """Template for captions, such as "{caption}, {trigger} style"; {caption} is the image's own caption, or its file
    name. Unset: of a style "{caption}", else the image's own caption alone."""
    flip: bool | None = None
    """Mirror half of the samples. Not for faces, letters, or anything else with a left and a right. Unset: a style is
    mirrored."""

    rank: int | None = None
    """LoRA rank: a higher rank holds more, and its file is larger. With --algo lokr it is the rank of the large
    factor. Unset: 16, or 32 for a style on pocket."""
    alpha: float | None = None
    """LoRA alpha: the update is scaled by alpha / rank. Unset: the rank, for a scale of 1, or twice the rank for a
    style on pocket; with --rank-stabilised, the value that gives that scale at the base family's default rank."""
    conv_rank: int | None = None
    """Rank for convolutions larger than 1x1, where --conv or --targets adapts them; sd-scripts calls it conv_dim.
    Unset: --rank."""
    conv_alpha: float | None = None
    """Alpha for convolutions larger than 1x1. Unset: the value that gives them the scale of the other layers; with
    --rank-stabilised, --alpha."""
    rank_stabilised: bool = False
    """Scale the update by alpha / sqrt(rank), so that a high rank learns as fast as a low one."""
    loraplus_ratio: float = 1.0
    """LoRA+ (Hayou et al. 2024), for --algo lora: B's learning rate divided by A's. B starts at zero. 2 to 16 learns
    sooner and wants a lower --learning-rate; 1 turns it off."""
    targets: str | None = None
    """Layers to adapt: cross-attention, attention, attention+mlp, transformers (attention, MLP and the projections
    around them, as in sd-scripts), everything (all layers of the U-Net's blocks), or a regular expression over module
    names. Unset: everything on pocket, transformers elsewhere."""
    conv: bool = False
    """Also adapt the convolutions of the U-Net's blocks. --targets everything includes them already."""
    train_text_encoder: bool = False
    """Also adapt the text encoders. Captions are then encoded at each step."""
    text_learning_rate: float | None = None
    """Peak learning rate of the text encoders. Unset: a tenth of the U-Net's; with prodigy, the U-Net's."""
    train_words: tuple[str, ...] = ()
    """Also learn new words that the captions contain, such as `<otter>` (pivotal tuning). Write them in lower case.
    Repeat the option for several."""
    stands_for: tuple[str, ...] = ()
    """Words in the captions that each new word replaces, such as "sks otter". Repeat the option, once for each new
    word."""
    initial_words: tuple[str, ...] = ()
    """Words whose embeddings the new words start from: one entry for all, or one for each. Unset: the mean of all the
    base model's words."""
    word_vectors: int | None = None
    """Number of embedding vectors for each new word, 1 to 16. Unset: 4."""
    word_learning_rate: float | None = None
    """Peak learning rate of the new words. Unset: the base family's default, with lion a quarter of it; with prodigy,
    the U-Net's."""
    words_first: int = 0
    """Train only the new words for this many steps, and after that only the LoRA. 0: train both throughout."""
    bundle: bool = False
    """Save new words in the adapter's file instead of in files beside it. A1111 finds them there; ComfyUI finds them if
    a copy of the file is among its embeddings. Forge generates without them, and diffusers refuses the file."""
    prior_prompts: tuple[str, ...] | None = None
    """Prompts whose images should stay as the base model generates them (prior preservation, as in DreamBooth); repeat
    the option for several, "" is none. They take half of each step, so that an unset --batch is half of its default;
    images with `class = true` in a dataset.toml take a share of their own. Unset: a dozen everyday things for a
    subject, else none."""
    prior_weight: float | None = None
    """Weight of the prior-preservation samples in the loss; the training images have weight 1. If there are both
    prompts and class images, each kind has half of it. Unset: 1."""
    crossed_share: float | None = None
    """For a style: blend the noisy input of this share of the samples with the base model's own version of the image,
    while the target stays the image. The adapter meets such inputs when it generates something it was not trained on.
    Only the noisier seven tenths of the timesteps take part; the base model draws its version of each image once,
    before training. Unset: 0.5 for a style on pocket, else 0."""
    init_from: Path | None = None
    """Start from this adapter instead of from scratch. It must have the same targets and ranks. If its file has new
    words that --train-words names, these start from there, too."""
    adapter_guidance: float | None = None
    """Adapter guidance: how often the adapter's change of the U-Net counts when generating. Sample images use it, and
    the file asks for it (see sfumato generate --adapter-guidance). Unset: 2 for a style on pocket,
    else 0."""
    over_steps: str | None = None
    """START-END: the part of the sampling steps in which the adapter is active, from 0 (noise) to 1 (finished image).
    Sample images use it, and the file asks for it (see sfumato generate --over-steps). With 0-0.8 the base model alone
    takes the last steps, in the style that the prompt names. Unset: the steps that were trained, see --min-timestep."""
    own_negative: bool | None = None
    """For a subject: if a prompt contains the trigger or new words and more, use these words as its negative prompt.
    Sample images use it, and the file asks for it (see sfumato generate --negative). Guidance then amplifies what the
    prompt says besides the subject, such as a style that no training image shows. The subject itself looks a little
    less like its images. Unset: only for a new word on pocket."""
    save_every: int = 0
    """Steps between adapters that are kept to choose from, as OUTPUT/adapters/NAME-step00000500.safetensors, each with
    its new words; 0 keeps only the last."""
    save_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of the adapter's file. Unset: fp32 on pocket, fp16 elsewhere."""

    def __post_init__(self) -> None:
        """An empty prompt is none: with it alone nothing is held."""
        super().__post_init__()
        object.__setattr__(self, "prior_prompts", recipe_defaults.without_empty(self.prior_prompts))


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the path of the adapter."""
    import torch

    from sfumato.training.adapter import groups_of
    from sfumato.training.additions.interface import backward
    from sfumato.training.additions.table import additions_of
    from sfumato.training.finish import finish_adapter
    from sfumato.training.loss.objective import draw_noised, per_sample_losses
    from sfumato.training.optim import optimizers

    check(config)
    training = prepare(config)
    config, base, run, processes = training.config, training.base, training.run, training.processes
    lora, dataset, precision, batches = training.trained, training.dataset, training.precision, training.batches
    added = additions_of(training)
    parameters, groups = training.parameters(), [*groups_of(config, lora), *added.groups()]
    optimizer = optimizers.build_optimizer(
        config.optimizer, groups, weight_decay=config.weight_decay, args=config.optimizer_args
    )
    schedule = optimizers.LearningRateSchedule(
        optimizer, config.schedule, config.steps, config.warmup, cycles=config.cycles, second=config.words_first
    )
    scaler = precision.scaler()
    run.keep(lora=lora, optimizer=optimizer, scaler=scaler, **added.kept())
    learned, samples = watch(training)
    noising, encode = config.noising(base), not embeds_beforehand(config)
    lora.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss = torch.zeros((), device=precision.device)
        for micro in batches.of(step.number):
            noised = added.change(draw_noised(base, dataset, config.seed, micro, noising=noising), micro)
            further = added.samples(micro)
            lora.set_dropout_samples(config.seed, step.number, micro.places)
            with precision.autocast():
                errors = per_sample_losses(base, [noised, *further], encode=encode, settings=config.loss())
                part = errors[: micro.count].sum() / batches.global_batch
                part = part + added.loss(errors[micro.count :], batches.global_batch)
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
    """Read the images, load the base model, fill in the config, open the run, and attach the adapter."""
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.adapter import adapted_layers, init_from_file, new_adapter
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import prepare_datasets
    from sfumato.training.loss.validation import prepare_validation

    processes = Processes.join(config.device)
    examples = read_examples(config)
    precision = config.decide_precision(processes, config.optimizer)
    base = config.load_base(precision)
    subjects, of_class = examples.in_group("instance"), examples.in_group("class")
    kinds = 1 + bool(config.prior_prompts) + bool(of_class)
    config, filled = resolve(config, base, examples, processes.count, kinds=kinds)
    words = new_words(base, config, examples) if config.train_words else None
    adapted, notes = adapted_layers(config, base)
    run = Run.start(config, program="lora", processes=processes, writes=written(config))
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)
    run.say(*notes)
    if words:
        tokenizer = base.tokenizers[0]
        run.say(*placeholder_warnings(config.train_words, tokenizer))
        run.say(*truncation_notes(config.initial_words, config.word_vectors, tokenizer))

    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    embed, crossed = embeds_beforehand(config), bool(config.crossed_share)
    dataset, class_set = prepare_datasets(
        config, base, subjects, of_class, batches.global_batch, processes, embed_text=embed, drawn_over=crossed
    )
    held_out = prepare_validation(config, base, examples, processes)
    run.say_notes(dataset, class_set, held_out)
    # The VAE has given its latents; it rests until something is drawn.
    base.lazy_weights.load_only("unet", *(("text",) if config.train_text_encoder or words else ()))
    lora = new_adapter(adapted, config)
    facts = {"data": dataset, "class": class_set or "none", "validation": held_out or "none"}
    # A run that goes on needs the file for the words alone that its crossed samples began with.
    start = init_from_file(
        config.init_from, run, base, lora, words, config.initial_words, always=bool(words and crossed)
    )
    run.identify(**facts, **start, base=base.fingerprint())
    beside = f"{len(class_set)} of the class, " if class_set else ""
    pictures, layers = pluralize(len(dataset), "image"), pluralize(len(lora.layers), "adapted layer")
    run.say(f"{pictures}, {beside}{layers}, {lora.count():,} trained numbers")
    priors = priors_of(config, base, dataset, class_set, lora)
    training = Training(config, processes, precision, base, run, batches, dataset, lora, subjects, words=words)
    training.class_set, training.held_out, training.priors = class_set, held_out, priors
    return training


def watch(training: Training) -> tuple[TrainedAdapter, Samples]:
    """Let the run measure, draw and save the adapter now and then. Returns what is written at the end, and what it is
    shown with."""
    from sfumato.runs.options import Request
    from sfumato.training.loss.validation import UNRELATED, Metrics

    config, base, run, lora = training.config, training.base, training.run, training.trained
    assert training.subjects is not None
    drift_prompts = {"drift": UNRELATED} if config.measure_every else {}
    contexts = {"pristine": lora.disabled, "within": training.added.applied}
    metrics = Metrics(base, training.dataset, drift_prompts, **contexts, modules=[lora], held_out=training.held_out)
    trigger = list(dict.fromkeys([*training.subjects.triggers, *config.train_words]))
    samples = samples_of(training, trigger)
    learned = trained_adapter_of(training, samples, trigger)
    run.every(config.measure_every, lambda step: run.log(step=step, **metrics.values()))
    run.every(config.sample_every, samples.draw)
    run.every(config.save_every, lambda step: learned.keep(run, config.name, step), on=Request.SAVE)
    return learned, samples


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    checks.check_trainer(config)
    checks.check_kind(config)
    if not config.train_text_encoder:
        checks.only_with(config, "--train-text-encoder", "text_learning_rate")
    checked_adapter_guidance(config.adapter_guidance or 0.0)
    check_words(config)


def check_words(config: Config) -> None:
    """Refuse new words, or options of new words, that make no sense."""
    for prompt in config.prior_prompts or ():
        if new := [word for word in config.train_words if contains_placeholder(word, prompt)]:
            raise ConfigError(f"--prior-prompts {prompt!r} holds {new[0]}, which the base does not know; leave it out.")
    count = len(config.train_words)
    if config.learn == "word" and not count:
        raise ConfigError("--learn word wants the new word; name it with --train-words, such as <otter>.")
    if not count:
        of_words = ("stands_for", "initial_words", "word_vectors", "word_learning_rate", "words_first", "bundle")
        checks.only_with(config, "--train-words", *of_words)
    else:
        checks.check_words_are_seen(config)
    if config.word_vectors is not None and config.word_vectors > MAX_VECTORS:
        raise ConfigError(f"--word-vectors is {config.word_vectors}; it must be 1 to {MAX_VECTORS}.")
    if config.stands_for and len(config.stands_for) != count:
        given, words = pluralize(len(config.stands_for), "time"), pluralize(count, "word")
        raise ConfigError(f"--stands-for is given {given} for {words}; give it for each.")
    check_stands_for(config.stands_for)
    if config.bundle and (dotted := [word for word in config.train_words if "." in word]):
        raise ConfigError(f"--bundle: {dotted[0]} has a dot, with which it cannot be bundled; spell it without.")
    if config.words_first and config.optimizer == "prodigy":
        raise ConfigError(
            "--words-first with --optimizer prodigy: it finds one step for all, and would give the words' to the LoRA. "
            "Take adamw, or leave --words-first out."
        )
    if config.words_first < 0 or (config.steps is not None and config.words_first >= config.steps):
        raise ConfigError(f"--words-first {config.words_first}: wanted 0, or fewer than the {config.steps} steps.")


def resolve(
    config: Config, base: Base, examples: ExampleSet, processes: int, *, kinds: int
) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the base family filled.

    kinds: number of kinds of samples that share a step: the training images, class images, prior prompts.
    """
    family, learned = base.family.name, recipe_defaults.learned_by(config)
    recipe = recipe_defaults.lora_defaults(learned, family)
    if recipe["crossed_share"] and not _may_cross(config, base, examples):
        recipe["crossed_share"] = 0.0
    if config.prior_prompts is None and recipe["prior_prompts"]:
        kinds += 1
    share = {"batch": max(1, base.defaults.batch // kinds)} if kinds > 1 else {}
    config, filled = config_defaults.resolve(config, base, examples, processes, **recipe, **share)
    if config.learn is None and learned:
        config, filled = dataclasses.replace(config, learn=learned), ["learn", *filled]
    filled = [name for name in filled if not recipe_defaults.is_plain(config, name)]
    if config.crossed_share and not config.resume:
        from sfumato.training.loss.crossed_samples import first_timestep

        first, timesteps = first_timestep(base), config.noising(base).timesteps
        if timesteps.stop <= first:
            raise ConfigError(
                f"--crossed-share {config.crossed_share:g}: samples are crossed from timestep {first} on, and "
                f"--max-timestep {timesteps.stop} leaves none; give --crossed-share 0, or more timesteps."
            )
    scale = recipe_defaults.style_scale(learned, family)
    alpha = scale * (math.sqrt(base.defaults.rank) if config.rank_stabilised else config.rank)
    values = config_defaults.scale_defaults(config, alpha, rank_stabilised=config.rank_stabilised)
    if kinds > 1:
        values["prior_weight"] = 1.0 if config.prior_weight is None else config.prior_weight
    if config.train_words:
        rate = DEFAULT_LEARNING_RATES[base.family.name] / (
            config_defaults.LION_RATE_DIVISOR if config.optimizer == "lion" else 1
        )
        values["word_vectors"] = DEFAULT_VECTORS if config.word_vectors is None else config.word_vectors
        values["word_learning_rate"] = config_defaults.resolve_learning_rate(config, "word_learning_rate", rate)
        if config.words_first >= config.steps:
            raise ConfigError(f"--words-first {config.words_first}: the run has {config.steps} steps; make it fewer.")
        turns = (config.words_first, config.steps - config.words_first)
        if config.words_first and config.warmup > min(turns):
            raise ConfigError(
                f"--warmup {config.warmup} is longer than a turn beside --words-first: they have {turns[0]} and "
                f"{turns[1]} steps; make it shorter."
            )
        if config.words_first:
            config_defaults.check_cycles(config, min(turns))
    return dataclasses.replace(config, **values), filled


def _may_cross(config: Config, base: Base, examples: ExampleSet) -> bool:
    """Whether samples can be crossed where nobody asked for it: the base draws each view once, and some timesteps are
    noisy enough."""
    from sfumato.training.loss.crossed_samples import first_timestep

    crops = {config.crop, *(example.options.crop for example in examples)}
    stop = config.max_timestep
    return "random" not in crops and (stop is None or stop > first_timestep(base)) and not base.inpaints


def written(config: Config) -> list[str]:
    """The names of what is written into the run's folder, besides what every run writes."""
    words = () if config.bundle else config.train_words
    paths = embedding_files(config.output, config.name, words, alone=False)
    return [*(["adapters"] if config.save_every else []), *(path.name for path in paths.values())]


def read_examples(config: Config) -> ExampleSet:
    """Read the images and captions. Raises DataError for captions without the new words."""
    from sfumato.data.folder import unused_trigger_note
    from sfumato.data.placeholder_captions import insert_placeholders

    learned, words = recipe_defaults.learned_by(config), config.stands_for or config.train_words
    if learned == "style" and config.caption is None:
        examples = recipe_defaults.read_named(config, words=words)
    else:
        examples = config.read_examples(words=words)
    held = config.prior_prompts or (config.prior_prompts is None and learned == "subject")
    if config.prior_weight is not None and not (held or examples.in_group("class")):
        raise ConfigError(
            "--prior-weight is for what shall draw as before; name it with --prior-prompts, or give images of it in "
            "a dataset.toml, with class = true."
        )
    if config.own_negative and not config.train_words and not examples.in_group("instance").triggers:
        unused = unused_trigger_note(examples, config.trigger) if config.trigger else ""
        raise ConfigError(f"--own-negative: {unused or 'give the words of the subject by --trigger, as sks otter'}.")
    if not config.train_words:
        return examples
    examples = insert_placeholders(examples, config.train_words, config.stands_for)
    checks.refuse_dropped_words(config, examples.in_group("instance"), config.train_words)
    return examples


def new_words(base: Base, config: Config, examples: ExampleSet) -> Words:
    """Create the words to learn, and add them to the base model."""
    from sfumato.adapters.embeddings import embedding

    words = embedding.new_words(
        base,
        config.train_words,
        vectors=config.word_vectors,
        start="words" if config.initial_words else "mean",
        initial=config.initial_words,
        seed=config.seed,
    )
    words.check([*config.asked_samples()[0], *examples.captions])
    return words


def samples_of(training: Training, trigger: Sequence[str]) -> Samples:
    """The run's sample images, generated in the way that its file will ask for."""
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.loss.validation import default_prompts
    from sfumato.training.sampling import make_sampler

    config, base, lora = training.config, training.base, training.trained
    assert training.subjects is not None
    first = training.subjects[0]  # sources may have templates and triggers of their own
    asked, own = config.asked_samples()
    prompts = asked or default_prompts(training.dataset.captions, first.template, first.trigger)
    draw = make_sampler(
        base,
        lora,
        config.adapter_guidance,
        config_defaults.span_of(config, base),
        negatives=trigger if config.own_negative else (),
        resolution=config.resolution,
        own=own,
    )
    return Samples(training.run, prompts, config.seed, draw, modules=[lora], within=training.added.applied)


def embeds_beforehand(config: Config) -> bool:
    """Whether captions are embedded once, before the loop. True if neither text encoders nor words are trained."""
    return not config.train_text_encoder and not config.train_words


def priors_of(
    config: Config, base: Base, dataset: Dataset, class_set: Dataset | None, lora: Attached
) -> list[ClassPictures | BasePrediction]:
    """What joins each batch for prior preservation: the class images, and the prior prompts with the images of that
    batch."""
    from sfumato.training.loss.prior import BasePrediction, ClassPictures

    noising = config.noising(base)
    priors: list[ClassPictures | BasePrediction] = []
    if class_set:
        priors.append(ClassPictures(base, class_set, config.seed, noising=noising))
    if config.prior_prompts:
        with lora.disabled():
            predicted = BasePrediction(
                base,
                dataset,
                config.prior_prompts,
                config.seed,
                order=config.seed,
                pristine=lora.disabled,
                noising=noising,
                embed_text=embeds_beforehand(config),
            )
        priors.append(predicted)
    return priors


def trained_adapter_of(training: Training, samples: Samples, trigger: Sequence[str]) -> TrainedAdapter:
    """The result of the training, and what its files say about themselves."""
    from sfumato.precision import DTYPES
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.finish import describe_run

    config, base = training.config, training.base

    def about(**more: Any) -> Description:
        return describe_run(
            config,
            base,
            training.dataset,
            samples,
            trigger=trigger,
            adapter_guidance=config.adapter_guidance,
            over_steps=config_defaults.span_of(config, base),
            negatives=trigger if config.own_negative else (),
            **more,
        )

    kept_as = (base.family.name, about, DTYPES[config.save_precision], training.added, config.bundle)
    return TrainedAdapter(training.trained, training.words, *kept_as)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train lora"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
