"""`generate` and `grid` read the same files in the same way: bundles, peft's folders, tags, weights, what to refuse."""

import json
from pathlib import Path
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from sfumato import Adapter, cli
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.embedding import write_embedding
from sfumato.files.writing.kohya import write_lora
from sfumato.files.writing.peft import write_peft
from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.models import load_base
from tests.tiny import CPU


@pytest.fixture(scope="module")
def modules(pocket_folder):
    """A strong change of every cross-attention of the tiny base."""
    base = load_base(str(pocket_folder), precision=CPU)
    generator = torch.Generator().manual_seed(0)
    found = {}
    for path, layer in base.unet.named_modules():
        if path.endswith(("attn2.to_v", "attn2.to_out.0")):
            out, inner = layer.weight.shape
            up = torch.randn(out, 2, generator=generator)
            found["unet", path] = LoraModule(torch.randn(2, inner, generator=generator), up, 2.0)
    return found


@pytest.fixture
def run(pocket_folder, modules, tmp_path, monkeypatch, capsys):
    """run(command, *words): (exit code, stderr), in a folder with line.safetensors and, with a word, fox.safetensors.

    Two steps, where the words say no other number.
    """
    monkeypatch.chdir(tmp_path)
    write_lora(Path("line.safetensors"), modules, family="pocket")
    write_fox("fox", modules, 0.5)

    def call(command: str, *words: str) -> tuple[int, str]:
        steps = [] if "--steps" in words else ["--steps", "2"]
        code = cli.main([command, *words, "--base", str(pocket_folder), "--device", "cpu", *steps])
        return code, capsys.readouterr().err

    return call


def fox(value):
    return {"text_encoder": (torch.arange(32.0) % 3 * value).repeat(2, 1)}


def write_fox(name, modules, value):
    write_lora(Path(f"{name}.safetensors"), modules, family="pocket", words={"<fox>": fox(value)})


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


def only_cell(folder):
    (cell,) = (Path(folder) / "cells").iterdir()
    return cell


@pytest.mark.slow
def test_a_word_in_an_adapters_file_is_known_everywhere(run):
    draw = ["a <fox>", "--seed", "0"]
    assert run("generate", *draw, "--lora", "fox.safetensors", "-o", "fox.png") == (0, ANY)
    assert run("generate", *draw, "--lora", "line.safetensors", "-o", "line.png") == (0, ANY)
    assert run("grid", "--lora", "fox.safetensors", "--x", "seed=0", "--y", "prompt=a <fox>", "-o", "g") == (0, ANY)
    assert np.array_equal(pixels(only_cell("g")), pixels("fox.png"))
    assert not np.array_equal(pixels("line.png"), pixels("fox.png"))  # the same change, but no word
    for name in ("fox", "line"):
        words = ["a cat", "--lora", f"{name}.safetensors", "--region", f"{name}=left:a <fox>", "-o", f"{name}-left.png"]
        assert run("generate", *words) == (0, ANY)
    assert not np.array_equal(pixels("fox-left.png"), pixels("line-left.png"))


def test_one_word_in_two_files_must_be_the_same(run, modules):
    write_fox("same", modules, 0.5)
    write_fox("other", modules, 0.25)
    assert run("generate", "a <fox>", "--lora", "fox.safetensors", "--lora", "same.safetensors", "-o", "a.png")[0] == 0
    code, said = run("generate", "a <fox>", "--lora", "fox.safetensors", "--lora", "other.safetensors", "-o", "b.png")
    assert (code, "fox and other bring different vectors for '<fox>'" in said) == (2, True)


def test_of_two_files_with_one_word_each_is_drawn_where_the_other_has_no_weight(run, modules):
    """As with checkpoints of one run, on an axis of a grid, too."""
    write_fox("other", modules, 0.25)
    both = ["--lora", "fox.safetensors", "--lora", "other.safetensors:0"]
    assert run("generate", "a <fox>", *both, "-o", "both.png") == (0, ANY)
    assert run("generate", "a <fox>", "--lora", "fox.safetensors", "-o", "fox.png") == (0, ANY)
    assert run("grid", "--x", "adapter=other.safetensors,fox.safetensors", "--y", "prompt=a <fox>", "-o", "g")[0] == 0
    files = [Path("g") / cell["file"] for cell in json.loads(Path("g/grid.json").read_text())["cells"]]
    assert np.array_equal(pixels("both.png"), pixels("fox.png"))
    assert np.array_equal(pixels(files[1]), pixels("fox.png"))
    assert not np.array_equal(pixels(files[0]), pixels(files[1]))
    for more in (["--sweep", "other=0,1"], ["--over-steps", "other=0:0,0.5:1"]):
        assert run("generate", "a <fox>", *both, *more, "-o", "clash.png")[0] == 2


