"""Tokens and text embeddings equal those of the field's own tools."""

import dataclasses

import pytest
import torch

from sfumato.models.folder import load_tokenizer
from sfumato.models.vocabulary import byte_pair_tokenizer, clip_tokenizer

PROMPTS = ["a red cat", "a photo of an astronaut riding a horse on mars"]


def reference(pipe, prompt, clip_skip=None):
    """(hidden, pooled or None) of diffusers' own pipeline."""
    if hasattr(pipe, "text_encoder_2"):
        hidden, _, pooled, _ = pipe.encode_prompt(
            prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False, clip_skip=clip_skip
        )
        return hidden, pooled
    return pipe.encode_prompt(prompt, "cpu", 1, False, clip_skip=clip_skip)[0], None


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        # As openai/clip-vit-large-patch14 tokenizes them.
        (
            "a photo of an astronaut riding a horse on mars",
            [49406, 320, 1125, 539, 550, 18376, 6765, 320, 4558, 525, 7496, 49407],
        ),
        ("a photo of a cat", [49406, 320, 1125, 539, 320, 2368, 49407]),
        ("Hello World!", [49406, 3306, 1002, 256, 49407]),
        ("", [49406, 49407]),
    ],
)
def test_token_ids_are_those_of_clip(text, ids):
    assert clip_tokenizer(positions=77)(text).input_ids == ids


def test_the_first_tokenizer_pads_with_its_end_and_openclips_with_zero():
    pad = {"padding": "max_length", "max_length": 5}
    assert clip_tokenizer(positions=77)("cat", **pad).input_ids == [49406, 2368, 49407, 49407, 49407]
    assert clip_tokenizer(pad_token="!", positions=77)("cat", **pad).input_ids == [49406, 2368, 49407, 0, 0]


def test_a_tokenizer_takes_as_many_tokens_as_its_text_encoder():
    assert byte_pair_tokenizer([], positions=40).model_max_length == 40


def test_embeddings_equal_the_pipelines(tiny):
    hidden, pooled = reference(tiny.pipe, PROMPTS)
    text = tiny.base.encode_text(PROMPTS)
    torch.testing.assert_close(
        text.hidden, hidden
    )  # products are another library's on some CPUs (sfumato.precision.cpu_matmul)
    assert (text.pooled is None) == (pooled is None)
    if pooled is not None:
        torch.testing.assert_close(text.pooled, pooled)


def test_clip_skip_on_sdxl_equals_the_pipelines(sdxl):
    hidden, pooled = reference(sdxl.pipe, PROMPTS, clip_skip=2)
    text = dataclasses.replace(sdxl.base, clip_skip=2).encode_text(PROMPTS)
    torch.testing.assert_close(text.hidden, hidden)
    torch.testing.assert_close(text.pooled, pooled)


@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_clip_skip_normalises_an_earlier_layer(family, request):
    """diffusers 0.42 cannot do this with transformers 5.6 and later, so its formula stands here."""
    made = request.getfixturevalue(family)
    ids = made.pipe.tokenizer(PROMPTS, padding="max_length", max_length=77, return_tensors="pt").input_ids
    states = made.pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    assert len(states) == 5  # the embedding and four layers
    text = dataclasses.replace(made.base, clip_skip=2).encode_text(PROMPTS)
    assert torch.equal(text.hidden, made.pipe.text_encoder.final_layer_norm(states[2]))


def test_no_prompt_is_zeros_on_sdxl_only(sd1, sdxl):
    pipe = sdxl.pipe
    _, hidden, _, pooled = pipe.encode_prompt("a cat", device="cpu", do_classifier_free_guidance=True)
    nothing = sdxl.base.unconditional(1)
    assert torch.equal(nothing.hidden, hidden)
    assert torch.equal(nothing.pooled, pooled)
    assert torch.equal(sd1.base.unconditional(1).hidden, reference(sd1.pipe, "")[0])


def test_a_long_prompt_is_counted_and_its_end_is_named(sd1):
    prompt = "cat " * 75 + "red dog"
    assert sd1.base.token_limit == 75
    assert sd1.base.token_count(prompt) == 77
    assert sd1.base.cut_off(prompt) == "red dog"
    assert sd1.base.cut_off("a cat") == ""
    with pytest.warns(UserWarning, match="prompt of 77 tokens, 75 are seen; cut: 'red dog'"):
        sd1.base.encode_text([prompt])
    with pytest.warns(UserWarning, match=r"cut: '(dog ){14}d\.\.\.'; --max-tokens 225"):
        sd1.base.encode_text(["cat " * 75 + "dog " * 500])


def test_embeddings_can_be_taken_apart_and_put_together(sdxl):
    text = sdxl.base.encode_text(PROMPTS)
    again = type(text).cat([text[[1]], text[:1]])
    assert torch.equal(again.hidden, text.hidden.flip(0))
    assert torch.equal(again.pooled, text.pooled.flip(0))
    assert len(again) == 2


@pytest.mark.slow
@pytest.mark.parametrize("text", ["1girl, k-on!, smile", "wow!!! a red car", "love live! school", "!"])
def test_openclips_padding_is_a_letter_in_a_text(text, tmp_path):
    """As OpenCLIP reads it, with whose vocabulary CLIP's is one: both encoders of SDXL have the same tokens."""
    wanted = clip_tokenizer(positions=77)(text).input_ids
    tokenizer = clip_tokenizer(pad_token="!", positions=77)
    tokenizer.save_pretrained(tmp_path / "tokenizer_2")
    for each in (tokenizer, load_tokenizer(tmp_path, "tokenizer_2", 77)):
        assert each(text).input_ids == wanted
        assert each("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, 0, 0]
        each.add_tokens(["<otter>"])
        assert each(f"<otter>{text}").input_ids == [49406, 49408, *wanted[1:]]


def test_a_padding_token_beside_the_vocabulary_stays(tmp_path):
    clip_tokenizer(pad_token="<|pad|>", positions=77).save_pretrained(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(tmp_path, "tokenizer", 77)
    assert tokenizer("cat", padding="max_length", max_length=5).input_ids == [49406, 2368, 49407, 49408, 49408]
