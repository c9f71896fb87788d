"""What an inpainting model is not shown of its samples."""

import torch

from sfumato.data.preparation.latents import InpaintingMasks

SIZE = (96, 64)


def drawn(count=400, own=None, **settings):
    return [
        InpaintingMasks(**settings).draw(SIZE, own, 0, step, place) for step in range(count // 4) for place in range(4)
    ]


def test_a_hole_is_a_function_of_seed_step_and_place():
    holes = InpaintingMasks(0.0)
    assert torch.equal(holes.draw(SIZE, None, 1, 2, 3), holes.draw(SIZE, None, 1, 2, 3))
    others = [holes.draw(SIZE, None, *lot) for lot in ((2, 2, 3), (1, 3, 3), (1, 2, 2))]
    assert all(not torch.equal(other, holes.draw(SIZE, None, 1, 2, 3)) for other in others)


def test_the_share_of_wholes_is_as_asked_for():
    for share in (0.0, 0.25, 1.0):
        wholes = sum(bool(hole.all()) for hole in drawn(whole_share=share))
        assert abs(wholes / 400 - share) < 0.06
        assert share > 0 or wholes < 4  # a stroke may cover all, hardly ever


def test_holes_are_zeros_and_ones_of_every_size_and_everywhere():
    found = torch.stack(drawn(whole_share=0.0))
    assert found.shape == (400, 1, 64, 96)
    assert set(found.unique().tolist()) == {0.0, 1.0}
    areas = found.mean((1, 2, 3))
    assert areas.min() > 0.005  # one of 8 x 12 px has 0.016, an ellipse less, a stroke at the edge the least
    assert areas.min() < 0.06
    assert areas.max() > 0.6
    often = found.mean((0, 1))
    assert often.min() > 0
    assert often[32, 48] > 0.3


def test_in_half_of_them_a_mask_of_its_own_is_what_is_hidden():
    own = torch.zeros(1, 16, 24)
    own[:, 3:7, 5:9] = 0.3  # also where it shows a part of a cell
    wanted = torch.zeros(1, 64, 96)
    wanted[:, 12:28, 20:36] = 1
    count = sum(torch.equal(hole, wanted) for hole in drawn(own=own, whole_share=0.0))
    assert 160 < count < 240
    assert 60 < sum(torch.equal(hole, wanted) for hole in drawn(own=own, whole_share=0.5)) < 140
    assert sum(torch.equal(hole, wanted) for hole in drawn(own=own, whole_share=1.0)) == 0
