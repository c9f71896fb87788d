"""Pictures that are held out: which, that nothing is learned of them, and what is measured on them."""

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from sfumato.trainers import dreambooth, lora, textual_inversion

from sfumato import cli, data
from sfumato.data.dataset_config import hold_out, read_folder
from sfumato.errors import ConfigError, DataError
from sfumato.models import load_base
from sfumato.training import config_defaults
from sfumato.training.loss.validation import Metrics, prepare_validation
from tests.logged import log_in
from tests.tiny import CPU

QUIET = ("--sample-every", "0", "--checkpoint-every", "0")


@pytest.fixture(scope="module")
def base(pocket_folder):
    return load_base(str(pocket_folder), precision=CPU)


@pytest.fixture
def examples(pictures):
    return read_folder(pictures, caption_template="{caption}")


def held(examples):
    return [each.path.name for each in examples.in_group("validation")]


def test_a_share_is_held_out_by_name(examples, pictures, tmp_path):
    """Always the same ones; one is left, and another picture moves few of the others."""
    found = hold_out(examples, 0.34)
    assert len(held(found)) == 2
    assert held(found) == held(hold_out(examples, 0.34))
    assert set(held(hold_out(examples, 0.01))) < set(held(found))
    assert sorted(each.path for each in found) == sorted(each.path for each in examples)
    for each in examples:
        (tmp_path / each.path.name).write_bytes(each.path.read_bytes())
    assert held(hold_out(read_folder(tmp_path, caption_template="{caption}"), 0.34)) == held(found)
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "navy-square.png")
    more = held(hold_out(read_folder(tmp_path, caption_template="{caption}"), 0.3))
    assert len(set(more) & set(held(found))) >= 1
    assert hold_out(examples, 0.0) is examples


def test_a_picture_of_several_sources_is_held_out_of_all(pictures, tmp_path):
    source = f'[[source]]\npath = "{pictures.as_posix()}"\ncaption = "a {{caption}}"\n'
    (tmp_path / "two.toml").write_text(source + source.replace('"a {', '"the {'))
    found = hold_out(read_folder(tmp_path / "two.toml"), 0.2)
    assert len(held(found)) == 2
    assert len(set(held(found))) == 1


@pytest.mark.parametrize(("count", "share"), [(1, 0.2), (1, 0.5)])
def test_what_leaves_none_to_learn_from_is_refused(count, share, examples):
    few = dataclasses.replace(examples, examples=examples.examples[:count])
    with pytest.raises(DataError, match=rf"--validation-split {share:g} of 1 image leaves none to learn from"):
        hold_out(few, share)


def test_a_source_is_held_out(pictures, tmp_path):
    """Its captions are the subject's, by the template that holds for all; a picture cannot be both."""
    (tmp_path / "new").mkdir()
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "new" / "navy-square.png")
    learned = f'[[source]]\npath = "{pictures.as_posix()}"\n'
    text = (
        f'caption = "{{caption}}, {{trigger}}"\ntrigger = "zwx"\n{learned}[[source]]\npath = "new"\nvalidation = true\n'
    )
    (tmp_path / "a.toml").write_text(text)
    found = read_folder(tmp_path / "a.toml")
    assert [each.caption for each in found.in_group("validation")] == ["navy square, zwx"]
    assert len(found.in_group("instance")) == 6
    assert hold_out(found, 0.0) is found
    assert len(held(hold_out(found, 0.2))) == 2
    (tmp_path / "b.toml").write_text(f'caption = "{{caption}}"\n{learned}{learned}validation = true\n')
    with pytest.raises(DataError, match="in a source with validation = true and in one that is learned"):
        hold_out(read_folder(tmp_path / "b.toml"), 0.0)
    (tmp_path / "c.toml").write_text(f"{text}class = true\n")
    with pytest.raises(ConfigError, match="source 2: class and validation are both true"):
        read_folder(tmp_path / "c.toml")
    (tmp_path / "d.toml").write_text(f'{learned}caption = "{{caption}}"\nvalidation = true\n')
    config = lora.Config(images=tmp_path / "d.toml", output=tmp_path / "run")
    with pytest.raises(DataError, match="no images to learn, but of a class or for validation only"):
        lora.read_examples(config)


def test_validation_is_the_fit_of_pictures_held_out(base, examples):
    """On 32 samples: each picture several times, at timesteps from all of the base's."""
    found = hold_out(examples, 0.34)
    config = lora.Config(images=Path("pictures"), output=Path("run"), resolution=64)
    dataset = config.prepare(found.in_group("instance"), base)
    held_out = prepare_validation(config, base, found, None)
    assert len(held_out) == 2
    assert "2 images are held out for validation: " in held_out.notes[-1]
    metrics = Metrics(base, dataset, {}, held_out=held_out)
    assert [*metrics.values()] == ["fit", "validation"]
    assert metrics.values() == Metrics(base, dataset, {}, held_out=held_out).values()
    samples = metrics._held_out
    timesteps = torch.cat([at for _, _, at in samples])
    assert sorted(timesteps.tolist()) == [int((place + 0.5) / 32 * 1000) for place in range(32)]
    places = [place for batch, _, _ in samples for place in batch.indices]
    assert [places.count(place) for place in (0, 1)] == [16, 16]
    noisy = [len(torch.unique(noise.flatten(1), dim=0)) for _, noise, _ in samples]
    assert sum(noisy) == 32


