"""An SDXL script for diffusers, and the three lines (marked "new") that mix two LoRAs into its pipeline.

    python examples/sdxl_script.py BASE_FOLDER line.safetensors otter.safetensors crab.png

BASE_FOLDER: a diffusers folder or hub id of SDXL.
"""

import sys

import torch
from diffusers import StableDiffusionXLPipeline

from sfumato.compose import Adapter, compose  # new

base, style, subject, output = sys.argv[1:]
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionXLPipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True).to(device)
mix = compose(pipe, Adapter(style, 0.7), Adapter(subject, 1.0))  # new
noise = torch.Generator().manual_seed(7)
pipe("a crab", num_inference_steps=25, guidance_scale=6.0, generator=noise).images[0].save(output)
mix.undo()  # new: removes both; the pipeline is the base model again, to the byte
