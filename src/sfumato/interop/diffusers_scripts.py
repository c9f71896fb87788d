"""diffusers' example scripts: those of LoRAs are `lora` or `dreambooth --method lora`, train_text_to_image.py is
`finetune`, the others their namesakes."""

from __future__ import annotations

from sfumato.errors import ConfigError
from sfumato.interop import settings
from sfumato.interop.settings import ForeignSettings, Recipe

_RATES = {
    "train_text_to_image.py": 1e-4,
    "train_text_to_image_sdxl.py": 1e-4,
    "train_text_to_image_lora.py": 1e-4,
    "train_text_to_image_lora_sdxl.py": 1e-4,
    "train_dreambooth.py": 5e-6,
    "train_dreambooth_lora.py": 5e-4,
    "train_dreambooth_lora_sdxl.py": 1e-4,
    "textual_inversion.py": 1e-4,
    "textual_inversion_sdxl.py": 1e-4,
}
_IDLE = frozenset((
    "allow_tf32", "cache_dir", "caption_column", "checkpointing_steps", "class_data_dir", "class_prompt",
    "dataloader_num_workers", "dream_detail_preservation", "foreach_ema", "hub_token", "image_column",
    "image_interpolation_mode", "local_rank", "logging_dir", "lr_power", "no_safe_serialization", "non_ema_revision",
    "num_class_images", "num_validation_images", "output_dir", "output_kohya_format", "prior_generation_precision",
    "prior_loss_weight", "prodigy_decouple", "prodigy_safeguard_warmup", "prodigy_use_bias_correction", "repeats",
    "resume_from_checkpoint", "sample_batch_size", "save_as_full_pipeline", "set_grads_to_none",
    "skip_save_text_encoder", "timestep_bias_begin", "timestep_bias_end", "timestep_bias_multiplier",
    "timestep_bias_portion", "tokenizer_name", "tracker_project_name", "validation_scheduler", "variant",
))  # fmt: skip
"""What changes nothing of what is learned, or belongs to another setting."""
_PROJECTS = {
    "train_dreambooth": "dreambooth", "train_dreambooth_lora": "dreambooth-lora",
    "train_dreambooth_lora_sdxl": "dreambooth-lora-sd-xl", "textual_inversion": "textual_inversion",
    "textual_inversion_sdxl": "textual_inversion", "train_text_to_image_sdxl": "text2image-fine-tune-sdxl",
}  # fmt: skip
"""Of its scripts at W&B, by script; the others have one together."""


def convert(asked: ForeignSettings) -> Recipe:
    """The recipe of one of its trainings. Raises ConfigError for one without its pictures."""
    script = asked.script
    if script.startswith("textual_inversion"):
        recipe = Recipe("textual_inversion")
        _word(asked, recipe)
    elif script.startswith("train_dreambooth"):
        recipe = Recipe("dreambooth")
        _subject(asked, recipe, method="lora" if "lora" in script else "full")
    else:
        recipe = Recipe("lora" if "lora" in script else "finetune")
        _captioned(asked, recipe)
    _base_and_steps(asked, recipe)
    if asked.flag("train_text_encoder"):
        _text_encoders(asked, recipe)
    _optimizer(asked, recipe)
    settings.schedule(asked, recipe, cycles="lr_num_cycles", power="lr_power", warmup=500)
    recipe.say("min_snr", asked.number("snr_gamma"), 0.0)
    recipe.say("noise_offset", asked.number("noise_offset") or (0.1 if asked.flag("offset_noise") else None))
    if asked.flag("push_to_hub"):
        recipe.say("push_to_hub", asked.text("hub_model_id"))
        if asked.text("hub_model_id") is None:
            recipe.notes.append(
                "push_to_hub without hub_model_id: nothing is uploaded unless --push-to-hub OWNER/NAME is given"
            )
    project = asked.text("tracker_project_name") or _PROJECTS.get(script.removesuffix(".py"), "text2image-fine-tune")
    settings.trackers(recipe, asked.text("report_to"), project, None)
    recipe.say("keep", asked.whole("checkpoints_total_limit"))
    prompt = asked.text("validation_prompt")
    recipe.say("sample_prompts", None if prompt is None else [prompt])
    recipe.say("sample_every", asked.whole("validation_steps"))
    recipe.notes += asked.left(_IDLE, recipe.program)
    return recipe


