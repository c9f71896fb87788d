"""A base's tokenizer as it came, whatever new words it knows at present."""

from typing import Any


def plain_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer without the new words that it knows at present (`sfumato.words.known` puts the plain one aside)."""
    return getattr(tokenizer, "_sfumato_plain", (tokenizer,))[0]
