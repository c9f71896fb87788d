"""XY plots: the cells in an order that says most early, each drawn once, each with its settings."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from sfumato import cli
from sfumato.axes import Axis, coarse_to_fine, parse_axis
from sfumato.errors import ConfigError
from sfumato.files.lora_file import LoraModule
from sfumato.files.write import write_lora
from sfumato.pnginfo import read_picture_info


def test_corners_come_first_and_every_cell_once():
    rounds = list(coarse_to_fine(5, 3))
    assert rounds[0] == [(0, 0), (4, 0), (0, 2), (4, 2)]
    cells = [cell for some in rounds for cell in some]
    assert sorted(cells) == [(column, row) for column in range(5) for row in range(3)]
    assert [len(some) for some in rounds] == [4, 5, 6]


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
    ],
)
def test_axes_are_read_as_written(text, axis):
    assert parse_axis(text, ["line"]) == axis


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed", "NAME=VALUES"),
        ("seed=", "NAME=VALUES"),
        ("seed=one", "takes numbers"),
        ("sed=1", "did you mean seed"),
        ("line=0,strong", "wanted weights"),
        ("line=99", "weight 99"),
        ("sampler=eular", "euler"),
        ("adapter=nowhere/*.safetensors", "no file matches"),
    ],
)
def test_an_axis_that_makes_no_sense_is_one_line(text, said):
    with pytest.raises(ConfigError, match=said) as caught:
        parse_axis(text, ["line"])
    assert "\n" not in str(caught.value)


@pytest.fixture
def grid(pocket_folder, tmp_path, monkeypatch):
    """grid(*words): the exit code, in a folder with line.safetensors and otter.safetensors."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("line", "otter")):
        generator = torch.Generator().manual_seed(seed)
        down, up = torch.randn(2, 64, generator=generator), torch.randn(64, 2, generator=generator)
        module = LoraModule(down, up, 2.0)
        path = _first_of_width_64(pocket_folder)
        write_lora(tmp_path / f"{name}.safetensors", {("unet", path): module}, family="pocket")
    fixed = ["--base", str(pocket_folder), "--steps", "2", "--device", "cpu", "-o", "out"]
    return lambda *words: cli.main(["grid", *words, *fixed])


def _first_of_width_64(folder):
    from sfumato.bases import load_base
    from sfumato.precision import decide

    unet = load_base(str(folder), precision=decide("fp32", device="cpu")).unet
    for name, module in unet.named_modules():
        if name.endswith("attn1.to_q") and module.weight.shape == (64, 64):
            return name
    raise AssertionError("the tiny base has no attention of width 64")


def test_a_grid_has_each_cell_with_its_settings_and_goes_on_where_it_stopped(grid, tmp_path):
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


def test_one_adapter_after_another(grid, tmp_path):
    assert grid("--x", "adapter=line.safetensors,otter.safetensors", "--y", "seed=1", "--prompt", "red square") == 0
    about = json.loads((tmp_path / "out/grid.json").read_text())
    first, second = (np.asarray(Image.open(tmp_path / "out" / cell["file"]), dtype=int) for cell in about["cells"])
    assert abs(first - second).max() > 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--x", "seed=1", "--y", "seed=2", "--prompt", "a"], "both vary seed"),
        (["--x", "seed=1", "--y", "steps=2"], "no prompt"),
        (["--x", "adapter=nowhere.safetensors", "--y", "seed=1", "--prompt", "a"], "nowhere.safetensors"),
    ],
)
def test_wrong_use_is_one_line(grid, words, said, capsys):
    assert grid(*words) == 2
    assert said in capsys.readouterr().err
