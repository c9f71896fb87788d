"""One image of a call that generates several. Imports no torch.

Sizes of images in pixels, as pipelines take them.

A second pass in which a picture is drawn again, larger: the web interfaces' hires fix.

A picture to begin from, where a drawing does not begin from noise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from numbers import Real
from typing import Any

from PIL import Image

from sfumato.adapters.weights import Weight
from sfumato.data.images import convert_image, convert_mask
from sfumato.errors import ConfigError
from sfumato.utils.formatting import pluralize


@dataclass(frozen=True)
class PictureRequest:
    """One image that is asked for. prompt: without its tags. tag_weights: weights of all adapters by label, if the
    prompt has tags. overrides: settings of this image that differ from the others', by name."""

    prompt: str
    seed: int
    tag_weights: Mapping[str, Weight] | None
    overrides: Mapping[str, Any]


def round_side(px: float) -> int:
    """The side in pixels nearest to `px` that pipelines take, a multiple of 8."""
    return max(8, round(px / 8) * 8)


def size_like(size: tuple[int, int], side: int) -> tuple[int, int]:
    """(width, height) in multiples of 8 with the proportions of `size`, and about the pixels of a square of `side`."""
    stretch = math.sqrt(size[0] / size[1])
    return round_side(side * stretch), round_side(side / stretch)


UPSCALER = "Lanczos"
"""What enlarges the pixels between the passes, as A1111 calls it."""
_LARGEST_SCALE = 8


@dataclass(frozen=True)
class Hires:
    """An image is generated at its size, enlarged, and partly redrawn from there, as by A1111's hires fix.

    A base model that is asked for a size far above its training's repeats things; this way the composition is of the
    small size, and the second pass adds detail. scale: above 1, at most 8, what both sides are multiplied by. strength:
    in (0, 1], how much the second pass redraws (denoising strength). steps: so many are taken by the second pass;
    unset, as many as by the first. Raises ConfigError.
    """

    scale: float = 2.0
    strength: float = 0.4
    steps: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.scale, Real) or not 1 < self.scale <= _LARGEST_SCALE:
            raise ConfigError(f"scale {self.scale!r:.40}: wanted above 1 and at most {_LARGEST_SCALE}; 2 is usual.")
        if not isinstance(self.strength, Real) or not 0 < self.strength <= 1:
            raise ConfigError(f"strength {self.strength!r:.40}: wanted above 0 and at most 1; 0.4 is usual.")
        if self.steps is not None and (not isinstance(self.steps, int) or self.steps < 1):
            raise ConfigError(f"steps {self.steps!r:.40}: wanted a whole number, at least 1.")

    def size(self, width: int, height: int) -> tuple[int, int]:
        """(width, height) in pixels after the second pass, multiples of 8."""
        return round_side(width * self.scale), round_side(height * self.scale)

    def taken_steps(self, steps: int) -> int:
        """How many steps the second pass takes after a first of so many."""
        return self.steps or steps

    def scheduled_steps(self, steps: int) -> int:
        """How many steps the sampler is set to, so that the second pass takes as many of them as it is to take."""
        wanted = self.taken_steps(steps)
        count = max(wanted, ceil(wanted / self.strength) - 1)  # the quotient may be a last bit too large
        while int(count * self.strength) < wanted:
            count += 1
        return count

    def told(self, steps: int) -> dict[str, Any]:
        """What a picture's settings say of the second pass after a first of so many steps."""
        return {"scale": self.scale, "strength": self.strength, "steps": self.taken_steps(steps)}


@dataclass(frozen=True)
class Start:
    """An image to start from instead of noise (img2img; SDEdit, Meng et al. 2022).

    strength: in (0, 1], the share of the steps that is used; 1 keeps nothing of the image. mask: white is redrawn,
    black keeps the image's exact pixels. Both are read as files are, upright and in 8 bits, the image in sRGB on white,
    and resized to the size of the result. Raises ConfigError, or DataError for pixels whose white is unknown.
    """

    picture: Image.Image
    strength: float = 0.6
    mask: Image.Image | None = None

    def __post_init__(self) -> None:
        for what, picture in {"picture": self.picture, "mask": self.mask}.items():
            if not isinstance(picture, Image.Image) and (picture is not None or what == "picture"):
                kind = type(picture).__name__
                raise ConfigError(f"a start's {what} that is a {kind}; wanted a PIL image, as Image.open gives it.")
        if not isinstance(self.strength, Real) or not 0 < self.strength <= 1:
            raise ConfigError(f"strength {self.strength!r:.40}: wanted above 0 and at most 1; 0.6 is usual.")
        if self.mask is not None and convert_mask(self.mask).getbbox() is None:
            raise ConfigError("the mask is black or transparent all over; it is white where the image is drawn anew.")

    def sized(self, width: int, height: int) -> Start:
        """The same at this size."""
        picture = convert_image(self.picture).resize((width, height), Image.Resampling.LANCZOS)
        # Lanczos rings: black beside a white edge would be grey.
        mask = None if self.mask is None else convert_mask(self.mask).resize((width, height), Image.Resampling.BILINEAR)
        return Start(picture, self.strength, mask)


def img2img_steps(steps: int, start: Start | None) -> int:
    """How many of the sampler's steps an image that begins from `start` takes; all of them from noise."""
    return steps if start is None else int(steps * start.strength)


def check_strength(steps: int, start: Start) -> None:
    """Raises ConfigError where the start's share of the steps is none."""
    if img2img_steps(steps, start) < 1:
        raise ConfigError(f"strength {start.strength:g} of {pluralize(steps, 'step')} is no step; give more of either.")
