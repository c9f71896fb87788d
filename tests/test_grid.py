"""XY plots: the cells in an order that says most early, each drawn once, each with its settings."""

import importlib.util
import json
import shutil
from functools import cache

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sfumato.pipelines.grid import Config, plan

from sfumato import cli
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.files.adapter_file import read_adapter, read_lora
from sfumato.files.header import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.files.writing.peft import write_peft
from sfumato.generation.arguments.axes import Axis, coarse_to_fine, parse_axis
from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.generation.metadata.redraw import redraw
from sfumato.generation.xy_grid import adapter_digest
from sfumato.models import folder as hub
from tests.bundles import add_words


def test_corners_come_first_and_every_cell_once():
    rounds = list(coarse_to_fine(5, 3))
    assert rounds[0] == [(0, 0), (4, 0), (0, 2), (4, 2)]
    cells = [cell for some in rounds for cell in some]
    assert sorted(cells) == [(column, row) for column in range(5) for row in range(3)]
    assert [len(some) for some in rounds] == [4, 5, 6]


def test_a_prompt_without_its_option_is_told_where_it_belongs():
    with pytest.raises(ConfigError, match=r"^'a crab': belongs to no option. A prompt is given by --prompt. "):
        parse(Config, ["a crab", "--x", "steps=2,3", "--y", "seed=1"], program="grid")


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (2, 2), (7, 1)])
def test_every_shape_is_covered_once(shape):
    cells = [cell for some in coarse_to_fine(*shape) for cell in some]
    assert len(cells) == len(set(cells)) == shape[0] * shape[1]


@pytest.mark.parametrize(
    ("text", "axis"),
    [
        ("prompt=a crab, red|an owl", Axis("prompt", ("a crab, red", "an owl"))),
        ("seed=1, 2", Axis("seed", (1, 2))),
        ("line=0,0.5", Axis("weight", (0.0, 0.5), "line")),
        ("guidance=3,7.5", Axis("guidance", (3.0, 7.5))),
        ("method=linear, np-lora", Axis("method", ("linear", "np-lora"))),
        ("density=0.2,1", Axis("density", (0.2, 1.0))),
    ],
)
def test_axes_are_read_as_written(text, axis):
    assert parse_axis(text, ["line"]) == axis


def test_a_file_with_brackets_in_its_name_is_a_file_on_an_axis(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "line [v2].safetensors").touch()
    assert parse_axis("adapter=line [v2].safetensors", []).values == ("line [v2].safetensors",)


