"""Numbers as texts, and texts as lines for a person have them."""

from collections.abc import Sequence


def exact(number: float) -> str:
    """The shortest text that is read back as the same number: 7, 0.8, 0.1234567."""
    return repr(float(number)).removesuffix(".0")


def pluralize(count: int, one: str, several: str | None = None) -> str:
    """What there are so many of: "1 picture", "1,200 pictures". several: in the plural, where that is not `one` with an
    s, such as "pictures have" of "picture has"."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"


def lasting(seconds: float) -> str:
    """A time as a person says it: "0.31 s", "42 s", "12 min", "3.4 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s" if seconds >= 9.5 else f"{seconds:.2g} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


def some(names: Sequence[str], most: int = 3) -> str:
    """The first names, and how many more there are: "a, b, c and 2 more"; empty for none."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def shortened(text: str) -> str:
    """The text, of a long one its beginning: at most 60 characters."""
    return text if len(text) <= 60 else f"{text[:57]}..."


def plain(text: str) -> str:
    """A text from a file as one line for a terminal: no control characters, at most 200 letters."""
    shown = "".join(letter if letter.isprintable() else " " for letter in text)
    return shown if len(shown) <= 200 else shown[:197] + "..."
