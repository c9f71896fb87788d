"""What a card says of the kind of an adapter: its name, and which programs read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato import shell

if TYPE_CHECKING:
    from sfumato.files import Description

_TITLES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "oft": "OFT"}


def is_plain_lora(about: Description) -> bool:
    """Whether it is a LoRA without magnitudes, which all programs read."""
    config = about.config or {}
    return config.get("algo", "lora") == "lora" and not config.get("dora")


def title_of(about: Description) -> str:
    """Its name, as in "A LoKr with weight decomposition (DoRA) for ..."."""
    config = about.config or {}
    title = _TITLES[config.get("algo", "lora")]
    return f"{title} with weight decomposition (DoRA)" if config.get("dora") else title


def readers_of(about: Description, file: str) -> str:
    """Which other programs read a file that is no plain LoRA, and what to do for those that do not."""
    config = about.config or {}
    algo, dora = config.get("algo", "lora"), bool(config.get("dora"))
    diffusers = "draws with the LoRA alone, without its lengths" if algo == "lora" else "refuses it"
    first, invoke = "ComfyUI, AUTOMATIC1111, Forge and InvokeAI", ""
    if dora and algo != "lora":  # InvokeAI takes whatever has lengths for a LoRA
        first, invoke = "ComfyUI, AUTOMATIC1111 and Forge", ", InvokeAI refuses it"
    elif algo == "lokr" and about.family != "sdxl":  # it looks for the text's width in a whole factor
        first, invoke = (
            "ComfyUI, AUTOMATIC1111 and Forge",
            ", InvokeAI recognises it only if its large factors are whole",
        )
    elif algo == "oft":
        first = "ComfyUI (which counts any weight but 1 twice) and AUTOMATIC1111"
        invoke = ", Forge leaves it out, InvokeAI refuses it"
    base = shell.quote(about.base)
    baked = (
        f"sfumato convert {shell.quote(file)} --bake lora --keep-energy 0.99 --base {base} --output NAME.safetensors"
    )
    return (
        f"{first} read the file as it is. diffusers {diffusers}{invoke}, and sd-scripts does not know the kind: for "
        f"these `{baked}` writes a LoRA."
    )
