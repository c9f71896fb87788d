"""How the pictures of one source are learned from: crops, mirror images, captions as they vary, weight."""

from dataclasses import dataclass, fields, replace
from typing import Literal

from sfumato.errors import ConfigError

CropMode = Literal["center", "random", "pad"]
MaskSource = Literal["none", "alpha", "files"]
CROP_MODES: tuple[CropMode, ...] = ("center", "random", "pad")


@dataclass(frozen=True)
class Options:
    """Of one picture or a whole source; a field that is None is as `prepare` was told.

    flip: mirror half of the samples. crop: the bucket's shape from the centre, from anywhere along the longer side, or
    the whole picture with white beside it, which the loss does not see. caption_dropout: share of samples without a
    caption. shuffle_tags: the parts of a caption between separators in another order each time, all but the first
    keep_tags; tag_dropout: the share of those parts that is left out. weight: of a sample in the loss.
    """

    flip: bool | None = None
    crop: CropMode | None = None
    caption_dropout: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    tag_dropout: float | None = None
    separator: str = ","
    weight: float = 1.0

    def check(self, where: str = "") -> None:
        """Raises ConfigError for a value that makes no sense. where: put before the message."""
        for name in ("caption_dropout", "tag_dropout"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ConfigError(f"{where}{name.replace('_', ' ')} is {value}; it must be 0 to 1.")
        if self.crop is not None and self.crop not in CROP_MODES:
            raise ConfigError(f"{where}crop is {self.crop!r}; wanted one of {', '.join(CROP_MODES)}.")
        if self.keep_tags is not None and self.keep_tags < 0:
            raise ConfigError(f"{where}keep_tags is {self.keep_tags}; it must not be negative.")
        if not 0 < self.weight <= 100:
            raise ConfigError(f"{where}weight is {self.weight}; it must be above 0 and at most 100.")
        if not self.separator.strip():
            raise ConfigError(f"{where}separator is {self.separator!r}; wanted a character such as a comma.")

    def over(self, defaults: "Options") -> "Options":
        """These options, with what is unset taken from `defaults`."""
        unset = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in unset})

    @property
    def varies_caption(self) -> bool:
        """Whether one caption may come in several forms."""
        return bool(self.shuffle_tags or self.tag_dropout)
