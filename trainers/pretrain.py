"""Pre-train a small Stable Diffusion from scratch: the VAE, then the U-Net with its text encoder. Or continue either.

Two more stages train a base model that is there: style_emphasis its text encoder, so that a prompt's style counts more,
without images; self_play its U-Net, to tell real images from its own (Zheng et al. 2025).

Made for the pocket base model, whose images `bench/pocket_data.py` builds. Each stage is a run of its own. On a resume
with `--force`, `--steps` and `--fall-at` may differ, so that the decay of the learning rate can be timed by the clock.

    python trainers/pretrain.py trainers/configs/pocket-vae-cpu.toml
    python trainers/pretrain.py trainers/configs/pocket-unet-cpu.toml
    python trainers/pretrain.py trainers/configs/pocket-style-emphasis.toml
    python trainers/pretrain.py trainers/configs/pocket-self-play.toml

docs/pocket.md has the recipe of the shipped weights, which has more parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.training.entry_point import training_entry_point
from sfumato.training.pretrain.checks import check, check_compiler
from sfumato.training.pretrain.options import PretrainOptions, learning_rate_at, resolve_for_device

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from torch import Tensor
    from transformers import CLIPTextModel, CLIPTokenizer

    from sfumato.precision import Precision
    from sfumato.runs.run import Run
    from sfumato.training.pretrain.batches import Latents, PretrainBatch, Shares
    from sfumato.training.pretrain.dataset import Pictures
    from sfumato.training.pretrain.outputs import PretrainState
    from sfumato.training.pretrain.self_play import Pairs


@dataclass(frozen=True, kw_only=True)
class Config(PretrainOptions):
    """Pre-train the VAE, or the U-Net with its text encoder, from scratch; or train either of a base model further."""

    stage: Literal["vae", "unet", "style_emphasis", "self_play"] = "vae"
    """What to train: the VAE, or the U-Net with its text encoder, which needs a trained VAE. Of a base model that is
    there: the text encoder, so that a prompt's style counts more (style_emphasis), or the U-Net, to tell real images
    from those that it generates itself (self_play)."""
    output: Path = Path("runs/pocket-vae")
    """Folder of the run: checkpoints, log, plot, samples, and at the end `model/`."""
    vae: Path | None = None
    """Folder of the trained VAE, for --stage unet."""
    base: str = "pocket"
    """style_emphasis, self_play: base model to train, pocket or the folder of one that pretrain made."""
    init: str | None = None
    """Start from this base model instead of from random weights; name it as for --base of the other trainers. With
    --vae the U-Net gets that VAE instead of the base model's own."""
    decoder_only: bool = False
    """VAE: leave the encoder as it is, so that the latents stay those that a U-Net was trained on."""
    kl: float = 1e-3
    """VAE: weight of the mean KL divergence between a latent value and a standard normal distribution."""
    gradient_difference: float = 0.5
    """VAE: weight of the error in the differences between neighbouring pixels. It keeps edges sharp."""
    hands_share: float = 0.0
    """Share of the images that are changed as if other artists (hands) had drawn them: with outlines, hatching, other
    palettes and backgrounds. The VAE then reconstructs unseen styles better, and the U-Net learns them more easily. The
    U-Net sees 96 hands; each changes every image in the same way, and the caption names it."""
    init_share: float = 0.0
    """Share of --init's weights in the result; the rest are the trained weights (Wortsman et al. 2022). It keeps more
    of what --init did well."""
    train_text_encoder: bool = True
    """U-Net: train the text encoder with it. --no-train-text-encoder leaves the one of --init frozen."""
    snr_gamma: float = 5.0
    """U-Net: gamma of the min-SNR loss weights; the weight of a sample is 2 min(SNR, gamma) / (SNR + 1) +
    flat_weight."""
    flat_weight: float = 0.2
    """U-Net: weight that is added for every sample, so that the noisiest timesteps count; these decide the layout."""
    flip_share: float = 0.5
    """Share of the images that are mirrored."""
    group_share: float = 0.06
    """U-Net: share of captions that name the concept's group instead of the concept."""
    plain_share: float = 0.25
    """U-Net: share of captions that name the concept without the style. Of the captions that name a group, twice this
    share has no style."""
    plain_style: str | None = None
    """U-Net: the style that is generated for a concept's name alone. Unset: all styles, which a small model generates
    as a blend."""
    empty_share: float = 0.1
    """U-Net, self_play: share of empty captions, for classifier-free guidance. If an image is by another hand or
    varied, its caption still says so."""
    others_share: float = 0.0
    """U-Net, self_play: share of the images that are the sets' other drawings. These teach the styles on more than the
    concepts. self_play takes as many as there are; all images of the concepts take part in any case."""
    varied_share: float = 0.0
    """U-Net: share of the images that are mirrored, have their color channels swapped, or both. They show more of a
    style. Their captions name the change, so that it is never generated unasked."""
    crossed_share: float = 0.0
    """U-Net: share of the images whose noise is laid over the same thing in another style. The model then learns to
    follow the style in the prompt, whatever style the noisy image shows. Half of these captions name the style
    alone."""
    crossed_from: int = 300
    """U-Net: the timestep from which on images are crossed. Below it the outline of a thing is settled."""
    crossed_overlap: float = 0.0
    """U-Net: how much two drawings of a thing must overlap to be crossed, 0 to 1 (intersection over union of their
    ink). Drawings that overlap well differ in style and not in the thing's shape."""
    moved_share: float = 0.0
    """U-Net: share of the images at little noise that are turned and shifted. The model then learns to refine strokes
    and edges wherever they are, instead of memorizing the images."""
    moved_below: int = 600
    """U-Net: the timestep below which images are moved. Noisier timesteps decide where things are."""
    style_together: float | None = None
    """U-Net, with --no-train-text-encoder: limit how much a prompt's embedding says about this thing in this style,
    beyond the thing and the style by themselves. This is the largest share of that part to keep; each image's share is
    drawn at random from 0 up to it. The part is a guess where the thing has not been seen in the style. Images by other
    hands and varied images keep all of it. Unset: keep all of it, always. With --stage style_emphasis it is the share
    that the text encoder keeps."""
    style_emphasis: float = 0.5
    """style_emphasis: how much of a style's own direction to add to a prompt's embedding. The direction is what the
    style adds to all things."""
    guidance: float | None = None
    """self_play: guidance scale of the model's own images and of the samples. Take the scale that the base model is to
    generate with. Unset: the base model's usual."""
    sharpness: float = 100.0
    """self_play: beta of the loss: how sure a difference in the error makes that an image is real or generated."""
    compile: bool = False
    """Compile the U-Net with torch.compile. It needs a C++ compiler and takes a minute, and saves a fifth of each
    step."""

    def shares(self) -> Shares:
        """U-Net: how often each change is made to an image and its caption."""
        from sfumato.training.pretrain.batches import Shares

        names = ("flip", "group", "plain", "empty", "others", "varied", "crossed", "moved", "hands")
        values = {name: getattr(self, f"{name}_share") for name in names}
        return Shares(
            **values, crossed_from=self.crossed_from, moved_below=self.moved_below, plain_style=self.plain_style
        )


