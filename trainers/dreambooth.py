"""DreamBooth: bind a subject to a word, from a few images of it, and preserve the class that it belongs to.

    python trainers/dreambooth.py --images DIR --output DIR --class-name otter
    accelerate launch trainers/dreambooth.py ...
    sfumato train dreambooth ...

All three run the same program. The loss is the subject's denoising error plus the weighted error of the class (Ruiz et
al. 2023, eq. 2). `train` is the whole method; what it calls is in the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.models.prompts.syntax import has_phrase
from sfumato.training import checks, config_defaults, recipe_defaults
from sfumato.training.entry_point import training_entry_point
from sfumato.training.methods.subject import PreservedPrompts, Subject, read_subject, with_caption
from sfumato.training.options import FullOptions, KindOptions
from sfumato.utils.formatting import format_list, option_flag, pluralize

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from torch import nn

    from sfumato.adapters import Attached
    from sfumato.data import Dataset, ExampleSet
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.runs.processes import MicroBatch, Processes
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.additions.interface import Addition, Training
    from sfumato.training.loss.prior import BasePrediction, ClassPictures

Pristine = Callable[[], AbstractContextManager[object]]
"""A context in which the model is the unchanged base model again."""
DEFAULTS: Mapping[tuple[str, str], Mapping[str, Any]] = MappingProxyType(
    {
        # (method, family): what differs from the family's own defaults.
        ("full", "pocket"): {"learning_rate": 1e-4, "steps": 240, "batch": 4, "class_count": 64},
        ("lora", "pocket"): {"learning_rate": 6e-4, "steps": 240, "batch": 4, "class_count": 64},
        # diffusers' guide: 5e-6 without and 800 steps with the prior, 200 pictures of the class, one picture a step.
        ("full", "sd1"): {"learning_rate": 5e-6, "steps": 800, "batch": 1, "class_count": 200},
        ("full", "sd2"): {"learning_rate": 5e-6, "steps": 800, "batch": 1, "class_count": 200},
        ("full", "sdxl"): {"learning_rate": 5e-6, "steps": 800, "batch": 1, "class_count": 200},
        ("lora", "sd1"): {"steps": 500, "batch": 1, "class_count": 200},
        ("lora", "sd2"): {"steps": 500, "batch": 1, "class_count": 200},
        ("lora", "sdxl"): {"steps": 500, "batch": 1, "class_count": 200},
    }
)


@dataclass(frozen=True, kw_only=True)
class Config(KindOptions, FullOptions):
    """Bind a subject to a word, in a LoRA or in the whole U-Net, and preserve its class.

    Example: `sfumato train dreambooth --images datasets/flamingo --class-name flamingo --output runs/me`
    """

    method: Literal["full", "lora"] = "lora"
    """What to train: an adapter (lora), or the U-Net's own weights (full)."""
    identifier: str = "sks"
    """Word that will mean this one subject. Choose a rare word, so that there is no meaning to unlearn. If the images
    have captions, these must contain it. If they have another word before the class (such as "zwx dog"), leave this
    option out: that word is then used."""
    class_name: str | None = None
    """What the subject is, such as otter. Images of a folder without captions of their own get "IDENTIFIER CLASS"; in a
    dataset.toml the `words` of each source say it."""
    instance_prompt: str | None = None
    """Caption for all images of the subject, instead of their own captions."""
    class_prompt: str | None = None
    """Prompt of the class. Unset: the class name. Each caption that says more than "IDENTIFIER CLASS" also adds a class
    prompt."""
    prior: Literal["none", "pictures", "base"] = "pictures"
    """Prior preservation: what keeps the class as it was. pictures: class images that the base model generated. base:
    the frozen base model's own predictions. none: no prior preservation."""
    prior_weight: float = 1.0
    """Weight of the class in the loss; the subject has weight 1. With 0 the class is generated and measured, but not
    trained on."""
    prior_prompts: tuple[str, ...] | None = None
    """Further prompts, besides the class, whose images should stay as before; the class keeps half of --class-count.
    Repeat the option for several; "" is none. If class images are given, the base model generates --class-count images
    of these prompts. Unset: a dozen everyday things with --method lora, none with --method full."""
    class_images: Path | None = None
    """Folder of class images. Unset: the base model generates them."""
    class_count: int | None = None
    """Number of images that the base model generates. Unset: the base family's default."""
    class_cache: Path | None = None
    """Folder that keeps generated class images for other runs. Unset: the run's own folder."""
    alpha: float | None = None
    """LoRA alpha, for --method lora: the update is scaled by alpha / rank. Unset: the rank, for a scale of 1."""
    conv_rank: int | None = None
    """Rank for convolutions larger than 1x1, where --method lora adapts them; sd-scripts calls it conv_dim. Unset:
    --rank."""
    conv_alpha: float | None = None
    """Alpha for convolutions larger than 1x1. Unset: the value that gives them the scale of the other layers."""
    loraplus_ratio: float = 1.0
    """LoRA+ (Hayou et al. 2024), for --method lora and --algo lora: B's learning rate divided by A's. B starts at zero.
    2 to 16 learns sooner and wants a lower --learning-rate; 1 turns it off."""
    targets: str = "everything"
    """Layers that a LoRA adapts: cross-attention, attention, attention+mlp, transformers (attention, MLP and the
    projections around them), everything (all layers of the U-Net's blocks), or a regular expression over module
    names."""
    over_steps: str | None = None
    """START-END: the part of the sampling steps in which a LoRA is active, from 0 (noise) to 1 (finished image). Sample
    images use it, and the file asks for it (see sfumato generate --over-steps). With 0-0.8 the base model alone takes
    the last steps, in the style that the prompt names. Unset: the steps that were trained, see --min-timestep."""
    own_negative: bool = False
    """With --method lora: if a prompt contains the subject's words and more, use these words as its negative prompt.
    Sample images use it, and the file asks for it (see sfumato generate --negative). Guidance then amplifies what the
    prompt says besides the subject, such as a style that no training image shows. The subject itself looks less like
    its images: on pocket, with existing words such as "sks otter", this costs more than it brings (docs/words.md)."""
    save_every: int = 0
    """With --method lora: steps between adapters that are kept besides the last, to choose from, as
    OUTPUT/adapters/NAME-step00000500.safetensors; 0 keeps none."""

    def __post_init__(self) -> None:
        """An empty prompt is none: with it alone the class is all that is held."""
        super().__post_init__()
        object.__setattr__(self, "prior_prompts", recipe_defaults.without_empty(self.prior_prompts))


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
    training, words = prepare(config)
    config, base, run, processes = training.config, training.base, training.run, training.processes
    trained, dataset, precision, batches = training.trained, training.dataset, training.precision, training.batches
    added = additions_of(training)
    parameters, own = training.parameters(), [*groups(trained, config), *added.groups()]
    optimizer = optimizers.build_optimizer(
        config.optimizer, own, weight_decay=config.weight_decay, args=config.optimizer_args
    )
    schedule = optimizers.LearningRateSchedule(
        optimizer, config.schedule, config.steps, config.warmup, cycles=config.cycles
    )
    scaler = precision.scaler()
    fused = FusedBackwardPass(optimizer, scaler) if config.fused else None
    run.keep(trained=trained, optimizer=optimizer, scaler=scaler, **added.kept())
    finish = watch(training, words)
    noising, encode = config.noising(base), config.train_text_encoder
    trained.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss = torch.zeros((), device=precision.device)
        for micro in batches.of(step.number):
            noised = added.change(draw_noised(base, dataset, config.seed, micro, noising=noising), micro)
            further = added.samples(micro)
            set_dropout(trained, config.seed, micro)
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


