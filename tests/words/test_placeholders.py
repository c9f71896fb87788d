"""How a new word may be spelt, and where the tokenizer finds it."""

import copy

import pytest
import torch

from sfumato.adapters.embeddings import embedding
from sfumato.adapters.embeddings.added_tokens import _extend
from sfumato.adapters.embeddings.tokens import (
    contains_placeholder,
    placeholder_warnings,
    readable_token,
    subword_pieces,
)
from sfumato.errors import ConfigError
from sfumato.files import write_tensors
from sfumato.models.vocabulary import clip_tokenizer


@pytest.mark.parametrize(
    ("placeholders", "said"),
    [
        (["cat"], "is a word already"),
        (["two words"], "without spaces"),
        ([""], "without spaces"),
        ([], "none"),
        (["<a>", "<A>"], "each of its own"),
        (["<a>", "<a>b"], "within it"),
        (["<|endoftext|>"], "is a word already"),
        (["hou"], "is a piece that the tokenizer begins other words with .*; write <hou>"),
        (["__metadata__"], "its header by that name"),
        (["<lora:x>"], "prompts read that as an adapter's tag; write <lora-x> or so"),
        (["<hypernet:x>"], "prompts read that as an adapter's tag; write <hypernet-x> or so"),
    ],
)
def test_placeholders_that_cannot_be_are_refused(placeholders, said, base):
    tokenizer = base.tokenizers[0]
    with pytest.raises(ConfigError, match=said):
        embedding.new_words(base, placeholders)
    assert base.tokenizers[0] is tokenizer


@pytest.mark.parametrize(
    ("placeholders", "options", "said"),
    [
        ("<otter>", {}, "placeholders '<otter>': wanted a list of texts"),
        (None, {}, "placeholders None: wanted"),
        (["<otter>"], {"start": "words", "initial": "toy"}, "initial 'toy': wanted a list of texts"),
        (["<otter>"], {"start": "word"}, "start 'word': wanted one of words, random, mean"),
        (["<otter>"], {"vectors": "2"}, "'2' vectors for a placeholder; wanted 1 to 16"),
    ],
)
def test_what_is_no_list_number_or_start_is_one_line(placeholders, options, said, base):
    with pytest.raises(ConfigError, match=said):
        embedding.new_words(base, placeholders, **options)


def test_several_vectors_want_the_spelling_of_the_tokenizer_by_which_diffusers_finds_them(base):
    with pytest.raises(ConfigError, match=r"placeholder <Otter>: the tokenizer reads <otter>, .*; write <otter>\."):
        embedding.new_words(base, ["<Otter>"], vectors=2)
    with embedding.new_words(base, ["<Otter>"]) as words:
        assert words.tokens == {"<Otter>": 1}


def test_a_word_in_use_cannot_be_made_again(base):
    for vectors in (1, 2):
        with (
            embedding.new_words(base, ["<x>"], vectors=vectors),
            pytest.raises(ConfigError, match="is a word already"),
        ):
            embedding.new_words(base, ["<X>"])


def test_a_placeholder_spelt_like_a_word_is_warned_of(base):
    assert r"wants \[v\];" in placeholder_warnings(["[v]"], base.tokenizers[0])[0]
    (line,) = placeholder_warnings(["<otter>", "zyxo"], base.tokenizers[0])
    assert line.startswith("zyxo is spelt like a word, which the tokenizer cuts into")
    assert " ".join(subword_pieces("zyxo", base.tokenizers[0])) in line


@pytest.mark.parametrize(
    ("token", "text", "held"),
    [
        ("totor", "a Totor, red", True),
        ("totor", "a photograph of Totoro", False),
        ("<x>", "a<X>b", True),
        ("\u00e9tudo", "E\u0301TUDO", True),
    ],
)
@pytest.mark.parametrize("vectors", [1, 2])
def test_a_text_holds_a_word_where_the_tokenizer_finds_it(vectors, token, text, held, base):
    assert contains_placeholder(token, text) is held
    with embedding.new_words(base, [token], vectors=vectors) as words:
        ids = torch.tensor(base.tokenizers[0](text).input_ids)
    assert bool((ids >= words.first[0]).any()) is held


def test_a_tokenizer_that_takes_a_word_for_its_own_is_noticed(base):
    with pytest.raises(ConfigError, match="took 0 new tokens for it, not 1"):
        _extend(copy.deepcopy(base.tokenizers[0]), {"hou": 1})


@pytest.mark.parametrize(
    ("loaded", "refused"),
    [
        ({"style-a": 2}, {"style-a-b": 2}),  # one within the other
        ({"style-a-b": 1}, {"style-a": 2}),
        ({"zyx_1": 1}, {"zyx": 2}),  # of which it would be a vector
        ({"zyx_1": 1}, {"zyx": 1}),  # as diffusers reads it
        ({"zyx": 1}, {"zyx_1": 1}),
        ({}, {"<Q>": 1, "<q>": 1}),
    ],
)
def test_words_that_are_not_told_apart_are_refused(loaded, refused, base, tmp_path):
    tensors = [{token: torch.randn(n, 64) for token, n in words.items()} for words in (loaded, refused)]
    size = len(base.tokenizers[0])
    if loaded:
        words = embedding.load(base, write_tensors(tmp_path / "loaded.safetensors", tensors[0]))
    with pytest.raises(ConfigError, match=r"refused.safetensors: .* is not told from"):
        embedding.load(base, write_tensors(tmp_path / "refused.safetensors", tensors[1]))
    if loaded:
        words.remove()
    assert len(base.tokenizers[0]) == size


def test_words_beside_each_other_are_told_apart(base, tmp_path):
    sizes = {"zyxo": 2, "zyxoo": 2, "bad-1": 1, "bad-12": 1}
    path = write_tensors(tmp_path / "a.safetensors", {token: torch.randn(n, 64) for token, n in sizes.items()})
    with embedding.load(base, path):
        assert {token: base.token_count(token) for token in sizes} == sizes


@pytest.mark.parametrize("vectors", [1, 2])
def test_accents_may_be_composed_or_not(vectors, base, tmp_path):
    """A Mac's file names have them apart."""
    path = write_tensors(tmp_path / "a.safetensors", {"emb_params": torch.randn(vectors, 64)})
    with embedding.load(base, path, token="e\u0301tudo"):
        assert [base.token_count(text) for text in ("\u00e9tudo", "e\u0301tudo", "\u00c9TUDO")] == [vectors] * 3


def test_tokens_are_told_in_their_letters():
    """CLIP's vocabulary has a letter for each byte; what is a part of a character has no other."""
    tokenizer = clip_tokenizer(pad_token="!", positions=77)
    skull, part = tokenizer("☠️").input_ids[1], tokenizer("\U0001f9ff").input_ids[1]
    assert readable_token(tokenizer, skull) == "☠️"
    assert readable_token(tokenizer, part) == f"{tokenizer.convert_ids_to_tokens(part)}-"
    assert [readable_token(tokenizer, tokenizer.get_vocab()[token]) for token in ("cat</w>", "cat")] == ["cat", "cat-"]