@dataclass(frozen=True, kw_only=True)
class StyleEmphasisConfig(Config):
    """Train the text encoder of a base model so that a prompt's style counts more. It uses no images. The same as
    `pretrain --stage style_emphasis`."""

    stage: Literal["vae", "unet", "style_emphasis", "self_play"] = "style_emphasis"
    """The stage of pretrain."""
    output: Path = Path("runs/pocket-style-emphasis")
    """Folder of the run: checkpoints, log, plot, samples, and at the end `model/`."""


@dataclass(frozen=True, kw_only=True)
class SelfPlayConfig(Config):
    """Train the U-Net of a base model to tell real images from those that it generates itself. The same as
    `pretrain --stage self_play`."""

    stage: Literal["vae", "unet", "style_emphasis", "self_play"] = "self_play"
    """The stage of pretrain."""
    output: Path = Path("runs/pocket-self-play")
    """Folder of the run: the model's own images, checkpoints, log, plot, samples, and at the end `model/`."""


STAGE_CONFIGS: Mapping[str, type[Config]] = {"style_emphasis": StyleEmphasisConfig, "self_play": SelfPlayConfig}
"""By the name of a trainer up to 0.27, the config of the stage that it is now."""


def vae_loss(vae: AutoencoderKL, pixels: Tensor, noise: Tensor, config: Config) -> Tensor:
    """L1 + MSE + weighted differences of neighbouring pixels + KL, of (b, 3, h, w) in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    drawn = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    error = drawn - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + config.gradient_difference * edges + config.kl * kl


def draw_pixels(pictures: Pictures, config: Config, step: int, device: torch.device) -> Tensor:
    """The VAE's input in a step, (b, 3, h, w) in [-1, 1]: some images mirrored, some changed as if by other hands."""
    import torch

    from sfumato.training.pretrain.batches import restyle_randomly
    from sfumato.training.pretrain.dataset import batch_indices
    from sfumato.utils import randomness

    pixels = pictures.floats(batch_indices(step, config.batch, len(pictures.names), config.seed))
    draws = torch.rand(config.batch, generator=randomness.generator(config.seed, "flip", step))
    pixels = torch.where(draws.view(-1, 1, 1, 1) < config.flip_share, pixels.flip(3), pixels).to(device)
    if not config.hands_share:
        return pixels
    return restyle_randomly(pixels, config.hands_share, randomness.generator(config.seed, "hands", step))


