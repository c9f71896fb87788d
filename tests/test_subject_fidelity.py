"""The subject bench: who is compared with whom, what the judge may have seen, and what is not made twice."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from bench import style_runs, subject_fidelity
from bench.real import BASE_CONCEPTS, cells_of, known_concepts
from bench.style_runs import Learned, Workshop
from bench.style_summary import paired
from bench.subject_fidelity import METHODS, Config, check, distractors, goals, learn, measure, ranks, scores
from sfumato.errors import ConfigError, DataError

STYLES = ("flat", "noto", "twemoji")
CONCEPTS = list(json.loads(BASE_CONCEPTS.read_text()))

BASE = SimpleNamespace(fingerprint=lambda: "base")


@pytest.fixture
def config(tmp_path):
    """Two subjects, and 64 of the base's concepts, each a plain square, in three styles."""
    for s, style in enumerate(STYLES):
        (tmp_path / "data" / style).mkdir(parents=True)
        for c, concept in enumerate(CONCEPTS[:64]):
            square((s * 40, c * 3, 99)).save(tmp_path / "data" / style / f"{concept.replace(' ', '-')}.png")
        for c, subject in enumerate(("otter", "tea-pot")):
            (tmp_path / "subjects" / subject).mkdir(parents=True, exist_ok=True)
            square((s * 40, 99, c * 90)).save(tmp_path / "subjects" / subject / f"{style}.png")
    return Config(data=tmp_path / "data", subjects=tmp_path / "subjects", work=tmp_path / "work", styles=STYLES)


def square(colour):
    picture = Image.new("RGB", (64, 64), "white")
    picture.paste(colour, (10, 10, 50, 50))
    return picture


def test_the_rank_counts_the_distractors_that_are_nearer():
    gallery = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    drawn = torch.tensor([[5.0, 0.1], [0.1, 5.0], [1.0, 0.9]])
    assert ranks(drawn, gallery, 0).tolist() == [0, 2, 1]


def test_sixty_distractors_are_compared_and_no_more():
    gallery = torch.ones(80, 2)
    gallery[70] = torch.tensor([1.0, 0.0])  # the true one; all others are nearer
    assert ranks(torch.tensor([[0.0, 1.0]]), gallery, 70).tolist() == [60]


def test_the_base_concepts_fill_up_the_distractors(config):
    known = cells_of(config.data)
    found = distractors(known, ["otter", "tea pot"], STYLES)
    assert len(set(found)) == 59
    assert not set(found) & {"otter", "tea pot"}
    assert distractors(known, [f"subject {i}" for i in range(61)], STYLES) == []


def test_too_few_distractors_are_an_error(config):
    for file in (config.data / "flat").glob("a*.png"):
        file.unlink()
    with pytest.raises(DataError, match="wanted 59"):
        distractors(cells_of(config.data), ["otter", "tea pot"], STYLES)


def test_the_judge_has_seen_none_of_the_candidates_in_any_style(config, monkeypatch):
    seen = []

    class Stop(Exception):
        pass

    def judge(pictures, *, others, **settings):
        seen.extend([*pictures.names(), *others.names()])
        raise Stop

    monkeypatch.setattr(subject_fidelity, "cached_judge", judge)
    known = cells_of(config.data)
    rivals = distractors(known, ["otter", "tea pot"], STYLES)
    with pytest.raises(Stop):
        subject_fidelity.judge_without(config, known, {"otter", "tea pot", *rivals})
    assert {name for name, _ in seen} == set(known_concepts(known)) - set(rivals)
    assert len(seen) == 5 * len(STYLES)


@pytest.mark.parametrize("method", METHODS)
def test_each_method_is_told_the_subject_in_its_own_words(method, config, monkeypatch, tmp_path):
    told = []

    def train(words):
        told.extend(words)
        output = Path(words[words.index("--output") + 1])
        output.mkdir()
        (output / "run.safetensors").write_bytes(b"12")
        if "--train-words" in words:
            (output / "run-otter.safetensors").write_bytes(b"345")
        return 0

    monkeypatch.setattr(style_runs.cli, "main", train)
    real = {("otter", style): config.subjects / "otter" / f"{style}.png" for style in STYLES}
    learned = learn(config, Workshop(tmp_path / "work", "pocket", BASE), method, "otter", 5, real)
    images = Path(told[told.index("--images") + 1])
    assert sorted(file.name for file in images.glob("*.png")) == ["noto.png", "twemoji.png"]
    assert (images / "noto.txt").read_text() == "sks chipmunk, noto style"
    assert told[1] == METHODS[method].program
    assert told[told.index("--seed") + 1] == "5"
    if METHODS[method].word:
        option = "--train-words" if method == "pivotal" else "--placeholder"
        assert told[told.index(option) + 1] == "<otter>"
        assert told[told.index("--stands-for") + 1] == "sks chipmunk"
    else:
        assert told[told.index("--class-name") + 1] == "chipmunk"
    assert (learned.adapter is None) == method.startswith("textual")
    assert learned.size_bytes == (5 if method == "pivotal" else 2)