@dataclass(frozen=True)
class Wording:
    """What the subjects, the class and the prompts that are to be preserved are called."""

    subject: Subject
    subjects: list[Subject]
    preserved: PreservedPrompts


def prepare(config: Config) -> tuple[Training, Wording]:
    """Read the images, load the base model, fill in the config, open the run, and make what preserves the class."""
    from sfumato.adapters.embeddings import tokens
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.adapter import adapted_layers, new_adapter
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import prepare_datasets
    from sfumato.training.loss.validation import prepare_validation
    from sfumato.training.methods.full import decide_precision, unfreeze

    processes = Processes.join(config.device)
    subject = subject_of(config)
    examples = read_examples(config, subject)
    instance = examples.in_group("instance")
    precision = decide_precision(config, processes, adapting=config.method == "lora")
    base = config.load_base(precision)
    config, filled = resolve(config, base, examples, processes.count)
    adapted, notes = adapted_layers(config, base) if config.method == "lora" else ({}, [])
    run = Run.start(config, program="dreambooth", processes=processes, writes=written(config))
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)
    run.say(*notes)
    found = identifiers(config, instance)
    for word in found[:3]:  # a folder may hold many subjects
        run.say(*tokens.examine_identifier(word, base).lines())

    subjects = subjects_of(config, subject, found)
    class_prompts = [prompt for each in subjects for prompt in each.class_prompts(instance.captions)]
    preserved = PreservedPrompts.of(class_prompts, config.prior_prompts)
    pictures = class_pictures(config, base, examples, preserved, run, processes)
    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    embed = not config.train_text_encoder
    seen = embed and config.prior == "pictures"  # what the base predicts, it predicts for the class prompts
    dataset, class_set = prepare_datasets(
        config, base, instance, pictures, batches.global_batch, processes, embed_text=embed, embed_class=seen
    )
    held_out = prepare_validation(config, base, examples, processes)
    run.say_notes(dataset, class_set, held_out)
    # The VAE has given its latents; it rests until something is drawn.
    base.lazy_weights.load_only("unet", *(("text",) if config.train_text_encoder else ()))
    lora = new_adapter(adapted, config) if config.method == "lora" else None
    trained = unfreeze(base, text=config.train_text_encoder) if lora is None else lora
    facts = {"data": dataset, "class": class_set or "none", "validation": held_out or "none"}
    run.identify(**facts, base=base.fingerprint())
    size = sum(p.numel() for p in trained.parameters())
    run.say(f"{pluralize(len(dataset), 'image')}, {len(class_set or [])} of the class, {size:,} trained numbers")
    training = Training(config, processes, precision, base, run, batches, dataset, trained, instance)
    training.class_set, training.held_out, training.prior_name = class_set, held_out, "class_loss"
    training.priors = priors_of(training, preserved)
    return training, Wording(subject, subjects, preserved)


