"""What we write, diffusers and peft read in full; what they and their forerunners write, we read in full."""

import copy
import json

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import AdapterError
from sfumato.files.adapter_file import read_lora
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora

MODULES = {"sd1": 282 + 72, "sd2": 282 + 138, "sdxl": 794 + 72 + 192}
"""Linear and convolution layers of the real configs: the U-Net's, then the text encoders'."""


def load_with_diffusers(path, tiny):
    """The updates that diffusers applies for a file: {(part, path): delta}, from its own loader and peft's layers."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
    from peft.tuners.lora import LoraLayer

    mixin = StableDiffusionXLLoraLoaderMixin if tiny.family == "sdxl" else StableDiffusionLoraLoaderMixin
    parts = copy.deepcopy(tiny.parts)
    loader = type("Loader", (mixin,), {**parts, "components": parts, "hf_device_map": None})()
    loader.load_lora_weights(path.parent, weight_name=path.name, adapter_name="a")
    return {
        (part, name): layer.get_delta_weight("a")
        for part, module in parts.items()
        for name, layer in module.named_modules()
        if isinstance(layer, LoraLayer)
    }


def assert_same_updates(found, wanted):
    assert found.keys() == wanted.keys()
    for target, module in wanted.items():
        delta = module.delta()
        torch.testing.assert_close(
            found[target], delta, rtol=1e-5, atol=1e-5 * float(delta.abs().max()), msg=str(target)
        )


@pytest.mark.slow
@pytest.mark.parametrize("family", ["pocket", "sd1", "sd2", pytest.param("sdxl", marks=pytest.mark.slow)])
def test_diffusers_applies_every_layer_with_its_own_scale(family, tiny, lora, tmp_path):
    parts = tiny(family)
    modules = lora(parts.layers())  # mixed ranks and alphas, which diffusers gets wrong in files that keep them
    assert len(modules) == MODULES.get(family, len(modules))
    path = write_lora(tmp_path / "all.safetensors", modules, family=family)
    assert_same_updates(load_with_diffusers(path, parts), modules)


@pytest.mark.parametrize(("family", "count"), [("sd1", 128), ("sd2", 128), ("sdxl", 560)])
def test_every_attention_module_survives_the_way_through_a_file(family, count, tiny, lora, tmp_path):
    modules = lora(tiny(family).attention(), alphas=(2.0,))
    assert len(modules) == count
    found = read_lora(write_lora(tmp_path / "a.safetensors", modules, family=family))
    assert (found.family, found.modules.keys()) == (family, modules.keys())


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys")
def test_diffusers_mixes_up_alphas_that_differ_which_is_why_ours_are_one(tiny, lora, tmp_path):
    parts = tiny("pocket")
    modules = lora(parts.attention(), ranks=(2,), alphas=(2.0, 2.0, 6.0))
    raw = {}
    for (_, path), module in modules.items():
        name = f"lora_unet_{path.replace('.', '_')}"
        raw |= {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
        raw[f"{name}.alpha"] = torch.tensor(module.alpha)
    save_file(raw, tmp_path / "raw.safetensors")
    theirs = load_with_diffusers(tmp_path / "raw.safetensors", parts)
    wrong = [t for t, module in modules.items() if not torch.allclose(theirs[t], module.delta(), rtol=1e-4)]
    assert wrong == [t for t, module in modules.items() if module.alpha == 6.0]
    assert_same_updates({t: m.delta() for t, m in read_lora(tmp_path / "raw.safetensors").modules.items()}, modules)


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_a_file_that_diffusers_saved_with_its_metadata_is_read_with_its_alphas(rank_stabilised, tiny, tmp_path):
    from diffusers import StableDiffusionXLPipeline
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils import get_peft_model_state_dict

    parts = copy.deepcopy(tiny("sdxl").parts)
    targets = {"unet": ["attn2.to_k", "conv1"], "text_encoder": ["q_proj"], "text_encoder_2": ["out_proj"]}
    layers, metadata, wanted = {}, {}, {}
    for part, names in targets.items():
        config = LoraConfig(
            r=4, lora_alpha=6, target_modules=names, use_rslora=rank_stabilised, init_lora_weights=False
        )
        if part == "unet":
            config.alpha_pattern = {"down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_k": 3}
        inject_adapter_in_model(config, parts[part])
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(parts[part])
        metadata[f"{part}_lora_adapter_metadata"] = config.to_dict()
        for name, layer in parts[part].named_modules():
            if hasattr(layer, "lora_A"):
                wanted[part, name] = layer.get_delta_weight("default")
    StableDiffusionXLPipeline.save_lora_weights(tmp_path, **layers, **metadata)
    found = read_lora(tmp_path / "pytorch_lora_weights.safetensors")
    assert_same_updates(wanted, found.modules)
    assert (found.family, found.spellings) == ("sdxl", ("diffusers",))


def test_a_file_of_the_unet_alone_is_read_with_the_alphas_of_its_metadata(tiny, tmp_path):
    """Neither the tensors nor the settings of `save_lora_adapter` name the part."""
    from peft import LoraConfig

    unet = copy.deepcopy(tiny("sd1").parts["unet"])
    unet.add_adapter(LoraConfig(r=4, lora_alpha=16, target_modules=["attn2.to_k"], init_lora_weights=False))
    unet.save_lora_adapter(tmp_path)
    wanted = {
        ("unet", name): layer.get_delta_weight("default")
        for name, layer in unet.named_modules()
        if hasattr(layer, "lora_A")
    }
    assert_same_updates(wanted, read_lora(tmp_path / "pytorch_lora_weights.safetensors").modules)


CROSS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
ONE_MODULE = {
    "diffusers": (f"unet.{CROSS}.to_q.lora_A.weight", f"unet.{CROSS}.to_q.lora_B.weight"),
    "peft's adapter name": (f"unet.{CROSS}.to_q.lora_A.default.weight", f"unet.{CROSS}.to_q.lora_B.default.weight"),
    "peft": (f"base_model.model.{CROSS}.to_q.lora_A.weight", f"base_model.model.{CROSS}.to_q.lora_B.weight"),
    "peft in a part": (
        f"unet.base_model.model.{CROSS}.to_q.lora_A.weight",
        f"unet.base_model.model.{CROSS}.to_q.lora_B.weight",
    ),
    "older diffusers": (f"unet.{CROSS}.to_q.lora.down.weight", f"unet.{CROSS}.to_q.lora.up.weight"),
    "processors": (f"unet.{CROSS}.processor.to_q_lora.down.weight", f"unet.{CROSS}.processor.to_q_lora.up.weight"),
    "bare processors": (f"{CROSS}.processor.to_q_lora.down.weight", f"{CROSS}.processor.to_q_lora.up.weight"),
    "kohya": (f"lora_unet_{CROSS}_to_q.lora_down.weight".replace(".", "_", 6), ""),
    "kohya sgm": ("lora_unet_input_blocks_1_1_transformer_blocks_0_attn2_to_q.lora_down.weight", ""),
    "ComfyUI": (
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.lora_A.weight",
        "diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_q.lora_B.weight",
    ),
}


@pytest.mark.parametrize("spelling", ONE_MODULE)
def test_one_module_in_every_spelling(spelling, tmp_path):
    down, up = ONE_MODULE[spelling]
    if not up:
        flat = "lora_unet_" + (f"{CROSS}.to_q".replace(".", "_") if spelling == "kohya" else down[10:].split(".")[0])
        down, up = f"{flat}.lora_down.weight", f"{flat}.lora_up.weight"
    save_file({down: torch.ones(2, 4), up: torch.ones(4, 2)}, tmp_path / "a.safetensors")
    found = read_lora(tmp_path / "a.safetensors").modules
    assert list(found) == [("unet", f"{CROSS}.to_q")]
    assert found["unet", f"{CROSS}.to_q"].delta()[0, 0] == 2.0  # no alpha is a scale of 1


TEXT = "encoder.layers.0.self_attn.out_proj"
TEXT_MODULE = {
    "with text_model": (f"text_encoder.text_model.{TEXT}.lora_A.weight", "text_encoder", TEXT),
    "without": (f"text_encoder.{TEXT}.lora_A.weight", "text_encoder", TEXT),
    "second": (f"text_encoder_2.text_model.{TEXT}.lora_A.weight", "text_encoder_2", f"text_model.{TEXT}"),
    "second, without": (f"text_encoder_2.{TEXT}.lora_A.weight", "text_encoder_2", f"text_model.{TEXT}"),
    "older": (f"text_encoder.text_model.{TEXT}.lora_linear_layer.down.weight", "text_encoder", TEXT),
    "oldest": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
        "text_encoder",
        TEXT,
    ),
    "kohya": ("lora_te_text_model_encoder_layers_0_self_attn_out_proj.lora_down.weight", "text_encoder", TEXT),
    "kohya, of two": ("lora_te1_text_model_encoder_layers_0_self_attn_out_proj.lora_down.weight", "text_encoder", TEXT),
    "ComfyUI": (f"text_encoders.clip_l.transformer.text_model.{TEXT}.lora_down.weight", "text_encoder", TEXT),
    "ComfyUI, SD 2": (f"text_encoders.clip_h.transformer.text_model.{TEXT}.lora_down.weight", "text_encoder", TEXT),
    "ComfyUI, second": (
        f"text_encoders.clip_g.transformer.text_model.{TEXT}.lora_down.weight",
        "text_encoder_2",
        f"text_model.{TEXT}",
    ),
    "kohya, second": (
        "lora_te2_text_model_encoder_layers_0_self_attn_out_proj.lora_down.weight",
        "text_encoder_2",
        f"text_model.{TEXT}",
    ),
}


@pytest.mark.parametrize("spelling", TEXT_MODULE)
def test_text_encoders_keep_their_path_across_the_text_model_level(spelling, tmp_path):
    down, part, path = TEXT_MODULE[spelling]
    up = down.replace("lora_A", "lora_B").replace("lora_down", "lora_up").replace(".down.", ".up.")
    save_file({down: torch.ones(2, 4), up: torch.ones(4, 2)}, tmp_path / "a.safetensors")
    assert list(read_lora(tmp_path / "a.safetensors").modules) == [(part, path)]


def test_written_text_encoder_keys_always_carry_text_model(tmp_path):
    module = LoraModule(torch.ones(2, 4), torch.ones(4, 2), 2.0)
    modules = {("text_encoder", TEXT): module, ("text_encoder_2", f"text_model.{TEXT}"): module}
    path = write_lora(tmp_path / "a.safetensors", modules, family="sdxl")
    from sfumato.files.header import read_header

    assert {name.split(".")[0] for name in read_header(path).tensors} == {
        "lora_te1_text_model_encoder_layers_0_self_attn_out_proj",
        "lora_te2_text_model_encoder_layers_0_self_attn_out_proj",
    }


def test_sdxl_in_diffusers_block_names_is_the_same_lora(tiny, lora, tmp_path):
    modules = lora(tiny("sdxl").layers(), alphas=(2.0,))
    ours = read_lora(write_lora(tmp_path / "sgm.safetensors", modules, family="sdxl")).modules
    flat = {}
    for (part, path), module in modules.items():
        prefix = {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_", "text_encoder_2": "lora_te2_"}[part]
        name = prefix + path.replace(".", "_")
        flat |= {f"{name}.lora_down.weight": module.down, f"{name}.lora_up.weight": module.up}
        flat[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(flat, tmp_path / "diffusers.safetensors")
    theirs = read_lora(tmp_path / "diffusers.safetensors").modules
    assert ours.keys() == theirs.keys() == modules.keys()
    assert all(torch.equal(ours[t].down, theirs[t].down) for t in modules)


def test_a_tucker_convolution_is_written_as_the_plain_one_it_equals(tmp_path):
    g = torch.Generator().manual_seed(0)
    down, mid, up = (torch.randn(*s, generator=g) for s in [(2, 4, 1, 1), (2, 2, 3, 3), (5, 2, 1, 1)])
    target = ("unet", "down_blocks.0.resnets.0.conv1")
    path = write_lora(tmp_path / "a.safetensors", {target: LoraModule(down, up, 3.0, mid)}, family="sd1")
    wanted = 1.5 * torch.einsum("op,pqhw,qi->oihw", up[:, :, 0, 0], mid, down[:, :, 0, 0])
    torch.testing.assert_close(read_lora(path).modules[target].delta(), wanted)


def test_alpha_patterns_are_names_and_never_run_as_regular_expressions(tmp_path):
    down, up = ONE_MODULE["diffusers"]
    tensors = {down: torch.ones(2, 4), up: torch.ones(4, 2)}

    def write(pattern):
        metadata = {"unet.lora_alpha": 2, "unet.alpha_pattern": pattern}
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(metadata)})
        return tmp_path / "a.safetensors"

    found = read_lora(write({"^attn2.to_q": 9, "n2.to_q": 9, "attn2\\.to_q$": 4})).modules
    assert found["unet", f"{CROSS}.to_q"].alpha == 4.0
    with pytest.raises(AdapterError, match="which is not run"):
        read_lora(write({"(a+)+$": 9}))