def train_vae(config: Config, precision: Precision) -> Path:
    """Train the VAE on every image that it may see; returns the folder of its averaged weights, fp32."""
    from sfumato import load_base
    from sfumato.runs.run import Run
    from sfumato.training.pretrain.dataset import read_others, read_pictures
    from sfumato.training.pretrain.model import build_vae, first_weights, fp32_precision
    from sfumato.training.pretrain.outputs import make_pretrain_state, save_model
    from sfumato.utils import randomness

    named = read_pictures(config.data)
    pictures = named.and_others(read_others(config.data))
    run = Run.start(config, program="pretrain", writes=["model"])
    run.say(precision.table())
    facts = {"data": pictures.fingerprint(), "init": "none"}
    if config.init:
        base = load_base(config.init, precision=fp32_precision(config.device))
        facts["init"] = base.fingerprint()  # --init-share reads it anew where a run goes on
        vae = base.vae.requires_grad_(True)
    else:
        with first_weights(config.seed):
            vae = build_vae()
    vae.register_to_config(sample_size=pictures.pixels.shape[-1])
    if config.decoder_only:
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
    factor = 2 ** (len(vae.config.block_out_channels) - 1)
    trained = make_pretrain_state({"vae": vae}, config, precision.device, first_share=config.init_share)
    run.keep(**trained.parts())
    run.identify(**facts)
    run.every(config.sample_every, lambda step: _reconstruct(trained, named, run, step))
    for step in run.steps(config.steps):
        trained.set_rate(learning_rate_at(step, config))
        pixels = draw_pixels(pictures, config, step.number, precision.device)
        shape = (config.batch, vae.config.latent_channels, *(side // factor for side in pixels.shape[2:]))
        noise = randomness.normal(shape, config.seed, "noise", step.number)
        with precision.autocast():
            loss = vae_loss(vae, pixels, noise.to(precision.device), config)
        trained.learn(step, loss)
    with trained.result():
        if not config.decoder_only:
            vae.register_to_config(scaling_factor=_scaling_factor(vae, named, precision.device))
        path = save_model(vae, config.output / "model")
    run.plot()
    run.close()
    return path


def _reconstruct(trained: PretrainState, pictures: Pictures, run: Run, step: int) -> None:
    """Log the PSNR over 96 fixed images, and draw sixteen of them beside their reconstructions."""
    import torch

    from sfumato.training.pretrain.outputs import save_sheet

    pixels = pictures.floats(torch.linspace(0, len(pictures.names) - 1, 96).long()).to(trained.device)
    vae: Any = trained.modules["vae"]
    with trained.averaged():
        drawn = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * ((drawn - pixels) / 2).square().mean((1, 2, 3)).log10().mean()
    run.say(f"step {step}: PSNR {psnr:.2f} dB")
    run.log(step=step, psnr=psnr)
    save_sheet(torch.cat([pixels[::6], drawn[::6]]), 16, run.folder / "samples" / f"{step:06d}.png")


def _scaling_factor(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> float:
    """The factor that brings the latents of the named images to a standard deviation of 1."""
    from sfumato.training.pretrain.batches import encode_all

    mean, deviation = encode_all(vae, pictures, device)
    return float(1 / (mean.var() + deviation.square().mean()).sqrt())


def draw_latents(
    cache: Latents, lesson: PretrainBatch, alpha_bar: Tensor, config: Config, step: int
) -> tuple[Tensor, Tensor]:
    """(latents, noise) of a step's lesson, (b, channels, h/f, w/f). For a crossed sample the noise turns the image that
    is asked for into the image that is seen."""
    from sfumato.models import diffusion
    from sfumato.utils import randomness

    mean, deviation, seen = cache.of(lesson)
    shape, device = tuple(mean.shape), alpha_bar.device
    latents = mean + deviation * randomness.normal(shape, config.seed, "posterior", step).to(device)
    noise = randomness.normal(shape, config.seed, "noise", step).to(device)
    if lesson.seen == lesson.asked:
        return latents, noise
    return latents, diffusion.crossing_noise(latents, seen, noise, alpha_bar)


def unet_loss(drawn: Tensor, latents: Tensor, noise: Tensor, alpha_bar: Tensor, config: Config) -> Tensor:
    """The batch's mean error of the predicted v, with min-SNR weights plus a flat one. alpha_bar: (b,)."""
    from sfumato.models import diffusion

    weight = 2 * diffusion.snr_weight("v_prediction", alpha_bar, config.snr_gamma) + config.flat_weight
    wanted = diffusion.prediction_target("v_prediction", latents, noise, alpha_bar)
    return diffusion.weighted_loss(drawn, wanted, weight).mean()


def train_unet(config: Config, precision: Precision) -> Path:
    """Train the U-Net on cached latents, and the text encoder unless it stays frozen. Returns the folder of a pipeline
    with averaged weights, fp32."""
    from sfumato.models import diffusion
    from sfumato.runs.run import Run
    from sfumato.training.pretrain.batches import Latents, PretrainBatches
    from sfumato.training.pretrain.dataset import VARIANTS, find_partners, read_manifest, read_words, seen_pictures
    from sfumato.training.pretrain.model import build_scheduler, read_vae, trainable_parts
    from sfumato.training.pretrain.outputs import assemble, draw_samples, make_pretrain_state, save_model

    device = precision.device
    if config.compile:
        check_compiler(device)
    manifest = read_manifest(config.data)
    check_style(config, manifest["styles"])
    words = [] if config.init else read_words(config.data)
    pictures, named = seen_pictures(config.data, config.others_share)
    partners = find_partners(pictures, config.crossed_overlap)
    check_partners(config, partners)
    vae = read_vae(config.vae, device) if config.vae else None
    run = Run.start(config, program="pretrain", writes=["model", "tokenizer"])
    run.say(precision.table())
    scheduler = build_scheduler()
    if config.init:
        unet, text_encoder, tokenizer, own_vae = trainable_parts(config.init, config.device, scheduler, option="--init")
        text_encoder.requires_grad_(config.train_text_encoder)
        vae = vae or own_vae
    else:
        unet, text_encoder, tokenizer = new_parts(config, run, manifest, words)
    learning = {"unet": unet, "text_encoder": text_encoder} if config.train_text_encoder else {"unet": unet}
    for module in learning.values():
        precision.prepare_for_training(module)
    run_unet = precision.compiled(unet) if config.compile else unet
    cache = Latents(vae, pictures, VARIANTS if config.varied_share else VARIANTS[:2], device)
    unet.register_to_config(sample_size=cache.means.shape[-1])
    lessons = PretrainBatches(pictures.names, named, manifest["concepts"], config.shares(), config.seed, partners)
    states_of = caption_states(config, text_encoder, tokenizer, device)
    trained = make_pretrain_state(learning, config, device, first_share=config.init_share)
    run.keep(**trained.parts())
    run.identify(**facts_of(config, pictures, vae, manifest, tokenizer))

    pipeline = assemble(vae, unet, text_encoder, tokenizer, scheduler)
    draw_samples(run, config.sample_every, trained, precision, pipeline, manifest["styles"], manifest["concepts"])
    every_timestep = range(scheduler.config.num_train_timesteps)
    for step in run.steps(config.steps):
        trained.set_rate(learning_rate_at(step, config))
        timesteps = diffusion.stratified_timesteps(config.batch, every_timestep, config.seed, step.number)
        lesson = lessons.at(step.number, timesteps)
        alpha_bar = scheduler.alphas_cumprod[timesteps].to(device)
        latents, noise = draw_latents(cache, lesson, alpha_bar, config, step.number)
        with precision.autocast():
            hidden = states_of(lesson.captions, step.number)
            drawn = run_unet(diffusion.add_noise(latents, noise, alpha_bar), timesteps.to(device), hidden).sample
        loss = unet_loss(drawn, latents, noise, alpha_bar, config)
        trained.learn(step, loss)
    with trained.result():
        path = save_model(pipeline, config.output / "model")
    run.plot()
    run.close()
    return path


def check_style(config: Config, styles: Sequence[str]) -> None:
    """Refuse a --plain-style that is none of those of the images."""
    if config.plain_style not in (None, *styles):
        known = ", ".join(styles)
        raise ConfigError(f"--plain-style {config.plain_style}: {config.data} has no such style; it has {known}.")


def check_partners(config: Config, partners: Sequence[Sequence[int]]) -> None:
    """Refuse a --crossed-share where no image has another to be crossed with."""
    if config.crossed_share and not any(partners):
        least = f" that overlap by --crossed-overlap {config.crossed_overlap}" if config.crossed_overlap else ""
        raise ConfigError(
            f"--crossed-share {config.crossed_share}: {config.data} has nothing in two styles{least}; leave it out."
        )


def facts_of(
    config: Config, pictures: Pictures, vae: AutoencoderKL, manifest: Mapping[str, Any], tokenizer: Any
) -> dict[str, str]:
    """What the U-Net's training depends on beside its config."""
    from sfumato.data.preparation.cache import weights_digest
    from sfumato.training.pretrain.dataset import captions_fingerprint
    from sfumato.training.pretrain.model import base_fingerprint, tokenizer_fingerprint
    from sfumato.training.pretrain.text import Things

    facts = {"data": pictures.fingerprint(), "vae": weights_digest([vae])}
    facts |= {"captions": captions_fingerprint(manifest), "tokenizer": tokenizer_fingerprint(tokenizer)}
    if config.init and (config.init_share or not config.train_text_encoder):
        facts["init"] = base_fingerprint(config.init, config.device)  # no checkpoint holds it
        if not config.train_text_encoder and config.style_together is not None:
            facts["things"] = Things.read(config.data).fingerprint()
    return facts


def new_parts(config: Config, run: Run, manifest: Mapping[str, Any], words: Sequence[str]) -> tuple[Any, Any, Any]:
    """U-Net and text encoder with their initial weights, and the tokenizer of all captions; the run's folder keeps the
    tokenizer."""
    from transformers import CLIPTokenizer

    from sfumato.training.pretrain.dataset import all_captions
    from sfumato.training.pretrain.model import build_text_encoder, build_tokenizer, build_unet, first_weights
    from sfumato.training.pretrain.outputs import save_model

    if not (config.resume and (run.folder / "tokenizer").exists()):
        run.begin()
        save_model(build_tokenizer(all_captions(manifest, words)), run.folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(run.folder / "tokenizer")
    with first_weights(config.seed):
        return build_unet(), build_text_encoder(tokenizer), tokenizer


def caption_states(
    config: Config, encoder: CLIPTextModel, tokenizer: CLIPTokenizer, device: torch.device
) -> Callable[[Sequence[str], int], Tensor]:
    """The function that encodes a step's captions for the U-Net: (captions, step) -> (captions, positions, width)."""
    from sfumato.training.pretrain.text import PairDropout, Things, directions_of, encode_text

    if config.train_text_encoder or config.style_together is None:
        return lambda captions, step: encode_text(encoder, tokenizer, captions, device)
    directions = directions_of(encoder, tokenizer, Things.read(config.data), config.seed, device)
    return PairDropout(directions, most=config.style_together, seed=config.seed).states


def train_style_emphasis(config: Config, precision: Precision) -> Path:
    """Train the text encoder so that a prompt's style counts more. Returns the folder of a pipeline with the averaged
    weights, fp32."""
    import copy

    from sfumato.runs.run import Run
    from sfumato.training.pretrain.model import base_fingerprint, build_scheduler, trainable_parts
    from sfumato.training.pretrain.outputs import assemble, draw_samples, make_pretrain_state, save_model
    from sfumato.training.pretrain.text import Emphasis, Things, directions_of, encode_text

    things = Things.read(config.data)
    run = Run.start(config, program="pretrain", writes=["model"])
    run.say(precision.table())
    scheduler, device = build_scheduler(), precision.device
    unet, text_encoder, tokenizer, vae = trainable_parts(config.base, config.device, scheduler)
    precision.prepare_for_training(text_encoder)
    taught = copy.deepcopy(text_encoder).requires_grad_(False)
    directions = directions_of(taught, tokenizer, things, config.seed, device)
    together = 1.0 if config.style_together is None else config.style_together
    emphasis = Emphasis(directions, strength=config.style_emphasis, together=together, seed=config.seed)
    trained = make_pretrain_state({"text_encoder": text_encoder}, config, device)
    run.keep(**trained.parts())
    run.identify(things=things.fingerprint(), base=base_fingerprint(config.base, config.device))

    pipeline = assemble(vae, unet, text_encoder, tokenizer, scheduler)
    draw_samples(run, config.sample_every, trained, precision, pipeline, things.styles, things.concepts)
    for step in run.steps(config.steps):
        trained.set_rate(learning_rate_at(step, config))
        texts, wanted = emphasis.lesson(step.number, config.batch)
        with precision.autocast():
            said = encode_text(text_encoder, tokenizer, texts, device)
        trained.learn(step, (said.float() - wanted).square().mean())
    with trained.result():
        path = save_model(pipeline, config.output / "model")
    run.plot()
    run.close()
    return path


def train_self_play(config: Config, precision: Precision) -> Path:
    """Train the U-Net alone to tell real images from its own, by direct discriminative optimization. Returns the folder
    of a pipeline with the averaged weights, fp32."""
    import copy

    from sfumato.data.preparation.cache import weights_digest
    from sfumato.models import FAMILIES, diffusion
    from sfumato.runs.run import Run
    from sfumato.training.pretrain.batches import Latents
    from sfumato.training.pretrain.dataset import VARIANTS, read_manifest
    from sfumato.training.pretrain.model import base_fingerprint, build_scheduler, trainable_parts
    from sfumato.training.pretrain.outputs import assemble, draw_samples, make_pretrain_state, save_model
    from sfumato.training.pretrain.self_play import discriminative_loss, error_increase
    from sfumato.utils import randomness

    manifest = read_manifest(config.data)
    pictures = played_pictures(config)
    run = Run.start(config, program="pretrain", writes=["model", "own-drawings.safetensors"])
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
    guidance = FAMILIES["pocket"].defaults.guidance if config.guidance is None else config.guidance
    drawn_by = (text_encoder, tokenizer, first, guidance, fingerprint)
    pairs = draw_pairs(config, precision, run, pictures, cache, *drawn_by)

    pipeline = assemble(vae, unet, text_encoder, tokenizer, scheduler)
    told = manifest["styles"], manifest["concepts"], guidance
    draw_samples(run, config.sample_every, trained, precision, pipeline, *told)
    every_timestep = range(scheduler.config.num_train_timesteps)
    for step in run.steps(config.steps):
        trained.set_rate(learning_rate_at(step, config))
        latents, hidden = pairs.at(step.number, config.batch, config.seed, config.empty_share)
        timesteps = diffusion.stratified_timesteps(config.batch, every_timestep, config.seed, step.number)
        noise = randomness.normal((config.batch, *pairs.own.shape[1:]), config.seed, "noise", step.number)
        real, of_own = error_increase(unet, first, latents, hidden, timesteps, noise, scheduler, precision)
        trained.learn(step, discriminative_loss(real, of_own, config.sharpness))
    with trained.result():
        path = save_model(pipeline, config.output / "model")
    run.plot()
    run.close()
    return path


def draw_pairs(
    config: Config,
    precision: Precision,
    run: Run,
    pictures: Pictures,
    cache: Latents,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    first: UNet2DConditionModel,
    guidance: float,
    fingerprint: str,
) -> Pairs:
    """The images, each with what the first U-Net draws of its caption; the run's folder keeps the drawings."""
    import torch

    from sfumato.training.pretrain.model import build_scheduler
    from sfumato.training.pretrain.self_play import Pairs, own_drawings
    from sfumato.training.pretrain.text import encode_text

    device = precision.device
    captions = [f"{what}, {style} style" for what, style in pictures.names]
    with torch.no_grad():
        parts = [captions[start : start + 64] for start in range(0, len(captions), 64)]
        states = torch.cat([encode_text(text_encoder, tokenizer, texts, device) for texts in parts])
        empty = encode_text(text_encoder, tokenizer, [""], device)
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
    return Pairs(cache.means[0], own, states, empty)


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


@training_entry_point
def train(config: Config) -> Path:
    """Run the stage that `config` names; returns the folder of what was trained."""
    check(config)
    config, precision = resolve_for_device(config, learning_rate=3e-5 if config.stage == "self_play" else 1e-3)
    stages = {
        "vae": train_vae,
        "unet": train_unet,
        "style_emphasis": train_style_emphasis,
        "self_play": train_self_play,
    }
    return stages[config.stage](config, precision)


def main(argv: Sequence[str], stage: str | None = None) -> int:
    """Run the program; prints the folder of what was trained. stage: where it is called by the name of a stage."""
    program = f"train {stage or 'pretrain'}"
    print(train(parse(STAGE_CONFIGS.get(stage or "", Config), argv, program=program)))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
