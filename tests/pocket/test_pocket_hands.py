"""Pictures changed as other hands might have drawn them: how many, within what range, and what each change does."""

import pytest
import torch

from sfumato.training.pretrain import batches
from sfumato.training.pretrain.batches import HAND_COUNT, hand_name, restyle, restyle_randomly


def lots(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rand(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=lots())


@pytest.fixture
def squares():
    """Eight pictures of a red square with a blue one in it, on white, in [-1, 1]."""
    pixels = torch.ones(8, 3, 64, 64)
    pixels[:, 1:, 12:52, 12:52] = -1
    pixels[:, 0, 24:40, 24:40], pixels[:, 2, 24:40, 24:40] = -1, 1
    return pixels


@pytest.mark.slow
def test_so_many_pictures_are_changed_as_are_asked_for(squares):
    many = squares.repeat(50, 1, 1, 1)
    changed = (restyle_randomly(many, 0.4, lots()) != many).flatten(1).any(1).float().mean()
    assert 0.25 < changed < 0.4  # one in ten of those chosen is left as it is by all changes
    assert torch.equal(restyle_randomly(squares, 0.0, lots()), squares)


def test_a_seed_gives_the_same_pictures_in_the_same_range(squares):
    first, again, other = (restyle_randomly(squares, 1.0, lots(seed)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == squares.shape
    assert first.abs().max() <= 1


def test_a_hand_changes_every_picture_alike_whatever_is_beside_it(squares):
    one, other, two = restyle(squares[:3], [5, 6, 5])
    assert torch.equal(one, two)
    assert not torch.equal(one, other)
    assert torch.equal(restyle(squares[:1], [6])[0], other)
    assert restyle(squares, range(8)).abs().max() <= 1


def test_every_hand_has_a_name_of_its_own_and_most_do_something(squares):
    assert len({hand_name(hand) for hand in range(HAND_COUNT)}) == HAND_COUNT
    changed = restyle(squares[:1].repeat(HAND_COUNT, 1, 1, 1), range(HAND_COUNT))
    assert len({picture.numpy().tobytes() for picture in changed}) > 0.85 * HAND_COUNT


@pytest.mark.parametrize("name", ["_recolored", "_lit", "_hatched", "_outlined"])
def test_paper_stays_white_where_no_ground_is_laid(squares, name):
    plain = (squares + 1) / 2
    changed = getattr(batches, name)(plain, batches._ink_of(plain), rand)
    assert torch.allclose(changed[..., :8, :8], torch.ones(()))
    assert not torch.allclose(changed, plain)


def test_a_ground_is_laid_around_what_is_drawn(squares):
    plain = (squares + 1) / 2
    changed = batches._on_a_ground(plain, batches._ink_of(plain), rand)
    assert torch.equal(changed[..., 14:50, 14:50], plain[..., 14:50, 14:50])
    assert changed[..., :8, :8].amin(1).mean() < 0.9


def test_lines_lie_where_colors_meet(squares):
    plain = (squares + 1) / 2
    black_over_the_colors = 0.4
    changed = batches._outlined(plain, batches._ink_of(plain), lambda *shape: torch.full(shape, black_over_the_colors))
    dark = changed.amax(1) < 0.5
    assert dark[:, 11:13, 20:40].any(1).all()
    assert dark[:, 23:25, 28:36].any(1).all()
    assert not dark[:, 16:20, 16:20].any()
    assert not dark[:, 28:36, 28:36].any()


def test_finer_pictures_are_four_of_the_batch(squares):
    squares[1] = 0
    plain = (squares + 1) / 2
    changed = batches._finer(plain)
    assert changed.shape == plain.shape
    assert torch.equal(changed[1, :, :32, :32], torch.full((3, 32, 32), 0.5))
    assert torch.equal(changed[0, :, :32, :32], torch.nn.functional.avg_pool2d(plain, 2)[0])
