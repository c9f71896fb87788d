"""What a GPU has no memory to decode at once."""

import numpy as np
import pytest
import torch

from sfumato import draw
from tests.on_gpu.device import gpu, pipeline


@pytest.mark.slow
@pytest.mark.parametrize("said", ["CUDA out of memory", "GET was unable to find an engine to execute this computation"])
def test_what_a_gpu_cannot_decode_at_once_is_decoded_in_tiles(monkeypatch, said):
    tiled = pipeline("sd1")
    own, side = (tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size), 64 // tiled.vae_scale_factor
    assert own[0] >= side  # the VAE's own tiles hold the whole picture, as each family's do
    tiled.vae.enable_tiling()
    tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size = side // 2, 32
    wanted, asked = draw(tiled, "a crab", [1, 2], steps=1, width=64, height=64), []
    with gpu():
        pipe = pipeline("sd1").to("cuda")
        decode = pipe.vae.decoder.forward

        def small(latents, *args):
            asked.append((len(latents), latents.shape[-1]))
            if latents.shape[-1] == side:
                raise RuntimeError(said)
            return decode(latents, *args)

        monkeypatch.setattr(pipe.vae.decoder, "forward", small)
        found = draw(pipe, "a crab", [1, 2], steps=1, width=64, height=64)
    assert asked[0] == (2, side)
    assert max(asked[1:]) == (1, side // 2)
    assert not pipe.vae.use_tiling
    assert (pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size) == own
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 2


def test_who_decodes_in_tiles_anyway_goes_on_with_it(monkeypatch):
    asked = []
    with gpu():
        pipe = pipeline("sd1").to("cuda")
        pipe.vae.enable_tiling()

        def small(latents, **options):
            asked.append(pipe.vae.use_tiling)
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(pipe.vae, "decode", small)
        with pytest.raises(torch.OutOfMemoryError):
            draw(pipe, "a crab", 1, steps=1, width=64, height=64)
        assert asked == [True]
        assert pipe.vae.use_tiling


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(monkeypatch):
    asked = []
    with gpu():
        pipe = pipeline("sd1").to("cuda")

        def broken(latents, **options):
            asked.append(pipe.vae.use_tiling)
            raise RuntimeError("no kernel for it")

        monkeypatch.setattr(pipe.vae, "decode", broken)
        with pytest.raises(RuntimeError, match="no kernel for it"):
            draw(pipe, "a crab", 1, steps=1, width=64, height=64)
    assert asked == [False]
