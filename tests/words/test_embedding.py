"""New words: rows beside the table that mean what they were made from, and leave no trace."""

import copy
from functools import cache
from pathlib import Path
from unicodedata import normalize

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sfumato.bases import load_base
from sfumato.bases.vocabulary import clip_tokenizer
from sfumato.cards.words import write_embedding_card
from sfumato.data.folder import Example, ExampleSet
from sfumato.data.placeholder_captions import insert_placeholders
from sfumato.errors import AdapterError, ConfigError, DataError, FileError
from sfumato.files import read_embedding, read_header, write_tensors
from sfumato.files.metadata import Description
from sfumato.files.write_embedding import write_embedding
from sfumato.precision import decide
from sfumato.words import embedding
from sfumato.words.known import PARTS, _extend
from sfumato.words.placeholders import holds, pieces, readable_token, truncation_notes, warnings_of
from tests.tiny import CPU, tiny_pipeline


@pytest.fixture(scope="module")
def bases(family_folder):
    """By name of a family, a tiny base of it."""
    return cache(lambda family: load_base(str(family_folder(family)), precision=CPU))


@pytest.fixture
def base(bases):
    return bases("sd1")


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


def test_what_is_no_file_and_no_words_is_one_line(base):
    with pytest.raises(FileError, match="a file is named by its path, a text, got a NoneType"):
        embedding.load(base, None)
    with pytest.raises(ConfigError, match="wanted new words by label"):
        embedding.bundled(base, None).__enter__()


def test_several_vectors_want_the_spelling_of_the_tokenizer_by_which_diffusers_finds_them(base):
    with pytest.raises(ConfigError, match=r"placeholder <Otter>: the tokenizer reads <otter>, .*; write <otter>\."):
        embedding.new_words(base, ["<Otter>"], vectors=2)
    with embedding.new_words(base, ["<Otter>"]) as words:
        assert words.tokens == {"<Otter>": 1}


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


def test_a_word_in_use_cannot_be_made_again(base):
    for vectors in (1, 2):
        with (
            embedding.new_words(base, ["<x>"], vectors=vectors),
            pytest.raises(ConfigError, match="is a word already"),
        ):
            embedding.new_words(base, ["<X>"])


def test_a_file_that_is_loaded_twice_says_so_and_another_file_of_the_word_does_not(base, tmp_path):
    """A notebook's cell that runs again gives a word no other name."""
    same, other = (write_embedding(tmp_path / f"{n}.safetensors", "<x>", {"text_encoder": torch.full((1, 64), n)})
                   for n in (0.1, 0.2))  # fmt: skip
    with embedding.load(base, same):
        with pytest.raises(ConfigError, match=r"^0\.1\.safetensors: prompts know <x> already, with these vectors"):
            embedding.load(base, same)
        with pytest.raises(ConfigError, match="is a word already"):
            embedding.load(base, other)
    embedding.load(base, same).remove()


def test_a_placeholder_spelt_like_a_word_is_warned_of(base):
    assert r"wants \[v\];" in warnings_of(["[v]"], base.tokenizers[0])[0]
    (line,) = warnings_of(["<otter>", "zyxo"], base.tokenizers[0])
    assert line.startswith("zyxo is spelt like a word, which the tokenizer cuts into")
    assert " ".join(pieces("zyxo", base.tokenizers[0])) in line


@pytest.mark.parametrize("stands_for", [("otter", "sks otter"), ("sks otter", "<a>")])
def test_of_two_phrases_each_takes_its_own_place(stands_for):
    """The longer one first, and what one has become is not taken by another."""
    folder = ExampleSet((Example(Path("a.png"), f"{stands_for[1]} and {stands_for[0]}"),))
    (example,) = insert_placeholders(folder, ["<a>", "<b>"], stands_for)
    assert example.caption == "<b> and <a>"


def test_a_phrase_takes_no_place_within_another_word():
    examples = ExampleSet(tuple(Example(Path("a.png"), caption) for caption in ("a ring on a string", "a ring.")))
    captions = [example.caption for example in insert_placeholders(examples, ["<x>"], ["ring"]).examples]
    assert captions == ["a <x> on a string", "a <x>."]


