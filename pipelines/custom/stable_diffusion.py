"""Stable Diffusion 1.x and 2.x (and pocket) whose prompts name adapters.

    pipe = DiffusionPipeline.from_pretrained(
        BASE, custom_pipeline="pipelines/custom/stable_diffusion.py", trust_remote_code=True
    )
    pipe("a crab <lora:line:0.8> <lora:otter:0.6>")

is an existing script and one argument more (new versions of diffusers ask for the second before they run a local file;
MixingStableDiffusionPipeline.from_pretrained(BASE), imported from sfumato.pipelines.custom.stable_diffusion, asks for
none). Prompts of one call may name different adapters. `pipe.lora_folder` says where the adapters are; a call takes
`adapters={FILE: 0.8}`, too, and leaves the weights as they were.
"""

from diffusers import StableDiffusionPipeline

from sfumato.drawing.tagged import TaggedPrompts


class MixingStableDiffusionPipeline(TaggedPrompts, StableDiffusionPipeline):
    """StableDiffusionPipeline with adapters by tag."""
