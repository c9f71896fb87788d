"""OneTrainer: a training's config, of which LORA is `lora`, EMBEDDING `textual_inversion`, FINE_TUNE `finetune`.

Names and defaults are those of modules/util/config/TrainConfig.py there, and of its optimizers in optimizer_util.py.
Its window saves every setting, so that only those are named in notes which are not as it has them from the start.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import PurePosixPath
from typing import Any

from sfumato.errors import ConfigError
from sfumato.interop import settings as shared
from sfumato.interop.settings import ForeignSettings, Recipe
from sfumato.utils.text_files import decode_text

_PROGRAMS = {"LORA": "lora", "EMBEDDING": "textual_inversion", "FINE_TUNE": "finetune"}
_INPAINTING = "_INPAINTING"
_BASES = re.compile(rf"STABLE_DIFFUSION_(20_BASE|21|21_BASE|(15|20|XL_10_BASE)({_INPAINTING})?)")
_TARGETS = {"full": "everything", "attn-mlp": "transformers", "attn-only": "attention"}
_FORMATS = {"FLOAT_32": "fp32", "TFLOAT_32": "fp32", "FLOAT_16": "fp16", "BFLOAT_16": "bf16"}
_QUANTIZED = re.compile("NFLOAT_4|INT_8|FLOAT_8|(INT|FLOAT)_W8A8(_COMPRESSED)?")
_SCHEDULES = {
    "CONSTANT": "constant", "LINEAR": "linear", "COSINE": "cosine", "COSINE_WITH_RESTARTS": "cosine_with_restarts",
    "COSINE_WITH_HARD_RESTARTS": "cosine_with_restarts",
}  # fmt: skip
_FORMER = {
    "lora_layers": "layer_filter", "lora_layer_preset": "layer_filter_preset",
    "lora_layers_regex": "layer_filter_regex", "save_after": "save_every",
    "save_after_unit": "save_every_unit",
}  # fmt: skip
"""What older versions called some settings."""
_OF_THE_OLDEST = frozenset(
    ("train_unet", "train_text_encoder", "unet_learning_rate", "text_encoder_learning_rate", "min_snr_gamma")
)
_NEUTRAL: dict[str, Any] = {
    "learning_rate_min_factor": 0.0, "mse_strength": 1.0, "mae_strength": 0.0, "log_cosh_strength": 0.0,
    "huber_strength": 0.0, "generalized_offset_noise": False, "perturbation_noise_weight": 0.0,
    "timestep_distribution": "UNIFORM", "noising_weight": 0.0, "noising_bias": 0.0, "loss_scaler": "NONE",
    "learning_rate_scaler": "NONE", "force_circular_padding": False, "layer_filter_regex": False,
    "masked_prior_preservation_weight": 0.0, "normalize_masked_area_loss": False, "multi_gpu": False,
    "custom_conditioning_image": False, "force_epsilon_prediction": False, "text_encoder_2_layer_skip": 0,
    "lokr_full_matrix": False, "lokr_decompose_both": False, "lokr_use_tucker": False, "oft_block_share": False,
    "oft_scaled": False,
}  # fmt: skip
"""Settings without a counterpart, and the value with which they do nothing."""
_OPTIMIZER = ("eps", "d0", "d_coef", "growth_rate", "use_bias_correction", "safeguard_warmup", "clip_threshold",
              "decay_rate", "scale_parameter", "relative_step", "momentum", "weight_decay")  # fmt: skip


def convert(asked: ForeignSettings) -> Recipe:
    """The recipe of a config. Raises ConfigError for one that has no counterpart."""
    values = asked.values
    if isinstance(values.get("optimizer"), str) or _OF_THE_OLDEST & values.keys():
        raise ConfigError(
            f"{asked.name}: was saved by an old OneTrainer; load it in a new one, save it there, and name that."
        )
    values |= {new: values[old] for old, new in _FORMER.items() if old in values and new not in values}
    method = asked.text("training_method", "FINE_TUNE") or ""
    kind = asked.text("model_type", "STABLE_DIFFUSION_15") or ""
    if not _BASES.fullmatch(kind):
        raise ConfigError(f"{asked.name}: model_type is {kind:.40}; wanted SD 1.5, 2.x or SDXL.")
    if method not in _PROGRAMS:
        raise ConfigError(f"{asked.name}: training_method is {method:.40}; wanted {', '.join(_PROGRAMS)}.")
    recipe = Recipe(_PROGRAMS[method])
    _base_options(asked, recipe)
    {"lora": _adapter, "finetune": _rates, "textual_inversion": _word}[recipe.program](asked, recipe)
    _optimizer(asked, recipe)
    _steps(asked, recipe)
    _loss(asked, recipe)
    _samples_and_logging(asked, recipe)
    if kind.endswith(_INPAINTING):
        _holes(asked, recipe)
    recipe.notes += [
        f"{key} = {values[key]}: has no counterpart here and is left out"
        for key, neutral in _NEUTRAL.items()
        if key in values and values[key] not in (neutral, None)
        if key.split("_")[0] not in {"lokr", "oft"} - {recipe.told.get("algo")}
        if "_XL_" in kind or key != "text_encoder_2_layer_skip"
    ]
    return recipe


def _base_options(asked: ForeignSettings, recipe: Recipe) -> None:
    unet = asked.part("unet")
    if not unet.get("train", True) and recipe.program != "textual_inversion":
        raise ConfigError(f"{asked.name}: its U-Net does not learn (unet.train), which `{recipe.program}` always does.")
    if unet.text("stop_training_after_unit", "NEVER") != "NEVER" and unet.get("stop_training_after"):
        recipe.notes.append(
            f"unet.stop_training_after = {unet.get('stop_training_after')}: the U-Net learns to the end"
        )
    recipe.say("base", asked.path("base_model_name"), "stable-diffusion-v1-5/stable-diffusion-v1-5")
    recipe.say("vae", asked.part("vae").path("model_name"))
    recipe.say("precision", _FORMATS.get(asked.text("train_dtype") or ""))
    weights = unet.text("weight_dtype", "NONE") or "NONE"
    if weights == "NONE":  # as older versions have it for all parts
        weights = asked.text("weight_dtype") or ""
    if recipe.program != "finetune" and _QUANTIZED.fullmatch(weights):
        shared.quantize(recipe, "unet.weight_dtype", {"NFLOAT_4": "nf4", "INT_8": "int8"}.get(weights, weights))
    recipe.say("attention", "xformers" if asked.text("attention_mechanism") == "XFORMERS" else None)
    checkpointed = unet.get(
        "gradient_checkpointing", asked.get("gradient_checkpointing")
    )  # which was one for all parts
    recipe.say("gradient_checkpointing", None if checkpointed is None else checkpointed not in (False, "OFF"), True)
    recipe.say("prediction_type", "v_prediction" if asked.flag("force_v_prediction") else None)
    recipe.say("zero_terminal_snr", asked.flag("rescale_noise_scheduler_to_zero_terminal_snr") or None)
    recipe.say("clip_skip", asked.whole("text_encoder_layer_skip") or None)
    recipe.say("caption_dropout", asked.part("text_encoder").number("dropout_probability") or None)
    recipe.say("save_precision", _FORMATS.get(asked.text("output_dtype") or ""))


def _factors(asked: ForeignSettings, recipe: Recipe, algo: str) -> None:
    """What the kinds have that are made of factors."""
    recipe.say("rank", asked.whole("lokr_dim" if algo == "lokr" else "lora_rank"), 16)
    recipe.say("alpha", asked.number("lora_alpha"), 1.0)
    if asked.flag("lokr_weight_decompose" if algo == "lokr" else "lora_decompose"):
        recipe.say("dora", True)
        if asked.flag("lora_decompose_output_axis") or (algo == "lokr" and asked.get("lokr_dora_on_output", True)):
            recipe.notes.append(f"{'lokr_weight' if algo == 'lokr' else 'lora'}_decompose: {shared.LENGTHS}")
    factor = asked.whole("lokr_decompose_factor", -1) or -1
    recipe.say("factor", factor if algo == "lokr" and factor > 0 else None)


def _adapter(asked: ForeignSettings, recipe: Recipe) -> None:
    kind = asked.text("peft_type", "LORA") or ""
    algo = {"LORA": "lora", "LOHA": "loha", "LOKR": "lokr", "OFT_2": "oft"}.get(kind)
    if algo is None:
        raise ConfigError(f"{asked.name}: peft_type {kind:.40} has no counterpart; LORA, LOHA, LOKR and OFT_2 have.")
    recipe.say("algo", algo if algo != "lora" else None)
    preset = asked.text("layer_filter_preset", "full") or "full"
    targets = _TARGETS.get(preset)
    if targets is None:
        recipe.notes.append(
            f"layer_filter = {asked.text('layer_filter')}: --targets takes a regular expression; everything is adapted"
        )
    recipe.say("targets", None, targets or "everything")
    if algo == "oft":
        recipe.say("rank", asked.whole("oft_block_size"), 32)
        recipe.notes.append("peft_type OFT_2: rotates the inputs of layers, and here their outputs are rotated")
    else:
        _factors(asked, recipe, algo)
    recipe.say("dropout", asked.number("dropout_probability") or None)
    recipe.say("init_from", asked.path("lora_model_name"))
    _rates(asked, recipe)
    given = asked.get("additional_embeddings", [])
    words = (
        [each for each in given if isinstance(each, dict) and each.get("train", True)]
        if isinstance(given, list)
        else []
    )
    if words:
        _pivotal(asked, recipe, words)


def _pivotal(asked: ForeignSettings, recipe: Recipe, words: list[dict[str, Any]]) -> None:
    recipe.say("train_words", [str(each.get("placeholder", "<embedding>")).lower() for each in words])
    counts = {asked.as_whole("token_count", each.get("token_count") or 1) for each in words}
    if len(counts) > 1:
        recipe.notes.append(
            "token_count of additional_embeddings differs: all words have as many vectors, the most of these"
        )
    recipe.say("word_vectors", max(counts))
    starts = [str(each.get("initial_embedding_text") or "*") for each in words]
    recipe.say("initial_words", starts if all(start != "*" for start in starts) else None)
    recipe.say("word_learning_rate", asked.number("embedding_learning_rate"), recipe.values["learning_rate"])
    recipe.say("bundle", None, True)
    if asked.get("bundle_additional_embeddings", True) is False:
        recipe.usual.pop("bundle")


def _rates(asked: ForeignSettings, recipe: Recipe) -> None:
    """Those of the U-Net and of the text encoders, which learn unless they are told not to."""
    rate = asked.number("learning_rate")
    recipe.say("learning_rate", asked.part("unet").number("learning_rate", rate), 3e-6)
    is_xl = "_XL_" in (asked.text("model_type") or "")
    encoders = [asked.part(name) for name in ("text_encoder", *(("text_encoder_2",) if is_xl else ()))]
    learn = [each for each in encoders if each.get("train", True)]
    if not learn:
        return
    recipe.say("train_text_encoder", None, True)
    recipe.say("text_learning_rate", learn[0].number("learning_rate", rate), 3e-6)
    stop = learn[0].whole("stop_training_after", 30)
    if learn[0].text("stop_training_after_unit", "EPOCH") != "NEVER" and stop:
        unit = (learn[0].text("stop_training_after_unit", "EPOCH") or "").lower()
        recipe.notes.append(
            f"text_encoder.stop_training_after = {stop} {unit}: the text encoders learn to the end, or not at all"
        )
    if len(learn) < len(encoders):
        recipe.notes.append("of SDXL's text encoders only one learns there; here both do, or neither")


def _word(asked: ForeignSettings, recipe: Recipe) -> None:
    word = asked.part("embedding")
    if start := word.text("model_name"):
        recipe.notes.append(f"embedding.model_name = {start}: it starts from --initial-words, not from a file")
    recipe.say("placeholder", [(word.text("placeholder", "<embedding>") or "").lower()])
    recipe.say("vectors", word.whole("token_count"), 1)
    start = word.text("initial_embedding_text", "*")
    recipe.say("initial_words", [start] if start != "*" else None)
    recipe.say("keep_scale", None, False)
    recipe.say("keep_scale", asked.flag("preserve_embedding_norm") or None)
    recipe.say("caption", None, "{caption}")  # the files' own captions, which hold the word
    recipe.say("learning_rate", asked.number("embedding_learning_rate", asked.number("learning_rate")), 3e-6)


def _optimizer(asked: ForeignSettings, recipe: Recipe) -> None:
    own = asked.part("optimizer")
    name = own.text("optimizer", "ADAMW") or "ADAMW"
    told = {key: str(own.get(key)) for key in _OPTIMIZER if own.values.get(key) is not None}
    if (one := own.number("beta1")) is not None and (two := own.number("beta2")) is not None:
        told["betas"] = f"{one:g},{two:g}"
    if name == "ADAFACTOR":
        told["eps"] = f"{own.number('eps', 1e-30):g},{own.number('eps2', 1e-3):g}"
    settings = shared.optimizer_settings_of(name)
    usual = {"relative_step": "False", "scale_parameter": "False"} if name == "ADAFACTOR" else {}
    shared.optimizer(asked, recipe, name, {key: value for key, value in told.items() if key in settings}, usual)
    recipe.say("clip", asked.number("clip_grad_norm"))
    if "clip_grad_norm" in asked.values and asked.values["clip_grad_norm"] is None:
        recipe.say("clip", 0.0)


def _steps(asked: ForeignSettings, recipe: Recipe) -> None:
    recipe.say("epochs", asked.whole("epochs"), 100)
    recipe.say("batch", asked.whole("batch_size"), 1)
    accumulate = asked.whole("gradient_accumulation_steps")
    recipe.say("accumulate", accumulate)
    given = str(asked.get("resolution", "512"))
    sides = [each for each in given.split(",") if each.strip()]
    if len(sides) > 1:
        recipe.say("epochs", math.ceil(recipe.values["epochs"] / len(sides)))
        recipe.notes.append(
            f"resolution = {given}: each image is learned at each of these, so that an epoch is {len(sides)} of "
            "OneTrainer's"
        )
    asked.values["resolution"] = sides[0].strip() if sides else "512"
    shared.resolution(asked, recipe, 512)
    name = asked.text("learning_rate_scheduler", "CONSTANT") or "CONSTANT"
    schedule = _SCHEDULES.get(name, "cosine")
    if name not in _SCHEDULES:
        recipe.notes.append(f"learning_rate_scheduler = {name}: has no counterpart; cosine takes its place")
    ours = schedule.removesuffix("_with_restarts")
    recipe.say("schedule", ours if "learning_rate_scheduler" in asked.values else None, ours)
    cycles = asked.number("learning_rate_cycles", 1.0) or 1.0
    if name.endswith("RESTARTS") and cycles > 1:
        recipe.say("cycles", max(1, round(cycles)))
        if name == "COSINE_WITH_RESTARTS":
            recipe.notes.append(
                f"learning_rate_scheduler = {name}: the rate starts at its peak again, as with HARD_RESTARTS"
            )
    count = asked.number("learning_rate_warmup_steps")
    if count is not None and 0 < count <= 1:  # a share, of which 1 is a step here
        recipe.say("warmup", min(count, 0.999))
        return
    # They count batches there.
    recipe.say("warmup", None if count is None else int(count / (accumulate or 1)), int(200 / (accumulate or 1)))


def _loss(asked: ForeignSettings, recipe: Recipe) -> None:
    weight = asked.text("loss_weight_fn", "CONSTANT")
    if weight == "MIN_SNR_GAMMA":
        recipe.say("min_snr", asked.number("loss_weight_strength", 5.0))
    elif weight == "DEBIASED_ESTIMATION":
        recipe.say("debiased", True)
    else:
        recipe.say("min_snr", None, 0.0)
        if weight != "CONSTANT":
            recipe.notes.append(f"loss_weight_fn = {weight}: has no counterpart; all timesteps weigh the same")
    recipe.say("noise_offset", asked.number("offset_noise_weight") or None)
    low, high = asked.number("min_noising_strength", 0.0) or 0.0, asked.number("max_noising_strength", 1.0)
    recipe.say("min_timestep", int(1000 * low) or None)
    recipe.say("max_timestep", int(1000 * high) if high is not None and high < 1 else None)
    if asked.text("ema", "OFF") != "OFF":
        recipe.say("ema", asked.number("ema_decay", 0.999))
        if recipe.program == "finetune":
            recipe.say("ema_on_cpu", asked.text("ema") == "CPU" or None)
        every = asked.whole("ema_update_step_interval", 5)
        if every and every > 1:
            recipe.notes.append(
                f"ema_update_step_interval = {every}: the mean is updated at each step, so it is shorter"
            )
    if asked.flag("masked_training"):
        recipe.notes.append(
            "masked_training: what a mask leaves out is not learned at all (unmasked_weight, unmasked_probability)"
        )


def _holes(asked: ForeignSettings, recipe: Recipe) -> None:
    """What is hidden of an inpainting model's samples."""
    kind = asked.text("model_type")
    if asked.flag("masked_training"):
        recipe.say("inpaint_whole_share", asked.number("unmasked_probability", 0.1))
        recipe.notes.append(
            f"model_type = {kind}: in half of the samples a random part is hidden, not what a mask shows"
        )
    else:
        recipe.notes.append(
            f"model_type = {kind}: a random part of most samples is hidden; --inpaint-whole-share 1 hides all, as there"
        )


