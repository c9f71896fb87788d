"""Adapters by picture: one batch equals the single runs, and a composite the mean of its adapters' predictions."""

import asyncio
import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.per_image import composite, per_picture, texts_by_picture
from sfumato.errors import AdapterError
from sfumato.generation.draw import Start, draw
from sfumato.models import load_base
from tests.compose.conftest import weights_sha
from tests.pixels import difference
from tests.tiny import CPU, tiny_pipeline, tiny_pocket_folder


def predict(pipe, rows, seed=0, timestep=500):
    """The U-Net's prediction for the first `rows` of fixed latents, timesteps and texts."""
    generator = torch.Generator().manual_seed(seed)
    config = pipe.unet.config
    latents = torch.randn(8, config.in_channels, 16, 16, generator=generator)[rows]
    text = torch.randn(8, 7, config.cross_attention_dim, generator=generator)[rows]
    added = None
    if config.addition_embed_type == "text_time":
        pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        added = {"time_ids": torch.ones(len(latents), 6), "text_embeds": torch.ones(len(latents), pooled)}
    with torch.no_grad():
        return pipe.unet(latents, torch.tensor(timestep), text, added_cond_kwargs=added, return_dict=False)[0]


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_each_picture_of_a_batch_is_its_single_run(family, request, write):
    """Convolutions and text encoders in the file; two adapters, one, none; each row twice, as guidance has it."""
    pipe = request.getfixturevalue(family)
    a, b = (write(name, pipe, seed=seed, rank=seed + 1, family=family) for seed, name in enumerate("ab"))
    sets = [[Adapter(a, 0.8), Adapter(b, 0.5)], [Adapter(b, -1.0)], []]
    before = weights_sha(pipe)
    single = []
    for row, adapters in enumerate(sets):
        with compose(pipe, *adapters):
            single.append(predict(pipe, [row]))
    with per_picture(pipe, sets):
        together = predict(pipe, [0, 1, 2, 0, 1, 2])
    assert_close(together, torch.cat([*single, *single]), atol=1e-5, rtol=1e-5)
    assert weights_sha(pipe) == before
    assert not torch.allclose(single[0], predict(pipe, [0]))
    assert_close(single[2], predict(pipe, [2]), atol=1e-6, rtol=1e-6)


def test_text_encoders_are_adapted_by_picture(sd1, write):
    ids = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])
    a = write("a", sd1, "q_proj", "fc1")
    with compose(sd1, Adapter(a)), torch.no_grad():
        wanted = sd1.text_encoder(ids[:1]).last_hidden_state
    with per_picture(sd1, [[Adapter(a)], []]), torch.no_grad():
        found = sd1.text_encoder(ids).last_hidden_state
    with torch.no_grad():
        plain = sd1.text_encoder(ids).last_hidden_state
    assert_close(found, torch.cat([wanted, plain[1:]]), atol=1e-5, rtol=1e-5)


def test_weights_by_block_count(sd1, write):
    a = write("a", sd1, "to_q", "conv1")
    weight = Blocks(1.0, {"up": 0.5, "down": 0.0})
    with compose(sd1, Adapter(a, weight)):
        wanted = predict(sd1, [0])
    with per_picture(sd1, [[Adapter(a, weight)]]):
        assert_close(predict(sd1, [0]), wanted, atol=1e-5, rtol=1e-5)


def test_a_call_with_another_number_of_pictures_is_refused_and_leaves_no_hook(sd1, write):
    a = write("a", sd1, "to_q")
    with pytest.raises(AdapterError, match="5 rows and the adapters are for 2"), per_picture(sd1, [[Adapter(a)], []]):
        predict(sd1, [0, 1, 2, 3, 4])
    predict(sd1, [0, 1, 2, 3, 4])
    assert not any(module._forward_hooks for module in sd1.unet.modules())


def test_a_second_thread_is_refused_instead_of_adding_its_adapters(sd1, write):
    a = Adapter(write("a", sd1, "to_q"))
    with per_picture(sd1, [[a]]), ThreadPoolExecutor(1) as other:
        before = predict(sd1, [0])
        with pytest.raises(AdapterError, match="another thread or task draws with adapters by image"):
            other.submit(per_picture(sd1, [[a]]).__enter__).result()
        assert torch.equal(predict(sd1, [0]), before)
    with per_picture(sd1, [[a]]):  # it is free again
        pass


def test_a_second_task_of_a_loop_is_refused_as_a_second_thread_is(sd1, write):
    a = Adapter(write("a", sd1, "to_q"))
    entered = []

    async def request():
        with per_picture(sd1, [[a]]):
            entered.append(predict(sd1, [0]))
            await asyncio.sleep(0)

    async def both():
        return await asyncio.gather(request(), request(), return_exceptions=True)

    first, second = asyncio.run(both())
    assert first is None
    assert isinstance(second, AdapterError)
    assert len(entered) == 1


def test_a_block_by_picture_within_another_adds_to_it_and_a_composite_stands_alone(sd1, write):
    a, b = (Adapter(write(name, sd1, "to_q", "conv1", seed=seed)) for seed, name in enumerate("ab"))
    with per_picture(sd1, [[a, b], [b]]):
        wanted = predict(sd1, [0, 1])
    with per_picture(sd1, [[a], []]), per_picture(sd1, [[b], [b]]):
        assert_close(predict(sd1, [0, 1]), wanted, atol=1e-5, rtol=1e-5)
    for one, other in [(per_picture(sd1, [[a], []]), composite(sd1, a, b)), (composite(sd1, a), composite(sd1, a, b))]:
        with one, pytest.raises(AdapterError, match="a composite divides each row"), other:
            pass
    with composite(sd1, a, b), pytest.raises(AdapterError, match="a composite"), per_picture(sd1, [[a], []]):
        pass


