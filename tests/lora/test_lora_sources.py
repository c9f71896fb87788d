"""The LoRA trainer and a dataset.toml: pictures of a class beside the subject's, and triggers that only it names."""

import json
import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sfumato.trainers import lora, textual_inversion

from sfumato import cli
from sfumato.data import ExampleSet, read_folder
from sfumato.data.placeholder_captions import insert_placeholders
from sfumato.errors import ConfigError, DataError
from sfumato.files import read_header, read_tensors
from sfumato.models.family import FAMILIES
from sfumato.training.loss import objective
from sfumato.training.loss.objective import draw_noised
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")
QUIET = ("--sample-every", "0", "--measure-every", "0", "--checkpoint-every", "0")


@pytest.fixture
def train(pocket_folder, tmp_path):
    """Train on a dataset.toml with these sources, by default with the LoRA trainer; returns the adapter's path."""

    def run(name, toml, *options, program="lora", status=0, quiet=QUIET):
        path = tmp_path / f"{name}.toml"
        path.write_text(toml)
        words = ["--images", path, "--output", tmp_path / name, "--base", pocket_folder, "--batch", "2"]
        words += [] if program == "textual_inversion" else ["--rank", "2"]
        words += {"lora": ["--learn", "plain"], "dreambooth": ["--prior-prompts", ""]}.get(program, [])
        assert cli.main(["train", program, *map(str, [*words, *quiet, *options])]) == status
        return tmp_path / name / f"{name}.safetensors"

    return run


@pytest.fixture
def source(pictures):
    """A source of all six pictures, with further lines."""

    def write(*lines):
        return "\n".join(["[[source]]", f'path = "{pictures.as_posix()}"', *lines, ""])

    return write


@pytest.mark.slow
@pytest.mark.parametrize("further", [pytest.param((), marks=pytest.mark.slow), ("--train-text-encoder",)])
def test_pictures_of_a_class_come_beside_each_batch_as_in_dreambooth(further, train, source):
    """At the weight of the prior, drawn on their own, and no part of an epoch."""
    both = source('words = "sks square"') + source('words = "square"', "class = true", "repeats = 2")
    same = ["--epochs", "1", "--learning-rate", "1e-2", "--prior-weight", "0.4", "--targets", "attention", *further]
    one = train("one", both, *same)
    other = train("other", both, *same, "--method", "lora", "--class-name", "square", program="dreambooth")
    assert [row["loss"] for row in log_beside(one)] == [row["loss"] for row in log_beside(other)]
    assert len(log_beside(one)) == 3
    assert all(row["prior_loss"] > 0 for row in log_beside(one))
    for key, tensor in read_tensors(other).items():
        assert torch.equal(read_tensors(one)[key], tensor)


