"""kohya_ss: what one of its windows saves -> the script of sd-scripts that it starts, and that script's settings.

Names and meanings are those of kohya_gui/lora_gui.py, dreambooth_gui.py, finetune_gui.py and textual_inversion_gui.py
there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop.blocks import OF_BLOCKS

_PASSED_ON = frozenset((
    "bucket_no_upscale", "bucket_reso_steps", "caption_dropout_every_n_epochs", "caption_dropout_rate",
    "caption_extension", "clip_skip", "color_aug", "dataset_config", "debiased_estimation_loss", "dim_from_weights",
    "flip_aug", "fp8_base", "full_bf16", "full_fp16", "gradient_accumulation_steps", "gradient_checkpointing",
    "huber_c", "huber_scale", "huber_schedule", "huggingface_repo_id", "init_word", "ip_noise_gamma",
    "ip_noise_gamma_random_strength", "keep_tokens", "learning_rate", "learning_rate_te", "log_tracker_name",
    "log_with", "logging_dir", "loss_type", "lr_scheduler", "lr_scheduler_args", "lr_scheduler_num_cycles",
    "lr_scheduler_power", "lr_scheduler_type", "masked_loss", "max_bucket_reso", "max_grad_norm", "max_timestep",
    "max_token_length",
    "max_train_epochs", "max_train_steps", "metadata_author", "metadata_license", "min_bucket_reso", "min_snr_gamma",
    "min_timestep", "mixed_precision", "network_alpha", "network_dim", "network_dropout", "network_weights",
    "no_token_padding", "num_vectors_per_token", "output_name", "pretrained_model_name_or_path", "prior_loss_weight",
    "random_crop", "reg_data_dir", "sample_every_n_epochs", "sample_every_n_steps", "save_every_n_epochs",
    "save_every_n_steps", "save_last_n_epochs", "save_last_n_steps", "save_precision",
    "scale_v_pred_loss_like_noise_pred", "scale_weight_norms", "seed", "shuffle_caption", "stop_text_encoder_training",
    "text_encoder_lr", "token_string", "train_batch_size", "train_data_dir", "train_inpainting", "unet_lr", "v2",
    "v_parameterization", "v_pred_like_loss", "vae", "wandb_run_name", "weighted_captions", "weights",
))  # fmt: skip
"""Settings that mean in sd-scripts what they mean in the window, as far as they change a training."""
_CALLED = {
    "max_resolution": "resolution", "optimizer": "optimizer_type", "lora_network_weights": "network_weights",
    "stop_text_encoder_training_pct": "stop_text_encoder_training", "image_folder": "train_data_dir",
}  # fmt: skip
"""What a window calls a setting, or once did."""
_WHOLE = ("train_db.py", "fine_tune.py", "sdxl_train.py")
_ZERO_TOO = frozenset(
    (
        "max_grad_norm",
        "prior_loss_weight",
        "learning_rate",
        "learning_rate_te",
        "learning_rate_te1",
        "learning_rate_te2",
    )
)
"""Numbers of which 0 says something in the windows of whole models; of others it says that they are unset, but for the
shares of blocks, which are texts there."""
_OF_SCRIPT = {
    "fine_tune.py": frozenset(("dataset_repeats", "train_text_encoder")),
    "sdxl_train.py": frozenset((
        "block_lr", "dataset_repeats", "fused_backward_pass", "fused_optimizer_groups", "learning_rate_te1",
        "learning_rate_te2", "train_text_encoder",
    )),
}  # fmt: skip
"""What a window tells one script alone."""
_KEPT_BACK = {
    "sdxl_train.py": frozenset(("stop_text_encoder_training", "learning_rate_te")),
    "train_network.py": frozenset(("stop_text_encoder_training",)),
    "train_textual_inversion.py": frozenset(("stop_text_encoder_training", "caption_dropout_rate")),
}
"""What a window saves and does not tell the script."""
_USUAL = {"bucket_reso_steps": 64, "min_bucket_reso": 256, "max_bucket_reso": 2048}
"""What is saved of buckets where nothing was chosen."""
_KINDS = {
    "Standard": "networks.lora", "Kohya LoCon": "networks.lora", "LoCon": "locon", "LyCORIS/LoCon": "locon",
    "LyCORIS/LoHa": "loha", "LyCORIS/LoKr": "lokr",
    "LyCORIS/Diag-OFT": "diag-oft",
}  # fmt: skip
"""LoRA_type -> the module, or LyCORIS's algo."""
_OF_EACH = ("rank_dropout", "module_dropout", "loraplus_lr_ratio", "loraplus_unet_lr_ratio",
            "loraplus_text_encoder_lr_ratio")  # fmt: skip
_OF_LYCORIS = ("use_tucker", "use_cp", "use_scalar", "dora_wd", "rank_dropout_scale", "train_norm")
_OF_ALGO = {"lokr": ("factor", "decompose_both"), "diag-oft": ("rescaled",)}
_OTHERS = ("flux1_checkbox", "sd3_checkbox", "hunyuan_image_checkbox", "anima_checkbox", "lumina_checkbox")


def is_saved(values: Mapping[str, Any]) -> bool:
    """Whether these are what one of its windows that train saves."""
    return "LoRA_type" in values or {"pretrained_model_name_or_path", "max_resolution"} <= values.keys()


