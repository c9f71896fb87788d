"""Every example of docs/ runs: Python on a small pipeline of SD 1.x, commands on a small pocket."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import sfumato
from sfumato import cli
from sfumato.adapters import attach, select
from sfumato.files import LoraModule, write_lora
from tests.tiny import tiny_pipeline, tiny_pocket_folder, write_folder

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs/mixing.md").read_text(encoding="utf-8")
COMMANDS = [
    line
    for block in re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
METHODS = (ROOT / "docs/methods.md").read_text(encoding="utf-8")
RECIPES = [
    line
    for block in re.findall(r"```sh\n(.*?)```", METHODS, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
]
DATA = (ROOT / "datasets/README.md").read_text(encoding="utf-8")
OF_PHOTOGRAPHS = [line for block in re.findall(r"```sh\n(.*?)```", DATA, re.DOTALL) for line in block.splitlines()]
EXAMPLES = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_python_within_a_line_names_what_the_package_shows():
    """`sfumato.models` is no name before something imports it."""
    files = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    spans = [span for file in files for span in re.findall(r"`([^`\n]+\([^`\n]*)`", file.read_text(encoding="utf-8"))]
    named = {name for span in spans for name in re.findall(r"(?<!from )\bsfumato\.(\w+)", span)}
    assert {"draw", "compose"} <= named <= set(sfumato.__all__)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1", shallow=True)


@pytest.mark.slow
def test_the_examples_run_one_after_another(pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("line", "otter")):
        lora = attach({"unet": select(pipe.unet, "everything")}, rank=2, alpha=2.0, seed=seed)
        modules = {key: LoraModule.from_scale(x.down, x.up + 0.1, x.scale) for key, x in lora.layers.items()}
        lora.detach()
        write_lora(tmp_path / f"{name}.safetensors", modules, family="sd1")
    pipe.set_progress_bar_config(disable=True)
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *a, **o: call(self, *a, **{"num_inference_steps": 2, **o}))
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    names = {"pipe": pipe, "BASE": str(write_folder(pipe, tmp_path / "base"))}
    assert len(EXAMPLES) == 8
    for example in EXAMPLES:
        code = example.replace('"pipelines/custom/', f'"{ROOT}/pipelines/custom/')
        exec(compile(code, "docs/mixing.md", "exec"), names)
    assert all((tensor == before[name]).all() for name, tensor in pipe.unet.state_dict().items())
    assert (tmp_path / "mix.safetensors").is_file()


@pytest.mark.slow
def test_the_commands_run_one_after_another(pocket_folder, tmp_path, monkeypatch):
    from sfumato.models import load_base
    from sfumato.precision import decide

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    unet = load_base("pocket", precision=decide("fp32", device="cpu")).unet
    for seed, name in enumerate(("line", "otter")):
        lora = attach({"unet": select(unet, "cross-attention")}, rank=2, alpha=2.0, seed=seed)
        modules = {key: LoraModule.from_scale(x.down, x.up + 0.1, x.scale) for key, x in lora.layers.items()}
        lora.detach()
        write_lora(tmp_path / f"{name}.safetensors", modules, family="pocket")
    for seed, name in enumerate(("painter", "photographer"), 1):
        tiny_pocket_folder(tmp_path / name, seed)
    for name in ("park", "place"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    assert len(COMMANDS) == 20
    more = {"merge": ["--family", "pocket"], "extract": []}
    for command in COMMANDS:
        program, *words = shlex.split(command)
        assert program == "sfumato"
        steps = "6" if "--switch" in words else "2"  # so that each adapter has its turn
        assert cli.main([*words, *more.get(words[0], ["--steps", steps, "--device", "cpu"])]) == 0, command
    made = (
        "guided.png",
        "blocks.png",
        "ramp.png",
        "late.png",
        "turns.png",
        "regions.png",
        "mix.safetensors",
        "pairs.png",
        "large.png",
        "closer.png",
        "filled.png",
        "share.png",
        "difference.safetensors",
    )
    assert all((tmp_path / name).is_file() for name in (*made, "grid/grid.png", "methods/grid.png", "shares/grid.png"))
    assert all((tmp_path / name / "model_index.json").is_file() for name in ("mixed", "elected", "gained"))


@pytest.mark.slow
def test_training_in_python_runs_as_it_is_written(pocket_folder, tmp_path, monkeypatch, quick):
    from sfumato.trainers import lora

    (example,) = re.findall(r"```python\n(.*?)```", METHODS, re.DOTALL)
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    train, trained = lora.train, []

    def train_shortly(config):
        trained.append(replace(config, steps=1, sample_every=0, measure_every=0, device="cpu"))
        return train(trained[-1])

    monkeypatch.setattr(lora, "train", train_shortly)
    names = {}
    exec(compile(example, "docs/methods.md", "exec"), names)
    assert [(config.seed, config.targets, config.output) for config in trained] == [
        (seed, "everything", Path(f"runs/python-{seed}")) for seed in (0, 1)
    ]
    assert [image.size for image in names["images"]] == [(64, 64)] * 2


def sort_by_hand(drawn, good, bad):
    """Move the images of a folder into two, as the words beside the recipe ask."""
    for place, file in enumerate(sorted(drawn.glob("*.png"))):
        folder = bad if place % 2 else good
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)


@pytest.mark.slow
def test_the_recipes_run_as_they_are_written(pocket_folder, tmp_path, monkeypatch, quick):
    for name in ("datasets", "trainers"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    assert len(RECIPES) == 15
    for command in RECIPES:
        program, *words = shlex.split(command)
        assert program == "sfumato"
        if words[0] == "generate":  # with what the command before it learned, or images for the one after it
            assert cli.main(words) == 0, command
            drawn = tmp_path / words[words.index("-o") + 1]
            if "--count" in words:
                sort_by_hand(drawn, tmp_path / "good", tmp_path / "bad")
            else:
                assert drawn.is_file()
            continue
        quick = ["--steps", "1", "--sample-every", "0", "--measure-every", "0", "--device", "cpu"]
        quick += {"dreambooth": ["--class-count", "2"], "slider": ["--drawn", "2"], "lcm": ["--drawn", "2"]}.get(
            words[1], []
        )
        assert cli.main([*words, *quick]) == 0, command
        assert (tmp_path / words[words.index("--output") + 1] / "README.md").is_file()


@pytest.mark.slow
def test_photographs_of_a_phone_become_a_picture(pocket_folder, tmp_path, monkeypatch, capsys, quick):
    (tmp_path / "trainers").symlink_to(ROOT / "trainers")
    (tmp_path / "photos").mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, size in enumerate(((400, 300), (300, 400), (320, 320))):
        picture = Image.effect_noise(size, 60).convert("RGB")
        picture.save(tmp_path / f"photos/IMG_{number}.JPG", exif=turned)
    (tmp_path / "photos/IMG_0.MOV").write_bytes(b"film")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    quick = {"train": ["--steps", "1", "--sample-every", "0", "--measure-every", "0", "--class-count", "2"]}
    assert len(OF_PHOTOGRAPHS) == 3
    for command in OF_PHOTOGRAPHS:
        _, *words = shlex.split(command)
        assert cli.main([*words, *quick.get(words[0], [])]) == 0, capsys.readouterr().err
    assert (tmp_path / "crops.png").is_file()
    assert (tmp_path / "dog.png").is_file()


def test_the_defaults_that_methods_md_lists_are_those_of_the_code():
    from sfumato.trainers import dpo, dreambooth, finetune, lcm, slider, textual_inversion

    from sfumato.adapters.embeddings.tokens import DEFAULT_LEARNING_RATES
    from sfumato.models import FAMILIES

    section = METHODS.split("### Defaults\n")[1].split("###")[0]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines()]
    rows = {row: cells for row, *cells in table}
    for column, name in enumerate(("sd1", "sdxl", "pocket")):
        family = FAMILIES[name].defaults

        def shown(values, family=family):
            filled = {"steps": family.steps, "batch": family.batch, "learning_rate": family.learning_rate, **values}
            rate = re.sub(r"e-0?", "e-", f"{filled['learning_rate']:.0e}")
            return f"{filled['steps']:,} x {filled['batch']}, {rate}"

        booth = {method: dreambooth.DEFAULTS[method, name] for method in ("lora", "full")}
        of_words = {"learning_rate": DEFAULT_LEARNING_RATES[name], **textual_inversion.DEFAULTS[name]}
        wanted = {
            "`--resolution`": f"{family.resolution}",
            "`lora`: steps x batch, rate, rank": f"{shown({})}, {family.rank}",
            "`dreambooth --method lora`; images of the class": f"{shown(booth['lora'])}, {family.rank}; "
            f"{booth['lora']['class_count']}",
            "`dreambooth --method full`; the same": f"{shown(booth['full'])}; {booth['full']['class_count']}",
            "`finetune`": shown(finetune.DEFAULTS[name]),
            "`textual_inversion`": shown(of_words),
            "`slider`; images that the base draws": f"{shown(slider.DEFAULTS[name])}, {family.rank}; "
            f"{slider.DEFAULTS[name]['drawn']}",
            "`lcm`; the same": f"{shown(lcm.DEFAULTS[name])}, {lcm.DEFAULTS[name].get('rank', family.rank)}; "
            f"{lcm.DEFAULTS[name]['drawn']}",
            "`dpo`; beta": f"{shown(dpo.DEFAULTS[name])}, {family.rank}; {dpo.DEFAULTS[name]['beta']:,.0f}",
            "`generate`: steps, guidance, sampler": f"{family.sampling_steps}, {family.guidance:g}, {family.sampler}",
        }
        for row, value in wanted.items():
            told = rows[row][column - 1 if rows[row][column] == "the same" else column]
            assert told.split(", or")[0] == value, (row, name)