def test_a_phrase_is_found_in_capitals_as_the_text_encoder_reads_it():
    folder = ExampleSet((Example(Path("a.png"), "Sks otter in fog"), Example(Path("b.png"), "a SKS otter")))
    captions = [example.caption for example in insert_placeholders(folder, ["<x>"], ["sks Otter"])]
    assert captions == ["<x> in fog", "a <x>"]


@pytest.mark.parametrize(("written", "said"), [("NFD", "NFC"), ("NFC", "NFD")])
def test_a_phrase_is_found_whether_its_accents_are_apart_or_not(written, said):
    folder = ExampleSet((Example(Path("a.png"), normalize(written, "a café cat in fog")),))
    (example,) = insert_placeholders(folder, ["<x>"], [normalize(said, "café cat")])
    assert example.caption == "a <x> in fog"


def test_a_phrase_that_is_in_no_caption_is_refused_also_where_the_template_has_the_word():
    folder = ExampleSet((Example(Path("a.png"), "<x>, an otter", template="<x>, {caption}"),))
    with pytest.raises(DataError, match=r"^--stands-for 'sks otter' is in none of 1 caption, first '<x>, an otter'"):
        insert_placeholders(folder, ["<x>"], ["sks otter"])


def test_a_word_for_caption_leaves_the_place_of_the_caption_in_the_template():
    folder = ExampleSet((Example(Path("a.png"), "a caption of it", template="{caption}, caption of it"),))
    (example,) = insert_placeholders(folder, ["<x>"], ["caption"])
    assert (example.caption, example.template) == ("a <x> of it", "{caption}, <x> of it")


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
    assert holds(token, text) is held
    with embedding.new_words(base, [token], vectors=vectors) as words:
        ids = torch.tensor(base.tokenizers[0](text).input_ids)
    assert bool((ids >= words.first[0]).any()) is held


def test_a_caption_with_the_word_within_another_word_has_it_not():
    folder = ExampleSet((Example(Path("a.png"), "a Totoro"),))
    with pytest.raises(DataError, match="1 of 1 captions hold no placeholder"):
        insert_placeholders(folder, ["totor"])


def test_a_tokenizer_that_takes_a_word_for_its_own_is_noticed(base):
    with pytest.raises(ConfigError, match="took 0 new tokens for it, not 1"):
        _extend(copy.deepcopy(base.tokenizers[0]), {"hou": 1})


def test_a_caption_may_spell_its_placeholder_in_capitals():
    """Samples and the card, which diffusers reads, have it in the spelling that finds all of its vectors."""
    folder = ExampleSet((Example(Path("a.png"), "an <Otter>", template="an <Otter>"),))
    (example,) = insert_placeholders(folder, ["<otter>"])
    assert (example.caption, example.template) == ("an <otter>", "an <otter>")


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


def test_what_is_written_is_what_is_read(base, tmp_path):
    with embedding.new_words(base, ["<x>"], vectors=3, start="random") as words:
        vectors = words.vectors()["<x>"]
        hidden = base.encode_text(["a <x>"]).hidden
    path = write_embedding(tmp_path / "otter.safetensors", "<x>", vectors)
    assert read_header(path).tensors.keys() == {"<x>"}
    with embedding.load(base, path):
        assert torch.equal(base.encode_text(["a <x>"]).hidden, hidden)
    with embedding.load(base, path, token="<other>"):
        assert torch.equal(base.encode_text(["a <other>"]).hidden, hidden)


@pytest.mark.parametrize("key", ["emb_params", "string_to_param.*"])
def test_the_web_interfaces_files_are_called_as_their_file_is(key, base, tmp_path):
    rows = base.text_encoders[0].get_input_embeddings().weight[[1417, 533]].clone()
    path = write_tensors(tmp_path / "zyxotter.safetensors", {key: rows})
    with embedding.load(base, path) as words:
        assert words.tokens == {"zyxotter": 2}
        assert torch.equal(words.rows[0], rows)
        assert not base.encode_text(["zyxotter"]).hidden.requires_grad
    with embedding.load(base, path, token="<mine>") as words:
        assert words.tokens == {"<mine>": 2}


