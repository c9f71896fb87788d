"""What bench/pocket_quality.py draws, keeps and leaves out; what bench/pocket_memory.py compares."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from bench import pocket_memory
from bench.judge import Judge, look
from bench.judge_pictures import Pictures, read_pictures
from bench.pocket_quality import Config, apart, draw, every_other_style, figures, judged_plain, measure
from sfumato import load_base
from sfumato.errors import BaseModelError, ConfigError, DataError
from tests.tiny import CPU


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


@pytest.mark.parametrize("name", ["judge_steps", "pictures_per_cell", "sampler_steps", "batch"])
def test_none_of_anything_is_refused(name, config):
    with pytest.raises(ConfigError, match=f"--{name.replace('_', '-')} is 0; it must be at least 1"):
        measure(replace(config, **{name: 0}))


def test_half_of_the_cells_hold_every_concept_and_every_style(pictures):
    half = every_other_style(pictures)
    assert len(half.pixels) == 6
    assert set(half.concept.tolist()) == {0, 1, 2}
    assert set(half.style.tolist()) == {0, 1, 2, 3}


def test_a_picture_depends_on_its_cell_and_not_on_its_company(pictures, config):
    apart = replace(config, drawn=None)
    names = every_other_style(pictures).names()
    whole, half = draw(Pipeline(), pictures.names(), apart), draw(Pipeline(), names, apart)
    places = [pictures.names().index(name) for name in names]
    assert_close(whole[places], half, rtol=0, atol=0)


def test_several_pictures_of_a_cell_differ(pictures, config):
    twice = draw(Pipeline(), pictures.names() * 2, config)
    assert not torch.equal(twice[:12], twice[12:])


class Listening(Pipeline):
    """Remembers what it is asked for."""

    def __init__(self):
        super().__init__()
        self.asked = []

    def __call__(self, prompts, **settings):
        self.asked.extend(prompts)
        return super().__call__(prompts, **settings)


def test_what_is_asked_for_is_told_and_other_words_are_other_pictures(pictures, config):
    for prompt, asked in (("{concept}, {style} style", "bus, a style"), ("{style} style: {concept}", "a style: bus")):
        pipeline = Listening()
        draw(pipeline, pictures.names()[:1], replace(config, prompt=prompt))
        assert pipeline.asked == [asked]
    with pytest.raises(ConfigError, match=r"--prompt 'a crab': wanted {concept} and {style} in it"):
        measure(replace(config, prompt="a crab"))


def test_a_name_alone_is_all_that_is_asked_and_every_picture_is_taken_for_one_style(pictures, config):
    pipeline = Listening()
    names = ("bus", "crab", "key", "owl", "tulip")
    found = judged_plain(pipeline, Judge(names, pictures.styles), names, config)
    assert pipeline.asked == list(names)
    assert found["pictures"] == 5
    assert found["concept_top5"] == 1
    assert sum(found["taken_for"].values()) == pytest.approx(1, abs=1e-3)


def test_what_is_kept_is_not_drawn_again(pictures, config):
    pipeline = Pipeline()
    first = draw(pipeline, every_other_style(pictures).names(), config)
    assert_close(draw(pipeline, every_other_style(pictures).names(), config), first, rtol=0, atol=0)
    assert pipeline.drawn == 6
    draw(pipeline, pictures.names(), config)
    assert pipeline.drawn == 12


def test_withheld_pictures_that_were_seen_under_another_name_are_left_out():
    style, pixels = torch.tensor([0, 0, 1]), torch.randint(256, (3, 3, 64, 64), dtype=torch.uint8)
    withheld = Pictures(pixels, torch.tensor([0, 1, 0]), style, ("star", "bed"), ("noto", "flat"))
    nearly = (pixels[::2].short() + 9).clamp(max=255).byte()  # the first in its own style, the third in another
    others = Pictures(nearly, torch.tensor([0, 0]), torch.tensor([0, 0]), ("other glowing-star",), ("noto", "flat"))
    none = Pictures(pixels[:0], style[:0], style[:0], ("star",), ("noto", "flat"))
    assert apart(withheld, none, others).names() == [("bed", "noto"), ("star", "flat")]


def test_the_error_of_a_prediction_is_each_picture_s_own(pictures, pocket_folder):
    base = load_base(str(pocket_folder), precision=CPU)
    four = pictures.cells(pictures.names()[::3])
    together, apart = (pocket_memory.error(base, four, four.pixels, 450, batch) for batch in (3, 1))
    assert together == pytest.approx(apart, abs=2e-4)
    assert together > 0.1


def test_moved_pictures_are_turned_and_always_in_the_same_way():
    pixels = torch.full((8, 3, 64, 64), 255, dtype=torch.uint8)
    pixels[:, :, 20:44, 31:33] = 0
    moved = pocket_memory.moved(pixels)
    assert torch.equal(moved, pocket_memory.moved(pixels))
    assert all(int(picture.eq(0).sum()) == 3 * 48 for picture in moved)
    assert not any(torch.equal(picture, pixels[0]) for picture in moved)


def test_as_many_seen_cells_as_withheld_ones_are_compared(pocket_folder, tmp_path):
    for place, concept in enumerate(("bus", "crab", "key")):
        (tmp_path / "data/noto").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (64, 64), (place * 90, 9, 9)).save(tmp_path / f"data/noto/{concept}.png")
    manifest = {"styles": ["noto"], "withheld": [["bus", "noto"]]}
    (tmp_path / "data/manifest.json").write_text(json.dumps(manifest))
    config = pocket_memory.Config(base=str(pocket_folder), data=tmp_path / "data", timesteps=(50, 850))
    report = pocket_memory.measure(config)
    assert report.pop("pictures") == 1
    assert report.keys() == {"seen", "seen_moved", "withheld", "withheld_moved"}
    assert all(list(errors) == [50, 850] for errors in report.values())


def test_what_withholds_nothing_has_nothing_to_compare(tmp_path):
    (tmp_path / "noto").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "noto/bus.png")
    with pytest.raises(DataError, match="withholds no cell"):
        pocket_memory.measure(pocket_memory.Config(data=tmp_path))
    with pytest.raises(ConfigError, match="--timesteps 1000: wanted numbers from 0 to 999"):
        pocket_memory.measure(pocket_memory.Config(data=tmp_path, timesteps=(50, 1000)))


@pytest.mark.slow
def test_pictures_of_few_concepts_and_none_withheld_are_judged(pocket_folder, tmp_path):
    for style in ("oil", "ink"):
        (tmp_path / "data" / style).mkdir(parents=True)
        for place, concept in enumerate(("lamp", "sled")):
            Image.new("RGB", (64, 64), (place * 90, 9, 9)).save(tmp_path / f"data/{style}/{concept}.png")
    config = Config(
        base=pocket_folder, data=tmp_path / "data", cache=tmp_path, judge_steps=1, sampler_steps=1,
        sheet=tmp_path / "sheet.png",
    )  # fmt: skip
    report = measure(config)
    assert report["seen"]["drawn"]["pictures"] == 4
    assert report["seen"]["drawn"]["concept_top5"] == 1
    assert "withheld" not in report
    assert Image.open(config.sheet).size == (2 * 64, 4 * 64)


@pytest.mark.slow
def test_another_sampler_draws_otherwise_and_its_images_are_kept_apart(pocket_folder, tmp_path):
    """Of two steps of dpm++ and two of ddim; what was kept of one is not judged as the other's."""
    for style in ("oil", "ink"):
        (tmp_path / "data" / style).mkdir(parents=True)
        Image.new("RGB", (64, 64), (90, 9, 9)).save(tmp_path / f"data/{style}/lamp.png")
    config = Config(
        base=pocket_folder, data=tmp_path / "data", cache=tmp_path, judge_steps=1, sampler_steps=2,
        drawn=tmp_path / "drawn",
    )  # fmt: skip
    measure(config)
    measure(replace(config, sampler="ddim"))
    (one, other) = ((folder / "oil/lamp-0.png").read_bytes() for folder in (tmp_path / "drawn").iterdir())
    assert one != other


def test_one_cell_alone_has_no_distance(pictures):
    judge = Judge(pictures.concepts, pictures.styles).eval()
    one, several = pictures.cells([("bus", "a")]), look(judge, pictures.pixels)
    verdict = look(judge, one.pixels)
    assert figures(verdict, one, verdict.features).keys() == {"pictures", "style", "concept_top1", "concept_top5"}
    assert figures(several, pictures, several.features)["kid_x1000"] < 1


def test_a_base_that_is_no_folder_is_named(tmp_path):
    with pytest.raises(BaseModelError, match="--base pocket: no folder of a diffusers pipeline"):
        measure(Config(base=Path("pocket"), data=tmp_path))


def test_styles_without_a_concept_in_common_are_named(tmp_path):
    for style, concept in (("oil", "lamp"), ("ink", "sled")):
        (tmp_path / style).mkdir()
        Image.new("RGB", (64, 64)).save(tmp_path / style / f"{concept}.png")
    with pytest.raises(DataError, match=r"no concept has a \.png in all of ink, oil"):
        read_pictures(tmp_path)
