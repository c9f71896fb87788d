"""A U-Net computed flat: diffusers' own values, and diffusers' own way wherever something in it is not the usual."""

import threading
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from PIL import ImageChops
from torch.testing import assert_close

from sfumato.compose import Adapter, compose
from sfumato.compose.guidance import adapter_guidance
from sfumato.files.kinds import LoraModule
from sfumato.files.writing.kohya import write_lora
from sfumato.generation.draw import draw
from sfumato.models import load_base
from sfumato.precision import fast_unet
from sfumato.precision.cpu_matmul import use_fast_matmul
from sfumato.precision.layers import save_activation_memory
from tests.tiny import CPU, tiny_pipeline


@pytest.fixture
def unet(pocket_folder) -> Any:
    return load_base(str(pocket_folder), precision=CPU).unet


def asked(unet: Any, *, rows: int = 2, side: int = 16, seed: int = 0, tokens: int = 77) -> dict[str, Any]:
    """What a pipeline calls a U-Net with."""
    generator = torch.Generator().manual_seed(seed)
    config = unet.config
    given = {
        "sample": torch.randn(rows, config.in_channels, side, side, generator=generator),
        "timestep": torch.tensor(500 + seed),
        "encoder_hidden_states": torch.randn(rows, tokens, config.cross_attention_dim, generator=generator),
        "timestep_cond": None,
        "cross_attention_kwargs": None,
        "added_cond_kwargs": None,
    }
    if config.addition_embed_type == "text_time":
        width = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
        given["added_cond_kwargs"] = {
            "text_embeds": torch.randn(rows, width, generator=generator),
            "time_ids": torch.tensor([[64.0, 64.0, 0.0, 8.0, 64.0, 64.0]] * rows),
        }
    return given


@pytest.fixture
def counted(monkeypatch) -> list[int]:
    """A number for each call that is computed flat."""
    calls: list[int] = []
    compute = fast_unet._FastUNet.__call__
    monkeypatch.setattr(fast_unet._FastUNet, "__call__", lambda *given: (calls.append(1), compute(*given))[1])
    return calls


@torch.no_grad()
def both(unet: Any, calls: list[int], **given: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """What is computed flat, and what diffusers computes."""
    before = len(calls)
    with fast_unet.fast_inference(unet):
        (ours,) = unet(**given, return_dict=False)
    assert len(calls) == before + 1
    (theirs,) = unet(**given, return_dict=False)
    assert len(calls) == before + 1
    return ours, theirs


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("side", [8, 12, 13])
def test_every_familys_unet_gives_diffusers_values(family, side, counted):
    unet = tiny_pipeline(family).unet
    # A group norm of one pixel, of the deepest level, blows up the last bits.
    assert_close(*both(unet, counted, **asked(unet, side=side, rows=3)), atol=2e-4, rtol=1e-4)


def test_quick_and_lean_layers_are_the_usual(unet, counted):
    assert_close(*both(unet, counted, **asked(unet)))
    use_fast_matmul(unet)
    save_activation_memory(unet)
    assert_close(*both(unet, counted, **asked(unet, seed=1)))


def test_a_call_with_an_output_object_gives_one(unet, counted):
    given = asked(unet)
    with torch.no_grad(), fast_unet.fast_inference(unet):
        (ours,) = unet(**given, return_dict=False)
        assert torch.equal(unet(**given).sample, ours)
        assert torch.equal(unet(*[given[name] for name in ("sample", "timestep", "encoder_hidden_states")])[0], ours)
    assert len(counted) == 3


def test_a_texts_keys_are_kept_until_another_is_heard(unet, counted):
    first, second = asked(unet), asked(unet, seed=1, tokens=154)
    with torch.no_grad():
        wanted = [unet(**given)[0] for given in (first, second)]
        with fast_unet.fast_inference(unet):
            found = [unet(**given)[0] for given in (first, second, first)]
            first["encoder_hidden_states"].mul_(2)  # the same tensor, another text
            doubled = unet(**first)[0]
        assert_close(found, [*wanted, wanted[0]])
        assert_close(doubled, unet(**first)[0])
    assert len(counted) == 4


@pytest.mark.parametrize("way", ["written over", "exchanged"])
def test_weights_that_change_from_call_to_call_are_seen(unet, counted, way):
    """As adapters weighted by step change them, and adapter guidance: back and forth."""
    given, aside = asked(unet), {name: 1.1 * weight.detach() for name, weight in unet.named_parameters()}

    def change(*_: Any) -> None:
        for name, weight in unet.named_parameters():
            if way == "exchanged":
                aside[name], weight.data = weight.data, aside[name]
            else:
                weight.mul_(1.01)

    with torch.no_grad():
        handle = unet.register_forward_pre_hook(change)
        with fast_unet.fast_inference(unet):
            found = [unet(**given)[0] for _ in range(4)]
        for weight in () if way == "exchanged" else unet.parameters():
            weight.div_(1.01**4)
        wanted = [unet(**given)[0] for _ in range(4)]
        handle.remove()
    assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[0], found[1], atol=1e-3)
    assert len(counted) == 4