@pytest.mark.slow
def test_only_pictures_that_are_measured_are_encoded(base, tmp_path, monkeypatch):
    """A run knows all of them again, and measures what it would if all were encoded."""
    for number in range(70):
        Image.new("RGB", (64 + 16 * (number % 2), 64), (3 * number, 0, 0)).save(tmp_path / f"{number:02}.png")
    config = lora.Config(images=tmp_path, output=Path("run"), resolution=64, caption="{caption}")
    found = hold_out(read_folder(tmp_path, caption_template="{caption}"), 0.5)
    dataset = config.prepare(found.in_group("instance"), base)
    encode, encoded = base.encode_pixels, []
    monkeypatch.setattr(type(base), "encode_pixels", lambda _, pixels: encoded.extend(pixels) or encode(pixels))
    few = prepare_validation(config, base, found, None)
    assert len(few) == 35
    assert len(encoded) == 32
    all_of_them = prepare_validation(config, base, dataclasses.replace(found, skip_bad=True), None)
    assert len(encoded) == 32 + 35
    assert (few.fingerprint, few.contents, few.notes) == (
        all_of_them.fingerprint,
        all_of_them.contents,
        all_of_them.notes,
    )
    values = [Metrics(base, dataset, {}, held_out=each).values()["validation"] for each in (few, all_of_them)]
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_pictures_held_out_are_measured_as_they_are(base, tmp_path):
    """Whatever else is done to those that are learned; padding stays, which loses nothing of a picture."""
    for name in "ab":
        Image.linear_gradient("L").resize((100, 64)).convert("RGB").save(tmp_path / f"{name}.png")
    varied = {"flip": True, "crop": "random", "shuffle_tags": True, "tag_dropout": 0.5, "caption_dropout": 1.0}
    config = lora.Config(images=tmp_path, output=Path("run"), resolution=64, caption="one, two, three", **varied)
    found = lora.read_examples(dataclasses.replace(config, validation_split=0.5))
    dataset = prepare_validation(config, base, found, None)
    (batch,) = dataset.middles(1, 10**6)
    assert batch.captions == ["one, two, three"]
    assert batch.variants == [0]
    assert next(dataset.views(10**6)).indices == [0]  # which asks for crops that stay, and mirrors what may be
    padded = dataclasses.replace(config, crop="pad")
    (padding,) = prepare_validation(padded, base, found, None).middles(1, 10**6)
    assert padding.mask.min() == 0


def test_pictures_held_out_are_measured_with_the_first_alternatives(base, tmp_path):
    for name in "ab":
        Image.new("RGB", (64, 64), "red").save(tmp_path / f"{name}.png")
    config = lora.Config(
        images=tmp_path, output=Path("run"), resolution=64, caption="{one|two} ||| {three, four|five}", wildcards=True
    )
    found = lora.read_examples(dataclasses.replace(config, validation_split=0.5))
    (batch,) = prepare_validation(config, base, found, None).middles(1, 10**6)
    assert batch.captions == ["one, three, four"]


def test_pictures_held_out_are_measured_within_their_masks(base, examples, monkeypatch):
    """Of what lies outside of them nothing was learned."""
    config = lora.Config(images=Path("pictures"), output=Path("run"), resolution=64)
    dataset = config.prepare(hold_out(examples, 0.34).in_group("instance"), base)
    held_out = prepare_validation(config, base, hold_out(examples, 0.34), None)
    whole = Metrics(base, dataset, {}, held_out=held_out).values()
    middles = data.Dataset.middles

    def masked(self, *asked):
        for batch in middles(self, *asked):
            mask = torch.zeros_like(batch.latents[:, :1])
            mask[..., :2, :2] = 1
            yield dataclasses.replace(batch, mask=mask)

    monkeypatch.setattr(data.Dataset, "middles", masked)
    within = Metrics(base, dataset, {}, held_out=held_out).values()
    assert within["fit"] == whole["fit"]
    assert within["validation"] != whole["validation"]


@pytest.mark.slow
def test_nothing_is_learned_of_pictures_held_out(pictures, tmp_path, pocket_folder, quick):
    """The run without them is the same, and needs no other measurements than it asks for."""
    found = hold_out(read_folder(pictures, caption_template="{caption}"), 0.34)
    alone = tmp_path / "alone"
    alone.mkdir()
    for each in found.in_group("instance"):
        (alone / each.path.name).write_bytes(each.path.read_bytes())

    def train(images, name, *more):
        words = ["--images", images, "--output", tmp_path / name, "--base", pocket_folder, "--caption", "{caption}"]
        words += ["--batch", "2", "--steps", "20", "--rank", "2", "--learning-rate", "1e-2", *QUIET, *more]
        assert cli.main(["train", "lora", "--learn", "plain", *map(str, words)]) == 0
        return log_in(tmp_path / name)

    rows = train(pictures, "held", "--validation-split", "0.34")
    without = train(alone, "without", "--measure-every", "2")
    assert [row["loss"] for row in rows if "loss" in row] == [row["loss"] for row in without if "loss" in row]
    assert [row["step"] for row in rows if "fit" in row] == [*range(0, 21, 2)]
    assert [row["fit"] for row in rows if "fit" in row] == [row["fit"] for row in without if "fit" in row]
    assert all(("validation" in row) == ("fit" in row) for row in rows)
    assert not any("validation" in row for row in without)


