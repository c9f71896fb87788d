"""The tokenizer that pre-training learns from its captions."""

from sfumato.training.pretrain.model import build_tokenizer

CAPTIONS = [
    f"{thing}, {style} style" for thing in ("red apple", "crab", "sea crab", "café") for style in ("flat", "noto")
]


def test_the_same_captions_give_the_same_tokenizer():
    """Its learner breaks ties by numbers that it gives out in no fixed order, were they not given beforehand."""
    first, *others = [build_tokenizer(CAPTIONS).get_vocab() for _ in range(4)]
    assert all(other == first for other in others)


def test_what_it_learned_from_is_a_token_a_word():
    tokenizer = build_tokenizer(CAPTIONS)
    assert tokenizer.tokenize("red apple, noto style") == ["red</w>", "apple</w>", ",</w>", "noto</w>", "style</w>"]
    assert tokenizer.decode(tokenizer("a zebra café", add_special_tokens=False).input_ids).strip() == "a zebra café"
