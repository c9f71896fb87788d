"""The precision decision: what each machine gets, what it cannot have, and what the table says."""

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from torch import nn

from sfumato.errors import PrecisionError
from sfumato.precision import choices, cpu_matmul, decide, forecast_precision
from sfumato.precision import choices as bf16
from sfumato.training.optim import optimizers


def small_unet(heads: int = 1) -> diffusers.UNet2DConditionModel:
    """One block each way. heads: as diffusers' `attention_head_dim` counts them in such a U-Net."""
    return diffusers.UNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",),
        layers_per_block=1, cross_attention_dim=8, attention_head_dim=heads,
    )  # fmt: skip


def rows(decision):
    return {what: (value, reason) for what, value, reason in decision.rows()}


def fake_cuda(monkeypatch, major):
    """A machine with a CUDA device of this compute capability, as far as the decision looks."""

    class Properties:
        pass

    Properties.major = major
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: Properties)


@pytest.fixture
def bare(monkeypatch):
    """A machine without CUDA or MPS."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_a_cpu_stores_and_computes_in_fp32(bare):
    decision = decide()
    assert decision.device.type == "cpu"
    assert {decision.storage, decision.compute, decision.vae} == {torch.float32}
    assert not decision.scaler().is_enabled()


def test_bf16_on_a_cpu_is_autocast_over_fp32_weights(bare):
    decision = decide("bf16")
    assert (decision.storage, decision.compute, decision.vae) == (torch.float32, torch.bfloat16, torch.float32)
    assert not decision.channels_last
    layer = decision.place(nn.Linear(4, 4), "text")
    assert layer.weight.dtype == torch.float32
    with decision.autocast():
        assert layer(torch.ones(1, 4)).dtype == torch.bfloat16


@pytest.mark.parametrize("has_bf16", [False, True])
def test_beside_frozen_weights_a_cpu_learns_in_bf16_where_it_multiplies_that(monkeypatch, bare, has_bf16):
    monkeypatch.setattr(choices, "cpu_has_bf16", lambda: has_bf16)
    wanted = torch.bfloat16 if has_bf16 else torch.float32
    decision = decide(adapting=True)
    assert (decision.storage, decision.compute, decision.vae) == (wanted, wanted, torch.float32)
    assert decide().compute == decide("fp32", adapting=True).compute == torch.float32
    for adapting in (True, False):
        told, decided = forecast_precision("auto", "cpu", adapting=adapting), decide(adapting=adapting)
        assert (told.storage, told.compute, told.vae) == (decided.storage, decided.compute, decided.vae)


@pytest.mark.parametrize(
    ("flags", "has_bf16"), [("avx512f avx512_bf16", True), ("amx_bf16 sse2", True), ("avx512f avx2", False)]
)
def test_whether_a_cpu_multiplies_bf16_is_read_from_its_flags(monkeypatch, flags, has_bf16):
    monkeypatch.setattr(cpu_matmul, "processor", lambda: f"vendor_id\t: a maker\nflags\t\t: {flags}")
    assert bf16.cpu_has_bf16() is has_bf16
    assert bf16.multiplies_bf16(torch.device("cpu")) is has_bf16
    assert not bf16.multiplies_bf16(torch.device("mps"))


def test_where_linux_does_not_tell_the_flags_torch_does(monkeypatch):
    """On Windows the processor's name holds its maker and no flags."""
    asked = {
        f"_is_{name}_supported": name in ("avx512", "avx512_bf16") for name in ("avx512", "avx512_bf16", "amx_tile")
    }
    for name, has in asked.items():
        assert hasattr(torch.cpu, name)
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has)
    monkeypatch.setattr(cpu_matmul, "Path", lambda _: Path("/nowhere"))
    monkeypatch.setattr(cpu_matmul.platform, "processor", lambda: "AMD64 Family 25 Model 97, AuthenticAMD")
    assert cpu_matmul.processor.__wrapped__() == "AMD64 Family 25 Model 97, AuthenticAMD avx512f avx512_bf16"


@pytest.mark.parametrize("adapting", [True, False])
def test_autocast_keeps_no_second_copy_of_a_whole_model(bare, adapting):
    with decide("bf16", adapting=adapting).autocast():
        assert torch.is_autocast_cache_enabled() is adapting


