"""Textual Inversion: teach a base model a new word, and nothing else. A file of a few kilobytes.

    python trainers/textual_inversion.py --images DIR --placeholder "<otter>" --output DIR
    accelerate launch trainers/textual_inversion.py ...
    sfumato train textual_inversion ...

All three run the same program. v* = argmin E |noise - unet(x_t, t, text("... <otter> ..."; v))|^2 over the vectors v of
the new word (Gal et al. 2022, eq. 2). U-Net, VAE and text encoders are frozen and stay the same, bit for bit. `train`
is the whole method; what it calls is in the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import MappingProxyType
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
from sfumato.runs.folder import snapshot_name
from sfumato.training import checks, config_defaults
from sfumato.training.entry_point import training_entry_point
from sfumato.training.options import TrainerOptions
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from sfumato.adapters.embeddings.added_tokens import Words
    from sfumato.data import ExampleSet
    from sfumato.data.dataset_config import Source
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.additions.interface import Addition, Training


@dataclass(frozen=True, kw_only=True)
class Config(TrainerOptions):
    """Learn one to sixteen embedding vectors for a new word, and nothing else: a file of a few kilobytes.

    Example: `sfumato train textual_inversion --images datasets/flamingo --placeholder "<flamingo>" --stands-for "sks
    flamingo" --initial-words flamingo --output runs/word`
    """

    placeholder: tuple[str, ...]
    """The new word. Write it in lower case, and so that it occurs nowhere else, such as `<otter>`. Repeat the option to
    learn several words in one run."""
    vectors: int | None = None
    """Number of embedding vectors for each new word, 1 to 16. More vectors hold more of the images, but leave the rest
    of a prompt less influence. Unset: 4."""
    initial_words: tuple[str, ...] = ()
    """Words of similar meaning to start from: one entry for all new words, or one for each."""
    start: Literal["mean", "random"] = "mean"
    """Where the vectors start without --initial-words. mean: the mean of all the base model's words; random: some of
    its words, chosen at random."""
    stands_for: tuple[str, ...] = ()
    """Words in the captions that the new word replaces: with "sks flamingo", the caption "sks flamingo, flat style" is
    learned as `<flamingo>, flat style`. Give it once for each new word. Unset, and without --caption: the caption is
    the new word alone."""
    templates: Literal["none", "object", "style"] | None = None
    """Sentences to put around the captions, a different one for each sample. object: CLIP's "a photo of a ..."; style:
    "a painting in the style of ...". Unset: object, if the captions are the new word alone and the base model is not
    pocket; else none."""
    keep_scale: bool = True
    """Keep the vectors at a usual length: after each step, shorten a vector that is longer than 95 % of the base
    model's own, and lengthen one that is shorter than 95 % of them, to that limit."""
    save_every: int = 0
    """Steps between copies of the words that are kept besides the last, to choose from, as
    OUTPUT/adapters/NAME-step00000500.safetensors; 0 keeps none."""
    save_precision: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Number format of the file."""


DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "pocket": {"steps": 300, "batch": 8},
        # diffusers' guide: a rate of 5e-4 times an effective batch of 4, for 3,000 steps.
        "sd1": {"steps": 3000, "batch": 4},
        "sd2": {"steps": 3000, "batch": 4},
        "sdxl": {"steps": 3000, "batch": 2},
    }
)
"""Defaults of this method, by family, for what a config leaves unset."""

ALONE = "{trigger}"
"""The template of captions that are the placeholder alone."""


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the path of the embedding; of the first one if there are several."""
    import torch

    from sfumato.training.additions.interface import backward
    from sfumato.training.additions.table import additions_of
    from sfumato.training.loss.objective import draw_noised, per_sample_losses
    from sfumato.training.methods.caption_templates import TEMPLATES, fill_templates
    from sfumato.training.optim import optimizers

    check(config)
    training = prepare(config)
    config, base, run, processes = training.config, training.base, training.run, training.processes
    words, dataset, precision, batches = training.trained, training.dataset, training.precision, training.batches
    added = additions_of(training)
    parameters = training.parameters()
    groups = [{"params": list(words.parameters()), "lr": config.learning_rate}, *added.groups()]
    optimizer = optimizers.build_optimizer(
        config.optimizer, groups, weight_decay=config.weight_decay, args=config.optimizer_args
    )
    schedule = optimizers.LearningRateSchedule(
        optimizer, config.schedule, config.steps, config.warmup, cycles=config.cycles
    )
    scaler = precision.scaler()
    run.keep(optimizer=optimizer, scaler=scaler, **added.kept())  # the words are an addition that keeps itself
    finish = watch(training)
    noising, templates = config.noising(base), TEMPLATES[config.templates]
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss = torch.zeros((), device=precision.device)
        for micro in batches.of(step.number):
            noised = added.change(draw_noised(base, dataset, config.seed, micro, noising=noising), micro)
            captions = fill_templates(noised.batch.captions, templates, config.seed, micro)
            noised = dataclasses.replace(noised, batch=dataclasses.replace(noised.batch, captions=captions))
            further = added.samples(micro)
            with precision.autocast():
                errors = per_sample_losses(base, [noised, *further], encode=True, settings=config.loss())
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

    paths = embedding_files(config.output, config.name, config.placeholder, alone=True)
    return training.end(next(iter(paths.values())), lambda: finish(paths))


