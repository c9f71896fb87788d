"""Which pipeline is calling a U-Net that several share, as those have it that diffusers' `from_pipe` makes of one.

How a picture is drawn, with which guidance, scheduler and `clip_skip`, is the calling pipeline's to say, and the U-Net
is not told. `sfumato.draw` calls another than it was handed, too, where it begins from a picture.
"""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

from sfumato.compose.match import unwrapped_parts


def calling(pipe: Any) -> Any:
    """The pipeline whose call of this one's U-Net is under way; `pipe` itself where a loop of one's own calls it."""
    unet = unwrapped_parts(pipe)["unet"]
    # No hook of a module tells who calls it, and a pipeline announces its calls to nobody.
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_argcount and code.co_varnames[0] == "self":
            owner = frame.f_locals.get("self")
            theirs = getattr(owner, "unet", None)
            if callable(owner) and hasattr(owner, "scheduler") and getattr(theirs, "_orig_mod", theirs) is unet:
                return owner
        frame = frame.f_back
    return pipe
