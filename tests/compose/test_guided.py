"""Adapter guidance: the first half of a call is the base's, the second the mix's, and it all comes back."""

import copy
from contextlib import nullcontext

import pytest
import torch
from torch.testing import assert_close

from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.guidance import unconditional_half
from sfumato.compose.layers.unfused import _Path
from sfumato.compose.schedules import Ramp, over_steps
from sfumato.errors import AdapterError
from sfumato.generation.draw import draw
from sfumato.models import load_base
from tests.compose.conftest import weights_sha
from tests.compose.test_per_picture import predict
from tests.tiny import CPU, tiny_pipeline

ROWS = [0, 1, 2, 3]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["baked", "live"])
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_first_half_is_the_bases_and_the_second_counts_strength_by_guidance(family, way, request, write):
    """2 / 4 of the weight 0.8 is 0.4; SDXL's further conditions are halved with the rest."""
    pipe = request.getfixturevalue(family)
    file = write("a", pipe, family=family)
    without = predict(pipe, [0, 1])
    with compose(pipe, Adapter(file, 0.4), way=way):
        wanted = predict(pipe, [2, 3])
    before = weights_sha(pipe)
    with compose(pipe, Adapter(file, 0.8), way=way) as mix:
        plain = predict(pipe, ROWS)
        with adapter_guidance(mix, 2.0, guidance=4.0):
            assert mix.weights["a"] == 0.8
            assert torch.equal(predict(pipe, ROWS), torch.cat([without, wanted]))
            assert torch.equal(predict(pipe, ROWS), torch.cat([without, wanted]))
        assert torch.equal(predict(pipe, ROWS), plain)
        assert not torch.allclose(plain[2:], wanted)
    assert weights_sha(pipe) == before
    assert "forward" not in vars(pipe.unet)


@pytest.mark.parametrize("way", ["baked", "live"])
def test_adapters_without_a_strength_are_in_both_halves(sd1, write, way):
    """a counts in the second half alone; b, which has its own layers and some of a's, in both."""
    a, b = write("a", sd1, "to_q", "conv1"), write("b", sd1, "to_q", "to_v", seed=2)
    with compose(sd1, Adapter(b, 0.5), way=way) as mix:
        first = predict(sd1, [0, 1])
        mix.set(b=0.7)
        first_after = predict(sd1, [0, 1])
    with compose(sd1, Adapter(a, 0.4), Adapter(b, 0.5), way=way) as mix:
        second = predict(sd1, [2, 3])
        mix.set(b=0.7)
        second_after = predict(sd1, [2, 3])
    before = weights_sha(sd1)
    with compose(sd1, Adapter(a, 0.8), Adapter(b, 0.5), way=way) as mix:
        plain = predict(sd1, ROWS)
        with adapter_guidance(mix, {"a": 2.0, "b": 0.0}, guidance=4.0):
            assert_close(predict(sd1, ROWS), torch.cat([first, second]), rtol=1e-5, atol=1e-5)
            with pytest.raises(AdapterError, match="inf"):
                mix.set(b=float("inf"))
            with pytest.raises(AdapterError, match="'c'"):
                mix.set(c=1.0)
            assert_close(predict(sd1, ROWS), torch.cat([first, second]), rtol=1e-5, atol=1e-5)
            mix.set(b=0.7)
            assert_close(predict(sd1, ROWS), torch.cat([first_after, second_after]), rtol=1e-5, atol=1e-5)
            mix.set(b=0.5)
        assert torch.equal(predict(sd1, ROWS), plain)
    assert weights_sha(sd1) == before


def test_nothing_is_weighed_from_half_to_half(sd1, write, monkeypatch):
    """Beside another adapter each layer holds both its weights, and what is added to a caption's for each half."""
    a, b = write("a", sd1, "to_q", "to_v"), write("b", sd1, "to_q", "to_v", seed=2)
    latents, text = torch.ones(2, 4, 16, 16), torch.ones(2, 7, sd1.unet.config.cross_attention_dim)
    layer = next(module for path, module in sd1.unet.named_modules() if path.endswith("attn2.to_v"))
    answers, add = [], _Path.__call__

    def only_pictures(path, x, output):
        assert x.shape[1] != 7
        return add(path, x, output)

    with compose(sd1, Adapter(a, 0.8), Adapter(b, 0.5), way="live") as mix, torch.no_grad():
        handle = layer.register_forward_hook(lambda module, inputs, output: answers.append(output))
        with adapter_guidance(mix, {"a": 2.0}, guidance=4.0), monkeypatch.context() as patch:
            patch.setattr("sfumato.compose.layers.unfused._Path._weigh", None)
            first = sd1.unet(latents, torch.tensor(500), text).sample
            patch.setattr("sfumato.compose.layers.unfused._Path.__call__", only_pictures)
            again = sd1.unet(latents, torch.tensor(500), text).sample
        handle.remove()
    assert torch.equal(first, again)
    assert not torch.equal(answers[0], answers[1])


