"""What a picture of ComfyUI says, by its graph, is told as A1111 and our commands say it."""

import json

import pytest
from PIL import Image, PngImagePlugin
from sfumato.pipelines.generate import Config

from sfumato.config import parse
from sfumato.generation.metadata.other_tools import read_graph
from sfumato.generation.metadata.redraw import redraw


def picture_of(nodes, file):
    """A picture of these nodes, inputs by name."""
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps({name: {"class_type": "", "inputs": each} for name, each in nodes.items()}))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


def test_a_plain_graph_of_comfyui_is_told_as_a_command(tmp_path):
    lora = {"lora_name": "a\\line.safetensors", "strength_model": 0.8, "strength_clip": 0.5, "model": ["4", 0]}
    lora["clip"] = ["11", 0]
    graph = {
        "3": {
            "seed": ["12", 0],
            "steps": 20,
            "cfg": 6.5,
            "sampler_name": "dpmpp_2m",
            "scheduler": "karras",
            "denoise": 1.0,
        },
        "4": {"ckpt_name": "sd15.safetensors"},
        "5": {"width": 512, "height": 768, "batch_size": 1},
        "6": {"text": "(crab:1.2), [sea], embedding:easy.pt", "clip": ["10", 1]},
        "7": {"text": "blurry", "clip": ["10", 1]},
        "10": lora,
        "12": {"value": 7},
        "11": {"stop_at_clip_layer": -2, "clip": ["4", 1]},
    }
    links = {"model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    graph["3"] |= links
    hires = {**graph["3"], "denoise": 0.4, "latent_image": ["3", 0]}
    found = redraw(picture_of({"2": hires, **graph}, tmp_path / "a.png"))
    config = parse(Config, found.words[2:], program="generate")
    assert config.prompts == ("(crab:1.2), \\[sea\\], easy <lora:line:0.5:0.8>",)
    assert (config.negative, config.prompt_syntax, config.sampler) == ("blurry", "a1111", "dpmpp_2m karras")
    assert (config.steps, config.guidance, config.seed, config.size, config.clip_skip) == (20, 6.5, (7,), "512x768", 1)
    assert (config.base, config.embedding) == ("sd15.safetensors", ("easy=easy.safetensors",))
    assert found.left_out == (("Further samplers", "1"),)


@pytest.mark.parametrize(
    "graph", ["[1]", "{", '{"1": {"inputs": {"sampler_name": 1, "positive": ["1", 0]}}}', "null", "[" * 9999]
)
def test_a_graph_without_a_text_is_none(graph):
    assert read_graph(graph) is None


@pytest.mark.parametrize(("scheduler", "schedule"), [("normal", "Uniform"), ("karras", "Karras"), ("beta", "beta")])
def test_a_schedule_of_comfyui_is_told_by_a1111_s_name(scheduler, schedule):
    sampler = {"sampler_name": "euler", "scheduler": scheduler, "positive": ["2", 0]}
    found = read_graph(json.dumps({"1": {"inputs": sampler}, "2": {"inputs": {"text": "a crab"}}}))
    assert found.settings["Schedule type"] == schedule


def test_a_sampler_of_comfyui_with_noise_of_its_own_has_that_seed():
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "noise_seed": 7}
    found = read_graph(json.dumps({"1": {"inputs": sampler}, "2": {"inputs": {"text": "a crab"}}}))
    assert found.settings["Seed"] == 7


def test_brackets_of_comfyui_are_escaped_for_a1111_once():
    sampler, text = {"sampler_name": "euler", "positive": ["2", 0]}, r"[a] \[b\] AND c"
    found = read_graph(json.dumps({"1": {"inputs": sampler}, "2": {"inputs": {"text": text}}}))
    assert found.prompt == r"\[a\] \[b\] and c"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("((a)), (b:1.2) (c:d)", "((a)), (b:1.2) (c:d)"),
        ("((crab:1.2))", "(crab:1.2)"),
        ("(a (b:1.3), c:1.2)", "(a :1.2)(b:1.3)(, c:1.2)"),
        ("a crab :) (b:1.2)", r"a crab :\) \(b:1.2\)"),
        ("(a", r"\(a"),
        ("a sign, 16:9", r"a sign, 16:\9"),
        (r"(\(a\): 1e-1)", r"(\(a\):0.1)"),
        ("(a:inf)", "(a:inf)"),
        ("(" * 2000 + ")" * 2000, "(" * 2000 + ")" * 2000),
    ],
)
def test_weights_of_comfyui_are_told_as_a1111_reads_the_same(text, told):
    """An inner bracket's number takes the place of the outer one's, and brackets may stand alone: `token_weights` of
    its comfy/sd1_clip.py."""
    sampler = {"sampler_name": "euler", "positive": ["2", 0]}
    assert read_graph(json.dumps({"1": {"inputs": sampler}, "2": {"inputs": {"text": text}}})).prompt == told


