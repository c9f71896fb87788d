"""Where and when an adapter counts, as the command line says it."""

from pathlib import Path

import pytest

from sfumato.adapters.weights import Span
from sfumato.compose import Adapter
from sfumato.compose.schedules import Ramp
from sfumato.errors import ConfigError
from sfumato.generation.arguments.schedules import parse_region, parse_steps
from sfumato.generation.placement import AdapterPlacement, RegionSpec

LINE, OTTER, ODD = Adapter("line.safetensors", 0.8), Adapter("otter.safetensors"), Adapter("c.safetensors", 1.0, "c+d")


@pytest.mark.parametrize(
    ("text", "region"),
    [
        ("line=left", RegionSpec((LINE,), (0.0, 0.0, 0.5, 1.0), None)),
        ("line=bottom:an otter: asleep", RegionSpec((LINE,), (0.0, 0.5, 1.0, 1.0), "an otter: asleep")),
        ("line=0.1,0,0.5,1: a crab=b", RegionSpec((LINE,), (0.1, 0.0, 0.5, 1.0), "a crab=b")),
        ("line+otter=top", RegionSpec((LINE, OTTER), (0.0, 0.0, 1.0, 0.5), None)),
        ("c+d=right", RegionSpec((ODD,), (0.5, 0.0, 1.0, 1.0), None)),
        ("line=C:mask.png", RegionSpec((LINE,), Path("C:mask.png"), None)),
        ("line=C:mask.png:red", RegionSpec((LINE,), Path("C:mask.png"), "red")),
    ],
)
def test_a_region_is_read_as_written(text, region, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("C:mask.png").touch()
    assert parse_region(text, [LINE, OTTER, ODD]) == region


def test_a_mask_from_home_on_needs_no_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mask.png").touch()
    assert parse_region("line=~/mask.png", [LINE]).where == tmp_path / "mask.png"


def test_a_prompt_in_a_region_may_be_longer_than_a_file_s_name():
    said = "a portrait, " * 30 + "in ink"
    assert parse_region(f"line=left:{said}", [LINE]).prompt == said


@pytest.mark.parametrize(
    "text",
    [
        *("line", "crab=left", "line+crab=left", "line=", "line=gone.png", "line=0,0,2,1", "line=0,1,1,1"),
        *("line=left:an otter <lora:crab:1>", "line=left:an otter --n grey"),
    ],
)
def test_a_region_that_makes_no_sense_is_one_line(text):
    with pytest.raises(ConfigError, match="--region") as caught:
        parse_region(text, [LINE, OTTER])
    assert "\n" not in str(caught.value)


def test_steps_are_points_or_a_span():
    assert parse_steps("line=0:0,0.4:1", ["line"]) == ("line", Ramp((0, 0), (0.4, 1)))
    assert parse_steps("a=b=0-0.5", ["a=b"]) == ("a=b", Span(0.0, 0.5))


@pytest.mark.parametrize("text", ["line", "crab=0-1", "line=1-0", "line=0-2", "line=0.1.2-1", "line=0", "line=0:99"])
def test_steps_that_make_no_sense_are_one_line(text):
    with pytest.raises(ConfigError, match="--over-steps") as caught:
        parse_steps(text, ["line"])
    assert "\n" not in str(caught.value)


def test_a_span_has_the_weight_within_and_none_beyond():
    early, late = Ramp.within(0, 0.5, 0.8), Ramp.within(0.5, 1, 0.8)
    progress = [0.0, 0.25, 0.5, 0.51, 1.0]
    assert [early(at) for at in progress] == [0.8, 0.8, 0.8, 0.0, 0.0]
    assert [late(at) for at in progress] == [0.0, 0.0, 0.0, 0.8, 0.8]


def test_what_is_not_asked_for_is_not_told():
    assert AdapterPlacement().told() == {}
    assert not AdapterPlacement().follows_steps


def test_a_file_s_own_steps_count_where_nothing_is_said_of_its_adapter():
    said = AdapterPlacement(by_step={"line": Span(0.5, 1.0)}, switch_labels=("pen",), switch_every=1)
    asked = said.with_requested({"line": (0.0, 0.5), "pen": (0.0, 0.5), "otter": (0.0, 0.8)})
    assert asked.by_step == {"line": Span(0.5, 1.0), "otter": Span(0.0, 0.8)}
    assert (asked.switch_labels, asked.switch_every) == (("pen",), 1)


def test_a_mix_follows_no_steps_of_an_adapter_in_a_region():
    region, span = RegionSpec((LINE,), (0.0, 0.0, 0.5, 1.0), None), Span(0.0, 0.5)
    assert not AdapterPlacement((region,), {"line": span}).follows_steps
    assert AdapterPlacement((region,), {"line": span, "otter": span}).follows_steps