def test_two_kinds_of_prior_share_their_weight(train, source):
    """Each has half, as in DreamBooth, and each kind of samples a third of the default batch."""
    both = source('words = "sks square"') + source('words = "square"', "class = true")
    one = train("one", both, "--steps", "1", "--precision", "fp32")
    two = train("two", both, "--steps", "1", "--precision", "fp32", "--prior-prompts", "a cat")
    (first,), (second,) = (
        log_beside(one),
        log_beside(two),
    )  # what the untrained base predicts of the prompts is what it should
    assert second["prior_loss"] == pytest.approx(first["prior_loss"] / 2, rel=1e-5)
    path, base = one.parents[1] / "one.toml", SimpleNamespace(defaults=FAMILIES["sd1"].defaults, alpha_bar=range(1000))
    base.family = FAMILIES["sd1"]
    config = lora.Config(images=path, output=path.parent / "three", learn="plain")
    found = {kinds: lora.resolve(config, base, ExampleSet(()), 1, kinds=kinds)[0].batch for kinds in (1, 2, 3)}
    whole = FAMILIES["sd1"].defaults.batch
    assert found == {1: whole, 2: max(1, whole // 2), 3: max(1, whole // 3)}


@pytest.mark.parametrize(
    ("lines", "is_dropped"),
    [
        (("caption_dropout = 1.0",), True),
        (("tag_dropout = 1.0",), True),
        (("tag_dropout = 1.0", "keep_tags = 1"), False),
        (("caption_dropout = 0.9",), False),
    ],
)
@pytest.mark.parametrize("program", ["lora", "textual_inversion"])
def test_a_word_that_a_source_drops_from_every_caption_is_refused(program, lines, is_dropped, train, source, capsys):
    word = "--placeholder" if program == "textual_inversion" else "--train-words"
    toml = source('words = "<x>, red"', 'caption = "{caption}"', *lines)
    train("run", toml, "--steps", "1", word, "<x>", program=program, status=2 if is_dropped else 0)
    assert ("drops <x> from every caption" in capsys.readouterr().err) is is_dropped


@pytest.mark.slow
def test_with_weight_0_a_class_is_measured_and_not_learned(train, source):
    both = source('words = "sks square"') + source('words = "square"', "class = true")
    alone = train("alone", source('words = "sks square"'), "--steps", "3", "--precision", "fp32")
    beside = train("beside", both, "--steps", "3", "--prior-weight", "0", "--precision", "fp32")
    for key, tensor in read_tensors(alone).items():
        torch.testing.assert_close(read_tensors(beside)[key], tensor, rtol=1e-3, atol=1e-6)


def test_a_class_comes_beside_prompts_that_shall_draw_as_before(train, source):
    """And has neither the subject's template nor a share in what its file says of the pictures."""
    both = source() + source("class = true", 'words = "square"')
    said = 'caption = "{caption}, {trigger} style"\ntrigger = "zwx"\n' + both
    metadata = read_header(train("run", said, "--steps", "1", "--prior-prompts", "a cat")).metadata
    assert metadata["ss_num_train_images"] == "6"
    assert json.loads(metadata["ss_tag_frequency"])["run"]["zwx style"] == 6
    assert "square" not in json.loads(metadata["ss_tag_frequency"])["run"]


def test_the_trigger_that_the_captions_were_made_with_is_told(train, source):
    """Whoever names it: each source its own, or the option where they name none."""
    template = 'caption = "{caption} by {trigger}"'
    toml = source(template, 'trigger = "abc"') + source(template) + source(template, 'trigger = "abc"')
    quiet = ("--measure-every", "0", "--checkpoint-every", "0")
    path = train("run", toml, "--steps", "1", "--trigger", "zwx", quiet=quiet)
    metadata = read_header(path).metadata
    assert json.loads(metadata["sfumato.trigger"]) == ["abc", "zwx"]
    assert metadata["modelspec.trigger_phrase"] == "abc, zwx"
    card = (path.parent / "README.md").read_text()
    assert re.search(r"\n- `abc`, as in `[a-z ]+ by abc`\n- `zwx`, as in `[a-z ]+ by zwx`\n", card)
    assert "a dog by abc" in card


def test_a_trigger_that_no_source_uses_is_not_told(train, source):
    path = train("run", source('words = "a abc"', 'trigger = "abc"'), "--steps", "1", "--trigger", "zwx")
    assert json.loads(read_header(path).metadata["sfumato.trigger"]) == ["abc"]


@pytest.mark.parametrize(
    ("line", "options", "told"),
    [
        ("", (), ["sks square"]),
        ('trigger = "abc"\ncaption = "{trigger} square"', (), ["abc"]),
        ("", ("--trigger", "zwx"), []),  # which no caption holds
        ('trigger = "abc"', ("--instance-prompt", "a zwx square"), ["a zwx square"]),
    ],
)
def test_dreambooth_tells_the_trigger_of_its_captions(line, options, told, train, source):
    options = ("--method", "lora", "--class-name", "square", "--prior", "none", "--steps", "1", *options)
    path = train("run", source('words = "sks square"', line), *options, program="dreambooth")
    assert json.loads(read_header(path).metadata.get("sfumato.trigger", "[]")) == told


@pytest.mark.parametrize(
    ("program", "options"),
    [
        ("lora", ()),
        ("dreambooth", ("--method", "lora", "--class-name", "square")),
        ("textual_inversion", ("--placeholder", "<w>")),
    ],
)
def test_pictures_of_a_class_alone_leave_nothing_behind(program, options, train, source, capsys):
    path = train("run", source('words = "a"', "class = true"), *options, program=program, status=2)
    assert "run.toml: has no images to learn, but of a class or for validation only. Name" in capsys.readouterr().err
    assert not path.parent.exists()


def test_what_is_said_of_the_subject_above_is_not_for_a_class(source, tmp_path):
    above = 'words = "sks square"\ncaption_dropout = 0.5\n'
    (tmp_path / "a.toml").write_text(above + source() + source("class = true", 'words = "a square"'))
    subject, of_class = (read_folder(tmp_path / "a.toml").in_group(group)[0] for group in ("instance", "class"))
    assert (subject.caption, subject.options.caption_dropout) == ("sks square", 0.5)
    assert (of_class.caption, of_class.options.caption_dropout) == ("a square", None)
    (tmp_path / "b.toml").write_text(above + source() + source("class = true"))
    with pytest.raises(DataError, match=r'have no caption.*, or give their source words = "a dog"\.$'):
        read_folder(tmp_path / "b.toml")  # no --caption, which would be the subject's


def test_a_template_without_its_trigger_names_the_source(source, tmp_path):
    (tmp_path / "a.toml").write_text(source("class = true", 'caption = "{trigger} square"'))
    with pytest.raises(ConfigError, match=r'a\.toml, source 1: caption .*; write trigger = "WORD" beside it'):
        read_folder(tmp_path / "a.toml", trigger="zwx")


def test_new_words_take_no_place_in_captions_of_a_class(source, tmp_path):
    (tmp_path / "a.toml").write_text(source('words = "a square"') + source("class = true", 'words = "a square"'))
    folder = insert_placeholders(read_folder(tmp_path / "a.toml"), ["<w>"], ["square"])
    assert {(e.group, e.caption) for e in folder} == {("instance", "a <w>"), ("class", "a square")}


@pytest.mark.parametrize(("subject", "said"), [("<v> <w>", "holds <w>"), ("<v>", "<w> is in no caption")])
def test_a_new_word_is_the_subjects(subject, said, source, tmp_path):
    (tmp_path / "a.toml").write_text(source(f'words = "{subject}"') + source("class = true", 'words = "a <w>"'))
    with pytest.raises(DataError, match=said):
        insert_placeholders(read_folder(tmp_path / "a.toml"), ["<v>", "<w>"])


def test_captions_without_a_new_word_are_told_a_template_that_has_it(pictures):
    """{trigger} is no word of `lora`'s --train-words, so that to recommend it would only lead to another refusal."""
    with pytest.raises(DataError) as refused:
        insert_placeholders(read_folder(pictures, caption_template="a square"), ["<w>"])
    template = re.search('--caption "(.*)"', str(refused.value))[1]
    found = insert_placeholders(read_folder(pictures, caption_template=template), ["<w>"])
    assert all(example.caption.startswith("<w>, ") for example in found)


@pytest.mark.parametrize(
    ("program", "options", "names", "template"),
    [
        (lora, {"train_words": ("<w>",)}, "ab", "<w>"),
        (lora, {"train_words": ("<w>", "<v>"), "trigger": "zwx"}, "ab", "<w> <v>"),
        (lora, {"train_words": ("<w>",), "stands_for": ("sks square",)}, "ab", "sks square"),
        (lora, {"train_words": ("<w>",)}, ("red square", "blue"), "<w>, {caption}"),
        (textual_inversion, {"placeholder": ("<w>", "<v>")}, "ab", "<w> <v>"),
    ],
)
def test_where_there_are_no_captions_a_template_for_new_words_is_told(program, options, names, template, tmp_path):
    """ "a dog" would lead to another refusal."""
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    config = program.Config(images=tmp_path, output=tmp_path / "run", **options)
    with pytest.raises(DataError, match=f'--caption "{template}" ') as refused:
        program.read_examples(config)
    assert "a dog" not in str(refused.value)
    found = program.read_examples(replace(config, caption=template))
    assert all("<w>" in example.caption for example in found)


def test_what_textual_inversion_leaves_aside_is_told(source, tmp_path):
    (tmp_path / "own").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "own/a.png")
    (tmp_path / "own/a.txt").write_text("a <W> in fog")
    (tmp_path / "bare").mkdir()  # and without captions, which nobody would read
    Image.new("RGB", (64, 64)).save(tmp_path / "bare/b.png")
    bare = '[[source]]\npath = "bare"\nclass = true\n'
    (tmp_path / "a.toml").write_text(f'[[source]]\npath = "own"\n{bare}' + source("class = true", 'words = "a <w>"'))
    config = textual_inversion.Config(images=tmp_path / "a.toml", output=tmp_path / "run", placeholder=("<w>",))
    found = textual_inversion.read_examples(config)
    captions, of_class = found.notes[-2:]
    assert [example.caption for example in found] == ["<w>"]
    assert (
        captions == "1 caption is left aside, such as 'a <W> in fog'; pass --caption \"{caption}\" to learn with them"
    )
    assert of_class.startswith("images of the class are left out (bare, pictures")
    (tmp_path / "own/a.txt").write_text("fog")
    found = textual_inversion.read_examples(replace(config, images=tmp_path / "own"))
    assert found.notes[-1].endswith("such as 'fog'; pass --caption \"{caption}, <w>\" to learn with them")
    (tmp_path / "own/a.txt").write_text("a <W> in fog")
    found = textual_inversion.read_examples(replace(config, images=tmp_path / "own", caption="{caption}"))
    assert ([example.caption for example in found], found.notes) == (["a <w> in fog"], ())


def test_a_trigger_whose_place_a_new_word_takes_is_not_told(train, pictures):
    """Nor drawn: what is shown of the training holds the word."""
    toml = f'caption = "{{caption}}, {{trigger}} square"\ntrigger = "sks"\n[[source]]\npath = "{pictures.as_posix()}"\n'
    words = ("--train-words", "<w>", "--stands-for", "sks square", "--steps", "1")
    path = train("run", toml, *words, quiet=("--measure-every", "0", "--checkpoint-every", "0"))
    assert json.loads(read_header(path).metadata["sfumato.trigger"]) == ["<w>"]
    card = (path.parent / "README.md").read_text()
    assert "a dog, <w>" in card
    assert "sks" not in card


@pytest.mark.slow
def test_a_class_that_came_or_went_is_another_training(train, source, capsys):
    """Also where prompts give the prior's weight an effect, and the rest is as it was."""
    first, both = source('words = "sks"'), source('words = "sks"') + source('words = "a"', "class = true")
    options = ("--steps", "1", "--prior-prompts", "a cat")
    quiet = (*QUIET[:4], "--checkpoint-every", "1")
    for name, before, after in (("came", first, both), ("went", both, first)):
        train(name, before, *options, quiet=quiet)
        capsys.readouterr()
        train(name, after, *options, "--resume", quiet=quiet, status=2)
        assert "was trained with other things than these: class " in capsys.readouterr().err


def test_pictures_of_a_class_are_given_in_one_place(train, source, pictures, capsys):
    both = source('words = "sks"') + source('words = "a"', "class = true")
    options = ("--method", "lora", "--class-name", "square", "--class-images", pictures)
    path = train("run", both, *options, program="dreambooth", status=2)
    assert "--class-images and the sources of" in capsys.readouterr().err
    assert not path.parent.exists()


def test_images_are_learned_at_each_resolution_of_their_source(train, source, monkeypatch):
    """Each call of the U-Net with images of one size, a step with those of both."""
    seen = []

    def noted(*args, **more):
        seen.append(draw_noised(*args, **more))
        return seen[-1]

    monkeypatch.setattr(objective, "draw_noised", noted)
    path = train("both", source('words = "square"', "resolution = [32, 64]"), "--epochs", "1", "--accumulate", "2")
    assert len(log_beside(path)) == 3  # twelve samples by two and two
    sides = [part.batch.target_sizes[:, 0].tolist() for part in seen]
    assert sorted(sides) == [[32, 32]] * 3 + [[64, 64]] * 3
    assert read_header(path).metadata["ss_resolution"] == "(64, 64)"
