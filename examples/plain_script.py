"""A text-to-image script for diffusers, and the two lines (marked "new") that mix two LoRAs into its pipeline.

    python examples/plain_script.py BASE_FOLDER line.safetensors otter.safetensors crab.png

BASE_FOLDER: a diffusers folder or hub id of SD 1.x or 2.x, or sfumato's pocket base
(src/sfumato/models/pocket in a clone).
"""

import sys

import torch
from diffusers import StableDiffusionPipeline

from sfumato.compose import Adapter, compose  # new

base, style, subject, output = sys.argv[1:]
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionPipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True).to(device)
compose(pipe, Adapter(style, 0.7), Adapter(subject, 1.0))  # new
noise = torch.Generator().manual_seed(7)
pipe("a crab", num_inference_steps=25, guidance_scale=7.5, generator=noise).images[0].save(output)  # pocket: 2.5
