"""What the README promises is what runs: its commands, its example, the main job and the commands that it prints."""

import re
import shlex
from pathlib import Path

import pytest

from sfumato import cli

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, heading: str) -> list[str]:
    """The code blocks of a language under a heading."""
    section = re.search(rf"^## {heading}\n(.*?)(?=^## |\Z)", README, re.MULTILINE | re.DOTALL)
    assert section, heading
    return re.findall(rf"```{language}\n(.*?)```", section[1], re.DOTALL)


@pytest.fixture
def clone(tmp_path, monkeypatch, pocket_folder) -> Path:
    """A folder that looks like a clone, with a tiny base for pocket."""
    for name in ("datasets", "trainers"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    return tmp_path


def run(line: str, *more: str) -> None:
    """more: options that cut it short."""
    program, *words = shlex.split(line)
    assert program == "sfumato"
    assert cli.main([*words, *more]) == 0, line


def test_the_two_commands_are_one_line_each():
    for heading in ("Start", "Run the tests"):
        (block,) = blocks("sh", heading)
        assert block.count("\n") == 1


@pytest.mark.slow
def test_the_main_job_and_the_commands_it_prints(clone, quick, capsys):
    from PIL import Image
    from sfumato.pipelines.quickstart import PROMPTS, ROWS, free

    run("sfumato quickstart --steps 2 --seed 3")
    shown = capsys.readouterr().out
    sheet = Image.open("runs/quickstart/sheet.png")
    assert sheet.width > len(PROMPTS) * 128
    assert sheet.height > len(ROWS) * 128
    commands = [line.strip() for line in shown.splitlines() if line.startswith("  sfumato ")]
    assert len(commands) >= 3
    for command in commands[-3:]:  # those before are what each of its two parts says
        run(command)
    assert Path("flamingo.png").is_file()
    assert Path("sweep.png").is_file()
    assert free(Path("runs/quickstart")) == Path("runs/quickstart-2")


def test_the_main_job_outside_a_clone_says_what_it_wants(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["quickstart"]) == 2
    assert "datasets" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "no images in it"),
        (("--steps", "0"), "it must be at least 1"),
        (("--base", "/nowhere"), "/nowhere: there is no such folder or file"),
    ],
)
def test_the_main_job_begins_nothing_that_one_of_its_trainings_would_refuse(words, said, tmp_path, capsys):
    from PIL import Image

    for name in ("style", "subject"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (64, 64), "red").save(tmp_path / name / "a red thing.png")
        (tmp_path / name / "a red thing.txt").write_text("sks flamingo")
    if not words:
        (tmp_path / "subject" / "a red thing.png").unlink()
    folders = ["--style", str(tmp_path / "style"), "--subject", str(tmp_path / "subject")]
    assert cli.main(["quickstart", *folders, "--output", str(tmp_path / "run"), *words]) == 2
    shown = capsys.readouterr()
    assert said in shown.err
    assert (shown.out, len(shown.err.splitlines())) == ("", 1)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("heading", ["Use", "Trainers"])
def test_the_commands_of_a_section(heading, clone, quick):
    """In two steps; all of a recipe's are in the main job, which CI runs as it is written."""
    shorter = {"teach": ["--steps", "2", "--no-sheet", "--no-measure"], "train": ["--steps", "2"]}
    (block,) = blocks("sh", heading)
    for line in block.splitlines():
        run(line, *shorter.get(line.split()[1], []), *(["--class-count", "2"] if " dreambooth " in line else []))
    wanted = {
        "Use": ("runs/line-style/line-style.safetensors", "flamingo.png", "grid/grid.png"),
        "Trainers": ("runs/booth/booth.safetensors", "runs/word/word.safetensors"),
    }
    assert all(Path(path).is_file() for path in wanted[heading])


def test_it_is_read_in_five_minutes():
    assert len(README.splitlines()) <= 120


@pytest.mark.slow
def test_the_example_in_python(tmp_path, monkeypatch):
    import diffusers

    from sfumato.adapters import attach, select
    from sfumato.files import LoraModule, write_lora
    from tests.tiny import tiny_pipeline

    pipe = tiny_pipeline("sd1", shallow=True)
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("line", "otter")):
        lora = attach({"unet": select(pipe.unet, "cross-attention")}, rank=2, alpha=2.0, seed=seed)
        modules = {key: LoraModule.from_scale(x.down, x.up + 0.1, x.scale) for key, x in lora.layers.items()}
        lora.detach()
        write_lora(tmp_path / f"{name}.safetensors", modules, family="sd1")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda name: pipe)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    (block,) = blocks("python", "Use")
    exec(block, {})
    assert all((tensor == before[name]).all() for name, tensor in pipe.unet.state_dict().items())
