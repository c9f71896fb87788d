"""Whose file it is makes no difference: one module in every trainer's names; and what diffusers makes of such files."""

import copy

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import AdapterError
from sfumato.files import read_adapter

UNET = ("unet", "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k")
FIRST = ("text_encoder", "encoder.layers.3.mlp.fc1")
SECOND = ("text_encoder_2", "text_model.encoder.layers.3.mlp.fc1")
SGM = "input_blocks.4.1.transformer_blocks.0.attn2.to_k"
TEXT = "text_model.encoder.layers.3.mlp.fc1"
NAMES = {
    "kohya": [(UNET, f"lora_unet_{UNET[1]}"), (FIRST, f"lora_te_{TEXT}")],
    "kohya SDXL": [(UNET, f"lora_unet_{SGM}"), (FIRST, f"lora_te1_{TEXT}"), (SECOND, f"lora_te2_{TEXT}")],
    "OneTrainer, OMI": [(UNET, f"unet.{SGM}"), (FIRST, f"clip_l.{TEXT}"), (SECOND, f"clip_g.{TEXT}")],
    "OneTrainer, inner": [(UNET, f"lora_unet.{UNET[1]}"), (FIRST, f"lora_te1.{TEXT}"), (SECOND, f"lora_te2.{TEXT}")],
    "ai-toolkit": [(UNET, f"diffusion_model.{UNET[1]}"), (FIRST, f"text_encoder.{TEXT}")],
    "SimpleTuner, LyCORIS": [(UNET, f"lycoris_{UNET[1]}")],
    "diffusers": [(UNET, f"unet.{UNET[1]}"), (FIRST, f"text_encoder.{TEXT}"), (SECOND, f"text_encoder_2.{TEXT}")],
    "transformers >= 5.6": [(FIRST, f"text_encoder.{FIRST[1]}"), (SECOND, f"text_encoder_2.{SECOND[1]}")],
}
FLAT = ("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_", "lycoris_")


def flattened(name):
    return name.replace(".", "_") if name.startswith(FLAT) else name