def test_weighted_words_may_be_new_ones(base):
    pytest.importorskip("compel")
    from sfumato.prompts.encoding import encode

    cut = len(base.tokenizers[0]("flamingo", add_special_tokens=False).input_ids)
    plain, _ = encode(base, ["a (flamingo:1.3), flat style"], "", "a1111")
    with embedding.new_words(base, ["<x>"], vectors=cut, start="words", initial=["flamingo"]):
        new, _ = encode(base, ["a (<x>:1.3), flat style"], "", "a1111")
    assert torch.equal(new.hidden, plain.hidden)


def test_diffusers_reads_it_alike(tmp_path):
    pipe = tiny_pipeline("sd1", shallow=True)
    with embedding.new_words(pipe, ["<x>"], vectors=3, start="random") as words:
        ours = pipe.encode_prompt("a <x> of crabs", "cpu", 1, False)[0]
        path = write_embedding(tmp_path / "otter.safetensors", "<x>", words.vectors()["<x>"])
    pipe.load_textual_inversion(str(path))
    assert torch.equal(pipe.encode_prompt("a <x> of crabs", "cpu", 1, False)[0], ours)


def test_sdxl_has_both_encoders_in_one_file_that_its_card_has_diffusers_read_alike(bases, tmp_path, monkeypatch):
    base = bases("sdxl")
    with embedding.new_words(base, ["<x>"], vectors=2, start="random") as words:
        ours = base.encode_text(["a <x>"])
        path = write_embedding(tmp_path / "otter.safetensors", "<x>", words.vectors()["<x>"])
    tensors = load_file(path)
    assert {key: list(tensor.shape) for key, tensor in tensors.items()} == {"clip_l": [2, 64], "clip_g": [2, 128]}
    with embedding.load(base, path):  # the token is in the metadata
        again = base.encode_text(["a <x>"])
        assert torch.equal(again.hidden, ours.hidden)
        assert torch.equal(again.pooled, ours.pooled)
    pipe = tiny_pipeline("sdxl", shallow=True)
    about = Description("x", "sdxl", base="xl.safetensors")
    card = write_embedding_card(tmp_path, {"<x>": path}, about, [], [], []).read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    exec(card.partition("```python\n")[2].partition("\nimage = ")[0], {"pipe": pipe})
    hidden, _, pooled, _ = pipe.encode_prompt("a <x>", device="cpu", do_classifier_free_guidance=False)
    assert_close(hidden, ours.hidden)
    assert_close(pooled, ours.pooled)


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


def test_a_files_name_that_is_no_placeholder_is_refused_with_the_way_out(base, tmp_path):
    for name, said in (("my style", "without spaces"), ("cat", "a word already")):
        path = write_tensors(tmp_path / f"{name}.safetensors", {"emb_params": torch.randn(1, 64)})
        with pytest.raises(ConfigError, match=rf"^{name}.safetensors: .*{said}.*TOKEN=FILE"):
            embedding.load(base, path)


def test_half_precision_encoders_take_fp32_rows(family_folder):
    base = load_base(str(family_folder("sd1")), precision=decide("bf16", device="cpu"))
    base.text_encoders[0].to(torch.bfloat16)
    with embedding.new_words(base, ["<x>"], vectors=2) as words:
        text = base.encode_text(["<x>"], grad=True).hidden
        text.float().sum().backward()
        assert words.rows[0].dtype == words.rows[0].grad.dtype == torch.float32
        assert text.dtype == torch.bfloat16


def test_a_pickle_is_refused_with_the_reason(base, tmp_path):
    path = tmp_path / "otter.pt"
    torch.save({"string_to_param": {"*": torch.randn(1, 64)}}, path)
    with pytest.raises(FileError, match="a pickle can run programs"):
        embedding.load(base, path)


def test_vectors_of_another_family_are_refused(bases, tmp_path):
    path = write_embedding(tmp_path / "a.safetensors", "<x>", {"text_encoder": torch.randn(2, 48)})
    with pytest.raises(AdapterError, match="width 48, and this base's text encoder takes 64"):
        embedding.load(bases("sd1"), path)
    path = write_embedding(tmp_path / "b.safetensors", "<x>", {"text_encoder": torch.randn(2, 64)})
    with pytest.raises(AdapterError, match="takes 64 and 128"):
        embedding.load(bases("sdxl"), path)


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


