"""What other programs make of the adapters that are trained here: docs/compatibility.md's table, cell by cell.

Each is of rank 16, on all of a U-Net's blocks with its convolutions and on the text encoder.
"""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sfumato import cli
from sfumato.adapters import Kind, attach
from sfumato.adapters.targets import target_layers
from sfumato.compose import Adapter, compose
from sfumato.errors import AdapterError
from sfumato.files import inspect_file, read_adapter, read_tensors, write_tensors
from sfumato.files.inspect import render
from tests.tiny import tiny_pipeline

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
ROWS = re.findall(r"^\| (.+) \|$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
HEADS, *CELLS = [row.split(" | ") for row in ROWS]
TABLE = [(row[0], head, cell) for row in CELLS for head, cell in zip(HEADS[1:], row[1:], strict=True)]
KINDS = {
    "LoRA": Kind(),
    "DoRA": Kind(dora=True),
    "LoHa": Kind("loha"),
    "LoKr": Kind("lokr"),
    "OFT": Kind("oft"),
}
ONE = torch.tensor(1.0)
Deltas = dict[tuple[str, str], Tensor]


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny_pipeline("sd1", shallow=True)


@pytest.fixture(scope="module")
def written(pipe, tmp_path_factory) -> Callable[[str], tuple[Path, Deltas]]:
    """By the kind's name: a file, and what it adds to each weight as it is read here."""
    made: dict[str, tuple[Path, Deltas]] = {}

    def of(name: str) -> tuple[Path, Deltas]:
        if name not in made:
            models = {"unet": pipe.unet, "text_encoder": pipe.text_encoder}
            layers = target_layers(models, "everything", conv=True)
            adapter = attach(layers, rank=16, alpha=8.0, kind=KINDS[name])
            draws = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for parameter in adapter.parameters():
                    parameter.add_(torch.randn(parameter.shape, generator=draws), alpha=0.05)
            file = adapter.write(tmp_path_factory.mktemp("adapters") / f"{name}.safetensors", family="sd1")
            adapter.detach()
            weights = {(part, path): layer.weight for part, some in layers.items() for path, layer in some.items()}
            with torch.no_grad():
                made[name] = (
                    file,
                    {target: change.delta(weights[target]) for target, change in read_adapter(file).changes.items()},
                )
        return made[name]

    return of


def lycoris(file: Path, pipe: Any, folder: Path) -> Deltas:
    """By its forward pass: its merging (4.1.3) scales LoHa and LoKr by alpha / rank twice."""
    wrapper = pytest.importorskip("lycoris.wrapper")
    found: Deltas = {}
    # transformers from 5.6 on has no `text_model` around its layers, and the names in files keep it.
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te_text_model")):
        model = getattr(pipe, part)
        paths = {id(module): path for path, module in model.named_modules()}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(wrapper.LycorisNetwork, "LORA_PREFIX", prefix)
            network, _ = wrapper.create_lycoris_from_weights(1.0, str(file), model)
        for module in network.loras:
            (layer,) = module.org_module
            found[part, paths[id(layer)]] = _columns(module, layer)
    return found


def _columns(module: Any, layer: nn.Module) -> Tensor:
    """W' - W, by what the layer makes of inputs that are 1 in one place, of a convolution in the middle of 5 x 5."""
    weight = layer.weight
    ones = torch.eye(weight[0].numel())
    if weight.ndim == 4:
        around = (5 - weight.shape[-1]) // 2
        ones = nn.functional.pad(ones.view(-1, *weight.shape[1:]), (around,) * 4)
    with torch.no_grad():
        before = layer(ones)
        module.apply_to()
        made = layer(ones) - before
        layer.forward = module.org_forward
    if weight.ndim == 4:
        middle = 2 // layer.stride[0]
        made = made[:, :, middle, middle]
    return made.T.reshape(weight.shape)


def diffusers(file: Path, pipe: Any, folder: Path) -> Deltas:
    fresh = copy.deepcopy(pipe)
    fresh.load_lora_weights(str(file), adapter_name="a")
    return _of_peft({"unet": fresh.unet, "text_encoder": fresh.text_encoder}, "a")


def _of_peft(models: dict[str, nn.Module], name: str) -> Deltas:
    return {
        (part, path.removeprefix("base_model.model.")): module.get_delta_weight(name).detach()
        for part, model in models.items()
        for path, module in model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def peft(file: Path, pipe: Any, folder: Path) -> Deltas:
    """The folder that `sfumato convert --to peft` writes."""
    from peft import PeftModel

    if cli.main(["convert", str(file), "--to", "peft", "--family", "sd1", "-o", str(folder / "peft")]):
        raise AdapterError("refused by convert")
    fresh = copy.deepcopy(pipe)
    models = {part: getattr(fresh, part) for part in ("unet", "text_encoder")}
    return _of_peft(
        {part: PeftModel.from_pretrained(model, folder / "peft" / part) for part, model in models.items()}, "default"
    )


def kohya(file: Path, pipe: Any, folder: Path) -> Deltas:
    """sd-scripts' `networks.lora`: the modules that have a lora_down, alpha / rank up down; it passes over the rest."""
    tensors, found = read_tensors(file), {}
    for part, prefix in (("unet", "lora_unet"), ("text_encoder", "lora_te")):
        for path, module in getattr(pipe, part).named_modules():
            spelt = f"text_model.{path.removeprefix('text_model.')}" if part == "text_encoder" else path
            name = f"{prefix}_{spelt.replace('.', '_')}"
            if f"{name}.lora_down.weight" in tensors:
                down, up = (tensors[f"{name}.lora_{half}.weight"] for half in ("down", "up"))
                scale = float(tensors.get(f"{name}.alpha", len(down))) / len(down)
                found[part, path] = (scale * up.flatten(1) @ down.flatten(1)).view(module.weight.shape)
    return found


PROGRAMS = {"diffusers": diffusers, "peft": peft, "lycoris-lora": lycoris, "kohya's layout": kohya}


def test_the_table_has_every_kind_and_program():
    assert HEADS[1:] == list(PROGRAMS)
    assert [row[0] for row in CELLS] == list(KINDS)


@pytest.mark.parametrize(("kind", "program", "cell"), TABLE, ids=[f"{kind}, {program}" for kind, program, _ in TABLE])
def test_a_cell_says_what_the_program_does(kind, program, cell, written, pipe, tmp_path):
    file, ours = written(kind)
    try:
        theirs = PROGRAMS[program](file, pipe, tmp_path)
    except (AdapterError, RuntimeError, ValueError):
        assert cell.startswith("refused")
        return
    same = [
        target
        for target, delta in ours.items()
        if target in theirs and torch.allclose(theirs[target], delta, rtol=1e-3, atol=1e-5)
    ]
    if cell.startswith("same"):
        assert len(same) == len(ours) == len(theirs)
    elif cell.startswith("nothing"):
        assert not theirs
    else:
        assert cell.startswith("drops")
        assert not same
        assert len(theirs) == len(ours)


@pytest.mark.parametrize("kind", ["LoHa", "LoKr"])
def test_pefts_layers_compute_the_same_from_the_tensors(kind, written, pipe):
    """DoRA's lengths and OFT's blocks are of a layer's inputs here and outputs there, or the other way round."""
    import peft

    file, ours = written(kind)
    config = {"LoHa": peft.LoHaConfig, "LoKr": peft.LoKrConfig}[kind]
    models = {part: copy.deepcopy(getattr(pipe, part)) for part in ("unet", "text_encoder")}
    tensors = read_tensors(file)
    for part, model in models.items():
        paths = [path for of_part, path in ours if of_part == part]
        peft.inject_adapter_in_model(config(r=16, alpha=8, target_modules=paths), model)
        for path in paths:
            spelt = f"lora_te_text_model.{path}" if part == "text_encoder" else f"lora_unet.{path}"
            name, layer = spelt.replace(".", "_"), model.get_submodule(path)
            roles = [key.partition(".")[2] for key in tensors if key.startswith(f"{name}.") and "alpha" not in key]
            if "lokr_w2" in roles:  # of two whole factors LyCORIS, whose format it is, takes a scale of 1
                layer.scaling["default"] = 1.0
            for role in roles:
                assert getattr(layer, role)["default"].shape == tensors[f"{name}.{role}"].shape
                getattr(layer, role)["default"].data.copy_(tensors[f"{name}.{role}"])
    theirs = _of_peft(models, "default")
    assert theirs.keys() == ours.keys()
    for target, delta in ours.items():
        torch.testing.assert_close(theirs[target], delta, rtol=1e-3, atol=1e-5)


def test_without_any_alpha_all_take_the_rank_and_lycoris_refuses(written, pipe, tmp_path, capsys):
    file, _ = written("LoRA")
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if not name.endswith(".alpha")}
    file = write_tensors(tmp_path / "bare.safetensors", tensors)
    adapter = read_adapter(file)
    assert adapter.without_alpha
    for program in (diffusers, kohya):
        theirs = program(file, pipe, tmp_path)
        for target, change in adapter.changes.items():
            torch.testing.assert_close(theirs[target], change.delta(), rtol=1e-3, atol=1e-5)
    with pytest.raises(TypeError, match="NoneType"):
        lycoris(file, pipe, tmp_path)


def test_that_a_file_has_no_alpha_is_said_once(written, pipe, tmp_path, capsys):
    file, _ = written("LoHa")
    tensors = {name: tensor for name, tensor in read_tensors(file).items() if not name.endswith(".alpha")}
    bare = write_tensors(tmp_path / "bare.safetensors", tensors)
    one = write_tensors(tmp_path / "one.safetensors", tensors | {f"{next(iter(tensors)).partition('.')[0]}.alpha": ONE})
    with compose(pipe, Adapter(bare), Adapter(file, name="full")) as mix:
        mix.set(bare=0.5)
        mix.add(Adapter(one))
    assert capsys.readouterr().err.count("has no alpha") == 1
    assert {path.stem: inspect_file(path).without_alpha for path in (bare, one, file)} == {
        "bare": True,
        "one": False,
        file.stem: False,
    }
    assert "the file has no alpha" in render(inspect_file(bare))
