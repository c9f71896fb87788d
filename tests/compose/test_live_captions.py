"""What live adapters make of a caption's keys and values is computed once for all steps, and never stale."""

import pytest
import torch
from torch.testing import assert_close

from sfumato.compose import Adapter, compose
from sfumato.compose.layers.unfused import _Path
from sfumato.errors import AdapterError
from tests.compose.test_per_picture import predict


def call(pipe, text):
    latents = torch.randn(1, pipe.unet.config.in_channels, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return pipe.unet(latents, torch.tensor(500), text, return_dict=False)[0]


def test_a_constant_caption_costs_its_adapters_once(sd1, write, monkeypatch):
    counted = []
    original = _Path.__call__
    monkeypatch.setattr(_Path, "__call__", lambda self, x, y: (counted.append(1), original(self, x, y))[1])
    text = torch.randn(1, 7, sd1.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with compose(sd1, Adapter(write("a", sd1, "attn2.to_k", "attn2.to_v")), way="live"):
        first = call(sd1, text)
        once = len(counted)
        assert torch.equal(call(sd1, text), first)
        assert len(counted) == once > 0


def test_another_caption_weight_or_change_in_place_is_seen(sd1, write):
    file = write("a", sd1, "attn2.to_k", "attn2.to_v")
    text = torch.randn(1, 7, sd1.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    results = {}
    for way in ("baked", "live"):
        given = text.clone()
        with compose(sd1, Adapter(file, 0.5), way=way) as mix:
            found = [call(sd1, given), call(sd1, given.flip(1))]
            mix.set(a=1.0)
            found.append(call(sd1, given))
            given.mul_(2)
            found.append(call(sd1, given))
            mix.mute()
            found.append(call(sd1, given))
        results[way] = torch.cat(found)
    assert_close(results["live"], results["baked"], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(results["live"][0], results["live"][2])


def test_a_batch_with_gradients_is_never_remembered(sd1, write):
    with compose(sd1, Adapter(write("a", sd1, "attn2.to_k")), way="live"):
        text = torch.randn(1, 7, sd1.unet.config.cross_attention_dim, requires_grad=True)
        latents = torch.randn(1, sd1.unet.config.in_channels, 16, 16)
        for _ in range(2):
            sd1.unet(latents, torch.tensor(500), text, return_dict=False)[0].sum().backward()
    assert predict(sd1, [0]).isfinite().all()


def test_another_weight_of_the_layer_is_seen(sd1, write):
    """As of a checkpoint that is loaded while the mix stays."""
    text = torch.randn(1, 7, sd1.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    with compose(sd1, Adapter(write("a", sd1, "attn2.to_k")), way="live"):
        call(sd1, text)
        with torch.no_grad():
            for name, parameter in sd1.unet.named_parameters():
                if name.endswith("attn2.to_k.weight"):
                    parameter.mul_(2)
        found = call(sd1, text)
        assert torch.equal(found, call(sd1, text.clone()))


def test_a_mix_that_is_refused_leaves_nothing_beside_the_layers(sd1, write):
    """A service tries again and again."""
    file = write("a", sd1, "attn2.to_k", "conv1", alpha=1e8)
    sd1.unet.half()
    for _ in range(3):
        with pytest.raises(AdapterError):
            compose(sd1, Adapter(file, 10.0), way="live")
    assert not any(module._forward_hooks for module in sd1.unet.modules())


def test_what_is_kept_of_a_caption_is_no_other_weights_and_no_other_dtypes(sd1, write):
    """Weights that are changed through `.data`, as diffusers' fuse_lora does, have the version that they had."""
    text = torch.randn(1, 7, sd1.unet.config.cross_attention_dim, generator=torch.Generator().manual_seed(1))
    layer = next(module for path, module in sd1.unet.named_modules() if path.endswith("attn2.to_k"))
    with compose(sd1, Adapter(write("a", sd1, "attn2.to_k")), way="live"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            call(sd1, text)
        call(sd1, text)
        layer.weight.data.mul_(2)
        assert torch.equal(call(sd1, text), call(sd1, text.clone()))
        layer.weight.data.div_(2)
