"""Words that change between the steps: read as A1111 reads them, and heard by the U-Net in their steps."""

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.regions import Region, regions
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.generation.draw import Start, draw
from sfumato.models import TextEmbedding, load_base
from sfumato.models.prompts.editing import Stage, concat_stages, has_edits, prompt_stages, staged_prompts
from sfumato.models.prompts.encoding import encode_prompts, encode_stages
from sfumato.models.prompts.syntax import parse_prompt_attention
from tests.pixels import difference
from tests.tiny import CPU


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("test", [(10, "test")]),
        ("a [b:3]", [(3, "a "), (10, "a b")]),
        ("a [b: 3]", [(3, "a "), (10, "a b")]),
        ("a [[[b]]:2]", [(2, "a "), (10, "a [[b]]")]),
        ("[(a:2):3]", [(3, ""), (10, "(a:2)")]),
        ("a [b : c : 1] d", [(1, "a b  d"), (10, "a  c  d")]),
        ("a[b:[c:d:2]:1]e", [(1, "abe"), (2, "ace"), (10, "ade")]),
        ("a [unbalanced", [(10, "a [unbalanced")]),
        ("a [b:.5] c", [(5, "a  c"), (10, "a b c")]),
        ("[a|(b:1.1)]", [(step, "(b:1.1)" if step % 2 == 0 else "a") for step in range(1, 11)]),
        ("[fe|]male", [(step, "male" if step % 2 == 0 else "female") for step in range(1, 11)]),
    ],
)
def test_what_is_said_when_is_what_a1111_s_own_examples_say(prompt, expected):
    """The examples in its modules/prompt_parser.py, whose schedules are of ten steps."""
    assert prompt_stages(prompt, 10) == expected


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a [b::4]", [(4, "a b"), (10, "a ")]),
        ("[a:b:1.0]", [(10, "a")]),
        ("[a:b:10]", [(10, "a")]),
        ("[a:b:0]", [(10, "b")]),
        ("[a:b:99]", [(10, "a")]),
        ("[a:b:0.39]", [(3, "a"), (10, "b")]),
        ("[a:b:-1] [c:d:-.5]", [(10, "b d")]),
        ("[a:b:+3] [c:d:4e0]", [(3, "a c"), (4, "b c"), (10, "b d")]),
        ("[a:b:5.E-1]", [(5, "a"), (10, "b")]),
        ("[a:b:1e9999][c:d:-1e9999]", [(10, "ad")]),
        ("[a:b|c:0.5]", [(10, "[a:b|c:0.5]")]),
        ("[a:b:c:0.5]", [(10, "[a:b:c:0.5]")]),
        ("(a [b:c:0.5]:1.2)", [(5, "(a b:1.2)"), (10, "(a c:1.2)")]),
        ("[a|b|[c:d:0.5]]", list(enumerate("abcabdabda", 1))),
        (r"\[a:b:0.5\] [a\:b:c:0.5]", [(5, r"\[a:b:0.5\] a\:b"), (10, r"\[a:b:0.5\] c")]),
        ("[a:b] (c|d:1.2) [e]", [(10, "[a:b] (c|d:1.2) [e]")]),
    ],
)  # fmt: skip
def test_ends_marks_and_brackets(prompt, expected):
    assert prompt_stages(prompt, 10) == expected


@pytest.mark.parametrize(("opening", "closing"), [("(", ")"), ("[", "]"), ("[", "::0.5]"), ("[", "|]")])
def test_brackets_nest_as_deep_as_they_like(opening, closing):
    """Python's functions call each other a thousand deep at most."""
    prompt = "[a:b:0.5]".join((opening * 1000, closing * 1000))
    first, *_, last = prompt_stages(prompt, 10)
    assert "a" in first[1]
    assert last[0] == 10
    assert "a" not in last[1]


@pytest.mark.parametrize(("when", "end"), [("9" * 20_000, 10), ("9" * 20_000 + ".", 10), ("0" * 20_000, 0)])
def test_a_number_may_have_any_digits(when, end):
    assert prompt_stages(f"[a:b:{when}]", 10)[0] == ((end, "a") if end else (10, "b"))
    assert prompt_stages(f"[a:b:{when}x]", 10) == [(10, f"[a:b:{when}x]")]


def test_words_after_more_steps_than_are_usual_change_too():
    assert has_edits("[crab:owl:999]")
    assert not has_edits("[crab:owl] (crab:1.2) [crab:owl:1000]")


def test_the_stages_of_several_pictures_are_those_of_one_batch():
    def stage(last, number):
        return Stage(last, *(TextEmbedding(torch.full((1, 2, 3), sign * number)) for sign in (1.0, -1.0)))

    together = concat_stages([[stage(2, 1), stage(4, 2)], [stage(3, 5), stage(4, 6)]])
    assert [each.last for each in together] == [2, 3, 4]
    assert [each.text.hidden[:, 0, 0].tolist() for each in together] == [[1, 5], [2, 5], [2, 6]]
    assert [each.negative.hidden[:, 0, 0].tolist() for each in together] == [[-1, -5], [-2, -5], [-2, -6]]


