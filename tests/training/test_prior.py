"""What keeps a class: pictures that are drawn once, the base's own predictions, and the words for both."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from sfumato import data
from sfumato.adapters.embeddings.tokens import examine_identifier, is_common_word, words_before_class
from sfumato.errors import DataError
from sfumato.generation.pipeline_call import PipelineCall
from sfumato.models import load_base
from sfumato.models.vocabulary import clip_tokenizer
from sfumato.runs.processes import MicroBatch, MicroBatches
from sfumato.training.loss import prior
from sfumato.training.loss.class_images import class_folder, draw_class, read_class
from sfumato.training.loss.objective import draw_noised, merge_by_shape
from sfumato.training.loss.prior import BasePrediction, ClassPictures
from sfumato.training.loss.validation import DriftLimit
from sfumato.training.methods.subject import PreservedPrompts, Subject
from tests.tiny import CPU

COUNT = 2
WHOLE = MicroBatch(0, COUNT, 0, COUNT)


@pytest.fixture(scope="module")
def base(pocket_folder):
    return load_base(str(pocket_folder), precision=CPU)


@pytest.fixture(scope="module")
def dataset(base, pictures):
    return data.prepare(data.read_folder(pictures, caption_template="sks square"), base, resolution=64, buckets=False)


@pytest.fixture
def draw(base, tmp_path, monkeypatch):
    """Draw so many class pictures in few steps; returns how many were drawn now."""
    quick = dataclasses.replace(base.family, defaults=dataclasses.replace(base.family.defaults, sampling_steps=2))
    monkeypatch.setattr(base, "family", quick)

    def run(count, prompt="cat", **options):
        return draw_class(base, {prompt: count}, resolution=64, folder=tmp_path, shown=False, **options)

    return run


def folder_of(base, tmp_path, prompt="cat", resolution=64):
    return class_folder(base, prompt, resolution=resolution, folder=tmp_path)


def test_a_class_picture_is_known_by_all_that_its_sampler_goes_by(base, tmp_path, monkeypatch):
    before = folder_of(base, tmp_path)
    assert folder_of(base, tmp_path) == before
    spaced = type(base.scheduler).from_config(base.scheduler.config, beta_end=0.013)
    monkeypatch.setattr(base, "scheduler", spaced)
    assert folder_of(base, tmp_path) != before


def test_pictures_are_drawn_once_and_a_larger_count_adds_to_them(draw, base, tmp_path):
    assert draw(2) == 2
    before = {file.name: file.read_bytes() for file in folder_of(base, tmp_path).glob("*.png")}
    assert draw(2) == 0
    assert draw(3) == 1
    assert draw(1) == 0
    assert all((folder_of(base, tmp_path) / name).read_bytes() == content for name, content in before.items())


def test_a_picture_depends_on_its_number_and_not_on_who_draws_it(draw, base, tmp_path):
    draw(3)
    whole = {file.name: Image.open(file).tobytes() for file in folder_of(base, tmp_path).glob("*.png")}
    for file in folder_of(base, tmp_path).glob("*.png"):
        file.unlink()
    assert [draw(3, rank=rank, processes=2) for rank in (0, 1)] == [2, 1]
    assert len(set(whole.values())) == 3
    for name, content in whole.items():
        again = Image.open(folder_of(base, tmp_path) / name).tobytes()
        assert max(abs(a - b) for a, b in zip(content, again, strict=True)) <= 1


def test_who_interrupts_a_drawing_loses_the_few_that_are_drawn_together(draw, base, tmp_path, monkeypatch):
    whole, called = PipelineCall.draw, []

    def interrupted(self, *given):
        called.append(len(given[0]))
        if len(called) == 2:
            raise KeyboardInterrupt
        return whole(self, *given)

    monkeypatch.setattr(PipelineCall, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(10)
    assert len(list(folder_of(base, tmp_path).glob("*.png"))) == 8
    assert draw(10) == 2


def test_what_was_cut_off_is_drawn_again(draw, base, tmp_path):
    draw(2)
    broken = folder_of(base, tmp_path) / "00001.png"
    broken.write_bytes(broken.read_bytes()[:100])
    assert draw(2) == 1
    Image.open(broken).load()
    Image.new("RGB", (32, 32), "red").save(broken)
    assert draw(2) == 1
    assert Image.open(broken).size == (64, 64)


def test_the_cache_knows_all_that_a_picture_depends_on(base, tmp_path, monkeypatch):
    def with_defaults(**values):
        return dataclasses.replace(base.family, defaults=dataclasses.replace(base.family.defaults, **values))

    places = [folder_of(base, tmp_path), folder_of(base, tmp_path, "dog"), folder_of(base, tmp_path, resolution=32)]
    for name, other in (
        ("family", with_defaults(sampler="euler")),
        ("family", with_defaults(sampling_steps=3)),
        ("family", with_defaults(guidance=1.5)),
        ("clip_skip", 1),
        ("precision", dataclasses.replace(base.precision, compute=torch.bfloat16)),
        ("fingerprint", lambda: "another"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(base, name, other)
            places.append(folder_of(base, tmp_path))
    monkeypatch.setattr(type(base), "prediction_type", "epsilon")
    places.append(folder_of(base, tmp_path))
    assert len(set(places)) == 10


def test_drawn_pictures_are_read_with_their_prompts(draw, base, tmp_path):
    draw(2)
    draw(1, "red cat")
    folder = read_class(base, {"cat": 2, "red cat": 1}, resolution=64, folder=tmp_path)
    assert [example.caption for example in folder] == ["cat", "cat", "red cat"]
    assert {example.group for example in folder} == {"class"}
    with pytest.raises(DataError, match="2 of 5 images of the class are missing"):
        read_class(base, {"cat": 3, "red cat": 2}, resolution=64, folder=tmp_path)


def test_the_class_half_is_drawn_independently_of_the_subjects(base, dataset):
    of_subject = draw_noised(base, dataset, 0, WHOLE)
    of_class = ClassPictures(base, dataset, 0).draw(WHOLE)
    assert not torch.equal(of_subject.noise, of_class.noise)
    assert not torch.equal(of_subject.timesteps, of_class.timesteps)
    both = of_subject.concat(of_class)
    assert torch.equal(both.noise[COUNT:], of_class.noise)
    assert torch.equal(both.batch.latents[:COUNT], of_subject.batch.latents)
    assert len(both.batch.captions) == len(both.target) == 2 * COUNT


def test_parts_of_one_shape_are_one_call_and_those_of_two_are_two(base, dataset):
    one, other = (draw_noised(base, dataset, seed, WHOLE) for seed in (0, 1))
    wide = dataclasses.replace(other, noise=other.noise.repeat(1, 1, 1, 2))
    assert [len(call.noise) for call in merge_by_shape([one, other, wide, one])] == [2 * COUNT, COUNT, COUNT]
    assert torch.equal(merge_by_shape([one, other])[0].target, torch.cat([one.target, other.target]))
    assert merge_by_shape([one]) == [one]


def test_the_target_is_the_base_as_it_was_whatever_becomes_of_it(pocket_folder, dataset):
    """Remembered before the training, the targets are those of a base that is still there."""
    base = load_base(str(pocket_folder), precision=CPU)
    kept = BasePrediction(base, dataset, ["cat", "red"], 5)
    kept.precompute_targets(range(3), MicroBatches(2 * COUNT, (0, COUNT), COUNT), shown=False)
    live = BasePrediction(base, dataset, ["cat", "red"], 5, pristine=torch.no_grad)
    places = [(step, first) for step in range(3) for first in (0, COUNT)]
    asked = [live.draw(MicroBatch(step, 2 * COUNT, first, COUNT)) for step, first in places]
    with torch.no_grad():
        for parameter in base.unet.parameters():
            parameter.mul_(1.5)
    for (step, first), noised in zip(places, asked, strict=True):
        again = kept.draw(MicroBatch(step, 2 * COUNT, first, COUNT))
        assert torch.equal(again.target, noised.target)
        assert torch.equal(again.noise, noised.noise)
        assert again.batch.captions == noised.batch.captions
    assert {caption for noised in asked for caption in noised.batch.captions} == {"cat", "red"}


def test_one_process_asks_what_two_ask(base, dataset):
    both = BasePrediction(base, dataset, ["cat", "red", "re"], 0, pristine=torch.no_grad).draw(MicroBatch(1, 4, 0, 4))
    parts = [
        BasePrediction(base, dataset, ["cat", "red", "re"], 0, pristine=torch.no_grad).draw(MicroBatch(1, 4, f, 2))
        for f in (0, 2)
    ]
    assert both.batch.captions == [caption for part in parts for caption in part.batch.captions]
    assert_close(both.target, torch.cat([part.target for part in parts]), rtol=1e-4, atol=1e-5)


def test_prompts_take_turns_through_places_and_steps(base, dataset):
    prior = BasePrediction(base, dataset, ["cat", "red", "re"], 0, pristine=torch.no_grad)
    asked = [prior.draw(MicroBatch(step, 4, first, 2)).batch.captions for step in (0, 1, 2) for first in (0, 2)]
    assert asked == [["cat", "red"], ["re", "cat"], ["red", "re"]] * 2


def test_what_the_base_predicts_is_kept_whole_whatever_counts_of_the_subjects_pictures(base, dataset, monkeypatch):
    """Their masks and weights are the subject's."""
    masks = torch.zeros(COUNT, 1, 16, 16)
    own = dataset.batch
    monkeypatch.setattr(
        dataset,
        "batch",
        lambda *given, **options: dataclasses.replace(
            own(*given, **options), mask=masks, weights=torch.full((COUNT,), 0.3)
        ),
    )
    half = BasePrediction(base, dataset, ["cat"], 0, pristine=torch.no_grad).draw(WHOLE)
    assert half.batch.mask is None
    assert half.batch.weights.tolist() == [1.0] * COUNT