@pytest.mark.parametrize(("word", "said"), [("two words", "without spaces"), ("cat", "is a word already")])
@pytest.mark.parametrize("command", [["generate", "a"], ["grid", "--x", "seed=1", "--y", "prompt=a"]])
def test_a_bundled_word_that_cannot_be_used_is_left_out_on_request(run, modules, command, word, said):
    rows = {"text_encoder": torch.full((1, 32), 0.5)}
    write_lora(Path("odd.safetensors"), modules, family="pocket", words={word: rows})
    words = [*command, "--lora", "odd.safetensors", "-o", "out"]
    code, refused = run(*words)
    assert (code, refused.count("odd: a word of its file cannot be used: "), said in refused) == (2, 1, True)
    code, lines = run(*words, "--partial")
    assert (code, lines.count("The word is left out (--partial).")) == (0, 1)


def test_a_grid_takes_a_word_of_its_own_file_as_generate_does(run):
    write_embedding(Path("word.safetensors"), "<new>", fox(0.5))
    axes = ["--x", "seed=0", "--y", "prompt=a <new>", "-o", "g"]
    for count, value in enumerate((0.5, 0.5, -1.0), 1):
        write_embedding(Path("word.safetensors"), "<new>", fox(value))
        code, said = run("grid", *axes, "--embedding", "word.safetensors")
        assert (code, "is in no prompt" in said) == (0, False)
        assert len(list(Path("g/cells").iterdir())) == (1, 1, 2)[count - 1]  # drawn anew where the file is another
    cell = max(Path("g/cells").iterdir(), key=lambda file: file.stat().st_mtime_ns)
    assert run("generate", "a <new>", "--embedding", "word.safetensors", "-o", "new.png") == (0, ANY)
    assert np.array_equal(pixels(cell), pixels("new.png"))
    assert read_picture_info(cell).own["embeddings"] == ["word.safetensors"]
    assert read_picture_info(cell).parameters.settings["TI hashes"].startswith("word: ")
    code, said = run("grid", "--x", "seed=0", "--y", f"prompt=a|{'<new> ' * 40}", "--embedding", "word.safetensors")
    assert (code, "80 tokens (<new> has 2)" in said) == (2, True)


def test_a_bundled_word_that_is_loaded_already_is_no_obstacle_where_it_is_the_same(run):
    write_embedding(Path("same.safetensors"), "<fox>", fox(0.5))
    write_embedding(Path("other.safetensors"), "<fox>", fox(1.0))
    draw = ["generate", "a <fox>", "--lora", "fox.safetensors", "-o", "out.png"]
    assert run(*draw, "--embedding", "same.safetensors") == (0, ANY)
    code, said = run(*draw, "--overwrite", "--embedding", "other.safetensors")
    assert (code, "fox: brings other vectors for <fox> than those in use" in said) == (2, True)


def test_a_word_in_a_prompt_of_any_length(run):
    pytest.importorskip("compel")
    words = ["a " * 90 + "<fox>", "--lora", "fox.safetensors"]
    assert run("generate", *words, "--prompt-syntax", "a1111", "-o", "long.png") == (0, ANY)
    code, said = run("generate", *words, "-o", "plain.png")
    assert (code, "92 tokens (<fox> has 2)" in said) == (2, True)


LONG = "<fox> " * 40
NEGATIVES = {
    "generate": ["generate", "a", "--negative", LONG],
    "a prompt's own": ["generate", f"a --n {LONG}"],
    "grid": ["grid", "--x", "seed=1", "--y", "prompt=a", "--negative", LONG],
    "an axis": ["grid", "--x", "seed=1", "--y", f"negative=blurry|{LONG}", "--prompt", "a"],
}


@pytest.mark.parametrize("command", NEGATIVES.values(), ids=NEGATIVES)
def test_a_negative_prompt_that_does_not_fit_is_refused(run, command):
    code, said = run(*command, "--lora", "fox.safetensors", "-o", "out")
    assert (code, "80 tokens (<fox> has 2)" in said) == (2, True)


