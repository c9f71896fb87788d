"""How far two pictures are apart, and one of which a part is to be drawn."""

from typing import Any

import numpy as np
from PIL import Image, ImageDraw


def difference(one: Any, other: Any) -> int:
    """The largest difference between two pictures, in 255ths."""
    return int(np.abs(np.asarray(one, dtype=int) - np.asarray(other, dtype=int)).max())


def picture_with_mask() -> tuple[Image.Image, Image.Image]:
    """A picture of 64 px, and a mask that cuts through cells of the latents at each edge."""
    image, mask = Image.new("RGB", (64, 64), "white"), Image.new("L", (64, 64))
    ImageDraw.Draw(image).ellipse((5, 9, 50, 60), fill="teal")
    ImageDraw.Draw(mask).rectangle((13, 20, 45, 41), fill=255)
    return image, mask
