"""Small models with random weights, of the same classes and config keys as the published ones, and files of them."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.files.module_names import clip_name, open_clip_name, unet_name, vae_name
from sfumato.models.single_file import packaged_config
from sfumato.models.vocabulary import byte_pair_tokenizer, clip_merges, clip_tokenizer
from sfumato.precision import decide

CPU = decide("fp32", device="cpu")
"""The precision of every test that asks for none in particular."""

SAMPLE_SIZE = 8
"""Latents on a side: pictures of 64 px where the VAE's factor is 8."""
WIDTHS: dict[str, dict[str, Any]] = {
    "sd1": {"block_out_channels": [32, 64, 64, 64], "cross_attention_dim": 64},
    "sd2": {"block_out_channels": [32, 64, 128, 128], "cross_attention_dim": 64, "attention_head_dim": [1, 1, 2, 2]},
    "sdxl": {
        "block_out_channels": [32, 64, 128],
        "cross_attention_dim": 192,
        "attention_head_dim": [1, 1, 2],
        "transformer_layers_per_block": [1, 1, 2],
        "projection_class_embeddings_input_dim": 6 * 256 + 96,
    },
}
FIRST_TEXT = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 1, "num_hidden_layers": 4}
SECOND_TEXT = {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 2, "num_hidden_layers": 4, "projection_dim": 96
}  # fmt: skip
VAE_WIDTHS = {"block_out_channels": [32, 32, 64, 64]}
MERGES = 2000
"""Of CLIP's 48,894, the most frequent: its whole vocabulary is more work than all else that is in a tiny base."""

SHALLOW: dict[str, dict[str, Any]] = {
    "sd1": {
        "block_out_channels": [32, 64],
        "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
        "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
        "layers_per_block": 1,
    },
    "sdxl": {
        "block_out_channels": [32, 64],
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
        "attention_head_dim": [1, 1],
        "transformer_layers_per_block": [1, 2],
    },
}
SHALLOW["sd2"] = SHALLOW["sd1"] | {"attention_head_dim": [1, 1]}
"""Each family's U-Net with a block of each kind once, for tests to which its depth says nothing: a quarter of SD 1.x's
layers. SDXL's blocks have two layers each still, by which kohya's names count. A VAE's blocks have one, and the text
encoders two."""