def test_an_overflow_within_leaves_both_halves_as_they_were(sd1, write):
    """fp16 holds no 65,536: the sum with b is refused, and a's two halves are still there."""
    sd1.unet.half()
    a, b = write("a", sd1, "to_q"), write("b", sd1, "to_q", seed=2, alpha=1e8)
    layer = next(module for path, module in sd1.unet.named_modules() if path.endswith("to_q"))

    def weight():
        return layer.weight.detach().clone()

    with compose(sd1, Adapter(a, 0.8), Adapter(b, 1e-6)) as mix, adapter_guidance(mix, {"a": 2.0}, guidance=4.0):
        with mix.without_conditional():
            first = weight()
        second = weight()
        with pytest.raises(AdapterError, match="overflow"):
            mix.set(b=10)
        assert torch.equal(weight(), second)
        with mix.without_conditional():
            assert torch.equal(weight(), first)
        assert not torch.equal(first, second)


def test_files_say_what_they_ask_for(sd1, write, tmp_path):
    from safetensors.torch import load_file, save_file

    def asking(name, strength):
        file = write(name, sd1)
        save_file(load_file(file), file, {"sfumato.adapter_guidance": strength})
        return file

    files = [Adapter(asking(name, text)) for name, text in (("a", "2"), ("b", "0"), ("c", "-1"), ("d", "much"))]
    with compose(sd1, *files) as mix:
        assert mix.strengths == {"a": 2.0}
        with adapter_guidance(mix, {"a": 2.0}, guidance=4.0):
            wanted = predict(sd1, ROWS)
        with adapter_guidance(mix, guidance=4.0):
            assert torch.equal(predict(sd1, ROWS), wanted)


@pytest.mark.parametrize(("strength", "guidance"), [(0.0, 3.0), (2.0, 1.0), (2.0, 0.0)])
def test_without_strength_or_guidance_the_mix_stays_as_it_is(sd1, write, strength, guidance):
    with compose(sd1, Adapter(write("a", sd1))) as mix:
        plain = predict(sd1, ROWS)
        with adapter_guidance(mix, strength, guidance=guidance):
            assert torch.equal(predict(sd1, ROWS), plain)
            predict(sd1, [0])  # one row a picture, as it is drawn without guidance


def test_text_encoders_keep_their_weight(sd1, write):
    """The text is encoded before there are halves."""
    ids = torch.tensor([[1, 5, 9, 2]])
    with compose(sd1, Adapter(write("a", sd1, "q_proj", "to_q"), 0.8)) as mix, torch.no_grad():
        plain = sd1.text_encoder(ids)[0]
        with adapter_guidance(mix, 2.0, guidance=4.0):
            assert torch.equal(sd1.text_encoder(ids)[0], plain)
            mix.set(a=0.4)
            assert not torch.equal(sd1.text_encoder(ids)[0], plain)
            mix.set(a=0.8)
            assert torch.equal(sd1.text_encoder(ids)[0], plain)


def test_weights_may_change_within(sd1, write):
    """A new weight within the block counts as the others do; a muted adapter leaves both halves to the base."""
    file = write("a", sd1)
    without = predict(sd1, ROWS)
    with compose(sd1, Adapter(file, 0.3)):
        wanted = predict(sd1, [2, 3])
    with compose(sd1, Adapter(file, 0.8)) as mix, adapter_guidance(mix, 2.0, guidance=4.0):
        mix.set(a=0.6)
        assert_close(predict(sd1, ROWS), torch.cat([without[:2], wanted]), rtol=1e-5, atol=1e-5)
        mix.mute()
        assert_close(predict(sd1, ROWS), without, rtol=1e-5, atol=1e-5)
        mix.unmute()
        assert_close(predict(sd1, ROWS)[2:], wanted, rtol=1e-5, atol=1e-5)


