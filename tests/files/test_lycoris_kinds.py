"""What LyCORIS saves is applied as LyCORIS trains it: every kind, linear and convolution, its own classes asked.

Its forward pass is the measure: its merging (4.1.3, `get_merged_weight`) scales LoHa and LoKr by alpha / rank twice.
"""

import pytest
import torch
from safetensors.torch import save_file

from sfumato.files import read_adapter

pytest.importorskip("lycoris", reason="pip install lycoris-lora einops toml")

LAYERS = {
    "linear": ("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", lambda: torch.nn.Linear(8, 16)),
    "conv": ("down_blocks.0.resnets.0.conv1", lambda: torch.nn.Conv2d(8, 16, 3, padding=1)),
    "conv 1x1": ("down_blocks.0.attentions.0.proj_in", lambda: torch.nn.Conv2d(8, 16, 1)),
}
KINDS = {
    "LoRA": ("locon.LoConModule", "LoRA", dict(lora_dim=2, alpha=3)),
    "LoRA, rank-stabilised": ("locon.LoConModule", "LoRA", dict(lora_dim=4, alpha=3, rs_lora=True)),
    "LoRA, Tucker": ("locon.LoConModule", "LoRA", dict(lora_dim=2, alpha=3, use_tucker=True)),
    "DoRA, out": ("locon.LoConModule", "DoRA", dict(lora_dim=2, alpha=3, weight_decompose=True)),
    "DoRA, in": ("locon.LoConModule", "DoRA", dict(lora_dim=2, alpha=3, weight_decompose=True, wd_on_out=False)),
    "LoHa": ("loha.LohaModule", "LoHa", dict(lora_dim=2, alpha=3)),
    "LoHa, Tucker": ("loha.LohaModule", "LoHa", dict(lora_dim=2, alpha=3, use_tucker=True)),
    "DoRA of LoHa": ("loha.LohaModule", "DoRA of LoHa", dict(lora_dim=2, alpha=3, weight_decompose=True)),
    "LoKr, both whole": ("lokr.LokrModule", "LoKr", dict(lora_dim=9, alpha=3, factor=4)),
    "LoKr, second factored": ("lokr.LokrModule", "LoKr", dict(lora_dim=1, alpha=3, factor=2)),
    "LoKr, both factored": ("lokr.LokrModule", "LoKr", dict(lora_dim=1, alpha=3, factor=4, decompose_both=True)),
    "LoKr, Tucker": ("lokr.LokrModule", "LoKr", dict(lora_dim=1, alpha=3, factor=2, use_tucker=True)),
    "LoKr, unbalanced": ("lokr.LokrModule", "LoKr", dict(lora_dim=1, alpha=3, factor=2, unbalanced_factorization=True)),
    "DoRA of LoKr": ("lokr.LokrModule", "DoRA of LoKr", dict(lora_dim=1, alpha=3, factor=2, weight_decompose=True)),
    "IA3, out": ("ia3.IA3Module", "IA3", dict()),
    "IA3, in": ("ia3.IA3Module", "IA3", dict(train_on_input=True)),
    "OFT": ("diag_oft.DiagOFTModule", "OFT", dict(lora_dim=4)),
    "OFT, constrained": ("diag_oft.DiagOFTModule", "OFT", dict(lora_dim=4, constraint=0.05)),
    "OFT, rescaled": ("diag_oft.DiagOFTModule", "OFT", dict(lora_dim=4, rescaled=True)),
    "BOFT": ("boft.ButterflyOFTModule", "BOFT", dict(lora_dim=4)),
    "BOFT, constrained": ("boft.ButterflyOFTModule", "BOFT", dict(lora_dim=4, constraint=0.05)),
    "BOFT, rescaled": ("boft.ButterflyOFTModule", "BOFT", dict(lora_dim=4, rescaled=True)),
    "GLoRA": ("glora.GLoRAModule", "GLoRA", dict(lora_dim=2, alpha=3)),
}


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", KINDS)
def test_the_layer_computes_what_lycoris_trained(name, layer, tmp_path):
    import importlib

    home, kind, options = KINDS[name]
    module_name, class_name = home.split(".")
    path, build = LAYERS[layer]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        base = build()
        module = getattr(importlib.import_module(f"lycoris.modules.{module_name}"), class_name)("x", base, **options)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    flat = f"lora_unet_{path.replace('.', '_')}"
    state = {f"{flat}.{key}": value.detach().contiguous() for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")

    found = read_adapter(tmp_path / "a.safetensors")
    change = found.changes["unet", path]
    assert found.kinds == {kind: 1}
    assert change.fits(base.weight.shape)
    assert not change.fits((3, 5, *base.weight.shape[2:]))
    x = torch.randn(16, 8, *(6 for _ in base.weight.shape[2:]), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        untouched, delta = base(x), change.delta(base.weight)
        module.apply_to()
        trained = base(x)
        base.forward = module.org_forward
        base.weight.add_(delta)
        torch.testing.assert_close(base(x), trained, rtol=1e-5, atol=1e-5)
    assert (trained - untouched).norm() > 0.1 * untouched.norm()


@pytest.mark.parametrize("layer", LAYERS)
def test_full_differences_are_added_to_weight_and_bias(layer, tmp_path):
    from lycoris.modules.full import FullModule

    path, build = LAYERS[layer]
    base = build()
    module = FullModule("x", base)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    module.apply_to()  # from here on its parameters are the trained weights themselves
    with torch.no_grad():
        module.weight.add_(0.25)
        module.bias.sub_(0.5)
    flat = f"lora_unet_{path.replace('.', '_')}"
    state = {f"{flat}.{key}": value.detach().contiguous() for key, value in module.custom_state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    change = read_adapter(tmp_path / "a.safetensors").changes["unet", path]
    torch.testing.assert_close(weight + change.delta(weight), module.weight.detach())
    torch.testing.assert_close(bias + change.bias_delta, module.bias.detach())


def test_a_norms_difference_is_added(tmp_path):
    from lycoris.modules.norms import NormModule

    base = torch.nn.GroupNorm(2, 8)
    module = NormModule("x", base)
    with torch.no_grad():
        module.w_norm.add_(0.25)
        module.b_norm.sub_(0.5)
    state = {f"lora_unet_down_blocks_0_resnets_0_norm1.{key}": value for key, value in module.state_dict().items()}
    save_file(state, tmp_path / "a.safetensors")
    change = read_adapter(tmp_path / "a.safetensors").changes["unet", "down_blocks.0.resnets.0.norm1"]
    weight, bias = module.get_merged_weight()
    assert change.kind == "difference"
    torch.testing.assert_close(base.weight + change.delta(base.weight), weight)
    torch.testing.assert_close(base.bias + change.bias_delta, bias)
