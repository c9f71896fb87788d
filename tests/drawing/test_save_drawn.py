"""What an image that sfumato drew says of its prompt, numbers, adapters and words."""

import re

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sfumato.adapters.weights import Adapter
from sfumato.generation.metadata.png_info import lora_tag, read_picture_info
from sfumato.generation.metadata.redraw import redraw
from sfumato.generation.settings import save_with_settings

ABOUT = {
    **{"prompt": "a", "negative": "", "steps": 2, "guidance": 7, "seed": 1, "width": 8, "height": 8},
    **{"base": "b", "vae": None, "clip_skip": None, "adapter_guidance": {}},
}


def test_numbers_are_written_as_they_are(tmp_path):
    assert lora_tag("a", 0.1234567) == "<lora:a:0.1234567>"
    assert lora_tag("a", 1.0) == "<lora:a:1>"
    numbers = {"guidance": 7.1234567, "strength": 1.0, "adapter_guidance": {"a": 1.2345678}, "seed": 2**53 + 1}
    used = [Adapter(tmp_path / "a.safetensors", (0.1234567, 1e-7))]
    save_file({"x": torch.zeros(1)}, tmp_path / "a.safetensors")
    save_with_settings(Image.new("RGB", (8, 8)), used, ABOUT | numbers, tmp_path / "a.png", ("Euler", None))
    found = read_picture_info(tmp_path / "a.png").parameters
    assert found.prompt == "a <lora:a:1e-07:0.1234567>"
    told = [found.settings[name] for name in ("CFG scale", "Denoising strength", "Adapter guidance", "Seed")]
    assert told == ["7.1234567", "1", "a: 1.2345678", "9007199254740993"]


def test_a_file_here_of_the_name_that_diffusers_gives_is_called_so(tmp_path):
    save_file({"x": torch.zeros(1)}, tmp_path / "pytorch_lora_weights.safetensors")
    used = [Adapter(tmp_path / "pytorch_lora_weights.safetensors", 0.5)]
    save_with_settings(Image.new("RGB", (8, 8)), used, ABOUT, tmp_path / "a.png", ("Euler", None))
    assert read_picture_info(tmp_path / "a.png").parameters.prompt == "a <lora:pytorch_lora_weights:0.5>"


@pytest.mark.parametrize(
    ("syntax", "prompt", "negative"),
    [
        (None, r"\(a\) \\", r"\[b\]"),
        ("plain", r"\(a\) \\", r"\[b\]"),
        ("a1111", "(a) \\", "[b]"),
        ("compel", "(a) \\", "[b]"),
    ],
)
def test_a_prompt_is_written_as_a1111_reads_the_same(tmp_path, syntax, prompt, negative):
    """Brackets of plain prompts are characters; compel's weights have no other form, and are named as compel's."""
    settings = ABOUT | {"prompt": "(a) \\", "negative": "[b]"} | ({"prompt_syntax": syntax} if syntax else {})
    save_with_settings(Image.new("RGB", (8, 8)), [], settings, tmp_path / "a.png", ("DPM++ 2M", None))
    info = read_picture_info(tmp_path / "a.png")
    assert info.parameters.settings["Schedule type"] == "Uniform"  # A1111 would take Karras' where none is named
    assert info.own["sampler"] == "DPM++ 2M"
    assert (info.parameters.prompt, info.parameters.negative) == (prompt, negative)
    assert info.parameters.settings.get("Prompt syntax") == ("compel" if syntax == "compel" else None)
    assert info.own["prompt"] == "(a) \\"


@pytest.mark.parametrize(("family", "skipped", "told"), [("sd1", 1, "2"), ("sdxl", 1, "3"), ("sdxl", None, None)])
def test_clip_skip_is_told_as_a1111_counts_it_and_comes_back(tmp_path, family, skipped, told):
    settings = ABOUT | {"width": 1024, "height": 1024, "family": family, "clip_skip": skipped}
    save_with_settings(Image.new("RGB", (8, 8)), [], settings, tmp_path / "a.png", ("Euler", None))
    assert read_picture_info(tmp_path / "a.png").parameters.settings.get("Clip skip") == told
    words = redraw(tmp_path / "a.png").words
    assert (words[words.index("--clip-skip") + 1] if "--clip-skip" in words else None) == (skipped and str(skipped))


def test_adapters_of_regions_have_no_guidance_of_their_own_and_are_named_where_they_count(tmp_path):
    inside = [
        {"label": n, "file": f"{n}.safetensors", "hash": n * 64, "weight": w} for n, w in (("a", 0.0), ("b", 1.0))
    ]
    about = ABOUT | {
        "prompt_syntax": "plain",
        "regions": [{"where": [0, 0, 0.5, 1], "prompt": None, "adapters": inside}],
    }
    save_file({"a": torch.zeros(1)}, tmp_path / "line.safetensors")
    used = [Adapter(tmp_path / "line.safetensors", 0.8, "line")]
    save_with_settings(Image.new("RGB", (8, 8)), used, about, tmp_path / "a.png", ("DDIM", None))
    hashes = read_picture_info(tmp_path / "a.png").parameters.settings["Lora hashes"]
    assert re.fullmatch("line: [0-9a-f]{12}, b: b{12}", hashes)
    assert "--adapter-guidance" not in redraw(tmp_path / "a.png").words


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({}, False),
        ({"regions": [{"where": [0, 0, 1, 1], "prompt": "an <otter>", "adapters": []}]}, True),
        ({"prompts": ["a crab", "an <otter>"]}, True),
        ({"negative": "<otter>"}, True),
    ],
)
def test_a_word_is_named_wherever_it_is_said(more, told, tmp_path):
    save_file({"emb_params": torch.zeros(1)}, tmp_path / "otter.safetensors")
    words = [(tmp_path / "otter.safetensors", ["<otter>"])]
    save_with_settings(Image.new("RGB", (8, 8)), [], ABOUT | more, tmp_path / "a.png", ("DDIM", None), words)
    assert ("TI hashes" in read_picture_info(tmp_path / "a.png").parameters.settings) is told
