"""What peft saves is applied as peft itself merges it: every kind, on a whole U-Net, linear layers and convolutions."""

import copy
import json

import pytest
import torch

from sfumato.errors import AdapterError, FileError
from sfumato.files import inspect_file, read_adapter
from sfumato.files.writing.kohya import write_lora
from sfumato.files.writing.peft import write_peft
from sfumato.merging.sources import adapter_hash
from tests.files.said import said

TARGETS = ["attn1.to_q", "attn2.to_k", "to_out.0", "conv1", "proj_in", "conv_shortcut"]
KINDS = {
    "LoRA": ("LoraConfig", "LoRA", dict(r=3, lora_alpha=2)),
    "LoRA, patterns": (
        "LoraConfig",
        "LoRA",
        dict(r=3, lora_alpha=2, rank_pattern={"attn2.to_k": 2}, alpha_pattern={"attn2.to_k": 7}),
    ),
    "LoRA, rank-stabilised": ("LoraConfig", "LoRA", dict(r=3, lora_alpha=2, use_rslora=True)),
    "LoRA, bias": ("LoraConfig", "LoRA", dict(r=3, lora_alpha=2, lora_bias=True, target_modules=["to_out.0"])),
    "DoRA": ("LoraConfig", "DoRA", dict(r=3, lora_alpha=2, use_dora=True)),
    "LoHa": ("LoHaConfig", "LoHa", dict(r=3, alpha=2)),
    "LoHa, Tucker": ("LoHaConfig", "LoHa", dict(r=3, alpha=2, use_effective_conv2d=True)),
    "LoKr": ("LoKrConfig", "LoKr", dict(r=1, alpha=2)),
    "LoKr, Tucker": ("LoKrConfig", "LoKr", dict(r=1, alpha=2, use_effective_conv2d=True, decompose_both=True)),
    "LoKr, both whole": ("LoKrConfig", "LoKr", dict(r=8, alpha=2)),  # peft scales by alpha / r then, LyCORIS does not
    "OFT, series": ("OFTConfig", "OFT", dict(oft_block_size=4)),
    "OFT, series of 3": ("OFTConfig", "OFT", dict(oft_block_size=4, num_cayley_neumann_terms=3)),
    "OFT, series of 2": ("OFTConfig", "OFT", dict(oft_block_size=4, num_cayley_neumann_terms=2)),
    "OFT, exact": ("OFTConfig", "OFT", dict(oft_block_size=4, use_cayley_neumann=False)),
    "OFT, shared": ("OFTConfig", "OFT", dict(oft_block_size=4, block_share=True)),
    "OFT, constrained": ("OFTConfig", "OFT", dict(oft_block_size=4, coft=True, eps=0.5)),
    "BOFT": ("BOFTConfig", "BOFT", dict(boft_block_size=4)),
    "IA3": ("IA3Config", "IA3", dict(feedforward_modules=["conv1", "attn2.to_k"])),
}


def save(unet, kind, folder):
    """A random adapter of peft's, saved; and the U-Net with it merged, by peft."""
    import peft

    name, _, options = KINDS[kind]
    targets = dict(target_modules=TARGETS, init_weights=False) | options
    if name in ("LoraConfig", "IA3Config"):
        del targets["init_weights"]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = peft.get_peft_model(copy.deepcopy(unet), getattr(peft, name)(**targets))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
    model.save_pretrained(folder, safe_serialization=True)
    return model.merge_and_unload()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_that_peft_merges(kind, tiny, tmp_path):
    unet = tiny("pocket").parts["unet"]
    merged = dict(save(unet, kind, tmp_path / "adapter").named_parameters())
    found = read_adapter(tmp_path / "adapter")
    assert list(found.kinds) == [KINDS[kind][1]]
    changed = set()
    for (part, path), change in found.changes.items():
        layer = unet.get_submodule(path)
        assert (part, change.fits(layer.weight.shape)) == ("unet", True), path
        ours = layer.weight + change.delta(layer.weight)
        torch.testing.assert_close(ours, merged[f"{path}.weight"], rtol=2e-5, atol=2e-6, msg=path)
        changed.add(f"{path}.weight")
        bias = layer.bias
        if bias is not None and change.bias_delta is not None:
            torch.testing.assert_close(bias + change.bias_delta, merged[f"{path}.bias"], msg=path)
            changed.add(f"{path}.bias")
        if bias is not None and getattr(change, "scales_bias", False):
            torch.testing.assert_close(bias + bias * change.gain, merged[f"{path}.bias"], msg=path)
            changed.add(f"{path}.bias")
    for name, before in unet.named_parameters():
        assert name in changed or torch.equal(before, merged[name]), name