@pytest.mark.slow
def test_a_setting_can_be_tried_on_one_method_or_on_all(config, monkeypatch, tmp_path):
    told = []
    learned = Learned(None, (), 0.0, 0.0)
    monkeypatch.setattr(Workshop, "learn", lambda self, *args: told.append(args[-1]) or learned)
    tried = Config(data=config.data, subjects=config.subjects, options=("steps=3", "pivotal:rank=4"))
    real = {("otter", style): Path(style) for style in STYLES}
    for method in ("pivotal", "dreambooth-lora"):
        learn(tried, Workshop(tmp_path, "pocket", BASE), method, "otter", 0, real)
    assert told[0][-2:] == ["--steps=3", "--rank=4"]
    assert told[1][-1] == "--steps=3"


@pytest.mark.usefixtures("quick")
@pytest.mark.slow
def test_the_whole_bench_runs_and_makes_nothing_twice(config, pocket_folder, monkeypatch, tmp_path):
    import dataclasses

    methods = ("textual-inversion-1", "pivotal")
    small = dataclasses.replace(
        config, methods=methods, base=str(pocket_folder), seeds=2, pictures=1, judge_steps=1, nearest=("tea-pot=cat",),
        options=("steps=1", "batch=1", "pivotal:learning-rate=0.01"), cache=tmp_path / "judge",
        sheet=tmp_path / "sheet.png", over_steps="0-0.5",
    )  # fmt: skip
    report = measure(small)
    assert report["over_steps"]["pivotal"].keys() == {"top1", "top5", "style"}
    same, less = (load_file(file)["pictures"] for file in sorted(small.work.glob("otter-pivotal-0-drawn-*")))
    assert not torch.equal(same, less)
    assert report["subjects"] == 2
    itself = "true flat, itself among the 61"
    assert report["judge"].keys() == {"true noto", "true twemoji", itself, "reconstructed flat"}
    assert report["judge"][itself]["top1"] == 1
    assert report["methods"].keys() == set(methods)
    assert report["methods"]["pivotal"]["each"].keys() == {"otter", "tea pot"}
    assert report["goals"].keys() == {"pivotal"}
    assert small.sheet.exists()

    def fail(*args, **kwargs):
        raise AssertionError("made again")

    monkeypatch.setattr(style_runs.cli, "main", fail)
    monkeypatch.setattr(style_runs, "draw_against", fail)
    assert measure(small) == report


def test_outcomes_are_ordered_as_the_pictures_are(monkeypatch):
    """Two subjects of two pictures each: the second subject's first picture alone is its true drawing and flat, though
    the judge would say glossy if that were asked about."""
    features = torch.tensor([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0], [1.0, 0.0]])
    styles = torch.tensor([[0.0, 1.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 9.0], [0.0, 1.0, 0.0]])
    verdict = SimpleNamespace(features=features, style_logits=styles)
    monkeypatch.setattr(subject_fidelity, "look", lambda judge, pictures: verdict)
    judge = SimpleNamespace(styles=("flat", "noto", "glossy"))
    found = scores(judge, torch.zeros(2, 2, 3, 8, 8), torch.eye(2), [0, 1], "flat", ("noto", "flat"))
    assert_close(found["top1"], torch.tensor([[0.0, 0.0], [1.0, 0.0]]))
    assert_close(found["top5"], torch.ones(2, 2))
    assert_close(found["style"], torch.tensor([[0.0, 0.0], [1.0, 0.0]]))


def test_the_interval_is_over_subjects_and_pairs_before_with_after():
    """Pictures of one subject stand and fall together; what rises by as much for all has a change without doubt."""
    before = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    found = paired(before, before + 0.5)
    assert found["after_95"] == [0.5, 1.5]
    assert found["change_95"] == [0.5, 0.5]


def test_the_goals_are_the_issues():
    found = goals({"top5": torch.tensor([[1.0, 1.0, 1.0, 0.0]]), "style": torch.tensor([[1.0, 1.0, 1.0, 0.0]])})
    assert list(found.values()) == [True, False]


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"methods": ("magic",)}, "--methods magic"),
        ({"seeds": 0}, "--seeds is 0"),
        ({"subject_count": 0}, "--subject-count is 0"),
        ({"subject": ("otter",), "subject_count": 1}, "both given"),
        ({"style": "noto"}, "--style noto is one of --hands"),
        ({"style": "glossy"}, "--style glossy is not among"),
        ({"nearest": ("otter",)}, "--nearest otter"),
        ({"options": ("magic:steps=1",)}, "no method magic"),
        ({"over_steps": "0.5"}, "--over-steps 0.5"),
    ],
)
def test_wrong_use_is_refused_before_anything_is_learned(changed, said):
    with pytest.raises(ConfigError, match=said):
        check(Config(data=Path("data"), subjects=Path("subjects"), **changed))


def test_a_subject_without_a_drawing_is_named(config):
    (config.subjects / "otter" / "flat.png").unlink()
    with pytest.raises(DataError, match=r"otter/flat\.png is missing"):
        measure(config)


def test_a_subject_that_is_not_there_is_named(config):
    with pytest.raises(ConfigError, match="--subject badger"):
        subject_fidelity.chosen(Config(data=config.data, subjects=config.subjects, subject=("badger",)), ["otter"])