@pytest.mark.parametrize(
    ("compute", "scales"), [(torch.float32, False), (torch.bfloat16, False), (torch.float16, True)]
)
def test_the_loss_is_scaled_in_fp16_alone(bare, compute, scales):
    assert replace(decide(), compute=compute).scaler().is_enabled() is scales


def test_the_vae_has_a_dtype_of_its_own(bare):
    decision = decide("bf16", adapting=True)
    assert [decision.dtype(part) for part in ("unet", "text", "vae")] == [torch.bfloat16] * 2 + [torch.float32]
    assert decision.place(nn.Linear(2, 2), "vae").weight.dtype == torch.float32


def test_weights_in_the_products_dtype_draw_without_autocast(bare):
    decision = decide("bf16", adapting=True)
    frozen, learned = decision.place(nn.Linear(2, 2)), nn.Linear(2, 2)
    for modules, is_cast in (([frozen], False), ([frozen, learned], True)):
        with decision.drawing(*modules):
            assert torch.is_autocast_enabled("cpu") is is_cast
    stored = decide("bf16").place(nn.Linear(2, 2))
    with decide("bf16").drawing(stored):
        assert torch.is_autocast_enabled("cpu")


def test_fp32_opens_no_autocast(bare):
    with decide("fp32").autocast():
        assert not torch.is_autocast_enabled("cpu")


def test_a_new_gpu_gets_bf16_and_tf32(monkeypatch):
    fake_cuda(monkeypatch, major=9)
    decision = decide()
    assert (decision.storage, decision.compute, decision.vae) == (torch.bfloat16,) * 3
    assert (decision.tf32, decision.channels_last) == (True, True)


def test_a_gpu_whose_fp16_is_broken_gets_fp32(monkeypatch):
    fake_cuda(monkeypatch, major=7)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA GeForce GTX 1660 SUPER")
    assert (decide().storage, decide().compute) == (torch.float32, torch.float32)
    assert "fp16" in rows(decide())["compute"][1]
    assert decide("fp16").compute == torch.float16


def test_an_old_gpu_gets_fp16_with_its_vae_in_fp32(monkeypatch):
    fake_cuda(monkeypatch, major=7)
    decision = decide()
    assert (decision.storage, decision.compute, decision.vae) == (torch.float16, torch.float16, torch.float32)
    assert not decision.tf32
    assert rows(decision)["VAE"] == ("fp32", "SDXL's VAE overflows in fp16")


def test_fp32_on_a_gpu_means_it(monkeypatch):
    fake_cuda(monkeypatch, major=9)
    decision = decide("fp32")
    assert (decision.compute, decision.tf32, decision.channels_last) == (torch.float32, False, False)


@pytest.fixture
def switches():
    """TF32's, which are the whole process's."""
    found = (torch.backends.cuda.matmul, torch.backends.cudnn)
    before = [switch.allow_tf32 for switch in found]
    yield found
    for switch, value in zip(found, before, strict=True):
        switch.allow_tf32 = value


def test_tf32_is_switched_as_decided(monkeypatch, switches):
    fake_cuda(monkeypatch, major=9)
    for requested, wanted in (("auto", True), ("fp32", False)):
        decide(requested).apply()
        assert [switch.allow_tf32 for switch in switches] == [wanted, wanted]


def test_bf16_on_a_gpu_without_it_is_refused(monkeypatch):
    fake_cuda(monkeypatch, major=7)
    with pytest.raises(PrecisionError, match="--precision bf16: this GPU has none"):
        decide("bf16")


def test_a_gpu_that_is_not_there_is_refused(monkeypatch):
    fake_cuda(monkeypatch, major=9)
    with pytest.raises(PrecisionError, match="--device cuda:1: there are 1 CUDA devices"):
        decide(device="cuda:1")
    assert decide(device="cuda:0").device == torch.device("cuda:0")


def test_the_gpu_that_is_named_is_the_one_of_the_process(monkeypatch, switches):
    fake_cuda(monkeypatch, major=9)
    opened = []
    monkeypatch.setattr(torch.cuda, "set_device", opened.append)
    for name in ("cuda", "cuda:0"):
        decide("bf16", device=name).apply()
    assert opened == [torch.device("cuda:0")]


