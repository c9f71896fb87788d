"""DreamBooth's sources: whose pictures make an epoch, what the base draws beside given ones, and what is refused."""

import json
from dataclasses import replace

import pytest
from PIL import Image
from sfumato.trainers import dreambooth

from sfumato import cli
from sfumato.errors import ConfigError, DataError
from sfumato.files import read_header
from sfumato.training.methods.subject import Subject
from tests.logged import log_in

pytestmark = pytest.mark.usefixtures("quick")
QUIET = ("--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0")


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train a LoRA with these options on the tiny base; returns the run's folder."""

    def run(*options, images=pictures, status=0, quiet=QUIET):
        words = ["--images", images, "--output", tmp_path / "run", "--base", pocket_folder, "--class-name", "square"]
        words += ["--prior-prompts", "", "--batch", "2", *quiet, *options]
        assert cli.main(["train", "dreambooth", *map(str, words)]) == status
        return tmp_path / "run"

    return run


@pytest.fixture
def both(pictures, tmp_path):
    """A dataset.toml of six pictures of the subject and, twice an epoch each, six of its class."""
    path = tmp_path / "dataset.toml"
    source = f'[[source]]\npath = "{pictures.as_posix()}"\n'
    path.write_text(f'{source}words = "sks square"\n{source}words = "square"\nclass = true\nrepeats = 2\n')
    return path


def test_a_source_without_captions_needs_words_or_an_instance_prompt(tmp_path):
    """Which is the caption of all; and the words that are advised are the subject's."""
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "dataset.toml").write_text('[[source]]\npath = "."\n')
    config = dreambooth.Config(images=tmp_path / "dataset.toml", output=tmp_path / "run", class_name="dog")
    with pytest.raises(DataError, match='give their source words = "sks dog"'):
        dreambooth.read_examples(config, Subject("sks dog", "dog"))
    config = replace(config, instance_prompt="a sks dog")
    found = dreambooth.read_examples(config, Subject("a sks dog", "dog"))
    assert [example.caption for example in found] == ["a sks dog"]


