"""New words: rows beside the table that mean what they were made from, and leave no trace."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.adapters.embeddings import embedding
from sfumato.adapters.embeddings.added_tokens import PARTS
from sfumato.adapters.embeddings.tokens import truncation_notes
from sfumato.errors import AdapterError, ConfigError
from sfumato.models import load_base
from sfumato.precision import decide


def state(base):
    """Everything of a base that knows words: weights, tokenizers, hooks, ends."""
    tensors = [t.clone() for e in base.text_encoders for t in e.state_dict().values()]
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for e in base.text_encoders for m in e.modules()]
    ends = [getattr(getattr(e, "text_model", e), "eos_token_id", None) for e in base.text_encoders]
    vocabulary = [tokenizer.get_vocab() for tokenizer in base.tokenizers]
    return tensors, (list(map(id, base.tokenizers)), hooks, ends, vocabulary)


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_a_word_made_from_a_words_rows_means_that_word(family, bases):
    base = bases(family)
    plain = base.encode_text(["a flamingo, flat style"])
    cut = len(base.tokenizers[0]("flamingo", add_special_tokens=False).input_ids)
    with embedding.new_words(base, ["<x>"], vectors=cut, start="words", initial=["flamingo"]):
        new = base.encode_text(["a <x>, flat style"])
    assert torch.equal(new.hidden, plain.hidden)
    if family == "sdxl":  # pooled at the end of the prompt, not at the token with the highest number
        assert torch.equal(new.pooled, plain.pooled)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_afterwards_nothing_is_left(family, bases):
    base = bases(family)
    text = base.encode_text(["<x> a cat"]).hidden  # first: transformers hooks an encoder when it is first called
    before, rest = state(base)
    with embedding.new_words(base, ["<x>", "zyxo"], vectors=3):
        assert not torch.equal(base.encode_text(["<x> a cat"]).hidden, text)
        assert all(torch.equal(a, b) for a, b in zip(before, state(base)[0], strict=True))
    after, rest_after = state(base)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert rest == rest_after
    assert torch.equal(base.encode_text(["<x> a cat"]).hidden, text)


def test_prompts_without_the_word_are_encoded_as_before(base):
    plain = base.encode_text(["a cat", ""]).hidden
    with embedding.new_words(base, ["<x>"], vectors=4):
        assert torch.equal(base.encode_text(["a cat", ""]).hidden, plain)


def test_words_go_in_any_order(base):
    tokenizer = base.tokenizers[0]
    first = embedding.new_words(base, ["<a>"], start="words", initial=["cat"])
    second = embedding.new_words(base, ["<b>"], vectors=2, start="random", seed=1)
    both = base.encode_text(["<b>"]).hidden
    first.remove()
    assert torch.equal(base.encode_text(["<b>"]).hidden, both)
    with second.disabled():
        assert base.tokenizers[0] is tokenizer
    assert torch.equal(base.encode_text(["<b>"]).hidden, both)
    first.attach()
    assert torch.equal(base.encode_text(["<a>"]).hidden[:, :3], base.encode_text(["cat"]).hidden[:, :3])
    second.remove()
    first.remove()
    assert base.tokenizers[0] is tokenizer


def test_a_placeholder_is_so_many_tokens_wherever_it_stands(base):
    with embedding.new_words(base, ["<otter>", "zyxo"], vectors=3):
        alone = [base.token_count(text) for text in ("<otter>", "<OTTER>", "zyxo", "a <otter>, zyxo")]
        assert alone == [3, 3, 3, 3 + 3 + 2]
        assert base.token_count("zyxoo") < 6  # another word, which only begins so
    with embedding.new_words(base, ["<otter>"]):
        assert base.token_count("<otter>") == 1


def test_only_the_rows_that_a_prompt_uses_get_gradients(base):
    with embedding.new_words(base, ["<a>", "<b>"], vectors=2) as words:
        base.encode_text(["a <b>"], grad=True).hidden.square().sum().backward()
        (gradient,) = [parameter.grad for parameter in words.parameters()]
        assert gradient[:2].abs().sum() == 0
        assert (gradient[2:].abs().sum(dim=1) > 0).all()
    assert not any(p.requires_grad or p.grad is not None for p in base.text_encoders[0].parameters())


def test_rows_without_a_gradient_get_zeros_unless_they_rest(base):
    """A process whose captions held no word sums the same tensors as the others."""
    with embedding.new_words(base, ["<x>"], vectors=2) as words:
        words.zero_missing_gradients()
        assert torch.equal(words.rows[0].grad, torch.zeros_like(words.rows[0]))
        words.rows[0].grad.fill_(3.0)
        words.zero_missing_gradients()
        assert (words.rows[0].grad == 3.0).all()
    with embedding.new_words(base, ["<x>"], vectors=2).requires_grad_(False) as words:
        words.zero_missing_gradients()
        assert words.rows[0].grad is None


def test_where_vectors_start(base):
    table = base.text_encoders[0].get_input_embeddings().weight
    ids = base.tokenizers[0]("red cat", add_special_tokens=False).input_ids
    with embedding.new_words(base, ["<x>"], vectors=3, start="words", initial=["red cat"]) as words:
        assert torch.equal(words.rows[0], table[[*ids, ids[0]]])
    with embedding.new_words(base, ["<x>"], vectors=2, start="mean") as words:
        assert_close(words.rows[0].norm(dim=1), table.norm(dim=1).mean().expand(2))
        assert_close(torch.cosine_similarity(words.rows[0], table.mean(0)[None]), torch.ones(2))
    with embedding.new_words(base, ["<x>"], vectors=2, start="random", seed=5) as words:
        drawn = words.rows[0].detach().clone()
        assert ((table[None] == drawn[:, None]).all(-1).sum(1) == 1).all()
    with embedding.new_words(base, ["<x>"], vectors=2, start="random", seed=6) as words:
        assert not torch.equal(words.rows[0], drawn)


def test_initial_words_that_are_cut_are_told_of(base):
    (line,) = truncation_notes(["red cat", "cat"], 1, base.tokenizers[0])
    assert line.startswith("--initial-words 'red cat': of 2 tokens only these are taken, one a vector: red. ")
    assert truncation_notes(["red cat"], 2, base.tokenizers[0]) == []


def test_one_initial_word_for_each_placeholder(base):
    with embedding.new_words(base, ["<a>", "<b>"], start="words", initial=["cat", "house"]) as words:
        assert [vectors[0][0][0] for vectors in words.nearest(1).values()] == ["cat", "house"]


def test_the_report_tells_of_the_vectors_of_both_encoders(bases):
    with embedding.new_words(bases("sdxl"), ["<a>"], vectors=2, start="words", initial=["red cat"]) as words:
        lines = words.report()
    assert all("; " in line and line.endswith(" of the mean length") for line in lines)
    said = [f"<a> {n} of 2 in {part}: {w} 1.00" for part in PARTS for n, w in ((1, "red"), (2, "cat"))]
    assert [line[: len(text)] for line, text in zip(lines, said, strict=True)] == said


@pytest.mark.parametrize("factor", [100.0, 1e25])  # of the second the squares are infinite
def test_the_scale_is_kept_and_the_direction_too(base, factor):
    norms = base.text_encoders[0].get_input_embeddings().weight.norm(dim=1)
    with embedding.new_words(base, ["<x>"], vectors=3, start="random") as words, torch.no_grad():
        words.rows[0].mul_(torch.tensor([[factor], [1.0], [0.001]]))
        before = words.rows[0].double()
        words.keep_scale()
        after = words.rows[0].double()
        low, high = norms.quantile(0.05), norms.quantile(0.95)
        assert_close(after.norm(dim=1)[[0, 2]], torch.stack([high, low]).double(), rtol=1e-3, atol=0)
        assert_close(torch.cosine_similarity(before, after), torch.ones(3).double())


def test_the_scale_of_words_that_do_not_learn_is_left_alone(base):
    with embedding.new_words(base, ["<x>"], vectors=2) as words, torch.no_grad():
        words.rows[0].mul_(torch.tensor([[100.0], [0.001]]))
        before = words.rows[0].clone()
        words.requires_grad_(False).keep_scale()
        assert torch.equal(words.rows[0], before)


def test_a_prompt_that_does_not_fit_is_refused_with_the_count(base):
    with embedding.new_words(base, ["<x>"], vectors=16) as words:
        words.check(["<x> " * 4, "cat " * 100])
        with pytest.raises(ConfigError, match=r"80 tokens \(<x> has 16\), and 75 are read"):
            words.check(["a <x>", "<x> " * 5])


def test_words_whose_coming_was_interrupted_are_gone(base, monkeypatch):
    def interrupt(self, site, number):
        raise KeyboardInterrupt

    before = base.tokenizers[0].backend_tokenizer.to_str()
    with monkeypatch.context() as broken:
        broken.setattr(embedding.Words, "_hook", interrupt)
        with pytest.raises(KeyboardInterrupt):
            embedding.new_words(base, ["<otter>"], vectors=2)
    assert base.tokenizers[0].backend_tokenizer.to_str() == before
    with embedding.new_words(base, ["<otter>"], vectors=2) as words:
        words.remove()
        words.remove()
    assert base.tokenizers[0].backend_tokenizer.to_str() == before


def test_each_caption_is_encoded_once_and_comes_in_its_place(base, monkeypatch):
    captions = ["a cat", "", "a house", "a cat"]
    wanted = torch.cat([base.encode_text([caption]).hidden for caption in captions])
    seen = []
    encode = base.encode_text
    monkeypatch.setattr(base, "encode_text", lambda prompts, **kw: seen.extend(prompts) or encode(prompts, **kw))
    assert_close(embedding.encode(base, captions).hidden, wanted)
    assert sorted(seen) == ["", "a cat", "a house"]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_no_prompt_is_learned_where_it_is_encoded_and_is_zeros_where_it_is_zeros(family, bases):
    base = bases(family)
    encoder = base.text_encoders[0]
    encoder.requires_grad_(True)
    try:
        text = embedding.encode(base, ["", "a cat", ""], grad=True)
        empty = text.hidden[[0, 2]]
        assert_close(empty, base.unconditional(2).hidden)
        empty.square().sum().backward()
        norms = [p.grad.norm() for p in encoder.parameters() if p.grad is not None]
        assert bool(sum(norms)) is (family == "sd1")
    finally:
        encoder.requires_grad_(False)
        for parameter in encoder.parameters():
            parameter.grad = None


def test_weighted_words_may_be_new_ones(base):
    pytest.importorskip("compel")
    from sfumato.models.prompts.encoding import encode_prompts

    cut = len(base.tokenizers[0]("flamingo", add_special_tokens=False).input_ids)
    plain, _ = encode_prompts(base, ["a (flamingo:1.3), flat style"], "", "a1111")
    with embedding.new_words(base, ["<x>"], vectors=cut, start="words", initial=["flamingo"]):
        new, _ = encode_prompts(base, ["a (<x>:1.3), flat style"], "", "a1111")
    assert torch.equal(new.hidden, plain.hidden)


def test_half_precision_encoders_take_fp32_rows(family_folder):
    base = load_base(str(family_folder("sd1")), precision=decide("bf16", device="cpu"))
    base.text_encoders[0].to(torch.bfloat16)
    with embedding.new_words(base, ["<x>"], vectors=2) as words:
        text = base.encode_text(["<x>"], grad=True).hidden
        text.float().sum().backward()
        assert words.rows[0].dtype == words.rows[0].grad.dtype == torch.float32
        assert text.dtype == torch.bfloat16


ROWS = torch.ones(2, 64)


@pytest.mark.parametrize(
    "vectors",
    [
        {"<x>": {"text_encoder": ROWS[:, :48]}},
        {"<x>": {"text_encoder_2": ROWS}},
        {"<x>": {"text_encoder": ROWS}, "<y>": {"text_encoder": ROWS[:, :48]}},
    ],
)
def test_vectors_that_an_encoder_does_not_take_come_into_no_use_without_a_file_either(vectors, base):
    """They would come into use, and fail at the first prompt with the word."""
    vocabulary = len(base.tokenizers[0])
    with pytest.raises(AdapterError, match=r"^new words: <.> has vectors of width \d+, and .* takes 64"):
        embedding.Words(base, vectors)
    assert len(base.tokenizers[0]) == vocabulary


@pytest.mark.parametrize(
    "vectors",
    [
        {},
        None,
        {"<x>": {}},
        {"<x>": ROWS},
        {"<x>": {"unet": ROWS}},
        {"<x>": {"text_encoder": ROWS[0]}},
        {"<x>": {"text_encoder": ROWS[:0]}},
        {"<x>": {"text_encoder": ROWS * torch.nan}},
        {"<x>": {"text_encoder": [1.0]}},
    ],
)
def test_what_is_no_vectors_comes_into_no_use(vectors, base):
    """Such as a file's words without the label before them."""
    vocabulary = len(base.tokenizers[0])
    with pytest.raises(AdapterError, match=r"wanted \{token: \{part: \(vectors, width\)\}\} with finite numbers"):
        embedding.Words(base, vectors)
    if vectors:
        with pytest.raises(AdapterError, match=r"^line: .*wanted \{token"), embedding.bundled(base, {"line": vectors}):
            pass
    assert len(base.tokenizers[0]) == vocabulary


def test_as_many_vectors_as_are_read_are_enough_and_lengths_are_told_beside_the_mean(base):
    with embedding.new_words(base, ["<x>"], vectors=15) as words:
        words.check(["<x> " * 5])
    with embedding.new_words(base, ["<x>"], start="mean") as words:
        assert words.report()[0].endswith("; 1.00 of the mean length")