@pytest.mark.parametrize("who", NAMES)
@pytest.mark.parametrize(
    "suffixes",
    [
        {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2), "alpha": (), "dora_scale": (6, 1)},
        {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8), "alpha": ()},
        {"lokr_w1": (2, 2), "lokr_w2": (3, 4), "alpha": ()},
        {"diff": (6, 8)},
    ],
    ids=["DoRA", "LoHa", "LoKr", "difference"],
)
def test_every_kind_in_every_spelling(who, suffixes, tmp_path):
    tensors = {f"{flattened(name)}.{key}": torch.ones(s) for _, name in NAMES[who] for key, s in suffixes.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    assert found.changes.keys() == {target for target, _ in NAMES[who]}
    assert found.skipped == ()


def load_with_diffusers(tensors, unet, folder):
    """A U-Net with what diffusers makes of a file, merged; or the error it raises, as text."""
    from diffusers.loaders import StableDiffusionLoraLoaderMixin

    save_file(tensors, folder / "a.safetensors")
    unet = copy.deepcopy(unet)
    parts = {"unet": unet, "text_encoder": None}
    loader = type("Loader", (StableDiffusionLoraLoaderMixin,), {**parts, "components": parts, "hf_device_map": None})()
    try:
        loader.load_lora_weights(folder, weight_name="a.safetensors", adapter_name="a")
        loader.fuse_lora(components=["unet"])
    except Exception as error:  # whatever it raises is what its users see
        return f"{type(error).__name__}: {error}"
    return unet


def trained(kind, layers):
    """A file of `kind` and the weights it was trained to, by that kind's own formula in float64."""
    g = torch.Generator().manual_seed(0)
    tensors, wanted = {}, {}
    for i, ((_, path), layer) in enumerate(layers.items()):
        w = layer.weight.detach().double()
        out, inner = w.shape
        alpha = (2.0, 2.0, 6.0)[i % 3] if kind == "differing alphas" else 2.0
        down, up = torch.randn(2, inner, generator=g), torch.randn(out, 2, generator=g)
        product = up.double() @ down.double()
        name = f"lora_unet_{path.replace('.', '_')}"
        found = {"alpha": torch.tensor(alpha)}
        if kind == "LoHa":
            a, b = torch.randn(out, 2, generator=g), torch.randn(2, inner, generator=g)
            found |= {"hada_w1_a": up, "hada_w1_b": down, "hada_w2_a": a, "hada_w2_b": b}
            wanted[path] = w + product * (a.double() @ b.double())
        elif kind == "LoKr":
            small = torch.randn(2, 2, generator=g)
            found |= {"lokr_w1": small, "lokr_w2_a": up[: out // 2].clone(), "lokr_w2_b": down[:, : inner // 2].clone()}
            wanted[path] = w + torch.kron(small.double(), product[: out // 2, : inner // 2])
        else:
            found |= {"lora_down.weight": down, "lora_up.weight": up}
            wanted[path] = w + alpha / 2 * product
        if kind == "DoRA":
            magnitude = torch.rand(out, 1, generator=g) + 0.5
            found["dora_scale"] = magnitude
            wanted[path] = magnitude.double() * wanted[path] / wanted[path].norm(dim=1, keepdim=True)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    return tensors, wanted


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "theirs"),
    [
        ("differing alphas", "a part wrong"),  # the most frequent alpha scales all modules
        ("DoRA", "all wrong"),  # the magnitude is dropped with a line in the log
        ("LoHa", "error"),
        ("LoKr", "error"),
    ],
)
def test_what_diffusers_drops_or_missscales_is_applied_right(kind, theirs, tiny, tmp_path):
    parts = tiny("pocket")
    layers = parts.attention()
    tensors, wanted = trained(kind, layers)
    result = load_with_diffusers(tensors, parts.parts["unet"], tmp_path)
    changes = read_adapter(tmp_path / "a.safetensors").changes
    assert changes.keys() == layers.keys()
    for (part, path), change in changes.items():
        weight = layers[part, path].weight.detach()
        torch.testing.assert_close((weight + change.delta(weight)).double(), wanted[path], rtol=1e-5, atol=1e-5)
    if theirs == "error":
        assert isinstance(result, str)
        return
    wrong = [
        path
        for path in wanted
        if not torch.allclose(result.get_submodule(path).weight.double(), wanted[path], atol=1e-3)
    ]
    assert 0 < len(wrong) < len(wanted) if theirs == "a part wrong" else len(wrong) == len(wanted)


def test_the_first_form_of_oft_whose_meaning_changed_is_not_understood(tmp_path):
    save_file({f"lora_unet_{UNET[1].replace('.', '_')}.oft_diag": torch.ones(2, 3, 3)}, tmp_path / "a.safetensors")
    with pytest.raises(AdapterError, match="0 of 1 keys are an adapter's"):
        read_adapter(tmp_path / "a.safetensors")


@pytest.mark.parametrize(
    ("suffix", "shape", "width"),
    [
        ("hada", (4, 8), 2048),
        ("lokr", (2, 2), 2048),
        ("diff", (6, 768), 768),
    ],
)
def test_the_text_width_is_told_by_every_kind(suffix, shape, width, tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    if suffix == "hada":
        tensors = {f"hada_w{n}_{x}": torch.ones((6, 2) if x == "a" else (2, width)) for n in (1, 2) for x in "ab"}
    elif suffix == "lokr":
        tensors = {"lokr_w1": torch.ones(2, 2), "lokr_w2": torch.ones(3, width // 2)}
    else:
        tensors = {"diff": torch.ones(shape)}
    save_file({f"{name}.{key}": value for key, value in tensors.items()}, tmp_path / "a.safetensors")
    found = read_adapter(tmp_path / "a.safetensors")
    assert (found.text_width, found.family) == (width, "sdxl" if width == 2048 else "sd1")
