"""The latents of what a lesson shows."""

import pytest
import torch
from torch.testing import assert_close

from sfumato import load_base
from sfumato.data.preparation.latents import to_float
from sfumato.errors import DataError
from sfumato.training.pretrain.batches import Latents, PretrainBatch, encode, encode_all, restyle
from sfumato.training.pretrain.dataset import VARIANTS, Move
from sfumato.training.pretrain.dataset import read_pictures as read_drawings
from sfumato.training.pretrain.model import build_vae
from tests.tiny import CPU


def test_latents_of_changed_and_crossed_pictures_are_those_of_the_pictures_as_they_come_to_be(data):
    drawn = read_drawings(data)
    vae = load_base("pocket", precision=CPU).vae
    cache = Latents(vae, drawn, VARIANTS[:2], torch.device("cpu"))
    move = Move(3, -5, 7)
    moves, hands = {0: move, 1: move}, {1: 7, 2: 8}
    lesson = PretrainBatch(asked=[0, 1, 2], seen=[0, 3, 4], variants=[1, 0, 0], moves=moves, hands=hands, captions=[])
    lying = to_float(torch.stack([move.of(drawn.pixels[0].flip(2)), move.of(drawn.pixels[1]), drawn.pixels[2]]))
    shown = to_float(torch.stack([move.of(drawn.pixels[0].flip(2)), move.of(drawn.pixels[3]), drawn.pixels[4]]))
    changed = [torch.cat([pixels[:1], restyle(pixels[1:], [7, 8])]) for pixels in (lying, shown)]
    (mean, deviation), (seen, _) = (encode(vae, pixels) for pixels in changed)
    scaled = [vae.config.scaling_factor * part for part in (mean, deviation, seen)]
    assert_close(list(cache.of(lesson)), scaled, rtol=1e-4, atol=1e-4)


def test_latents_that_are_not_finite_name_the_pictures(data):
    vae = build_vae()
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(DataError, match=r"crab noto, .*: the VAE's latents are not finite"):
        encode_all(vae, read_drawings(data), torch.device("cpu"))
