"""Prompts of more tokens than a text encoder reads at once: in chunks, as other tools and the attention law have it."""

import dataclasses
import warnings

import pytest
import torch
from torch.testing import assert_close

from sfumato.errors import BaseModelError
from sfumato.models import TextEmbedding, load_base
from sfumato.precision import decide
from sfumato.utils.limits import truncation_hint

SHORT = "a red cat"
TWO = "cat " * 80 + "red dog"
THREE = "dog " * 190 + "blue car"


@pytest.fixture(autouse=True)
def nothing_is_cut():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        yield


def long(made, tokens=225, **others):
    return dataclasses.replace(made.base, max_tokens=tokens, **others)


@pytest.mark.parametrize("prompt", ["", SHORT, "cat " * 74, "cat " * 75, "Été, naïve 日本 🦩!"])
def test_a_chunk_is_what_the_tokenizer_makes_of_a_prompt(tiny, prompt):
    base = long(tiny)
    for tokenizer in base.tokenizers:
        ids = tokenizer(prompt, padding="max_length", max_length=77).input_ids
        assert base.chunk_ids(tokenizer, prompt) == [ids]


def test_chunks_have_75_tokens_each_and_ends_of_their_own(sd1):
    base = long(sd1)
    (tokenizer,) = base.tokenizers
    rows = base.chunk_ids(tokenizer, THREE)
    assert [len(row) for row in rows] == [77, 77, 77]
    assert {row[0] for row in rows} == {tokenizer.bos_token_id}
    assert rows[0][76] == rows[1][76] == tokenizer.eos_token_id
    inside = [*rows[0][1:76], *rows[1][1:76], *rows[2][1 : rows[2].index(tokenizer.eos_token_id)]]
    assert inside == tokenizer(THREE, add_special_tokens=False).input_ids


@pytest.mark.slow
@pytest.mark.parametrize("prompt", [SHORT, TWO, THREE])
def test_embeddings_equal_compels(tiny, prompt):
    """Where compel is told to part a prompt after 75 tokens, whatever stands there."""
    compel = pytest.importorskip("compel")
    base = long(tiny)
    is_sdxl, kind = len(base.text_encoders) > 1, compel.ReturnedEmbeddingsType
    from sfumato.models.prompts.encoding import _WithTextModel

    hidden = []
    for tokenizer, encoder in zip(base.tokenizers, base.text_encoders, strict=True):
        reader = compel.Compel(
            tokenizer=tokenizer,
            text_encoder=_WithTextModel(encoder),
            returned_embeddings_type=(
                kind.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if is_sdxl else kind.LAST_HIDDEN_STATES_NORMALIZED
            ),
            truncate_long_prompts=False,
            split_long_text_mode=compel.SplitLongTextMode.BRUTAL,
            device="cpu",
        )
        hidden.append(reader([prompt]))
    assert_close(base.encode_text([prompt]).hidden, torch.cat(hidden, dim=-1))


def test_the_pooled_embedding_is_the_first_chunks(sdxl):
    base = long(sdxl)
    with pytest.warns(UserWarning, match="75 are seen"):
        cut = sdxl.base.encode_text([THREE])
    text = base.encode_text([THREE])
    assert_close(text.pooled, cut.pooled)
    assert_close(text.hidden[:, :77], cut.hidden)
    assert text.hidden.shape[1] == 3 * 77


def test_clip_skip_counts_in_every_chunk(sd1):
    skipped, last = (long(sd1, clip_skip=skip).encode_text([TWO]).hidden for skip in (1, None))
    assert skipped.shape == last.shape == (1, 154, last.shape[-1])
    assert not torch.allclose(skipped[:, 77:], last[:, 77:])


def test_a_batch_of_several_lengths_tells_each_what_it_is_told_alone(tiny):
    """Attention over keys that come again is attention over them once."""
    base = long(tiny)
    prompts = [SHORT, TWO, THREE, ""]
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    timesteps = torch.tensor([10, 300, 600, 900])
    size = [(64, 64)] * 4

    def told(text, rows):
        some = [size[row] for row in rows]
        added = base.added_conditions(text, some, [(0, 0)] * len(rows), some)
        return base.predict(latents[rows], timesteps[rows], text, added)

    together = base.encode_text(prompts)
    assert together.hidden.shape[:2] == (4, 6 * 77)
    apart = base.encode_apart(prompts)
    assert [each.hidden.shape[1] for each in apart] == [77, 154, 231, 77]
    with torch.no_grad():
        each = torch.cat([told(text, [row]) for row, text in enumerate(apart)])
        assert_close(told(together, [0, 1, 2, 3]), each, atol=1e-3, rtol=0)  # a processor's rounding is 5e-5
        other = told(base.encode_text([prompts[0], prompts[0], *prompts[2:]]), [0, 1, 2, 3])
    assert not torch.allclose(other[1], each[1], atol=1e-2)  # which the texts do decide


def test_gradients_reach_the_last_chunk(sd1):
    base = long(sd1)
    table = base.text_encoders[0].get_input_embeddings().weight
    last = base.tokenizers[0]("blue", add_special_tokens=False).input_ids[0]
    table.requires_grad_(True)
    try:
        base.encode_text([THREE, SHORT], grad=True).hidden.square().sum().backward()
        assert table.grad[last].abs().sum() > 0
    finally:
        table.requires_grad_(False)
        table.grad = None


def test_what_is_read_is_limited_and_counted(sd1):
    base = long(sd1, tokens=150)
    assert (base.token_limit, base.chunk_size, base.token_count(TWO)) == (150, 75, 82)
    assert [base.chunk_count(prompt) for prompt in ("", SHORT, "cat " * 75, TWO, THREE)] == [1, 1, 1, 2, 2]
    assert base.cut_off(TWO) == ""
    assert base.cut_off("cat " * 150 + "red dog") == "red dog"
    with pytest.warns(UserWarning, match=r"prompt of 192 tokens, 150 are seen; .*--max-tokens 225 reads up to 225$"):
        assert base.encode_text([THREE]).hidden.shape[1] == 154
    with pytest.warns(UserWarning, match=r"prompt of 302 tokens, 225 are seen; cut: '[^']*'$"):
        long(sd1).encode_text(["cat " * 300 + "red dog"])


def test_more_tokens_are_offered_where_there_are_more():
    assert truncation_hint(75) == truncation_hint(150) == "; --max-tokens 225 reads up to 225"
    assert truncation_hint(225) == ""


@pytest.mark.parametrize("tokens", [0, 76, 77, 300, -75, 150.0, True, "150"])
def test_a_base_reads_75_tokens_once_twice_or_three_times(sd1, tokens):
    with pytest.raises(BaseModelError, match=r"--max-tokens .*: the text encoder reads 75 at once; wanted 75, 150 or"):
        load_base(sd1.folder, precision=decide("fp32", device="cpu"), unet=False, max_tokens=tokens)


def test_a_loaded_base_knows_it(sd1):
    base = load_base(sd1.folder, precision=decide("fp32", device="cpu"), unet=False, max_tokens=150)
    assert base.encode_text([TWO]).hidden.shape[1] == 154


def test_repeated_tokens_keep_the_pooled_embedding():
    text = TextEmbedding(torch.arange(6.0).view(1, 2, 3), torch.ones(1, 4))
    again = text.repeated(4)
    assert torch.equal(again.hidden, torch.cat([text.hidden, text.hidden], dim=1))
    assert torch.equal(again.pooled, text.pooled)
    assert text.repeated(2) is text
