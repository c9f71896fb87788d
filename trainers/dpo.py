"""Train an adapter on preferences: pairs of images of the same prompt, one preferred and one rejected (Diffusion-DPO).

    python trainers/dpo.py --preferred GOOD --rejected BAD --output DIR
    accelerate launch trainers/dpo.py ...
    sfumato train dpo ...

All three run the same program. The adapter learns to find the preferred image of each pair likelier, beside the
rejected one, than the model did before (Wallace et al. 2023). So it draws more like the preferred ones, without copying
them. `train` is the whole method; what it calls is in the library.
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
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from sfumato.adapters import Attached
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.adapter import RequestedUse, TrainedAdapter
    from sfumato.training.additions.interface import Addition, Training
    from sfumato.training.methods.dpo import Preferences, ReferenceAdapter


@dataclass(frozen=True, kw_only=True)
class Config(AdapterOptions, TrainingOptions):
    """Train a LoRA that draws more like the preferred ones of pairs of images.

    Example: `sfumato train dpo --preferred good --rejected bad --output runs/taste`
    """

    preferred: Path
    """Folder of preferred images. Each is paired with the image of the same name in --rejected, else with one of the
    same prompt and size: that of its caption, or of the settings that sfumato, A1111, Forge, ComfyUI and InvokeAI write
    into images."""
    rejected: Path
    """Folder of rejected images. Of one prompt there may be more or fewer than preferred ones: each image comes in a
    pair."""
    caption: str | None = None
    """Template for captions, such as "a photo of a {caption}". {caption} stands for the caption of the preferred image,
    or for the prompt in its settings, or for its file name."""
    caption_dropout: float = 0.0
    """Share of pairs that are trained without a caption, 0 to 1."""
    beta: float | None = None
    """How far the adapter is held to the model before the training. The larger it is, the less is learned from pairs
    that are told apart already. Unset: the base family's default; 1000 to 10000 is usual on Stable Diffusion."""
    targets: str = "attention"
    """Layers to adapt: cross-attention, attention, attention+mlp, transformers (attention, MLP and the projections
    around them), everything (all layers of the U-Net's blocks), or a regular expression over module names."""
    prior_prompts: tuple[str, ...] = ()
    """Prompts whose images should stay as they were before the training. Each training batch is joined by one of half
    the size for these prompts, whose target is the prediction of the model before the training. Repeat the option for
    several."""
    prior_weight: float | None = None
    """Weight of the prior-preservation samples in the loss; the pairs have weight 1. Unset: 1."""
    init_from: Path | None = None
    """Go on from this adapter, such as a style that you trained, instead of from the base model: its images are those
    that the preferences are about. What its file asks for when generating, such as adapter guidance, is kept. It must
    have the same targets and ranks, and be there when the run is resumed."""
    over_steps: str | None = None
    """START-END: the part of the sampling steps in which the adapter is active, from 0 (noise) to 1 (finished image).
    Sample images use it, and the file asks for it (see sfumato generate --over-steps). Unset: the steps that were
    trained, see --min-timestep, or those that the file of --init-from asks for."""