def test_a_new_word_of_comfyui_in_a_folder_is_its_file():
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "steps": 4}
    text = r"a (embedding:sd15/easy.pt:1.2) \(embedding:a\b\hard\)"
    found = read_graph(json.dumps({"1": {"inputs": sampler}, "2": {"inputs": {"text": text}}}))
    assert found.prompt == r"a (easy:1.2) \(hard\)"
    assert found.settings["TI hashes"] == "easy:, hard:"


def test_the_nearest_text_of_a_graph_is_the_prompt():
    sampler = {"sampler_name": "euler", "positive": ["2", 0]}
    both = {"first": ["3", 0], "second": ["4", 0]}
    nodes = {"1": sampler, "2": both, "3": {"text": "near"}, "4": {"further": ["5", 0]}, "5": {"text": "far"}}
    assert read_graph(json.dumps({name: {"inputs": each} for name, each in nodes.items()})).prompt == "near"


def test_a_controlnet_of_comfyui_has_no_option_and_is_told(tmp_path):
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "negative": ["4", 0], "scheduler": "normal"}
    apply = {"conditioning": ["3", 0], "control_net": ["5", 0], "strength": 0.8}
    nodes = {"1": sampler, "2": apply, "3": {"text": "a crab"}, "4": {"text": ""}}
    nodes["5"] = {"control_net_name": "sd15/canny.safetensors"}
    found = redraw(picture_of(nodes, tmp_path / "a.png"))
    assert found.left_out == (("ControlNet", "canny"),)


def test_a_text_of_comfyui_may_come_from_a_node_of_its_own():
    """PrimitiveStringMultiline, beside PrimitiveFloat."""
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "negative": ["6", 0]}
    nodes = {"1": sampler, "2": {"conditioning": ["3", 0], "strength": ["4", 0]}, "3": {"text": ["5", 0]}}
    nodes |= {"4": {"value": 0.8}, "5": {"value": "a crab"}, "6": {"text": ["7", 0]}, "7": {"value": ""}}
    found = read_graph(json.dumps({name: {"inputs": each} for name, each in nodes.items()}))
    assert (found.prompt, found.negative) == ("a crab", "")


@pytest.mark.parametrize(
    ("further", "negative"),
    [
        ({"2": {"positive": ["3", 0], "negative": ["4", 0], "control_net": ["5", 0], "strength": 1.0}}, "blurry"),
        (
            {"2": {"positive": ["6", 0], "negative": ["6", 1]}, "6": {"negative": ["4", 0], "positive": ["3", 0]}},
            "blurry",
        ),
        ({"2": {"positive": ["3", 0], "negative": ["7", 0]}, "7": {"conditioning": ["3", 0]}}, ""),
    ],
)
def test_a_node_of_comfyui_that_passes_on_both_texts_mixes_neither_with_the_other(further, negative):
    """ControlNetApplyAdvanced and InpaintModelConditioning; and ConditioningZeroOut, which says nothing."""
    sampler = {"sampler_name": "euler", "positive": ["2", 0], "negative": ["2", 1]}
    nodes = {"1": sampler, "3": {"text": "a crab"}, "4": {"text": "blurry"}, **further}
    kinds = {"7": "ConditioningZeroOut"}
    graph = {name: {"class_type": kinds.get(name, ""), "inputs": each} for name, each in nodes.items()}
    found = read_graph(json.dumps(graph))
    assert (found.prompt, found.negative) == ("a crab", negative)


def test_a_graph_of_many_links_is_followed_once():
    """Each of a sampler's inputs leads through the whole chain, and one node has all of them."""
    chain = {str(n): {"inputs": {"up": [str(n + 1), 0]}} for n in range(20_000)}
    inputs = {f"input {n}": ["0", 0] for n in range(20_000)}
    fan = {"a": {"inputs": {f"{n}": n for n in range(200_000)} | {"text": "a crab"}}}
    sampler = {"inputs": {"sampler_name": "euler", "positive": ["a", 0], "negative": ["a", 0], "steps": 4, **inputs}}
    found = read_graph(json.dumps({"sampler": sampler, **chain, **fan}))
    assert (found.prompt, found.settings["Steps"]) == ("a crab", 4)
