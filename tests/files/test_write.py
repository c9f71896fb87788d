"""The one grammar: kohya names, one alpha, equal bytes, and metadata that other tools read."""

import errno
import hashlib
import json
import os
import weakref
from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save
from torch import nn
from torch.testing import assert_close

from sfumato.errors import AdapterError, ConfigError, FileError
from sfumato.files import read_tensors
from sfumato.files.adapter_file import read_lora
from sfumato.files.fingerprint import FINGERPRINT_KEY
from sfumato.files.header import read_header
from sfumato.files.kinds import LoraModule
from sfumato.files.metadata import METADATA_LIMIT, Description, describe, short_hash
from sfumato.files.save import hashes, ordered, write_streamed, write_tensors
from sfumato.files.writing import kohya
from sfumato.files.writing.kohya import metadata_within_limit, unify_alpha, write_difference, write_lora
from sfumato.files.writing.peft import write_diffusers, write_peft
from sfumato.training.methods import full
from tests.files.said import TO_K, said

NOTHING = "there are no modules to write; the adapter is attached to nothing."


@pytest.fixture(autouse=True)
def fixed_date(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")


def test_save_then_load_is_identity(two_modules, tmp_path):
    found = read_lora(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1"))
    assert found.modules.keys() == two_modules.keys()
    for target, module in two_modules.items():
        assert torch.equal(found.modules[target].down, module.down)
        assert torch.equal(found.modules[target].up, module.up)
        assert found.modules[target].alpha == module.alpha


def test_load_then_save_is_the_same_file(two_modules, tmp_path):
    first = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    again = read_lora(first)
    second = write_lora(tmp_path / "b.safetensors", again.modules, family="sd1", metadata=again.metadata)
    assert first.read_bytes() == second.read_bytes()


def test_a_file_has_one_alpha_and_down_up_alpha_for_every_module(tiny, lora, tmp_path):
    modules = lora(tiny("sd1").attention())
    tensors = load_file(write_lora(tmp_path / "a.safetensors", modules, family="sd1"))
    assert {float(value) for name, value in tensors.items() if name.endswith(".alpha")} == {2.0}
    assert len(tensors) == 3 * 128


@pytest.mark.parametrize("write", [write_lora, write_diffusers])
@pytest.mark.parametrize("further", [(), (1, 1), (3, 3)])
def test_up_has_as_many_axes_as_down_whatever_it_was_read_with(write, further, tmp_path):
    """Other tools write a linear layer's factors as convolutions of 1x1, or a convolution's up as a matrix."""
    path = "down_blocks.0.resnets.0.conv1" if further else "mid_block.attentions.0.proj_in"
    down, up = torch.randn(2, 4, *further), torch.randn(8, 2)
    for given in (up, up[..., None, None]):
        module = LoraModule(down, given, 2.0)
        tensors = load_file(write(tmp_path / "a.safetensors", {("unet", path): module}, family="sd1"))
        (written,) = (tensor for name, tensor in tensors.items() if name.endswith(("lora_up.weight", "lora_B.weight")))
        assert torch.equal(written, up.reshape(8, 2, *(1 for _ in further)))


def test_another_scale_is_folded_into_up_and_the_update_stays():
    ones = LoraModule(torch.ones(2, 3), torch.ones(3, 2), alpha=2.0)
    alpha, found = unify_alpha({("unet", "a"): ones, ("unet", "b"): ones, ("unet", "c"): replace(ones, alpha=6.0)})
    assert alpha == 2.0
    assert found["unet", "a"].up is ones.up
    assert torch.equal(found["unet", "c"].up, torch.full((3, 2), 3.0))


def test_the_most_frequent_alpha_is_kept_and_the_smaller_of_equally_frequent():
    module = LoraModule(torch.ones(1, 1), torch.ones(1, 1), alpha=8.0)
    assert unify_alpha({("unet", "a"): module, ("unet", "b"): replace(module, alpha=4.0)})[0] == 4.0
    assert unify_alpha({("unet", "a"): module})[0] == 8.0


def test_an_alpha_of_nothing_stays_nothing(tmp_path, two_modules):
    muted = {target: replace(module, alpha=0.0) for target, module in two_modules.items()}
    found = read_lora(write_lora(tmp_path / "a.safetensors", muted, family="sd1"))
    assert all(module.delta().abs().max() == 0 for module in found.modules.values())


def test_modules_that_do_nothing_are_counted_for_no_alpha():
    nothing = LoraModule(torch.ones(2, 3), torch.ones(3, 2), alpha=0.0)
    modules = {("unet", "a"): nothing, ("unet", "b"): nothing, ("unet", "c"): replace(nothing, alpha=6.0)}
    alpha, found = unify_alpha(modules)
    assert alpha == 6.0
    assert [float(found["unet", name].up.max()) for name in "abc"] == [0.0, 0.0, 1.0]


def test_a_tucker_convolution_is_written_as_a_plain_one(tmp_path):
    target = ("unet", "down_blocks.0.resnets.0.conv1")
    draws = torch.Generator().manual_seed(0)
    down, up, mid = (torch.randn(shape, generator=draws) for shape in ((2, 4, 1, 1), (8, 2, 1, 1), (2, 2, 3, 3)))
    module = LoraModule(down, up, 2.0, mid)
    found = read_lora(write_lora(tmp_path / "a.safetensors", {target: module}, family="sd1")).modules[target]
    assert found.mid is None
    assert torch.allclose(found.delta(), module.delta(), atol=1e-5)


@pytest.mark.parametrize(("rank", "said"), [(2, "2"), (3, "Dynamic")])
def test_the_rank_is_said_where_all_modules_have_it(rank, said, two_modules, tmp_path):
    last = list(two_modules)[-1]
    two_modules[last] = LoraModule(torch.ones(rank, 768), torch.ones(4, rank), 2.0)
    header = read_header(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1"))
    assert header.metadata["ss_network_dim"] == said


@pytest.mark.parametrize(("rank", "dim", "args"), [(2, "2", "{}"), (1, "2", '{"conv_dim":"1","conv_alpha":"2"}')])
def test_another_rank_of_convolutions_is_said_as_sd_scripts_says_it(rank, dim, args, two_modules, tmp_path):
    resnet = "down_blocks.1.resnets.0"
    for path, side in ((f"{resnet}.conv1", 3), (f"{resnet}.conv_shortcut", 1)):
        own = rank if side == 3 else 2
        two_modules["unet", path] = LoraModule(torch.ones(own, 4, side, side), torch.ones(8, own, 1, 1), 2.0)
    metadata = read_header(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")).metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_args"]) == (dim, args)


def test_an_alpha_that_halves_would_round_is_kept(tmp_path, two_modules):
    odd = {target: replace(module, alpha=8**0.5) for target, module in two_modules.items()}
    found = read_lora(write_lora(tmp_path / "a.safetensors", odd, family="sd1", dtype=torch.bfloat16))
    assert {module.alpha for module in found.modules.values()} == {float(torch.tensor(8**0.5))}
    assert {module.down.dtype for module in found.modules.values()} == {torch.bfloat16}


def test_the_order_in_which_modules_come_does_not_change_the_bytes(two_modules, tmp_path):
    first = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata={"b": "1", "a": "2"})
    turned = dict(reversed(two_modules.items()))
    second = write_lora(tmp_path / "b.safetensors", turned, family="sd1", metadata={"a": "2", "b": "1"})
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_non_finite_values_are_not_written(value, two_modules, tmp_path):
    target = next(iter(two_modules))
    two_modules[target].up[0, 0] = value
    with pytest.raises(FileError, match=r"to_k\.lora_up holds NaN or Inf, so the file was not written"):
        write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    assert list(tmp_path.iterdir()) == []


def test_values_that_a_half_cannot_hold_are_not_written(two_modules, tmp_path):
    next(iter(two_modules.values())).down[0, 0] = 1e6
    with pytest.raises(FileError, match=r"overflows float16 \(largest value 1e\+06\)\. Save in fp32 or bf16"):
        write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", dtype=torch.float16)


def test_modules_that_no_tool_has_a_name_for_are_not_written(two_modules, tmp_path):
    module = next(iter(two_modules.values()))
    for target, message in (
        (("unet", "encoder_hid_proj"), "unet module encoder_hid_proj has no name in other tools"),
        (("text_encoder", "pooler"), "text_encoder module pooler has no name in other tools"),
        (("text_encoder_2", "text_model.encoder.layers.0.mlp.fc1"), "text_encoder_2 is no part of SD 1.x"),
    ):
        with pytest.raises(AdapterError, match=message):
            write_lora(tmp_path / "a.safetensors", {target: module}, family="sd1")


@pytest.mark.parametrize(
    ("module", "args", "kept"),
    [("lycoris.kohya", '{"algo":"loha"}', "{}"), ("networks.lora", '{"conv_dim":"4"}', '{"conv_dim":"4"}')],
)
def test_a_lora_is_called_one_whatever_it_was_made_of(module, args, kept, two_modules, tmp_path):
    was = {"ss_network_module": module, "ss_network_args": args}
    found = read_header(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata=was)).metadata
    assert (found["ss_network_module"], found["ss_network_args"]) == ("networks.lora", kept)


