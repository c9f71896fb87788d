"""How the images of one source are trained on: crops, mirror images, changes to captions, weight."""

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from sfumato.errors import ConfigError

CropMode = Literal["center", "random", "pad"]
MaskSource = Literal["none", "alpha", "files"]
CROP_MODES: tuple[CropMode, ...] = ("center", "random", "pad")


@dataclass(frozen=True)
class Options:
    """Options of one image or of a whole source. A field that is None takes the value that `prepare` was given.

    flip: mirror half of the samples. crop: cut the bucket's shape from the center, or from any place along the longer
    side, or keep the whole image with white beside it that the loss ignores. caption_dropout: share of samples without
    a caption. shuffle_tags: shuffle the parts of a caption between separators for each sample, except the first
    keep_tags. tag_dropout: share of those parts to leave out. keep_tags_separator: where a caption has it, the tags
    before it stay in front instead, and those after a second one at the end. weight: weight of a sample in the loss.
    resolution: side in pixels of the square with as many pixels as the image gets.
    wildcards: {a|b} in a caption is one of its alternatives. secondary_separator: parts tags within one that is
    shuffled and dropped as a whole; "" for none.
    """

    flip: bool | None = None
    crop: CropMode | None = None
    caption_dropout: float | None = None
    shuffle_tags: bool | None = None
    keep_tags: int | None = None
    tag_dropout: float | None = None
    separator: str = ","
    keep_tags_separator: str = field(default="|||", repr=False)  # what is learned has `Example.kept_tags` instead
    weight: float = 1.0
    resolution: int | None = field(default=None, repr=False)  # what is learned has the crop instead
    # Not in the text of which the fingerprint is made: without them it stays what it was, else they are added there.
    wildcards: bool | None = field(default=None, repr=False)
    secondary_separator: str = field(default="", repr=False)

    def check(self, where: str = "") -> None:
        """Raise ConfigError for a value that makes no sense. where: text to put before the message."""
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
        if not self.keep_tags_separator.strip() or self.keep_tags_separator.strip() == self.separator.strip():
            raise ConfigError(
                f"{where}keep_tags_separator is {self.keep_tags_separator!r}; wanted what parts no tags, such as '|||'."
            )
        marks = (self.separator.strip(), self.keep_tags_separator.strip())
        second = self.secondary_separator
        if second and (not second.strip() or any(mark in second for mark in marks)):
            raise ConfigError(f"{where}secondary_separator is {second!r}; wanted what parts no tags, such as ';;;'.")

    def over(self, defaults: "Options") -> "Options":
        """These options, with unset ones taken from `defaults`."""
        unset = [field.name for field in fields(self) if getattr(self, field.name) is None]
        return replace(self, **{name: getattr(defaults, name) for name in unset})

    @property
    def varies_caption(self) -> bool:
        """Whether one caption may come in several forms."""
        return bool(self.shuffle_tags or self.tag_dropout)
