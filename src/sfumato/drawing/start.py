"""A picture to begin from, where a drawing does not begin from noise."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real

from PIL import Image

from sfumato.data.images import as_image, as_mask
from sfumato.errors import ConfigError
from sfumato.numerals import pluralize


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
        if self.mask is not None and as_mask(self.mask).getbbox() is None:
            raise ConfigError("the mask is black or transparent all over; it is white where the image is drawn anew.")

    def sized(self, width: int, height: int) -> Start:
        """The same at this size."""
        picture = as_image(self.picture).resize((width, height), Image.Resampling.LANCZOS)
        # Lanczos rings: black beside a white edge would be grey.
        mask = None if self.mask is None else as_mask(self.mask).resize((width, height), Image.Resampling.BILINEAR)
        return Start(picture, self.strength, mask)


def taken_steps(steps: int, start: Start | None) -> int:
    """How many of the sampler's steps an image that begins from `start` takes; all of them from noise."""
    return steps if start is None else int(steps * start.strength)


def check_strength(steps: int, start: Start) -> None:
    """Raises ConfigError where the start's share of the steps is none."""
    if taken_steps(steps, start) < 1:
        raise ConfigError(f"strength {start.strength:g} of {pluralize(steps, 'step')} is no step; give more of either.")