def test_predictions_are_remembered_in_what_they_were_computed_in(base, dataset):
    """As the line on their memory, and the limit of it, count them."""
    in_half = dataclasses.replace(base, precision=dataclasses.replace(base.precision, compute=torch.bfloat16))
    kept = BasePrediction(in_half, dataset, ["cat"], 0)
    kept.precompute_targets(range(1), MicroBatches(COUNT, (0,), COUNT), shown=False)
    assert [target.dtype for target in kept._table.targets.values()] == [torch.bfloat16]
    assert kept.draw(WHOLE).target.dtype == torch.float32


def test_draws_of_a_long_run_repeat_where_memory_ends(base, dataset, monkeypatch):
    latents = dataset.batch(0, 0, COUNT).latents
    monkeypatch.setattr(prior, "KEPT_BYTES", 2 * latents.nbytes)
    kept = BasePrediction(base, dataset, ["cat"], 0)
    said = kept.precompute_targets(range(5), MicroBatches(COUNT, (0,), COUNT), shown=False)
    assert "repeat after 2 steps" in said
    assert torch.equal(kept.draw(MicroBatch(4, COUNT, 0, COUNT)).noise, kept.draw(WHOLE).noise)
    assert not torch.equal(kept.draw(MicroBatch(1, COUNT, 0, COUNT)).noise, kept.draw(WHOLE).noise)