def _samples_and_logging(asked: ForeignSettings, recipe: Recipe) -> None:
    destination = (asked.text("output_model_destination") or "").replace("\\", "/")
    name = asked.text("save_filename_prefix") or PurePosixPath(destination).stem or None
    recipe.say("name", name if name != "model" else None)  # which it calls every one, and a run a folder of its own
    if asked.text("save_every_unit") == "STEP" and recipe.program != "finetune":
        recipe.say("save_every", asked.whole("save_every"))
    elif (asked.text("save_every_unit") or "NEVER") != "NEVER":
        unit = (asked.text("save_every_unit") or "").lower()
        recipe.notes.append(
            f"save_every = {asked.get('save_every')} {unit}: --save-every counts steps, and only adapters"
        )
    if asked.text("sample_after_unit") == "STEP":
        recipe.say("sample_every", asked.whole("sample_after"))
    recipe.say("tensorboard", True if asked.get("tensorboard") else None)
    recipe.say("sample_prompts", [_prompt(each) for each in _samples(asked) if each.get("prompt")] or None)


def _samples(asked: ForeignSettings) -> list[dict[str, Any]]:
    """Its samples, from the config or from the file that it names, as far as that is here."""
    found = asked.get("samples")
    if found is None and (given := asked.text("sample_definition_file_name")):
        file = asked.find(given)
        try:
            found = None if file is None else json.loads(decode_text(file.read_bytes()))
        except (OSError, ValueError):
            found = None
    samples = [each for each in found or [] if isinstance(each, dict)] if isinstance(found, list) else []
    return [each for each in samples if each.get("enabled", True)]


def _prompt(sample: dict[str, Any]) -> str:
    """The prompt with its settings, as sd-scripts writes them."""
    flags = {"n": "negative_prompt", "w": "width", "h": "height", "s": "diffusion_steps", "l": "cfg_scale"}
    if not sample.get("random_seed"):
        flags["d"] = "seed"
    told = [f"--{flag} {sample[key]}" for flag, key in flags.items() if sample.get(key) not in (None, "")]
    return " ".join([str(sample["prompt"]), *told])
