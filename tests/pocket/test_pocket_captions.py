"""What is said of a picture while the pocket base learns."""

import pytest
import torch
from torch.testing import assert_close

from sfumato import load_base
from sfumato.training.pretrain.dataset import all_captions, caption, other_caption, read_manifest, read_words
from sfumato.training.pretrain.text import encode_text
from tests.tiny import CPU

SHARES = {"empty_share": 0.1, "group_share": 0.06, "plain_share": 0.25}


@pytest.mark.parametrize(
    ("draw", "form", "text"),
    [
        (0.05, 0.2, ""),
        (0.12, 0.2, "a fruit, noto style"),
        (0.12, 0.7, "a fruit"),
        (0.5, 0.2, "red apple, noto style"),
        (0.5, 0.6, "a noto style picture of a red apple"),
        (0.5, 0.9, "red apple"),
    ],
)
def test_captions(draw, form, text):
    assert caption("red apple", "noto", "a fruit", draw=draw, form=form, **SHARES) == text


def test_fewer_captions_are_plain_on_request():
    told = {"draw": 0.5, **SHARES, "plain_share": 0.1}
    forms = {form: caption("crab", "flat", "an animal", form=form, **told) for form in (0.55, 0.65, 0.89, 0.91)}
    styled = "a flat style picture of a crab"
    assert forms == {0.55: "crab, flat style", 0.65: styled, 0.89: styled, 0.91: "crab"}


@pytest.mark.parametrize(
    ("draw", "form", "text"), [(0.05, 0.2, ""), (0.5, 0.2, "noto style"), (0.5, 0.6, "red heart, noto style")]
)
def test_captions_of_what_the_base_is_not_asked_for(draw, form, text):
    assert other_caption("red heart", "noto", draw=draw, form=form, empty_share=0.1) == text


def test_each_text_is_encoded_by_itself_whatever_is_beside_it(pocket_folder):
    base = load_base(pocket_folder, precision=CPU)
    texts = ["key", "a crab", "key", "", "red apple " * 100]
    together = encode_text(base.text_encoders[0], base.tokenizers[0], texts, CPU.device)
    for text, found in zip(texts, together, strict=True):
        assert_close(found, encode_text(base.text_encoders[0], base.tokenizers[0], [text], CPU.device)[0])
    assert not torch.allclose(together[0], together[1])


def test_the_tokenizer_learns_from_every_caption_and_the_words(data):
    texts = all_captions(read_manifest(data), read_words(data))
    assert {"red apple, noto style", "a flat style picture of a sea animal", "picture", "of"} <= set(texts)