def test_the_largest_metadata_give_way_to_what_there_is_room_for():
    found = {
        "ss_tag_frequency": "t" * 60_000,
        "ss_datasets": "d" * 50_000,
        "ss_seed": "1",
        FINGERPRINT_KEY: "f" * 100_000,
    }
    assert metadata_within_limit(found, modules=100) == (
        {"ss_datasets": "d" * 50_000, "ss_seed": "1"},
        ["ss_tag_frequency"],
    )
    assert metadata_within_limit(found, modules=3_000)[1] == ["ss_tag_frequency", "ss_datasets"]
    assert metadata_within_limit({"ss_seed": "1"}, modules=100) == ({"ss_seed": "1"}, [])


def test_one_module_under_two_paths_is_not_written(two_modules, tmp_path):
    module = next(iter(two_modules.values()))
    paths = ("encoder.layers.0.mlp.fc1", "text_model.encoder.layers.0.mlp.fc1")
    with pytest.raises(AdapterError, match="two modules are both called lora_te_text_model_encoder_layers_0_mlp_fc1"):
        write_lora(tmp_path / "a.safetensors", {("text_encoder", path): module for path in paths}, family="sd1")


def test_an_adapter_of_nothing_is_not_written(tmp_path):
    with pytest.raises(AdapterError, match="there are no modules to write"):
        write_lora(tmp_path / "a.safetensors", {}, family="sd1")


