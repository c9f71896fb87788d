"""An img2img script for diffusers, and the three lines (marked "new") that mix two LoRAs into its pipeline.

    python examples/img2img_script.py BASE_FOLDER line.safetensors otter.safetensors photo.png out.png

BASE_FOLDER: a diffusers folder or hub id of SD 1.x or 2.x, or sfumato's pocket base
(src/sfumato/models/pocket in a clone).
"""

import sys

import torch
from diffusers import StableDiffusionImg2ImgPipeline
from PIL import Image

from sfumato.compose import Adapter, compose  # new

base, style, subject, photo, output = sys.argv[1:]
device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
pipe = StableDiffusionImg2ImgPipeline.from_pretrained(base, torch_dtype=dtype, use_safetensors=True).to(device)
mix = compose(pipe, Adapter(style, 0.7), Adapter(subject, 1.0))  # new
noise = torch.Generator().manual_seed(7)
picture = Image.open(photo).convert("RGB").resize((pipe.unet.config.sample_size * pipe.vae_scale_factor,) * 2)
pipe("a crab", image=picture, strength=0.6, num_inference_steps=25, generator=noise).images[0].save(output)
mix.undo()  # new: removes both; the pipeline is the base model again, to the byte
