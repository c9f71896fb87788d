"""The benches' judge of concept and style, and what the style bench keeps and sums up."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.testing import assert_close

from bench import style_runs
from bench.judge import Judge, cached_judge, look
from bench.judge_pictures import Pictures, augment, recolour
from bench.style_runs import Workshop
from bench.style_summary import interval, mix_summary, summary
from sfumato.errors import ConfigError

BASE = SimpleNamespace(fingerprint=lambda: "base")


@pytest.fixture
def pictures():
    """Two concepts in two styles, random pixels."""
    pixels = torch.randint(256, (4, 3, 64, 64), generator=torch.Generator().manual_seed(0)).byte()
    return Pictures(pixels, torch.tensor([0, 1, 0, 1]), torch.tensor([0, 0, 1, 1]), ("crab", "key"), ("flat", "noto"))


def test_a_picture_and_its_mirror_image_get_one_verdict(pictures):
    judge = Judge(pictures.concepts, pictures.styles)
    seen, mirrored = look(judge, pictures.pixels), look(judge, pictures.pixels.flip(3))
    assert_close(seen.class_logits, mirrored.class_logits)
    assert_close(seen.style_logits, mirrored.style_logits)


def test_further_classes_are_told_apart_but_never_answered(pictures):
    judge = Judge(pictures.concepts, pictures.styles, ("crab", "key", "other bus"))
    verdict = look(judge, pictures.pixels)
    assert verdict.class_logits.shape == (4, 3)
    assert_close(verdict.concept_logits, verdict.class_logits[:, :2])


def test_others_are_numbered_after_the_concepts_and_keep_their_style(pictures):
    others = Pictures(pictures.pixels[:1], torch.tensor([0]), torch.tensor([0]), ("bus",), ("noto",))
    both = pictures.and_others(others)
    assert both.names()[-1] == ("bus", "noto")
    assert both.names()[:4] == pictures.names()


def test_cells_come_in_the_order_that_is_asked(pictures):
    asked = [("key", "noto"), ("crab", "flat")]
    assert pictures.cells(asked).names() == asked


@pytest.mark.slow
def test_a_cached_judge_is_the_trained_one(pictures, tmp_path):
    trained = cached_judge(pictures, cache=tmp_path, steps=1)
    (file,) = tmp_path.glob("judge-*.safetensors")
    written = file.stat().st_mtime_ns
    assert_close(cached_judge(pictures, cache=tmp_path, steps=1).state_dict(), trained.state_dict(), rtol=0, atol=0)
    assert file.stat().st_mtime_ns == written


def test_other_colours_leave_the_white_ground_white():
    white = torch.ones(8, 3, 64, 64)
    assert_close(recolour(white, torch.Generator().manual_seed(0)), white)


def test_variation_is_a_function_of_its_generator(pictures):
    floats = pictures.pixels.float() / 127.5 - 1
    first, second = (augment(floats, torch.Generator().manual_seed(5)) for _ in range(2))
    assert_close(first, second, rtol=0, atol=0)
    assert first.abs().max() <= 1


@pytest.mark.slow
def test_what_was_drawn_is_not_drawn_again(monkeypatch, tmp_path):
    asked = []

    def draw(base, prompts, seeds, negatives, *, syntax, guidance):
        assert not negatives  # there is no adapter
        asked.append(guidance)
        return [_grey(64) for _ in prompts]

    monkeypatch.setattr(style_runs, "draw_against", draw)
    workshop = Workshop(tmp_path, "pocket", BASE)
    first = workshop.drawn("crabs", ["crab", "key"], [1, 2], {})
    assert_close(workshop.drawn("crabs", ["crab", "key"], [1, 2], {}), first)
    assert len(asked) == 1
    workshop.drawn("crabs", ["crab", "key"], [1, 3], {})
    workshop.drawn("crabs", ["crab", "key"], [1, 2], {}, guidance=2.0)
    assert asked == [None, None, 2.0]


@pytest.mark.slow
def test_what_other_code_made_is_refused_until_it_is_said_to_be_the_same(monkeypatch, tmp_path):
    workshop = Workshop(tmp_path, "pocket", None)
    monkeypatch.setattr(style_runs, "code_hash", lambda: "other")
    with pytest.raises(ConfigError, match=r"made by sfumato .*, code [0-9a-f]{12}; .* --work, or delete") as caught:
        Workshop(tmp_path, "pocket", None)
    assert "\n" not in str(caught.value)
    (tmp_path / "code.txt").unlink()
    assert Workshop(tmp_path, "pocket", None) == workshop


def test_words_about_code_are_no_code():
    code = 'def f(a):\n    """Of a."""\n    return a + 1\n'
    assert style_runs.code_of(code) == style_runs.code_of("def f(a):  # more\n    return (a + 1)\n")
    assert style_runs.code_of(code) != style_runs.code_of(code.replace("1", "2"))


def test_an_adapter_is_learned_once_for_each_setting(monkeypatch, tmp_path):
    runs = []

    def train(words):
        runs.append(words)
        output = Path(words[words.index("--output") + 1])
        output.mkdir()
        (output / "run.safetensors").write_bytes(b"")
        return 0

    monkeypatch.setattr(style_runs.cli, "main", train)
    picture = tmp_path / "crab.png"
    _grey(8).save(picture)
    workshop = Workshop(tmp_path / "work", "pocket", BASE)
    for options in ([], [], ["--steps=3"]):
        pictures, captions = {"crab.png": picture}, {"crab.png": "a crab"}
        learned = workshop.learn("line", "lora", "lora-style.toml", pictures, captions, options)
        assert (learned.adapter.parents[1] / "images" / "crab.txt").read_text() == "a crab"
    assert len(runs) == 2
    assert "--steps=3" in runs[1]


def test_the_interval_of_what_never_varies_is_a_point():
    assert interval(lambda i: torch.ones(5)[i].mean(), 5) == [1.0, 1.0]


def test_of_runs_of_one_style_it_is_the_style_that_is_drawn_again():
    """Two styles, three runs of each that agree: all of one style is drawn in a quarter of the resamples, where six
    independent runs are hardly ever all of one."""
    scores, styles = torch.tensor([1.0, 0.0] * 3), ["oil", "ink"] * 3
    assert interval(lambda i: scores[i].mean(), 6, styles) == [0.0, 1.0]
    assert interval(lambda i: scores[i].mean(), 6)[0] > 0.0


def test_of_one_style_its_runs_are_drawn_again():
    scores = torch.tensor([1.0, 0.0])
    assert interval(lambda i: scores[i].mean(), 2, ["oil"] * 2) == [0.0, 1.0]


@pytest.mark.slow
def test_the_summary_counts_pictures_and_says_which_goals_are_met():
    run = {
        "style_before": torch.zeros(10),
        "style_after": torch.ones(10),
        "top5_before": torch.ones(10),
        "top5_after": torch.tensor([1.0] * 8 + [0.0] * 2),
        "closed": torch.tensor([0.6]),
        "style_of_real": torch.tensor([1.0] * 9 + [0.0]),
        "style_of_reconstruction": torch.tensor([1.0] * 7 + [0.0] * 3),
    }
    found = summary([run, run], ["oil", "ink"])
    assert found["style"]["after_95"] == [1.0, 1.0]
    other = {**run, "style_after": torch.zeros(10)}
    two = summary([run, other], ["oil", "ink"])
    assert two["style"]["after_95"] == [0.0, 1.0]  # two runs tell little, whatever was drawn in each
    assert (found["pictures"], found["style"]["after"], found["top5"]["after"]) == (20, 1.0, 0.8)
    assert (found["style_of_real"], found["style_of_reconstruction"]) == (0.9, 0.7)
    assert list(found["goals"].values()) == [True, False, True]


def test_a_mix_keeps_its_share_of_the_solo_scores():
    """Of two runs the first keeps half of its style and the second all: one run alone may be drawn twice."""
    mix = {"style_alone": 0.8, "style_mixed": 0.6, "subject_alone": 0.5, "subject_mixed": 0.5}
    less, more = mix | {"style_mixed": 0.4}, mix | {"style_mixed": 0.8}
    found = mix_summary([[less, less], [more, more]], ["oil", "ink"])
    assert (found["style_kept"], found["style_kept_95"]) == (0.75, [0.5, 1.0])
    assert (found["subject_kept"], found["subject_kept_95"]) == (1.0, [1.0, 1.0])
    same = mix_summary([[less, more], [less, more]], ["oil", "ink"])  # the same two mixes in each
    assert same["style_kept_95"] == [0.75, 0.75]


def _grey(side):
    from PIL import Image

    return Image.new("RGB", (side, side), "grey")
