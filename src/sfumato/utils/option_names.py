"""What other tools call our options, so that whoever types their name is told ours.

The names are those of sd-scripts, of diffusers' example scripts and of OneTrainer's configs; of A1111 and ComfyUI where
pictures are drawn. docs/names.md has the same as a table, with what differs.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import MappingProxyType

OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "--base": "pretrained_model_name_or_path base_model_name ckpt ckpt_name sd_model model_org",
        "--vae": "pretrained_vae_model_name_or_path vae_name",
        "--images": "train_data_dir instance_data_dir dataset_config concepts concept_file_name",
        "--class-images": "class_data_dir reg_data_dir",
        "--output": "output_dir outdir save_to output_model_destination",
        "--name": "output_name save_filename_prefix lora_model_name",
        "--author": "metadata_author",
        "--license": "metadata_license",
        "--push-to-hub": "hub_model_id huggingface_repo_id",
        "--steps": "max_train_steps num_inference_steps sampling_steps",
        "--epochs": "max_train_epochs num_train_epochs",
        "--batch": "train_batch_size batch_size",
        "--count": "n n_iter images_per_prompt num_images num_images_per_prompt batch_count",
        "--accumulate": "gradient_accumulation_steps",
        "--learning-rate": "unet_lr lr",
        "--text-learning-rate": (
            "text_encoder_lr text_encoder_lr1 text_encoder_lr2 learning_rate_te learning_rate_te1 learning_rate_te2"
        ),
        "--word-learning-rate": "embedding_learning_rate",
        "--optimizer adamw8bit": "use_8bit_adam",
        "--optimizer lion": "use_lion_optimizer",
        "--optimizer": "optimizer_type",
        "--weight-decay": "adam_weight_decay",
        "--optimizer-args betas=0.9,0.999": "adam_beta1 adam_beta2",
        "--optimizer-args eps=1e-8": "adam_epsilon",
        "--optimizer-args d_coef=1": "d_coef",
        "--schedule": "lr_scheduler learning_rate_scheduler",
        "--warmup": "lr_warmup_steps learning_rate_warmup_steps",
        "--clip": "max_grad_norm clip_grad_norm",
        "--cycles": "lr_scheduler_num_cycles learning_rate_cycles",
        "--debiased": "debiased_estimation_loss",
        "--min-snr": "min_snr_gamma snr_gamma loss_weight_strength",
        "--noise-offset": "offset_noise_weight",
        "--pyramid-noise": "multires_noise_discount",
        "--input-perturbation": "ip_noise_gamma",
        "--huber": "huber_c",
        "--loraplus-ratio": "loraplus_lr_ratio loraplus_unet_lr_ratio",
        "--max-norm": "scale_weight_norms",
        "--min-timestep": "min_noising_strength",
        "--max-timestep": "max_noising_strength",
        "--ema": "use_ema ema_decay",
        "--ema-on-cpu": "offload_ema",
        "--precision": "mixed_precision train_dtype full_fp16 full_bf16 fp16 bf16",
        "--save-precision": "output_dtype",
        "--dtype": "save_precision precision",
        "--quantize int8": "fp8_base base_model_precision",
        "--attention xformers": "xformers diffusers_xformers enable_xformers_memory_efficient_attention",
        "--attention": "attention_mechanism",
        "--device": "train_device",
        "--prediction-type v_prediction": "v_parameterization force_v_prediction",
        "--clip-skip": "text_encoder_layer_skip",
        "--max-tokens": "max_token_length",
        "--rank": "network_dim lora_rank dim new_rank",
        "--alpha": "network_alpha lora_alpha",
        "--conv-rank": "conv_dim",
        "--rank-of": "network_reg_dims block_dims block_alphas conv_block_dims conv_block_alphas rank_pattern "
        "alpha_pattern",
        "--rank-of PATTERN=0": "exclude_name exclude_modules",
        "--rate-of": "network_reg_lrs down_lr_weight mid_lr_weight up_lr_weight",
        "--algo": "peft_type lora_type",
        "--dora": "use_dora dora_wd lora_decompose weight_decompose",
        "--factor": "lokr_factor decompose_factor",
        "--dropout": "network_dropout lora_dropout dropout_probability",
        "--targets": "lora_layers layer_filter",
        "--init-from": "network_weights",
        "--wildcards": "enable_wildcard",
        "--caption-dropout": "caption_dropout_rate proportion_empty_prompts",
        "--shuffle-tags": "shuffle_caption",
        "--keep-tags": "keep_tokens",
        "--tag-dropout": "caption_tag_dropout_rate",
        "--flip": "flip_aug random_flip",
        "--crop": "random_crop center_crop",
        "--mask alpha": "alpha_mask",
        "--mask files": "masked_loss masked_training",
        "--mask": "mask_path",
        "--cache": "cache_latents_to_disk cache_text_encoder_outputs_to_disk",
        "--sample-prompts": "validation_prompt validation_prompts user_prompt_library",
        "--sample-every": "sample_every_n_steps sample_every_n_epochs validation_steps validation_epochs sample_after",
        "--measure-every": "validate_every_n_steps validate_every_n_epochs eval_steps_interval validate_after",
        "--save-every": "save_every_n_steps save_every_n_epochs save_steps",
        "--checkpoint-every": "save_state checkpointing_steps backup_after",
        "--keep": "checkpoints_total_limit save_last_n_steps_state rolling_backup_count",
        "--resume": "resume_from_checkpoint continue_last_backup",
        "--tensorboard": "logging_dir log_with report_to",
        "--wandb": "log_with report_to use_wandb log_tracker_name tracker_project_name wandb_project",
        "--wandb-name": "wandb_run_name tracker_run_name",
        '--trigger WORDS --caption "{trigger}"': "instance_prompt",
        "--class-count": "num_class_images",
        "--prior pictures": "with_prior_preservation",
        "--prior-weight": "prior_loss_weight",
        "--beta": "beta_dpo",
        "--fused": "fused_backward_pass",
        "--placeholder": "placeholder_token token_string",
        "--train-words": "placeholder_token token_string train_text_encoder_ti",
        "--initial-words": "initializer_token init_word initializer_concept initial_embedding_text",
        "--vectors": "num_vectors num_vectors_per_token token_count",
        "--word-vectors": "num_vectors num_vectors_per_token num_new_tokens_per_abstraction",
        "--templates": "learnable_property use_object_template use_style_template",
        "--keep-scale": "preserve_embedding_norm",
        "--bundle": "bundle_additional_embeddings",
        "--prompts": "prompt from_file",
        "--negative": "negative_prompt",
        "--guidance": "guidance_scale cfg_scale cfg scale",
        "--sampler": "scheduler sampler_name",
        "--size": "width height w h",
        "--strength": "denoise denoising_strength",
        "--image": "image_path init_image",
        "--hires": "highres_fix_scale hr_scale hires_upscale",
        "--hires-strength": "highres_fix_strength",
        "--hires-steps": "highres_fix_steps hr_second_pass_steps",
        "--lora": "lora_weights network_weights lora_name",
        "--lora-folder": "lora_dir",
        "--embedding": "textual_inversion_embeddings embeddings",
        "--tuned": "model_tuned",
        "--threshold": "thresh general_threshold",
        "--without": "undesired_tags",
    }
)
"""Ours, and what it is called elsewhere, with _ for - as sd-scripts and diffusers write it. One name may stand beside
several of ours, which different programs have."""

UNASKED: Mapping[str, str] = MappingProxyType(
    {
        "enable_bucket aspect_ratio_bucketing": "images keep their shapes",
        "cache_latents cache_text_encoder_outputs pre_compute_text_embeddings latent_caching": (
            "latents, and captions that stay what they mean, are encoded once"
        ),
        "no_half_vae": "the VAE computes in fp32 beside fp16; beside bf16 in bf16, which has fp32's range",
        "network_train_unet_only": "text encoders learn with --train-text-encoder only",
        "network_module use_safetensors save_model_as": "adapters are .safetensors files, of the kind of --algo",
        "sdpa": "it is the default of --attention",
        "max_data_loader_n_workers persistent_data_loader_workers vae_batch_size": (
            "images are read ahead, and encoded as many at once as fit"
        ),
        "mem_eff_attn highvram": "--attention sdpa takes little memory as it is",
        "v2 sdxl": "the base's weights tell its family",
    }
)
"""What needs no option here, and why."""

ABSENT: Mapping[str, str] = MappingProxyType(
    {
        "config_file": "a config is the first argument; sfumato recipe converts those of sd-scripts",
        "network_args": "its conv_dim is --conv-rank, conv_alpha --conv-alpha, rank_dropout --rank-dropout, "
        "module_dropout --module-dropout, those of blocks --rank-of and --rate-of, and LyCORIS's algo --algo, factor "
        "--factor and dora_wd --dora; the rest has "
        "no counterpart",
        "lycoris_config": "its algo is --algo, linear_dim --rank, linear_alpha --alpha and factor --factor",
        "wd_on_output lora_decompose_output_axis": "--dora learns the lengths of inputs, which web interfaces read",
        "full_matrix lokr_full_rank": "--algo lokr with a --rank of half the layers' width or more is whole",
        "use_tucker use_cp use_scalar": "there is no counterpart",
        "caption_extension": "a dataset.toml has it as caption_suffix",
        "caption_separator": "a dataset.toml has it as separator",
        "caption_prefix": 'it is part of the template, --caption "PREFIX {caption}"',
        "scale_lr": "the rate is as it is given, whatever the batch",
        "bucket_no_upscale": "small images are enlarged, and sfumato check names them",
        "lowram lowvram": "sfumato memory tells what each way takes, and what --gradient-checkpointing saves",
        "torch_compile": "pretrain compiles, other trainers do not",
        "loraplus_text_encoder_lr_ratio": "--loraplus-ratio is that of the text encoders, too",
        "multires_noise_iterations": "--pyramid-noise goes on to a single pixel",
        "loss_type huber_schedule huber_scale": "--huber 0.1 is sd-scripts' huber with its schedule snr",
        "adaptive_noise_scale": "there is no counterpart",
        "noise_offset_random_strength ip_noise_gamma_random_strength": "there is no counterpart",
        "v_pred_like_loss scale_v_pred_loss_like_noise_pred": "--min-snr weighs the timesteps",
        "lr_scheduler_power lr_decay_steps": "--schedule is constant, cosine or linear, with --warmup and --cycles",
        "base_weights base_weights_multiplier": "sfumato merge ADAPTER:0.8 --into BASE writes a base for --base",
        "dim_from_weights": "--init-from says which --rank its file has",
        "reg_data_dir": "a dataset.toml has these images in a source with class = true",
        "in_json": "captions stand beside the images, or in a metadata.jsonl",
        "color_aug face_crop_aug_range weighted_captions": "there is no counterpart",
        "keep_tokens_separator": "in a caption ||| does it; a dataset.toml has keep_tags_separator for another",
        "secondary_separator": "a dataset.toml has it under the same name",
        "token_warmup_min token_warmup_step": "there is no counterpart",
        "caption_dropout_every_n_epochs": "--caption-dropout is a share of all captions",
        "min_bucket_reso max_bucket_reso bucket_reso_steps": "each image keeps its shape and gets the pixels of "
        "--resolution's square; sfumato check lists the sizes",
        "metadata_title": "it is --name",
        "training_comment no_metadata": "there is no counterpart",
        "block_lr_zero_threshold": "--rate-of PATTERN=0 leaves layers out",
        "fused_backward_pass": "dreambooth and finetune have it as --fused",
        "blocks_to_swap": "there is no counterpart; sfumato memory tells what fits",
        "save_last_n_steps save_last_n_epochs max_step_saves_to_keep": (
            "what --save-every kept stays until it is deleted"
        ),
        "log_prefix": "there is no counterpart",
        "wandb_api_key": "--wandb takes the key of `wandb login`, or of the variable WANDB_API_KEY",
        "sample_sampler": "samples are drawn with the base's own sampler",
        "initial_step skip_until_initial_step": "sfumato resume RUN goes on with a run",
        "validation_seed max_validation_steps": "what is measured on is always the same",
    }
)
"""What trainers do not have, or in another place, and what to say of it: else a name that looks alike would be told."""

VALUES: Mapping[tuple[str, str], str] = MappingProxyType(
    {
        ("schedule", "constant_with_warmup"): "here it is --schedule constant with --warmup STEPS.",
        ("schedule", r"(?i)cosine_with_(hard_)?restarts"): "here it is --schedule cosine with --cycles N.",
        ("to", r"(?i)comfy(ui)?|a1111|automatic1111|forge|(stable-diffusion-)?webui|invoke(ai)?|sd-?scripts"): (
            "it reads --to kohya, in which what sfumato trains is written already."
        ),
        ("resolution", r"\d+[,x ]+\d+"): "it is one number: images keep their shapes and get its square's pixels.",
    }
)
"""An option's name, and a pattern of what other tools give it: what to say of that."""


