"""peft's layers as the oracle of our own: the same start, by peft's arithmetic."""

from torch import nn


def layers_of_peft(unet: nn.Module, targets: str, *, seed: int) -> dict[str, nn.Module]:
    """peft's layers of rank 2 put into a U-Net, by name, that begin where ours do from this seed."""
    from peft import LoraConfig, inject_adapter_in_model

    from sfumato.adapters import attach, select

    start = attach({"unet": select(unet, targets)}, rank=2, alpha=2.0, seed=seed)
    start.detach()
    names = sorted({name for _, name in start.layers})
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=names), unet)
    layers = {name: unet.get_submodule(name) for name in names}
    for name, layer in layers.items():
        layer.lora_A["default"].weight.data.copy_(start.layers["unet", name].down.data)
    return layers