def test_pefts_folders_are_drawn_with(run, modules):
    write_peft(Path("folder"), modules, family="pocket")
    write_peft(Path("below/line v1.5"), modules, family="pocket")
    assert run("generate", "a cat", "--lora", "folder:0.8", "-o", "folder.png") == (0, ANY)
    assert run("generate", "a cat", "--lora", "line.safetensors:0.8", "-o", "line.png") == (0, ANY)
    assert run("grid", "--lora", "folder:0.8", "--x", "seed=0", "--y", "prompt=a cat", "-o", "g") == (0, ANY)
    assert np.array_equal(pixels("folder.png"), pixels("line.png"))
    assert np.array_equal(pixels(only_cell("g")), pixels("line.png"))
    assert len(read_picture_info(Path("folder.png")).own["adapters"][0]["hash"]) == 12
    assert run("generate", "a cat <lora:line v1.5:0.8>", "--lora-folder", "below", "-o", "tag.png") == (0, ANY)
    assert np.array_equal(pixels("tag.png"), pixels("line.png"))
    assert Adapter("below/line v1.5").label == "line v1.5"


def test_a_cell_is_what_generate_draws_with_its_settings(run, modules):
    """Two cells that differ in the guidance alone, of an adapter that asks how it is drawn with."""
    asks = {"sfumato.adapter_guidance": "2", "sfumato.over_steps": "0-0.4"}  # the first of two steps
    write_lora(Path("style.safetensors"), modules, family="pocket", metadata=asks)
    words = ["--lora", "style.safetensors:0.6", "--negative", "red"]
    assert run("grid", *words, "--x", "guidance=1.5,4", "--y", "seed=3", "--prompt", "a cat", "-o", "g") == (0, ANY)
    files = [Path("g") / cell["file"] for cell in json.loads(Path("g/grid.json").read_text())["cells"]]
    for file, guidance in zip(files, ("1.5", "4"), strict=True):
        drawing = [*words, "--guidance", guidance, "--seed", "3", "-o", f"{guidance}.png"]
        assert run("generate", "a cat", *drawing) == (0, ANY)
        assert abs(pixels(file) - pixels(f"{guidance}.png")).max() <= 1
        own, other = (read_picture_info(each).own for each in (file, Path(f"{guidance}.png")))
        for name in ("guidance", "negative", "adapter_guidance", "over_steps"):
            assert own[name] == other[name]
    assert abs(pixels(files[0]) - pixels(files[1])).max() > 1


def test_a_grid_says_what_counts_for_nothing_without_guidance_as_generate_does(run):
    words = ["--x", "guidance=1,3", "--y", "adapter_guidance=0,2", "--lora", "line.safetensors", "--negative", "red"]
    code, err = run("grid", *words, "--prompt", "cat", "--steps", "1")
    nothing = "guidance 1: the negative prompt and --adapter-guidance count for nothing; it takes one above 1."
    assert (code, err.count(nothing)) == (0, 1), err


def test_two_files_of_one_name_keep_their_weights_in_a_grid(run, modules):
    Path("y").mkdir()
    write_lora(Path("y/line.safetensors"), modules, family="pocket")
    both = ["--lora", "line.safetensors:0.7", "--lora", "y/line.safetensors:0.2"]
    assert run("grid", *both, "--x", "method=linear", "--y", "prompt=a cat", "-o", "g") == (0, ANY)
    (cell,) = json.loads(Path("g/grid.json").read_text())["cells"]
    assert cell["weights"] == {"line": 0.7, "line 2": 0.2}


def test_a_weight_on_an_axis_of_adapters_is_that_adapters(run):
    words = ["--x", "adapter=line.safetensors:0.2,line.safetensors", "--y", "seed=0", "--prompt", "a cat"]
    assert run("grid", *words, "--adapter-weight", "0.9", "-o", "g") == (0, ANY)
    about = json.loads(Path("g/grid.json").read_text())
    assert about["x"] == ["line 0.2", "line"]
    assert [max(cell["weights"].values()) for cell in about["cells"]] == [0.2, 0.9]


