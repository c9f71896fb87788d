"""Pre-train a small Stable Diffusion from nothing, in two stages: the VAE, then the U-Net with its text encoder.

Made for the pocket base, whose pictures `bench/pocket_data.py` builds. Each stage resumes from its own
checkpoint; `steps` and `fall_at` may be changed at a resume, so that the fall of the rate can be timed by the clock.

    python trainers/pretrain.py trainers/configs/pocket-vae-cpu.toml
    python trainers/pretrain.py trainers/configs/pocket-unet-cpu.toml
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.config import parse
from sfumato.errors import ConfigError, RunError
from sfumato.files.atomic import atomic_path, write_text

if TYPE_CHECKING:  # a program imports what is heavy only when it runs, so that its --help is there at once
    import torch
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from torch import Tensor, nn
    from transformers import CLIPTextModel, CLIPTokenizer

    from sfumato.pocket.pictures import Pictures

SHEET = ("red apple", "crab", "cat face", "house", "rocket", "tulip", "pizza", "penguin", "guitar", "bus", "owl", "key")
"""Concepts drawn on the sample sheets."""


@dataclass(frozen=True)
class Config:
    """Pre-train the VAE, or the U-Net with its text encoder, from nothing."""

    stage: Literal["vae", "unet"] = "vae"
    """What to train. The U-Net needs a trained VAE."""
    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built."""
    out: Path = Path("runs/pocket-vae")
    """The run's folder: checkpoint, log, samples, and at the end `model/`."""
    vae: Path | None = None
    """Folder of the trained VAE, for the U-Net's stage."""
    steps: int = 2400
    """Optimizer steps in all."""
    batch: int = 16
    """Pictures in a step."""
    learning_rate: float = 1e-3
    """The rate between the warm-up and the fall."""
    warmup_steps: int = 100
    """Steps over which the rate rises from 0."""
    fall_at: int = 800
    """The step at which the rate begins to fall, linearly, to 0 at the last."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """AdamW, or Muon for the inner weights beside AdamW for the rest."""
    weight_decay: float = 0.01
    """AdamW's weight decay."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is what is sampled from and exported."""
    kl: float = 1e-3
    """VAE: weight of the mean KL divergence of a latent number from a standard normal one."""
    gradient_difference: float = 0.5
    """VAE: weight of the error in the differences of neighbouring pixels, which keeps edges sharp."""
    snr_gamma: float = 5.0
    """U-Net: gamma of the min-SNR weights; a sample weighs 2 min(SNR, gamma) / (SNR + 1) + flat_weight."""
    flat_weight: float = 0.2
    """U-Net: what every sample weighs besides, so that the noisiest timesteps, which decide the layout, count."""
    flip_share: float = 0.5
    """Share of the pictures that are mirrored."""
    group_share: float = 0.06
    """U-Net: share of captions that name the concept's group in place of the concept."""
    empty_share: float = 0.1
    """U-Net: share of empty captions, for classifier-free guidance."""
    seed: int = 0
    """Seed of weights and of every draw."""
    device: str = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    compute: Literal["bf16", "fp32"] = "bf16"
    """Type of the arithmetic in the forward pass; weights are kept in fp32."""
    checkpoint_every: int = 400
    """Steps between checkpoints."""
    samples_every: int = 400
    """Steps between sample sheets."""
    log_every: int = 50
    """Steps between lines of progress."""


def rate_at(step: int, config: Config) -> float:
    """The learning rate of a step, as a share of the highest: warm-up, flat, linear fall to 0."""
    rising = (step + 1) / max(config.warmup_steps, 1)
    falling = (config.steps - step) / max(config.steps - config.fall_at, 1)
    return max(0.0, min(1.0, rising, falling))


