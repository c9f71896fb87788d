"""SDXL with prompts that name adapters.

    pipe = DiffusionPipeline.from_pretrained(
        BASE, custom_pipeline="pipelines/custom/stable_diffusion_xl.py", trust_remote_code=True
    )
    pipe("a crab <lora:line:0.8> <lora:otter:0.6>")

An existing script needs only the argument custom_pipeline; see stable_diffusion.py beside this file.
"""

from diffusers import StableDiffusionXLPipeline

from sfumato.generation.prompt_adapters import TaggedPrompts


class MixingStableDiffusionXLPipeline(TaggedPrompts, StableDiffusionXLPipeline):
    """StableDiffusionXLPipeline with adapters by tag."""