def test_a_failed_write_leaves_the_earlier_file(two_modules, tmp_path, monkeypatch):
    path = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(FileError, match=r"could not be written \(No space left on device\)"):
        write_lora(path, two_modules, family="sd1", metadata={"a": "b"})
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.safetensors"]


def test_what_is_not_written(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    assert said(write_tensors, path, {"w": torch.tensor(float("inf"))}) == (
        "a.safetensors: w holds NaN or Inf, so the file was not written. Use an earlier save."
    )
    for value in (torch.ones(2, 0), torch.ones(1, dtype=torch.complex64)):
        assert said(write_tensors, path, {"n" * 90: value}) == (
            f"a.safetensors: {'n' * 80!r} ({value.dtype}, {list(value.shape)}) cannot be written; wanted a tensor that "
            "is not empty, of a common dtype."
        )
    assert said(write_tensors, path, {"w": torch.ones(1).numpy()}) == (
        "a.safetensors: 'w' is a ndarray; wanted a tensor, which torch.as_tensor makes."
    )
    assert said(write_tensors, path, {}) == "a.safetensors: there are no tensors to write; give one or more."

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert said(write_tensors, path, {"w": torch.ones(1)}) == (
        "a.safetensors: the file could not be written (No space left on device). Make room or name another folder; an "
        "earlier file of the name is untouched."
    )
    assert list(tmp_path.iterdir()) == []


def test_a_lora_that_is_not_written(two_modules, tmp_path):
    path, module = tmp_path / "a.safetensors", next(iter(two_modules.values()))
    for dtype in ("fp16", torch.int8):
        assert said(write_lora, path, two_modules, family="sd1", dtype=dtype) == (
            f"a.safetensors: the dtype is {dtype!r}; wanted one of torch's, such as torch.float16."
        )
    dotted = ".".join(TO_K)
    for write in (write_lora, write_diffusers):
        assert said(write, path, {}, family="sd1") == f"a.safetensors: {NOTHING}"
    assert said(write_peft, tmp_path / "a", {}, family="sd1") == f"a: {NOTHING}"
    assert said(write_difference, path, {}, family="sd1") == f"a.safetensors: {NOTHING}"
    biased = {**two_modules, TO_K: replace(module, bias_delta=torch.ones(4))}
    assert said(write_lora, path, biased, family="sd1") == (
        f"a.safetensors: 1 of 2 modules change a bias, first {dotted}, which this grammar cannot hold. Write them for "
        "diffusers or peft, or bake them into a checkpoint."
    )
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    broken = {TO_K: replace(module, up=module.up * float("nan"))}
    assert said(write_lora, path, broken, family="sd1") == (
        f"a.safetensors: {name}.lora_up holds NaN or Inf, so the file was not written. The training diverged; use an "
        "earlier save."
    )
    large = {TO_K: replace(module, down=torch.full((2, 768), -7e4))}
    assert said(write_lora, path, large, family="sd1", dtype=torch.float16) == (
        f"a.safetensors: {name}.lora_down overflows float16 (largest value 7e+04). Save in fp32 or bf16 "
        "(--save-precision of trainers, else --dtype)."
    )
    assert said(write_lora, path, two_modules, family="sd1", metadata={"note": "x" * 100_000}).endswith(
        " bytes, at most 100,000 are written; shorten note."
    )
    twice = {("text_encoder", f"{level}encoder.layers.0.mlp.fc1"): module for level in ("", "text_model.")}
    one = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    assert said(write_lora, path, twice, family="sd1") == (
        f"a.safetensors: two modules are both called {one} in the file; give each module once."
    )
    whole = write_difference(path, {TO_K: (torch.ones(2, 2), None)}, family="sd1", metadata={"ss_seed": "1"})
    kept = {key: text for key, text in read_header(whole).metadata.items() if "hash" not in key}
    assert kept.pop("sfumato.fingerprint")
    assert kept == {"ss_seed": "1", "ss_network_module": "lycoris.kohya", "ss_network_args": '{"algo":"full"}'}
    whole.unlink()
    deltas = {target: (torch.ones(2, 2), None) for target in twice}
    assert said(write_difference, path, deltas, family="sd1") == (
        f"a.safetensors: two modules are both called {one} in the file; give each module once."
    )
    assert list(tmp_path.iterdir()) == []


TENSORS = {
    "z.weight": torch.arange(300_000.0),  # beyond the first MiB, which the legacy hash reads
    "a.weight": torch.ones(3, 5, dtype=torch.float16),
    "ä.weight": torch.ones(4, dtype=torch.bfloat16),
    "b.weight": torch.arange(6),
    "c.weight": torch.ones(2, dtype=torch.uint8),
}


def kohya_hashes(tensors, metadata):
    """As sd-scripts computes them: of the library's bytes with the training metadata only."""
    content = save(tensors, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    length = int.from_bytes(content[:8], "little")
    legacy = content[0x100000 : 0x100000 + 0x10000]
    return hashlib.sha256(content[8 + length :]).hexdigest(), hashlib.sha256(legacy).hexdigest()[:8]


def test_our_bytes_are_the_library_s_and_the_hashes_kohya_s(tmp_path):
    metadata = {"ss_seed": "1", "ss_output_name": "ein Gemälde\n", "modelspec.title": "x"}
    found = hashes(TENSORS, metadata)
    assert (found["sshs_model_hash"], found["sshs_legacy_hash"]) == kohya_hashes(TENSORS, metadata)
    assert found["modelspec.hash_sha256"] == "0x" + found["sshs_model_hash"]
    path = write_tensors(tmp_path / "a", TENSORS, {"only": "one"})
    assert path.read_bytes() == save(TENSORS, {"only": "one"})
    assert ordered(TENSORS) == list(read_header(path).tensors)


def test_a_file_written_one_by_one_has_the_same_bytes(tmp_path):
    metadata = {"ss_seed": "1", "title": "ein Gemälde"}
    shapes, path = {name: tensor.to("meta") for name, tensor in TENSORS.items()}, tmp_path / "a.safetensors"
    for hashed in (True, False):
        write_streamed(path, shapes, TENSORS.__getitem__, metadata, hashed=hashed)
        described = metadata | (hashes(TENSORS, metadata) if hashed else {})
        assert path.read_bytes() == write_tensors(tmp_path / "b.safetensors", TENSORS, described).read_bytes()


def test_what_cannot_be_made_leaves_no_half_of_a_file(tmp_path):
    path, shapes = tmp_path / "a.safetensors", {"a": torch.empty(2), "b": torch.empty(2)}
    for broken, message in ((torch.tensor([1.0, torch.nan]), "b holds NaN"), (torch.ones(3), "b is not of the shape")):
        made = {"a": torch.ones(2), "b": broken}
        with pytest.raises(FileError, match=message):
            write_streamed(path, shapes, made.__getitem__, {})
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_read_meanwhile_is_not_told_as_one_that_cannot_be_written(tmp_path):
    def make(name):
        raise OSError(errno.EIO, "Input/output error", "base.safetensors")

    path = tmp_path / "a.safetensors"
    said = r"^a.safetensors: what it is made of cannot be read \(base.safetensors: Input/output error\), so nothing"
    with pytest.raises(FileError, match=said):
        write_streamed(path, TENSORS, make, {})
    assert list(tmp_path.iterdir()) == []


def test_a_difference_is_held_few_modules_at_a_time(tmp_path):
    """So that the whole difference of two models need not fit into memory."""
    deltas = {
        ("text_encoder", f"encoder.layers.{n}.mlp.fc1"): (torch.full((2, 2), n + 1.0), torch.ones(2) * n)
        for n in range(5)
    }
    held: list[weakref.ref[torch.Tensor]] = []

    class Taken(dict):
        def __getitem__(self, target):
            weight, bias = (value.clone() for value in super().__getitem__(target))
            held.append(weakref.ref(weight))
            assert sum(each() is not None for each in held) <= 3
            return weight, bias

    one = write_difference(tmp_path / "a.safetensors", Taken(deltas), family="sd1")
    assert len(held) == 10
    assert one.read_bytes() == write_difference(tmp_path / "b.safetensors", deltas, family="sd1").read_bytes()


def test_what_training_changed_is_held_a_weight_at_a_time(tmp_path, monkeypatch):
    """So that a whole U-Net's change need not fit beside the two U-Nets."""

    def model(start):
        layers = [nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(2, 2)})}) for _ in range(4)]
        whole = nn.ModuleDict({"encoder": nn.ModuleDict({"layers": nn.ModuleList(layers)})})
        for number, parameter in enumerate(whole.parameters()):
            nn.init.constant_(parameter, start * number)
        return {"text_encoder": whole}

    held: list[weakref.ref[torch.Tensor]] = []

    def rows(modules):
        held.extend(map(weakref.ref, modules.values()))
        assert sum(each() is not None for each in held) == 1
        return all_rows(modules)

    all_rows = kohya.probe_rows
    monkeypatch.setattr(kohya, "probe_rows", rows)
    path = tmp_path / "a.safetensors"
    options = {"family": "sd1", "metadata": {"ss_seed": "1"}, "dtype": torch.float16}
    assert full.write_changes(path, model(1.5), model(1.0), **options) == 4
    assert len(held) == 3  # the first weight is what it was
    header, tensors = read_header(path), read_tensors(path)
    described = {key: value for key, value in header.metadata.items() if "hash" not in key}
    assert described["ss_seed"] == "1"
    assert hashes(tensors, described).items() <= header.metadata.items()
    name = "lora_te_text_model_encoder_layers_1_mlp_fc1"
    assert_close(tensors[f"{name}.diff"], torch.full((2, 2), 1.0, dtype=torch.float16))
    assert_close(tensors[f"{name}.diff_b"], torch.full((2,), 1.5, dtype=torch.float16))


