"""Every page of docs/ opens with a command, its commands and its Python run, and its links lead somewhere."""

import importlib
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import sfumato
from sfumato import cli
from sfumato.adapters import attach, select
from sfumato.config import parse
from sfumato.files import LoraModule, write_lora
from tests.tiny import tiny_pipeline, tiny_pocket_folder, write_folder

ROOT = Path(__file__).parents[1]
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text("utf-8") for file in sorted((ROOT / "docs").glob("*.md"))}
PAGES["datasets/README.md"] = (ROOT / "datasets/README.md").read_text("utf-8")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INDENTED = re.compile(r"(?:(?<=\n\n) {4}(?=\S).*\n(?: {4}.*\n)*)")


def lines(block):
    return block.replace("\\\n", " ").splitlines()


def commands_of(text):
    """The lines of a page's sh blocks, which run as they are written; but for tests, which run by themselves."""
    found = [line for language, block in BLOCK.findall(text) if language == "sh" for line in lines(block)]
    return [line for line in found if not line.startswith("python -m pytest tests/")]


def told_of(text):
    """Commands of sfumato in a page's other blocks: they want a GPU, a hub or files of the reader's own."""
    blocks = [block for language, block in BLOCK.findall(text) if not language]
    blocks += [re.sub(r"^ {4}", "", block, flags=re.MULTILINE) for block in INDENTED.findall(BLOCK.sub("", text))]
    told = [line for block in blocks for line in lines(block)]
    return [line for line in told if re.match(r"sfumato (?!COMMAND)", line)]


EXAMPLES = {
    name: [code for language, code in BLOCK.findall(text) if language == "python"] for name, text in PAGES.items()
}
RUN = [name for name, text in PAGES.items() if commands_of(text)]


@pytest.mark.parametrize("name", PAGES)
def test_a_page_has_at_most_200_lines_and_opens_with_a_command(name):
    text = PAGES[name]
    assert len(text.splitlines()) <= 200
    assert text.startswith("# ")
    opening = "\n".join(text.splitlines()[:8]) + "\n"
    first = re.search(r"^(?:```\w*\n| {4})(\S.*)$", opening, re.MULTILINE)
    assert first, opening
    assert first[1].startswith(("sfumato ", "python -m bench.", "python -m pytest tests/", "from ", "import "))


def test_the_tests_that_pages_name_are_there():
    named = {file for text in PAGES.values() for file in re.findall(r"python -m pytest (tests/\S+)", text)}
    assert all((ROOT / file).exists() for file in named)


def test_python_within_a_line_names_what_the_package_shows():
    """`sfumato.models` is no name before something imports it."""
    texts = [*PAGES.values(), (ROOT / "README.md").read_text(encoding="utf-8")]
    spans = [span for text in texts for span in re.findall(r"`([^`\n]+\([^`\n]*)`", text)]
    named = {name for span in spans for name in re.findall(r"(?<!from )\bsfumato\.(\w+)", span)}
    assert {"draw", "compose"} <= named <= set(sfumato.__all__)