def pristine_of(trained: nn.Module) -> Pristine:
    """A context in which the model is the unchanged base model; of a whole base nothing has been trained yet."""
    from sfumato.adapters import Attached

    return trained.disabled if isinstance(trained, Attached) else nullcontext


def set_dropout(trained: nn.Module, seed: int, micro: MicroBatch) -> None:
    """Tell a LoRA which samples come next."""
    from sfumato.adapters import Attached

    if isinstance(trained, Attached):
        trained.set_dropout_samples(seed, micro.step, micro.places)


def watch(training: Training, words: Wording) -> Callable[[Path], None]:
    """Let the run measure, draw and save now and then. Returns what writes the result to a path, with its card."""
    from sfumato.adapters import Attached
    from sfumato.runs.options import Request
    from sfumato.training.loss.validation import DriftLimit, Metrics, recognizable_first, unrelated_to

    config, base, run, trained = training.config, training.base, training.run, training.trained
    assert training.subjects is not None
    unrelated = unrelated_to(words.preserved.of_class)
    watched = {"drift": unrelated, "class_drift": words.preserved.prompts} if config.measure_every else {}
    contexts = {"pristine": pristine_of(trained), "within": training.added.applied}
    metrics = Metrics(base, training.dataset, watched, **contexts, modules=[trained], held_out=training.held_out)
    trigger = triggers(config, words.subjects, training.subjects)
    prompts = words.subject.sample_prompts(training.dataset.captions, recognizable_first(unrelated)[0])
    samples = samples_of(training, prompts, trigger)
    about = partial(description_of, config, base, training.dataset, samples, trigger)
    lora = trained if isinstance(trained, Attached) else None
    learned = trained_adapter_of(config, base, lora, about, training.added) if lora else None
    limit = DriftLimit(config.drift_limit, run.rows())
    run.every(config.measure_every, limit.watching(run, metrics, training.processes))
    run.every(config.sample_every, samples.draw)
    if learned:
        run.every(config.save_every, lambda step: learned.keep(run, config.name, step), on=Request.SAVE)

    def finish(path: Path) -> None:
        limit.tell(run, config.steps)
        save(path, config, base, learned, about(steps=run.step), samples, run)

    return finish


def subject_of(config: Config) -> Subject:
    """The subject and its class in words."""
    prompt = config.instance_prompt or f"{config.identifier} {config.class_name}"
    return Subject(prompt, config.class_prompt or config.class_name)


