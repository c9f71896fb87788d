"""SimpleTuner: a training's config.json, of which model_type lora is `lora` and full `finetune`.

Names and defaults are those of simpletuner_sdk/server/services/field_registry there; targets and bases those of
helpers/models, optimizers those of helpers/training/optimizer_param.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop import settings
from sfumato.interop.datasets.settings import check_tables
from sfumato.interop.datasets.settings import read_settings as read_data
from sfumato.interop.datasets.simpletuner import sides
from sfumato.interop.settings import ForeignSettings, Recipe

_BASES = {
    "sd1x": {
        "dreamshaper": "Lykon/dreamshaper-8", "1.5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "1.4": "CompVis/stable-diffusion-v1-4",
    },
    "sd2x": {},
    "sdxl": {
        "base-1.0": "stabilityai/stable-diffusion-xl-base-1.0", "base-0.9": "stabilityai/stable-diffusion-xl-base-0.9",
    },
}  # fmt: skip
"""By family and flavour, of which the first is there where none is told."""
OF_DATA = frozenset(("cache_dir_vae", "train_batch_size"))
"""Of data sets, what needs no word."""
_OF_CAPTIONS = ("caption_strategy", "instance_prompt", "only_instance_prompt", "prepend_instance_prompt")
_ALGOS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "diag-oft": "oft"}
_ATTENTION = frozenset(("to_k", "to_q", "to_v", "to_out.0"))
_ADAMW = {"betas": "0.9,0.999", "weight_decay": "0.01", "eps": "1e-6"}
_OPTIMIZERS: Mapping[str, Mapping[str, str]] = {
    "adamw_bf16": _ADAMW, "ao-adamw8bit": _ADAMW, "bnb-adamw": _ADAMW, "bnb-adamw8bit": _ADAMW,
    "bnb-adamw-paged": _ADAMW, "bnb-adamw8bit-paged": _ADAMW, "torch-adamw": {"weight_decay": "0.01"},
    "adamw_schedulefree+aggressive": {"weight_decay": "0.001", "eps": "1e-6"},
    "adamw_schedulefree+no_kahan": {"weight_decay": "0.001", "eps": "1e-6"},
    "torch-adam": {"weight_decay": "0"}, "bnb-adam": {"weight_decay": "0"}, "bnb-adam8bit": {"weight_decay": "0"},
    "optimi-adam": {"betas": "0.9,0.99", "weight_decay": "0", "eps": "1e-6"},
    "optimi-adamw": {"betas": "0.9,0.99", "weight_decay": "0", "eps": "1e-6"},
    "optimi-lion": {"betas": "0.9,0.99", "weight_decay": "0"},
    "prodigy": {"betas": "0.9,0.99", "weight_decay": "0", "use_bias_correction": "False", "d_coef": "1"},
    "muon": {"weight_decay": "0.1"}, "torch-adafactor": {"relative_step": "False"},
}  # fmt: skip
"""Its optimizers that have a counterpart, with its own defaults."""
_NEUTRAL: Mapping[str, Any] = {
    "base_model_precision": "no_change", "text_encoder_1_precision": "no_change",
    "text_encoder_2_precision": "no_change", "huber_c": 0.1, "huber_schedule": "snr", "loss_type": "l2",
    "lora_init_type": "default", "peft_lora_mode": "standard", "ema_update_interval": 1, "masked_loss_probability": 1,
    "noise_offset_probability": 1, "snr_weight": 1, "timestep_bias_strategy": "none", "lr_end": 0,
    "validation_guidance_rescale": 0, "num_validation_images": 1,
}  # fmt: skip
"""Settings without a counterpart, and the value with which they do nothing."""
_IDLE = frozenset((
    "accelerate_config", "aspect_bucket_alignment", "aspect_bucket_rounding", "base_model_default_dtype", "cache_dir",
    "cache_dir_text", "cache_dir_vae", "caption_strategy", "checkpoints_rolling_total_limit", "compress_disk_cache",
    "configs_dir", "data_backend_config", "data_backend_sampling", "dataloader_prefetch", "delete_problematic_images",
    "delete_unwanted_images", "disable_benchmark", "disable_bucket_pruning", "ema_cpu_only", "ema_decay", "ema_device",
    "ema_foreach_disable", "ema_validation", "evaluation_type", "fuse_optimizer", "grad_clip_method",
    "gradient_precision", "hub_model_id", "huber_c", "huber_schedule", "i_know_what_i_am_doing",
    "image_processing_batch_size", "inference_scheduler_timestep_spacing", "instance_prompt", "keep_vae_loaded",
    "local_rank", "logging_dir", "lora_format", "lora_type", "lr_end", "lr_power", "lycoris_config", "max_workers",
    "maximum_image_size", "metadata_update_interval", "minimum_image_size", "model_card_note", "model_card_private",
    "model_card_safe_for_work", "model_family", "model_flavour", "noise_offset", "noise_offset_probability",
    "num_eval_images", "num_machines", "num_processes", "num_train_epochs", "only_instance_prompt",
    "optimizer_offload_gradients", "optimizer_release_gradients", "output_dir", "preserve_data_backend_cache",
    "prepend_instance_prompt", "publishing_config", "push_checkpoints_to_hub", "push_to_hub", "quantize_via",
    "read_batch_size", "report_to", "resolution_type", "resume_from_checkpoint", "same_network", "save_text_encoder",
    "seed_for_each_device", "set_grads_to_none", "skip_file_discovery", "target_downsample_size",
    "text_encoder_batch_size", "tracker_image_layout", "tracker_project_name", "tracker_run_name",
    "training_scheduler_timestep_spacing", "use_gradient_checkpointing", "user_prompt_library", "vae_batch_size",
    "vae_cache_ondemand", "vae_dtype", "vae_enable_slicing", "vae_enable_tiling", "validation_guidance",
    "validation_negative_prompt", "validation_noise_scheduler", "validation_num_inference_steps",
    "validation_on_startup", "validation_prompt_library", "validation_randomize", "validation_resolution",
    "validation_seed", "validation_seed_source", "webhook_config", "write_batch_size",
))  # fmt: skip
"""What changes nothing of what is learned, or belongs to another setting."""
_IDLE_GROUPS = re.compile(
    "(context_parallel|dynamo|flow|fsdp|gradient_checkpointing|group_offload|musubi|offload|ramtorch|sdnq|vae|validation)_"
)
"""How names begin of what changes nothing either: of memory, speed, images meanwhile, or flow matching."""


def convert(asked: ForeignSettings) -> Recipe:
    """The recipe of a config. Raises ConfigError for one that has no counterpart."""
    method = asked.text("model_type", "full")
    if method not in ("lora", "full"):
        raise ConfigError(f"{asked.name}: model_type is {method:.40}; wanted lora or full.")
    if asked.flag("controlnet"):
        raise ConfigError(f"{asked.name}: trains a ControlNet (controlnet), which has no counterpart.")
    recipe = Recipe("lora" if method == "lora" else "finetune")
    _base_options(asked, recipe)
    if method == "lora" and asked.text("lora_type", "standard") == "lycoris":
        _lycoris(asked, recipe)
    elif method == "lora":
        _lora(asked, recipe)
    rate = asked.number("learning_rate")
    recipe.say("learning_rate", rate, 4e-7)
    if asked.flag("train_text_encoder"):
        recipe.say("train_text_encoder", True)
        recipe.say("text_learning_rate", asked.number("text_encoder_lr", rate), 4e-7)
    _steps(asked, recipe)
    _optimizer(asked, recipe)
    _loss(asked, recipe)
    _samples_and_logging(asked, recipe)
    asked.taken |= {key for key, neutral in _NEUTRAL.items() if asked.values.get(key) == neutral}
    recipe.notes += asked.left(_IDLE | {key for key in asked.values if _IDLE_GROUPS.match(key)}, recipe.program)
    return recipe


def _base_options(asked: ForeignSettings, recipe: Recipe) -> None:
    family, flavour = asked.text("model_family"), asked.text("model_flavour")
    if family not in _BASES:
        raise ConfigError(f"{asked.name}: model_family is {family!s:.40}; wanted {', '.join(_BASES)}.")
    known = _BASES[family]
    usual = known.get(flavour) if flavour else next(iter(known.values()), None)
    base = asked.path("pretrained_model_name_or_path") or usual
    if base is None:
        raise ConfigError(
            f"{asked.name}: its model_flavour {flavour or 'is unset and'} names no base that is known; give it a "
            "pretrained_model_name_or_path."
        )
    recipe.say("base", base)
    recipe.say("vae", asked.path("pretrained_vae_model_name_or_path"))
    kind = asked.text("prediction_type")
    if kind not in (None, "epsilon", "v_prediction"):
        raise ConfigError(f"{asked.name}: prediction_type is {kind:.40}; wanted epsilon or v_prediction.")
    recipe.say("prediction_type", kind)
    recipe.say("zero_terminal_snr", asked.flag("rescale_betas_zero_snr") or None)
    settings.precision(asked, recipe)
    told = [asked.flag(key) for key in ("gradient_checkpointing", "use_gradient_checkpointing") if key in asked.values]
    recipe.say("gradient_checkpointing", any(told) if told else None, True)
    recipe.say("attention", "xformers" if asked.text("attention_mechanism") == "xformers" else None)
    if recipe.program == "lora" and (kind := asked.text("base_model_precision")) not in (None, "no_change"):
        settings.quantize(recipe, "base_model_precision", kind)


def _lora(asked: ForeignSettings, recipe: Recipe) -> None:
    rank = asked.whole("lora_rank")
    recipe.say("rank", rank, 16)
    recipe.say("alpha", asked.number("lora_alpha"), float(recipe.values["rank"]))
    recipe.say("dropout", asked.number("lora_dropout"), 0.1)
    recipe.say("targets", None, "attention")
    targets = asked.several("peft_lora_target_modules")
    if targets and set(targets) != _ATTENTION:
        recipe.notes.append(
            f"peft_lora_target_modules = {', '.join(targets):.60}: --targets takes a regular expression of layers"
        )
    if asked.flag("use_dora"):
        recipe.say("dora", True)
        recipe.notes.append(f"use_dora: {settings.LENGTHS}")
    recipe.say("init_from", asked.path("init_lora"))


def _lycoris(asked: ForeignSettings, recipe: Recipe) -> None:
    given = asked.text("lycoris_config", "config/lycoris_config.json") or ""
    file = asked.find(given)
    values = None if file is None else read_data(file)
    if not isinstance(values, dict):
        raise ConfigError(f"{asked.name}: its lycoris_config {given} is neither beside it nor in this folder.")
    own = ForeignSettings(given, asked.script, values, asked.folder)
    algo = (own.text("algo", "lora") or "").lower()
    if algo not in _ALGOS:
        raise ConfigError(f"{given}: LyCORIS's {algo:.40} has no counterpart; {', '.join(_ALGOS)} have.")
    recipe.say("algo", _ALGOS[algo])
    rank, alpha = own.whole("linear_dim"), own.number("linear_alpha")
    recipe.say("rank", settings.WHOLE if algo == "lokr" and own.flag("full_matrix") else rank, 4)
    recipe.say("alpha", alpha, 1.0)
    factor = own.whole("factor", -1) or -1
    recipe.say("factor", factor if algo == "lokr" and factor > 0 else None)
    if own.flag("dora_wd"):
        recipe.say("dora", True)
        recipe.notes.append(f"dora_wd: {settings.LENGTHS}")
    for option in ("dropout", "rank_dropout", "module_dropout"):
        recipe.say(option, own.number(option) or None)
    preset = own.part("apply_preset")
    targets = set(preset.several("target_module"))
    of = {"Attention": "attention", "Attention FeedForward": "attention+mlp"}.get(" ".join(sorted(targets)))
    recipe.say("targets", None, of or ("everything" if not targets else "transformers"))
    if targets and of is None:
        recipe.notes.append(f"target_module = {', '.join(sorted(targets)):.60}: --targets takes a regular expression")
    if preset.get("module_algo_map"):
        recipe.notes.append("module_algo_map: all layers have the factor of the whole")
    if not targets:
        recipe.say("conv_rank", own.whole("conv_dim"), rank or 4)
        recipe.say("conv_alpha", own.number("conv_alpha"), alpha or 1.0)
    settings.without_scale(recipe)
    own.taken |= {"multiplier", "bypass_mode"}
    asked.taken |= {"lora_rank", "lora_alpha", "lora_dropout", "use_dora"}  # at which it does not look beside these
    recipe.notes += own.left((), recipe.program)


def _steps(asked: ForeignSettings, recipe: Recipe) -> None:
    steps, epochs = asked.whole("max_train_steps") or 0, asked.whole("num_train_epochs")
    if steps > 0:
        recipe.say("steps", steps)
    else:
        recipe.say("epochs", epochs, 1)
    recipe.say("batch", asked.whole("train_batch_size"), 4)
    recipe.say("accumulate", asked.whole("gradient_accumulation_steps"))
    recipe.say("seed", asked.whole("seed"))
    recipe.say("resolution", max(sides(data_backends(asked)), default=None), *sides([_of_images(asked)]))


def data_backends(asked: ForeignSettings) -> list[dict[str, Any]]:
    """The data sets of the file that its config names, none where it names none. What it says itself counts where they
    say nothing. Raises ConfigError for a file that is not here."""
    given = asked.text("data_backend_config")
    if given is None:
        return []
    file = asked.find(given)
    if file is None:
        raise ConfigError(f"{asked.name}: its data_backend_config {given} is neither beside it nor in this folder.")
    return [{**_of_images(asked), **own} for own in check_tables(read_data(file), file.name)]


def _of_images(asked: ForeignSettings) -> dict[str, Any]:
    """What its config says of all data sets, or the default."""
    said = {key: asked.values[key] for key in _OF_CAPTIONS if key in asked.values}
    sizes = {"resolution": asked.get("resolution", 1024), "resolution_type": asked.get("resolution_type", "pixel_area")}
    return said | sizes


def _optimizer(asked: ForeignSettings, recipe: Recipe) -> None:
    name = asked.text("optimizer", "adamw_bf16") or ""
    told = dict(pair.split("=", 1) for pair in (asked.text("optimizer_config") or "").split(",") if "=" in pair)
    one, two = asked.number("optimizer_beta1"), asked.number("optimizer_beta2")
    if one is not None and two is not None:
        told["betas"] = f"{one:g},{two:g}"
    plain = "ProdigyPlusScheduleFree" if name == "prodigy" else re.sub(r"^(ao|bnb|optimi|torch)-|\+.*$", "", name)
    plain = re.sub("_bf16$|-paged$", "", plain)
    settings.optimizer(asked, recipe, plain, told, _OPTIMIZERS.get(name, {}))
    asked.taken |= {"adam_beta1", "adam_beta2", "adam_epsilon", "adam_weight_decay"}  # at which it does not look
    limit = asked.number("max_grad_norm")
    if asked.text("grad_clip_method", "value") == "norm":
        recipe.say("clip", limit, 2.0)
    else:
        recipe.say("clip", None, 0.0)
        if limit:
            recipe.notes.append(f"max_grad_norm = {limit:g}: of each number of a gradient there; --clip is of its norm")
    schedule, warmup = asked.text("lr_scheduler", "constant_with_warmup") or "", asked.whole("lr_warmup_steps", 0) or 0
    ours = {"constant_with_warmup": "constant", "polynomial": "linear", "cosine_with_warmup": "cosine"}.get(
        schedule, schedule
    )
    if schedule in ("sine", "cosine", "cosine_with_restarts", "cosine_with_warmup"):
        recipe.notes.append(f"lr_scheduler = {schedule}: its waves are lr_warmup_steps long; here it is one for a run")
        ours, warmup = "cosine", 0
    elif ours not in ("constant", "linear"):
        recipe.notes.append(f"lr_scheduler = {schedule:.40}: has no counterpart; constant takes its place")
        ours = "constant"
    if schedule == "constant":
        warmup = 0  # which it passes over
    power = asked.number("lr_power", 0.8)
    if schedule == "polynomial" and power != 1:
        recipe.notes.append(f"lr_scheduler = polynomial with lr_power {power:g}: a straight line, whose power is 1")
    recipe.say("schedule", ours if asked.text("lr_scheduler") else None, ours)
    recipe.say("warmup", settings.limit_warmup(recipe, "lr_warmup_steps", warmup) or None)


def _loss(asked: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("min_snr", asked.number("snr_gamma"), 0.0)
    if asked.flag("use_soft_min_snr"):
        recipe.notes.append("use_soft_min_snr: the weights of --min-snr have a corner")
    loss = asked.text("loss_type", "l2")
    if loss == "huber" and asked.text("huber_schedule", "snr") == "snr":
        recipe.say("huber", asked.number("huber_c", 0.1))
    elif loss != "l2":
        recipe.notes.append(f"loss_type = {loss}: has no counterpart; the errors are squared")
    if asked.flag("offset_noise"):
        recipe.say("noise_offset", asked.number("noise_offset", 0.1))
        share = asked.number("noise_offset_probability", 0.25)
        if share != 1:
            recipe.notes.append(f"noise_offset_probability = {share:g}: the noise of each sample is offset")
    recipe.say("input_perturbation", asked.number("input_perturbation") or None)
    recipe.say("caption_dropout", asked.number("caption_dropout_probability"), 0.1)
    if asked.flag("use_ema"):
        recipe.say("ema", asked.number("ema_decay", 0.995))
        if recipe.program == "finetune":
            recipe.say("ema_on_cpu", asked.text("ema_device", "cpu") == "cpu" or None)


def _samples_and_logging(asked: ForeignSettings, recipe: Recipe) -> None:
    project, name = asked.text("tracker_project_name", "simpletuner") or "simpletuner", asked.text("tracker_run_name")
    settings.trackers(recipe, asked.text("report_to"), project, name)
    if asked.flag("push_to_hub"):
        recipe.say("push_to_hub", asked.text("hub_model_id"))
    recipe.say("keep", asked.whole("checkpoints_total_limit") or None)
    recipe.say("checkpoint_every", asked.whole("checkpoint_step_interval", asked.whole("checkpointing_steps")))
    recipe.say("measure_every", asked.whole("eval_steps_interval"))
    every = asked.whole("validation_step_interval", asked.whole("validation_steps"))
    recipe.say("sample_every", 0 if asked.flag("validation_disable") else every)
    flags = {"n": "validation_negative_prompt", "s": "validation_num_inference_steps", "l": "validation_guidance"}
    said = {flag: asked.text(key) for flag, key in flags.items()} | {"d": asked.text("validation_seed")}
    size = re.fullmatch(r"(\d{2,5})(?:x(\d{2,5}))?(?:,.*)?", asked.text("validation_resolution") or "")
    if size:
        said |= {"w": size[1], "h": size[2] or size[1]}
    told = "".join(f" --{flag} {value}" for flag, value in said.items() if value is not None)
    prompts = [prompt for prompt in (asked.text("validation_prompt"), *_library(asked)) if prompt]
    recipe.say("sample_prompts", [f"{prompt}{told}" for prompt in prompts] or None)


def _library(asked: ForeignSettings) -> list[str]:
    """The prompts of its user_prompt_library, by their names."""
    given = asked.text("user_prompt_library")
    file = None if given is None else asked.find(given)
    found = None if file is None else read_data(file)
    each = found.values() if isinstance(found, dict) else ()
    return [str(value.get("prompt") or "") if isinstance(value, dict) else str(value) for value in each]
