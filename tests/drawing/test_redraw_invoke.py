"""What InvokeAI wrote, of each of its times, as a command."""

import pytest
from sfumato.pipelines.generate import Config

from sfumato.config import parse
from sfumato.generation.metadata.other_tools import read_invoke
from sfumato.generation.metadata.redraw import redraw
from tests.drawing.foreign import FROM_INVOKE, picture_of_invoke


def test_what_invokeai_wrote_is_told_as_a_command(tmp_path):
    found = redraw(picture_of_invoke(FROM_INVOKE, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert config.prompts == ("crab++ [in] fog, <easy-neg> <lora:line:0.75>",)
    assert (config.negative, config.prompt_syntax, config.sampler) == ("blurry", "compel", "dpmpp_2m karras")
    assert (config.steps, config.guidance, config.seed, config.size, config.clip_skip) == (20, 6.5, (7,), "512x768", 1)
    assert (config.base, config.embedding) == ("dreamshaper-8.safetensors", ("<easy-neg>=easy-neg.safetensors",))
    assert found.left_out == ()


def test_what_invokeai_wrote_long_ago_and_what_has_no_option_is_told(tmp_path):
    about = {"scheduler": "kdpm_2_a_k", "rand_device": "cuda", "generation_mode": "inpaint", "strength": 0.6}
    about |= {"model": {"model_name": "sd15", "base_model": "sd-1"}, "controlnets": [{}, {}], "cfg_scale": [7, 5]}
    about |= {"loras": [{"lora": {"model_name": "line", "base_model": "sd-1"}, "weight": 1}, 3], "positive_prompt": "a"}
    found = redraw(picture_of_invoke(about, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.base, config.sampler) == (
        ("a <lora:line:1>",),
        "sd15.safetensors",
        "dpm2 a karras",
    )
    assert config.strength == 0.6
    told = {"RNG": "GPU", "CFG scale by step": "[7, 5]", "Mode": "inpaint", "ControlNets": "2"}
    assert dict(found.left_out) == told


def test_what_invokeai_wrote_before_version_3_is_told_as_a_command(tmp_path):
    image = {"prompt": [{"prompt": "a crab [blurry] in fog [dark]", "weight": 1.0}], "steps": 20, "cfg_scale": 7.5}
    image |= {"seed": 7, "width": 512, "height": 768, "sampler": "k_dpmpp_2", "type": "img2img", "perlin": 0.2}
    image |= {"strength_steps": 0.6, "variations": [], "threshold": 0, "postprocessing": None}
    about = {"model": "stable diffusion", "model_weights": "sd15", "app_version": "v2.2.4", "image": image}
    found = redraw(picture_of_invoke(about, tmp_path / "a.png", "sd-metadata"))
    config = parse(Config, found.words[2:], program="generate")
    assert (config.prompts, config.negative) == (("a crab  in fog",), "blurry dark")
    assert (config.base, config.sampler, config.strength) == ("sd15.safetensors", "dpmpp_2m", 0.6)
    assert (config.steps, config.guidance, config.seed, config.size) == (20, 7.5, (7,), "512x768")
    assert dict(found.left_out) == {"RNG": "GPU", "Perlin noise": "0.2"}


@pytest.mark.parametrize(
    "text",
    ["[1]", "{", "{}", '{"positive_prompt": 3}', '{"image": {}}', '{"image": {"prompt": [3]}}', "null", "[" * 9999],
)
def test_metadata_without_a_prompt_is_none(text):
    assert read_invoke(text) is None


def test_odd_types_beside_a_prompt_are_told(tmp_path):
    about = FROM_INVOKE | {"negative_prompt": [1], "regions": {"a": [1]}}
    assert dict(redraw(picture_of_invoke(about, tmp_path / "a.png")).left_out) == {"Regions": "yes"}