def test_each_line_of_a_subjects_caption_may_be_a_caption(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a photo of a sks dog\nsks dog, grass\n")
    config = dreambooth.Config(images=tmp_path, output=tmp_path / "run", class_name="dog", caption_lines=True)
    found = dreambooth.read_examples(config, Subject("sks dog", "dog"))
    assert found.captions == ["a photo of a sks dog", "sks dog, grass"]
    assert dreambooth.identifiers(config, found) == ["sks"]


def test_a_subjects_caption_may_have_wildcards(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("{photo|drawing} of a sks dog")
    config = dreambooth.Config(images=tmp_path, output=tmp_path / "run", class_name="dog", wildcards=True)
    found = dreambooth.read_examples(config, Subject("sks dog", "dog"))
    assert found.captions == ["photo of a sks dog", "drawing of a sks dog"]
    assert dreambooth.identifiers(config, found) == ["sks"]
    with pytest.raises(ConfigError, match="--instance-prompt and --wildcards are both given"):
        dreambooth.check_words(replace(config, instance_prompt="a {photo|drawing} of a sks dog"))


def test_an_epoch_is_of_the_subjects_pictures(train, both):
    """Six of them by two: three steps, whatever there is of the class."""
    run = train("--method", "lora", "--rank", "1", "--epochs", "1", images=both)
    assert len((run / "log.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow
@pytest.mark.parametrize("source", ["folder", "dataset.toml"])
def test_further_prompts_are_drawn_beside_given_pictures(source, train, pictures, both, capsys):
    given = ["--class-images", pictures] if source == "folder" else []
    further = ["--prior-prompts", "red", "--prior-prompts", "cat", "--class-count", "3"]
    images = pictures if source == "folder" else both
    run = train("--method", "lora", "--rank", "1", "--steps", "1", *given, *further, images=images)
    said = capsys.readouterr().err
    assert "class images: 3 of red, cat (3 drawn now)" in said
    assert "nothing holds" not in said
    assert "6 images, 9 of the class" in said
    drawn = {json.loads(file.read_text())["prompt"] for file in run.glob("class/*/about.json")}
    assert drawn == {"red", "cat"}


def test_prompts_that_no_picture_is_left_for_are_named(train, both, capsys):
    prompts = [word for prompt in ("red", "cat", "a b") for word in ("--prior-prompts", prompt)]
    train("--method", "lora", "--rank", "1", "--steps", "1", *prompts, "--class-count", "2", images=both)
    said = capsys.readouterr().err
    assert "class images: 2 of red, cat (2 drawn now)\nnothing holds a b: --class-count 2 is too few" in said


@pytest.mark.slow
def test_nothing_is_held_without_a_prior_and_it_is_said(train, both, tmp_path, capsys):
    options = ("--method", "lora", "--rank", "1", "--steps", "1", "--prior", "none")
    train(*options, "--class-cache", tmp_path / "cache", images=both)
    said = capsys.readouterr().err
    assert "--prior none: neither images of the class nor prompts are held" in said
    assert "--class-cache: the base draws no images of the class" in said


@pytest.mark.slow
def test_the_class_is_drawn_at_the_size_that_is_learned(train):
    """A resolution that is no multiple of 8 is for the base's next smaller one."""
    options = ("--method", "lora", "--rank", "1", "--steps", "1", "--class-count", "1", "--resolution", "70")
    (drawn,) = train(*options).glob("class/*/*.png")
    with Image.open(drawn) as picture:
        assert picture.size == (64, 64)


@pytest.mark.slow
def test_a_file_says_how_many_steps_made_it(train):
    quiet = ("--sample-every", "0", "--measure-every", "1", "--checkpoint-every", "0")
    options = ("--method", "lora", "--rank", "1", "--prior", "none", "--steps", "9", "--learning-rate", "1e-2")
    run = train(*options, "--drift-limit", "1e-6", quiet=quiet)
    made = max(row["step"] for row in log_in(run))
    assert made < 9
    assert read_header(run / "run.safetensors").metadata["ss_steps"] == str(made)
    assert f"| steps | {made} |" in (run / "README.md").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--method", "full", "--name", "class"], "--name 'class': it is what a run calls"),
        (["--method", "full", "--name", "Images"], "--name 'Images': it is what a run calls"),
        (["--text-learning-rate", "1e-5"], "--text-learning-rate has no effect without --train-text-encoder"),
        (["--method", "full", "--rank", "4"], "--rank has no effect without --method lora or --save lora"),
        (["--method", "full", "--alpha", "4"], "--alpha has no effect without --method lora"),
        (["--method", "full", "--targets", "attention"], "--targets has no effect without --method lora"),
        (["--prior", "none", "--class-images", "."], "--class-images has no effect without --prior pictures"),
        (["--prior", "none", "--class-count", "3"], "--class-count has no effect without --prior pictures"),
        (["--prior", "base", "--class-count", "3"], "--class-count has no effect without --prior pictures"),
        (["--prior", "none", "--prior-weight", "3"], "--prior-weight has no effect without --prior pictures"),
        (["--keep-tags", "1"], "--keep-tags 1 has no effect without --shuffle-tags or --tag-dropout"),
        (["--force"], "--force has no effect without --resume"),
        (["--ema-on-cpu"], "--ema-on-cpu has no effect without --ema"),
        (["--optimizer", "prodigy", "--train-text-encoder", "--text-learning-rate", "0.1"], "beside --learning-rate 1"),
    ],
)
def test_what_has_no_effect_is_one_line(options, said, train, capsys, tmp_path):
    train(*options, status=2)
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]
    assert not (tmp_path / "run").exists()


def test_pictures_of_the_class_are_all_that_there_is_of_it(train, both, tmp_path, capsys):
    train("--class-count", "3", images=both, status=2)
    wanted = "--class-count has no effect without --prior-prompts beside images of the class"
    assert wanted in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_keep_tags_is_for_the_sources_that_shuffle_theirs(both, tmp_path):
    config = dreambooth.Config(images=both, output=tmp_path / "run", class_name="square", keep_tags=1)
    with pytest.raises(ConfigError, match="--keep-tags 1 has no effect"):
        dreambooth.read_examples(config, Subject("sks square", "square"))
    both.write_text(f"shuffle_tags = true\n{both.read_text()}")
    assert len(dreambooth.read_examples(config, Subject("sks square", "square"))) == 12


def test_without_a_prior_the_class_wants_no_captions(both, tmp_path):
    both.write_text(both.read_text().replace('words = "square"\n', ""))
    config = dreambooth.Config(images=both, output=tmp_path / "run", class_name="square")
    with pytest.raises(DataError, match="no caption"):
        dreambooth.read_examples(config, Subject("sks square", "square"))
    found = dreambooth.read_examples(replace(config, prior="none"), Subject("sks square", "square"))
    assert {example.group for example in found} == {"instance"}


@pytest.mark.slow
def test_what_has_no_effect_is_not_filled_in(train, tmp_path):
    """So the config of a run, which runs it again, holds nothing that is refused."""
    train("--method", "full", "--prior", "none", "--steps", "1", "--save", "difference")
    config = tmp_path / "run/config.toml"
    text = config.read_text()
    assert not [name for name in ("rank", "alpha", "class_count", "text_learning_rate") if f"\n{name} =" in text]
    assert cli.main(["train", "dreambooth", str(config), "--output", str(tmp_path / "again")]) == 0


def test_the_identifier_is_found_in_an_instance_prompt_and_in_what_a_source_calls_its_pictures(pictures, tmp_path):
    def found(images, **given):
        config = dreambooth.Config(output=tmp_path, images=images, **given)
        subject = Subject(config.instance_prompt or "sks square", "square")
        return dreambooth.identifiers(config, dreambooth.read_examples(config, subject))

    file = tmp_path / "dataset.toml"
    file.write_text(f'[[source]]\npath = "{pictures}"\nwords = "dog square"\n')
    assert found(pictures, instance_prompt="a red square", class_prompt="a square") == ["red"]
    assert found(file, class_name="square") == ["dog"]
    assert found(pictures, class_name="square") == ["sks"]
