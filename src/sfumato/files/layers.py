"""The layers of a model by name, as tables and pictures show them. Imports no torch."""

from __future__ import annotations

from sfumato.files.kohya import Target


def block_of(target: Target) -> str:
    """The attention, resnet or text layer that a module is in."""
    part, path = target
    names = path.removeprefix("text_model.").split(".")
    if part != "unet":
        return f"{part}.{names[2]}" if names[:2] == ["encoder", "layers"] else f"{part}.{names[0]}"
    if names[0] in ("down_blocks", "up_blocks"):
        return ".".join(names[:4])
    return ".".join(names[:3]) if names[0] == "mid_block" else names[0]


def target_name(target: Target) -> str:
    """ "unet attn2.to_k" and the like: what is changed, whichever block it is in."""
    part, path = target
    names = path.split(".")
    for mark in ("attn1", "attn2", "ff", "self_attn", "mlp"):
        if mark in names:
            return f"{part} {'.'.join(names[names.index(mark) :])}"
    return f"{part} {names[-1] if len(names) > 2 else path}"


def block_order(name: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """What sorts the names that `block_of` gives in the order of the model."""
    starts = ("text_encoder.", "text_encoder_2.", "conv_in", "time_", "add_", "down_blocks", "mid_block", "up_blocks")
    place = next((i for i, start in enumerate(starts) if name.startswith(start)), len(starts))
    return place, [(not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]
