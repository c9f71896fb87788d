"""What a file says of itself: all that can be said of it, to the letter, and what is taken from it."""

from dataclasses import replace

import pytest
import torch
from PIL import Image

import sfumato
from sfumato.files import read_header, write_tensors
from sfumato.files.metadata import (
    Description,
    adapter_guidance_of,
    clip_skip_of,
    count_tags,
    creation_time,
    describe,
    embedding_files_of,
    family_from_metadata,
    negatives_of,
    over_steps_of,
    prediction_type_of,
    short_hash,
    trigger_words,
)
from sfumato.files.writing.kohya import metadata_within_limit
from sfumato.merging.sources import Parent, merged_metadata
from tests.files.said import said


@pytest.mark.parametrize(("strength", "text"), [(2.0, "2"), (0.5, "0.5"), (0.0, None)])
def test_adapter_guidance_is_written_where_there_is_any(strength, text):
    found = describe(Description("line", "sd1", adapter_guidance=strength))
    assert found.get("sfumato.adapter_guidance") == text
    assert adapter_guidance_of(found) == strength


@pytest.mark.parametrize(("parents", "child"), [((2.0,), 2.0), ((2.0, 2.0), 2.0), ((2.0, 0.0), 0.0), ((2.0, 3.0), 0.0)])
def test_what_is_made_of_files_that_ask_for_one_adapter_guidance_asks_for_it(parents, child):
    told = [describe(Description("line", "sd1", adapter_guidance=strength)) for strength in parents]
    files = [Parent(f"{place}.safetensors", "ab", metadata, "sd1", 1.0) for place, metadata in enumerate(told)]
    assert adapter_guidance_of(merged_metadata(files, title="mix", family="sd1")) == child


@pytest.mark.parametrize(("parents", "child"), [("ab", ""), ("aa", "a"), (["a", ""], "")])
def test_what_is_made_of_files_of_one_release_is_of_that_release(parents, child):
    told = [describe(Description("line", "sd1", base_fingerprint=each)) for each in parents]
    files = [Parent(f"{place}.safetensors", "ab", metadata, "sd1", 1.0) for place, metadata in enumerate(told)]
    assert merged_metadata(files, title="mix", family="sd1").get("sfumato.base_fingerprint", "") == child


@pytest.mark.parametrize("text", ["", "much", "-1", "nan", "inf", "21"])
def test_what_a_file_says_wrongly_of_adapter_guidance_is_none(text):
    assert adapter_guidance_of({"sfumato.adapter_guidance": text}) == 0.0


@pytest.mark.parametrize(
    ("span", "text"), [((0.0, 0.8), "0-0.8"), ((1 - 900 / 999, 1.0), None), ((3e-05, 0.5), "3e-05-0.5")]
)
def test_the_steps_to_be_drawn_with_are_written_to_their_last_digit(span, text):
    found = describe(Description("line", "sd1", over_steps=span))
    assert found["sfumato.over_steps"] == (text or f"{span[0]!r}-1")
    assert over_steps_of(found) == span
    assert "sfumato.over_steps" not in describe(Description("line", "sd1"))
    assert over_steps_of({}) is None


@pytest.mark.parametrize("text", ["much", "0.8", "0.8-0.2", "0-1.5", "0-1", "-0.1-0.5", "0-nan", "0-0.8-1", "0-."])
def test_what_a_file_says_wrongly_of_its_steps_is_none(text):
    assert over_steps_of({"sfumato.over_steps": text}) is None


@pytest.mark.parametrize(("ends", "child"), [((0.8, 0.8), (0.0, 0.8)), ((0.8, 0.7), None), ((0.8, None), None)])
def test_what_is_made_of_files_that_ask_for_the_same_steps_asks_for_them(ends, child):
    told = [describe(Description("line", "sd1", over_steps=end and (0.0, end))) for end in ends]
    files = [Parent(f"{place}.safetensors", "ab", metadata, "sd1", 1.0) for place, metadata in enumerate(told)]
    assert over_steps_of(merged_metadata(files, title="mix", family="sd1")) == child


def merged(*metadata):
    files = [Parent(f"{place}.safetensors", "ab", each, "sd1", 1.0) for place, each in enumerate(metadata)]
    return merged_metadata(files, title="mix", family="sd1")


@pytest.mark.parametrize(("skips", "child"), [((1, 1), 1), ((0, 0), 0), ((1, 0), None), ((1, None), None)])
def test_what_is_made_of_files_of_one_clip_skip_has_it(skips, child):
    assert clip_skip_of(merged(*(describe(Description("line", "sd1", clip_skip=skip)) for skip in skips))) == child