def written(config: Config) -> list[str]:
    """The names of what is written into the run's folder, besides what every run writes."""
    if config.save == "folder":
        return [config.name]
    return ["adapters"] if config.save_every else []


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    checks.check_trainer(config)
    if config.method == "full" and config.save in (None, "folder"):
        checks.check_name(config, folder=True)
    checks.check_full(config)
    refuse_idle(config)
    checks.check_kind(config)
    check_words(config)
    check_saving(config)
    if config.class_images is not None and not config.resume and not config.class_images.exists():
        raise ConfigError(f"--class-images {config.class_images}: there is no such folder; name one, or leave it out.")


def refuse_idle(config: Config) -> None:
    """Refuse options that have no effect together with the others."""
    if config.prior == "none":
        needed = "--prior pictures or --prior base"
        checks.only_with(config, needed, "class_images", "prior_weight")
    if config.prior != "pictures":
        checks.only_with(config, "--prior pictures", "class_count")
    elif config.class_images is not None and not preserved_things(config):
        checks.only_with(config, "--prior-prompts beside --class-images", "class_count")
    if config.instance_prompt and config.identifier not in config.instance_prompt:
        checks.only_with(config, "it in --instance-prompt", "identifier")
    if config.method == "full":
        of_lora = ("alpha", "conv_rank", "conv_alpha", "loraplus_ratio", "targets", "over_steps", "own_negative")
        of_kind = [field.name for field in dataclasses.fields(KindOptions)]
        checks.only_with(config, "--method lora", *of_lora, "save_every", "quantize", *of_kind)
        if config.save != "lora":
            checks.only_with(config, "--method lora or --save lora", "rank")


def preserved_things(config: Config) -> tuple[str, ...]:
    """The further prompts whose images stay as before: those that are named, or of a LoRA everyday things."""
    if config.prior_prompts is not None:
        return config.prior_prompts
    if (run := recipe_defaults.of_run(config)) is not None:
        return tuple(run.get("prior_prompts", ()))
    return recipe_defaults.EVERYDAY_THINGS if config.method == "lora" and config.prior != "none" else ()


def check_words(config: Config) -> None:
    """Refuse a class, a subject or captions about which too little is said, or too much."""
    if not config.class_name and not (config.instance_prompt and config.class_prompt):
        raise ConfigError("--class-name is unset; say what the subject is, such as --class-name otter.")
    if not config.identifier.strip():
        raise ConfigError("--identifier is empty; give a rare word, such as sks.")
    for option in ("class_name", "class_prompt", "instance_prompt"):
        if (words := getattr(config, option)) is not None and not words.strip():
            raise ConfigError(f"{option_flag(option)} is empty; give words, or leave it out.")
    if config.instance_prompt and config.caption:
        raise ConfigError("--instance-prompt and --caption are both given; each decides all captions, so give one.")
    if config.instance_prompt and config.wildcards:
        raise ConfigError(
            "--instance-prompt and --wildcards are both given; the prompt is all captions, so no wildcard is left. "
            "Give one, or write wildcards = true in the source of a class."
        )


def check_saving(config: Config) -> None:
    """Refuse a form that the method's result cannot be written in."""
    if config.save is not None and config.method == "lora" and config.save != "lora":
        raise ConfigError(f"--save {config.save} wants --method full; a LoRA is written as a LoRA.")
    if config.keep_energy is not None and (config.method, config.save) != ("full", "lora"):
        raise ConfigError("--keep-energy belongs to --method full --save lora; leave it out, or give both.")


