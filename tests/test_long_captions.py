"""Captions and prompts past the text encoder's 75 tokens: learned, checked and drawn with --max-tokens."""

import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato.data.preparation.cache import Cache
from sfumato.data.preparation.texts import CaptionEmbeddings
from sfumato.files import read_header, read_tensors
from sfumato.models import load_base
from tests.tiny import CPU

pytestmark = pytest.mark.usefixtures("quick")
FRONT = "sks square " + "red " * 80
CAPTIONS = (FRONT, FRONT + "on blue paper", "sks square", FRONT * 2)


def captioned(pictures, folder, captions=CAPTIONS):
    """A copy of some pictures with these captions."""
    folder.mkdir()
    for number, (picture, caption) in enumerate(zip(sorted(Path(pictures).glob("*.png")), captions, strict=False)):
        shutil.copy(picture, folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


@pytest.fixture
def train(pocket_folder, tmp_path):
    """Train on a folder with these options; returns what was learned as bytes by name."""

    def run(trainer, images, name, *options):
        words = ["--images", str(images), "--base", str(pocket_folder), "--output", str(tmp_path / name)]
        words += ["--steps", "2", "--batch", "2", "--sample-every", "0", "--measure-every", "0"]
        assert cli.main(["train", trainer, *words, "--checkpoint-every", "0", *options]) == 0
        return read_tensors(tmp_path / name / f"{name}.safetensors")

    return run


OF_LORA = ("--learning-rate", "1e-2", "--rank", "2")


def differs(first, second):
    return any(not torch.equal(first[name], second[name]) for name in first)


def of_lora(end):
    return FRONT + end, OF_LORA


def of_dreambooth(end):
    method = ("--method", "lora", "--prior", "none", "--class-name", "square", "--instance-prompt", FRONT + end)
    return "", (*method, *OF_LORA)


def of_textual_inversion(end):
    return FRONT + end, ("--placeholder", "<x>", "--stands-for", "sks square", "--learning-rate", "1e-2")


@pytest.mark.slow
@pytest.mark.parametrize("of_trainer", [of_lora, of_dreambooth, of_textual_inversion])
def test_what_stands_past_75_tokens_is_learned_where_it_is_asked_for(of_trainer, train, pictures, tmp_path, capsys):
    trainer = of_trainer.__name__.removeprefix("of_")

    def learned(end, *options):
        caption, words = of_trainer(end)
        name = f"{end}-{len(options)}"
        folder = captioned(pictures, tmp_path / f"images-{name}", [caption] * 3)
        return train(trainer, folder, name, *words, *options)

    assert differs(learned("cat", "--max-tokens", "150"), learned("dog", "--max-tokens", "150"))
    assert "is not seen" not in capsys.readouterr().err
    if trainer != "textual_inversion":  # which refuses a caption that it cannot read whole
        assert not differs(learned("cat"), learned("dog"))
        assert "; --max-tokens 225 reads up to 225" in capsys.readouterr().err


@pytest.mark.slow
def test_a_batch_mixes_lengths_and_two_runs_are_equal(train, pictures, tmp_path):
    folder = captioned(pictures, tmp_path / "images")
    options = (*OF_LORA, "--max-tokens", "225", "--caption-dropout", "0.3", "--prior-prompts", "a circle")
    first = train("lora", folder, "first", *options)
    again = train("lora", folder, "again", *options)
    assert not differs(first, again)
    embedded_late = train("lora", folder, "late", *options, "--train-text-encoder", "--text-learning-rate", "1e-30")
    same = [name for name in first if name in embedded_late]
    assert same
    for name in same:
        torch.testing.assert_close(first[name], embedded_late[name], atol=1e-5, rtol=1e-4)


def test_the_adapters_file_and_card_say_what_was_read(train, pictures, tmp_path):
    folder = captioned(pictures, tmp_path / "images")
    train("lora", folder, "told", *OF_LORA, "--max-tokens", "225")
    metadata = read_header(tmp_path / "told" / "told.safetensors").metadata
    assert json.loads(metadata["sfumato.config"])["max_tokens"] == 225
    card = (tmp_path / "told" / "README.md").read_text()
    assert "| max_tokens | 225 |" in card
    assert "--max-tokens 225" in card


def embeddings(pocket_folder, tokens, cache=None):
    base = load_base(pocket_folder, precision=CPU, max_tokens=tokens)
    return CaptionEmbeddings(base, None if cache is None else Cache(cache))


def test_embeddings_are_kept_at_their_own_length(pocket_folder, tmp_path):
    for cache in (None, tmp_path / "cache"):
        texts = embeddings(pocket_folder, 225, cache)
        texts.compute(["a cat", FRONT, FRONT * 2])
        assert [texts[[prompt]].hidden.shape[1] for prompt in ("a cat", FRONT, FRONT * 2)] == [77, 154, 231]
        assert texts[["a cat", FRONT]].hidden.shape[1] == 154


def test_what_is_cached_for_75_tokens_is_not_read_for_150(pocket_folder, tmp_path):
    short = embeddings(pocket_folder, None, tmp_path / "cache")
    short.compute([FRONT])
    long = embeddings(pocket_folder, 150, tmp_path / "cache")
    long.compute([FRONT])
    assert short[[FRONT]].hidden.shape[1] == 77
    assert long[[FRONT]].hidden.shape[1] == 154


def test_memory_is_counted_by_chunks(pocket_folder, monkeypatch):
    texts = embeddings(pocket_folder, 225)
    monkeypatch.setattr("sfumato.data.preparation.texts.MAX_BYTES", 3 * texts._chunk_bytes)
    assert texts.fits(["a cat", FRONT])
    assert not texts.fits(["a cat", FRONT * 2])


def test_check_reads_as_many(pocket_folder, pictures, tmp_path, capsys):
    folder = captioned(pictures, tmp_path / "images", [FRONT] * 2)
    assert cli.main(["check", str(folder), "--base", str(pocket_folder)]) == 0
    assert "longer than 75 tokens; its end is not seen" in capsys.readouterr().out
    assert cli.main(["check", str(folder), "--base", str(pocket_folder), "--max-tokens", "150"]) == 0
    assert "is not seen" not in capsys.readouterr().out


@pytest.mark.slow
def test_an_image_draws_the_whole_prompt_and_tells_how(pocket_folder, tmp_path, capsys):
    def pixels(name, *words):
        file = tmp_path / f"{name}.png"
        given = ["--base", str(pocket_folder), "--steps", "2", "--seed", "3", "-o", str(file)]
        assert cli.main(["generate", *words, *given]) == 0
        return Image.open(file).tobytes()

    cat, dog = (pixels(name, FRONT + name, "--max-tokens", "150") for name in ("cat", "dog"))
    assert cat != dog
    assert pixels("cut", FRONT + "cat") == pixels("cut-too", FRONT + "dog")
    negative = pixels("negative", "a cat", "--negative", FRONT + "dog", "--max-tokens", "150")
    assert negative != pixels("other", "a cat", "--negative", FRONT + "cat", "--max-tokens", "150")
    capsys.readouterr()
    assert cli.main(["inspect", str(tmp_path / "cat.png")]) == 0
    command = next(line for line in capsys.readouterr().out.splitlines() if "sfumato generate" in line)
    words = shlex.split(command)[2:]
    words[words.index("--base") + 1] = str(pocket_folder)
    assert cli.main(["generate", *words, "-o", str(tmp_path / "again.png")]) == 0
    assert Image.open(tmp_path / "again.png").tobytes() == cat


def test_images_of_several_lengths_are_each_drawn_as_alone(pocket_folder):
    from sfumato.generation.draw import draw

    base = load_base(pocket_folder, precision=CPU, max_tokens=225)
    prompts = ["a cat", FRONT + "cat", FRONT * 2 + "dog"]
    together = draw(base, prompts, [1, 2, 3], steps=2)
    for picture, prompt, seed in zip(together, prompts, (1, 2, 3), strict=True):
        (alone,) = draw(base, [prompt], [seed], steps=2)
        assert np.abs(np.int16(picture) - np.int16(alone)).max() <= 1


def test_a_word_is_refused_where_its_caption_is_longer_than_is_read(pocket_folder, pictures, tmp_path, capsys):
    folder = captioned(pictures, tmp_path / "images", [FRONT * 2])
    words = ["--images", str(folder), "--base", str(pocket_folder), "--output", str(tmp_path / "run")]
    words += ["--placeholder", "<x>", "--stands-for", "sks square", "--max-tokens", "75", "--steps", "1"]
    assert cli.main(["train", "textual_inversion", *words]) == 2
    assert "75 are read" in capsys.readouterr().err


def test_other_tools_name_is_understood(pocket_folder, pictures, tmp_path, capsys):
    words = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--max_token_length", "225"]
    assert cli.main(["train", "lora", *words]) == 2
    assert "Here it is --max-tokens." in capsys.readouterr().err
