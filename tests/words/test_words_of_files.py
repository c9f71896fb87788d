"""New words from files: ours, diffusers' and the web interfaces', read alike, and what is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sfumato.adapters.embeddings import embedding
from sfumato.errors import AdapterError, ConfigError, FileError
from sfumato.files import read_header, write_tensors
from sfumato.files.metadata import Description
from sfumato.files.writing.embedding import write_embedding
from sfumato.training.cards.methods import write_embedding_card
from tests.tiny import tiny_pipeline


def test_what_is_no_file_and_no_words_is_one_line(base):
    with pytest.raises(FileError, match="a file is named by its path, a text, got a NoneType"):
        embedding.load(base, None)
    with pytest.raises(ConfigError, match="wanted new words by label"):
        embedding.bundled(base, None).__enter__()


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


def test_a_files_name_that_is_no_placeholder_is_refused_with_the_way_out(base, tmp_path):
    for name, said in (("my style", "without spaces"), ("cat", "a word already")):
        path = write_tensors(tmp_path / f"{name}.safetensors", {"emb_params": torch.randn(1, 64)})
        with pytest.raises(ConfigError, match=rf"^{name}.safetensors: .*{said}.*TOKEN=FILE"):
            embedding.load(base, path)


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


@pytest.mark.parametrize("found", [{"w": None}, {"w": {5: {"text_encoder": torch.zeros(1, 32)}}}])
def test_what_are_no_new_words_is_said(found, base):
    with pytest.raises(AdapterError, match=r"w: .*wanted \{token: \{part:"), embedding.bundled(base, found):
        pass


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
