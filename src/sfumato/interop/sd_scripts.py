"""sd-scripts (kohya): train_network.py is `lora`, train_db.py `dreambooth`, fine_tune.py and sdxl_train.py `finetune`,
train_textual_inversion.py its namesake.

Names, defaults and meanings are those of library/train_util.py, the scripts and networks/lora.py there.
"""

from __future__ import annotations

from sfumato.errors import ConfigError
from sfumato.interop import settings
from sfumato.interop.blocks import OF_PATTERNS, convert_block_settings
from sfumato.interop.settings import ForeignSettings, Recipe

DATA = frozenset((
    "alpha_mask", "bucket_no_upscale", "bucket_reso_steps", "cache_info", "caption_dropout_every_n_epochs",
    "caption_dropout_rate", "caption_extension", "caption_extention", "caption_prefix", "caption_separator",
    "caption_suffix", "caption_tag_dropout_rate", "class_tokens", "color_aug", "conditioning_data_dir",
    "dataset_config", "dataset_repeats", "debug_dataset", "enable_bucket", "enable_wildcard", "face_crop_aug_range",
    "flip_aug", "in_json", "keep_tokens", "keep_tokens_separator", "masked_loss", "max_bucket_reso", "max_resolution",
    "min_bucket_reso", "prior_loss_weight", "random_crop", "reg_data_dir", "secondary_separator", "shuffle_caption",
    "token_warmup_min", "token_warmup_step", "train_data_dir", "validation_seed", "weighted_captions",
))  # fmt: skip
"""What `sfumato.interop.datasets` converts, or has a note on."""
OF_SUBSETS = DATA - {
    "dataset_config", "dataset_repeats", "in_json", "max_resolution", "reg_data_dir", "train_data_dir"
}  # fmt: skip
"""What holds for those subsets of a config of data sets that say nothing of it."""
_IDLE = frozenset((
    "async_upload", "cache_latents_to_disk", "cache_text_encoder_outputs_to_disk", "config_file",
    "console_log_file", "console_log_level", "console_log_simple", "ddp_gradient_as_bucket_view",
    "ddp_static_graph", "ddp_timeout", "disable_mmap_load_safetensors", "dynamo_backend", "epoch", "huber_c",
    "huber_schedule", "huggingface_path_in_repo", "huggingface_repo_type", "huggingface_repo_visibility",
    "huggingface_token", "log_config", "log_prefix", "log_tracker_config", "logging_dir", "logit_mean", "logit_std",
    "lowram", "lr_scheduler_power", "metadata_title", "mode_scale", "multires_noise_discount",
    "network_train_text_encoder_only", "noise_offset_type", "output_config", "output_dir", "resume", "sample_at_first",
    "save_last_n_epochs_state", "save_state", "save_state_on_train_end", "save_state_to_huggingface", "sdxl",
    "skip_cache_check", "text_encoder_batch_size", "tokenizer_cache_dir", "wandb_api_key", "weighting_scheme",
))  # fmt: skip
"""What changes nothing of what is learned, or belongs to another setting."""
_PROGRAMS = {
    "train_network.py": "lora", "train_db.py": "dreambooth", "fine_tune.py": "finetune", "train.py": "finetune",
}  # fmt: skip
"""By script, without the sdxl_ before it."""
_PROJECTS = {
    "lora": "network_train", "dreambooth": "dreambooth", "finetune": "finetuning",
    "textual_inversion": "textual_inversion",
}  # fmt: skip
"""Of its scripts at W&B, where log_tracker_name names none."""
_RATE = 2e-6
_LYCORIS = {"lora": "lora", "locon": "lora", "loha": "loha", "lokr": "lokr", "diag-oft": "oft"}
_OFF = ("0", "0.0", "false", "none", "")
"""Values of arguments that ask for nothing."""
_PRESETS = {"full": "everything", "attn-mlp": "transformers", "attn-only": "attention"}