def test_files_come_in_the_order_of_the_numbers_in_their_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = [f"{run}/dog-step{step}.safetensors" for run in ("a", "b2", "b10") for step in ("50", "0500", "1000")]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert parse_axis("adapter=*/*.safetensors", []).values == tuple(names)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "NAME=VALUES"),
        ("seed=", "NAME=VALUES"),
        ("seed=one", "takes numbers"),
        ("sed=1", "did you mean seed"),
        ("line=0,strong", "wanted weights"),
        ("line=99", "weight 99.0 is outside -10 to 10. Most adapters want 0.3 to 1; wanted weights such as"),
        ("sampler=eular", "euler"),
        ("adapter=nowhere/*.safetensors", "no file matches"),
        ("method=linear,tie", "no method 'tie'; known are linear, knots, core-space, np-lora, ties, dare"),
        ("density=0", "density 0: wanted the share"),
        (f"seed=1,{2**64}", "64 bits"),
        ("steps=0,4", "0 steps; wanted at least 1"),
        ("guidance=3,nan", "guidance nan: wanted 0 to 100"),
    ],
)
def test_an_axis_that_makes_no_sense_is_one_line(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_axis(text, ["line"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "prompts"),
    [
        ("a [red|blue] crab|an owl", ("a [red|blue] crab", "an owl")),
        ("[a|[b|c:0.5]]|(d|e:1.2)|f", ("[a|[b|c:0.5]]", "(d|e:1.2)", "f")),
        (r"\[a|b\]|c\|d", (r"\[a", r"b\]", r"c\|d")),
        ("a]|[b|c", ("a]", "[b|c")),
    ],
)
def test_brackets_of_a1111_keep_their_own_bars_together(text, prompts):
    assert parse_axis(f"prompt={text}", [], "a1111").values == prompts
    assert parse_axis(f"negative={text}", []).values == tuple(text.split("|"))


def test_without_a_second_axis_there_is_one_row():
    for options, values, labels in (
        ({"x": "steps=2,3", "seed": 7}, [(2, 7), (3, 7)], ["seed 7"]),
        ({"x": "seed=4,5", "steps": 2}, [(2, 4), (2, 5)], ["red"]),
    ):
        _, y, _, rows = plan(Config(prompt="red", **options))
        assert [[(cell.settings["steps"], cell.settings["seed"]) for cell in row] for row in rows] == [values]
        assert {cell.settings["prompt"] for cell in rows[0]} == {"red"}
        assert y.labels == labels
    with pytest.raises(ConfigError, match="there is no --y"):
        plan(Config(x="seed=4,5", prompt="a [red|blue] crab", prompt_syntax="a1111"))
    with pytest.raises(ConfigError, match="there is no prompt"):
        plan(Config(x="steps=2,3"))


@pytest.fixture
def grid(pocket_folder, tmp_path, monkeypatch):
    """grid(*words): the exit code, in a folder with line.safetensors and otter.safetensors."""
    monkeypatch.chdir(tmp_path)
    path = _first_of_width_64(pocket_folder)
    for seed, name in enumerate(("line", "otter")):
        generator = torch.Generator().manual_seed(seed)
        down, up = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
        module = LoraModule(down, up, 2.0)
        write_lora(tmp_path / f"{name}.safetensors", {("unet", path): module}, family="pocket")
    fixed = ["--base", str(pocket_folder), "--device", "cpu", "-o", "out"]

    def run(*words):
        steps = [] if any(word.startswith("steps=") for word in words) else ["--steps", "2"]
        return cli.main(["grid", *words, *fixed, *steps])

    return run


@cache
def _first_of_width_64(folder):
    """Read from the header, since a base takes long to load."""
    (file,) = (folder / "unet").glob("*.safetensors")
    for name, tensor in read_header(file).tensors.items():
        if name.endswith("attn1.to_q.weight") and tensor.shape == (64, 64):
            return name.removesuffix(".weight")
    raise AssertionError("the tiny base has no attention of width 64")


def test_a_grid_has_each_cell_with_its_settings_and_goes_on_where_it_stopped(grid, tmp_path, pocket_folder):
    words = ["--lora", "line.safetensors", "--x", "line=0,1", "--y", "prompt=red square|blue circle", "--seed", "3"]
    assert grid(*words) == 0
    about = json.loads((tmp_path / "out/grid.json").read_text())
    assert [(cell["prompt"], cell["weights"]["line"]) for cell in about["cells"]] == [
        ("red square", 0.0),
        ("blue circle", 0.0),
        ("red square", 1.0),
        ("blue circle", 1.0),
    ]
    files = [tmp_path / "out" / cell["file"] for cell in about["cells"]]
    own = read_picture_info(files[2]).own
    assert own["prompt"] == "red square"
    assert own["adapters"][0]["weight"] == 1.0
    before = {file: file.stat().st_mtime_ns for file in files}
    files[1].unlink()
    assert grid(*words[:3], "line=0,0.5,1", *words[4:]) == 0
    after = {file: file.stat().st_mtime_ns for file in files}
    assert [file for file in files if before[file] != after[file]] == [files[1]]
    assert len(list((tmp_path / "out/cells").iterdir())) == 6
    assert Image.open(tmp_path / "out/grid.png").width > 300
    sheet = redraw(tmp_path / "out/grid.png")
    axes = {"X axis": "line=0,0.5,1", "Y axis": "prompt=red square|blue circle"}
    assert sheet.parameters.prompt == "red square"
    assert axes.items() <= sheet.parameters.settings.items()
    assert sheet.words[:2] == ("sfumato", "grid")
    asked = parse(Config, sheet.words[2:], program="grid")
    assert (asked.x, asked.y, asked.lora) == (*axes.values(), ("line.safetensors",))
    assert (asked.seed, asked.steps, asked.base) == (3, 2, pocket_folder.name)


@pytest.mark.parametrize(
    ("name", "content"), [("grid.json", b'{"mine": 1}'), ("grid.json", b"mine"), ("grid.png", b"mine")]
)
def test_files_of_something_else_are_not_replaced(name, content, grid, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_bytes(content)
    assert grid("--x", "seed=1", "--y", "prompt=red") == 2
    assert "out holds a grid.png or grid.json of something else; name another folder" in capsys.readouterr().err
    assert [file.name for file in (tmp_path / "out").iterdir()] == [name]
    assert (tmp_path / "out" / name).read_bytes() == content


def test_cells_have_the_size_that_is_asked_for_and_lie_beside_those_of_another(grid, tmp_path):
    words = ["--x", "seed=1,2", "--y", "prompt=red"]
    assert grid(*words) == grid(*words, "--size", "48x32") == 0
    sizes = [Image.open(file).size for file in (tmp_path / "out/cells").iterdir()]
    assert (len(sizes), sizes.count((48, 32))) == (4, 2)
    own = redraw(tmp_path / "out/grid.png")
    assert parse(Config, own.words[2:], program="grid").size == "48x32"


def test_a_cell_whose_file_is_broken_is_drawn_again(grid, tmp_path):
    words = ["--x", "seed=1,2,3", "--y", "prompt=red"]
    assert grid(*words) == 0
    files = sorted((tmp_path / "out/cells").iterdir())
    before = [(_pixels(file), file.stat().st_mtime_ns) for file in files]
    files[0].write_bytes(b"nothing")
    files[1].write_bytes(files[1].read_bytes()[:-500])
    assert grid(*words) == 0
    for file, (pixels, _) in zip(files, before, strict=True):
        assert abs(_pixels(file) - pixels).max() <= 1  # another batch rounds otherwise
    assert files[2].stat().st_mtime_ns == before[2][1]


@pytest.mark.slow
def test_what_a_cell_depends_on_draws_another(grid, tmp_path):
    words = ["--x", "seed=1", "--y", "line=0.5", "--prompt", "red", "--lora"]
    write_peft(tmp_path / "folder", read_lora(tmp_path / "otter.safetensors").modules, family="pocket")
    for count, more in enumerate(
        (
            ["line.safetensors"],
            ["line.safetensors", "--clip-skip", "1"],
            ["line.safetensors", "--partial"],
            ["line.safetensors", "--method", "linear"],
            ["line.safetensors", "--method", "linear", "--rank", "1"],
            ["line=folder"],
        ),
        1,
    ):
        assert grid(*words, *more) == 0
        assert len(list((tmp_path / "out/cells").iterdir())) == count
    assert grid(*words, "line.safetensors", "--lora", "folder:0") == 0
    assert len(list((tmp_path / "out/cells").iterdir())) == count  # as if it were not there
    (tmp_path / "folder/adapter_model.safetensors").unlink()
    write_peft(tmp_path / "other", read_lora(tmp_path / "line.safetensors").modules, family="pocket")
    (tmp_path / "other/adapter_model.safetensors").rename(tmp_path / "folder/adapter_model.safetensors")
    assert grid(*words, "line=folder") == 0
    assert len(list((tmp_path / "out/cells").iterdir())) == count + 1


@pytest.mark.parametrize("method", [[], ["--method", "linear"]])
def test_of_an_adapter_that_fits_in_part_the_part_is_drawn_where_it_was_allowed(method, grid, tmp_path, pocket_folder):
    tensors = load_file(tmp_path / "line.safetensors")
    flat = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_9_attn2_to_k"  # which the base does not have
    odd = {f"{flat}.lora_down.weight": torch.ones(2, 32), f"{flat}.lora_up.weight": torch.ones(32, 2)}
    save_file({**tensors, **odd, f"{flat}.alpha": torch.tensor(2.0)}, tmp_path / "odd.safetensors")
    add_words(tmp_path / "odd.safetensors", {"<cat>": {"text_encoder": torch.ones(1, 8)}})  # of another width
    words = ["--x", "seed=1", "--y", "line=0.5", "--prompt", "red", *method, "--lora"]
    assert grid(*words, "line=odd.safetensors") == 2
    assert grid(*words, "line=odd.safetensors", "--partial") == 0
    assert grid(*words, "line.safetensors") == 0
    first, second = (tmp_path / "out/cells").iterdir()
    assert np.abs(_pixels(first) - _pixels(second)).max() <= 1


def test_a_cell_depends_on_what_its_words_are_called(grid, tmp_path, pocket_folder):
    width = json.loads((pocket_folder / "text_encoder/config.json").read_text())["hidden_size"]
    save_file({"emb_params": torch.ones(1, width)}, tmp_path / "cat.safetensors")
    for count, token in enumerate(("<x>", "<y>", "<x>"), 1):
        assert grid("--x", "seed=1", "--y", "prompt=red <x>", "--embedding", f"{token}=cat.safetensors") == 0
        assert len(list((tmp_path / "out/cells").iterdir())) == min(count, 2)


def test_a_negative_prompt_that_new_words_make_too_long_is_refused(grid, tmp_path, pocket_folder, capsys):
    width = json.loads((pocket_folder / "text_encoder/config.json").read_text())["hidden_size"]
    save_file({"emb_params": torch.ones(16, width)}, tmp_path / "cat.safetensors")
    words = ["--x", "seed=1", "--y", "prompt=red", "--embedding", "<x>=cat.safetensors", "--negative"]
    assert grid(*words, "<x> " * 4) == 0
    assert grid(*words, "<x> " * 5) == 2
    assert "<x>" in capsys.readouterr().err


def test_a_method_keeps_to_the_rank(grid, tmp_path):
    words = ["--x", "seed=1", "--y", "method=linear", "--prompt", "red"]
    assert grid(*BOTH, *words) == 0
    assert grid(*BOTH, *words, "--rank", "1") == 0
    first, second = (_pixels(file) for file in (tmp_path / "out/cells").iterdir())
    assert abs(first - second).max() > 0


def test_one_adapter_after_another(grid, tmp_path):
    axis = f"adapter={tmp_path}/line.safetensors,otter.safetensors"
    assert grid("--x", axis, "--y", "seed=1", "--prompt", "red square") == 0
    assert "--x=adapter=line.safetensors,otter.safetensors" in redraw(tmp_path / "out/grid.png").words
    about = json.loads((tmp_path / "out/grid.json").read_text())
    first, second = (np.asarray(Image.open(tmp_path / "out" / cell["file"]), dtype=int) for cell in about["cells"])
    assert abs(first - second).max() > 0


def test_a_grid_reads_prompts_as_generate_does(grid, tmp_path, pocket_folder):
    pytest.importorskip("compel")
    prompts = ["a (red:1.6) [square|circle]", "a [red:blue:1] square"]
    syntax = ["--prompt-syntax", "a1111"]
    assert grid("--x", f"prompt={'|'.join(prompts)}", "--y", "seed=3", *syntax) == 0
    drawing = ["--seed", "3", "--base", str(pocket_folder), "--steps", "2", "--device", "cpu"]
    assert cli.main(["generate", *prompts, *syntax, *drawing, "-o", "drawn"]) == 0
    files = [tmp_path / "out" / cell["file"] for cell in json.loads((tmp_path / "out/grid.json").read_text())["cells"]]
    drawn = sorted((tmp_path / "drawn").iterdir())
    for file, other, prompt in zip(files, drawn, prompts, strict=True):
        assert abs(_pixels(file) - _pixels(other)).max() <= 1
        own = read_picture_info(file).own
        assert (own["prompt"], own["prompt_syntax"]) == (prompt, "a1111")


def test_a_cell_has_the_negative_prompt_that_a_file_in_it_asks_for(grid, tmp_path):
    line, asks = tmp_path / "line.safetensors", {"sfumato.negatives": '["red"]'}
    save_file(load_file(line), tmp_path / "asks.safetensors", read_header(line).metadata | asks)
    words = ["--lora", "a=asks.safetensors", "--x", "a=0,1", "--y", "prompt=red square|red|blue"]
    assert grid(*words) == 0
    cells = json.loads((tmp_path / "out/grid.json").read_text())["cells"]
    found = {
        (cell["prompt"], cell["weights"]["a"]): read_picture_info(tmp_path / "out" / cell["file"]).own["negative"]
        for cell in cells
    }
    assert {key for key, negative in found.items() if negative} == {("red square", 1.0)}
    assert found["red square", 1.0] == "red"
    there = {file.name for file in (tmp_path / "out/cells").iterdir()}
    assert grid(*words, "--negative", "") == 0  # all others are there already
    assert len({file.name for file in (tmp_path / "out/cells").iterdir()} - there) == 1


def test_a_negative_prompt_that_a_file_asks_for_is_told_and_wants_guidance(grid, tmp_path, capsys):
    line, asks = tmp_path / "line.safetensors", {"sfumato.negatives": '["red"]'}
    save_file(load_file(line), tmp_path / "asks.safetensors", read_header(line).metadata | asks)
    words = ["--lora", "a=asks.safetensors", "--x", "guidance=1,4", "--y", "prompt=red square"]
    assert grid(*words) == 0
    assert capsys.readouterr().err.count("the negative prompt is 'red', as its file asks") == 1
    cells = json.loads((tmp_path / "out/grid.json").read_text())["cells"]
    assert {cell["guidance"]: cell["negative"] for cell in cells} == {1.0: "", 4.0: "red"}


def test_a_cell_tells_the_adapters_that_are_in_it(grid, tmp_path):
    words = ["--x", "adapter=line.safetensors,otter.safetensors", "--y", "prompt=red square"]
    assert grid(*words) == 0
    cells = json.loads((tmp_path / "out/grid.json").read_text())["cells"]
    told = [read_picture_info(tmp_path / "out" / cell["file"]).own["adapters"] for cell in cells]
    assert [[each["label"] for each in adapters] for adapters in told] == [["line"], ["otter"]]


def test_a_merged_cell_tells_how_each_of_its_adapters_counts(grid, tmp_path, pocket_folder):
    """Their sum is what the command draws, with the adapter guidance and the steps that all of their files ask for."""
    asks = {"sfumato.adapter_guidance": "3", "sfumato.over_steps": "0-0.5"}
    for name in ("line", "otter"):
        file = tmp_path / f"{name}.safetensors"
        save_file(load_file(file), tmp_path / f"{name}-asks.safetensors", read_header(file).metadata | asks)
    words = ["--lora", "line-asks.safetensors:0.8", "--lora", "otter-asks.safetensors", "--guidance", "4"]
    assert grid(*words, "--x", "method=linear,ties", "--y", "prompt=red square") == 0
    cells = json.loads((tmp_path / "out/grid.json").read_text())["cells"]
    linear, ties = (tmp_path / "out" / cell["file"] for cell in cells)
    own = read_picture_info(linear).own
    assert own["adapter_guidance"] == {"line-asks": 3.0, "otter-asks": 3.0}
    assert own["over_steps"] == {label: {"span": [0.0, 0.5]} for label in ("line-asks", "otter-asks")}
    command = list(redraw(linear).words[2:])
    command[command.index("--base") + 1] = str(pocket_folder)
    assert cli.main(["generate", *command, "-o", str(tmp_path / "again.png")]) == 0
    assert abs(_pixels(linear) - _pixels(tmp_path / "again.png")).max() <= 1
    assert {"Merge method", "density"} <= dict(redraw(ties).left_out).keys()


def test_cells_of_another_number_of_tokens_are_drawn_anew(grid, tmp_path):
    words = ["--x", "seed=1", "--y", f"prompt={'red ' * 90}"]
    assert grid(*words) == 0
    first = {file.name for file in (tmp_path / "out/cells").iterdir()}
    assert grid(*words, "--max-tokens", "150") == 0
    assert len({file.name for file in (tmp_path / "out/cells").iterdir()} - first) == 1


BOTH = ["--lora", "line.safetensors:0.8", "--lora", "otter.safetensors"]


@pytest.mark.slow
def test_methods_by_weights_are_what_merged_files_draw(grid, tmp_path, pocket_folder):
    words = [*BOTH, "--x", "otter=0.5,1", "--y", "method=linear,ties,np-lora", "--prompt", "red", "--seed", "3"]
    assert grid(*words, "--density", "0.3") == 0
    about = json.loads((tmp_path / "out/grid.json").read_text())
    assert about["y"] == ["linear", "ties", "np-lora"]
    cells = {(cell["method"], cell["weights"]["otter"]): cell for cell in about["cells"]}
    assert len(cells) == 6
    drawing = ["--base", str(pocket_folder), "--steps", "2", "--device", "cpu", "--seed", "3"]
    pictures = {}
    for method, options in (("linear", []), ("ties", ["--density", "0.3"]), ("np-lora", [])):
        merge = ["merge", *BOTH[1::2], "--method", method, *options, "--family", "pocket"]
        assert cli.main([*merge, "-o", f"{method}.safetensors"]) == 0
        assert cli.main(["generate", "red", "--lora", f"{method}.safetensors", *drawing, "-o", f"{method}.png"]) == 0
        pictures[method] = _pixels(tmp_path / f"{method}.png")
        cell = cells[method, 1.0]
        assert abs(_pixels(tmp_path / "out" / cell["file"]) - pictures[method]).max() <= 1
        assert cell.get("density") == (0.3 if method == "ties" else None)
    assert abs(pictures["linear"] - pictures["ties"]).max() > 1
    own = read_picture_info(tmp_path / "out" / cells["ties", 0.5]["file"])
    assert (own.own["method"], own.own["density"], own.own["adapters"][1]["weight"]) == ("ties", 0.3, 0.5)
    assert dict(own.parameters.settings)["Merge method"] == "ties"
    assert "<lora" not in own.parameters.prompt
    linear = read_picture_info(tmp_path / "out" / cells["linear", 0.5]["file"])
    assert linear.parameters.prompt == "red <lora:line:0.8> <lora:otter:0.5>"


def test_words_that_merged_adapters_bring_are_those_of_the_merged_file(grid, tmp_path, pocket_folder, capsys):
    width = json.loads((pocket_folder / "text_encoder/config.json").read_text())["hidden_size"]
    line = read_adapter(tmp_path / "line.safetensors")
    modules = {target: change.low_rank() for target, change in line.changes.items()}
    words = {"<new>": {"text_encoder": torch.full((2, width), 0.5)}}
    write_lora(tmp_path / "bundle.safetensors", modules, family="pocket", words=words)
    both = ["--lora", "bundle.safetensors:0.8", "--lora", "otter.safetensors"]
    assert grid(*both, "--x", "prompt=red|red <new>", "--y", "method=ties", "--seed", "3") == 0, capsys.readouterr().err
    about = json.loads((tmp_path / "out/grid.json").read_text())
    cells = {cell["prompt"]: _pixels(tmp_path / "out" / cell["file"]) for cell in about["cells"]}
    assert cli.main(["merge", *both[1::2], "--method", "ties", "--family", "pocket", "-o", "m.safetensors"]) == 0
    drawing = ["--base", str(pocket_folder), "--steps", "2", "--device", "cpu", "--seed", "3", "-o", "m.png"]
    assert cli.main(["generate", "red <new>", "--lora", "m.safetensors", *drawing]) == 0
    assert abs(cells["red <new>"] - _pixels(tmp_path / "m.png")).max() <= 1
    assert abs(cells["red <new>"] - cells["red"]).max() > 1
    assert grid(*both, "--x", "otter=0,1", "--y", "method=ties", "--prompt", "<new> " * 40) == 2
    assert "<new>" in capsys.readouterr().err


def test_a_grid_of_methods_goes_on_where_it_stopped(grid, tmp_path):
    words = ["--x", "otter=0,1", "--y", "method=linear,ties", "--prompt", "red"]
    assert grid(*BOTH, *words) == 0
    files = sorted((tmp_path / "out/cells").iterdir())
    before = {file: file.stat().st_mtime_ns for file in files}
    files[0].unlink()
    assert grid(*BOTH, *words[:3], "method=linear,dare,ties", *words[4:]) == 0
    changed = [file for file in files if file.stat().st_mtime_ns != before[file]]
    assert changed == files[:1]
    assert len(list((tmp_path / "out/cells").iterdir())) == 6
    about = json.loads((tmp_path / "out/grid.json").read_text())
    assert all(cell["drawn"] for cell in about["cells"])


def test_the_first_adapter_of_np_lora_is_the_style_and_another_order_another_picture(grid, tmp_path):
    words = ["--x", "seed=3", "--y", "method=np-lora", "--prompt", "red"]
    assert grid(*BOTH, *words) == 0
    assert grid(*BOTH[2:], *BOTH[:2], *words) == 0
    first, second = (_pixels(file) for file in (tmp_path / "out/cells").iterdir())
    assert abs(first - second).max() > 0


def test_all_weights_0_are_the_base_whatever_the_method(grid, tmp_path, pocket_folder):
    assert grid("--lora", "line.safetensors", "--x", "line=0,1", "--y", "method=ties", "--prompt", "red") == 0
    about = json.loads((tmp_path / "out/grid.json").read_text())
    plain = ["generate", "red", "--base", str(pocket_folder), "--steps", "2", "--device", "cpu", "-o", "plain.png"]
    assert cli.main(plain) == 0
    none, one = (_pixels(tmp_path / "out" / cell["file"]) for cell in about["cells"])
    assert np.array_equal(none, _pixels(tmp_path / "plain.png"))
    assert abs(one - none).max() > 1


def test_density_by_weight_of_one_method(grid, tmp_path):
    words = ["--x", "line=0.5,1", "--y", "density=0.2,1", "--method", "magnitude", "--prompt", "red"]
    assert grid(*BOTH, *words) == 0
    about = json.loads((tmp_path / "out/grid.json").read_text())
    thin, whole = (_pixels(tmp_path / "out" / cell["file"]) for cell in about["cells"] if cell["weights"]["line"] == 1)
    assert abs(thin - whole).max() > 1


@pytest.mark.parametrize(("y", "weight"), [("line.safetensors:0.5", 0.5), ("line.safetensors", 1.0)])
def test_a_file_on_both_axes_counts_twice(grid, y, weight):
    x = "adapter=line.safetensors:0.5,otter.safetensors"
    _, _, adapters, rows = plan(Config(x=x, y=f"adapter={y}", prompt="red"))
    assert [each.label for each in adapters] == ["line", "otter", "line 2"]
    assert [cell.weights for cell in rows[0]] == [
        {"line": 0.5, "otter": 0.0, "line 2": weight},
        {"line": 0.0, "otter": 1.0, "line 2": weight},
    ]


def test_files_of_one_name_are_labelled_with_the_folders_that_differ():
    """As diffusers' trainers call all of theirs."""
    files = [f"out/checkpoint-{step}/pytorch_lora_weights.safetensors" for step in (500, 1000)]
    names = ["checkpoint-500/pytorch_lora_weights", "checkpoint-1000/pytorch_lora_weights"]
    assert parse_axis(f"adapter={','.join(files)}", []).labels == names
    assert parse_axis(f"adapter={files[0]},{files[0]}", []).labels == ["pytorch_lora_weights"] * 2
    assert parse_axis("adapter=a/line.safetensors:0.5,b/line.safetensors:1", []).labels == ["line 0.5", "line 1"]


def test_files_of_an_axis_are_called_by_their_names(grid, tmp_path, capsys):
    (tmp_path / "other").mkdir()
    shutil.copy("line.safetensors", "other/line.safetensors")
    x = "adapter=line.safetensors:0.5,line.safetensors:1,other/line.safetensors"
    _, _, adapters, rows = plan(Config(lora=("line.safetensors:0.2",), x=x, y="seed=1", prompt="red"))
    assert [each.label for each in adapters] == ["line", "line 2", "line 3", "line 4"]
    assert [list(cell.weights.values()) for cell in rows[0]] == [
        [0.2, 0.5, 0.0, 0.0],
        [0.2, 0.0, 1.0, 0.0],
        [0.2, 0.0, 0.0, 1.0],
    ]
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    module = LoraModule(torch.ones(1, 768), torch.ones(320, 1), 1.0)
    write_lora("photo.safetensors", {("unet", path): module}, family="sd1")
    assert grid("--x", "adapter=photo.safetensors", "--y", "seed=1", "--prompt", "red") == 2
    assert "photo" in (said := capsys.readouterr().err)
    assert "x 0" not in said


def test_the_axis_s_weight_is_for_adapters_of_the_hub_too(grid, tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "hub_file", lambda name: tmp_path / "line.safetensors")
    _, _, _, rows = plan(Config(x="adapter=owner/ink", y="seed=1", prompt="red", adapter_weight=0.5))
    assert rows[0][0].weights == {"ink": 0.5}


def _pixels(path):
    return np.asarray(Image.open(path).convert("RGB"), dtype=int)


A1111 = ["--prompt-syntax", "a1111"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*BOTH, "--x", "seed=1", "--y", "steps=2,3", "--prompt", "a", "--steps", "4"], "--y varies steps, so that"),
        ([*BOTH, "--x", "method=ties,tise", "--y", "seed=2", "--prompt", "a"], "known are linear, knots"),
        ([*BOTH, "--x", "seed=1", "--y", "steps=2", "--prompt", "a", "--method", "x"], "no method 'x'"),
        ([*BOTH, "--x", "seed=1", "--y", "density=0.2", "--prompt", "a"], "--density is of a merging method"),
        ([*BOTH, "--x", "method=np-lora,linear", "--y", "density=0.2", "--prompt", "a"], "that thins out"),
        ([*BOTH, "--x", "seed=1", "--y", "steps=2", "--prompt", "a", "--rank", "4"], "--rank is of a merging method"),
        ([*BOTH, "--x", "seed=1", "--y", "method=ties", "--prompt", "a", "--rank", "0"], "--rank 0"),
        ([*BOTH, "--x", "seed=1", "--y", "method=ties", "--prompt", "a", "--density", "2"], "density 2"),
        ([*BOTH, "--x", "seed=1", "--y", "line=1", "--prompt", "a", "--guidance", "nan"], "guidance nan"),
        ([*BOTH, "--x", "seed=1", "--y", "line=1", "--prompt", "a", "--adapter-guidance", "nan"], "guidance nan"),
        ([*BOTH, "--x", "seed=1", "--y", "line=1", "--prompt", "a", "--adapter-weight", "nan"], "nan is outside"),
        (["--x", "seed=1", "--y", "steps=2", "--prompt", "a", "--adapter-weight", "0.5"], "no axis is adapter="),
        (["--x", "seed=1", "--y", "adapter_guidance=0,2", "--prompt", "a"], "no adapter that it could count for"),
        (["--x", "seed=1", "--y", "method=ties", "--prompt", "a"], "wants adapters to merge"),
        (["--x", "steps=2,1001", "--y", "seed=1", "--prompt", "a"], "1001 steps; wanted 1 to 1000"),
        (["--x", "seed=1", "--y", "seed=2", "--prompt", "a"], "both vary seed"),
        (["--x", "seed=1", "--y", "steps=2"], "no prompt"),
        (["--x", "adapter=nowhere.safetensors", "--y", "seed=1", "--prompt", "a"], "nowhere.safetensors"),
        (["--x", "seed=1", "--y", "steps=2", "--prompt", "a", "--size", "9000"], "9000x9000 pixels: wanted at most"),
        (["--x", "seed=1", "--y", "steps=2", "--prompt", "a", "--embedding", ""], "'' names no file; wanted FILE or"),
        (["--x", "seed=1", "--y", "steps=2", "--prompt", "a", "--size", "50"], "multiples of 8; the nearest is 48x48"),
        ([*A1111, "--x", "seed=1", "--y", "prompt=a|[b|c"], "'[b|c' does not close a bracket '['"),
        ([*A1111, "--x", "seed=1", "--y", "prompt=[a:b|c:0.5]"], "':' and '|' do not go together in one bracket"),
        ([*A1111, "--x", "seed=1", "--y", "prompt=a <lora:line:1>"], "<lora:line:...> is not read here"),
    ],
)
def test_wrong_use_is_one_line(grid, words, said, capsys, tmp_path):
    assert grid(*words) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert not (tmp_path / "out").exists()
    assert len([line for line in shown.splitlines() if line.startswith("sfumato: ")]) == 1


def test_a_sampler_that_the_base_has_not_is_refused_before_the_first_cell(grid, tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "scipy" else real(name, *more))
    assert grid("--x", "sampler=ddim,lms", "--y", "seed=1", "--prompt", "red square") == 2
    assert "--sampler lms: needs scipy" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--steps", "0"], "0 steps; wanted at least 1"),
        (["-o", __file__], "is a file, not a folder; name another place"),
    ],
)
def test_a_grid_that_cannot_be_is_refused_before_a_base_is_read(words, said, capsys):
    assert cli.main(["grid", "--x", "seed=1", "--y", "guidance=2", "--prompt", "a", "--base", "nowhere", *words]) == 2
    assert said in capsys.readouterr().err


def test_an_adapter_in_a_folder_is_another_with_another_config(tmp_path):
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    found = []
    for alpha in (8, 16):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"lora_alpha": alpha}))
        found.append(adapter_digest(tmp_path))
    assert found[0] != found[1] != adapter_digest(tmp_path / "adapter_model.safetensors")


def test_no_negative_prompt_is_a_value_too():
    assert parse_axis("negative=|blurry", []).values == ("", "blurry")
    assert parse_axis("prompt=|a crab", []).values == ("a crab",)