def test_a_method_keeps_the_adapter_guidance_that_all_files_ask_for(run, modules):
    asks = {"sfumato.adapter_guidance": "2"}
    write_lora(Path("style.safetensors"), modules, family="pocket", metadata=asks)
    grid = ["--lora", "style.safetensors", "--x", "seed=0", "--y", "prompt=a cat"]
    assert run("grid", *grid, "-o", "plain") == (0, ANY)
    assert run("grid", *grid, "--method", "linear", "-o", "merged") == (0, ANY)
    assert run("grid", *grid, "--adapter-guidance", "0", "-o", "without") == (0, ANY)
    plain, merged, without = (pixels(only_cell(folder)) for folder in ("plain", "merged", "without"))
    assert abs(merged - plain).max() <= 1
    assert abs(plain - without).max() > 1


def test_a_grid_draws_with_an_adapter_in_the_steps_that_its_file_asks_for_as_generate_does(run, modules):
    asks = {"sfumato.over_steps": "0-0.4"}
    write_lora(Path("style.safetensors"), modules, family="pocket", metadata=asks)
    grid = ["--lora", "style.safetensors", "--x", "seed=0", "--y", "prompt=a cat"]
    assert run("grid", *grid, "-o", "g") == (0, ANY)
    assert run("generate", "a cat", "--lora", "style.safetensors", "-o", "said.png") == (0, ANY)
    all_steps = ["--over-steps", "style=0-1"]
    assert run("generate", "a cat", "--lora", "style.safetensors", *all_steps, "-o", "all.png") == (0, ANY)
    cell, said, everywhere = (pixels(file) for file in (only_cell("g"), Path("said.png"), Path("all.png")))
    assert abs(cell - said).max() <= 1
    assert abs(cell - everywhere).max() > 1
    assert read_picture_info(only_cell("g")).own["over_steps"] == read_picture_info(Path("said.png")).own["over_steps"]


@pytest.mark.slow
def test_a_cell_is_drawn_anew_where_anything_changed_that_it_depends_on(run, modules):
    grid = ["--lora", "style.safetensors", "--x", "seed=0", "--y", "prompt=a cat", "-o", "g"]
    for count, (strength, more) in enumerate(
        ((0, []), (2, []), (2, ["--precision", "bf16"]), (2, ["--clip-skip", "1"])), 1
    ):
        asks = {"sfumato.adapter_guidance": str(strength)}  # the tensors' hash is the same
        write_lora(Path("style.safetensors"), modules, family="pocket", metadata=asks)
        assert run("grid", *grid, *more) == (0, ANY)
        assert run("grid", *grid, *more) == (0, ANY)
        assert len(list(Path("g/cells").iterdir())) == count


@pytest.mark.parametrize(
    "command",
    [
        ["generate", "a"],
        ["generate", "a", "--region", "old=left"],
        ["grid", "--x", "seed=1", "--y", "prompt=a"],
        ["grid", "--x", "seed=1", "--y", "prompt=a", "--method", "ties"],
    ],
)
def test_an_adapter_of_another_release_of_pocket_is_told_of(run, modules, command):
    about = {"ss_sd_model_name": "pocket", "sfumato.base_fingerprint": "another"}
    write_lora(Path("old.safetensors"), modules, family="pocket", metadata=about)
    code, said = run(*command, "--lora", "old.safetensors", "--lora", "line.safetensors", "-o", "out")
    line = "old: learned on another release of pocket; on this one it draws something else. Train it anew."
    assert (code, said.count("another release"), line in said) == (0, 1, True)


@pytest.mark.parametrize("command", [["generate", "a"], ["grid", "--x", "seed=1", "--y", "prompt=a"]])
def test_an_adapter_that_was_learned_otherwise_is_told_of(run, modules, command):
    about = {"modelspec.prediction_type": "epsilon", "sfumato.config": '{"clip_skip": 1}'}
    write_lora(Path("other.safetensors"), modules, family="pocket", metadata=about)
    _, said = run(*command, "--lora", "other.safetensors", "-o", "out", "--prediction-type", "v_prediction")
    assert "other: learned where the base predicts epsilon, and this one predicts v_prediction; " in said
    assert "other: learned with --clip-skip 1, and drawn with 0." in said
    as_learned = ["--prediction-type", "epsilon", "--clip-skip", "1", "-o", "as-learned"]
    _, said = run(*command, "--lora", "other.safetensors", *as_learned)
    assert "learned" not in said.replace("as-learned", "")


