"""Which layers of a frozen model an adapter changes, by the names of sets of them."""

import re
from collections.abc import Mapping

from torch import nn

from sfumato.errors import AdapterError

_ATTENTION = r"\.attn[12]\.to_(q|k|v|out\.0)$"
_PROJECTIONS = r"\.attentions\.\d+\.proj_(in|out)$"
_MLP = r"\.ff\.net\.(0\.proj|2)$"
# What LyCORIS calls LoCon: all of the blocks, but neither the first and last convolution nor the time embedding, which
# sd-scripts would pass over in silence.
_BLOCKS = r"^(down_blocks|mid_block|up_blocks)\."

TARGETS: Mapping[str, str] = {
    "cross-attention": r"\.attn2\.to_(q|k|v|out\.0)$",
    "attention": _ATTENTION,
    "attention+mlp": rf"{_ATTENTION}|{_MLP}",
    "transformers": rf"{_ATTENTION}|{_MLP}|{_PROJECTIONS}",
    "everything": _BLOCKS,
}
"""Names of sets of U-Net layers, as regular expressions that are searched in a layer's module path. transformers
is what sd-scripts adapts unless told otherwise."""

TEXT_TARGETS = r"\.(q_proj|k_proj|v_proj|out_proj|fc1|fc2)$"
CONV_TARGETS = r"\.(conv1|conv2|conv_shortcut|downsamplers\.0\.conv|upsamplers\.0\.conv)$"


def select(model: nn.Module, pattern: str, *, conv: bool = False) -> dict[str, nn.Linear | nn.Conv2d]:
    """The linear layers and convolutions of `model` whose module path matches `pattern`; with `conv` also its blocks'
    convolutions, whatever the pattern.

    1x1 convolutions count as linear ones, which they are. An empty choice is an AdapterError.
    """
    if not pattern.strip():
        raise AdapterError(f"--targets is empty; give one of {', '.join(TARGETS)}, or a regular expression.")
    expression = TARGETS.get(pattern, pattern)
    try:
        compiled = re.compile(f"(?:{expression})" + (f"|(?:{CONV_TARGETS})" if conv else ""))
    except re.error as error:
        raise AdapterError(
            f"--targets {pattern!r} is neither one of {', '.join(TARGETS)} nor a regular expression ({error})."
        ) from None
    chosen = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and compiled.search(name)
    }
    if not chosen:
        raise AdapterError(
            f"--targets {pattern!r} matches none of the model's layers; use one of {', '.join(TARGETS)} or a "
            r"regular expression over names such as down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q."
        )
    return chosen


def target_layers(
    parts: Mapping[str, nn.Module], targets: str, *, conv: bool = False
) -> dict[str, dict[str, nn.Linear | nn.Conv2d]]:
    """What `attach` adapts of each part: by `targets` and `conv` of the U-Net, all of the text encoders' blocks."""
    return {
        part: select(model, targets, conv=conv) if part == "unet" else select(model, TEXT_TARGETS)
        for part, model in parts.items()
    }
