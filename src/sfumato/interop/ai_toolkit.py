"""ai-toolkit: a training of its config, of which one with a network is `lora`, one with a new word alone
`textual_inversion`, any other `finetune`.

Names and defaults are those of toolkit/config_modules.py there; targets are those of toolkit/lora_special.py and
toolkit/lycoris_special.py, optimizers and schedules those of toolkit/optimizer.py and toolkit/scheduler.py.

ai-toolkit's two sliders: `slider`, with targets, and its window's `concept_slider`, with one concept and its images.

Names and defaults are those of SliderConfig and SliderTargetConfig in toolkit/config_modules.py and of
extensions_built_in/concept_slider there.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop import settings
from sfumato.interop.settings import ForeignSettings, Recipe

SLIDER_KINDS = frozenset(("slider", "concept_slider"))
"""Types of its processes that train a slider."""
_STRENGTH = 3.0
"""Of a concept_slider that says none."""
_SLIDER_IDLE = frozenset(("batch_full_slide", "low_ram", "resolutions"))


def slider_ends(asked: ForeignSettings, recipe: Recipe) -> None:
    """What the slider moves, and between which ends. Raises ConfigError for one without ends."""
    if asked.text("type") == "concept_slider":
        _of_one(asked.part("slider"), recipe)
    else:
        _of_targets(asked, recipe)
    if not any(recipe.told.get("more", [])) and not any(recipe.told.get("less", [])):
        raise ConfigError(f"{asked.name}: slider: neither a positive nor a negative prompt is in it; write them.")


def leave_captions(recipe: Recipe) -> None:
    """Take back what is of captions and of text encoders, which a slider does not learn from or train."""
    for option in ("caption_dropout", "train_text_encoder", "text_learning_rate"):
        recipe.usual.pop(option, None)
        if recipe.told.pop(option, None):
            recipe.notes.append(f"{option}: `slider` has the concept as every caption, and trains the U-Net alone")


def _of_one(slider: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("concept", [slider.text("target_class") or ""])
    recipe.say("more", [slider.text("positive_prompt") or ""])
    recipe.say("less", [slider.text("negative_prompt") or ""])
    recipe.say("strength", slider.number("guidance_strength"), _STRENGTH)
    if anchor := slider.text("anchor_class"):
        recipe.say("prior_prompts", [anchor])
        recipe.say("prior_weight", slider.number("anchor_strength", 1.0))
    recipe.notes.append(
        "concept_slider: there what is to be predicted gets the mean and deviation of the base's prediction; here it "
        "stays as it is, and a lower --strength keeps contrasts"
    )


def _of_targets(asked: ForeignSettings, recipe: Recipe) -> None:
    slider = asked.part("slider")
    targets = _parts(slider, "targets")
    recipe.say("concept", [str(each.get("target_class") or "") for each in targets])
    recipe.say("more", [str(each.get("positive") or "") for each in targets])
    recipe.say("less", [str(each.get("negative") or "") for each in targets])
    for key, usual in (("weight", 1), ("multiplier", 1), ("shuffle", False)):
        if any(each.get(key, usual) != usual for each in targets):
            recipe.notes.append(f"{key} of its targets: has no counterpart; all count alike, as they are written")
    anchors = _parts(slider, "anchors")
    recipe.say("prior_prompts", [str(each["prompt"]) for each in anchors if each.get("prompt")] or None)
    if any(each.get("neg_prompt") or each.get("multiplier", 1) != 1 for each in anchors):
        recipe.notes.append("anchors: their neg_prompt and multiplier have no counterpart; --prior-weight is of all")
    sizes = [each for each in slider.get("resolutions", []) if isinstance(each, list) and len(each) == 2]
    if sizes:
        sides = [slider.as_whole("resolutions", side) for side in sizes[0]]
        recipe.say("resolution", round(math.sqrt(sides[0] * sides[1])))
        if len(sizes) > 1 or sides[0] != sides[1]:
            recipe.notes.append(f"resolutions = {sizes}: images are squares with as many pixels as the first")
    slider.taken |= _SLIDER_IDLE
    asked.part("train").values.pop("max_denoising_steps", None)  # of drawing what it learns on


def _parts(slider: ForeignSettings, key: str) -> list[dict[str, Any]]:
    found = slider.get(key, [])
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


KINDS = SLIDER_KINDS.union(("sd_trainer", "ui_trainer", "diffusion_trainer", "textual_inversion_trainer"))
"""Types of its processes that train."""
OF_DATA = frozenset(("batch_size", "buckets", "cache_text_embeddings", "num_workers", "prefetch_factor", "resolution"))
"""What a recipe says of data sets, or what needs no word."""
_FAMILIES = ("sd1", "sd15", "sd2", "sdxl")
"""Its arch of bases that have a counterpart; its window calls SD 1.5 sd15."""
_OTHERS = ("is_flux", "is_v3", "is_pixart", "is_pixart_sigma", "is_auraflow", "is_lumina2", "is_ssd", "is_vega")
_FORMATS = {
    "fp32": "fp32", "float32": "fp32", "float": "fp32", "fp16": "fp16", "float16": "fp16", "bf16": "bf16",
    "bfloat16": "bf16",
}  # fmt: skip
_RESNETS = r"attentions|time_emb_proj|conv_shortcut"
"""Of a `locon`, or with a `conv` of 0, without convolutions of 3 x 3."""
_RATE = 1e-6
_NEUTRAL: Mapping[str, Any] = {
    # of train
    "train_unet": True, "train_refiner": True, "content_or_style": "balanced",
    "switch_boundary_every": 1, "loss_type": "mse", "loss_target": "noise", "noise_multiplier": 1,
    "target_noise_multiplier": 1, "img_multiplier": 1, "noisy_latent_multiplier": 1, "latent_multiplier": 1,
    "num_train_timesteps": 1000, "max_negative_prompts": 1, "optimal_noise_pairing_samples": 1, "pred_scaler": 1,
    "cfg_scale": 1, "attention_backend": "native", "random_noise_multiplier": 0, "random_noise_shift": 0,
    "prompt_saturation_chance": 0, "weight_jitter": 0,
    # of ema_config
    "param_multiplier": 1,
    # of network
    "lokr_factor": -1,
    # of model
    "use_text_encoder_1": True, "use_text_encoder_2": True, "assistant_lora_strength": 1,
    # of sample
    "network_multiplier": 1, "guidance_rescale": 0,
}  # fmt: skip
"""Settings without a counterpart, and the value with which they do nothing to SD 1.x, 2.x and SDXL."""
_OF_FLOWS = ("sigmoid", "linear", "weighted", "shift", "lumina2_shift", "flux_shift", "lognorm_blend")
"""Its timestep_type of flow matching, which do nothing with ddpm."""
_IDLE = frozenset((
    # of the process
    "datasets", "log_dir", "performance_log_every", "sqlite_db_path", "trigger_word", "training_folder", "type",
    # of train
    "adapter_lr", "audio_loss_multiplier", "bypass_guidance_embedding", "cache_text_embeddings",
    "diff_output_preservation_class", "diff_output_preservation_multiplier", "ema_decay", "embedding_lr",
    "force_first_sample", "linear_timesteps", "linear_timesteps2", "noise_scheduler", "refiner_lr", "reg_weight", "sdp",
    "skip_first_sample", "text_encoder_lr", "unet_lr", "unload_text_encoder",
    # of network
    "alpha", "conv_alpha", "linear", "linear_alpha", "lokr_full_rank", "old_lokr_format", "rank",
    "split_multistage_loras", "transformer_only",
    # of model
    "arch", "attn_masking", "block_compile", "compile", "is_v2", "is_xl", "layer_offloading",
    "layer_offloading_text_encoder_percent", "layer_offloading_transformer_percent", "low_vram", "model_kwargs",
    "qtype", "qtype_te",
    # of save and logging
    "hf_private", "hf_repo_id", "log_every", "project_name", "run_name", "save_format", "use_ui_logger", "verbose",
    # of sample
    "ext", "format", "fps", "num_frames", "sample_start_step", "sampler",
))  # fmt: skip
"""What changes nothing of what is learned, or belongs to another setting."""
_FLAGS = {
    "n": "neg", "w": "width", "h": "height", "s": "sample_steps", "l": "guidance_scale", "d": "seed",
}  # fmt: skip
"""Of a prompt, and what its samples call them."""
_SHORT = {"seed": "d", "cfg": "l", "steps": "s"}
"""What it also calls the flags of a prompt."""


def convert(asked: ForeignSettings) -> Recipe:
    """The recipe of one of its processes. Raises ConfigError for one that has no counterpart."""
    if adapter := asked.part("adapter").text("type"):
        raise ConfigError(f"{asked.name}: its adapter is {adapter:.40}, which has no counterpart; take it out.")
    has_network, has_word = bool(asked.part("network").values), bool(asked.part("embedding").values)
    recipe = Recipe("lora" if has_network else "textual_inversion" if has_word else "finetune")
    if asked.text("type") in SLIDER_KINDS:
        if not has_network:
            raise ConfigError(f"{asked.name}: a slider without a network, which `slider` always trains; give it one.")
        recipe, has_word = Recipe("slider"), False
    _base_options(asked, recipe)
    if recipe.program == "textual_inversion":
        recipe.say("placeholder", [_placeholder(asked)])
        recipe.say("keep_scale", None, False)
    elif asked.part("train").get("train_unet", True) is False:
        raise ConfigError(f"{asked.name}: its U-Net does not learn (train_unet), which `{recipe.program}` always does.")
    if recipe.program in ("lora", "slider"):
        _adapter(asked.part("network"), recipe)
    if has_word:
        _vectors(asked, recipe)
    _rates(asked.part("train"), recipe)
    _steps(asked, recipe)
    _optimizer(asked.part("train"), recipe)
    if recipe.program == "slider":
        slider_ends(asked, recipe)
        _loss(asked.part("train"), recipe)
        leave_captions(recipe)
    else:
        _loss(asked.part("train"), recipe)
        _prior(asked, recipe)
    _samples_and_logging(asked, recipe)
    for part in asked.with_parts():
        part.taken |= {key for key, neutral in _NEUTRAL.items() if part.values.get(key) == neutral}
        part.taken |= {"timestep_type"} if part.values.get("timestep_type") in _OF_FLOWS else set()
        recipe.notes += part.left(_IDLE, recipe.program)
    return recipe


def _base_options(asked: ForeignSettings, recipe: Recipe) -> None:
    model, train = asked.part("model"), asked.part("train")
    arch = (model.text("arch") or "sd1").partition(":")[0]
    other = next((key for key in _OTHERS if model.flag(key)), None)
    if other or arch not in _FAMILIES:
        raise ConfigError(
            f"{asked.name}: its model is of {other or f'arch {arch:.40}'}; wanted SD 1.x, SD 2.x or SDXL, "
            f"{', '.join(_FAMILIES)}."
        )
    if train.text("noise_scheduler") == "flowmatch":
        raise ConfigError(f"{asked.name}: noise_scheduler is flowmatch; wanted ddpm, with which such a base learned.")
    name = model.path("name_or_path")
    if name is None:
        raise ConfigError(f"{asked.name}: its model has no name_or_path, the base model; give it one.")
    recipe.say("base", name)
    recipe.say("vae", model.path("vae_path"))
    recipe.say("prediction_type", "v_prediction" if model.flag("is_v_pred") else None)
    recipe.say("precision", _FORMATS.get(train.text("dtype") or ""))
    recipe.say("attention", "xformers" if train.flag("xformers") else None)
    checkpointed = train.flag("gradient_checkpointing") if "gradient_checkpointing" in train.values else None
    recipe.say("gradient_checkpointing", checkpointed, True)
    if recipe.program != "finetune" and model.flag("quantize"):
        settings.quantize(recipe, "quantize", model.text("qtype") or "qfloat8")
    device = asked.text("device", "cuda")
    recipe.say("device", device if device not in ("cuda", "cuda:0") else None)


def _adapter(network: ForeignSettings, recipe: Recipe) -> None:
    kind = (network.text("type", "lora") or "").lower()
    if kind not in ("lora", "lierla", "dora", "locon", "lycoris", "lokr"):
        raise ConfigError(f"{network.name}: type {kind:.40} has no counterpart; lora, dora, locon and lokr have.")
    rank, conv = network.whole("rank", network.whole("linear")), network.whole("conv")
    alpha, conv_alpha = network.number("linear_alpha", network.number("alpha")), network.number("conv_alpha")
    if kind == "lokr":
        recipe.say("algo", "lokr")
        factor = network.whole("lokr_factor", -1) or -1
        recipe.say("factor", factor if factor > 0 else None)
        if network.get("lokr_full_rank", True):  # whatever its ranks are
            rank = conv = settings.WHOLE
    elif kind == "dora":
        recipe.say("dora", True)
        recipe.notes.append(f"type = dora: {settings.LENGTHS}")
    recipe.say("rank", rank, 4)
    recipe.say("alpha", alpha, 1.0)
    if conv:
        recipe.say("conv_rank", conv)
        recipe.say("conv_alpha", conv_alpha, float(conv))
    of_linear = _RESNETS if kind in ("locon", "lycoris") or conv == 0 else "transformers"
    recipe.say("targets", None, "everything" if conv else of_linear)
    recipe.say("dropout", network.number("dropout") or None)
    recipe.say("init_from", network.path("pretrained_lora_path"))
    more = network.part("network_kwargs")
    for option in ("rank_dropout", "module_dropout"):
        recipe.say(option, more.number(option) or None)
    for key, value in more.values.items():
        if key not in more.taken and value not in (None, [], {}, "", False):
            recipe.notes.append(f"network_kwargs.{key} = {value!s:.60}: --targets takes a regular expression of layers")
    more.taken |= more.values.keys()


def _placeholder(asked: ForeignSettings) -> str:
    return (asked.part("embedding").text("trigger") or "custom_embedding").lower()


def _vectors(asked: ForeignSettings, recipe: Recipe) -> None:
    """Those of a new word, by itself or beside a network."""
    word = asked.part("embedding")
    is_alone = recipe.program == "textual_inversion"
    recipe.say("vectors" if is_alone else "word_vectors", word.whole("tokens"), 4)
    start = word.text("init_words", "*")
    recipe.say("initial_words", [start] if start not in (None, "*") else None)
    if not is_alone:
        train = asked.part("train")
        recipe.say("train_words", [_placeholder(asked)])
        recipe.say("word_learning_rate", train.number("embedding_lr", train.number("lr")), _RATE)


def _rates(train: ForeignSettings, recipe: Recipe) -> None:
    """A network has one rate, for its text encoders too; what learns without one may have rates of its own."""
    rate = train.number("lr")
    own = {"textual_inversion": "embedding_lr", "finetune": "unet_lr"}.get(recipe.program, "lr")
    recipe.say("learning_rate", train.number(own, rate), _RATE)
    if train.flag("train_text_encoder") and recipe.program != "textual_inversion":
        recipe.say("train_text_encoder", True)
        of_text = "text_encoder_lr" if recipe.program == "finetune" else "lr"
        recipe.say("text_learning_rate", train.number(of_text, rate), _RATE)
    if settings.our_optimizer(train.text("optimizer") or "") == "prodigy":
        for option in ("learning_rate", "text_learning_rate", "word_learning_rate"):
            if recipe.values.get(option, 1.0) < 0.1:  # which it takes for 1
                recipe.say(option, 1.0)


def _optimizer(train: ForeignSettings, recipe: Recipe) -> None:
    name = train.text("optimizer") or "adamw"
    params = train.part("optimizer_params")
    told = {key: _written(params.get(key)) for key in params.values}
    usual = {"eps": "1e-6"}
    if name.lower() == "adafactor":
        usual = {"relative_step": "False", "scale_parameter": "False"}
    elif name.lower() in ("adam", "adam8", "adam8bit", "adamw8"):
        usual["weight_decay"] = "0"
    settings.optimizer(train, recipe, name, told, usual)
    limit = train.number("max_grad_norm")
    # It never clips for Adafactor, as long as that is spelt in small letters.
    recipe.say("clip", *((None, 0.0) if name == "adafactor" else (limit,)))
    schedule, own = train.text("lr_scheduler") or "constant", train.part("lr_scheduler_params")
    own.taken |= {"total_iters", "max_iterations"}  # which are the steps whatever they say
    ours = "cosine" if schedule in ("cosine", "cosine_with_restarts") else "constant"
    recipe.say("schedule", ours if train.text("lr_scheduler") else None, ours)
    if schedule == "constant_with_warmup":
        count = own.whole("num_warmup_steps")
        warmup = settings.limit_warmup(recipe, "num_warmup_steps", _updates(train, 1000 if count is None else count))
        recipe.say("warmup", None if count is None else warmup, warmup)
    elif schedule == "linear":
        recipe.notes.append("lr_scheduler = linear: there the rate rises from a third of it; constant takes its place")
    elif ours != schedule.removesuffix("_with_restarts"):
        recipe.notes.append(f"lr_scheduler = {schedule:.40}: has no counterpart; constant takes its place")


def _written(value: Any) -> str:
    """A setting of an optimizer as sd-scripts writes it."""
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def _steps(asked: ForeignSettings, recipe: Recipe) -> None:
    train, datasets = asked.part("train"), _datasets(asked)
    between, within = _between(train), train.whole("gradient_accumulation", 1) or 1
    if train.whole("gradient_accumulation_steps") == -1:
        recipe.notes.append("gradient_accumulation_steps = -1: of a whole epoch; give --accumulate that many batches")
    steps = train.whole("steps")
    recipe.say("steps", None if steps is None else _updates(train, steps), _updates(train, 1000))
    recipe.say("accumulate", between * within if between * within > 1 else None)
    sizes = [each.get("resolution", 512) for each in datasets]
    flat = [
        asked.as_whole("resolution", each) for size in sizes for each in (size if isinstance(size, list) else [size])
    ]
    recipe.say("resolution", max(flat, default=512) if any("resolution" in each for each in datasets) else None, 512)
    batches = [each["batch_size"] for each in datasets if "batch_size" in each]
    of_all = train.whole("batch_size")
    recipe.say("batch", asked.as_whole("batch_size", batches[0]) if batches else of_all, 1)
    recipe.say("seed", asked.whole("training_seed"))


def _between(train: ForeignSettings) -> int:
    """The batches of an update, each of which it counts as a step."""
    return max(1, train.whole("gradient_accumulation_steps", 1) or 1)


def _updates(train: ForeignSettings, steps: int) -> int:
    """So many of its steps as ours."""
    return max(1, steps // _between(train)) if steps else steps


def _datasets(asked: ForeignSettings) -> list[dict[str, Any]]:
    found = asked.get("datasets")
    return [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []


def _loss(train: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("min_snr", train.number("min_snr_gamma"), 0.0)
    if train.number("snr_gamma"):
        recipe.notes.append(
            f"snr_gamma = {train.get('snr_gamma')}: weights of gamma / SNR without a limit; --min-snr has one"
        )
    recipe.say("noise_offset", train.number("noise_offset") or None)
    recipe.say("caption_dropout", train.number("prompt_dropout_prob") or None)
    # They count from the noisiest timestep, and both ends are left out.
    first, last = train.whole("min_denoising_steps", 0) or 0, train.whole("max_denoising_steps", 999) or 999
    recipe.say("max_timestep", 999 - first if first > 0 else None)
    recipe.say("min_timestep", 1001 - last if last < 999 else None)
    mean = train.part("ema_config")
    if mean.flag("use_ema"):
        recipe.say("ema", mean.number("ema_decay", 0.999))


def _prior(asked: ForeignSettings, recipe: Recipe) -> None:
    train = asked.part("train")
    of_class = any(each.get("is_reg") for each in _datasets(asked))
    if of_class:
        recipe.say("prior_weight", train.number("reg_weight"))
        recipe.notes.append("is_reg: such images come in every second step there, and beside each batch here")
    if train.flag("diff_output_preservation"):
        thing = train.text("diff_output_preservation_class")
        if recipe.program == "lora" and thing:
            recipe.say("prior_prompts", [thing])
            recipe.say("prior_weight", train.number("diff_output_preservation_multiplier", 1.0))
        recipe.notes.append(
            "diff_output_preservation: what the base predicts for each caption with the class for the trigger; "
            "--prior-prompts keeps what it predicts for prompts of their own"
        )


def _samples_and_logging(asked: ForeignSettings, recipe: Recipe) -> None:
    save, sample = asked.part("save"), asked.part("sample")
    recipe.say("name", asked.text("name"))
    log = asked.part("logging")
    project, run = log.text("project_name", "ai-toolkit") or "ai-toolkit", log.text("run_name")
    recipe.say("tensorboard", True if asked.text("log_dir") else None)
    settings.trackers(recipe, "wandb" if log.flag("use_wandb") else None, project, run)
    recipe.say("save_precision", _FORMATS.get(save.text("dtype") or ""), "fp16")
    train = asked.part("train")
    every = save.whole("save_every")
    if every is not None and recipe.program == "finetune":
        recipe.notes.append(f"save_every = {every}: only adapters are kept while a run goes on")
    elif every is not None:
        recipe.say("save_every", _updates(train, every))
    recipe.say("push_to_hub", save.text("hf_repo_id") if save.flag("push_to_hub") else None)
    every = 0 if train.flag("disable_sampling") else sample.whole("sample_every")
    prompts = _prompts(asked, recipe.notes)
    if recipe.program == "slider":  # where each prompt stands for one of the weights there
        prompts = list(dict.fromkeys(prompts))
    recipe.say("sample_prompts", prompts or None)
    recipe.say("sample_every", None if every is None else _updates(train, every))


def _prompts(asked: ForeignSettings, notes: list[str]) -> list[str]:
    """The prompts with their settings, as sd-scripts writes them, and with the trigger."""
    sample = asked.part("sample")
    found = sample.get("samples") or sample.get("prompts")
    samples = (
        [each if isinstance(each, dict) else {"prompt": each} for each in found] if isinstance(found, list) else []
    )
    walks = sample.flag("walk_seed")
    seed = sample.whole("seed", 0 if walks else None)
    usual = {key: sample.get(key) for key in _FLAGS.values()}
    prompts = []
    for place, own in enumerate(samples):
        said = usual if seed is None else {**usual, "seed": seed + place * walks}
        said = said | {key: value for key, value in own.items() if value is not None}
        flags = {flag: said[key] for flag, key in _FLAGS.items() if said[key] not in (None, "", False) or key == "seed"}
        text, *more = re.split(r"\s*--(?=[a-z])", str(own.get("prompt") or ""))
        flags |= {_SHORT.get(name, name): value.strip() for name, _, value in (each.partition(" ") for each in more)}
        if text:
            told = [f"--{name} {value}" for name, value in flags.items() if value is not None]
            whole = " ".join([text.strip(), *told]).replace("[trigger]", asked.text("trigger_word") or "")
            prompts.append(settings.with_known_flags(whole, "prompts", notes))
    return prompts
