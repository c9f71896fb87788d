"""Train a small base model to tell real images from its own.

    python trainers/self_play.py trainers/configs/pocket-self-play.toml
    sfumato train self_play --data FOLDER --base runs/my-base/model --output runs/my-play --steps 250

Both run the same program. It trains the U-Net alone, by direct discriminative optimization (Zheng et al. 2025).
docs/pocket.md says what comes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.training.entry_point import training_entry_point
from sfumato.training.pretrain.checks import check_pretraining, check_shares
from sfumato.training.pretrain.options import PretrainOptions, learning_rate_at, resolve_for_device

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    from sfumato.training.pretrain.dataset import Pictures


@dataclass(frozen=True, kw_only=True)
class Config(PretrainOptions):
    """Train the U-Net of a base model to tell real images from those that it generates itself."""

    base: str = "pocket"
    """Base model to train further: pocket, or the folder of one that pretrain made."""
    output: Path = Path("runs/pocket-self-play")
    """Folder of the run: the model's own images, checkpoints, log, plot, samples, and at the end `model/`."""
    batch: int = 16
    """Images per step; each comes with one of the model's own."""
    learning_rate: float | None = None
    """Learning rate between the warm-up and the decay. Unset: 3e-5."""
    empty_share: float = 0.1
    """Share of empty captions, for classifier-free guidance."""
    others_share: float = 0.0
    """Share of the images that are the sets' other drawings, as far as there are enough. All images of the concepts
    take part in any case."""
    guidance: float | None = None
    """Guidance scale of the model's own images and of the samples. Take the scale that the base model is to generate
    with. Unset: the base model's usual."""
    sharpness: float = 100.0
    """Beta of the loss: how sure a difference in the error makes that an image is real or generated."""


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the folder of a pipeline with the averaged weights, fp32."""
    import copy

    import torch

    from sfumato.data.preparation.cache import weights_digest
    from sfumato.models import FAMILIES, diffusion
    from sfumato.runs.run import Run
    from sfumato.training.pretrain.batches import Latents
    from sfumato.training.pretrain.dataset import VARIANTS, read_manifest
    from sfumato.training.pretrain.model import base_fingerprint, build_scheduler, trainable_parts
    from sfumato.training.pretrain.outputs import assemble, draw_samples, make_pretrain_state, save_model
    from sfumato.training.pretrain.self_play import Pairs, discriminative_loss, error_increase, own_drawings
    from sfumato.training.pretrain.text import encode_text
    from sfumato.utils import randomness

    check(config)
    config, precision = resolve_for_device(config, learning_rate=3e-5)
    manifest = read_manifest(config.data)
    pictures = played_pictures(config)
    run = Run.start(config, program="self_play", writes=["model", "own-drawings.safetensors"])
    run.say(precision.table())
    scheduler, device = build_scheduler(), precision.device
    unet, text_encoder, tokenizer, vae = trainable_parts(config.base, config.device, scheduler)
    text_encoder.requires_grad_(False)
    cache = Latents(vae, pictures, VARIANTS[:1], device)
    unet.register_to_config(sample_size=cache.means.shape[-1])
    first = copy.deepcopy(unet).requires_grad_(False)
    precision.prepare_for_training(unet)
    trained = make_pretrain_state({"unet": unet}, config, device)
    run.keep(**trained.parts())
    fingerprint = base_fingerprint(config.base, config.device)
    run.identify(data=pictures.fingerprint(), vae=weights_digest([vae]), base=fingerprint)

    captions = [f"{what}, {style} style" for what, style in pictures.names]
    with torch.no_grad():
        parts = [captions[start : start + 64] for start in range(0, len(captions), 64)]
        states = torch.cat([encode_text(text_encoder, tokenizer, texts, device) for texts in parts])
        empty = encode_text(text_encoder, tokenizer, [""], device)
    guidance = FAMILIES["pocket"].defaults.guidance if config.guidance is None else config.guidance
    run.begin()
    try:
        own = own_drawings(
            first,
            states,
            empty,
            build_scheduler(),
            precision,
            guidance=guidance,
            seed=config.seed,
            kept=run.folder / "own-drawings.safetensors",
            unet_fingerprint=fingerprint,
        )
    except BaseException as error:  # minutes in which a run may be stopped: the folder is let go, as the steps do
        if isinstance(error, KeyboardInterrupt):
            run.say(f"stopped among the own drawings. Go on with: {run.resume_command()}")
        run.close()
        raise
    pairs = Pairs(cache.means[0], own, states, empty)

    pipeline = assemble(vae, unet, text_encoder, tokenizer, scheduler)
    told = manifest["styles"], manifest["concepts"], guidance
    draw_samples(run, config.sample_every, trained, precision, pipeline, *told)
    every_timestep = range(scheduler.config.num_train_timesteps)
    for step in run.steps(config.steps):
        trained.set_rate(learning_rate_at(step, config))
        latents, hidden = pairs.at(step.number, config.batch, config.seed, config.empty_share)
        timesteps = diffusion.stratified_timesteps(config.batch, every_timestep, config.seed, step.number)
        noise = randomness.normal((config.batch, *own.shape[1:]), config.seed, "noise", step.number)
        real, of_own = error_increase(unet, first, latents, hidden, timesteps, noise, scheduler, precision)
        trained.learn(step, discriminative_loss(real, of_own, config.sharpness))
    with trained.result():
        path = save_model(pipeline, config.output / "model")
    run.plot()
    run.close()
    return path


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    check_pretraining(config)
    check_shares(config, "empty_share", "others_share")
    if config.guidance is not None and not 0 <= config.guidance <= 100:
        raise ConfigError(f"--guidance is {config.guidance}; it must be 0 to 100; 1 to 3 is usual.")
    if not 0 < config.sharpness < float("inf"):
        raise ConfigError(f"--sharpness is {config.sharpness}; it must be a positive number, such as 100.")


def played_pictures(config: Config) -> Pictures:
    """The images that the base model generates again and is trained on: all of the concepts, and others by their
    share."""
    from sfumato.training.pretrain.dataset import seen_pictures
    from sfumato.training.pretrain.self_play import select_pictures

    pictures, named = seen_pictures(config.data, config.others_share)
    chosen = select_pictures(len(pictures.names), named, config.others_share, config.seed)
    if config.others_share and len(chosen) == named:
        raise ConfigError(
            f"--others-share {config.others_share} beside {named} images is no other drawing; raise it to "
            f"{1 / (named + 1):.2g} or more, or leave it out."
        )
    return pictures.some(chosen)


def main(argv: Sequence[str]) -> int:
    """Run the program; prints the folder of what was trained."""
    print(train(parse(Config, argv, program="train self_play")))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