def test_an_adapter_that_comes_beside_a_layer_within_the_block_is_seen(unet, counted):
    given = asked(unet)
    with torch.no_grad(), fast_unet.fast_inference(unet):
        plain = unet(**given)[0]
        hooked(unet)
        assert not torch.allclose(unet(**given)[0], plain, atol=1e-3)
    assert len(counted) == 1


def without_own_attention(unet: Any) -> None:
    first, *_ = unet.attn_processors.values()
    kind = type("Identity", (), {"__call__": lambda self, attn, x, **_: x})
    unet.set_attn_processor({name: kind() if "attn1" in name else first for name in unet.attn_processors})


def with_another_weight(unet: Any) -> None:
    layer = unet.mid_block.resnets[0].conv1
    layer.weight = torch.nn.Parameter(-9 * layer.weight)


def with_another_layer(unet: Any) -> None:
    layer = unet.mid_block.resnets[0].conv1
    unet.mid_block.resnets[0].conv1 = torch.nn.Conv2d(layer.in_channels, layer.out_channels, 3, padding=1)


@pytest.mark.parametrize(
    "change",
    [
        without_own_attention,
        with_another_weight,
        with_another_layer,
        lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
        lambda unet: setattr(unet.mid_block, "forward", lambda x, *_, **__: 0 * x),
    ],
    ids=["processor", "weight", "layer", "freeu", "forward"],
)
def test_what_is_changed_within_the_block_is_computed_as_it_was(unet, change, counted):
    given = asked(unet)
    with torch.no_grad():
        with fast_unet.fast_inference(unet):
            unet(**given)
            change(unet)
            found = unet(**given)[0]
        assert len(counted) == 1
        assert torch.equal(found, unet(**given)[0])


def test_a_hook_of_all_modules_is_seen(unet, counted):
    given = asked(unet)
    hooks: Any = torch.nn.modules.module
    with torch.no_grad(), fast_unet.fast_inference(unet):
        handle = hooks.register_module_forward_hook(lambda module, _, out: 2 * out if is_linear(module) else None)
        try:
            found = unet(**given)[0]
            assert not fast_unet.is_supported_unet(unet)
        finally:
            handle.remove()
        assert not torch.allclose(found, unet(**given)[0], atol=1e-3)
    assert len(counted) == 1


def is_linear(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.Linear)


def test_two_views_of_a_text_are_two_texts():
    doubled = fast_unet._CachedTensor(lambda text, weight: text * weight, torch.tensor(2.0))
    texts = torch.arange(6.0).view(2, 3)
    assert torch.equal(doubled(texts), 2 * texts)
    assert torch.equal(doubled(texts[:1].expand(2, 3)), 2 * texts[:1].expand(2, 3))