def test_what_is_made_of_files_with_words_beside_them_knows_these():
    told = [describe(Description("x", "sd1", word_files=files)) for files in ({"<a>": "a.st"}, {"<b>": "b.st"}, {})]
    assert embedding_files_of(merged(*told)) == {"<a>": "a.st", "<b>": "b.st"}
    assert embedding_files_of(merged(merged(*told))) == {"<a>": "a.st", "<b>": "b.st"}
    in_a_bundle = {"sfumato.config": '{"train_words": ["<c>"]}'}
    assert embedding_files_of(merged(in_a_bundle)) == {}


@pytest.mark.parametrize(
    ("metadata", "skipped"),
    [
        ({}, None),
        ({"sfumato.config": '{"clip_skip": 2}'}, 2),
        ({"sfumato.config": '{"steps": 100}'}, 0),  # a training that was told nothing
        ({"sfumato.config": '{"method": "ties"}'}, None),
        ({"sfumato.config": '{"method": "ties"}', "sfumato.clip_skip": "1"}, 1),
        ({"sfumato.config": '{"clip_skip": "a lot"}'}, None),
        ({"ss_clip_skip": "2"}, 1),  # sd-scripts
        ({"ss_clip_skip": "None"}, None),
        ({"ss_clip_skip": "2", "ss_base_model_version": "sdxl_base_v1-0"}, None),
    ],
)
def test_a_clip_skip_is_what_the_file_was_learned_with(metadata, skipped):
    assert clip_skip_of(metadata) == skipped


@pytest.mark.parametrize(
    ("metadata", "predicts"),
    [
        ({}, ""),
        ({"modelspec.prediction_type": "v"}, "v_prediction"),
        ({"ss_base_model_version": "sd_v2_v"}, "v_prediction"),  # sd-scripts without ModelSpec
        ({"modelspec.architecture": "stable-diffusion-v2-768-v/lora"}, "v_prediction"),
        ({"ss_base_model_version": "sd_v2"}, ""),
        ({"ss_base_model_version": "sd_v1"}, ""),
    ],
)
def test_what_a_base_predicted_is_told_in_several_ways(metadata, predicts):
    assert prediction_type_of(metadata) == predicts
    assert prediction_type_of(merged(metadata)) == predicts


@pytest.mark.parametrize(
    ("metadata", "family"),
    [
        ({"ss_base_model_version": "sd_1.5"}, "sd1"),  # ai-toolkit
        ({"ss_base_model_version": "sd_2.1"}, "sd2"),
        ({"ss_v2": "true"}, "sd2"),
        ({"ss_v2": "False"}, None),
        ({"ss_base_model_version": "sdxl_1.0"}, "sdxl"),
    ],
)
def test_other_tools_spellings_of_a_family_are_known(metadata, family):
    assert family_from_metadata(metadata) == family


def test_sdxls_own_layer_is_the_last_but_one():
    found = describe(Description("line", "sdxl", clip_skip=0))
    assert found["modelspec.encoder_layer"] == "2"
    assert "ss_clip_skip" not in found
    assert clip_skip_of(found) == 0