def _base_and_steps(asked: ForeignSettings, recipe: Recipe) -> None:
    settings.base_model(asked, recipe)
    recipe.say("vae", asked.path("pretrained_vae_model_name_or_path"))
    kind = asked.text("prediction_type")
    recipe.say("prediction_type", kind if kind in ("epsilon", "v_prediction") else None)
    settings.precision(asked, recipe)
    recipe.say("gradient_checkpointing", asked.flag("gradient_checkpointing") or None)
    recipe.say("attention", "xformers" if asked.flag("enable_xformers_memory_efficient_attention") else None)
    recipe.say("seed", asked.whole("seed"))
    steps, epochs = asked.whole("max_train_steps"), asked.whole("num_train_epochs")
    if steps is None and recipe.program == "textual_inversion":
        recipe.say("steps", None, 5000)
    elif steps is not None:
        recipe.say("steps", steps)
    else:
        recipe.say("epochs", epochs, 1 if recipe.program == "dreambooth" else 100)
    recipe.say("batch", asked.whole("train_batch_size"), 4 if recipe.program == "dreambooth" else 16)
    recipe.say("accumulate", asked.whole("gradient_accumulation_steps"))
    is_large = asked.script.endswith(("_lora_sdxl.py", "_image_sdxl.py"))
    settings.resolution(asked, recipe, 1024 if is_large else 512)
    rate, usual = asked.number("learning_rate"), _RATES[asked.script]
    if asked.flag("scale_lr"):
        rate = (rate or usual) * recipe.values["batch"] * recipe.values.get("accumulate", 1)
        recipe.notes.append(f"scale_lr: the rate is {rate:g} on one process, as it is given here on any number")
    recipe.say("learning_rate", rate, usual)


def _text_encoders(asked: ForeignSettings, recipe: Recipe) -> None:
    """They learn at the U-Net's rate, but for one script, which has a rate for them that Prodigy does not look at."""
    recipe.say("train_text_encoder", True)
    if "lora" in asked.script:
        recipe.notes.append(
            "train_text_encoder: the LoRA of the text encoders is on their MLPs, too, not on attention alone"
        )
    rate = asked.number("text_encoder_lr", 5e-6) if asked.script == "train_dreambooth_lora_sdxl.py" else None
    if not rate or (asked.text("optimizer") or "").lower() == "prodigy":
        rate = recipe.values["learning_rate"]
    recipe.say("text_learning_rate", None, rate)


def _optimizer(asked: ForeignSettings, recipe: Recipe) -> None:
    name = "adamw8bit" if asked.flag("use_8bit_adam") else (asked.text("optimizer") or "adamw")
    is_sdxl_subject = asked.script == "train_dreambooth_lora_sdxl.py"
    args = {
        "betas": f"{asked.number('adam_beta1', 0.9):g},{asked.number('adam_beta2', 0.999):g}",
        "eps": f"{asked.number('adam_epsilon', 1e-8):g}",
        "weight_decay": f"{asked.number('adam_weight_decay', 1e-4 if is_sdxl_subject else 1e-2):g}",
    }
    if name.lower() == "prodigy":
        args |= {"use_bias_correction": "True", "safeguard_warmup": "True"}
    names = {"betas": {"adam_beta1", "adam_beta2"}, "eps": {"adam_epsilon"}, "weight_decay": {"adam_weight_decay"}}
    told = {key: value for key, value in args.items() if names.get(key, set()) & asked.values.keys()}
    settings.optimizer(asked, recipe, name, told, {key: value for key, value in args.items() if key not in told})
    if recipe.program != "textual_inversion":  # which clips nothing
        recipe.say("clip", asked.number("max_grad_norm"))


def _captioned(asked: ForeignSettings, recipe: Recipe) -> None:
    folder = asked.path("train_data_dir")
    if folder is None:
        raise ConfigError(
            f"{asked.name}: its images are the hub's {asked.text('dataset_name') or 'data set'}; save them in a folder "
            "with a metadata.jsonl, and name it as --train_data_dir."
        )
    recipe.say("images", folder)
    if recipe.program == "lora":
        _lora(asked, recipe)
    else:
        _whole(asked, recipe)
    recipe.say("flip", asked.flag("random_flip") or None)
    recipe.say("crop", None, None if asked.flag("center_crop") else "random")


