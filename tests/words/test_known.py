"""New words in a pipeline: diffusers' own words beside them, copies, saving, offloading, threads, swapped parts."""

import copy
import pickle
import weakref
from threading import Event, Thread

import diffusers
import pytest
import torch
from torch.testing import assert_close

from sfumato.adapters.embeddings import embedding
from sfumato.errors import ConfigError
from sfumato.files import write_tensors
from sfumato.models import load_base
from tests.tiny import CPU, MERGES, tiny_pipeline, write_folder

TOKENS = MERGES + 514
"""In the vocabulary of a tiny base: also 512 bytes, and both ends."""


@pytest.fixture
def base(tmp_path):
    return load_base(str(write_folder(tiny_pipeline("sd1", shallow=True), tmp_path / "sd1")), precision=CPU)


@pytest.fixture
def files(tmp_path):
    """<one> of two vectors and <two> of one, for SD 1.x."""
    sizes = {"<one>": 2, "<two>": 1}
    return [write_tensors(tmp_path / f"{name}.safetensors", {name: torch.randn(n, 64)}) for name, n in sizes.items()]


def encoded(pipe, prompt):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0]


def test_a_pipeline_of_diffusers_is_put_back(tmp_path):
    pipe = tiny_pipeline("sdxl", shallow=True)
    tokenizers = pipe.tokenizer, pipe.tokenizer_2
    path = write_tensors(
        tmp_path / "zyxotter.safetensors", {"clip_l": torch.randn(1, 64), "clip_g": torch.randn(1, 128)}
    )
    with embedding.load(pipe, path) as words:
        assert list(words.tokens) == ["zyxotter"]  # nothing names it, so it is called as its file is
        assert "zyxotter" in pipe.tokenizer_2.get_vocab()
    assert "zyxotter" not in pipe.tokenizer_2.get_vocab()
    assert (pipe.tokenizer, pipe.tokenizer_2) == tokenizers
    assert isinstance(pipe, diffusers.StableDiffusionXLPipeline)