def test_a_gpu_is_forecast_in_bf16_unless_something_else_is_asked_for(bare):
    told = [forecast_precision(asked, "gpu", adapting=True) for asked in ("auto", "fp16", "fp32")]
    assert [each.compute for each in told] == [torch.bfloat16, torch.float16, torch.float32]
    assert [each.storage for each in told] == [each.compute for each in told]


def test_amds_gpus_have_bf16_whatever_number_they_give(monkeypatch):
    fake_cuda(monkeypatch, major=7)
    monkeypatch.setattr(torch.version, "hip", "6.0")
    decision = decide()
    assert (decision.compute, decision.tf32) == (torch.bfloat16, False)


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"requested": "fp16"}, "--precision fp16: is for GPUs. On a CPU use auto"),
        ({"requested": "fp8"}, "--precision fp8: unknown"),
        ({"device": "cuda"}, "--device cuda: torch finds no CUDA device"),
        ({"device": "mps"}, "--device mps: this machine has no Apple GPU"),
        ({"device": "gpu"}, "--device gpu: unknown"),
        ({"device": "meta"}, "--device meta: not supported"),
        ({"attention": "flash"}, "--attention flash: unknown"),
        ({"attention": "xformers"}, "--attention xformers: "),
    ],
)
def test_impossible_wishes_are_one_line(bare, wish, message):
    with pytest.raises(PrecisionError) as caught:
        decide(**wish)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("cuda", "said"),
    [(None, "this torch is a build without CUDA"), ("12.8", "torch for CUDA 12.8 may want a newer one")],
)
def test_a_gpu_that_torch_does_not_find_is_told(monkeypatch, bare, cuda, said):
    monkeypatch.setattr(choices.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(torch.version, "cuda", cuda)
    told = f"though an NVIDIA driver is installed: {said}"
    assert rows(decide())["device"] == ("cpu", f"found neither CUDA nor MPS, {told}")
    with pytest.raises(PrecisionError, match=f"torch finds no CUDA device, {told}. Install"):
        decide(device="cuda")


@pytest.mark.parametrize(
    ("wish", "install"),
    [({"attention": "xformers"}, "sfumato[xformers]"), ({"optimizer": "adamw8bit"}, "sfumato[8bit]")],
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, bare, wish, install):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(PrecisionError) as caught:
        decide(**wish)
    assert f'pip install "{install}"' in str(caught.value)


def test_an_installed_package_still_needs_its_device(monkeypatch, bare):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    with pytest.raises(PrecisionError, match="needs a CUDA device, this one is cpu"):
        decide(attention="xformers")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(PrecisionError, match="needs a CUDA device or a CPU, this one is mps"):
        decide(optimizer="adamw8bit", device="mps")


@pytest.mark.parametrize(("version", "steps"), [("0.49.2", False), ("0.50.0", True), ("1.0.0.dev0", True)])
def test_on_a_cpu_eight_bits_want_a_bitsandbytes_that_steps_there(monkeypatch, bare, version, steps):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    if steps:
        assert decide(optimizer="adamw8bit").optimizer_state == "8 bit"
        return
    with pytest.raises(PrecisionError, match=r"bitsandbytes 0\.49\.2 steps on CUDA alone. Run `pip install \"bitsandb"):
        decide(optimizer="adamw8bit")


def test_eight_bits_change_only_the_optimizers_row(monkeypatch):
    fake_cuda(monkeypatch, major=9)
    monkeypatch.setattr(choices.importlib.util, "find_spec", lambda _: object())
    named, plain = rows(decide(optimizer="adamw8bit")), rows(decide())
    assert named["optimizer state"] == ("8 bit", "adamw8bit was named")
    assert {what for what in named if named[what] != plain[what]} == {"optimizer state"}


def test_the_table_gives_every_row_a_reason(bare):
    decision = decide("bf16", gradient_checkpointing=True)
    assert all(reason for _, _, reason in decision.rows())
    lines = decision.table().splitlines()
    assert len(lines) == 11
    assert lines[0].split() == ["device", "cpu", "found", "neither", "CUDA", "nor", "MPS"]
    assert lines[-1].split()[:4] == ["checkpointing", "on", "asked", "for:"]


def test_placing_freezes_casts_and_keeps_the_module():
    layer = nn.Linear(2, 2, dtype=torch.float64)
    placed = decide("fp32", device="cpu").place(layer, "vae")
    assert placed is layer
    assert not placed.training
    assert {(p.dtype, p.requires_grad) for p in placed.parameters()} == {(torch.float32, False)}


def test_on_a_cpu_layers_are_placed_with_quicker_products_in_torchs_own_layout():
    placed = decide("fp32", device="cpu").place(nn.Sequential(nn.Conv2d(2, 2, 3), nn.Linear(2, 2)))
    assert placed[0].weight.is_contiguous()
    assert "_conv_forward" in vars(placed[0])
    assert "forward" in vars(placed[1])


@pytest.mark.parametrize(("there", "by"), [(True, "oneDNN"), (False, "torch")])
def test_onednn_multiplies_where_it_is_quicker_and_there(monkeypatch, bare, there, by):
    monkeypatch.setattr(cpu_matmul, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(cpu_matmul, "onednn", lambda: torch.matmul if there else None)
    assert decide().products == by


def test_checkpointing_reaches_the_unet():
    unet = small_unet()
    decide("fp32", device="cpu").place(unet)
    assert not unet.is_gradient_checkpointing
    decide("fp32", device="cpu", gradient_checkpointing=True).place(unet)
    assert unet.is_gradient_checkpointing


@pytest.mark.gpu
@pytest.mark.parametrize("requested", ["auto", "fp32", "fp16", "bf16"])
def test_a_unet_trains_on_the_gpu_in_each_precision(requested):
    """The fp32 weight beside frozen ones of each storage dtype gets a finite fp32 gradient close to the CPU's."""
    torch.manual_seed(0)
    unet = small_unet()
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)

    def gradient(decision):
        model = decision.place(unet)
        offset = torch.zeros(1, 5, 8, device=decision.device, requires_grad=True)
        scaler = decision.scaler()
        with decision.autocast():
            error = (
                model(latents.to(decision.device), 10, text.to(decision.device) + offset).sample.float().square().mean()
            )
        scaler.scale(error).backward()
        return offset.grad.cpu() / scaler.get_scale()

    wanted = gradient(decide("fp32", device="cpu"))
    found = gradient(decide(requested, device="cuda"))
    assert found.dtype == torch.float32
    assert (found - wanted).norm() / wanted.norm() < 0.05


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["unet", "vae", "text"])
def test_a_gpu_keeps_each_part_in_its_dtype_and_layout(part):
    decision = decide("fp16", device="cuda")
    convolution = decision.place(nn.Conv2d(4, 4, 3), part)
    assert convolution.weight.dtype == (torch.float32 if part == "vae" else torch.float16)
    assert convolution.weight.is_contiguous(memory_format=torch.channels_last) == (part != "text")
    assert convolution.weight.is_cuda


