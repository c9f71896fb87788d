"""Where a text holds a phrase: a trigger, a subject's words, the words that a placeholder takes the place of.

Importing this loads no torch.
"""

from __future__ import annotations

import re
import unicodedata

_BEFORE, _AFTER = r"(?<![^\W_])", r"(?![^\W_])"
"""No letter or digit beside it. An underscore parts words, as CLIP's tokenizer has it: "zwx" is in "zwx_style"."""


def whole(phrase: str, *, plural: bool = False) -> str:
    """The regular expression of a phrase that stands by itself: "ring" is not in "string". For `re.IGNORECASE`.

    plural: also in "rings", of which it matches what the phrase has.
    """
    before = _BEFORE if phrase[:1].isalnum() else ""
    after = _AFTER if phrase[-1:].isalnum() else ""
    return f"{before}{re.escape(phrase)}" + (f"(?=(?:e?s)?{after})" if plural and after else after)


def has_phrase(phrase: str, text: str, *, plural: bool = False) -> bool:
    """Whether the text holds the phrase, in small letters or capitals; plural: as of `whole`."""
    # macOS writes accents in names of files apart from their letters, and the tokenizer joins them.
    phrase, text = (unicodedata.normalize("NFC", each) for each in (phrase, text))
    return re.search(whole(phrase, plural=plural), text, re.IGNORECASE) is not None