@pytest.mark.parametrize("prompt", ["[crab:b|c:0.5]", "[a|b:c]", "[a|b:3]"])
def test_both_marks_in_one_bracket_are_refused_where_a1111_takes_all_for_text(prompt):
    ((_, text),) = prompt_stages(prompt, 10)
    with pytest.raises(ConfigError, match=r"':' and '\|' do not go together.* as in \[a:\[b\|c\]:0\.5\]"):
        parse_prompt_attention(text)


@pytest.fixture(scope="module")
def pocket(pocket_folder):
    pytest.importorskip("compel")
    return load_base(pocket_folder, precision=CPU)


@pytest.fixture(scope="module")
def sdxl(family_folder):
    pytest.importorskip("compel")
    return load_base(family_folder("sdxl"), precision=CPU)


def theirs(base, before, after, *, last, steps, sampler="ddim", negative=("", "")):
    """A plain diffusers pipeline whose embeddings are changed after step `last` by its own callback."""
    pipe = base.pipeline(sampler)
    pipe.set_progress_bar_config(disable=True)
    told = []
    for prompt, without in zip((before, after), negative, strict=True):
        text, other = encode_prompts(base, [prompt], without, "a1111")
        told.append(SimpleNamespace(text=text, other=other))

    def changed(pipe, index, timestep, tensors):
        if index + 1 == last * pipe.scheduler.order:
            text, other = told[1].text, told[1].other
            tensors["prompt_embeds"] = torch.cat([other.hidden, text.hidden])
            if text.pooled is not None:
                tensors["add_text_embeds"] = torch.cat([other.pooled, text.pooled])
        return tensors

    text, other = told[0].text, told[0].other
    pooled = {"pooled_prompt_embeds": text.pooled, "negative_pooled_prompt_embeds": other.pooled}
    names = ["prompt_embeds", *(["add_text_embeds"] if text.pooled is not None else [])]
    return pipe(
        prompt_embeds=text.hidden,
        negative_prompt_embeds=other.hidden,
        **(pooled if text.pooled is not None else {}),
        num_inference_steps=steps,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(7),
        callback_on_step_end=changed,
        callback_on_step_end_tensor_inputs=names,
    ).images[0]


def ours(base, prompt, *, steps, sampler="ddim", negative="", **settings):
    return draw(
        base, prompt, 7, steps=steps, guidance=3.0, sampler=sampler, syntax="a1111", negative=negative, **settings
    )[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "sampler", ["ddim", "euler a", "dpm++ 2m", "unipc", "heun", pytest.param("dpm2", marks=pytest.mark.slow)]
)
def test_diffusers_with_a_callback_that_changes_the_embeddings_draws_the_same(pocket, sampler):
    picture = ours(pocket, "[red square:blue circle:0.5]", steps=6, sampler=sampler)
    assert difference(picture, theirs(pocket, "red square", "blue circle", last=3, steps=6, sampler=sampler)) <= 1
    assert difference(picture, ours(pocket, "red square", steps=6, sampler=sampler)) > 1
    assert difference(picture, ours(pocket, "blue circle", steps=6, sampler=sampler)) > 1


def test_sdxl_s_pooled_embedding_changes_too(sdxl):
    heard = []

    def listen(module, args, options):
        heard.append(options["added_cond_kwargs"]["text_embeds"])

    with sdxl.unet.register_forward_pre_hook(listen, with_kwargs=True):
        picture = ours(sdxl, "a [red:blue:2] square", steps=4, width=64, height=64)
    text = encode_stages(sdxl, ["a [red:blue:2] square"], "", 4)
    assert not torch.equal(text[0].text.pooled, text[1].text.pooled)
    for found, stage in zip(heard, [text[0], text[0], text[1], text[1]], strict=True):
        assert torch.equal(found, torch.cat([stage.negative.pooled, stage.text.pooled]))
    expected = theirs(sdxl, "a red square", "a blue square", last=2, steps=4)
    assert difference(picture, expected) <= 1


def test_the_negative_prompt_changes_too(pocket):
    picture = ours(pocket, "a square", steps=4, negative="[red:blue:0.5]")
    expected = theirs(pocket, "a square", "a square", last=2, steps=4, negative=("red", "blue"))
    assert difference(picture, expected) <= 1


def test_words_until_the_last_step_are_the_prompt_and_words_after_it_are_never_heard(pocket):
    plain = ours(pocket, "red square", steps=3)
    assert difference(ours(pocket, "[red square:blue circle:1.0]", steps=3), plain) <= 1
    assert difference(ours(pocket, "[blue circle:red square:0]", steps=3), plain) <= 1


