"""What a card says of the kind of an adapter: its name, and which programs read it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sfumato import shell

if TYPE_CHECKING:
    from sfumato.files import Description

_TITLES = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr"}


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
    wrong = "draws with the LoRA alone, without its lengths," if config.get("algo") == "lora" else "refuses it"
    base = shell.quote(about.base)
    baked = (
        f"sfumato convert {shell.quote(file)} --bake lora --keep-energy 0.99 --base {base} --output NAME.safetensors"
    )
    return (
        f"ComfyUI, AUTOMATIC1111, Forge and InvokeAI read the file as it is. diffusers {wrong} and sd-scripts does not "
        f"know the kind: for these `{baked}` writes a LoRA."
    )
