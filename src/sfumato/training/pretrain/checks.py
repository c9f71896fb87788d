"""What of a training that makes a base can be refused before anything is loaded."""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

from sfumato.errors import ConfigError
from sfumato.training.checks import check_run, only_with, refuse_given
from sfumato.training.pretrain.options import PretrainOptions
from sfumato.utils.formatting import option_flag

if TYPE_CHECKING:
    import torch

_NOT_NEGATIVE = ("kl", "gradient_difference", "snr_gamma", "flat_weight", "crossed_from", "moved_below")


def check_pretraining(config: PretrainOptions) -> None:
    """Of any of these programs: refuse numbers that make no sense, and a rate that rises or falls after the end."""
    check_run(config)
    for name in ("warmup", "fall_at"):
        _check_not_negative(config, name)
    if config.fall_at is not None and config.fall_at > config.steps:
        raise ConfigError(
            f"--fall-at {config.fall_at}: the run has {config.steps} steps; give a --fall-at of at most that, too, "
            f"such as {config.steps // 3}."
        )
    if config.warmup is not None and config.warmup > config.steps:
        raise ConfigError(f"--warmup {config.warmup}: the run has {config.steps} steps; make it shorter.")


def check_shares(config: PretrainOptions, *names: str) -> None:
    """Refuse shares that are none."""
    for name in names:
        share = getattr(config, name)
        if share is not None and not 0 <= share <= 1:
            raise ConfigError(f"{option_flag(name)} is {share}; it must be 0 to 1.")


def check(config: Any) -> None:
    """Refuse what makes no sense, by itself or in the stage that is trained.

    config: the `Config` of `trainers/pretrain.py`, or of a copy of it.
    """
    check_pretraining(config)
    if config.stage in ("style_emphasis", "self_play"):
        _check_of_base(config)
        return
    shares = ("flip", "hands", "init", "group", "empty", "others", "varied", "crossed", "moved")
    check_shares(config, *(f"{name}_share" for name in shares), "crossed_overlap", "style_together")
    if not 0 <= config.plain_share <= 0.5:
        raise ConfigError(f"--plain-share is {config.plain_share}; it must be 0 to 0.5.")
    for name in _NOT_NEGATIVE:
        _check_not_negative(config, name)
    _check_effects(config)
    if config.stage == "unet":
        _check_unet(config)
    _check_sources(config)


def _check_of_base(config: Any) -> None:
    """Refuse what makes no sense in a stage that trains a base which is there."""
    of_emphasis, of_play = (
        ("style_together", "style_emphasis"),
        ("empty_share", "others_share", "guidance", "sharpness"),
    )
    own = of_emphasis if config.stage == "style_emphasis" else of_play
    shared = {field.name for field in dataclasses.fields(PretrainOptions)} | {"stage", "output", "base", *own}
    others = [field.name for field in dataclasses.fields(config) if field.name not in shared]
    refuse_given(config, f"has no effect with --stage {config.stage}; leave it out", *others)
    if config.stage == "style_emphasis":
        check_shares(config, "style_together")
        _check_not_negative(config, "style_emphasis")
        if not config.style_emphasis and config.style_together in (None, 1):
            raise ConfigError(
                "--style-emphasis is 0 and all of --style-together stays, so that nothing would be learned; change "
                "either."
            )
        return
    check_shares(config, "empty_share", "others_share")
    if config.guidance is not None and not 0 <= config.guidance <= 100:
        raise ConfigError(f"--guidance is {config.guidance}; it must be 0 to 100; 1 to 3 is usual.")
    if not 0 < config.sharpness < float("inf"):
        raise ConfigError(f"--sharpness is {config.sharpness}; it must be a positive number, such as 100.")


def _check_not_negative(config: PretrainOptions, name: str) -> None:
    value = getattr(config, name)
    if value is not None and not 0 <= value < float("inf"):
        raise ConfigError(f"{option_flag(name)} is {value}; it must not be negative.")