def _whole(asked: ForeignSettings, recipe: Recipe) -> None:
    if asked.flag("use_ema"):
        recipe.say("ema", None, 0.9999)
        recipe.say("ema_on_cpu", asked.flag("offload_ema") or None)
    asked.taken.add("offload_ema")
    recipe.say("caption_dropout", asked.number("proportion_empty_prompts") or None)
    recipe.say("input_perturbation", asked.number("input_perturbation") or None)
    recipe.say("sample_prompts", asked.several("validation_prompts") or None)
    if (bias := asked.text("timestep_bias_strategy", "none")) != "none":
        recipe.notes.append(f"timestep_bias_strategy = {bias}: has no counterpart here and is left out")


def _lora(asked: ForeignSettings, recipe: Recipe) -> None:
    rank = asked.whole("rank")
    recipe.say("rank", rank, 4)
    recipe.say("targets", None, "attention")
    recipe.say("dropout", asked.number("lora_dropout"))
    if asked.flag("use_dora"):
        recipe.say("dora", True)
        recipe.notes.append(f"use_dora: {settings.LENGTHS}")


def _subject(asked: ForeignSettings, recipe: Recipe, *, method: str) -> None:
    recipe.say("images", asked.path("instance_data_dir"))
    recipe.say("method", None, method)
    if method == "lora":
        _lora(asked, recipe)
    recipe.say("instance_prompt", asked.text("instance_prompt"))
    class_prompt = asked.text("class_prompt")
    if class_prompt is not None:
        recipe.say("class_prompt", class_prompt)
    else:
        recipe.ask = ("class_prompt",)
        recipe.notes.append('--class-prompt is a prompt for what the subject is, such as "a photo of a dog"')
    if asked.flag("with_prior_preservation"):
        recipe.say("class_images", _filled(asked, "class_data_dir"))
        wanted, there = asked.whole("num_class_images", 100) or 100, recipe.told.get("class_images")
        if there is None:  # beside a folder of them nothing is drawn
            recipe.say("class_count", asked.whole("num_class_images"), 100)
        elif (count := _count(asked, there)) < wanted:
            recipe.notes.append(
                f"num_class_images = {wanted}: {there} has {count}; the script draws the rest, and these are all here"
            )
        recipe.say("prior_weight", asked.number("prior_loss_weight"))
    recipe.say("prior", None, "pictures" if asked.flag("with_prior_preservation") else "none")
    recipe.say("flip", asked.flag("random_flip") or None)
    recipe.say("crop", None, None if asked.flag("center_crop") else "random")


def _count(asked: ForeignSettings, folder: str) -> int:
    """The files in it, which the script takes for images, too."""
    there = asked.find(folder)
    return 0 if there is None else sum(1 for _ in there.iterdir())


def _filled(asked: ForeignSettings, key: str) -> str | None:
    """The folder, if it has files: into an empty one the script draws them, as a run does into its own."""
    given = asked.path(key)
    there = None if given is None else asked.find(given)
    return given if there is not None and there.is_dir() and any(there.iterdir()) else None


def _word(asked: ForeignSettings, recipe: Recipe) -> None:
    placeholder = asked.text("placeholder_token")
    if placeholder is None:
        raise ConfigError(f"{asked.name}: no placeholder_token, the new word; give it one.")
    recipe.say("placeholder", [placeholder.lower()])
    recipe.say("images", asked.path("train_data_dir"))
    words = asked.text("initializer_token")
    recipe.say("initial_words", None if words is None else [words])
    recipe.say("vectors", asked.whole("num_vectors"), 1)
    recipe.say("templates", asked.text("learnable_property"), "object")
    recipe.say("keep_scale", None, False)
    recipe.say("clip", None, 0.0)
    recipe.say("flip", None, True)  # half of the samples, always
    recipe.say("crop", None, "center")
    asked.flag("center_crop")
    recipe.say("save_every", asked.whole("save_steps"))