def boft_stages(width, stages, size):
    """peft's own permutation and Cayley transform for several stages, which its layers only build on CUDA."""
    from peft.tuners.boft.layer import BOFTLayer

    blocks = 0.2 * torch.randn(stages, width // size, size, size, generator=torch.Generator().manual_seed(0))
    product = torch.eye(width)
    for stage in range(stages):
        turns = BOFTLayer.cayley_batch(None, blocks[stage])
        order = BOFTLayer.block_butterfly_perm(None, width, width // size // 2**stage, size // 2, stages - 1)
        swap = BOFTLayer.perm2mat(None, order)
        product = swap @ torch.block_diag(*turns) @ swap.T @ product
    return blocks, product


@pytest.mark.parametrize(("width", "stages", "size"), [(8, 1, 4), (16, 2, 4), (32, 3, 4), (16, 3, 2)])
def test_the_stages_of_boft_are_pefts(width, stages, size):
    from sfumato.files.kinds.oft import InputBoft

    blocks, product = boft_stages(width, stages, size)
    g = torch.Generator().manual_seed(1)
    weight, scale = torch.randn(6, width, generator=g), torch.rand(6, generator=g)
    change = InputBoft(blocks, scale)
    assert change.fits(weight.shape)
    torch.testing.assert_close(weight + change.delta(weight), (product @ weight.T).T * scale[:, None])


@pytest.mark.filterwarnings("ignore")
def test_text_encoders_are_told_apart_by_the_class_that_peft_wrapped(tiny, tmp_path):
    import peft

    parts = tiny("sdxl").parts
    for part in ("text_encoder", "text_encoder_2"):
        config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
        peft.get_peft_model(copy.deepcopy(parts[part]), config).save_pretrained(tmp_path / "both" / part)
    for part in ("text_encoder", "text_encoder_2"):
        alone = read_adapter(tmp_path / "both" / part).changes
        assert {target[0] for target in alone} == {part}
        assert all(parts[part].get_submodule(path) is not None for _, path in alone)
    both = read_adapter(tmp_path / "both")
    assert len(both.changes) == 12 + 32
    assert both.path == tmp_path / "both"


@pytest.fixture
def folder(tiny, tmp_path):
    save(tiny("pocket").parts["unet"], "LoRA", tmp_path / "a")
    return tmp_path / "a"


def change_config(folder, **values):
    config = json.loads((folder / "adapter_config.json").read_text()) | values
    (folder / "adapter_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("values", "what"),
    [
        ({"peft_type": "VERA"}, "peft_type is 'VERA'; read are LORA"),
        ({"init_lora_weights": "pissa_niter_4"}, "a base that peft changed before training"),
        ({"layer_replication": [[0, 4]]}, "layer_replication is set"),
        ({"lora_alpha": "8"}, "wanted a number"),
        ({"lora_alpha": 1e300}, "wanted a number"),
    ],
)
def test_a_config_under_which_the_tensors_mean_something_else_is_refused(values, what, folder):
    change_config(folder, **values)
    with pytest.raises((AdapterError, FileError), match=what) as error:
        read_adapter(folder)
    assert "\n" not in str(error.value)


def test_a_config_that_is_no_json_or_huge_is_refused(folder):
    (folder / "adapter_config.json").write_text("[" * 100_000)
    with pytest.raises(AdapterError, match="is not a JSON object"):
        read_adapter(folder)
    (folder / "adapter_config.json").write_text(" " * 1_000_001)
    with pytest.raises(FileError, match="more than 1,000,000 bytes"):
        read_adapter(folder)


def test_a_folder_without_its_weights_or_config_says_so(folder):
    (folder / "adapter_model.safetensors").rename(folder / "b.safetensors")
    with pytest.raises(FileError, match=r"there is no adapter_model\.safetensors beside"):
        read_adapter(folder)
    (folder / "adapter_config.json").unlink()
    with pytest.raises(FileError, match=r"this is a folder.*b\.safetensors"):
        read_adapter(folder)


def test_a_rotation_without_its_config_is_refused(tiny, tmp_path):
    save(tiny("pocket").parts["unet"], "OFT, exact", tmp_path / "a")
    with pytest.raises(AdapterError, match="wanted peft's folder"):
        read_adapter(tmp_path / "a" / "adapter_model.safetensors")


def test_folders_of_peft_to_the_letter(two_modules, tmp_path):
    place = write_peft(tmp_path / "a", two_modules, family="sd1")
    config, weights = place / "adapter_config.json", place / "adapter_model.safetensors"
    whole = config.read_text()
    config.write_text(whole.replace("LORA", "VERA"))
    assert said(read_adapter, place) == (
        "a/adapter_config.json: peft_type is 'VERA'; read are LORA, LOHA, LOKR, OFT, BOFT, IA3. Merge it with peft "
        "itself."
    )
    config.write_bytes(b"\xff")
    assert said(read_adapter, place) == (
        "a/adapter_config.json: the file cannot be read as text ('utf-8' codec can't decode byte 0xff in position 0: "
        "invalid start byte). Save the adapter again."
    )
    config.write_text(" " * 1_000_001)
    assert said(read_adapter, place) == (
        "a/adapter_config.json: the file has more than 1,000,000 bytes. No config needs that; do not trust it."
    )
    config.write_text(whole + " " * (1_000_000 - len(whole)))
    assert len(read_adapter(place).changes) == 2
    weights.rename(place / "b.safetensors")
    assert said(read_adapter, place) == (
        "a: there is no adapter_model.safetensors beside adapter_config.json. Save with safe_serialization=True."
    )
    (place / "b.safetensors").rename(weights)


@pytest.mark.slow
def test_a_folder_of_parts_is_shown_as_the_file_that_it_makes(tiny, lora, tmp_path):
    """With its own hash, which is that in a picture's settings."""
    layers = tiny("sdxl").layers()
    modules = lora({target: layer for target, layer in layers.items() if ".attn" in target[1] or "self_" in target[1]})
    file = inspect_file(write_lora(tmp_path / "a.safetensors", modules, family="sdxl"))
    write_peft(tmp_path / "a", modules, family="sdxl")
    folder = inspect_file(tmp_path / "a")
    assert {block.name.partition(".")[0] for block in folder.blocks} > {"text_encoder", "text_encoder_2"}
    for name in ("kind", "family", "modules", "targets", "ranks", "trigger"):
        assert getattr(folder, name) == getattr(file, name)
    assert [(b.name, b.modules) for b in folder.blocks] == [(b.name, b.modules) for b in file.blocks]
    assert [b.norm for b in folder.blocks] == pytest.approx([b.norm for b in file.blocks])
    assert folder.norm == pytest.approx(file.norm)
    assert folder.bytes == sum(part.stat().st_size for part in (tmp_path / "a").rglob("*.safetensors"))
    assert {inspect_file(tmp_path / "a" / part).hash for part in ("unet", "text_encoder")}.isdisjoint({folder.hash})
    assert folder.hash == adapter_hash(tmp_path / "a")
    assert inspect_file(tmp_path / "a/unet").hash == adapter_hash(tmp_path / "a/unet")
