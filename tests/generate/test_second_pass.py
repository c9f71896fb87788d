"""`sfumato generate --hires`: the size, what the file says of it, and what does not go with it."""

from pathlib import Path

import pytest
from PIL import Image

from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.generation.metadata.redraw import redraw
from sfumato.generation.pipeline_call import PipelineCall


def test_the_file_tells_of_the_second_pass_and_its_command_draws_it_again(generate):
    code, _, err = generate("a", "--hires", "1.5", "--hires-strength", "0.5", "-o", "a.png")
    assert code == 0, err
    assert "64x64, then 96x96 in 2 steps of strength 0.5" in err
    assert Image.open("a.png").size == (96, 96)
    info = read_picture_info(Path("a.png"))
    assert info.own["hires"] == {"scale": 1.5, "strength": 0.5, "steps": 2}
    told = {name: value for name, value in info.parameters.settings.items() if "ires" in name or name == "Size"}
    assert told == {"Size": "64x64", "Hires upscale": "1.5", "Hires steps": "2", "Hires upscaler": "Lanczos"}
    assert info.parameters.settings["Denoising strength"] == "0.5"
    found = redraw(Path("a.png"))
    assert not found.left_out
    place = found.words.index("--steps")  # which the fixture gives, too
    assert generate(*found.words[2:place], *found.words[place + 2 :], "-o", "b.png")[0] == 0
    assert Image.open("a.png").tobytes() == Image.open("b.png").tobytes()


def test_a_sheet_has_the_enlarged_images(generate):
    words = ["a", "--lora", "line.safetensors", "--sweep", "line=0,1"]
    assert generate(*words, "-o", "small.png")[0] == 0
    assert generate(*words, "--hires", "4", "-o", "large.png")[0] == 0
    small, large = (Image.open(name) for name in ("small.png", "large.png"))
    assert large.height - small.height >= 2 * (256 - 128)  # two rows, of images that a sheet does not enlarge
    assert read_picture_info(Path("large.png")).own["hires"]["scale"] == 4


def test_a_sheet_that_its_kind_of_file_cannot_hold_enlarged_is_refused_before_it_is_drawn(generate, monkeypatch):
    monkeypatch.setattr(PipelineCall, "draw", lambda *_: pytest.fail("drawn"))
    weights = ",".join(f"{place / 40:g}" for place in range(40))
    words = ["a", "--lora", "line.safetensors", "--sweep", f"line={weights}", "--hires", "8", "-o", "a.webp"]
    code, _, err = generate(*words)
    assert code == 2
    assert "a .webp has at most 16,383" in err
    assert not Path("a.webp").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--hires-steps", "4"], "--hires-steps: there is no second pass; give --hires 2, too."),
        (["--hires-strength", "0.4"], "--hires-strength: there is no second pass"),
        (["--hires", "2", "--image", "start.png"], "--hires and --image do not go together"),
        (["--hires", "0.5"], "sfumato: --hires 0.5: wanted above 1 and at most 8"),
        (["--hires", "2", "--hires-strength", "0"], "sfumato: --hires-strength 0.0: wanted above 0 and at most 1"),
        (["--hires", "2", "--hires-steps", "0"], "sfumato: --hires-steps 0: wanted a whole number, at least 1"),
        (["--hires", "8", "--size", "8192"], "65536"),
        (["--hires", "2", "--hires-strength", "0.001"], "steps; wanted 1 to"),
    ],
)
def test_what_does_not_go_is_refused(generate, words, message):
    Image.new("RGB", (64, 64)).save("start.png")
    code, _, err = generate("a", *words, "-o", "a.png")
    assert code == 2
    assert message in err
    assert "then" not in err  # what is to be drawn is not announced
    assert not Path("a.png").exists()