def prepare(config: Config) -> Training:
    """Read the images, load the base model, fill in the config, bring the new words into use, and open the run."""
    from sfumato.adapters.embeddings import embedding
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import prepare_datasets
    from sfumato.training.loss.validation import prepare_validation
    from sfumato.training.methods.caption_templates import TEMPLATES

    processes = Processes.join(config.device)
    examples = read_examples(config)
    learned = examples.in_group("instance")
    precision = config.decide_precision(processes, config.optimizer)
    base = config.load_base(precision)
    config, filled = resolve(config, base, examples, processes.count)
    words = embedding.new_words(
        base,
        config.placeholder,
        vectors=config.vectors,
        start="words" if config.initial_words else config.start,
        initial=config.initial_words,
        seed=config.seed,
    )
    prompts = config.asked_samples()[0] or default_prompts(learned, config.placeholder)
    told = (t.format(caption) for t in TEMPLATES[config.templates] for caption in examples.captions)
    words.check([*prompts, *told])
    paths = embedding_files(config.output, config.name, config.placeholder, alone=True)
    names = [*(["adapters"] if config.save_every else []), *(path.name for path in paths.values())]
    run = Run.start(config, program="textual_inversion", processes=processes, writes=names)
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)
    tokenizer = base.tokenizers[0]
    run.say(*placeholder_warnings(config.placeholder, tokenizer))
    run.say(*truncation_notes(config.initial_words, config.vectors, tokenizer))

    # Encoded in the loop, each distinct caption once: what they mean is what is learned.
    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    dataset, _ = prepare_datasets(config, base, learned, None, batches.global_batch, processes, embed_text=False)
    held_out = prepare_validation(config, base, examples, processes)
    run.say_notes(dataset, held_out)
    base.lazy_weights.load_only("unet", "text")  # the VAE has given its latents; it rests until something is drawn
    run.identify(data=dataset, validation=held_out or "none", base=base.fingerprint())
    pictures = pluralize(len(dataset), "image")
    run.say(f"{pictures}, {words.count():,} trained numbers; captions such as {dataset.captions[0]!r}")
    training = Training(config, processes, precision, base, run, batches, dataset, words, learned, words=words)
    training.held_out = held_out
    return training


def watch(training: Training) -> Callable[[dict[str, Path]], None]:
    """Let the run measure, draw and save the words now and then. Returns what writes them to their paths."""
    from sfumato.runs.options import Request
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.finish import describe_run
    from sfumato.training.loss.validation import Metrics
    from sfumato.training.sampling import make_sampler

    config, base, run, words = training.config, training.base, training.run, training.trained
    dataset, added = training.dataset, training.added
    assert training.subjects is not None
    asked, own = config.asked_samples()
    prompts = asked or default_prompts(training.subjects, config.placeholder)
    # No drift: nothing that draws other prompts changes.
    metrics = Metrics(base, dataset, {}, within=added.applied, held_out=training.held_out)
    draw = make_sampler(base, resolution=config.resolution, own=own)
    samples = Samples(run, prompts, config.seed, draw, within=added.applied)
    run.every(config.measure_every, lambda step: run.log(step=step, **metrics.values()))
    run.every(config.sample_every, samples.draw)
    about = partial(describe_run, config, base, dataset, samples, trigger=config.placeholder)
    run.every(config.save_every, partial(keep, words, config, about, run, added), on=Request.SAVE)
    return lambda paths: save(paths, words, config, about(steps=run.step), run, samples)


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    checks.check_trainer(config)
    count = len(config.placeholder)
    if not count or not all(word.strip() for word in config.placeholder):
        raise ConfigError("--placeholder is empty; give a new word, such as <otter>.")
    checks.check_words_are_seen(config)
    if config.optimizer == "muon":
        raise ConfigError("--optimizer muon is for matrices, and a new word has none; use adamw.")
    if config.trigger is not None and config.trigger not in config.placeholder:
        raise ConfigError(f"--trigger {config.trigger}: the new word is its own trigger; leave --trigger out.")
    for option, given in (("--initial-words", len(config.initial_words)), ("--stands-for", len(config.stands_for))):
        if given not in (0, count, *([1] if option == "--initial-words" else [])):
            times, words = pluralize(given, "time"), pluralize(count, "placeholder")
            raise ConfigError(f"{option} is given {times} for {words}; give it once for each.")
    check_stands_for(config.stands_for)
    if config.initial_words and config.start != "mean" and not config.resume:
        raise ConfigError("--initial-words and --start random are both given; each says where to start, so give one.")
    if config.vectors is not None and config.vectors > MAX_VECTORS:
        raise ConfigError(f"--vectors is {config.vectors}; it must be 1 to {MAX_VECTORS}.")