class Trained:
    """Modules being trained, with their optimizer and the moving average of their weights.

    Knows how to become a checkpoint (safetensors for tensors, JSON for the step) and to be restored from one.
    """

    def __init__(self, modules: Mapping[str, nn.Module], config: Config, device: torch.device) -> None:
        import torch

        from sfumato.muon import Muon

        self.modules = {name: module.to(device).train() for name, module in modules.items()}
        self.config, self.device, self.step = config, device, 0
        self.parameters = {
            f"{part}.{name}": p for part, module in self.modules.items() for name, p in module.named_parameters()
        }
        self.average = {name: p.detach().clone() for name, p in self.parameters.items()}
        ends = ("conv_in.", "conv_out.", "embedding", "time_emb")
        inner = [p for name, p in self.parameters.items() if p.ndim > 1 and not any(word in name for word in ends)]
        orthogonal = inner if config.optimizer == "muon" else []
        rest = [p for p in self.parameters.values() if not any(p is q for q in orthogonal)]
        groups = [
            {"params": [p for p in rest if p.ndim > 1], "weight_decay": config.weight_decay},
            {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
        ]
        self.optimizers = [torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)]
        if orthogonal:
            decay = config.weight_decay
            self.optimizers.append(Muon(orthogonal, lr=config.learning_rate, momentum=0.95, weight_decay=decay))

    def update(self, loss: Tensor) -> None:
        """One optimizer step down `loss`, and one step of the moving average."""
        import torch
        from torch import nn

        for group in [group for optimizer in self.optimizers for group in optimizer.param_groups]:
            group["lr"] = self.config.learning_rate * rate_at(self.step, self.config)
        loss.backward()
        weights = list(self.parameters.values())
        nn.utils.clip_grad_norm_(weights, self.config.clip)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        # The average of a young run must not remember its random start.
        decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in weights], 1 - decay)
        self.step += 1

    @contextlib.contextmanager
    def averaged(self) -> Iterator[Mapping[str, nn.Module]]:
        """The modules holding their averaged weights, in eval mode, for as long as the block lasts."""
        import torch

        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._load(self.average)
        for module in self.modules.values():
            module.eval()
        try:
            with torch.no_grad():
                yield self.modules
        finally:
            self._load(kept)
            for module in self.modules.values():
                module.train()

    def save(self, folder: Path) -> None:
        """The checkpoint: one safetensors file whose header carries the step, so that both change at once."""
        from safetensors.torch import save_file

        tensors = {f"weight.{name}": p.detach() for name, p in self.parameters.items()}
        tensors |= {f"average.{name}": p for name, p in self.average.items()}
        for name, p in self.parameters.items():
            for optimizer in self.optimizers:
                tensors |= {f"{key}.{name}": value for key, value in optimizer.state.get(p, {}).items()}
        with atomic_path(folder / "checkpoint.safetensors") as path:
            save_file({k: v.contiguous().cpu() for k, v in tensors.items()}, path, {"step": str(self.step)})

    def restore(self, folder: Path) -> None:
        """Continue from the folder's checkpoint, if it has one."""
        from safetensors import safe_open
        from safetensors.torch import load_file

        path = folder / "checkpoint.safetensors"
        if not path.exists():
            return
        with safe_open(path, "pt") as file:
            self.step = int(file.metadata()["step"])
        tensors = load_file(path, str(self.device))
        if {f"weight.{name}" for name in self.parameters} - tensors.keys():
            raise RunError(f"{path} is a checkpoint of other modules; give another --out, or remove it.")
        self._load({name: tensors[f"weight.{name}"] for name in self.parameters})
        for name, p in self.parameters.items():
            self.average[name].copy_(tensors[f"average.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq", "momentum") if f"{key}.{name}" in tensors]
            owner = self.optimizers[-1 if "momentum" in keys else 0]
            owner.state[p] = {key: tensors[f"{key}.{name}"] for key in keys}

    def _load(self, weights: Mapping[str, Tensor]) -> None:
        import torch

        with torch.no_grad():
            for name, p in self.parameters.items():
                p.copy_(weights[name])


