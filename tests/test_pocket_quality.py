"""What bench/pocket_quality.py draws, keeps and leaves out."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from bench.judge_pictures import Pictures
from bench.pocket_quality import Config, draw, every_other_style, repeated


@pytest.fixture
def pictures():
    cells = [(concept, style) for style in range(4) for concept in range(3)]
    concept, style = torch.tensor(cells).T
    return Pictures(torch.zeros(12, 3, 64, 64).byte(), concept, style, ("bus", "crab", "key"), tuple("abcd"))


class Pipeline:
    """Draws noise from the generator it is handed, and counts."""

    def __init__(self):
        self.drawn = 0

    def __call__(self, prompts, generator, **settings):
        self.drawn += len(prompts)
        pixels = [torch.randint(256, (64, 64, 3), generator=g).byte().numpy() for g in generator]
        return SimpleNamespace(images=[Image.fromarray(p) for p in pixels])


@pytest.fixture
def config(tmp_path):
    return Config(base=tmp_path / "base", drawn=tmp_path / "drawn", batch=5)


def test_half_of_the_cells_hold_every_concept_and_every_style(pictures):
    half = every_other_style(pictures)
    assert len(half.pixels) == 6
    assert set(half.concept.tolist()) == {0, 1, 2}
    assert set(half.style.tolist()) == {0, 1, 2, 3}


def test_a_picture_depends_on_its_cell_and_not_on_its_company(pictures, config):
    apart = replace(config, drawn=None)
    whole, half = draw(Pipeline(), pictures, apart), draw(Pipeline(), every_other_style(pictures), apart)
    places = [pictures.names().index(name) for name in every_other_style(pictures).names()]
    assert_close(whole[places], half, rtol=0, atol=0)


def test_several_pictures_of_a_cell_differ(pictures, config):
    twice = draw(Pipeline(), repeated(pictures, 2), config)
    assert not torch.equal(twice[:12], twice[12:])


def test_what_is_kept_is_not_drawn_again(pictures, config):
    pipeline = Pipeline()
    first = draw(pipeline, every_other_style(pictures), config)
    assert_close(draw(pipeline, every_other_style(pictures), config), first, rtol=0, atol=0)
    assert pipeline.drawn == 6
    draw(pipeline, pictures, config)
    assert pipeline.drawn == 12