@pytest.mark.gpu
def test_xformers_on_the_gpu_predicts_what_sdpa_does():
    pytest.importorskip("xformers")
    torch.manual_seed(0)
    unet = small_unet(heads=8)
    latents, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 8)
    found = []
    for attention in ("sdpa", "xformers"):
        decision = decide("fp16", device="cuda", attention=attention)
        model = decision.place(unet)
        with torch.no_grad(), decision.autocast():
            found.append(model(latents.to("cuda"), 10, text.to("cuda")).sample.float())
    assert (found[1] - found[0]).norm() / found[0].norm() < 0.01


@pytest.mark.gpu
def test_an_8_bit_optimizer_steps_on_the_gpu_as_adamw_does():
    pytest.importorskip("bitsandbytes")
    starts = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    found = {}
    for name in ("adamw", "adamw8bit"):
        weight = nn.Parameter(starts.to("cuda"))
        optimizer = optimizers.build_optimizer(name, [{"params": [weight], "lr": 1e-2}], weight_decay=0.01)
        for step in range(3):
            weight.grad = torch.randn(64, 64, generator=torch.Generator().manual_seed(1 + step)).to("cuda")
            optimizer.step()
        found[name] = weight.detach().cpu() - starts
    assert (found["adamw8bit"] - found["adamw"]).norm() / found["adamw"].norm() < 0.1


def test_offloading_wants_a_gpu_with_a_memory_of_its_own():
    with pytest.raises(PrecisionError, match="--offload: keeps a GPU's own memory free, and a CPU has none"):
        decide("fp32", device="cpu", offload=True)
