"""kohya's names of modules, both ways: flat paths, SDXL's blocks, text encoders by number, and what has no name."""

import pytest

from sfumato.files.module_names import kohya_name, kohya_target
from tests.files.said import said


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("conv_in", "input_blocks_0_0"),
        ("conv_norm_out", "out_0"),
        ("add_embedding.linear_2", "label_emb_0_2"),
        ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
        ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
        ("up_blocks.1.upsamplers.0.conv", "output_blocks_5_2_conv"),
        ("mid_block.attentions.0.proj_in", "middle_block_1_proj_in"),
        ("mid_block.resnets.0.conv1", "middle_block_0_in_layers_2"),
        ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
        ("down_blocks.1.resnets.1.conv_shortcut", "input_blocks_5_0_skip_connection"),
        ("up_blocks.2.resnets.0.norm2", "output_blocks_6_0_out_layers_0"),
        ("down_blocks.2.attentions.0.transformer_blocks.3.attn2.to_out.0",
         "input_blocks_7_1_transformer_blocks_3_attn2_to_out_0"),
        ("up_blocks.0.attentions.1.transformer_blocks.0.ff.net.0.proj",
         "output_blocks_1_1_transformer_blocks_0_ff_net_0_proj"),
    ],
)  # fmt: skip
def test_sdxl_goes_by_sgm_s_blocks(path, name):
    assert kohya_name("sdxl", "unet", path) == f"lora_unet_{name}"
    assert kohya_target(f"lora_unet_{name}") == ("unet", path)
    flat = path.replace(".", "_")
    assert kohya_name("sd1", "unet", path) == f"lora_unet_{flat}"
    assert kohya_target(f"lora_unet_{flat}") == ("unet", path)


@pytest.mark.parametrize(
    "name",
    [
        *("lora_unet_input_blocks_3_0_in", "lora_unet_input_blocks_3_1_op", "lora_unet_middle_block_3_proj_in"),
        *("lora_unet_middle_block_0_proj_in", "lora_unet_output_blocks_1_2_conv", "lora_unet_output_blocks_2_0_conv"),
        *("lora_te_text_projection", "lora_te1_text_projection", "unet_conv_in", "lora_te2_text_model_encoder"),
    ],
)
def test_names_of_no_module(name):
    assert kohya_target(name) is None


def test_text_encoders_by_number():
    layer = "encoder.layers.3.self_attn.out_proj"
    flat = "text_model_encoder_layers_3_self_attn_out_proj"
    assert kohya_target(f"lora_te_{flat}") == kohya_target(f"lora_te1_{flat}") == ("text_encoder", layer)
    assert kohya_target(f"lora_te2_{flat}") == ("text_encoder_2", f"text_model.{layer}")
    assert kohya_target("lora_te2_text_projection") == ("text_encoder_2", "text_projection")
    assert kohya_name("sdxl", "text_encoder_2", "text_projection") == "lora_te2_text_projection"
    assert kohya_name("sdxl", "text_encoder", layer) == f"lora_te1_{flat}"


def test_names_that_other_tools_lack():
    tail = "has no name in other tools, so a file with it could not be loaded. Choose --targets without it."
    assert said(kohya_name, "sd1", "unet", "encoder_hid_proj") == f"unet module encoder_hid_proj {tail}"
    assert said(kohya_name, "sd1", "text_encoder", "pooler") == f"text_encoder module pooler {tail}"
    assert said(kohya_name, "sd1", "text_encoder_2", "x") == (
        "text_encoder_2 is no part of SD 1.x; its parts are unet, text_encoder."
    )
    assert said(kohya_name, "sdxl", "vae", "x") == (
        "vae is no part of SDXL; its parts are unet, text_encoder, text_encoder_2."
    )