def test_each_picture_of_a_batch_changes_at_its_own_step_and_the_pipeline_is_left_as_it_was(pocket):
    prompts = ["[red:blue:0.25] square", "a circle", "[red|blue] square"]
    together = draw(pocket, prompts, [1, 2, 3], steps=4, syntax="a1111")
    assert not pocket.unet._forward_pre_hooks
    for picture, prompt, seed in zip(together, prompts, [1, 2, 3], strict=True):
        assert difference(picture, draw(pocket, prompt, seed, steps=4, syntax="a1111")[0]) <= 1


def test_without_guidance_there_is_one_row_a_picture(pocket):
    settings = {"steps": 3, "guidance": 1.0, "syntax": "a1111"}
    red, changed = (draw(pocket, [prompt] * 2, 7, **settings)[1] for prompt in ("red", "[red:blue:1]"))
    assert difference(red, changed) > 1


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_stage_is_one_tensor_at_all_of_its_steps(guidance, pocket):
    """By which layers know a text again."""
    heard = []

    def listen(module, args, options):
        heard.append(options["encoder_hidden_states"])

    with pocket.unet.register_forward_pre_hook(listen, with_kwargs=True):
        draw(pocket, "[red:blue:2]", 7, steps=4, guidance=guidance, syntax="a1111")
    assert [each is heard[0] for each in heard] == [True, True, False, False]
    assert heard[2] is heard[3]


def test_a_picture_to_begin_from_counts_the_steps_that_are_drawn(pocket):
    start = Start(Image.new("RGB", (64, 64), "orange"), strength=0.5)
    red, blue, half = (ours(pocket, text, steps=8, start=start) for text in ("red", "blue", "[red:blue:0.5]"))
    assert difference(ours(pocket, "[red:blue:4]", steps=8, start=start), red) <= 1
    assert difference(ours(pocket, "[red:blue:0]", steps=8, start=start), blue) <= 1
    assert difference(half, ours(pocket, "[red:blue:2]", steps=8, start=start)) <= 1
    assert difference(half, red) > 1
    with pytest.raises(ConfigError, match="is no step"):
        ours(pocket, "[red:blue:0.5]", steps=1, start=start)


def test_adapters_under_guidance_and_regions_go_with_it(pocket, tmp_path):
    path, layer = next((p, m) for p, m in pocket.unet.named_modules() if p.endswith("attn2.to_v"))
    module = LoraModule(torch.ones(1, layer.in_features), torch.ones(layer.out_features, 1), 1.0)
    file = write_lora(tmp_path / "a.safetensors", {("unet", path): module}, family="pocket")
    with compose(pocket, Adapter(file)) as mix, adapter_guidance(mix, 2.0, guidance=3.0):
        red, blue, changed = (ours(pocket, text, steps=4) for text in ("red", "blue", "[red:blue:0.5]"))
    assert difference(changed, red) > 1
    assert difference(changed, blue) > 1
    left = Region((0, 0, 0.5, 1), prompt="a circle")
    with regions(pocket, left, syntax="a1111"):
        red, changed = (ours(pocket, text, steps=4) for text in ("red", "[red:blue:0.5]"))
    assert difference(changed, red) > 1


def test_a_regions_words_change_as_the_calls_do(pocket):
    """A region of the whole picture is the picture of its prompt, also where a part of the steps is drawn."""
    start = Start(Image.new("RGB", (64, 64), "orange"), strength=0.5)
    with regions(pocket, Region((0, 0, 1, 1), prompt="[red:blue:0.5] square"), syntax="a1111"):
        found = [ours(pocket, "a circle", steps=4, start=each) for each in (None, start)]
        with pytest.raises(AdapterError, match=r"counted by sfumato\.draw"):
            pocket.pipeline()("a circle", num_inference_steps=1)
    for picture, each in zip(found, (None, start), strict=True):
        assert difference(picture, ours(pocket, "[red:blue:0.5] square", steps=4, start=each)) <= 1
    assert difference(found[0], ours(pocket, "red square", steps=4)) > 1
    with regions(pocket, Region((0, 0, 1, 1), prompt="red square"), syntax="a1111"):
        pocket.pipeline()("a circle", num_inference_steps=1)


def test_a_regions_weighted_words_want_a_base(pocket):
    with (
        pytest.raises(AdapterError, match="wants a Base"),
        regions(pocket.pipeline(), Region((0, 0, 1, 1), prompt="a (red:1.2) square"), syntax="a1111"),
    ):
        pass


def test_words_that_change_are_not_told_to_another_threads_call(pocket):
    base = pocket
    latents, text = torch.zeros(2, 4, 8, 8), torch.zeros(2, 77, base.unet.config.cross_attention_dim)
    latents = latents[:, : base.unet.config.in_channels]
    told = encode_stages(base, ["a [crab:owl:0.5]"], "", 4)

    def predicted():
        with torch.no_grad():
            return base.unet(latents, torch.tensor(500), encoder_hidden_states=text).sample

    before = predicted()
    with staged_prompts(base.unet, told, base.scheduler), ThreadPoolExecutor(1) as other:
        assert torch.equal(other.submit(predicted).result(), before)
        assert not torch.equal(predicted(), before)
