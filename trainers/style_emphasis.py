"""Train the text encoder of a small base model so that a prompt's style counts more. It uses no images.

    python trainers/style_emphasis.py trainers/configs/pocket-style-emphasis.toml
    sfumato train style_emphasis --data FOLDER --base runs/my-base/model --output runs/my-emphasis

Both run the same program. U-Net and VAE stay as they are. docs/pocket.md says what it is for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.training.entry_point import training_entry_point
from sfumato.training.pretrain.checks import check_pretraining, check_shares
from sfumato.training.pretrain.options import PretrainOptions, learning_rate_at, resolve_for_device


@dataclass(frozen=True, kw_only=True)
class Config(PretrainOptions):
    """Train the text encoder of a base model so that a prompt's style counts more. It uses no images."""

    base: str = "pocket"
    """Base model whose text encoder is trained: pocket, or the folder of one that pretrain made."""
    output: Path = Path("runs/pocket-style-emphasis")
    """Folder of the run: checkpoints, log, plot, samples, and at the end `model/`."""
    batch: int = 16
    """Things that are named in each step, each in all its styles."""
    style_emphasis: float = 0.5
    """How much of a style's own direction to add to a prompt's embedding. The direction is what the style adds to all
    things."""
    style_together: float = 1.0
    """Share to keep of what a prompt's embedding says about this thing in this style, beyond the thing and the style by
    themselves. If the thing has not been seen in the style, this part is a guess; if it has, the U-Net also uses it to
    know how the thing looks. 1: keep all of it."""


@training_entry_point
def train(config: Config) -> Path:
    """Train, and return the folder of a pipeline with the averaged weights, fp32."""
    import copy

    from sfumato.runs.run import Run
    from sfumato.training.pretrain.model import base_fingerprint, build_scheduler, trainable_parts
    from sfumato.training.pretrain.outputs import assemble, draw_samples, make_pretrain_state, save_model
    from sfumato.training.pretrain.text import Emphasis, Things, directions_of, encode_text

    check(config)
    config, precision = resolve_for_device(config)
    things = Things.read(config.data)
    run = Run.start(config, program="style_emphasis", writes=["model"])
    run.say(precision.table())
    scheduler, device = build_scheduler(), precision.device
    unet, text_encoder, tokenizer, vae = trainable_parts(config.base, config.device, scheduler)
    precision.prepare_for_training(text_encoder)
    taught = copy.deepcopy(text_encoder).requires_grad_(False)
    directions = directions_of(taught, tokenizer, things, config.seed, device)
    emphasis = Emphasis(directions, strength=config.style_emphasis, together=config.style_together, seed=config.seed)
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


def check(config: Config) -> None:
    """Refuse options that make no sense, before anything is loaded."""
    check_pretraining(config)
    check_shares(config, "style_together")
    if not 0 <= config.style_emphasis < float("inf"):
        raise ConfigError(f"--style-emphasis is {config.style_emphasis}; it must not be negative.")
    if not config.style_emphasis and config.style_together == 1:
        raise ConfigError(
            "--style-emphasis is 0 and all of --style-together stays, so that nothing would be learned; change either."
        )


def main(argv: Sequence[str]) -> int:
    """Run the program; prints the folder of what was trained."""
    print(train(parse(Config, argv, program="train style_emphasis")))
    return 0


if __name__ == "__main__":
    from sfumato.cli import run

    run(main)