@pytest.mark.slow
def test_a_run_knows_the_pictures_held_out_again(pictures, tmp_path, pocket_folder, quick, capsys):
    """Else one curve would be of two sets."""
    (tmp_path / "new").mkdir()
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "new" / "navy-square.png")
    text = f'caption = "{{caption}}"\n[[source]]\npath = "{pictures.as_posix()}"\n'
    (tmp_path / "a.toml").write_text(f'{text}[[source]]\npath = "new"\nvalidation = true\n')
    words = ["--images", tmp_path / "a.toml", "--output", tmp_path / "run", "--base", pocket_folder, "--rank", "2"]
    words += ["--batch", "2", "--steps", "2", *QUIET]
    assert cli.main(["train", "lora", "--learn", "plain", *map(str, words)]) == 0
    assert cli.main(["train", "lora", "--learn", "plain", *map(str, words), "--resume"]) == 0
    Image.new("RGB", (64, 64), "olive").save(tmp_path / "new" / "olive-square.png")
    assert cli.main(["train", "lora", "--learn", "plain", *map(str, words), "--resume"]) == 2
    assert "validation: olive-square.png is new" in capsys.readouterr().err


def test_what_is_held_out_is_measured(pictures, tmp_path, capsys):
    words = ["--images", pictures, "--output", tmp_path / "run", "--validation-split", "0.2", "--measure-every", "0"]
    assert cli.main(["train", "lora", "--learn", "plain", *map(str, words)]) == 2
    assert "--validation-split holds images out to be measured, and --measure-every 0" in capsys.readouterr().err


def test_a_limit_is_looked_at_as_often_with_pictures_held_out(base, examples):
    config = dreambooth.Config(images=Path("pictures"), output=Path("run"), steps=20, batch=2, drift_limit=0.5)
    found = [config_defaults.resolve(config, base, hold_out(examples, share), 1)[0] for share in (0.0, 0.34)]
    assert [each.measure_every for each in found] == [5, 5]


@pytest.mark.slow
def test_a_new_word_is_validated_too(pictures, tmp_path, pocket_folder, quick):
    words = ["--images", pictures, "--output", tmp_path / "word", "--base", pocket_folder, "--placeholder", "<x>"]
    words += ["--steps", "2", "--batch", "2", "--validation-split", "0.2", *QUIET]
    assert cli.main(["train", "textual_inversion", *map(str, words)]) == 0
    rows = log_in(tmp_path / "word")
    assert [row["step"] for row in rows if "validation" in row] == [0, 1, 2]


def test_words_of_the_subject_must_be_in_captions_held_out(pictures, tmp_path):
    """A caption without the word would measure the base."""
    (tmp_path / "new").mkdir()
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "new" / "navy-square.png")
    learned = f'[[source]]\npath = "{pictures.as_posix()}"\ncaption = "a <x>"\n'
    (tmp_path / "a.toml").write_text(f'{learned}[[source]]\npath = "new"\nvalidation = true\nwords = "a square"\n')
    config = textual_inversion.Config(
        images=tmp_path / "a.toml", output=tmp_path / "run", placeholder=("<x>",), caption="{caption}"
    )
    with pytest.raises(DataError, match="1 of 7 captions hold no placeholder, first 'a square'"):
        textual_inversion.read_examples(config)


def test_an_epoch_is_of_what_is_learned(base, examples):
    config = lora.Config(images=Path("pictures"), output=Path("run"), epochs=3, batch=2)
    counted = [config_defaults.resolve(config, base, hold_out(examples, share), 1)[0] for share in (0.0, 0.34)]
    assert [each.steps for each in counted] == [9, 6]
    assert [each.measure_every for each in counted] == [3, 1]


def test_check_counts_what_is_learned(pictures, tmp_path, capsys):
    (tmp_path / "new").mkdir()
    Image.new("RGB", (64, 64), "navy").save(tmp_path / "new" / "navy-square.png")
    text = f'caption = "{{caption}}"\n[[source]]\npath = "{pictures.as_posix()}"\n'
    (tmp_path / "a.toml").write_text(f'{text}[[source]]\npath = "new"\nvalidation = true\n')
    assert cli.main(["check", str(tmp_path / "a.toml"), "--json"]) in (0, 1)
    said = capsys.readouterr().out
    assert "new: 1 image for validation" in said
    assert '"samples": 6' in said
    (tmp_path / "b.toml").write_text(f'{text}[[source]]\npath = "{pictures.as_posix()}"\nvalidation = true\n')
    assert cli.main(["check", str(tmp_path / "b.toml")]) == 1
    assert "in a source with validation = true and in one that is learned" in capsys.readouterr().out
