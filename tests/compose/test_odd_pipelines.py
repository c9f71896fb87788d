"""Pipelines that lack a part, are of inference mode, are copied in a block, or call the U-Net in their own way."""

import copy
import pickle

import pytest
import torch

from sfumato.compose import Adapter, adapter_guidance, compose
from sfumato.compose.per_image import composite, per_picture
from sfumato.compose.schedules import Ramp, over_steps
from sfumato.errors import AdapterError
from tests.compose.conftest import fresh, weights_sha


def predict(pipe, timestep=500, rows=2):
    latents = torch.ones(rows, pipe.unet.config.in_channels, 8, 8)
    text = torch.ones(rows, 7, pipe.unet.config.cross_attention_dim)
    with torch.inference_mode():
        return pipe.unet(latents, timestep, text).sample


def test_a_pipeline_made_in_inference_mode_is_mixed_and_undone_outside_of_it(originals, write):
    with torch.inference_mode():
        pipe = fresh(originals["sd1"])
        for part in (pipe.unet, pipe.text_encoder):
            for parameter in part.parameters():
                parameter.data = parameter.data.clone()
    assert pipe.unet.conv_in.weight.is_inference()
    before = weights_sha(pipe)
    mix = compose(pipe, Adapter(write("a", pipe), 0.7))
    changed = predict(pipe)
    with adapter_guidance(mix, 2.0, guidance=4.0):
        predict(pipe)
    mix.set(a=0.2)
    assert not torch.allclose(predict(pipe), changed)
    mix.undo()
    assert weights_sha(pipe) == before


def test_without_a_text_encoder_an_adapter_that_asks_nothing_of_it_is_mixed(sd1, write):
    file = write("a", sd1)
    sd1.text_encoder = None
    with pytest.raises(
        AdapterError, match=r"modules change the text_encoder, which this pipeline does not have\. Give"
    ):
        compose(sd1, Adapter(file, 0.7))
    plain = predict(sd1)
    for adapter, options in ((Adapter(file, (0.7, 0.0)), {}), (Adapter(file, 0.7), {"partial": True})):
        with compose(sd1, adapter, **options):
            assert not torch.allclose(predict(sd1), plain)


@pytest.mark.parametrize("block", ["over_steps", "per_picture", "composite", "guidance"])
def test_a_copy_within_a_block_is_refused(block, sd1, write):
    """Its hooks would go on changing the first pipeline's weights."""
    adapter = Adapter(write("a", sd1, "attn1.to_q"))
    if block in ("over_steps", "guidance"):
        mix = compose(sd1, adapter)
        guided = adapter_guidance(mix, 2, guidance=4)
        entered = guided if block == "guidance" else over_steps(mix, a=Ramp((0, 0), (1, 1)))
    else:
        entered = per_picture(sd1, [[adapter]]) if block == "per_picture" else composite(sd1, adapter, adapter)
    with entered:
        for copied in (copy.deepcopy, pickle.dumps):
            with pytest.raises(AdapterError, match="go on acting on the first; copy it before the block"):
                copied(sd1.unet)
    copy.deepcopy(sd1.unet)


@pytest.mark.parametrize("timestep", [500, torch.tensor(500), torch.tensor([500]), torch.tensor([500, 500])])
def test_a_composite_takes_timesteps_in_every_form(timestep, sd1, write):
    adapters = [Adapter(write(name, sd1, "attn1.to_q", seed=seed)) for name, seed in (("a", 1), ("b", 2))]
    with composite(sd1, *adapters):
        assert torch.equal(predict(sd1, timestep), predict(sd1))


def test_a_pipeline_with_further_rows_is_refused(sd1, write):
    class StableDiffusionSAGPipeline:
        scheduler, do_classifier_free_guidance = None, True

        def __init__(self):
            self.unet, self.text_encoder = sd1.unet, sd1.text_encoder

        def __call__(self):
            return predict(self)

    pipe = StableDiffusionSAGPipeline()
    mix = compose(pipe, Adapter(write("a", sd1, "attn1.to_q")))
    pipe()
    with (
        adapter_guidance(mix, 2.0, guidance=4.0),
        pytest.raises(AdapterError, match=r"SAGPipeline calls the U-Net with"),
    ):
        pipe()


@pytest.mark.parametrize("way", ["live", "by picture"])
def test_what_another_hook_answers_in_a_layers_place_is_not_written_to(way, sd1, write):
    """As studies of a model put kept outputs in the place of a layer's own."""
    adapter = Adapter(write("a", sd1, "attn1.to_q"))
    layer = sd1.unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    kept = torch.zeros(1, 4, layer.out_features)
    block = (lambda: compose(sd1, adapter, way="live")) if way == "live" else (lambda: per_picture(sd1, [[adapter]]))
    with layer.register_forward_hook(lambda *_: kept), torch.no_grad(), block():
        first, second = (layer(torch.ones(1, 4, layer.in_features)).clone() for _ in range(2))
    assert first.any()
    assert torch.equal(first, second)
    assert not kept.any()
