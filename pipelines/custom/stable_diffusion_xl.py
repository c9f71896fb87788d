"""SDXL whose prompts name adapters.

    pipe = DiffusionPipeline.from_pretrained(
        BASE, custom_pipeline="pipelines/custom/stable_diffusion_xl.py", trust_remote_code=True
    )
    pipe("a crab <lora:line:0.8> <lora:otter:0.6>")

is an existing script and one argument more; see stable_diffusion.py beside this.
"""

from diffusers import StableDiffusionXLPipeline

from sfumato.drawing.tagged import TaggedPrompts


class MixingStableDiffusionXLPipeline(TaggedPrompts, StableDiffusionXLPipeline):
    """StableDiffusionXLPipeline with adapters by tag."""