def test_a_composite_is_the_mean_of_what_each_predicts(sd1, write):
    a, b = (write(name, sd1, "to_q", "conv1", seed=seed) for seed, name in enumerate("ab"))
    each = []
    for path in (a, b):
        with compose(sd1, Adapter(path, 0.7)):
            each.append(predict(sd1, [0, 1]))
    with composite(sd1, Adapter(a, 0.7), Adapter(b, 0.7)):
        found = predict(sd1, [0, 1])
    assert_close(found, sum(each) / 2, atol=1e-5, rtol=1e-5)


def test_a_composite_refuses_changed_text_encoders_unless_they_are_left_out(sd1, write):
    a = write("a", sd1, "to_q", "fc1")
    with pytest.raises(AdapterError, match="text_encoder"), composite(sd1, Adapter(a)):
        pass
    with composite(sd1, Adapter(a, (1.0, 0.0))):
        predict(sd1, [0])


@pytest.fixture(scope="module")
def called() -> Any:
    """A pipeline that is called as a whole."""
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Any:
    return load_base(tiny_pocket_folder(tmp_path_factory.mktemp("base")), precision=CPU)


@pytest.mark.parametrize("strength", [0, 2])
@pytest.mark.parametrize(
    ("prompts", "guidance", "said"),
    [
        (["a"], 5.0, "the call draws 1 image and the adapters are for 2"),
        (["a", "b", "c"], 5.0, "the call draws 3 images"),
        (["a", "b", "c", "d"], 5.0, "the call draws 4 images"),
        (["a"] * 4, 1.0, "the call draws 4 images"),
    ],
)
def test_a_pipeline_that_draws_another_number_of_pictures_is_refused(called, write, prompts, guidance, said, strength):
    """Two pictures' rows can be one picture's with guidance; adapter guidance shows each layer half of them."""
    a, b = (Adapter(write(name, called, "to_q", seed=seed)) for seed, name in enumerate("ab"))
    with compose(called, a) as mix, adapter_guidance(mix, strength, guidance=guidance), per_picture(called, [[b], []]):
        with pytest.raises(AdapterError, match=said):
            called(prompts, num_inference_steps=1, guidance_scale=guidance, output_type="latent")
        called(["a", "b"], num_inference_steps=1, guidance_scale=guidance, output_type="latent")


@pytest.mark.slow
@pytest.mark.parametrize(("syntax", "tokens"), [("plain", None), ("plain", 225), ("a1111", None)])
def test_draw_gives_each_picture_its_list_whatever_the_batch(base, write, syntax, tokens):
    """Text encoders and U-Net; with words that change, and prompts of several lengths."""
    if syntax == "a1111":
        pytest.importorskip("compel")
    base = dataclasses.replace(base, max_tokens=tokens)
    pipe = base.pipeline()
    a, b = (Adapter(write(name, pipe, "to_q", "q_proj", seed=seed), 3.0) for seed, name in enumerate("ab"))
    prompts = ["a [cat:dog:0.5]", "red cat, " * 40 if syntax == "a1111" or tokens else "red", "a (cat:1.3)", "red"]
    lists, how = [[a], [b], [], [b, a]], {"steps": 2, "syntax": syntax, "negative": "blue"}
    alone = []
    for seed, (prompt, each) in enumerate(zip(prompts, lists, strict=True)):
        with compose(base, *each):
            alone += draw(base, prompt, seed, **how)
    assert difference(alone[3], draw(base, prompts[3], 3, **how)[0]) > 1
    with per_picture(base, lists):
        assert texts_by_picture(base)
        for batch in (1, 3, 4):
            together = draw(base, prompts, range(4), batch=batch, **how)
            assert [difference(*pair) <= 1 for pair in zip(together, alone, strict=True)] == [True] * 4


def test_a_negative_prompt_of_several_chunks_is_read_as_each_picture_s_own_adapters_read_it(base, write):
    base = dataclasses.replace(base, max_tokens=150)
    a, how = Adapter(write("a", base.pipeline(), "q_proj"), 3.0), {"steps": 1, "negative": "blue cat, " * 20}
    with compose(base, a):
        wanted = [*draw(base, "red", 0, **how)]
    wanted += draw(base, "red", 1, **how)
    with per_picture(base, [[a], []]):
        found = draw(base, ["red", "red"], [0, 1], **how)
    assert [difference(*pair) <= 1 for pair in zip(found, wanted, strict=True)] == [True, True]


def test_draw_of_another_number_of_pictures_is_refused(base, write):
    """A Base has no calls of its own; `draw` tells of its pipeline's, also of one that begins from a picture."""
    lists = [[Adapter(write("a", base, "to_q"))], []]
    start = Start(Image.new("RGB", (64, 64), "red"), 1.0)
    with per_picture(base, lists):
        for more in ({}, {"batch": 1}, {"batch": 2, "guidance": 1.0}, {"start": start}):
            with pytest.raises(AdapterError, match="draws 4 images and the adapters are for 2 images"):
                draw(base, ["a", "b", "c", "d"], 1, steps=1, **more)
            with pytest.raises(AdapterError, match="draws 1 image and the adapters are for 2 images"):
                draw(base, "a", 1, steps=1, **more)
        assert len(draw(base, ["a", "b"], 1, steps=1, start=start)) == 2
    assert not base.unet._forward_pre_hooks


def test_a_call_with_more_rows_than_any_guidance_makes_is_refused(sd1, write):
    a = write("a", sd1, "to_q")
    with pytest.raises(AdapterError, match="8 rows and the adapters are for 2"), per_picture(sd1, [[Adapter(a)], []]):
        predict(sd1, [0, 1] * 4)