def read_examples(config: Config) -> ExampleSet:
    """Read the images, with captions that contain the placeholders; notes say what is left out. Raises DataError for
    captions without a placeholder."""
    from sfumato.data.dataset_config import read_sources
    from sfumato.data.placeholder_captions import insert_placeholders

    alone = caption_is_placeholder(config)
    template = ALONE if alone else config.caption
    trigger = " ".join(config.placeholder) if template and "{trigger}" in template else None
    named = dataclasses.replace(config, caption=template, trigger=trigger)
    examples = named.read_examples(words=config.stands_for or config.placeholder, of_class=False)
    sources = read_sources(config.images, caption_template=template, trigger=trigger, wildcards=config.wildcards)
    notes = [unread_captions(sources, config.placeholder[0])] if alone else []
    if left := [source.path.name for source in sources if source.group == "class"]:
        named_so = ", ".join(left)
        notes.append(f"images of the class are left out ({named_so}): a new word changes nothing that they would keep")
    examples = dataclasses.replace(examples, notes=(*examples.notes, *filter(None, notes)))
    examples = insert_placeholders(examples, config.placeholder, config.stands_for)
    checks.refuse_dropped_words(config, examples.in_group("instance"), config.placeholder)
    return examples


def caption_is_placeholder(config: Config) -> bool:
    """Whether captions are the placeholder alone, unless their source says otherwise."""
    return config.caption is None and not config.stands_for and len(config.placeholder) == 1


def unread_captions(sources: Sequence[Source], placeholder: str) -> str:
    """A note on captions that are ignored because the placeholder replaces them as a whole; empty if there are none."""
    found = [each.caption.text for source in sources if source.template == ALONE for each in source.list().pictures]
    texts = [text for text in found if text and text != placeholder]
    if not texts:
        return ""
    holding = [text for text in texts if contains_placeholder(placeholder, text)]
    template = "{caption}" if holding else f"{{caption}}, {placeholder}"
    first = (holding or texts)[0]
    first = first if len(first) <= 80 else f"{first[:77]}..."
    return (
        f"{pluralize(len(texts), 'caption is', 'captions are')} left aside, such as {first!r}; pass --caption "
        f'"{template}" to learn with them'
    )


def resolve(config: Config, base: Base, examples: ExampleSet, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the base family or the method
    filled."""
    name = base.family.name
    defaults = {"vectors": DEFAULT_VECTORS, "learning_rate": DEFAULT_LEARNING_RATES[name], **DEFAULTS[name]}
    config, filled = config_defaults.resolve(config, base, examples, processes, **defaults)
    templates = config.templates or ("object" if caption_is_placeholder(config) and name != "pocket" else "none")
    return dataclasses.replace(config, templates=templates), filled


def default_prompts(examples: ExampleSet, placeholders: Sequence[str]) -> list[str]:
    """Two captions, and the first new word in two settings that were not trained on; none twice."""
    captions = list(dict.fromkeys(e.said[0] for e in examples))[:2]
    return list(dict.fromkeys([*captions, f"a drawing of a {placeholders[0]}", f"{placeholders[0]} on a table"]))


def keep(
    words: Words, config: Config, about: Callable[..., Description], run: Run, average: Addition, step: int
) -> None:
    """Write the words as they would be saved after this step, to choose from. about: what their files say."""
    if not step or not run.is_main:
        return
    paths = embedding_files(run.folder / "adapters", snapshot_name(config.name, step), config.placeholder, alone=True)
    with average.applied():
        write_words(paths, words, config, about(steps=step))


def save(
    paths: dict[str, Path], words: Words, config: Config, description: Description, run: Run, samples: Samples
) -> None:
    """Write each word's file, the model card and the plot; upload them if asked."""
    from sfumato.training.cards.adapter import example_of
    from sfumato.training.cards.methods import write_embedding_card
    from sfumato.training.finish import drawing_command, plot_and_tell, upload

    rows = samples.ends
    report = write_words(paths, words, config, description)
    prompts = samples.prompts if rows else []
    card = write_embedding_card(run.folder, paths, description, report, prompts, rows)
    prompt = example_of(description, next(iter(paths)), prompts)
    command = drawing_command(config, description, prompt, words=list(paths.values()))
    made = ["nearest of the base's words, by cosine:", *report, *(f"word     {t}  {path}" for t, path in paths.items())]
    plot_and_tell(run, "\n".join(made), card, command, has_samples=bool(rows))
    upload(run, list(paths.values()), config.push_to_hub)


def write_words(paths: Mapping[str, Path], words: Words, config: Config, about: Description) -> list[str]:
    """Write each word as it is now. Returns the base model's words that are nearest to it; the files say this, too."""
    from sfumato.files import describe
    from sfumato.files.writing.embedding import write_embedding
    from sfumato.precision import DTYPES

    report = words.report()
    for token, vectors in words.vectors().items():
        nearest = "\n".join(line for line in report if line.startswith(f"{token} "))
        one = dataclasses.replace(about, trigger=[token], extra={"sfumato.nearest_words": nearest})
        write_embedding(paths[token], token, vectors, metadata=describe(one), dtype=DTYPES[config.save_precision])
    return report


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train textual_inversion"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