class Progress:
    """Prints and logs the loss and the time left."""

    def __init__(self, config: Config, first: int) -> None:
        self.config, self.began, self.first, self.losses = config, time.monotonic(), first, list[float]()

    def note(self, step: int, loss: Tensor) -> None:
        """Remember a step's loss; every `log_every` steps, a line."""
        self.losses.append(loss.item())
        if step % self.config.log_every and step != self.config.steps:
            return
        pace_s = (time.monotonic() - self.began) / max(step - self.first, 1)
        line = {
            "step": step,
            "loss": round(sum(self.losses) / len(self.losses), 5),
            "rate": self.config.learning_rate * rate_at(step, self.config),
            "pictures_per_s": round(self.config.batch / pace_s, 1),
            "left_s": round(pace_s * (self.config.steps - step)),
            "clock_s": round(time.time()),
        }
        self.losses = []
        print(json.dumps(line), flush=True)
        with (self.config.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")


def batch_indices(step: int, batch: int, n: int, seed: int) -> list[int]:
    """Which pictures step `step` sees: every picture once an epoch, each epoch in an order of its own."""
    from sfumato import randomness

    places = range(step * batch, (step + 1) * batch)
    orders = {epoch: randomness.permutation(n, seed, "order", epoch) for epoch in {place // n for place in places}}
    return [orders[place // n][place % n] for place in places]


def vae_loss(vae: AutoencoderKL, pixels: Tensor, noise: Tensor, config: Config) -> Tensor:
    """L1 + MSE + weighted differences of neighbouring pixels + KL, of (b, 3, h, w) in [-1, 1]."""
    posterior = vae.encode(pixels).latent_dist
    drawn = vae.decode(posterior.mean + posterior.std * noise).sample.float()
    error = drawn - pixels
    edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return error.abs().mean() + error.square().mean() + config.gradient_difference * edges + config.kl * kl


def train_vae(config: Config, device: torch.device, autocast: Callable[[], Any]) -> Path:
    """Train the VAE on every picture that may be seen; returns the folder of its averaged weights, fp32."""
    import torch

    from sfumato import randomness
    from sfumato.pocket.parts import build_vae
    from sfumato.pocket.pictures import read_pictures

    pictures = read_pictures(config.data, others=True)
    vae = build_vae()
    trained = Trained({"vae": vae}, config, device)
    trained.restore(config.out)
    progress = Progress(config, trained.step)
    while trained.step < config.steps:
        step = trained.step
        pixels = pictures.floats(batch_indices(step, config.batch, len(pictures.names), config.seed))
        draws = torch.rand(config.batch, generator=randomness.generator(config.seed, "flip", step))
        pixels = torch.where(draws.view(-1, 1, 1, 1) < config.flip_share, pixels.flip(3), pixels)
        shape = (config.batch, vae.config.latent_channels, *(side // 4 for side in pixels.shape[2:]))
        noise = randomness.normal(shape, config.seed, "noise", step)
        with autocast():
            loss = vae_loss(vae, pixels.to(device), noise.to(device), config)
        trained.update(loss)
        progress.note(trained.step, loss)
        if trained.step % config.samples_every == 0 or trained.step == config.steps:
            _reconstruct(trained, pictures, config)
        if trained.step % config.checkpoint_every == 0 or trained.step == config.steps:
            trained.save(config.out)
    with trained.averaged():
        vae.register_to_config(scaling_factor=_scaling_factor(vae, pictures, device))
        vae.save_pretrained(config.out / "model")
    return config.out / "model"


def _reconstruct(trained: Trained, pictures: Pictures, config: Config) -> None:
    """Print the PSNR over a fixed hundred pictures, and draw sixteen beside their reconstructions."""
    import torch

    named = pictures.named()
    pixels = named.floats(torch.linspace(0, len(named.names) - 1, 96).long()).to(trained.device)
    with trained.averaged() as modules:
        vae = modules["vae"]
        drawn = vae.decode(vae.encode(pixels).latent_dist.mode()).sample.clamp(-1, 1)
    psnr = -10 * ((drawn - pixels) / 2).square().mean((1, 2, 3)).log10().mean()
    print(f"step {trained.step}: PSNR {psnr:.2f} dB", flush=True)
    save_sheet(torch.cat([pixels[::6], drawn[::6]]), 16, config.out / "samples" / f"{trained.step:06d}.png")


def _scaling_factor(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> float:
    """What brings the latents of the named pictures to a standard deviation of 1."""
    mean, deviation = encode_all(vae, pictures.named(), device)
    return float(1 / (mean.var() + deviation.square().mean()).sqrt())


def encode_all(vae: AutoencoderKL, pictures: Pictures, device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of every picture's latents, unscaled, each (n, 4, h/4, w/4) fp32."""
    import torch

    means, deviations = [], []
    with torch.no_grad():
        for chunk in torch.arange(len(pictures.names)).split(64):
            posterior = vae.encode(pictures.floats(chunk).to(device)).latent_dist
            means.append(posterior.mean)
            deviations.append(posterior.std)
    return torch.cat(means), torch.cat(deviations)


def train_unet(config: Config, device: torch.device, autocast: Callable[[], Any]) -> Path:
    """Train U-Net and text encoder on cached latents; returns the folder of a pipeline, averaged weights, fp32."""
    import torch
    from diffusers import AutoencoderKL
    from transformers import CLIPTokenizer

    from sfumato import randomness
    from sfumato.diffusion import noise_latents, snr_weight, stratified_timesteps, target, weighted_error
    from sfumato.pocket.captions import all_captions, caption
    from sfumato.pocket.parts import build_scheduler, build_text_encoder, build_tokenizer, build_unet
    from sfumato.pocket.pictures import read_manifest, read_pictures

    if config.vae is None:
        raise ConfigError("--stage unet needs --vae, the folder of a trained VAE; train one with --stage vae.")
    manifest = read_manifest(config.data)
    words = (config.data / "words.txt").read_text(encoding="utf-8").split()
    if not (config.out / "tokenizer").exists():
        build_tokenizer(all_captions(manifest, words)).save_pretrained(config.out / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(config.out / "tokenizer")
    scheduler = build_scheduler()
    vae = AutoencoderKL.from_pretrained(config.vae).to(device).eval()
    parts = {"unet": build_unet(), "text_encoder": build_text_encoder(tokenizer)}
    unet, text_encoder = parts["unet"], parts["text_encoder"]
    pictures = read_pictures(config.data, others=False)
    # Mirrored pictures are a second half of the cache: latents cannot be mirrored themselves.
    caches = [encode_all(vae, p, device) for p in (pictures, pictures.mirrored())]
    means, deviations = (torch.stack(pair) * vae.config.scaling_factor for pair in zip(*caches, strict=True))
    groups, n = manifest["concepts"], len(pictures.names)
    shares = {"empty_share": config.empty_share, "group_share": config.group_share}
    trained = Trained(parts, config, device)
    trained.restore(config.out)
    progress = Progress(config, trained.step)
    while trained.step < config.steps:
        step = trained.step
        indices = batch_indices(step, config.batch, n, config.seed)
        draws = torch.rand(3, config.batch, generator=randomness.generator(config.seed, "captions and flips", step))
        flips = (draws[2] < config.flip_share).long()
        texts = [
            caption(*pictures.names[i], groups[pictures.names[i][0]], draw=draw, form=form, **shares)
            for i, draw, form in zip(indices, draws[0].tolist(), draws[1].tolist(), strict=True)
        ]
        posterior = means[flips, indices], deviations[flips, indices]
        shape = tuple(posterior[0].shape)
        latents = posterior[0] + posterior[1] * randomness.normal(shape, config.seed, "posterior", step).to(device)
        noise = randomness.normal(shape, config.seed, "noise", step).to(device)
        timesteps = stratified_timesteps(config.batch, scheduler.config.num_train_timesteps, config.seed, step)
        alpha_bar = scheduler.alphas_cumprod[timesteps].to(device)
        weight = 2 * snr_weight("v_prediction", alpha_bar, config.snr_gamma) + config.flat_weight
        with autocast():
            hidden = encode_text(text_encoder, tokenizer, texts, device)
            drawn = unet(noise_latents(latents, noise, alpha_bar), timesteps.to(device), hidden).sample
        loss = weighted_error(drawn, target("v_prediction", latents, noise, alpha_bar), weight).mean()
        trained.update(loss)
        progress.note(trained.step, loss)
        if trained.step % config.samples_every == 0 or trained.step == config.steps:
            with trained.averaged(), autocast():
                pipeline = assemble(vae, unet, text_encoder, tokenizer, scheduler)
                sheet(pipeline, manifest["styles"], config.out / "samples" / f"{trained.step:06d}.png")
        if trained.step % config.checkpoint_every == 0 or trained.step == config.steps:
            trained.save(config.out)
    with trained.averaged():
        assemble(vae, unet, text_encoder, tokenizer, scheduler).save_pretrained(config.out / "model")
    return config.out / "model"


def encode_text(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str], device: torch.device) -> Tensor:
    """(len(texts), positions, width) hidden states; each distinct text is encoded once."""
    distinct = sorted(set(texts))
    tokens = tokenizer(distinct, padding="max_length", truncation=True, return_tensors="pt").input_ids
    hidden = encoder(tokens.to(device)).last_hidden_state
    return hidden[[distinct.index(text) for text in texts]]


def assemble(
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    scheduler: DDIMScheduler,
) -> StableDiffusionPipeline:
    """The parts as an ordinary Stable Diffusion pipeline."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae, text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def sheet(pipeline: StableDiffusionPipeline, styles: Sequence[str], path: Path) -> None:
    """One row for each style, one column for each of SHEET; 25 steps, guidance 4, the seed is the column."""
    from sfumato import randomness

    prompts = [f"{concept}, {style} style" for style in styles for concept in SHEET]
    generators = [randomness.generator(0, "sheet", 0, column) for _ in styles for column in range(len(SHEET))]
    drawn = pipeline(prompts, num_inference_steps=25, guidance_scale=4.0, generator=generators, output_type="pt").images
    save_sheet(drawn.float() * 2 - 1, len(SHEET), path)


def save_sheet(pictures: Tensor, columns: int, path: Path) -> None:
    """(n, 3, h, w) in [-1, 1] as one PNG, `columns` in a row."""
    import torch
    from PIL import Image

    rows = [torch.cat(list(row), dim=2) for row in pictures.split(columns)]
    pixels = ((torch.cat(rows, dim=1).clamp(-1, 1) + 1) * 127.5).round().byte().cpu()
    with atomic_path(path) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(temporary)


def train(config: Config) -> Path:
    """Run the stage that `config` names; returns the folder of what was trained."""
    import torch

    device = torch.device(config.device if config.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(config.seed)  # the modules' first weights; every later draw names its own stream
    write_text(config.out / "config.json", json.dumps(asdict(config), indent=1, default=str) + "\n")

    def autocast() -> Any:
        return torch.autocast(device.type, torch.bfloat16, enabled=config.compute == "bf16")

    return {"vae": train_vae, "unet": train_unet}[config.stage](config, device, autocast)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the program; prints the folder of what was trained."""
    print(train(parse(Config, sys.argv[1:] if argv is None else argv, program="pretrain")))


if __name__ == "__main__":
    main()
