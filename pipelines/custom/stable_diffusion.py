"""Stable Diffusion 1.x and 2.x (and pocket) with prompts that name adapters.

    pipe = DiffusionPipeline.from_pretrained(
        BASE, custom_pipeline="pipelines/custom/stable_diffusion.py", trust_remote_code=True
    )
    pipe("a crab <lora:line:0.8> <lora:otter:0.6>")

An existing script needs only the argument custom_pipeline; new versions of diffusers want trust_remote_code as well
before they run a local file. MixingStableDiffusionPipeline.from_pretrained(BASE), imported from
sfumato.pipelines.custom.stable_diffusion, needs neither. The prompts of one call may name different adapters.
`pipe.lora_folder` says where the adapters are. A call also takes `adapters={FILE: 0.8}`, and leaves the weights as they
were.
"""

from diffusers import StableDiffusionPipeline

from sfumato.generation.prompt_adapters import TaggedPrompts


class MixingStableDiffusionPipeline(TaggedPrompts, StableDiffusionPipeline):
    """StableDiffusionPipeline with adapters by tag."""