DEFAULTS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "pocket": {"steps": 100, "batch": 4, "learning_rate": 6e-4, "beta": 500.0, "min_snr": 0.0},
        # beta is that of the paper's own code, the rate that of diffusers' example, which trains a LoRA, too.
        "sd1": {"steps": 2000, "batch": 4, "learning_rate": 1e-5, "beta": 5000.0, "min_snr": 0.0},
        "sd2": {"steps": 2000, "batch": 4, "learning_rate": 1e-5, "beta": 5000.0, "min_snr": 0.0},
        "sdxl": {"steps": 2000, "batch": 2, "learning_rate": 1e-5, "beta": 5000.0, "min_snr": 0.0},
    }
)
"""Defaults of this method, by family, for what a config leaves unset."""


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the path of the adapter."""
    import torch

    from sfumato.training.adapter import groups_of
    from sfumato.training.additions.interface import backward
    from sfumato.training.additions.table import additions_of
    from sfumato.training.finish import finish_adapter
    from sfumato.training.methods.dpo import reward_figures
    from sfumato.training.optim import optimizers

    check(config)
    training, preferences, start = prepare(config)
    config, run, processes = training.config, training.run, training.processes
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
    learned, samples = watch(training, preferences, start)
    lora.train()
    for step in run.steps(config.steps):
        schedule.set(step.number, step.rate_factor)
        added.before_step(step.number)
        loss, sums = torch.zeros((), device=precision.device), torch.zeros(6, device=precision.device)
        for micro in batches.of(step.number):
            further = added.samples(micro)
            lora.set_dropout_samples(config.seed, step.number, micro.places)
            with precision.autocast():
                rewarded, errors = preferences.rewarded(preferences.draw(config.seed, micro), *further)
                part = rewarded.loss.sum() / batches.global_batch + added.loss(errors, batches.global_batch)
            backward(scaler, part)
            loss += part.detach()
            sums += rewarded.sums()
        added.after_gradients()
        # Before unscaling, so that all processes find the same overflow and skip the same steps.
        processes.sum_gradients(parameters, loss, sums, *added.sums())
        scaler.unscale_(optimizer)
        norm = optimizers.clip_grad_norm(parameters, config.clip)
        if step.healthy(scaler, loss=loss, gradient_norm=norm):
            scaler.step(optimizer)
            added.after_step()
        scaler.update()
        optimizer.zero_grad()
        told = reward_figures(sums, batches.global_batch)
        step.done(loss=loss, rate=schedule.rate, gradient_norm=norm, **told, **added.figures())

    path = config.output / f"{config.name}.safetensors"
    return training.end(path, lambda: finish_adapter(run, config, path, learned, samples))


def prepare(config: Config) -> tuple[Training, Preferences, ReferenceAdapter]:
    """Read the pairs, load the base model, fill in the config, open the run, and attach the adapter."""
    from sfumato.runs.processes import Processes
    from sfumato.runs.run import Run
    from sfumato.training.adapter import adapted_layers, init_from_file, new_adapter
    from sfumato.training.additions.interface import Training
    from sfumato.training.loss.prior import BasePrediction
    from sfumato.training.methods.dpo import Preferences, ReferenceAdapter
    from sfumato.training.methods.pairs import prepare_sets

    processes = Processes.join(config.device)
    pairs = read_pairs(config)
    precision = config.decide_precision(processes, config.optimizer)
    base = config.load_base(precision)
    config, filled = resolve(config, base, pairs[0], processes.count)
    adapted, notes = adapted_layers(config, base)
    run = Run.start(config, program="dpo", processes=processes, writes=["adapters"] if config.save_every else [])
    run.say(precision.table())
    run.report_defaults(base.family.title, filled)
    run.say(*notes)

    batches = processes.micro_batches(config.batch, config.accumulate, config.micro_batch)
    encoding = partial(
        config.prepare_as,
        base=base,
        processes=processes,
        caption_dropout=config.caption_dropout,
        will_draw=(config.seed, config.steps, batches.global_batch),
        together=config.batch,
    )
    preferred, rejected = prepare_sets(pairs, encoding)
    run.say_notes(preferred, rejected)
    base.lazy_weights.load_only("unet")  # the others rest until something asks for them
    lora = new_adapter(adapted, config)
    begun = init_from_file(config.init_from, run, base, lora, always=True)
    start = ReferenceAdapter(
        lora, from_nothing=not config.init_from
    )  # before a checkpoint is read, which comes with the steps
    noising, before = config.noising(base), start.applied
    preferences = Preferences(
        base, preferred, rejected, config.beta, before=before, noising=noising, settings=config.loss()
    )
    training = Training(config, processes, precision, base, run, batches, preferred, lora)
    if config.prior_prompts:
        shared: dict[str, Any] = {"order": config.seed, "pristine": before, "noising": noising}
        training.priors.append(BasePrediction(base, preferred, config.prior_prompts, config.seed, **shared))
    run.identify(data=preferred, partners=rejected, **begun, base=base.fingerprint())
    layers = pluralize(len(lora.layers), "adapted layer")
    run.say(f"{pluralize(len(preferred), 'pair')}, {layers}, {lora.count():,} trained numbers")
    return training, preferences, start


def watch(training: Training, preferences: Preferences, start: ReferenceAdapter) -> tuple[TrainedAdapter, Samples]:
    """Let the run measure, draw and save the adapter now and then. Returns what is written at the end, and what it is
    shown with."""
    from sfumato.runs.options import Request
    from sfumato.training.adapter import RequestedUse
    from sfumato.training.methods.dpo import PreferenceMetrics

    config, base, run, lora = training.config, training.base, training.run, training.trained
    dataset, added = training.dataset, training.added
    asked = RequestedUse.by(config.init_from) if config.init_from else RequestedUse()  # a style stays drawn as it was
    contexts = {"before": start.applied, "within": added.applied}
    watches = bool(config.measure_every)
    metrics = PreferenceMetrics(base, dataset, lora, preferences, config.batch, **contexts, watches=watches)
    samples = samples_of(config, base, lora, dataset, run, added, asked)
    learned = trained_adapter_of(config, base, lora, dataset, samples, added, asked)
    run.every(config.measure_every, lambda step: run.log(step=step, **metrics.values()))
    run.every(config.sample_every, samples.draw)
    run.every(config.save_every, lambda step: learned.keep(run, config.name, step), on=Request.SAVE)
    return learned, samples


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    checks.check_trainer(config)
    checks.check_kind(config)
    checks.refuse_given(
        config,
        "has no effect here: the loss compares squared errors, which stand for likelihoods; leave it out",
        "huber",
    )
    for option, folder in (("--preferred", config.preferred), ("--rejected", config.rejected)):
        if not folder.is_dir():
            raise ConfigError(f"{option} {folder}: no such folder; give one that holds an image of each pair.")
    if config.preferred.resolve() == config.rejected.resolve():
        raise ConfigError(f"--preferred and --rejected are both {config.preferred}; sort the images into two folders.")
    if not config.prior_prompts:
        checks.only_with(config, "--prior-prompts", "prior_weight")


def read_pairs(config: Config) -> tuple[ExampleSet, ExampleSet]:
    """The preferred images and their rejected partners."""
    from sfumato.training.methods.pairs import preference_pairs, read_captioned_folder

    if not config.resume:
        refuse_output_among(config.output, [config.preferred, config.rejected])
    # The captions of the partners are not learned, and need not be there.
    return preference_pairs(
        read_captioned_folder(config.preferred, config.caption), read_captioned_folder(config.rejected, "{caption}")
    )


def resolve(config: Config, base: Base, pairs: ExampleSet, processes: int) -> tuple[Config, list[str]]:
    """The config with every unset field filled in, and the names of the fields that the base family or the method
    filled."""
    config, filled = config_defaults.resolve(config, base, pairs, processes, **DEFAULTS[base.family.name])
    values = config_defaults.scale_defaults(config)
    if config.prior_prompts:
        values["prior_weight"] = 1.0 if config.prior_weight is None else config.prior_weight
    return dataclasses.replace(config, **values), filled


def samples_of(
    config: Config, base: Base, lora: Attached, data: Dataset, run: Run, average: Addition, asked: RequestedUse
) -> Samples:
    """The run's sample images. asked: by the adapter that it goes on from."""
    from sfumato.runs.reporting.samples import Samples
    from sfumato.training.loss.validation import default_prompts
    from sfumato.training.sampling import make_sampler

    given, own = config.asked_samples()
    prompts = given or default_prompts(list(dict.fromkeys(data.captions)), None, None)
    draw = make_sampler(
        base,
        lora,
        asked.adapter_guidance,
        config_defaults.span_of(config, base) or asked.over_steps,
        negatives=asked.negatives,
        resolution=config.resolution,
        own=own,
        usual=dataclasses.asdict(asked.sampling) if asked.sampling else {},
    )
    return Samples(run, prompts, config.seed, draw, modules=[lora], within=average.applied)


def trained_adapter_of(
    config: Config, base: Base, lora: Attached, data: Dataset, samples: Samples, average: Addition, asked: RequestedUse
) -> TrainedAdapter:
    """The result of the training, and what its file says about itself. asked: by the adapter that it goes on from."""
    from sfumato.precision import DTYPES
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.finish import describe_run

    about = partial(
        describe_run,
        config,
        base,
        data,
        samples,
        trigger=asked.trigger,
        adapter_guidance=asked.adapter_guidance,
        negatives=asked.negatives,
        over_steps=config_defaults.span_of(config, base) or asked.over_steps,
        sampling=asked.sampling,
    )
    return TrainedAdapter(lora, None, base.family.name, about, DTYPES[config.save_precision], average)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    train(parse(Config, argv, program="train dpo"))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