@pytest.mark.parametrize(("places", "count"), [((0,), 4), ((0, 2), 2), ((0,), 2), ((2,), 2)])
def test_when_draws_repeat_does_not_depend_on_who_computes_which_part(places, count, base, dataset, monkeypatch):
    """One process, two micro-batches, either of two processes: a global batch of 4, two of which fit."""
    monkeypatch.setattr(prior, "KEPT_BYTES", 8 * dataset.batch(0, 0, 1).latents.nbytes)
    kept = BasePrediction(base, dataset, ["cat"], 0)
    assert "for 2 steps, which repeat after 2 steps" in kept.precompute_targets(
        range(5), MicroBatches(4, places, count), shown=False
    )
    first = kept.draw(MicroBatch(0, 4, places[-1], count))
    assert torch.equal(kept.draw(MicroBatch(2, 4, places[-1], count)).noise, first.noise)
    assert not torch.equal(kept.draw(MicroBatch(1, 4, places[-1], count)).noise, first.noise)


def test_processes_whose_pictures_have_other_shapes_repeat_their_draws_together(base, tmp_path, monkeypatch):
    for name, size in (("a", (64, 64)), ("b", (112, 48))):
        Image.new("RGB", size, "red").save(tmp_path / f"{name}.png")
    mixed = data.prepare(data.read_folder(tmp_path, caption_template="sks square"), base, resolution=64, together=1)
    shapes = [mixed.batch(0, 0, 2, place, 1).latents for place in (0, 1)]
    assert shapes[0].nbytes != shapes[1].nbytes
    monkeypatch.setattr(prior, "KEPT_BYTES", 4 * max(latents.nbytes for latents in shapes) - 1)
    said = [
        BasePrediction(base, mixed, ["cat"], 0, order=0).precompute_targets(
            range(3), MicroBatches(2, (place,), 1), shown=False
        )
        for place in (0, 1)
    ]
    repeats = [line.partition(",")[2].partition(":")[0] for line in said]
    assert repeats[0] == repeats[1]
    assert "repeat after" in repeats[0]


