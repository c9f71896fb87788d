"""Numbers as texts, and texts as lines for a person have them."""


def exact(number: float) -> str:
    """The shortest text that is read back as the same number: 7, 0.8, 0.1234567."""
    return repr(float(number)).removesuffix(".0")


def pluralize(count: int, one: str, several: str | None = None) -> str:
    """What there are so many of: "1 picture", "1,200 pictures". several: in the plural, where that is not `one` with an
    s, such as "pictures have" of "picture has"."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def shortened(text: str) -> str:
    """The text, of a long one its beginning: at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."