def test_pipelines_that_share_a_tokenizer_share_its_words(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    earlier = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    plain = encoded(pipe, "<one>")
    with embedding.load(pipe, files[0]):
        later = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
        one = encoded(pipe, "<one>")
        assert not torch.equal(one, plain)
        with embedding.load(later, files[1]):
            assert torch.equal(encoded(earlier, "<one>"), one)
            two = encoded(earlier, "<two>")
            assert torch.equal(encoded(pipe, "<two>"), two)
        assert torch.equal(encoded(later, "<one>"), one)
        assert not torch.equal(encoded(pipe, "<two>"), two)
    assert all(torch.equal(encoded(each, "<one>"), plain) for each in (pipe, earlier, later))


def test_a_base_and_its_pipelines_draw_the_same_words(base, files):
    earlier = base.pipeline()
    with embedding.load(base, files[0]):
        later = base.pipeline()
        one = base.encode_text(["<one>"]).hidden
        assert torch.equal(encoded(earlier, "<one>"), one)
        assert torch.equal(encoded(later, "<one>"), one)
    plain = base.encode_text(["<one>"]).hidden
    assert torch.equal(encoded(later, "<one>"), plain)


def test_a_text_encoder_whose_words_another_tokenizer_knows_is_refused(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.tokenizer = copy.deepcopy(pipe.tokenizer)
    with embedding.load(pipe, files[0]), pytest.raises(ConfigError, match="another pipeline that shares it"):
        embedding.load(other, files[1])
    with embedding.load(other, files[1]):
        pass


def test_a_tokenizer_whose_words_another_text_encoder_has_is_refused(files):
    pipe, other = tiny_pipeline("sd1", shallow=True), tiny_pipeline("sd1", shallow=True)
    other.tokenizer = pipe.tokenizer
    with embedding.load(pipe, files[0]):
        one = encoded(pipe, "<one>")
        with pytest.raises(ConfigError, match=r"text encoder of its own\. Take them out.* copy\.deepcopy"):
            embedding.load(other, files[1])
        assert torch.equal(encoded(pipe, "<one>"), one)
    other.tokenizer = copy.deepcopy(pipe.tokenizer)
    with embedding.load(pipe, files[0]), embedding.load(other, files[1]):
        assert torch.equal(encoded(pipe, "<one>"), one)


def test_what_diffusers_loads_meanwhile_stays(files, tmp_path):
    """As if ours had never been there: ids, rows and the size of the table; of a word that was loaded before, too."""
    pipe, other = tiny_pipeline("sd1", shallow=True), tiny_pipeline("sd1", shallow=True)
    three = write_tensors(tmp_path / "<three>.safetensors", {"<three>": torch.randn(3, 64)})
    for each in (pipe, other):
        each.load_textual_inversion(str(three))
    other.load_textual_inversion(str(files[1]))
    before = pipe.tokenizer
    with embedding.load(pipe, files[0]):
        one = encoded(pipe, "<one>")
        pipe.load_textual_inversion(str(files[1]))
        for prompt in ("a <two>", "<three>"):
            assert torch.equal(encoded(pipe, prompt), encoded(other, prompt))
        assert torch.equal(encoded(pipe, "<one>"), one)
    assert pipe.tokenizer is before
    assert pipe.tokenizer.get_added_vocab() == other.tokenizer.get_added_vocab()
    tables = [each.text_encoder.get_input_embeddings().weight for each in (pipe, other)]
    assert torch.equal(*tables)
    for prompt in ("a <two>", "<three>", "<one>"):
        assert torch.equal(encoded(pipe, prompt), encoded(other, prompt))
    with embedding.load(pipe, files[0]):
        assert torch.equal(encoded(pipe, "<one>"), one)
    pipe.unload_textual_inversion()
    assert len(pipe.tokenizer) == len(pipe.text_encoder.get_input_embeddings().weight) == TOKENS


def test_of_words_in_use_each_goes_while_diffusers_words_stay(files, tmp_path):
    pipe = tiny_pipeline("sd1", shallow=True)
    three = write_tensors(tmp_path / "<three>.safetensors", {"<three>": torch.randn(3, 64)})
    one, two = (embedding.load(pipe, file) for file in files)
    prompts = ("<one>", "a <two>", "<three>")
    pipe.load_textual_inversion(str(three))
    wanted = [encoded(pipe, prompt) for prompt in prompts]
    one.remove()
    assert [torch.equal(encoded(pipe, p), w) for p, w in zip(prompts, wanted, strict=True)] == [False, True, True]
    two.remove()
    assert [torch.equal(encoded(pipe, p), w) for p, w in zip(prompts, wanted, strict=True)] == [False, False, True]


def test_what_diffusers_unloads_meanwhile_is_gone(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    plain = encoded(pipe, "<one> <two>")
    pipe.load_textual_inversion(str(files[1]))
    with embedding.load(pipe, files[0]):
        pipe.unload_textual_inversion()
    assert torch.equal(encoded(pipe, "<one> <two>"), plain)
    assert len(pipe.tokenizer) == len(pipe.text_encoder.get_input_embeddings().weight)


def test_both_tables_of_sdxl_keep_what_diffusers_loads(tmp_path):
    pipe, rows = tiny_pipeline("sdxl", shallow=True), {"clip_l": torch.randn(1, 64), "clip_g": torch.randn(1, 128)}
    with embedding.load(pipe, write_tensors(tmp_path / "<one>.safetensors", rows)):
        for key, number in (("clip_l", ""), ("clip_g", "_2")):
            names = {name: getattr(pipe, f"{name}{number}") for name in ("tokenizer", "text_encoder")}
            pipe.load_textual_inversion(rows[key] * 2, token="<two>", **names)
    for encoder, tokenizer, row in (
        (pipe.text_encoder, pipe.tokenizer, rows["clip_l"]),
        (pipe.text_encoder_2, pipe.tokenizer_2, rows["clip_g"]),
    ):
        (index,) = tokenizer("<two>", add_special_tokens=False).input_ids
        assert torch.equal(encoder.get_input_embeddings().weight[index], row[0] * 2)
        assert len(tokenizer) == len(encoder.get_input_embeddings().weight) == index + 1


def test_a_pipeline_is_saved_without_the_words_in_use(files, tmp_path):
    pipe = tiny_pipeline("sd1", shallow=True)
    plain = encoded(pipe, "<one>")
    with embedding.load(pipe, files[0]):
        one = encoded(pipe, "<one>")
        pipe.save_pretrained(tmp_path / "saved")
        assert torch.equal(encoded(pipe, "<one>"), one)
        pipe.load_textual_inversion(str(files[1]))
        with pytest.raises(ConfigError, match="save then"):
            pipe.save_pretrained(tmp_path / "other")
    again = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "saved", safety_checker=None)
    assert len(again.tokenizer) == len(again.text_encoder.get_input_embeddings().weight)
    assert torch.equal(encoded(again, "<one>"), plain)
    pipe.save_pretrained(tmp_path / "other")
    other = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "other", safety_checker=None)
    assert torch.equal(encoded(other, "<two>"), encoded(pipe, "<two>"))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))])
def test_a_copied_pipeline_has_copies_of_its_words(copied, files):
    pipe = tiny_pipeline("sd1", shallow=True)
    with embedding.load(pipe, files[0]) as words:
        one = encoded(pipe, "<one>")
        other = copied(pipe)
        with embedding.load(other, files[1]), torch.no_grad():
            words.rows[0].zero_()
            assert not torch.equal(encoded(pipe, "<one>"), one)
            assert torch.equal(encoded(other, "<one>"), one)
    assert torch.equal(encoded(other, "<one>"), one)