def test_texts_that_come_in_new_tensors_do_not_pile_up():
    doubled = fast_unet._CachedTensor(lambda text, weight: text * weight, torch.tensor(2.0))
    texts = [torch.full((3,), float(number)) for number in range(9)]
    assert all(torch.equal(doubled(text), 2 * text) for text in texts)
    assert len(doubled.known) == fast_unet._CachedTensor.MOST
    assert doubled(texts[-1]) is doubled(texts[-1])


def test_adapter_guidance_is_drawn_flat_in_both_halves(pocket_folder, tmp_path, counted, monkeypatch):
    base = load_base(str(pocket_folder), precision=CPU)
    path, layer = next((path, part) for path, part in base.unet.named_modules() if path.endswith("attn2.to_k"))
    change = LoraModule(torch.full((1, layer.in_features), 0.5), torch.ones(layer.out_features, 1), 1.0)
    file = write_lora(tmp_path / "a.safetensors", {("unet", path): change}, family="pocket")
    with compose(base, Adapter(file, 1.0)) as mix, adapter_guidance(mix, 2, guidance=4):
        ours = draw(base, "red square", 0, steps=3, guidance=4)[0]
        assert len(counted) == 6
        monkeypatch.setattr(fast_unet, "MAX_WEIGHTS", 0)
        theirs = draw(base, "red square", 0, steps=3, guidance=4)[0]
        assert len(counted) == 6
    assert ImageChops.difference(ours, theirs).getextrema() <= ((0, 1),) * 3
    assert "forward" not in vars(base.unet)


def with_peft(unet: Any) -> None:
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))


def in_chunks(unet: Any) -> None:
    unet.down_blocks[0].attentions[0].transformer_blocks[0].set_chunk_feed_forward(2, 1)


def a_layer_of_the_same_name(unet: Any) -> torch.nn.Module:
    layer = unet.mid_block.resnets[0].conv1
    layer.__class__ = type("Conv2d", (type(layer),), {"forward": lambda self, x: 0 * x})
    return layer


def hooked(unet: Any) -> None:
    unet.up_blocks[0].attentions[0].transformer_blocks[0].attn1.to_q.register_forward_hook(
        lambda _module, _given, output: 9 * output
    )


def with_a_bias(unet: Any) -> None:
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.to_k.bias = torch.nn.Parameter(torch.ones(attention.to_k.out_features))


def a_processor_of_the_same_name(unet: Any) -> None:
    unet.set_attn_processor(type("AttnProcessor2_0", (), {"__call__": lambda self, attn, x, **_: 0 * x})())


def dropping(unet: Any) -> None:
    dropout = unet.mid_block.resnets[0].dropout
    dropout.p, dropout.training = 0.5, True


@pytest.mark.parametrize(
    "change",
    [
        with_a_bias,
        a_processor_of_the_same_name,
        dropping,
        lambda unet: setattr(unet.conv_in, "padding_mode", "circular"),
        lambda unet: setattr(unet.conv_in, "padding", "same"),
        lambda unet: setattr(unet.mid_block.resnets[0], "output_scale_factor", 2.0),
        lambda unet: setattr(unet.mid_block.attentions[0].transformer_blocks[0].attn1, "residual_connection", True),
        with_peft,
        in_chunks,
        hooked,
        lambda unet: unet.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6),
        lambda unet: unet.fuse_qkv_projections(),
        lambda unet: unet.mid_block.resnets[0].compile(),
        lambda unet: setattr(unet.mid_block.resnets[0], "conv1", a_layer_of_the_same_name(unet)),
        lambda unet: unet.set_attention_slice("max"),
        lambda unet: setattr(unet.mid_block.resnets[0].conv1, "forward", lambda x: 0 * x),
        lambda unet: unet.register_to_config(resnet_time_scale_shift="scale_shift"),
        lambda unet: unet.register_to_config(addition_embed_type="text"),
        lambda unet: unet.train(),
        lambda unet: unet.to(torch.bfloat16),
    ],
    ids=[
        *("bias", "processor", "dropout", "circular", "padding", "scaled", "residual"),
        *("peft", "chunks", "hook", "freeu", "fused", "compiled", "namesake", "sliced"),
        *("forward", "scale-shift", "text", "training", "bf16"),
    ],
)
def test_what_is_not_the_usual_is_computed_as_it_was(unet, change):
    assert fast_unet.is_supported_unet(unet)
    change(unet)
    assert not fast_unet.is_supported_unet(unet)
    before = vars(unet).get("forward")
    with fast_unet.fast_inference(unet):
        assert vars(unet).get("forward") is before


