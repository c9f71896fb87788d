"""Where texts hold phrases."""

import unicodedata

import pytest

from sfumato.models.prompts.syntax import has_phrase


@pytest.mark.parametrize(
    ("phrase", "text", "held", "in_the_plural"),
    [
        ("ring", "a Ring, gold", True, True),
        ("ring", "a string", False, False),
        ("sks cat", "sks category", False, False),
        ("sks cat", "two sks cats", False, True),
        ("zwx", "zwx_style, 1girl", True, True),
        ("zwx", "my_zwx, 1girl", True, True),
        ("<x>", "photo<x>s", True, True),
        ("[a]", "b[a]c", True, True),
        ("é", "café", False, False),
        ("dress", "red dresses", False, True),
        ("강아지", unicodedata.normalize("NFD", "강아지, 사진"), True, True),
        (unicodedata.normalize("NFD", "chaton été"), "un chaton été", True, True),
    ],
)
def test_a_phrase_stands_by_itself(phrase, text, held, in_the_plural):
    assert has_phrase(phrase, text) is held
    assert has_phrase(phrase, text, plural=True) is in_the_plural