def settings(values: Mapping[str, Any], name: str) -> tuple[str, dict[str, Any]]:
    """(script, its settings), but for what stands in `additional_parameters`. name: of the file.

    Raises ConfigError for a training that has no counterpart.
    """
    if other := next((key for key in _OTHERS if values.get(key)), None):
        raise ConfigError(f"{name}: its model is that of {other}; wanted SD 1.x, SD 2.x or SDXL.")
    is_sdxl, is_finetune = bool(values.get("sdxl") or values.get("sdxl_checkbox")), "dataset_repeats" in values
    if "LoRA_type" in values:
        script = "train_network.py"
    elif "token_string" in values:
        script = "train_textual_inversion.py"
    elif is_sdxl:
        script = "sdxl_train.py"
    else:
        script = "fine_tune.py" if is_finetune else "train_db.py"
    zero_too = _ZERO_TOO if script in _WHOLE else frozenset()
    zero_too |= {key for key in ("down_lr_weight", "mid_lr_weight", "up_lr_weight") if values.get(key) == "0"}
    found = {_CALLED.get(key, key): value for key, value in values.items() if _is_set(value) or key in zero_too}
    told = (_PASSED_ON | set(_CALLED.values()) | _OF_SCRIPT.get(script, frozenset())) - _KEPT_BACK.get(
        script, frozenset()
    )
    kept = {key: value for key, value in found.items() if key in told}
    kept = {key: value for key, value in kept.items() if _number(value) != _USUAL.get(key, math.nan)}
    kept |= _steps(found) | _noise_options(found, script)
    kept["optimizer_args"] = str(found.get("optimizer_args", "")).replace('"', "").split()
    kept["sample_prompts"] = str(found.get("sample_prompts", "")).splitlines()
    kept["xformers"] = found.get("xformers") in (True, "xformers")
    for template in ("object", "style"):
        kept[f"use_{template}_template"] = found.get("template") == f"{template} template"
    if script == "train_network.py":
        kept |= _network(found, name)
    elif is_finetune:
        kept |= _finetuning_options(found, kept)
    elif script == "sdxl_train.py":
        kept["train_text_encoder"] = any((_number(found.get(f"learning_rate_te{n}")) or 0) > 0 for n in (1, 2))
    is_named_so = is_sdxl and script not in _WHOLE
    return f"{'sdxl_' if is_named_so else ''}{script}", kept


def _is_set(value: Any) -> bool:
    return value not in (None, False, "") and _number(value) != 0


def _number(value: Any) -> float | None:
    """The number that a setting is or spells, None for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


_ALMOST_ALL = 0.9999
"""Of the steps: a share is below 1."""


def _steps(found: Mapping[str, Any]) -> dict[str, Any]:
    """Its windows count steps from epochs and images; the warm-up is in percent, unless it is in steps."""
    told: dict[str, Any] = {}
    if not {"max_train_epochs", "max_train_steps", "dataset_config"} & found.keys():
        told["max_train_epochs"] = found.get("epoch", 1)
    steps, percent = _number(found.get("lr_warmup_steps")), _number(found.get("lr_warmup"))
    told["lr_warmup_steps"] = steps or min((percent or 0) / 100, _ALMOST_ALL)
    return told


def _finetuning_options(found: Mapping[str, Any], kept: Mapping[str, Any]) -> dict[str, Any]:
    """The window of fine-tuning: its captions are in a file that it writes, and mirrored images count as two."""
    if "dataset_config" in found:
        return {}
    halves = bool(found.get("flip_aug")) and "max_train_epochs" not in found
    key = "max_train_steps" if "max_train_steps" in found else "max_train_epochs"
    metadata = f"{found.get('train_dir', '')}/{found.get('caption_metadata_filename', 'meta_cap.json')}"
    return {"in_json": metadata} | ({key: math.ceil((_number(kept[key]) or 1) / 2)} if halves else {})


def _noise_options(found: Mapping[str, Any], script: str) -> dict[str, Any]:
    """Its two kinds of noise, of which the window of networks tells one alone, and saves the other's settings, too."""
    plain = ("noise_offset", "noise_offset_random_strength", "adaptive_noise_scale")
    pyramid = ("multires_noise_iterations", "multires_noise_discount")
    told: tuple[str, ...] = (*plain, *pyramid)
    if script == "train_network.py":
        told = pyramid if found.get("noise_offset_type") == "Multires" else plain
    return {key: found.get(key) for key in told}


def _network(found: Mapping[str, Any], name: str) -> dict[str, Any]:
    kind = str(found.get("LoRA_type", "Standard"))
    if kind not in _KINDS:
        raise ConfigError(f"{name}: LoRA_type {kind:.40} has no counterpart; {', '.join(_KINDS)} have.")
    module, of_kind = _KINDS[kind], list(_OF_EACH)
    args: list[str] = []
    if module == "networks.lora":
        of_kind += OF_BLOCKS
    else:
        args = [f"algo={module}", f"preset={found.get('LyCORIS_preset', 'full')}"]
        args += [f"constraint={found['constrain']}"] if module == "diag-oft" and "constrain" in found else []
        of_kind += [*_OF_LYCORIS, *_OF_ALGO.get(module, ())]
        module = "lycoris.kohya"
    if kind != "Standard":
        args += [f"{key}={found.get(key, 0)}" for key in ("conv_dim", "conv_alpha")]
    args += [f"{key}={found[key]}" for key in of_kind if key in found and (key, found[key]) != ("factor", -1)]
    text, unet = (_number(found.get(key)) or 0 for key in ("text_encoder_lr", "unet_lr"))
    return {
        "network_module": module,
        "network_args": args,
        "network_train_unet_only": unet != 0 and text == 0,
        "network_train_text_encoder_only": unet == 0 and text != 0,
    }
