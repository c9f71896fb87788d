"""Adapters in regions: the whole picture is the plain mix, and outside its mask an adapter changes nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from sfumato.adapters.blocks import Blocks
from sfumato.compose import Adapter, compose, current
from sfumato.compose.regions import Region, regions
from sfumato.compose.regions.region import DeviceCache, Masks
from sfumato.errors import AdapterError, ConfigError, DataError
from sfumato.files.header import read_header
from sfumato.generation.draw import Start, draw, draw_each
from sfumato.models import load_base
from tests.compose.conftest import weights_sha
from tests.compose.test_per_picture import predict
from tests.tiny import CPU

U_NET = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj_in",
    "conv1",
    "conv_shortcut",
    "downsamplers.0.conv",
    "time_emb_proj",
)
WHOLE = (0, 0, 1, 1)


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_the_whole_picture_as_region_is_the_plain_mix(family, request, write):
    """Every kind of layer: convolutions, self- and cross-attention, what the time step adds."""
    pipe = request.getfixturevalue(family)
    a, b = (write(name, pipe, *U_NET, seed=seed, family=family) for seed, name in enumerate("ab"))
    before = weights_sha(pipe)
    with compose(pipe, Adapter(a, 0.8), Adapter(b, -0.5)):
        wanted = predict(pipe, [0, 1])
    with regions(pipe, Region(WHOLE, Adapter(a, 0.8), Adapter(b, -0.5))):
        found = predict(pipe, [0, 1])
    assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(found, predict(pipe, [0, 1]), atol=1e-4)
    assert weights_sha(pipe) == before


@pytest.mark.parametrize("syntax", ["a11111", None])
def test_a_syntax_that_there_is_not_is_refused_as_draw_refuses_it(sd1, syntax):
    """It would be read as plain, brackets and all."""
    sd1.encode_text = None  # as a Base has it
    with (
        pytest.raises(ConfigError, match=f"the prompt syntax {syntax!r}: wanted one of plain, a1111, compel"),
        regions(sd1, Region(WHOLE, prompt="a (crab:1.3)"), syntax=syntax),
    ):
        pass


def test_two_halves_with_one_adapter_are_the_plain_mix(sd1, write):
    a = write("a", sd1, *U_NET)
    with compose(sd1, Adapter(a)):
        wanted = predict(sd1, [0])
    with regions(sd1, Region((0, 0, 0.5, 1), Adapter(a)), Region((0.5, 0, 1, 1), Adapter(a))):
        assert_close(predict(sd1, [0]), wanted, atol=1e-5, rtol=1e-5)


def test_where_regions_overlap_their_attentions_share(sd1, write):
    """Two that attend alike are as one of them."""
    a = write("a", sd1, "attn2.to_k", "attn2.to_v")
    with compose(sd1, Adapter(a)):
        wanted = predict(sd1, [0])
    with regions(sd1, Region(WHOLE, Adapter(a)), Region(WHOLE, Adapter(a))):
        assert_close(predict(sd1, [0]), wanted, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(predict(sd1, [0]), wanted, atol=1e-4)


def test_a_picture_as_mask_counts_as_much_as_it_is_bright():
    grey = Image.new("L", (2, 1), 255)
    grey.putpixel((0, 0), 51)
    assert_close(Region(grey, prompt=None).mask(), torch.tensor([[[[0.2, 1.0]]]]))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "I;16"])
def test_a_picture_as_mask_counts_in_no_transparent_part_and_by_all_of_its_bits(mode):
    picture = Image.new(mode, (2, 1), {"RGBA": (255, 255, 255, 255), "LA": (255, 255), "I;16": 65535}[mode])
    picture.putpixel((0, 0), {"RGBA": (255, 255, 255, 51), "LA": (255, 51), "I;16": 13107}[mode])
    assert_close(Region(picture, prompt=None).mask(), torch.tensor([[[[0.2, 1.0]]]]))


def test_a_mask_whose_white_is_unknown_is_refused():
    with pytest.raises(DataError, match="a mask: floating-point pixels"):
        Region(Image.new("F", (2, 1), 1.0), prompt=None).mask()


def test_an_adapter_counts_in_its_steps_alone_as_in_a_mix(sd1, write, monkeypatch):
    """Beside another, in every kind of layer; a timestep within its span and one after it."""
    monkeypatch.setattr(sd1, "scheduler", DDIMScheduler(), raising=False)
    a, b = (write(name, sd1, *U_NET, seed=seed) for seed, name in enumerate("ab"))
    for timestep, held in ((900, 0.8), (100, 0.0)):
        with compose(sd1, Adapter(a, held), Adapter(b, -0.5)):
            wanted = predict(sd1, [0, 1], timestep=timestep)
        with regions(sd1, Region(WHOLE, Adapter(a, 0.8), Adapter(b, -0.5)), over_steps={"a": (0.0, 0.5)}):
            assert_close(predict(sd1, [0, 1], timestep=timestep), wanted, atol=1e-5, rtol=1e-5)


def test_an_adapter_counts_in_the_steps_that_its_file_asks_for(sd1, write, tmp_path, monkeypatch):
    """Unless others are asked for."""
    monkeypatch.setattr(sd1, "scheduler", DDIMScheduler(), raising=False)
    a, asks = write("a", sd1, *U_NET), tmp_path / "asks.safetensors"
    save_file(load_file(a), asks, read_header(a).metadata | {"sfumato.over_steps": "0-0.5"})

    def predicted(**over_steps):
        with regions(sd1, Region(WHOLE, Adapter(asks, 0.8)), over_steps=over_steps):
            return predict(sd1, [0, 1], timestep=100)

    with regions(sd1, Region(WHOLE, Adapter(a, 0.8))):
        whole = predict(sd1, [0, 1], timestep=100)
    assert_close(predicted(asks=(0.0, 1.0)), whole)
    assert_close(predicted(), predict(sd1, [0, 1], timestep=100))
    assert not torch.allclose(predicted(), whole)


def test_factors_and_masks_are_moved_once():
    """On a GPU each layer of each call would wait for them."""
    near, half = DeviceCache(torch.ones(2)), torch.zeros(1, dtype=torch.float16)
    assert near.like(half).dtype == torch.float16
    assert near.like(half) is near.like(half)


def test_steps_of_an_adapter_in_no_region_are_refused(sd1, write):
    a = write("a", sd1, *U_NET)
    with pytest.raises(AdapterError, match="'otter', which is in no region"):
        regions(sd1, Region(WHOLE, Adapter(a)), over_steps={"otter": (0.0, 0.5)}).__enter__()


@pytest.mark.parametrize("ending", ["proj_in", "attn2.to_v", "time_emb_proj"])
def test_outside_its_mask_an_adapter_changes_nothing(sd1, write, ending):
    """The first block that an adapter touches, before convolutions and self-attention carry it on."""
    a = write("a", sd1, f"down_blocks.0.{_first(ending)}")
    mask = Image.new("L", (64, 64), 0)
    mask.paste(255, (0, 0, 32, 64))
    watched = sd1.unet.get_submodule(
        "down_blocks.0." + {"time_emb_proj": "resnets.0.norm2"}.get(ending, _first(ending))
    )
    if ending == "attn2.to_v":
        watched = sd1.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    seen = []
    with regions(sd1, Region(mask, Adapter(a, 5.0))):
        handle = watched.register_forward_hook(lambda m, x, y: seen.append(x[0] if ending == "time_emb_proj" else y))
        predict(sd1, [0])
        handle.remove()
    handle = watched.register_forward_hook(lambda m, x, y: seen.append(x[0] if ending == "time_emb_proj" else y))
    predict(sd1, [0])
    handle.remove()
    change = (seen[0] - seen[1]).abs()
    change = change.sum(-1).view(1, 16, 16) if change.ndim == 3 else change.sum(1)
    assert change[..., :8].min() > 0
    assert change[..., 8:].max() < 1e-5


def _first(ending):
    return {
        "proj_in": "attentions.0.proj_in",
        "attn2.to_v": "attentions.0.transformer_blocks.0.attn2.to_v",
        "time_emb_proj": "resnets.0.time_emb_proj",
    }[ending]


@pytest.fixture
def base(pocket_folder):
    return load_base(str(pocket_folder), precision=CPU)


def test_a_region_with_the_calls_own_prompt_is_no_region(base):
    plain = draw(base, "red square", 0, steps=2)[0]
    with regions(base, Region((0, 0, 0.5, 1), prompt="red square")):
        same = draw(base, "red square", 0, steps=2)[0]
    with regions(base, Region((0, 0, 0.5, 1), prompt="blue circle")):
        other = draw(base, "red square", 0, steps=2)[0]
    near = max(abs(a - b) for a, b in zip(plain.tobytes(), same.tobytes(), strict=True))
    assert near <= 1
    assert other.tobytes() != plain.tobytes()


def test_tags_are_refused_where_nobody_hears_them(base):
    tagged = "red square <lora:line:1>"
    for texts in ({"prompts": tagged}, {"prompts": "red square", "negative": tagged}):
        with pytest.raises(ConfigError, match=r"<lora:line:...> is not read here; compose the adapter"):
            draw(base, seeds=0, steps=1, **texts)
    assert len(list(draw_each(base, tagged, 0, steps=1))) == 1  # as the samples of a training that has such captions
    with pytest.raises(ConfigError, match="give Region the adapter"), regions(base, Region(WHOLE, prompt=tagged)):
        pass


def test_a_text_encoders_part_wants_a_prompt_of_the_region(sd1, write):
    a = write("a", sd1, "to_q", "fc1")
    with pytest.raises(AdapterError, match="no prompt of its own"), regions(sd1, Region(WHOLE, Adapter(a))):
        pass
    with regions(sd1, Region(WHOLE, Adapter(a, (1.0, 0.0)))):
        predict(sd1, [0])


@pytest.mark.parametrize(
    ("where", "said"),
    [((0, 0, 0, 1), "box"), ((0.5, 0, 1.5, 1), "box"), (Image.new("L", (8, 8), 0), "a region is black all over")],
)
def test_a_region_that_is_none_is_refused_and_leaves_no_hook(sd1, where, said):
    with pytest.raises(AdapterError, match=said), regions(sd1, Region(where, prompt=None)):
        pass
    assert not any(module._forward_hooks for module in sd1.unet.modules())


def test_a_black_region_is_named_by_its_adapters_or_its_prompt():
    black = Image.new("L", (8, 8), 0)
    for region, named in (
        (Region(black, Adapter("line.safetensors"), Adapter("b.safetensors"), prompt="a crab"), "line and b"),
        (Region(black, prompt="a crab"), "'a crab'"),
    ):
        with pytest.raises(AdapterError, match=f"the region of {named} is black all over"):
            region.mask()


@pytest.mark.parametrize("way", ["baked", "live"])
def test_a_regions_prompt_is_read_with_the_mix_that_the_pipeline_carries(base, write, way):
    """A region of the whole picture, whose text part stands beside that of a mix, is the plain mix of both."""
    parts = SimpleNamespace(unet=base.unet, text_encoder=base.text_encoders[0])
    a, b = (write(n, parts, "to_v", "fc1", "q_proj", seed=s, family="pocket") for s, n in enumerate("ab"))
    unguided = {"steps": 2, "guidance": 1.0}  # the rows without a prompt are read by the mix alone
    with compose(base, Adapter(a, 3.0), Adapter(b, 3.0)):
        wanted = np.asarray(draw(base, "red square", 0, **unguided)[0], dtype=int)
    with compose(base, Adapter(a, 3.0), way=way) as mix:
        with regions(base, Region(WHOLE, Adapter(b, 3.0), prompt="red square")):
            found = np.asarray(draw(base, "blue circle", 0, **unguided)[0], dtype=int)
        assert current(base) is mix
        assert list(mix.weights) == ["a"]
        alone = np.asarray(draw(base, "red square", 0, **unguided)[0], dtype=int)
    assert abs(found - wanted).max() <= 1
    assert abs(found - alone).max() > 1


@pytest.mark.parametrize("start", [None, Start(Image.new("RGB", (64, 64), "red"), 1.0)])
def test_a_region_is_told_by_the_call_under_way_not_by_an_earlier_one(base, start):
    """With guidance half of the rows have no prompt. What begins from a picture is the call of another pipeline."""
    pipe, drawn = base.pipeline(), {"steps": 1, "guidance": 1.0, "start": start}
    wanted = [picture.tobytes() for picture in draw(pipe, "red square", [0, 1], **drawn)]
    pipe("a cat", num_inference_steps=1, guidance_scale=5.0, output_type="latent")
    for source in (pipe, base):
        with regions(source, Region(WHOLE, prompt="red square")):
            found = [picture.tobytes() for picture in draw(source, "blue circle", [0, 1], **drawn)]
        near = max(abs(a - b) for pair in zip(found, wanted, strict=True) for a, b in zip(*pair, strict=True))
        assert near <= 1


@pytest.mark.parametrize("factors", [{"te": 0.0}, {"encoder.layers.0": 0.0}, {"encoder.layers.0.self_attn": 3.0}])
def test_blocks_of_a_text_encoder_count_in_a_region(base, write, factors):
    parts = SimpleNamespace(unet=base.unet, text_encoder=base.text_encoders[0])
    a = write("a", parts, "to_v", "fc1", "q_proj", family="pocket")
    adapter, unguided = Adapter(a, Blocks(3.0, factors)), {"steps": 2, "guidance": 1.0}
    with compose(base, adapter):
        wanted = np.asarray(draw(base, "red square", 0, **unguided)[0], dtype=int)
    with regions(base, Region(WHOLE, adapter, prompt="red square")):
        found = np.asarray(draw(base, "red square", 0, **unguided)[0], dtype=int)
    assert abs(found - wanted).max() <= 1


def test_texts_of_different_lengths_stand_side_by_side(base):
    """A region of the whole picture is the picture of its prompt, however long that and the call's are."""
    pytest.importorskip("compel")
    drawn = {"steps": 2, "syntax": "a1111"}
    long, short = "red square, " * 40, "a (blue:1.4) cat"
    for own, other in ((long, short), (short, long)):
        wanted = np.asarray(draw(base, own, 0, **drawn)[0], dtype=int)
        with regions(base, Region(WHOLE, prompt=own), syntax="a1111"):
            found = np.asarray(draw(base, other, 0, **drawn)[0], dtype=int)
        assert abs(found - wanted).max() <= 1


def test_a_grey_mask_counts_as_much_as_it_is_white(sd1, write):
    path, seen = "down_blocks.0.attentions.0.transformer_blocks.0.attn2", []
    a = Adapter(write("a", sd1, f"{path}.to_v"))
    handle = sd1.unet.get_submodule(path).register_forward_hook(lambda module, x, y: seen.append(y))
    predict(sd1, [0])
    for grey in (51, 255):
        with regions(sd1, Region(Image.new("L", (8, 8), grey), a)):
            predict(sd1, [0])
    handle.remove()
    assert_close(seen[1] - seen[0], 0.2 * (seen[2] - seen[0]), atol=1e-5, rtol=1e-4)


def test_latents_of_odd_sides_have_as_many_tokens_as_the_u_net_makes():
    assert Masks([torch.ones(1, 1, 8, 8)], (9, 7)).on_tokens(5 * 4, torch.zeros(1)).shape == (1, 20)
