"""Sheets of `sfumato generate`: weights by prompts, and pairs without and with the adapters."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sfumato.generation.metadata.png_info import read_picture_info
from tests.generate.shared import TWO, pixels


def test_a_sweep_is_a_sheet_of_weights_by_prompts(generate, base):
    weights = ["line=0,0.5,1.5", "line=0,0.5"]
    for words, name in zip(weights, ("three.png", "two.png"), strict=True):
        code, out, _ = generate("a cat", "red", "--lora", "line.safetensors", "--sweep", words, "-o", name)
        assert (code, out) == (0, f"{name}\n")
    three, two = Image.open("three.png"), Image.open("two.png")
    row = three.height - two.height  # a row more, and nothing else
    assert three.width == two.width
    assert row >= 128
    assert (
        three.crop((0, 0, three.width, two.height - row)).tobytes()
        == two.crop((0, 0, two.width, two.height - row)).tobytes()
    )
    info = read_picture_info(Path("three.png"))
    assert info.own["sweep"] == {"line": [0.0, 0.5, 1.5]}
    assert info.parameters.prompt == "a cat <lora:line:0.5>"  # the first row that has it


@pytest.mark.parametrize(
    ("words", "weight"),
    [
        (["line.safetensors:0.8", "--blocks", "line=down:0"], {"weight": 0.5, "blocks": {"down": 0.0}, "rest": 1.0}),
        (["line.safetensors:1:0.5"], [0.5, 0.25]),
        (["line.safetensors:0.4:0"], [0.5, 0.0]),
    ],
)
def test_a_sweep_keeps_factors_by_block_and_the_proportion_of_two_weights(generate, words, weight):
    code, _, err = generate("red", "--lora", *words, "--sweep", "line=0,0.5", "-o", "sheet.png")
    assert code == 0, err
    assert read_picture_info(Path("sheet.png")).own["adapters"][0]["weight"] == weight


def cell(sheet: str, column: int, row: int, columns: int, rows: int) -> np.ndarray:
    """The picture of a sheet, halved to the 64 px it was drawn in; the last cells end 10 px before the sheet's end."""
    image = Image.open(sheet).convert("RGB")
    left = image.width - (columns - column) * 138
    top = image.height - (rows - row) * 138
    return np.asarray(image.crop((left, top, left + 128, top + 128)).resize((64, 64), Image.Resampling.BOX), dtype=int)


def close(one: np.ndarray, other: np.ndarray) -> bool:
    """Of one picture, but for the sheet's enlarging."""
    return float(np.abs(one - other).mean()) < 4


@pytest.mark.slow
def test_pairs_show_each_picture_without_and_with_the_adapters(generate):
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save("start.png")
    many, one = ["a cat", "red", "--seed", "7", "--seed", "8"], ["a cat", "--seed", "7"]
    start = ["--image", "start.png", "--strength", "0.9"]
    for rows, count, extra, kind in ((many, 4, [], "plain"), (one, 1, start, "from an image")):
        assert generate(*rows, *extra, "-o", f"{kind} without")[0] == 0
        assert generate(*rows, *extra, *TWO, "-o", f"{kind} with")[0] == 0
        code, out, _ = generate(*rows, *extra, *TWO, "--before-after", "-o", f"{kind}.png")
        assert (code, out) == (0, f"{kind}.png\n")
        for column, folder in enumerate((f"{kind} without", f"{kind} with")):
            for row, file in enumerate(sorted(Path(folder).iterdir())):
                assert close(cell(f"{kind}.png", column, row, 2, count), pixels(str(file))), (kind, column, row)
        assert not close(cell(f"{kind}.png", 0, 0, 2, count), cell(f"{kind}.png", 1, 0, 2, count))
    own = read_picture_info(Path("plain.png")).own
    assert own["before_after"] is True
    assert (own["prompts"][2], own["seeds"][3]) == ("red", 8)


@pytest.mark.slow
def test_pairs_leave_out_tags_regions_and_steps_on_the_side_without(generate):
    generate("a cat", "-o", "plain.png")
    generate("a cat <lora:line:0.9>", "-o", "tagged.png")
    assert generate("a cat <lora:line:0.9>", "--before-after", "-o", "tags.png")[0] == 0
    assert close(cell("tags.png", 0, 0, 2, 1), pixels("plain.png"))
    assert close(cell("tags.png", 1, 0, 2, 1), pixels("tagged.png"))
    assert read_picture_info(Path("tags.png")).parameters.prompt == "a cat <lora:line:0.9>"
    assert generate("a cat <lora:line:0.9>", "a cat", "--before-after", "-o", "two.png")[0] == 0
    assert read_picture_info(Path("two.png")).parameters.prompt == "a cat <lora:line:0.9>"  # of the first
    words = ["a cat", *TWO, "--region", "otter=left", "--over-steps", "line=0-0.4"]
    assert generate(*words, "-o", "both.png")[0] == 0
    assert generate(*words, "--before-after", "-o", "pair.png")[0] == 0
    assert close(cell("pair.png", 0, 0, 2, 1), pixels("plain.png"))
    assert close(cell("pair.png", 1, 0, 2, 1), pixels("both.png"))
    assert not close(pixels("both.png"), pixels("plain.png"))