def convert(asked: ForeignSettings) -> Recipe:
    """The recipe of one of its trainings. Raises ConfigError for one that has no counterpart."""
    is_sdxl = asked.script.startswith("sdxl_")
    script = asked.script.removeprefix("sdxl_")
    program = _PROGRAMS.get(script, "textual_inversion")
    recipe = Recipe(program)
    _base_options(asked, recipe, is_sdxl=is_sdxl)
    _steps(asked, recipe)
    if program == "lora":
        _network(asked, recipe, is_sdxl=is_sdxl)
    else:
        {"dreambooth": _subject, "finetune": _whole, "textual_inversion": _word}[program](asked, recipe)
    optimizer = "adamw8bit" if asked.flag("use_8bit_adam") else "lion" if asked.flag("use_lion_optimizer") else "adamw"
    args = asked.pairs("optimizer_args")
    settings.optimizer(asked, recipe, asked.text("optimizer_type", optimizer) or optimizer, args, {})
    settings.schedule(asked, recipe, cycles="lr_scheduler_num_cycles", power="lr_scheduler_power", warmup=0)
    _loss(asked, recipe)
    _samples_and_logging(asked, recipe)
    recipe.notes += asked.left(DATA | _IDLE, program)
    return recipe


def _base_options(asked: ForeignSettings, recipe: Recipe, *, is_sdxl: bool) -> None:
    settings.base_model(asked, recipe)
    recipe.say("vae", asked.path("vae"))
    if asked.flag("v_parameterization"):
        recipe.say("prediction_type", "v_prediction")
    recipe.say("zero_terminal_snr", asked.flag("zero_terminal_snr") or None)
    skip = asked.whole("clip_skip")
    if skip and not is_sdxl:  # whose scripts do not look at it
        recipe.say("clip_skip", skip - 1 or None)
    length = asked.whole("max_token_length")
    if length in (150, 225):
        recipe.say("max_tokens", length)
    settings.precision(asked, recipe)
    recipe.say("gradient_checkpointing", asked.flag("gradient_checkpointing") or None)
    if recipe.program in ("lora", "textual_inversion") and asked.flag("fp8_base"):
        settings.quantize(recipe, "fp8_base", "fp8")
    recipe.say("attention", "xformers" if asked.flag("xformers") else None)
    kind = {"float": "fp32", "fp16": "fp16", "bf16": "bf16"}.get(asked.text("save_precision") or "")
    recipe.say("save_precision", kind)


