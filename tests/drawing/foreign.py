"""Images with settings as other programs write them."""

import json

from PIL import Image, PngImagePlugin

FROM_A1111 = """(crab:1.3) BREAK sea <lora:line:0.8> <lora:line:0.8>, \\(x\\), easyneg
Negative prompt: blurry, (bad:1.2)
Steps: 4, Sampler: DPM++ 2M, Schedule type: {schedule}, CFG scale: 7, Seed: 42, Size: 64x96, Model hash: 6ce0161689, \
Model: v1-5, Clip skip: 2, ADetailer model: face.pt, TI hashes: "easyneg: c74b4e810b03", Version: v1.10.1"""


def picture_with(text, file, own=None):
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    if own is not None:
        info.add_text("sfumato", json.dumps(own))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file


FROM_INVOKE = {
    "app_version": "6.3.0",
    "generation_mode": "txt2img",
    "positive_prompt": "crab++ [in] fog, <easy-neg>",
    "negative_prompt": "blurry",
    "positive_style_prompt": "crab++ [in] fog, <easy-neg>",
    "width": 512,
    "height": 768,
    "seed": 7,
    "rand_device": "cpu",
    "cfg_scale": 6.5,
    "cfg_rescale_multiplier": 0.0,
    "steps": 20,
    "scheduler": "dpmpp_2m_k",
    "clip_skip": 1,
    "model": {"key": "a", "hash": "b", "name": "dreamshaper-8", "base": "sd-1", "type": "main"},
    "loras": [{"model": {"key": "c", "name": "line", "base": "sd-1", "type": "lora"}, "weight": 0.75}],
    "controlnets": [],
}


def picture_of_invoke(about, file, key="invokeai_metadata"):
    info = PngImagePlugin.PngInfo()
    info.add_text(key, json.dumps(about))
    Image.new("RGB", (8, 8)).save(file, pnginfo=info)
    return file