def test_all_that_can_be_said_is_said(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    description = Description(
        **{"title": "line", "family": "sd2", "base": "base-2", "prediction_type": "v_prediction"},
        **{"resolution": (512, 768), "images": 16, "steps": 400, "batch": 4, "seed": 7},
        **{"learning_rate": 1e-4, "optimizer": "adamw", "trigger": ["zwx style", "b"]},
        **{"captions": ["a crab, ink", "ink, a crab ,"], "author": "somebody", "license": "cc0"},
        **{"config": {"rank": 4, "ä": None}, "dataset_sha256": "ab", "clip_skip": 1, "timesteps": (0, 600)},
        parents=[{"name": "one", "weight": 0.5}, {"name": "two", "weight": 1}],
        extra={"more": "x", "ss_seed": "8", "modelspec.description": "of lines"},
    )
    assert describe(description) == {
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2_v",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": "line",
        "ss_sd_model_name": "base-2",
        "ss_resolution": "(512, 768)",
        "ss_num_train_images": "16",
        "ss_steps": "400",
        "ss_max_train_steps": "400",
        "ss_total_batch_size": "4",
        "ss_seed": "8",
        "ss_learning_rate": "0.0001",
        "ss_optimizer": "adamw",
        "ss_training_finished_at": "1700000000.0",
        "ss_clip_skip": "2",
        "ss_tag_frequency": '{"line":{"a crab":2,"ink":2}}',
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-768-v/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "line",
        "modelspec.resolution": "512x768",
        "modelspec.description": "of lines",
        "modelspec.author": "somebody",
        "modelspec.date": "2023-11-14T22:13:20Z",
        "modelspec.license": "cc0",
        "modelspec.trigger_phrase": "zwx style, b",
        "modelspec.prediction_type": "v",
        "modelspec.merged_from": "one, two",
        "modelspec.encoder_layer": "2",
        "modelspec.timestep_range": "0,600",
        "sfumato.version": sfumato.__version__,
        "sfumato.config": '{"rank":4,"ä":null}',
        "sfumato.dataset_sha256": "ab",
        "sfumato.clip_skip": "1",
        "sfumato.trigger": '["zwx style","b"]',
        "sfumato.parents": '[{"name":"one","weight":0.5},{"name":"two","weight":1}]',
        "more": "x",
    }
    assert said(describe, replace(description, family="flux")) == (
        "unknown family 'flux'; known are pocket, sd1, sd2, sdxl."
    )
    assert said(describe, replace(description, prediction_type="sample")) == (
        "unknown prediction type 'sample'; known are epsilon, v_prediction, flow_prediction."
    )


def test_little_that_can_be_said_is_said(monkeypatch):
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    monkeypatch.setattr("time.time", lambda: 86_400.5)
    assert describe(Description("n", "sd1")) == {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_args": "{}",
        "ss_output_name": "n",
        "ss_training_finished_at": "86400.5",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "n",
        "modelspec.date": "1970-01-02T00:00:00Z",
        "sfumato.version": sfumato.__version__,
    }
    for wrong in ("x", "\u00b2", "999999999999"):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", wrong)
        assert said(creation_time) == f"SOURCE_DATE_EPOCH is {wrong!r}; wanted whole seconds since 1970."
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "253402300799")
    assert describe(Description(title="n", family="sd1"))["modelspec.date"] == "9999-12-31T23:59:59Z"


def test_the_most_frequent_tags_first():
    assert list(count_tags(["b, a", "b,,c ", "a,b"]).items()) == [("b", 3), ("a", 2), ("c", 1)]
    assert len(count_tags([f"tag {n}" for n in range(300)])) == 200


def test_long_captions_and_settings_leave_room_for_all_else_that_a_file_says():
    """Captions such as a model writes once ended a training of 200 pictures without its adapter."""
    captions = [f"{n} " + "ein langer Satz über ein Bild " * 20 for n in range(250)]
    noise = Image.effect_noise((512, 512), 100)
    config = {"steps": 3, "sample_prompts": captions}
    metadata = describe(Description("n", "sdxl", captions=captions, config=config, thumbnail=noise))
    assert metadata_within_limit(metadata, modules=1058) == (metadata, [])
    assert len(metadata["ss_tag_frequency"]) > 10_000
    assert metadata["sfumato.config"] == '{"steps":3}'


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, []),
        ({"sfumato.trigger": '["a, b"]', "modelspec.trigger_phrase": "c"}, ["a, b"]),
        ({"sfumato.trigger": "[1]", "modelspec.trigger_phrase": "c , ,d"}, ["c", "d"]),
        ({"sfumato.trigger": "{}", "modelspec.trigger_phrase": "c"}, ["c"]),
        ({"sfumato.trigger": "[" * 100_000, "modelspec.trigger_phrase": "c"}, ["c"]),
    ],
)
def test_words_that_call_it_up(metadata, words):
    assert trigger_words(metadata) == words


def test_a_stated_hash_is_taken_if_it_is_one(tmp_path):
    stated = "0123456789abcdef" * 4
    for text, taken in ((stated, True), (stated[:-1], False), (stated.upper(), False), (stated + "0", False)):
        path = write_tensors(tmp_path / "a", {"w": torch.ones(1)}, {"sshs_model_hash": text})
        assert (short_hash(path) == stated[:12]) is taken
        assert (short_hash(str(path)) == short_hash(read_header(path))) is True


@pytest.mark.parametrize("text", ["1" * 100_000 + "-" + "1" * 100_000 + "x", "0-0." + "0" * 50 + "1"])
def test_a_span_longer_than_two_numbers_is_not_read(text):
    assert over_steps_of({"sfumato.over_steps": text}) is None


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "{", "3"])
def test_json_that_cannot_be_read_asks_for_nothing(text):
    assert negatives_of({"sfumato.negatives": text}) == ()
    assert embedding_files_of({"sfumato.config": text}) == {}
    assert embedding_files_of({"sfumato.word_files": text, "sfumato.config": "{}"}) == {}
