"""Adapters, new words and whole models by the name that they have on the hub."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from sfumato.pipelines import generate, grid, merge

from sfumato.adapters import attach, select
from sfumato.cli import guarded
from sfumato.compose import Adapter
from sfumato.errors import BaseModelError, SfumatoError
from sfumato.files import LoraModule, write_lora
from sfumato.files.header import read_header
from sfumato.generation.arguments.adapters import is_hub_id, parse_adapter, parse_embedding, public_embedding
from sfumato.generation.arguments.axes import parse_axis
from sfumato.generation.metadata.png_info import read_picture_info
from sfumato.generation.settings import save_with_settings
from sfumato.merging.sources import adapter_hash
from sfumato.models import folder as hub
from sfumato.models.folder import LORA, WORD
from tests.tiny import hub_with, tiny_pocket_folder


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "line.safetensors"
    save_file({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.ones(1)}, path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


def test_a_repository_of_one_file_is_named_by_itself(cached, file):
    snapshot = cached("owner/line", (file, "line-v2.safetensors"), (file, "README.md"))
    adapter = parse_adapter("owner/line:0.8")
    assert (adapter.path, adapter.label, adapter.weight) == (str(snapshot / "line-v2.safetensors"), "line", 0.8)
    adapter = parse_adapter("pen=owner/line:0.8:0.4")
    assert (adapter.label, adapter.weight) == ("pen", (0.8, 0.4))


def test_of_several_files_the_usual_one_is_meant_or_the_one_that_is_named(cached, file):
    snapshot = cached("owner/line", (file, LORA), (file, WORD), (file, "steps/line 2.safetensors"))
    assert parse_adapter("owner/line").path == str(snapshot / LORA)
    assert parse_embedding("owner/line") == (None, snapshot / WORD)
    assert parse_embedding("<pen>=owner/line") == ("<pen>", snapshot / WORD)
    named = parse_adapter("owner/line/steps/line 2.safetensors:0.5")
    assert (named.path, named.label, named.weight) == (str(snapshot / "steps/line 2.safetensors"), "line 2", 0.5)
    assert [public_embedding(spec) for spec in ("owner/line", "<pen>=owner/line")] == ["owner/line", "<pen>=owner/line"]


def test_a_file_from_home_on_needs_no_shell(file, monkeypatch):
    monkeypatch.setenv("HOME", str(file.parent))
    adapter = parse_adapter("pen=~/line.safetensors:0.8")
    assert (adapter.path, adapter.label, adapter.weight) == (str(file), "pen", 0.8)
    assert parse_embedding("<pen>=~/line.safetensors") == ("<pen>", file)
    assert parse_axis("adapter=~/line.safetensors", []).values == (str(file),)


def test_several_files_of_which_none_is_the_usual_one_are_listed(monkeypatch):
    answer(monkeypatch, ["a.safetensors", "b.safetensors", "README.md"])
    with pytest.raises(BaseModelError, match=r"holds 2 files; name one of them, as owner/line/a\.safetensors\. There"):
        parse_adapter("owner/line")


def test_a_file_in_the_cache_is_not_taken_for_the_only_one_that_there_is(cached, file, monkeypatch):
    snapshot = cached("owner/line", (file, "a.safetensors"))
    assert parse_adapter("owner/line").path == str(snapshot / "a.safetensors")  # the hub is not to be asked here
    monkeypatch.setattr(hub, "HfApi", lambda: hub_with("a.safetensors", "b.safetensors"))
    with pytest.raises(BaseModelError, match="holds 2 files; name one of them"):
        parse_adapter("owner/line")


def test_a_word_is_fetched_without_the_model_beside_it(monkeypatch, tmp_path, file):
    model = ["model_index.json", "unet/diffusion_pytorch_model.safetensors"]
    asked = answer(monkeypatch, [*model, WORD])
    file.rename(tmp_path / WORD)
    monkeypatch.setattr(hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or tmp_path)
    (tmp_path / "model_index.json").write_text("{}")
    assert parse_embedding("owner/otter") == (None, tmp_path / WORD)
    assert asked == [[WORD]]
    answer(monkeypatch, model)
    with pytest.raises(BaseModelError, match=r"owner/otter: is a whole model without learned_embeds\.safetensors"):
        parse_embedding("owner/otter")


def test_a_word_of_two_encoders_is_fetched_whole(monkeypatch, tmp_path, file):
    second = "learned_embeds_2.safetensors"
    asked = answer(monkeypatch, ["a.safetensors", second, WORD])
    file.rename(tmp_path / WORD)
    (tmp_path / second).write_bytes((tmp_path / WORD).read_bytes())
    monkeypatch.setattr(hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or tmp_path)
    assert parse_embedding("owner/otter") == (None, tmp_path / WORD)
    assert asked == [[WORD, second]]


def test_a_model_in_the_cache_is_no_word(cached, tmp_path):
    folder = tiny_pocket_folder(tmp_path / "model")
    snapshot = cached(
        "owner/otter", *((file, file.relative_to(folder)) for file in folder.rglob("*") if file.is_file())
    )
    assert hub.hub_file("owner/otter") == snapshot
    with pytest.raises(BaseModelError, match="not in the hub's local cache"):
        hub.hub_file("owner/otter", WORD)


@pytest.mark.parametrize(
    ("files", "wanted"),
    [
        (["README.md", "line.safetensors", "steps/a.safetensors"], ["line.safetensors"]),
        (["a.safetensors", LORA], [LORA]),
        ([LORA, WORD, "learned_embeds_2.safetensors"], [LORA]),
        (["adapter_config.json", "adapter_model.safetensors", "README.md"], ["adapter_config.json", "adapter_model.s"]),
        (["model_index.json", "unet/diffusion_pytorch_model.safetensors"], [*hub.CONFIGS, "unet/diffusion_pytorch_m"]),
    ],
)
def test_no_more_is_fetched_than_the_adapter(files, wanted, monkeypatch, tmp_path, file):
    asked, got = answer(monkeypatch, files), tmp_path / "got"
    for name in files:
        (tmp_path / "got" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "got" / name).write_bytes(file.read_bytes())
    monkeypatch.setattr(
        hub, "snapshot_download", lambda _, allow_patterns: asked.append(allow_patterns) or tmp_path / "got"
    )
    found = hub.hub_file("owner/line")
    assert all(name.startswith(start) for name, start in zip(asked.pop(), wanted, strict=True))
    assert found == (got / wanted[0] if len(wanted) == 1 else got)


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["pytorch_lora_weights.bin"], "owner/line", "owner/line: has only pickled weights, which can run programs"),
        (["README.md"], "owner/line", "owner/line: has no .safetensors. Name another."),
        (["README.md"], "owner/line/a.safetensors", "owner/line: has no file a.safetensors. Check the spelling."),
    ],
)
def test_what_is_not_there_is_told(files, name, message, monkeypatch, tmp_path):
    answer(monkeypatch, files)
    monkeypatch.setattr(hub, "snapshot_download", lambda _, allow_patterns: tmp_path)
    with pytest.raises(BaseModelError) as told:
        parse_adapter(name)
    assert message in str(told.value)


HUB, ELSEWHERE = "https://huggingface.co/owner/line", "https://civitai.com/api/download/models/1?type=Model"


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        (HUB, "Give owner/line instead"),
        (f"{HUB}/tree/main", "Give owner/line instead"),
        (f"{HUB}/blob/main/a/b.safetensors", "Give owner/line/a/b.safetensors instead"),
        (f"{HUB}/resolve/main/b.safetensors?download=true", "Give owner/line/b.safetensors instead"),
        ("https://huggingface.co/datasets/owner", "Download the file first"),
        (ELSEWHERE, "Download the file first"),
    ],
)
@pytest.mark.parametrize("form", ["{}", "crab={}", "{}:0.8"])
def test_a_web_address_is_told_by_what_to_give_instead(given, advice, form):
    for read in (parse_adapter, parse_embedding):
        with pytest.raises(SfumatoError) as told:
            read(form.format(given))
        assert f"{given}" in str(told.value)
        assert f": this is a web address. {advice}" in str(told.value)
    with pytest.raises(SfumatoError) as told:
        read_header(Path(given))
    assert str(told.value).startswith(f"{given}: this is a web address. Download the file first")


def test_a_folder_that_is_here_is_meant_before_the_hub(tmp_path):
    (tmp_path / "here/runs").mkdir()
    for name in ("runs/line", "runs/line/line.safetensors", "runs/line.safetensors"):
        assert not is_hub_id(name)
        with pytest.raises(SfumatoError, match="no such file"):
            parse_adapter(f"{name}:0.8")
    assert not any(map(is_hub_id, ("line.safetensors", "line", "../a/b", "/a/b", "a/b.safetensors", "a/b/c", "")))
    assert all(map(is_hub_id, ("a/b", "a/b-1.0", "a/b/c.safetensors", "a/b/c/d e.safetensors")))


def test_a_picture_is_drawn_with_adapters_of_the_hub(cached, tmp_path, quick, monkeypatch):
    from sfumato import load_base
    from tests.tiny import CPU

    folder = tiny_pocket_folder(tmp_path / "pocket")
    unet = load_base(folder, precision=CPU).unet
    lora = attach({"unet": select(unet, "cross-attention")}, rank=2, alpha=2.0, seed=1)
    modules = {key: LoraModule.from_scale(x.down, x.up + 0.1, x.scale) for key, x in lora.layers.items()}
    lora.detach()
    file = write_lora(tmp_path / "line.safetensors", modules, family="pocket")
    cached("owner/line", (file, "line.safetensors"))
    cached("owner/painter", *((each, each.relative_to(folder)) for each in folder.rglob("*") if each.is_file()))
    words = ("--lora", "owner/line:0.8", "--lora", "owner/painter:0.5", "--base", str(folder), "-o", "a.png")
    assert guarded(generate.main, ["a cat", *words]) == 0
    told = json.loads(Image.open("a.png").info["sfumato"])
    assert [(each["label"], each["weight"]) for each in told["adapters"]] == [("line", 0.8), ("painter", 0.5)]
    assert [each["file"] for each in told["adapters"]] == ["owner/line/line.safetensors", "owner/painter"]
    assert guarded(merge.main, ["owner/painter:0.5", "--into", str(folder), "-o", "mixed"]) == 0
    assert guarded(merge.main, ["owner/line", "--family", "pocket", "-o", "merged.safetensors"]) == 0
    about = read_header("merged.safetensors").metadata
    assert about["modelspec.merged_from"] == "owner/line/line.safetensors"
    assert Adapter(parse_adapter("owner/painter").path).label == "painter"


def test_tags_tell_files_of_the_usual_name_apart(cached, file, tmp_path):
    used = []
    for name, weight in (("line", 0.8), ("otter-v1.5", 0.6)):
        save_file({"lora_unet_mid_block_attentions_0_proj_in.alpha": torch.full((1,), weight)}, file)
        used.append(Adapter(cached(f"owner/{name}", (file, LORA)) / LORA, weight, name))
    about = {"prompt": "a cat", "negative": "", "adapter_guidance": {}, "steps": 2, "guidance": 1, "seed": 0}
    about |= {"width": 8, "height": 8, "base": "pocket", "vae": None, "clip_skip": 0}
    save_with_settings(Image.new("RGB", (8, 8)), used, about, tmp_path / "a.png", ("Euler", None))
    told = read_picture_info(tmp_path / "a.png").parameters
    assert told.prompt == "a cat <lora:line:0.8> <lora:otter-v1.5:0.6>"
    hashes = ", ".join(f"{each.name}: {adapter_hash(each.path)}" for each in used)
    assert told.settings["Lora hashes"] == hashes


def test_an_axis_takes_files_of_the_hub(cached, file):
    cached("owner/line", (file, "line.safetensors"))
    axes = {"x": "adapter=owner/line,owner/line:0.3", "y": "prompt=a cat"}
    _, _, _, (row,) = grid.plan(grid.Config(**axes, adapter_weight=0.7))
    assert [max(cell.weights.values()) for cell in row] == [0.7, 0.3]


def answer(monkeypatch, files):
    """A hub that has these files of every repository, of which none is in the cache; what is asked of it."""
    asked = []
    monkeypatch.setattr(hub, "HfApi", lambda: hub_with(*files))
    monkeypatch.setattr(hub, "_cached", lambda _: None)
    return asked