def suggest_value(option: str, value: str) -> str | None:
    """What to say of a value that an option takes in another tool; None for others. option: without dashes."""
    found = (said for (name, form), said in VALUES.items() if name == option and re.fullmatch(form, value))
    return next(found, None)


def _field(option: str) -> str:
    return option.partition(" ")[0].removeprefix("--").replace("-", "_")


def suggest_option(name: str, known: Collection[str]) -> str | None:
    """What to say of an option of another tool, as a sentence; None for what is none, or has no counterpart here.

    name: with - or _, without the dashes before it. known: the fields of the program that was asked.
    """
    name = name.lower().replace("-", "_")
    ours = [option for option, others in OPTIONS.items() if name in others.split() and _field(option) in known]
    if ours:
        return f"Here it is {' or '.join(ours)}."
    if "learning_rate" not in known:  # not of a trainer
        return None
    if why := next((why for others, why in UNASKED.items() if name in others.split()), None):
        return f"It needs none: {why}."
    why = next((why for others, why in ABSENT.items() if name in others.split()), None)
    if why is None:
        return None
    named = [option.replace("-", "_") for option in re.findall(r"--([a-z][a-z-]+)", why)]
    return f"{why[0].upper()}{why[1:]}." if set(named) <= set(known) else "There is no counterpart."
