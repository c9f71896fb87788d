"""Attention in training on a CPU: diffusers' own in other arithmetic."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0

from sfumato import load_base
from sfumato.models import Base
from sfumato.precision import decide
from sfumato.precision.layers import MAX_SCORES, ProductAttention, use_cpu_training_attention
from tests.tiny import CPU


@pytest.fixture
def base() -> Base:
    return load_base("pocket", precision=CPU)


def outputs(base: Base, processor: AttnProcessor2_0) -> tuple[torch.Tensor, list[torch.Tensor]]:
    base.unet.set_attn_processor(processor)
    base.unet.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 16, 16, generator=generator)
    text = torch.randn(2, 77, 192, generator=generator)
    drawn = base.unet(latents, torch.tensor([100, 900]), text).sample
    gradients = torch.autograd.grad(drawn.square().mean(), list(base.unet.parameters()))
    return drawn.detach(), list(gradients)


def test_learns_what_diffusers_attention_learns(base: Base) -> None:
    drawn, gradients = outputs(base, ProductAttention())
    wanted, wanted_gradients = outputs(base, AttnProcessor2_0())
    torch.testing.assert_close(drawn, wanted, rtol=1e-4, atol=1e-5)
    for ours, theirs in zip(gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()) + 1e-12)


def test_draws_the_same_bits_as_diffusers(base: Base) -> None:
    latents, text = torch.randn(1, 4, 16, 16), torch.randn(1, 77, 192)
    with torch.no_grad():
        wanted = base.unet(latents, 10, text).sample
        use_cpu_training_attention(base.unet)
        assert torch.equal(base.unet(latents, 10, text).sample, wanted)


def test_products_are_used_only_for_small_scores(base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    fused: list[int] = []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(query: torch.Tensor, *arguments: object, **more: object) -> torch.Tensor:
        fused.append(query.shape[2])
        return attention(query, *arguments, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    use_cpu_training_attention(base.unet)
    layer = base.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn1")
    layer(torch.randn(1, 256, 64))
    assert fused == []
    tokens = int((MAX_SCORES / 4 / layer.heads) ** 0.5) + 1
    layer(torch.randn(1, tokens, 64))
    assert fused == [tokens]


def test_a_mask_is_heeded(base: Base) -> None:
    layer = base.unet.get_submodule("down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    x, text, mask = torch.randn(1, 16, 64), torch.randn(1, 77, 192), torch.zeros(1, 1, 77)
    mask[..., 40:] = -10_000.0
    wanted = layer(x, text, mask)
    use_cpu_training_attention(base.unet)
    torch.testing.assert_close(layer(x, text, mask), wanted)
    assert not torch.allclose(layer(x, text), wanted)


def test_another_processor_is_left_alone(base: Base) -> None:
    class Own(AttnProcessor2_0):
        pass

    base.unet.set_attn_processor(Own())
    use_cpu_training_attention(base.unet)
    assert {type(processor) for processor in base.unet.attn_processors.values()} == {Own}


@pytest.mark.parametrize(("precision", "processor"), [("fp32", AttnProcessor2_0), ("bf16", ProductAttention)])
def test_training_in_bf16_alone_takes_products(base: Base, precision: str, processor: type) -> None:
    decide(precision, device="cpu").prepare_for_training(base.unet)
    assert {type(used) for used in base.unet.attn_processors.values()} == {processor}


@pytest.mark.parametrize(("precision", "products"), [("fp32", False), ("bf16", True)])
def test_a_text_encoder_learns_in_bf16_by_products_and_says_the_same(
    base: Base, precision: str, products: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder, fused = base.text_encoders[0], []
    attention = torch.nn.functional.scaled_dot_product_attention

    def spy(*arguments: torch.Tensor, **more: object) -> torch.Tensor:
        fused.append(1)
        return attention(*arguments, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    tokens = base.tokenizers[0](["crab"], padding="max_length", return_tensors="pt").input_ids
    wanted = encoder(tokens).last_hidden_state
    assert fused
    fused.clear()
    decide(precision, device="cpu").prepare_for_training(encoder)
    torch.testing.assert_close(encoder(tokens).last_hidden_state, wanted, rtol=1e-4, atol=1e-5)
    assert bool(fused) is not products
    encoder.save_pretrained(tmp_path)
    assert "eager" not in (tmp_path / "config.json").read_text()