def _check_effects(config: Any) -> None:
    """Refuse options that have no effect beside the others."""
    only_with(config, "--stage style_emphasis", "style_emphasis")
    only_with(config, "--stage self_play", "guidance", "sharpness")
    only_with(config, "--stage style_emphasis or self_play", "base")
    if config.stage != "vae":
        only_with(config, "--stage vae", "kl", "gradient_difference")
    if config.stage != "unet":
        of_timesteps = ("snr_gamma", "flat_weight", "crossed_from", "crossed_overlap", "moved_below")
        of_captions = ("group_share", "plain_share", "empty_share", "others_share")
        of_pictures = ("varied_share", "crossed_share", "moved_share")
        alone = ("vae", "plain_style", "compile", "train_text_encoder")
        only_with(config, "--stage unet", *alone, *of_captions, *of_pictures, *of_timesteps)
    if config.train_text_encoder:
        only_with(config, "--no-train-text-encoder", "style_together")
    if not config.crossed_share:
        only_with(config, "--crossed-share", "crossed_from", "crossed_overlap")
    if not config.moved_share:
        only_with(config, "--moved-share", "moved_below")
    if config.decoder_only:
        only_with(config, "an encoder that learns", "kl")
    if not config.plain_share:
        only_with(config, "--plain-share", "plain_style")


def _check_unet(config: Any) -> None:
    """Refuse numbers of the U-Net's stage of which nothing would come."""
    if config.empty_share + config.group_share > 1:
        raise ConfigError(
            f"--empty-share {config.empty_share} and --group-share {config.group_share}: both are of all captions; "
            "let them be 1 together at most."
        )
    if config.others_share and not round(config.batch * config.others_share):
        raise ConfigError(f"--others-share {config.others_share} of --batch {config.batch} is no image; raise either.")
    if config.crossed_share and config.crossed_from > 999:
        raise ConfigError(f"--crossed-from {config.crossed_from}: no image would be crossed; timesteps end at 999.")
    if config.moved_share and not config.moved_below:
        raise ConfigError("--moved-below 0: no image would be moved; leave --moved-share out, too.")
    if not config.snr_gamma and not config.flat_weight:
        raise ConfigError("--snr-gamma and --flat-weight are both 0, so that nothing would be learned; raise one.")


def _check_sources(config: Any) -> None:
    """Refuse a start that the stage does not have, or lacks."""
    if config.init_share and config.init is None:
        raise ConfigError("--init-share keeps weights of a base: it needs --init BASE, such as pocket.")
    if config.decoder_only and (config.stage != "vae" or config.init is None):
        raise ConfigError("--decoder-only goes on with the VAE of a base: it needs --stage vae and --init BASE.")
    if not config.train_text_encoder and config.init is None:
        raise ConfigError("--no-train-text-encoder leaves the text encoder of a base at rest: it needs --init BASE.")
    if config.stage == "unet" and config.vae is None and config.init is None:
        raise ConfigError("--stage unet needs --vae, the folder of a trained VAE; train one with --stage vae.")
    if config.stage == "unet" and config.vae is not None and not (config.vae / "config.json").is_file():
        raise ConfigError(f"--vae {config.vae}: holds no trained VAE; train one with --stage vae.")


def check_compiler(device: torch.device) -> None:
    """Compile a trifle. Raises ConfigError where that does not go, before anything is written."""
    import torch

    try:
        torch.compile(torch.nn.functional.gelu)(torch.ones(2, device=device))
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0]
        package = re.search(r"No module named '(\w+)'", reason)  # setuptools, which not every environment has
        missing = f"Run `pip install {package[1]}`" if package else "Install a C++ compiler such as g++"
        raise ConfigError(
            f"--compile: torch.compile does not work here ({reason}). {missing}, or give --no-compile, which takes "
            "longer."
        ) from None