def test_words_that_are_held_hold_no_pipeline_and_come_back_in_a_with_block(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    words, unet, text_encoder = embedding.load(pipe, files[0]), weakref.ref(pipe.unet), pipe.text_encoder
    one = encoded(pipe, "<one>")
    words.remove()
    with words:
        assert torch.equal(encoded(pipe, "<one>"), one)
    assert not torch.equal(encoded(pipe, "<one>"), one)
    del pipe
    assert unet() is None
    assert text_encoder is not None


@pytest.mark.parametrize("become", [lambda encoder: None, lambda encoder: torch.compile(encoder, backend="eager")])
def test_words_go_whatever_becomes_of_the_pipeline(become, files):
    pipe = tiny_pipeline("sd1", shallow=True)
    tokenizer, encoder, plain = pipe.tokenizer, pipe.text_encoder, encoded(pipe, "<one>")
    with embedding.load(pipe, files[0]):
        pipe.text_encoder = become(encoder)
        pipe.tokenizer = copy.deepcopy(tokenizer)
    pipe.text_encoder, pipe.tokenizer = encoder, tokenizer
    assert torch.equal(encoded(pipe, "<one>"), plain)


@pytest.mark.slow
def test_a_compiled_text_encoder_takes_words(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    plain = encoded(pipe, "<one>")
    with embedding.load(pipe, files[0]):
        one = encoded(pipe, "<one>")
    pipe.text_encoder = torch.compile(pipe.text_encoder, backend="eager", fullgraph=True)
    with embedding.load(pipe, files[0]):
        assert_close(encoded(pipe, "<one>"), one)
    assert_close(encoded(pipe, "<one>"), plain)


def test_a_table_that_diffusers_replaces_is_said(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    with embedding.load(pipe, files[0]) as words:
        one = encoded(pipe, "<one>")
        pipe.load_textual_inversion(str(files[1]))
        pipe.unload_textual_inversion("<two>")
        with pytest.raises(ConfigError, match="was replaced, as unload_textual_inversion"):
            encoded(pipe, "<one>")
        words.remove()
        words.attach()
        assert torch.equal(encoded(pipe, "<one>"), one)
    assert len(pipe.tokenizer) == len(pipe.text_encoder.get_input_embeddings().weight) == TOKENS


def test_tokens_without_rows_are_no_obstacle(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    with embedding.load(pipe, files[0]):
        pipe.tokenizer.add_tokens(["<bare>"])
    assert pipe.tokenizer.get_added_vocab()["<bare>"] == TOKENS
    assert len(pipe.text_encoder.get_input_embeddings().weight) == TOKENS


def test_threads_encode_prompts_of_their_own(files):
    """One begins in the midst of the other's call, and ends after it."""
    pipe, texts = tiny_pipeline("sd1", shallow=True), ["<one> a", "a <one>"]
    table = pipe.text_encoder.get_input_embeddings()
    with embedding.load(pipe, files[0]):
        wanted = [encoded(pipe, text) for text in texts]
        found = list(wanted)

        def second() -> None:
            found[1] = encoded(pipe, texts[1])

        thread, own, is_in, may_end = Thread(target=second), table.forward, Event(), Event()

        def of_first(ids):
            table.forward = of_second
            thread.start()
            assert is_in.wait(60)
            return own(ids)

        def of_second(ids):
            is_in.set()
            assert may_end.wait(60)
            return own(ids)

        table.forward = of_first
        found[0] = encoded(pipe, texts[0])
        may_end.set()
        thread.join()
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_words_within_those_that_diffusers_loaded_are_refused(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.load_textual_inversion(torch.randn(1, 64), token="my<one>")
    with pytest.raises(ConfigError, match="<one> is not told from my<one>"):
        embedding.load(pipe, files[0])


def test_words_in_an_offloaded_text_encoder(files):
    from accelerate import cpu_offload

    pipe = tiny_pipeline("sd1", shallow=True)
    with embedding.load(pipe, files[0]):
        one = encoded(pipe, "a <one>")
    with embedding.new_words(pipe, ["<x>"]) as words:
        x = encoded(pipe, "a <x>")
        lines = words.report()
    cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))
    assert pipe.text_encoder.get_input_embeddings().weight.is_meta
    with embedding.load(pipe, files[0]):
        assert torch.equal(encoded(pipe, "a <one>"), one)
    with embedding.new_words(pipe, ["<x>"]) as words:
        assert torch.equal(encoded(pipe, "a <x>"), x)
        assert words.report() == lines
        words.keep_scale()


def test_a_pipeline_without_a_tokenizer_is_refused(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.tokenizer = None
    with pytest.raises(ConfigError, match="no tokenizer"):
        embedding.load(pipe, files[0])


def test_words_for_an_empty_shell_are_refused(files):
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.text_encoder.to("meta")
    with pytest.raises(ConfigError, match="not in memory"):
        embedding.load(pipe, files[0])


def test_what_diffusers_loads_meanwhile_stays_under_offloading(files):
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_module

    pipe = tiny_pipeline("sd1", shallow=True)
    with embedding.load(pipe, files[0]):
        pipe.load_textual_inversion(str(files[1]))
        two = encoded(pipe, "<two>")
        cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))
    assert torch.equal(encoded(pipe, "<two>"), two)
    remove_hook_from_module(pipe.text_encoder, recurse=True)
    assert torch.equal(encoded(pipe, "<two>"), two)