def test_nothing_is_left_after_an_error_within(sd1, write):
    before = weights_sha(sd1)
    with compose(sd1, Adapter(write("a", sd1))) as mix:
        plain = predict(sd1, ROWS)
        with pytest.raises(AdapterError, match="3 rows, which are no two halves"), adapter_guidance(mix, 2, guidance=3):
            predict(sd1, [0, 1, 2])
        assert torch.equal(predict(sd1, ROWS), plain)
        with pytest.raises(RuntimeError), adapter_guidance(mix, 2, guidance=3):
            sd1.unet(torch.zeros(2, 1, 8, 8), torch.tensor(1), torch.zeros(2, 7, 5))
        assert torch.equal(predict(sd1, ROWS), plain)
    assert weights_sha(sd1) == before


def test_what_cannot_be_meant_is_refused(sd1, write):
    with compose(sd1, Adapter(write("a", sd1))) as mix:
        with pytest.raises(AdapterError, match="wanted 0 or more"), adapter_guidance(mix, -1, guidance=3):
            pass
        sd1.unet.compile()
        with pytest.raises(AdapterError, match="the unet is compiled"), adapter_guidance(mix, 2, guidance=3):
            pass


def test_a_copy_made_within_is_refused_as_it_would_call_the_first(sd1, write):
    mix = compose(sd1, Adapter(write("a", sd1, "to_q")))
    with adapter_guidance(mix, 2.0, guidance=7.5), pytest.raises(AdapterError, match="copy it before"):
        copy.deepcopy(sd1.unet)
    mix.undo()
    copy.deepcopy(sd1.unet)


def test_a_forward_that_another_library_put_there_comes_back(sd1):
    """As accelerate's, which moves weights to the device and away."""
    own = sd1.unet.forward

    def moving(*args, **options):
        return own(*args, **options)

    sd1.unet.forward = moving
    plain = predict(sd1, ROWS)
    with unconditional_half(sd1.unet, nullcontext):
        assert_close(predict(sd1, ROWS), plain, rtol=1e-5, atol=1e-5)
    assert sd1.unet.forward is moving


def test_pictures_are_those_of_two_unets(pocket_folder, write):
    """A plain DDIM loop with the base's U-Net for the empty prompt and the mixed one for the prompt."""
    base = load_base(str(pocket_folder), precision=CPU)
    file = write("strong", base, "attn2.to_v", alpha=60.0, family="pocket")
    pipe, text, empty = base.pipeline(), base.encode_text(["red square"]).hidden, base.unconditional(1).hidden
    size = base.unet.config.sample_size
    latents = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(3))
    pipe.scheduler.set_timesteps(3)
    for timestep in pipe.scheduler.timesteps:
        with torch.no_grad():
            without = base.unet(latents, timestep, empty).sample
            with compose(base, Adapter(file, 0.5)):
                with_it = base.unet(latents, timestep, text).sample
        latents = pipe.scheduler.step(without + 4 * (with_it - without), timestep, latents).prev_sample
    with compose(base, Adapter(file, 1.0)) as mix, adapter_guidance(mix, 2.0, guidance=4.0):
        drawn = pipe(
            prompt_embeds=text, negative_prompt_embeds=empty, num_inference_steps=3, guidance_scale=4.0,
            generator=torch.Generator().manual_seed(3), output_type="latent",
        ).images  # fmt: skip
        ramped = draw(base, "red square", 3, steps=3, guidance=4.0)[0]
        with over_steps(mix, strong=Ramp((0, 1), (1, 1))):
            assert draw(base, "red square", 3, steps=3, guidance=4.0)[0].tobytes() == ramped.tobytes()
    assert_close(drawn, latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("told", "drawn"), [(7.5, 3.0), (1.0, 3.0), (3.0, 1.0)])
def test_a_call_that_draws_with_another_guidance_is_refused(write, tmp_path, told, drawn):
    """The weights are divided by the guidance that was told: drawn with another, adapters would count otherwise."""
    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.set_progress_bar_config(disable=True)
    once = {"num_inference_steps": 1, "output_type": "latent"}
    words = f"draws with guidance {drawn:g}, and adapter_guidance was told {told:g}"
    with compose(pipe, Adapter(write("a", pipe, "to_q"))) as mix:
        with adapter_guidance(mix, 2, guidance=told):
            with pytest.raises(AdapterError, match=words):
                pipe("a crab", guidance_scale=drawn, **once)
            with pytest.raises(AdapterError, match=words):
                draw(pipe, "a crab", 1, steps=1, guidance=drawn)
            pipe("a crab", guidance_scale=told, **once)
        with adapter_guidance(mix, 0, guidance=told):
            pipe("a crab", guidance_scale=drawn, **once)
    assert not pipe.unet._forward_pre_hooks
