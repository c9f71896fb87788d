"""The negative prompt that a subject's file asks for: the subject's own words.

Classifier-free guidance (Ho & Salimans 2022, eq. 6) multiplies what the prompt has and the negative prompt has not.
Where the subject is in both, it multiplies what is said beside the subject, such as a style, and not the subject, which
was learned in the styles that its pictures have. Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from sfumato.prompts.phrases import whole
from sfumato.prompts.syntax import Syntax, escaped


def negative_for(prompt: str, asked: Iterable[str], syntax: Syntax = "plain") -> str:
    """The texts, out of those that files ask for, that the prompt holds beside other words; separated by commas, or "".

    Upper and lower case are alike. syntax: how the prompt is written, and what is returned.
    """
    texts = (escaped(text) if syntax == "a1111" else text for text in asked)
    return ", ".join(text for text in dict.fromkeys(texts) if text and _is_beside(text, prompt))


def _is_beside(text: str, prompt: str) -> bool:
    rest, count = re.subn(whole(text), "", prompt, flags=re.IGNORECASE)
    # Articles say nothing, nor do weights: "an (otter:1.3)" under "otter" would be drawn without any guidance.
    words = [word for word in re.findall(r"\w+", rest) if re.search(r"[^\W\d_]", word) and word != "BREAK"]
    return count > 0 and any(word.lower() not in ("a", "an", "the") for word in words)