def tiny_pipeline(
    family: str,
    seed: int = 0,
    *,
    shallow: bool = False,
    whole_vocabulary: bool = False,
    inpainting: bool = False,
    **scheduler: Any,
) -> Any:
    """A diffusers pipeline of `sd1`, `sd2` or `sdxl`, from the published configs with few channels.

    shallow: see `SHALLOW`. whole_vocabulary: with all of CLIP's tokens, as the reader of a single file takes for given.
    inpainting: with the U-Net and the pipeline of an inpainting model. scheduler: keys of the scheduler's config to
    change, such as prediction_type.
    """
    tokenizer, tokens = (clip_tokenizer, 49408) if whole_vocabulary else (few_words, MERGES + 514)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel.from_config(
            packaged_config(family, "unet/config.json")
            | WIDTHS[family]
            | (SHALLOW[family] if shallow else {})
            | {"sample_size": SAMPLE_SIZE}
            | ({"in_channels": 9} if inpainting else {})
        )
        vae = diffusers.AutoencoderKL.from_config(
            packaged_config(family, "vae/config.json") | VAE_WIDTHS | ({"layers_per_block": 1} if shallow else {})
        )
        text_sizes = {"vocab_size": tokens} | ({"num_hidden_layers": 2} if shallow else {})
        text = CLIPTextModel(_text_config(family, "text_encoder", FIRST_TEXT | text_sizes))
        second = None
        if family == "sdxl":
            second = CLIPTextModelWithProjection(_text_config(family, "text_encoder_2", SECOND_TEXT | text_sizes))
    config = packaged_config(family, "scheduler/scheduler_config.json") | scheduler
    parts: dict[str, Any] = {
        "unet": unet.eval(),
        "vae": vae.eval(),
        "text_encoder": text.eval(),
        "tokenizer": tokenizer(pad_token=_pad(family, "tokenizer"), positions=77),
        "scheduler": getattr(diffusers, config["_class_name"]).from_config(config),
    }
    if second is None:
        kind = diffusers.StableDiffusionInpaintPipeline if inpainting else diffusers.StableDiffusionPipeline
        return kind(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    parts |= {"text_encoder_2": second.eval(), "tokenizer_2": tokenizer(pad_token="!", positions=77)}
    kind = diffusers.StableDiffusionXLInpaintPipeline if inpainting else diffusers.StableDiffusionXLPipeline
    return kind(**parts, add_watermarker=False)


def few_words(*, pad_token: str, positions: int) -> Any:
    """A tokenizer that cuts words as CLIP's does, and rarer ones into more pieces."""
    return byte_pair_tokenizer(clip_merges()[:MERGES], pad_token=pad_token, positions=positions)


def _text_config(family: str, folder: str, sizes: dict[str, int]) -> CLIPTextConfig:
    return CLIPTextConfig(**(packaged_config(family, f"{folder}/config.json") | sizes))


def _pad(family: str, folder: str) -> str:
    return str(packaged_config(family, f"{folder}/tokenizer_config.json")["pad_token"])


def write_folder(pipe: Any, path: Path) -> Path:
    """The pipeline as a diffusers folder of safetensors."""
    pipe.save_pretrained(str(path), safe_serialization=True)
    return path


def write_single_file(
    pipe: Any, path: Path, markers: tuple[str, ...] = (), metadata: dict[str, str] | None = None
) -> Path:
    """The pipeline as one checkpoint under the names of LDM and sgm. markers: further empty tensors, such as v_pred."""
    tensors = {"model.diffusion_model." + unet_name(n, pipe.unet.config): t for n, t in pipe.unet.state_dict().items()}
    for name, tensor in pipe.vae.state_dict().items():
        if ".attentions." in name and tensor.ndim == 2:  # LDM's attention is made of 1x1 convolutions
            tensor = tensor[..., None, None]
        tensors["first_stage_model." + vae_name(name, pipe.vae.config)] = tensor
    if pipe.unet.config.addition_embed_type == "text_time":
        tensors |= _clip(pipe.text_encoder, "conditioner.embedders.0.transformer.")
        tensors |= _open_clip(pipe.text_encoder_2, "conditioner.embedders.1.model.", unused_layer=False)
    elif pipe.unet.config.use_linear_projection:
        tensors |= _open_clip(pipe.text_encoder, "cond_stage_model.model.", unused_layer=True)
    else:
        tensors |= _clip(pipe.text_encoder, "cond_stage_model.transformer.")
    tensors["alphas_cumprod"] = pipe.scheduler.alphas_cumprod
    tensors |= {marker: torch.zeros(0) for marker in markers}  # as ComfyUI's CheckpointSave has them
    save_file({name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}, path, metadata)
    return path


def _clip(encoder: Any, prefix: str) -> dict[str, Tensor]:
    tensors = {f"{prefix}text_model.{clip_name(name)}": tensor for name, tensor in encoder.state_dict().items()}
    positions = torch.arange(encoder.config.max_position_embeddings)[None]
    return tensors | {f"{prefix}text_model.embeddings.position_ids": positions}


def _open_clip(encoder: Any, prefix: str, unused_layer: bool) -> dict[str, Tensor]:
    """unused_layer: SD 2's files hold the last layer, which no pipeline runs, and a projection nobody applies."""
    tensors: dict[str, Tensor] = {}
    weights = encoder.state_dict()
    for name, tensor in weights.items():  # query, key and value follow one another in no fixed order
        old, third, transposed = open_clip_name(name)
        if third is None:
            tensors[prefix + old] = tensor.T if transposed else tensor
        elif third.start == 0:
            query, key, value = (weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv")
            tensors[prefix + old] = torch.cat([query, key, value])
    if unused_layer:
        last = encoder.config.num_hidden_layers
        before, after = (f"{prefix}transformer.resblocks.{layer}." for layer in (last - 1, last))
        tensors |= {name.replace(before, after): tensor for name, tensor in tensors.items() if before in name}
        tensors[f"{prefix}text_projection"] = torch.eye(encoder.config.hidden_size)
    return tensors | {f"{prefix}logit_scale": torch.tensor(4.6)}


def tiny_pocket_folder(path: Path, seed: int = 0) -> Path:
    """A pocket-like base with random weights: cross-attention at every level, VAE factor 4, a small tokenizer."""
    merges = [("a", "b"), ("c", "a"), ("ca", "t</w>"), ("r", "e"), ("re", "d</w>")]
    tokenizer = byte_pair_tokenizer(merges, positions=77)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = diffusers.UNet2DConditionModel(
            sample_size=16,
            block_out_channels=(32, 64),
            down_block_types=("CrossAttnDownBlock2D",) * 2,
            up_block_types=("CrossAttnUpBlock2D",) * 2,
            layers_per_block=1,
            cross_attention_dim=32,
            attention_head_dim=(1, 2),
            norm_num_groups=16,
        )
        vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 16, 32),
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            layers_per_block=1,
            norm_num_groups=8,
            sample_size=64,
            scaling_factor=0.75,
        )
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=3,
                num_attention_heads=2,
                max_position_embeddings=77,
                projection_dim=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    pipe = diffusers.StableDiffusionPipeline(
        unet=unet.eval(), vae=vae.eval(), text_encoder=text.eval(), tokenizer=tokenizer, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    return write_folder(pipe, path)


def hub_with(*files: str) -> Any:
    """A `huggingface_hub.HfApi` to whom every repository has these files."""
    told = SimpleNamespace(siblings=[SimpleNamespace(rfilename=name) for name in files])
    return SimpleNamespace(model_info=lambda _hub_id, timeout: told)