def resolve(config: Config, base: Base, examples: ExampleSet, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the method or the base family
    filled."""
    defaults = DEFAULTS[config.method, base.family.name]
    unused = {"class_count"} if config.prior != "pictures" else set()
    if config.method == "full" and (config.save != "lora" or config.keep_energy is not None):
        unused.add("rank")
    given = {name: getattr(config, name) for name in unused}
    things = preserved_things(config)
    config, filled = config_defaults.resolve(config, base, examples, processes, prior_prompts=things, **defaults)
    values = given | {"save": config.save or ("folder" if config.method == "full" else "lora")}
    if config.method == "lora":
        values |= config_defaults.scale_defaults(config)
    return dataclasses.replace(config, **values), [name for name in filled if name not in unused]


def read_examples(config: Config, subject: Subject) -> ExampleSet:
    """Read the subject's images with their captions, and the class images that a dataset.toml may contain."""
    folder = read_subject(
        config.images,
        subject.prompt,
        template=config.caption,
        trigger=_trigger(config),
        mask=config.mask,
        caption_lines=config.caption_lines,
        wildcards=config.wildcards,
        skip_bad=config.skip_bad,
        in_all=bool(config.instance_prompt),
        of_class=config.prior != "none",
    )
    folder = config.checked(folder)
    if config.class_images and folder.in_group("class") and not config.resume:
        raise ConfigError(
            f"--class-images and the sources of {config.images} with class = true are both images of the class; give "
            "one of them."
        )
    if folder.in_group("class") and config.prior == "pictures" and not preserved_things(config):
        checks.only_with(config, "--prior-prompts beside images of the class", "class_count")
    if config.instance_prompt:
        return with_caption(folder, config.instance_prompt)
    if not any(has_phrase(config.identifier, caption) for caption in folder.in_group("instance").captions):
        checks.only_with(config, "it in a caption", "identifier")
    return folder


def _trigger(config: Config) -> str | None:
    """What replaces {trigger} in templates."""
    return config.trigger or (None if config.instance_prompt else config.identifier)


def subjects_of(config: Config, subject: Subject, words: Sequence[str]) -> list[Subject]:
    """The subjects that are learned. words: the words that subjects are bound to; captions may have these instead of
    --identifier."""
    if config.instance_prompt or not config.class_name or config.identifier in words:
        return [subject]
    return [Subject(f"{word} {config.class_name}", subject.of_class) for word in words] or [subject]


def triggers(config: Config, subjects: Sequence[Subject], pictures: ExampleSet) -> list[str]:
    """The trigger words of the subjects: the words that their captions were made with. If that is the identifier, the
    class follows it."""
    prompts = [subject.prompt for subject in subjects]
    if config.instance_prompt:
        return [config.trigger or prompts[0]]
    if config.trigger is not None:
        return pictures.triggers
    found = dict.fromkeys(prompts[0] if each == config.identifier else each for each in pictures.triggers)
    captions = pictures.captions
    said = [prompt for prompt in prompts if any(has_phrase(prompt, caption, plural=True) for caption in captions)]
    return list(found) or said


def identifiers(config: Config, subjects: ExampleSet) -> list[str]:
    """The words that subjects are bound to: --identifier, or the word before the class in captions that do not contain
    it."""
    from sfumato.adapters.embeddings.tokens import words_before_class

    captions = list(dict.fromkeys(subjects.captions))
    if any(has_phrase(config.identifier, caption) for caption in captions):
        return [config.identifier]
    return words_before_class(config.class_name or (config.class_prompt or "").split()[-1], captions)


def class_pictures(
    config: Config, base: Base, examples: ExampleSet, preserved: PreservedPrompts, run: Run, processes: Processes
) -> ExampleSet | None:
    """The class images and the images of the further prompts; None without any.

    Class images come from a folder or the dataset.toml; the base model then generates only those of the further
    prompts. Without them it generates both, once.
    """
    given = examples.in_group("class")
    if config.class_images is not None and config.prior != "none":
        given = read_subject(config.class_images, preserved.of_class[0], skip_bad=config.skip_bad)
    # Those that are given show the class, and the captions' forms of it.
    wanted = PreservedPrompts.of([], config.prior_prompts) if given else preserved
    if config.prior == "pictures" and wanted.prompts:
        drawn = draw_preserved(config, base, wanted, run, processes)
        return dataclasses.replace(given, examples=(*given, *drawn)) if given else drawn
    if config.prior == "none":
        say_nothing_is_held(config, run)
        given = None
    if config.class_cache is not None:
        run.say("--class-cache: the base draws no images of the class, so that none are kept there")
    return given or None


def say_nothing_is_held(config: Config, run: Run) -> None:
    """Say which class images and prompts of the data and the options --prior none leaves aside."""
    from sfumato.data.dataset_config import read_sources

    sources = read_sources(
        config.images, caption_template=config.caption, trigger=_trigger(config), wildcards=config.wildcards
    )
    if config.prior_prompts or any(source.group == "class" for source in sources):
        run.say("--prior none: neither images of the class nor prompts are held, only how they drift is measured")


def draw_preserved(
    config: Config, base: Base, preserved: PreservedPrompts, run: Run, processes: Processes
) -> ExampleSet:
    """The base model's images of what shall draw as before: each is generated once and kept."""
    from sfumato.data.preparation.planning import square_side
    from sfumato.training.loss.class_images import pictures_of_class

    counts = preserved.counts(config.class_count)
    folder = config.class_cache or config.output / "class"
    side = square_side(base, config.resolution)
    pictures, drawn = pictures_of_class(base, counts, resolution=side, folder=folder, processes=processes)
    run.say(f"class images: {config.class_count} of {', '.join(counts)} ({drawn} drawn now)")
    if left := [prompt for prompt in preserved.prompts if prompt not in counts]:
        run.say(f"nothing holds {format_list(left)}: --class-count {config.class_count} is too few for each")
    return pictures


def priors_of(training: Training, preserved: PreservedPrompts) -> list[ClassPictures | BasePrediction]:
    """What gives the class half of each batch; none if there is no prior preservation."""
    from sfumato.training.loss.prior import BasePrediction, ClassPictures

    config, base, class_set, noising = training.config, training.base, training.class_set, training.config.noising
    if config.prior == "none":
        return []
    if config.prior == "pictures":
        assert class_set is not None, "class_pictures() has drawn them, if none were given"
        return [ClassPictures(base, class_set, config.seed, noising=noising(base))]
    predicted = BasePrediction(
        base,
        training.dataset if class_set is None else class_set,
        preserved.interleaved(),
        config.seed,
        order=config.seed if class_set is None else None,
        pristine=pristine_of(training.trained),
        noising=noising(base),
        embed_text=not config.train_text_encoder,
    )
    steps = training.run.remaining_steps(config.steps)
    if config.method == "full" and steps:
        shown = training.processes.is_main
        training.run.say(predicted.precompute_targets(steps, training.batches, shown=shown))
    return [predicted]


def groups(trained: Attached | nn.ModuleDict, config: Config) -> list[dict[str, Any]]:
    """Parameter groups: the U-Net's, and the text encoders' with their own learning rate."""
    from sfumato.adapters import Attached
    from sfumato.training.adapter import groups_of
    from sfumato.training.optim import optimizers

    if isinstance(trained, Attached):
        return groups_of(config, trained)
    parts = {part: model.parameters() for part, model in trained.items()}
    return optimizers.parameter_groups(parts, config.learning_rate, config.text_learning_rate)


def samples_of(training: Training, prompts: Sequence[str], trigger: Sequence[str]) -> Samples:
    """The run's sample images, of these prompts if none are asked for, generated as a LoRA's file will ask for."""
    from sfumato.adapters import Attached
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.sampling import make_sampler

    config, base, trained = training.config, training.base, training.trained
    lora = trained if isinstance(trained, Attached) else None
    asked, own = config.asked_samples()
    negatives = trigger if config.own_negative else ()
    draw = make_sampler(
        base, lora, span=span_of(config, base), negatives=negatives, resolution=config.resolution, own=own
    )
    within = training.added.applied
    return Samples(training.run, asked or prompts, config.seed, draw, modules=[trained], within=within)


def span_of(config: Config, base: Base) -> tuple[float, float] | None:
    """The steps in which a LoRA takes part in drawing; a base that has learned takes part in all."""
    return config_defaults.span_of(config, base) if config.method == "lora" else None


def description_of(
    config: Config, base: Base, dataset: Dataset, samples: Samples, trigger: Sequence[str], **more: Any
) -> Description:
    """What the written file or folder says of itself. more: as of `describe_run`."""
    from sfumato.training.finish import describe_run

    negatives = trigger if config.own_negative else ()
    asked = {"trigger": trigger, "over_steps": span_of(config, base), "negatives": negatives}
    return describe_run(config, base, dataset, samples, **asked, **more)


def trained_adapter_of(
    config: Config,
    base: Base,
    lora: Attached,
    about: Callable[..., Description],
    average: Addition,
) -> TrainedAdapter:
    """What is written of a LoRA. about: see `TrainedAdapter`."""
    from sfumato.precision import DTYPES
    from sfumato.training.adapter import TrainedAdapter

    return TrainedAdapter(lora, None, base.family.name, about, DTYPES[config.save_precision], average)


def save(
    path: Path,
    config: Config,
    base: Base,
    learned: TrainedAdapter | None,
    description: Description,
    samples: Samples,
    run: Run,
) -> None:
    """Write the adapter or the model, its card and the plot; upload them if asked."""
    from sfumato.training.finish import finish, upload
    from sfumato.training.methods.full import write_model

    if learned:
        description, _ = learned.write(path, run.step)
    else:
        write_model(path, base, config, run, description)
    finish(run, config, path, description, samples, kind=config.save)
    upload(run, [path], config.push_to_hub)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train dreambooth"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