def test_hashes_depend_on_the_tensors_and_not_on_the_metadata(two_modules, tmp_path):
    first = read_header(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata={"ss_seed": "1"}))
    second = read_header(write_lora(tmp_path / "b.safetensors", two_modules, family="sd1", metadata={"x": "y"}))
    next(iter(two_modules.values())).up[0, 0] += 1
    third = read_header(write_lora(tmp_path / "c.safetensors", two_modules, family="sd1"))
    assert short_hash(first) == short_hash(second) != short_hash(third)
    assert len(short_hash(first)) == 12
    assert first.metadata["sshs_model_hash"] == hashlib.sha256(first.path.read_bytes()[first.data_start :]).hexdigest()


def test_a_file_without_a_stated_hash_has_the_same_short_hash(two_modules, tmp_path):
    stated = write_lora(tmp_path / "a.safetensors", two_modules, family="sd1")
    silent = write_tensors(tmp_path / "b.safetensors", load_file(stated))
    assert short_hash(silent) == short_hash(stated)


def described(**fields):
    return describe(Description("line", **{"family": "sd1", "prediction_type": "epsilon", **fields}))


def test_the_minimum_that_other_tools_look_for_is_there(two_modules, tmp_path):
    metadata = described(resolution=(512, 768), images=16, seed=7, steps=400, learning_rate=1e-4, trigger=["zwx style"])
    found = read_header(write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata=metadata)).metadata
    wanted = {
        "ss_v2": "False",
        "ss_base_model_version": "sd_v1",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "2",
        "ss_network_alpha": "2",
        "ss_network_args": "{}",
        "ss_output_name": "line",
        "ss_resolution": "(512, 768)",
        "ss_num_train_images": "16",
        "ss_seed": "7",
        "ss_steps": "400",
        "ss_learning_rate": "0.0001",
        "ss_training_finished_at": "1700000000.0",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": "line",
        "modelspec.resolution": "512x768",
        "modelspec.date": "2023-11-14T22:13:20Z",
        "modelspec.trigger_phrase": "zwx style",
        "modelspec.prediction_type": "epsilon",
        "sfumato.trigger": '["zwx style"]',
    }
    assert wanted.items() <= found.items()