def _steps(asked: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("seed", asked.whole("seed"))
    epochs, steps = asked.whole("max_train_epochs"), asked.whole("max_train_steps")
    recipe.say("epochs", epochs)
    if epochs is None:
        recipe.say("steps", steps, 1600)
    recipe.say("batch", asked.whole("train_batch_size"), 1)
    recipe.say("accumulate", asked.whole("gradient_accumulation_steps"))
    settings.resolution(asked, recipe, None)


def _network(asked: ForeignSettings, recipe: Recipe, *, is_sdxl: bool) -> None:
    """networks.lora and LyCORIS's lycoris.kohya."""
    if asked.flag("network_train_text_encoder_only"):
        raise ConfigError(f"{asked.name}: trains no U-Net (network_train_text_encoder_only), which `lora` always does.")
    args = asked.pairs("network_args")
    module = asked.text("network_module", "networks.lora")
    if module == "lycoris.kohya":
        _lycoris(asked, recipe, args)
    elif module != "networks.lora":
        raise ConfigError(f"{asked.name}: {module} has no counterpart; networks.lora and lycoris.kohya have.")
    else:
        ratio = args.pop("loraplus_lr_ratio", None) or args.pop("loraplus_unet_lr_ratio", None)
        recipe.say("loraplus_ratio", None if ratio is None else asked.as_number("loraplus_lr_ratio", ratio))
    for option in ("rank_dropout", "module_dropout"):
        recipe.say(option, asked.as_number(option, args.pop(option)) if option in args else None)
    recipe.say("rank", asked.whole("network_dim"), 4)
    alpha = asked.number("network_alpha")
    recipe.say("alpha", recipe.values["rank"] if alpha == 0 else alpha, 1.0)  # 0 is the rank there
    if module == "networks.lora":
        convert_block_settings(asked, recipe, args, is_sdxl=is_sdxl)
        recipe.notes += [
            f"network_args {key}={args.pop(key)}: of no effect there on SD and SDXL; --rank-of and --rate-of are alike"
            for key in OF_PATTERNS
            if key in args
        ]
    recipe.say("dropout", asked.number("network_dropout"))
    recipe.say("max_norm", asked.number("scale_weight_norms"))
    settings.without_scale(recipe)
    recipe.say("init_from", asked.path("network_weights"))
    rate = asked.number("learning_rate")
    recipe.say("learning_rate", asked.number("unet_lr", rate), _RATE)
    if asked.flag("network_train_unet_only"):
        asked.taken.add("text_encoder_lr")
    else:
        _text_encoders(asked, recipe, rate)
    recipe.notes += [
        f"network_args {key}={value}: has no counterpart here and is left out"
        for key, value in args.items()
        if value.lower() not in _OFF
    ]


def _text_encoders(asked: ForeignSettings, recipe: Recipe, rate: float | None) -> None:
    """Their rate, where that is not 0; sd-scripts trains them unless it is told not to."""
    given = asked.several("text_encoder_lr")
    rates = {asked.as_number("text_encoder_lr", each) for each in given} | {
        each for each in (asked.number("text_encoder_lr1"), asked.number("text_encoder_lr2")) if each is not None
    }
    if rates == {0.0}:
        return
    recipe.say("train_text_encoder", None, True)
    recipe.say("text_learning_rate", max(rates, default=rate), _RATE)
    if len(rates) > 1:
        recipe.notes.append(
            f"text_encoder_lr = {' '.join(given)}: both text encoders have one rate, the highest of these"
        )


def _lycoris(asked: ForeignSettings, recipe: Recipe, args: dict[str, str]) -> None:
    algo = args.pop("algo", "lora").lower()
    if algo not in _LYCORIS:
        raise ConfigError(f"{asked.name}: LyCORIS's {algo} has no counterpart; {', '.join(_LYCORIS)} have.")
    recipe.say("algo", _LYCORIS[algo])
    preset = args.pop("preset", "full")
    if preset not in _PRESETS:
        recipe.notes.append(f"network_args preset={preset}: has no counterpart here; targets = everything")
    targets = _PRESETS.get(preset, "everything")
    recipe.say("targets", None, targets)
    dim, alpha = args.pop("conv_dim", None), args.pop("conv_alpha", None)
    if targets == "everything":
        recipe.say("conv_rank", asked.as_whole("conv_dim", dim) if dim else None, asked.whole("network_dim", 4))
        given = (asked.as_number("conv_alpha", alpha) or float(recipe.values["conv_rank"])) if alpha else None
        recipe.say("conv_alpha", given, asked.number("network_alpha", 1.0))
    if args.pop("dora_wd", "false").lower() == "true":
        recipe.say("dora", True)
        if args.pop("wd_on_output", "true").lower() == "true":
            recipe.notes.append(f"network_args dora_wd=True: {settings.LENGTHS}")
    factor = asked.as_whole("factor", args.pop("factor", "-1"))
    recipe.say("factor", factor if algo == "lokr" and factor > 0 else None)
    if asked.as_number("rank_dropout", args.get("rank_dropout", 0)):
        recipe.notes.append(
            f"network_args rank_dropout={args['rank_dropout']}: LyCORIS drops rows and scales nothing up; here the "
            "rest is scaled up, and of a LoRA ranks are dropped"
        )


def _subject(asked: ForeignSettings, recipe: Recipe) -> None:
    rate = asked.number("learning_rate")
    recipe.say("method", None, "full")
    recipe.say("prior", None, "pictures" if asked.text("reg_data_dir") else "none")
    stop = asked.whole("stop_text_encoder_training")
    if stop is not None and stop > 0:
        recipe.notes.append(f"stop_text_encoder_training = {stop}: the text encoder learns to the end, or not at all")
    recipe.say("learning_rate", rate, _RATE)
    of_text = asked.number("learning_rate_te", rate)
    if (stop is None or stop > 0) and of_text != 0:
        recipe.say("train_text_encoder", None, True)
        recipe.say("text_learning_rate", of_text, _RATE)
    recipe.ask = ("class_name",)
    recipe.notes.append('--class-name is the word for what the subject is, such as "dog" of captions with "sks dog"')


def _whole(asked: ForeignSettings, recipe: Recipe) -> None:
    """fine_tune.py and sdxl_train.py. Raises ConfigError for rates that differ within the U-Net, or leave it out."""
    rate = asked.number("learning_rate")
    if asked.text("block_lr"):
        raise ConfigError(f"{asked.name}: block_lr gives each block of the U-Net a rate of its own, and here is one.")
    if rate == 0:
        raise ConfigError(f"{asked.name}: its U-Net does not learn (learning_rate 0), which `finetune` always does.")
    recipe.say("learning_rate", rate, _RATE)
    keys = ("learning_rate_te1", "learning_rate_te2") if asked.script.startswith("sdxl_") else ("learning_rate_te",)
    given = {key: asked.number(key, rate) for key in keys}
    rates = {key: _RATE if each is None else each for key, each in given.items()}
    if asked.flag("train_text_encoder") and any(rates.values()):
        recipe.say("train_text_encoder", True)
        is_told = any(each is not None for each in given.values())
        recipe.say("text_learning_rate", max(rates.values()) if is_told else None, _RATE)
        if len(set(rates.values())) > 1:
            told = ", ".join(f"{key} = {each:g}" for key, each in rates.items())
            recipe.notes.append(f"{told}: both text encoders learn, at one rate, the highest of these")
    recipe.say("fused", asked.flag("fused_backward_pass") or None)
    if "fused" in recipe.told and asked.number("max_grad_norm", 1.0):
        recipe.notes.append(
            "fused_backward_pass: clips the gradient of each weight there; --clip is of the norm of all"
        )


def _word(asked: ForeignSettings, recipe: Recipe) -> None:
    placeholder = asked.text("token_string")
    if placeholder is None:
        raise ConfigError(f"{asked.name}: no token_string, the new word; give it one.")
    recipe.say("placeholder", [placeholder.lower()])
    words = asked.text("init_word")
    recipe.say("initial_words", None if words is None else [words])
    recipe.say("vectors", asked.whole("num_vectors_per_token"), 1)
    for key, templates in (("use_object_template", "object"), ("use_style_template", "style")):
        if asked.flag(key):
            recipe.say("templates", templates)
    if "templates" not in recipe.told:
        recipe.say("caption", None, "{caption}")  # the files' own captions, which hold the word
    recipe.say("keep_scale", None, False)
    recipe.say("learning_rate", asked.number("learning_rate"), _RATE)


def _loss(asked: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("clip", asked.number("max_grad_norm"))
    gamma, is_debiased = asked.number("min_snr_gamma"), asked.flag("debiased_estimation_loss")
    if gamma and is_debiased:
        recipe.notes.append("debiased_estimation_loss beside min_snr_gamma: timesteps are weighed once, by the latter")
    recipe.say("debiased", True if is_debiased and not gamma else None)
    recipe.say("min_snr", gamma, None if is_debiased else 0.0)
    recipe.say("noise_offset", asked.number("noise_offset"))
    if asked.whole("multires_noise_iterations"):
        recipe.say("pyramid_noise", asked.number("multires_noise_discount", 0.3))
    recipe.say("input_perturbation", asked.number("ip_noise_gamma"))
    recipe.say("min_timestep", asked.whole("min_timestep"))
    recipe.say("max_timestep", asked.whole("max_timestep"))
    loss = asked.text("loss_type", "l2")
    if loss == "huber" and asked.text("huber_schedule", "snr") == "snr":
        recipe.say("huber", asked.number("huber_c", 0.1))
    elif loss != "l2":
        recipe.notes.append(f"loss_type = {loss}: has no counterpart; the errors are squared")
    scale = asked.number("huber_scale", 1.0)
    if "huber" in recipe.told and scale != 1:
        recipe.notes.append(f"huber_scale = {scale:g}: has no counterpart here and is left out")


def _samples_and_logging(asked: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("name", asked.text("output_name"))
    recipe.say("author", asked.text("metadata_author"))
    recipe.say("license", asked.text("metadata_license"))
    recipe.say("push_to_hub", asked.text("huggingface_repo_id"))
    recipe.say("sample_every", asked.whole("sample_every_n_steps"))
    recipe.say("measure_every", asked.whole("validate_every_n_steps"))
    recipe.say("validation_split", asked.number("validation_split") or None)
    if recipe.program not in ("dreambooth", "finetune"):
        recipe.say("save_every", asked.whole("save_every_n_steps"))
    trackers = asked.text("log_with") or ("tensorboard" if asked.text("logging_dir") else None)
    project = asked.text("log_tracker_name") or _PROJECTS[recipe.program]
    settings.trackers(recipe, trackers, project, asked.text("wandb_run_name"))
    settings.sample_prompts(asked, recipe, "sample_prompts")
