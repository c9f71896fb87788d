"""The bench of when to stop, whole, on a tiny base and plain squares: its figures mean nothing, they add up."""

import dataclasses
import json

import pytest
from PIL import Image

from bench import when_to_stop
from bench.real import BASE_CONCEPTS
from sfumato.errors import ConfigError, DataError

CONCEPTS = list(json.loads(BASE_CONCEPTS.read_text()))[:7]


@pytest.fixture
def config(pocket_folder, tmp_path):
    for s, style in enumerate(("flat", "noto", "twemoji")):
        (tmp_path / "data" / style).mkdir(parents=True)
        for c, concept in enumerate(CONCEPTS):
            picture = Image.new("RGB", (64, 64), "white")
            picture.paste((s * 40, c * 30, 99), (10, 10, 50, 50))
            picture.save(tmp_path / "data" / style / f"{concept.replace(' ', '-')}.png")
    return when_to_stop.Config(
        data=tmp_path / "data", styles=("flat",), images=2, held_out=2, concepts=3, every=1, judge_steps=1,
        style_options=("steps=2", "batch=1", "crossed-share=0"), base=str(pocket_folder), work=tmp_path / "work",
        cache=tmp_path / "judge",
    )  # fmt: skip


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_each_adapter_has_its_losses_beside_what_it_draws(config):
    report = when_to_stop.measure(config)
    rows = report["styles"]["flat"]
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert rows[0]["distance_closed"] == 0
    assert len({row["validation"] for row in rows}) == 3
    assert report["last"]["step"] == 2
    assert report["lowest_validation"]["validation"] == min(row["validation"] for row in rows[1:])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"held_out": 0}, "--held-out is 0; it must be at least 1"),
        ({"concepts": 1}, "--concepts is 1; it must be at least 2"),
        ({"styles": ("oil",)}, "--styles oil: .* has flat, noto, twemoji"),
        ({"concepts": 4}, "7 concepts in all of its styles; wanted 8"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_learned(changed, said, config):
    with pytest.raises((ConfigError, DataError), match=said):
        when_to_stop.measure(dataclasses.replace(config, **changed))
    assert not config.work.exists()