@pytest.mark.parametrize("command", sorted({line for text in PAGES.values() for line in told_of(text)}))
def test_a_command_that_is_told_and_not_run_has_the_options_that_it_names(command):
    _, *words = shlex.split(command.partition(" #")[0])
    words = [word for word in words if word != "..."]
    if words[0] == "train":
        name = f"train {words[1]}"
        module, words = f"sfumato.trainers.{words[1]}", words[2:]
    else:
        name, module, words = words[0], cli.PIPELINES[words[0]][0], words[1:]
    assert parse(importlib.import_module(module).Config, words, program=name, first_may_be_config=name != "recipe")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The pages as a site; a link or an anchor that leads nowhere, and a page that the index lacks, stop it."""
    folder = tmp_path_factory.mktemp("site")
    asked = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    quiet = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        asked, cwd=ROOT, env=quiet, capture_output=True, text=True, encoding="utf-8", errors="replace"
    )
    assert built.returncode == 0, built.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_every_page_and_takes_nothing_from_other_servers(site):
    for name in PAGES:
        html = site / Path(name.removeprefix("docs/")).with_suffix(".html").as_posix().replace("README", "index")
        page = html.read_text(encoding="utf-8")
        assert not re.search(
            r"<(?:script|img|iframe)[^>]* src=[\"']?https?://|<link[^>]*stylesheet[^>]*https?://", page
        )
    assert (site / "search/search_index.json").is_file()


@pytest.mark.slow
def test_a_link_to_code_leads_to_a_copy_of_it(site):
    page = (site / "pocket.html").read_text(encoding="utf-8")
    (linked,) = set(re.findall(r'href="?(code/bench/pocket_quality\.py\.txt)', page))
    assert (site / linked).read_bytes() == (ROOT / "bench/pocket_quality.py").read_bytes()


def test_the_links_of_the_readme_lead_to_files_and_headings():
    found = re.findall(r"\]\(([^)\s]+)\)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) > 20
    for link in found:
        path, _, anchor = link.partition("#")
        assert (ROOT / path).exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}, link


def write_adapters(folder, network, family, targets):
    """line.safetensors and otter.safetensors, which change what is drawn."""
    for seed, name in enumerate(("line", "otter")):
        lora = attach({"unet": select(network, targets)}, rank=2, alpha=2.0, seed=seed)
        modules = {key: LoraModule.from_scale(x.down, x.up + 0.1, x.scale) for key, x in lora.layers.items()}
        lora.detach()
        write_lora(folder / f"{name}.safetensors", modules, family=family)


@pytest.fixture
def here(tmp_path, monkeypatch, pocket_folder, quick):
    """A folder that looks like a clone, with what pages take for granted, and a small pocket."""
    from sfumato.models import load_base
    from sfumato.precision import decide

    for name in ("datasets", "trainers", "pipelines"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    unet = load_base("pocket", precision=decide("fp32", device="cpu")).unet
    write_adapters(tmp_path, unet, "pocket", "cross-attention")
    for seed, name in enumerate(("painter", "photographer"), 1):
        tiny_pocket_folder(tmp_path / name, seed)
    for name in ("park", "place"):
        Image.new("RGB", (64, 64), "white").save(tmp_path / f"{name}.png")
    take_photographs(tmp_path / "photos")
    return tmp_path


def take_photographs(folder):
    """As a phone leaves them: turned by their EXIF data, of several shapes, beside a film."""
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    for number, size in enumerate(((400, 300), (300, 400), (320, 320))):
        Image.effect_noise(size, 60).convert("RGB").save(folder / f"IMG_{number}.JPG", exif=turned)
    (folder / "IMG_0.MOV").write_bytes(b"film")


def sort_by_hand(drawn):
    """Move the images of a folder into `good` and `bad`, as the words beside the command ask."""
    for place, file in enumerate(sorted(drawn.glob("*.png"))):
        folder = Path("bad" if place % 2 else "good")
        folder.mkdir(exist_ok=True)
        file.rename(folder / file.name)


TRAIN_SHORTLY = ["--steps", "1", "--sample-every", "0", "--measure-every", "0", "--device", "cpu"]
BY_TRAINER = {"dreambooth": ["--class-count", "2"], "slider": ["--drawn", "2"], "lcm": ["--drawn", "2"]}


def shorter(words):
    """Options that cut a command short."""
    if words[0] == "train":
        several = 4 if "--dry-run" in words else 1
        return ["--steps", str(several), *TRAIN_SHORTLY[2:], *BY_TRAINER.get(words[1], [])]
    if words[0] in ("generate", "grid"):
        return ["--steps", "6" if "--switch" in words else "2", "--device", "cpu"]  # so that each adapter has its turn
    taught, family = ["--steps", "2", "--no-sheet", "--no-measure"], ["--family", "pocket"]
    return {"teach": taught, "quickstart": taught[:2], "merge": family, "convert": family}.get(words[0], [])


def made_by(words):
    """The file or folder that a command names for what it makes."""
    named = [words[place + 1] for place, word in enumerate(words) if word in ("-o", "--output", "--sheet")]
    return [Path(name) for name in named if "--dry-run" not in words]


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_the_commands_of_a_page_run_one_after_another(name, here, capsys):
    for command in commands_of(PAGES[name]):
        program, *words = shlex.split(command, comments=True)
        assert program == "sfumato", command
        assert cli.main([*words, *shorter(words)]) == 0, (command, capsys.readouterr().err)
        assert all(path.exists() for path in made_by(words)), command
        if words[0] == "generate" and "--count" in words:
            sort_by_hand(*made_by(words))


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline("sd1", shallow=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, blocks in EXAMPLES.items() if blocks and name != "docs/python.md"])
def test_the_python_of_a_page_runs_as_it_is_written(name, pipe, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_adapters(tmp_path, pipe.unet, "sd1", "everything")
    save_file({"<otter>": torch.zeros(1, 32)}, tmp_path / "my-otter.safetensors")
    pipe.set_progress_bar_config(disable=True)
    call = type(pipe).__call__
    monkeypatch.setattr(type(pipe), "__call__", lambda self, *a, **o: call(self, *a, **{"num_inference_steps": 2, **o}))
    before = {key: tensor.clone() for key, tensor in pipe.unet.state_dict().items()}
    names = {"pipe": pipe, "BASE": str(write_folder(pipe, tmp_path / "base"))}
    exec("from sfumato.compose import Adapter, compose", names)  # which the first of these pages imports
    for example in EXAMPLES[name]:
        code = example.replace('"pipelines/custom/', f'"{ROOT}/pipelines/custom/')
        exec(compile(code, name, "exec"), names)
    assert all((tensor == before[key]).all() for key, tensor in pipe.unet.state_dict().items())
    assert (tmp_path / "mix.safetensors").is_file() == (name == "docs/mixing.md")


def test_the_python_of_all_pages_is_looked_at():
    assert {name: len(blocks) for name, blocks in EXAMPLES.items() if blocks} == {
        "docs/blocks-steps-regions.md": 4,
        "docs/drawing.md": 1,
        "docs/merging.md": 1,
        "docs/mixing.md": 2,
        "docs/python.md": 2,
        "docs/words.md": 1,
    }


@pytest.mark.slow
def test_training_in_python_runs_as_it_is_written(pocket_folder, tmp_path, monkeypatch, quick):
    from sfumato.trainers import lora

    example, _ = EXAMPLES["docs/python.md"]
    (tmp_path / "datasets").symlink_to(ROOT / "datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SFUMATO_POCKET", str(pocket_folder))
    train, trained = lora.train, []

    def train_shortly(config):
        trained.append(replace(config, steps=1, sample_every=0, measure_every=0, device="cpu"))
        return train(trained[-1])

    monkeypatch.setattr(lora, "train", train_shortly)
    names = {}
    exec(compile(example, "docs/python.md", "exec"), names)
    assert [(config.seed, config.targets, config.output) for config in trained] == [
        (seed, "everything", Path(f"runs/python-{seed}")) for seed in (0, 1)
    ]
    assert [image.size for image in names["images"]] == [(64, 64)] * 2


def test_python_md_mixes_as_the_readme_does():
    """Which tests/test_readme.py runs."""
    (block,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert EXAMPLES["docs/python.md"][1] == block


def test_the_defaults_that_methods_md_lists_are_those_of_the_code():
    from sfumato.trainers import dpo, dreambooth, finetune, lcm, slider, textual_inversion

    from sfumato.adapters.embeddings.tokens import DEFAULT_LEARNING_RATES
    from sfumato.models import FAMILIES

    section = PAGES["docs/methods.md"].split("## Defaults\n")[1].split("\n## ")[0]
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