def test_the_drift_limit_takes_the_larger_drift_and_remembers_the_log():
    alone = SimpleNamespace(largest=lambda number: number)
    limit = DriftLimit(0.3)
    limit.update({"drift": 0.1, "class_drift": 0.2}, alone)
    assert not limit.reached
    limit.update({"drift": 0.4, "class_drift": 0.2}, alone)
    assert limit.reached == "drift 0.400"
    assert DriftLimit(0.3, [{"step": 0, "drift": 0.0, "class_drift": 0.0}, {"step": 9, "drift": 0.4}]).reached
    never = DriftLimit(None)
    never.update({"drift": 9.0}, alone)
    assert not never.reached


def test_class_prompts_are_the_captions_without_the_identifier():
    subject = Subject("sks otter", "otter")
    captions = ["sks otter, flat style", "sks otter", "an image", "sks otter, flat style"]
    capitals = ["Sks Otter in snow", "two sks otters", "sks otterhound", "xsks otter"]
    assert subject.class_prompts([*captions, *capitals]) == [
        "otter",
        "otter, flat style",
        "otter in snow",
        "two otters",
    ]
    assert subject.sample_prompts(captions, "a ball") == ["sks otter, flat style", "sks otter", "otter", "a ball"]


def test_the_class_keeps_half_beside_further_prompts():
    kept = PreservedPrompts.of(["otter", "otter, flat style"], ["dog", "otter", "cup", "bus", "dog"])
    assert kept.prompts == ["otter", "otter, flat style", "dog", "cup", "bus"]
    assert kept.counts(11) == {"otter": 3, "otter, flat style": 3, "dog": 2, "cup": 2, "bus": 1}
    assert kept.interleaved() == ["otter", "dog", "otter, flat style", "cup", "otter", "bus"]
    assert kept.counts(1) == {"otter": 1}


@pytest.mark.parametrize(("own", "further"), [(["otter", "red otter"], []), ([], ["otter", "red otter"])])
def test_prompts_of_one_kind_share_evenly(own, further):
    kept = PreservedPrompts.of(own, further)
    assert kept.interleaved() == ["otter", "red otter"]
    assert kept.counts(7) == {"otter": 4, "red otter": 3}


@pytest.mark.parametrize("word", ["dog", "Photo", "corgi", "zendaya", "otter"])
def test_ordinary_words_are_known(word):
    assert is_common_word(word)


@pytest.mark.parametrize("word", ["sks", "ohwx", "zwx", "ukj", "x"])
def test_rare_words_are_not(word):
    assert not is_common_word(word)


def test_an_identifier_is_shown_as_the_tokenizers_cut_it():
    base = SimpleNamespace(tokenizers=[clip_tokenizer(positions=77), clip_tokenizer(pad_token="!", positions=77)])
    assert examine_identifier("zwx", base).lines() == ["identifier 'zwx': 2 pieces (z + wx)"]
    one, warning = examine_identifier("sks dog", base).lines()
    assert one == "identifier 'sks dog': 2 pieces (sks + dog)"
    assert "'dog' is an ordinary word" in warning
    words = {
        "sks-dog": ("dog",),
        "zwx_7": (),
        "dog7": ("dog",),
        "reddog": ("dog",),
        "kotoba": (),
        "red dog": ("red", "dog"),
    }
    assert {word: examine_identifier(word, base).ordinary for word in words} == words
    assert "'red', 'dog' are ordinary words" in examine_identifier("red dog", base).lines()[1]


def test_what_stands_before_the_class_is_what_a_subject_is_bound_to():
    captions = [
        "a photo of red dog",
        "Red dog, flat style",
        "sks  Dog in snow",
        "red dog",
        "a dog",
        "a cat",
        "red dogs",
    ]
    assert words_before_class("dog", captions) == ["red", "Red", "sks"]
    assert words_before_class("guide dog", ["ohwx guide dog"]) == ["ohwx"]
    assert words_before_class("dog.", ["a photo of sks dog.", "zwx dog in snow"]) == ["sks", "zwx"]
    assert words_before_class("c++", ["sks c++"]) == ["sks"]