@pytest.mark.parametrize(
    ("family", "prediction", "architecture", "version", "v2"),
    [
        ("pocket", "epsilon", "sfumato-pocket-v1/lora", "sfumato_pocket", "False"),
        ("sd2", "epsilon", "stable-diffusion-v2-512/lora", "sd_v2", "True"),
        ("sd2", "v_prediction", "stable-diffusion-v2-768-v/lora", "sd_v2_v", "True"),
        ("sdxl", "epsilon", "stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0", "False"),
    ],
)
def test_each_family_is_spelt_as_its_readers_expect(family, prediction, architecture, version, v2):
    found = described(family=family, prediction_type=prediction)
    keys = ("modelspec.architecture", "ss_base_model_version", "ss_v2")
    assert tuple(found[key] for key in keys) == (architecture, version, v2)


def test_what_is_not_known_is_left_out():
    assert "ss_seed" not in described()
    assert "modelspec.thumbnail" not in described()
    assert "" not in described().values()


def test_tags_are_counted_by_comma():
    found = json.loads(described(captions=["a crab, ink", "a house, ink", "ink"])["ss_tag_frequency"])
    assert found == {"line": {"ink": 3, "a crab": 1, "a house": 1}}


def test_the_thumbnail_is_a_small_jpeg_of_256_pixels():
    import base64
    import io

    noise = Image.effect_noise((512, 300), 100).convert("RGB")
    uri = described(thumbnail=noise)["modelspec.thumbnail"]
    kind, data = uri.split(",")
    picture = Image.open(io.BytesIO(base64.b64decode(data)))
    assert (kind, picture.format, picture.size) == ("data:image/jpeg;base64", "JPEG", (256, 150))
    assert len(uri) <= 40_000


def test_a_header_that_would_be_too_large_is_refused(two_modules, tmp_path):
    with pytest.raises(FileError, match=r"at most 100,000 are written; shorten note"):
        write_lora(tmp_path / "a.safetensors", two_modules, family="sd1", metadata={"note": "x" * METADATA_LIMIT})


@pytest.mark.parametrize("wrong", [{"family": "flux"}, {"prediction_type": "sample"}])
def test_an_unknown_family_or_prediction_is_refused(wrong):
    with pytest.raises(ConfigError, match=r"unknown .*; known are"):
        described(**wrong)


def test_a_source_date_that_is_no_number_is_refused(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "yesterday")
    with pytest.raises(ConfigError, match="wanted whole seconds since 1970"):
        described()