@pytest.mark.slow
@pytest.mark.parametrize("command", [["generate", "a"], ["grid", "--x", "seed=1", "--y", "prompt=a"]])
def test_a_word_that_was_learned_beside_an_adapter_and_is_not_loaded_is_told_of(run, modules, command):
    about = {"sfumato.config": '{"train_words": ["<cat>"]}'}
    write_lora(Path("pivotal.safetensors"), modules, family="pocket", metadata=about)
    _, said = run(*command, "--lora", "pivotal.safetensors", "-o", "out")
    assert "pivotal: its word <cat> is not loaded; name its file with --embedding." in said
    named = about | {"sfumato.word_files": '{"<cat>": "p-cat.safetensors"}'}
    write_lora(Path("named.safetensors"), modules, family="pocket", metadata=named)
    _, said_named = run(*command, "--lora", "named.safetensors", "-o", "out-named")
    assert "its word <cat> is not loaded; name its file, p-cat.safetensors, with --embedding." in said_named
    Path("words").mkdir()
    write_embedding(Path("words/pivotal.safetensors"), "<cat>", fox(0.5), metadata=about)
    renamed = ["--embedding", "<dog>=words/pivotal.safetensors"]
    _, said = run(*command, "--lora", "pivotal.safetensors", *renamed, "-o", "renamed")
    assert said.count("is not loaded") == 1  # of the adapter, not of the word's own file


def test_a_word_s_file_of_an_adapter_s_name_does_not_hide_how_that_was_learned(run, modules):
    about = {"sfumato.config": '{"clip_skip": 1}'}
    write_lora(Path("fox.safetensors"), modules, family="pocket", metadata=about)
    Path("words").mkdir()
    write_embedding(Path("words/fox.safetensors"), "<new>", fox(0.5))
    both = ["--lora", "fox.safetensors", "--embedding", "words/fox.safetensors"]
    _, said = run("generate", "a <new>", *both, "-o", "out.png")
    assert "fox: learned with --clip-skip 1, and drawn with 0." in said


def test_a_merged_adapter_does_not_say_how_its_parents_were_learned(run, modules):
    about = {"sfumato.config": '{"adapters": ["a.safetensors"], "method": "linear"}'}
    write_lora(Path("merged.safetensors"), modules, family="pocket", metadata=about)
    _, said = run("generate", "a", "--lora", "merged.safetensors", "-o", "out.png", "--clip-skip", "1")
    assert "learned with" not in said


TAGS = {
    "a region's prompt": ("generate", ["a", "--lora", "line.safetensors", "--region", "line=left:b <lora:fox:1>"]),
    "the negative prompt": ("generate", ["a", "--negative", "b <lora:fox:1>"]),
    "an axis": ("grid", ["--x", "seed=1", "--y", "prompt=a <lora:fox:1>|b"]),
    "a grid's prompt": ("grid", ["--x", "seed=1", "--y", "steps=2", "--prompt", "a <lora:fox:1>"]),
}


@pytest.mark.parametrize(("command", "words"), TAGS.values(), ids=TAGS.keys())
def test_a_tag_where_none_is_read_is_refused(run, command, words):
    code, said = run(command, *words, "-o", "out")
    assert (code, "<lora:fox:...> is not read here" in said) == (2, True)
    assert not Path("out").exists()


def test_verify_looks_at_the_adapters_of_regions(run):
    words = ["a cat", "--lora", "bad.safetensors", "--region", "bad=left", "-o", "out.png"]
    save_file({name: tensor * 3 for name, tensor in load_file("line.safetensors").items()}, "bad.safetensors")
    code, said = run("generate", *words, "--verify")
    assert (code, "fingerprint" in said) == (2, True)
    assert not Path("out.png").exists()
    assert run("generate", *words) == (0, ANY)


@pytest.mark.parametrize("command", [["generate", "a"], ["grid", "--x", "seed=1", "--y", "prompt=a"]])
def test_more_steps_than_the_base_has_timesteps_are_refused(run, command):
    code, said = run(*command, "-o", "out", "--steps", "1001")
    assert (code, "1001 steps; wanted 1 to 1000" in said) == (2, True)


def test_a_folder_that_cannot_be_written_is_found_before_anything_is_drawn(run, monkeypatch):
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write everywhere
    code, said = run("generate", "a cat", "-o", "new/out.png")
    assert (code, "nothing can be written to" in said) == (2, True)