def test_the_file_says_what_it_is(tmp_path):
    metadata = {"modelspec.architecture": "stable-diffusion-v1/lora", "ss_network_module": "networks.lora"}
    vectors = {"text_encoder": torch.ones(2, 4)}
    path = write_embedding(tmp_path / "a.safetensors", "<x>", vectors, metadata=metadata)
    said = read_header(path).metadata
    assert said["modelspec.architecture"] == "stable-diffusion-v1/textual-inversion"
    assert said["sfumato.token"] == "<x>"
    assert "ss_network_module" not in said
    assert read_embedding(path).embeddings["<x>"]["text_encoder"].shape == (2, 4)
    assert (
        path.read_bytes() == write_embedding(tmp_path / "b.safetensors", "<x>", vectors, metadata=metadata).read_bytes()
    )


@pytest.mark.parametrize(
    "vectors",
    [{}, {"text_encoder": torch.ones(4)}, {"unet": torch.ones(1, 4)}, {"text_encoder_2": torch.ones(1, 4)}],
)
def test_what_is_no_embedding_is_not_written(vectors, tmp_path):
    with pytest.raises(AdapterError, match="wanted"):
        write_embedding(tmp_path / "a.safetensors", "<x>", vectors)
    assert list(tmp_path.iterdir()) == []


def test_values_that_are_no_numbers_are_not_written(tmp_path):
    with pytest.raises(FileError, match="NaN or Inf"):
        write_embedding(tmp_path / "a.safetensors", "<x>", {"text_encoder": torch.full((1, 4), torch.nan)})
    with pytest.raises(FileError, match="overflows float16"):
        write_embedding(
            tmp_path / "a.safetensors", "<x>", {"text_encoder": torch.full((1, 4), 1e6)}, dtype=torch.float16
        )
    assert list(tmp_path.iterdir()) == []


def test_tokens_are_told_in_their_letters():
    """CLIP's vocabulary has a letter for each byte; what is a part of a character has no other."""
    tokenizer = clip_tokenizer(pad_token="!", positions=77)
    skull, part = tokenizer("☠️").input_ids[1], tokenizer("\U0001f9ff").input_ids[1]
    assert readable_token(tokenizer, skull) == "☠️"
    assert readable_token(tokenizer, part) == f"{tokenizer.convert_ids_to_tokens(part)}-"
    assert [readable_token(tokenizer, tokenizer.get_vocab()[token]) for token in ("cat</w>", "cat")] == ["cat", "cat-"]


@pytest.mark.parametrize("found", [{"w": None}, {"w": {5: {"text_encoder": torch.zeros(1, 32)}}}])
def test_what_are_no_new_words_is_said(found, base):
    with pytest.raises(AdapterError, match=r"w: .*wanted \{token: \{part:"), embedding.bundled(base, found):
        pass


def test_as_many_vectors_as_are_read_are_enough_and_lengths_are_told_beside_the_mean(base):
    with embedding.new_words(base, ["<x>"], vectors=15) as words:
        words.check(["<x> " * 5])
    with embedding.new_words(base, ["<x>"], start="mean") as words:
        assert words.report()[0].endswith("; 1.00 of the mean length")


@pytest.mark.parametrize("steps", ["", "-steps-500"])
def test_the_second_half_that_diffusers_writes_for_sdxl_is_read_with_the_first(steps, tmp_path):
    """textual_inversion_sdxl.py: two files, each of one encoder."""
    first, second = (tmp_path / f"{name}{steps}.safetensors" for name in ("learned_embeds", "learned_embeds_2"))
    save_file({"<cat>": torch.ones(2, 768)}, first)
    assert embedding.read(first)["<cat>"].keys() == {"text_encoder"}
    save_file({"<cat>": torch.ones(2, 1280)}, second)
    for token in (None, "<dog>"):
        [(name, parts)] = embedding.read(first, token).items()
        assert name == (token or "<cat>")
        assert {part: rows.shape[1] for part, rows in parts.items()} == {"text_encoder": 768, "text_encoder_2": 1280}
