"""The table of docs/adapters.md: each kind for diffusers and peft, baked with the error that is told."""

from functools import cache

import pytest
import torch
from diffusers.loaders import StableDiffusionLoraLoaderMixin, StableDiffusionXLLoraLoaderMixin
from peft import PeftModel
from torch.testing import assert_close

from sfumato.files.kinds import LoraModule
from sfumato.files.kinds.dora import Dora, Glora
from sfumato.files.kinds.ia3 import Difference, Ia3
from sfumato.files.kinds.lokr import Factor, Loha, Lokr
from sfumato.files.kinds.oft import OutputBoft, OutputOft
from sfumato.merging.extract import as_lora, write_format
from sfumato.merging.factors import Budget
from sfumato.merging.merge import MergeSource
from tests.copies import copies


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def lora(weight):
    return LoraModule(random(2, weight.shape[1]), random(weight.shape[0], 2), 1.0)


KINDS = {
    "LoRA": lora,
    "DoRA": lambda weight: Dora(lora(weight), random(weight.shape[0]).abs() + 1, on_input=False),
    "LoHa": lambda weight: Loha(
        (random(weight.shape[0], 2), random(2, weight.shape[1])),
        (random(weight.shape[0], 2), random(2, weight.shape[1])),
        0.5,
    ),
    "LoKr": lambda weight: Lokr(Factor(random(2, 2)), Factor(random(weight.shape[0] // 2, weight.shape[1] // 2)), 1.0),
    "IA3": lambda weight: Ia3(random(weight.shape[0]), on_input=False),
    "difference": lambda weight: Difference(random(*weight.shape)),
    "OFT": lambda weight: OutputOft(random(4, weight.shape[0] // 4, weight.shape[0] // 4) / 10, 0.0, kohya=False),
    "BOFT": lambda weight: OutputBoft(random(2, weight.shape[0] // 4, 4, 4) / 10, None),
    "GLoRA": lambda weight: Glora(random(weight.shape[1], 2), random(2, weight.shape[1]), lora(weight)),
}
FAMILIES = ("pocket", "sd1", "sd2", "sdxl")
CASES = [
    pytest.param(kind, family, marks=() if place == number % len(FAMILIES) else pytest.mark.slow)
    for number, kind in enumerate(KINDS)
    for place, family in enumerate(FAMILIES)
]


@pytest.mark.parametrize(("kind", "family"), CASES)
@pytest.mark.parametrize("to", ["kohya", "diffusers", "peft"])
def test_every_kind_reaches_diffusers_and_peft_with_the_error_told(to, kind, family, tiny_base, tmp_path):
    base = tiny_base(family)
    weights = {t: w for t, w in base.weights().items() if t[0] == "unet" and t[1].endswith("attn1.to_q")}
    weights = dict(list(weights.items())[:3])
    changes = {target: KINDS[kind](weight) for target, weight in weights.items()}
    budget = Budget(rank=None if kind == "LoRA" else 4)
    made = as_lora(MergeSource("a", changes), budget, weights.__getitem__)
    path = tmp_path / ("a" if to == "peft" else "a.safetensors")
    write_format(to, path, made.modules, family=family, metadata={}, dtype=torch.float32)
    found = applied(base, path, to)
    assert found.keys() == {path for _, path in weights}
    lost = total = 0.0
    for target, weight in weights.items():
        wanted = changes[target].delta(weight)
        assert_close(found[target[1]], made.modules[target].delta(), rtol=1e-4, atol=1e-5)
        lost += float((found[target[1]] - wanted).square().sum())
        total += float(wanted.square().sum())
    assert (lost / total) ** 0.5 == pytest.approx(made.error, abs=1e-5)
    if kind in ("LoRA", "LoHa"):  # a LoHa of ranks 2 and 2 has rank 4
        assert made.error < 1e-5


fresh = cache(copies)
"""fresh(unet)() is a copy of it."""


def applied(base, path, to):
    """The delta that diffusers or peft gives each layer of the U-Net."""
    unet = fresh(base.pipe.unet)()
    if to == "peft":
        PeftModel.from_pretrained(unet, str(path))
    else:
        mixin = StableDiffusionXLLoraLoaderMixin if base.family == "sdxl" else StableDiffusionLoraLoaderMixin
        parts = base.parts() | {"unet": unet}
        loader = type("Loader", (mixin,), {**parts, "components": parts, "hf_device_map": None})()
        loader.load_lora_weights(path.parent, weight_name=path.name, adapter_name="default")
    return {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").detach()
        for name, layer in unet.named_modules()
        if hasattr(layer, "lora_A")
    }