@pytest.mark.parametrize("name", ["UNet2DConditionModel", "BasicTransformerBlock", "AttnProcessor2_0", "Conv2d"])
def test_classes_in_which_somebody_put_a_method_are_not_the_usual(unet, name, monkeypatch):
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    kinds = {type(each).__name__: type(each) for each in (unet, block, block.attn1.processor, unet.conv_in)}
    method = {"AttnProcessor2_0": "__call__", "Conv2d": "_conv_forward"}.get(name, "forward")
    monkeypatch.setattr(kinds[name], method, lambda *_, **__: None)
    assert not fast_unet.is_supported_unet(unet)


def test_autocast_and_large_unets_are_not_the_usual(unet, monkeypatch):
    with torch.autocast("cpu", torch.bfloat16):
        assert not fast_unet.is_supported_unet(unet)
    monkeypatch.setattr(fast_unet, "MAX_WEIGHTS", 1000)
    assert not fast_unet.is_supported_unet(unet)


def test_another_architecture_is_not_the_usual():
    assert not fast_unet.is_supported_unet(torch.nn.Linear(2, 2))
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (32,)}
    assert not fast_unet.is_supported_unet(diffusers.UNet2DModel(sample_size=8, **blocks))


def test_calls_of_another_kind_are_diffusers(unet, counted):
    given = asked(unet)
    attention_mask = torch.zeros(2, 77)
    attention_mask[:, :9] = 1
    with torch.no_grad():
        wanted = unet(**given, encoder_attention_mask=attention_mask)[0]
        with fast_unet.fast_inference(unet):
            assert torch.equal(unet(**given, encoder_attention_mask=attention_mask)[0], wanted)
            unet.to(torch.float64)
            half = {name: value.double() if name != "timestep" and value is not None else value
                    for name, value in given.items()}  # fmt: skip
            assert unet(**half)[0].dtype == torch.float64
            unet.to(torch.float32)
            with torch.autocast("cpu", torch.bfloat16):
                unet(**given)
    given["sample"].requires_grad_()
    with fast_unet.fast_inference(unet):
        unet(**given)[0].sum().backward()
    assert given["sample"].grad is not None
    assert not counted


def test_each_thread_computes_flat_for_itself(unet, counted):
    given = asked(unet), asked(unet, seed=1)
    with torch.no_grad():
        wanted = [unet(**each)[0] for each in given]
    found, inside, left = {}, threading.Barrier(3), threading.Event()

    def drawing(number: int) -> None:
        with torch.no_grad(), fast_unet.fast_inference(unet):
            inside.wait()
            found[number] = [unet(**given[number])[0] for _ in range(3)]
            left.wait(10 * number)

    threads = [threading.Thread(target=drawing, args=(number,)) for number in (0, 1)]
    for each in threads:
        each.start()
    inside.wait()
    threads[0].join()
    with torch.no_grad():  # the other thread has not left, and this one never was in it
        assert torch.equal(unet(**given[0])[0], wanted[0])
    assert "forward" in vars(unet)
    left.set()
    threads[1].join()
    assert "forward" not in vars(unet)
    assert len(counted) == 6
    for number in (0, 1):
        assert_close(found[number], [wanted[number]] * 3)


def test_the_unet_is_itself_after_an_error(unet):
    with pytest.raises(RuntimeError), torch.no_grad(), fast_unet.fast_inference(unet):
        unet(torch.zeros(1, 4, 16, 16), 1, torch.zeros(1, 77, 5))
    assert "forward" not in vars(unet)
    assert not fast_unet._IN_USE
