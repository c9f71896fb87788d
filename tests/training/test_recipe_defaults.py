"""What is taken where nothing is said: the shipped recipes, on a run that goes on what it began with."""

import dataclasses
import shlex
from types import SimpleNamespace

import pytest
from PIL import Image
from sfumato.trainers import dreambooth, finetune, lora
from torch import equal

from sfumato import cli, data
from sfumato.config import parse, to_toml
from sfumato.errors import DataError
from sfumato.files import read_tensors
from sfumato.models.family import FAMILIES
from sfumato.training import recipe_defaults

CONFIGS = cli.source("sfumato.trainers.lora").parent / "configs"


def resolved(module, words, family="pocket", kinds=None):
    """The config of these words with all that is chosen for it."""
    config = parse(module.Config, words, program="train test")
    one = FAMILIES[family]
    base = SimpleNamespace(family=one, defaults=one.defaults, alpha_bar=range(1000), inpaints=False)
    kinds = {"kinds": 1 + bool(config.prior_prompts)} if module is lora else {}
    return module.resolve(config, base, data.ExampleSet(()), 1, **kinds)[0]


@pytest.mark.parametrize(
    ("module", "recipe", "options"),
    [
        (lora, "lora-style", []),
        (lora, "lora-subject", ["--trigger", "sks cat"]),
        (lora, "lora-pivotal", ["--train-words", "<x>"]),
        (dreambooth, "dreambooth-subject", ["--class-name", "cat"]),
        (dreambooth, "dreambooth-subject-full", ["--class-name", "cat", "--method", "full"]),
        (finetune, "finetune-style", []),
    ],
)
def test_a_trainer_takes_its_shipped_recipe_by_itself(module, recipe, options):
    words = ["--images", "pictures", "--output", "run", *options]
    assert resolved(module, words) == resolved(module, [str(CONFIGS / f"{recipe}.toml"), *words])


def test_elsewhere_nothing_is_taken_that_was_measured_on_pocket_alone():
    style = resolved(lora, ["--images", "pictures", "--output", "run"], "sdxl")
    assert (style.targets, style.rank, style.alpha, style.crossed_share) == ("transformers", 16, 16, 0)
    assert (style.adapter_guidance, style.flip, style.caption) == (0, True, "{caption}")


def test_what_does_not_fit_the_recipe_is_left_out_of_it():
    words = ["--images", "pictures", "--output", "run"]
    assert resolved(lora, [*words, "--max-timestep", "200"]).crossed_share == 0
    assert resolved(lora, [*words, "--crop", "random"]).crossed_share == 0
    held = [*words, "--trigger", "sks cat", "--prior-prompts", ""]
    assert resolved(lora, held).prior_prompts == ()
    assert resolved(lora, [*words, "--rank", "4"]).alpha == 8
    assert resolved(dreambooth, [*words, "--class-name", "cat", "--prior", "none"]).prior_prompts == ()


@pytest.mark.parametrize(
    ("module", "options"),
    [(lora, []), (lora, ["--trigger", "sks cat"]), (dreambooth, ["--class-name", "cat"]), (finetune, [])],
)
def test_a_run_goes_on_with_what_was_chosen_for_it(module, options, tmp_path):
    words = ["--images", "pictures", "--output", str(tmp_path), *options]
    begun = resolved(module, words)
    (tmp_path / "config.toml").write_text(to_toml(begun))
    for again in ([*words, "--resume"], [str(tmp_path / "config.toml"), "--output", str(tmp_path), "--resume"]):
        assert dataclasses.replace(resolved(module, again), resume=False) == begun


def test_a_run_of_an_earlier_version_goes_on_as_it_was(tmp_path):
    """Its config had none of --learn, and no caption where none was asked for."""
    words = ["--images", "pictures", "--output", str(tmp_path)]
    older = resolved(lora, [*words, "--learn", "plain"])
    (tmp_path / "config.toml").write_text(to_toml(dataclasses.replace(older, learn=None)))
    for again in ([*words, "--resume"], [str(tmp_path / "config.toml"), "--output", str(tmp_path), "--resume"]):
        found = resolved(lora, again)
        assert (found.targets, found.rank, found.alpha, found.flip) == ("cross-attention", 16, 16, False)
        assert dataclasses.replace(found, resume=False, learn="plain") == older
    mirrored = dataclasses.replace(resolved(finetune, words), flip=False, caption=None)
    (tmp_path / "config.toml").write_text(to_toml(mirrored))
    assert dataclasses.replace(resolved(finetune, [*words, "--resume"]), resume=False) == mirrored


def test_the_style_by_itself_is_the_recipe_to_the_byte(pocket_folder, pictures, tmp_path, quick):
    found = []
    for name, first in (("one", []), ("other", [str(CONFIGS / "lora-style.toml")])):
        words = [*first, "--images", pictures, "--output", tmp_path / name, "--base", pocket_folder, "--name", "a"]
        words += ["--steps", "2", "--batch", "2", "--sample-every", "0", "--measure-every", "0"]
        assert cli.main(["train", "lora", *map(str, words)]) == 0
        found.append(read_tensors(tmp_path / name / "a.safetensors"))
    one, other = found
    assert one.keys() == other.keys()
    assert all(equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("module", [lora, finetune])
@pytest.mark.parametrize("options", [[], ["--trigger", "sks cat"]])
def test_images_that_nothing_says_what_they_show_name_the_command_for_captions(module, options, tmp_path):
    folder = tmp_path / "my photos"
    folder.mkdir()
    for number in (1, 2):
        Image.new("RGB", (64, 64), "red").save(folder / f"IMG_000{number}.png")
    config = parse(module.Config, ["--images", str(folder), "--output", "run", *options], program="train test")
    with pytest.raises(DataError) as ended:
        module.read_examples(config)
    command = str(ended.value).partition("sfumato caption ")[2].partition(" writes")[0]
    assert shlex.split(command)[0] == str(folder)
    assert "2 of 2 images have no caption" in str(ended.value)
    (folder / "IMG_0001.txt").write_text("a fox")
    (folder / "IMG_0002.txt").write_text("an owl")
    assert sorted(module.read_examples(config).captions) == ["a fox", "an owl"]


def test_a_style_takes_the_words_of_names(pictures):
    config = lora.Config(images=pictures, output="run")
    assert "red square" in recipe_defaults.read_named(config).captions
