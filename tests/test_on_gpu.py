"""The programs on a GPU, beside the same on the CPU: the machine's own where torch finds one, else a pretended."""

import gc
import os
import re
import shutil
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from PIL import Image
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from bench.runs_resume import CASES, command, make_inputs, results
from sfumato import Adapter, cli, compose, draw, load_base
from sfumato.compose import adapter_guidance, current, originals
from sfumato.compose.by_method import by_method
from sfumato.compose.per_picture import composite, per_picture
from sfumato.compose.regions import Region, regions
from sfumato.compose.steps import Ramp, over_steps
from sfumato.drawing.way import way_for
from sfumato.files.fingerprint import fingerprint
from sfumato.pocket.style_augmentation import restyle, restyle_randomly
from sfumato.precision import decide
from sfumato.precision.offload import Offload
from sfumato.runs.processes import Processes
from sfumato.training import muon
from tests.compose.conftest import write  # noqa: F401
from tests.files.test_change_definitions import DEFINITIONS, change_of
from tests.logged import log_in
from tests.pretended_gpu import pretended_gpu
from tests.tiny import tiny_pipeline

pytestmark = pytest.mark.usefixtures("quick")
REAL = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
NOISE = [torch.randn(64, generator=torch.Generator().manual_seed(0), dtype=dtype) for dtype in (torch.half, None)]


def skip_other_noise(precision):
    """diffusers draws an image's noise in the precision of its latents, of which older torch makes other numbers."""
    if precision != "fp32" and not torch.equal(NOISE[0], NOISE[1].half()):
        pytest.skip("this torch draws other noise in half precision than in fp32")


def gpu(kind="cuda", major=8):
    """The machine's GPU, or a pretended one, of CUDA then with this compute capability."""
    return nullcontext() if REAL[kind] and major == 8 else pretended_gpu(kind, major)


# The pretended device


@pytest.mark.parametrize(
    "operation",
    [
        lambda here, there: here + there,
        lambda here, there: there @ here.T,
        lambda here, there: torch.cat([there, here]),
        lambda here, there: torch.where(there > 0, there, here),
        lambda here, there: there.add_(here),
        lambda here, there: F.linear(there, here),
        lambda here, there: here[there.long()],
        lambda here, there: there.numpy(),
        lambda here, there: there.normal_(generator=torch.Generator()),
        lambda here, there: torch.randn(2, generator=torch.Generator("cuda")),
    ],
)
def test_what_a_gpu_refuses_is_refused(operation):
    with pretended_gpu(), pytest.raises((RuntimeError, TypeError), match=r"two devices|numpy|for generator"):
        operation(torch.ones(2, 3), torch.ones(2, 3, device="cuda"))


def test_what_a_gpu_takes_of_the_cpu_is_taken():
    with pretended_gpu():
        there = torch.arange(6.0).to("cuda")
        assert (there * torch.tensor(2.0))[torch.tensor([5, 0])].tolist() == [10, 0]
        assert there.copy_(torch.ones(6)).device == torch.empty(6).copy_(there).to(there).device
        assert there.to("cuda") is there.cuda() is there
        assert there.cpu().numpy().sum() == there.sum().item() == 6
        assert torch.zeros_like(there, device="cpu").device.type == "cpu"
        assert torch.rand(3, generator=torch.Generator("cuda").manual_seed(1), device="cuda").is_cuda


def test_apples_have_no_fp64():
    with pretended_gpu("mps"):
        there = torch.ones(2, device="mps")
        assert there.device.type == "mps"
        assert there.cpu().double().sum() == 2
        for wide in (lambda: there.double(), lambda: torch.ones(2, dtype=torch.float64).to("mps")):
            with pytest.raises(TypeError, match="float64"):
                wide()


def test_gradients_go_back_over_both_moves_and_a_module_keeps_its_parameters():
    with pretended_gpu():
        start = torch.ones(3, requires_grad=True)
        (start.to("cuda").square().cpu() * 2).sum().backward()
        assert start.grad.tolist() == [4, 4, 4]
        layer = nn.Linear(3, 2)
        before = layer.weight
        layer.to("cuda", torch.float16)
        assert layer.weight is before
        assert layer.weight.is_cuda
        assert layer.weight.dtype == torch.float16


def test_autocast_has_the_dtypes_of_cudas():
    """torch's table of operations for CUDA, of which the CPU's differs."""
    with pretended_gpu(), torch.autocast("cuda", torch.float16):
        x = torch.ones(2, 4, 8, 8, device="cuda", dtype=torch.float16)
        assert torch.is_autocast_enabled("cuda")
        assert F.conv2d(x.float(), torch.ones(1, 4, 1, 1, device="cuda")).dtype == torch.float16
        assert {f.dtype for f in (F.group_norm(x, 2), F.layer_norm(x, (8,)), x.softmax(1), x.sum(), x**2)} == {
            torch.float32
        }
        assert F.silu(x).dtype == torch.float16


# The pocket base's pictures


def test_other_hands_draw_on_a_gpu_what_they_draw_on_the_cpu():
    pixels = torch.rand(24, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    some = restyle_randomly(pixels, 0.8, torch.Generator().manual_seed(1))
    with gpu():
        there = pixels.to("cuda")
        named = restyle(there, range(24))
        changed = restyle_randomly(there, 0.8, torch.Generator().manual_seed(1))
        assert named.device.type == changed.device.type == "cuda"
        named, changed = named.cpu(), changed.cpu()
    assert_close(named, restyle(pixels, range(24)), rtol=0, atol=1e-3)
    assert_close(changed, some, rtol=0, atol=1e-3)


# Trainers


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return make_inputs(tmp_path_factory.mktemp("inputs"))


def learn(case, inputs, output, *more):
    """The tensors that come out, by file and name, and the rows of the log."""
    few = {"--steps": "3", "--checkpoint-every": "0"} | dict(zip(more[::2], more[1::2], strict=True))
    assert cli.main(command(case, inputs, output, *(word for pair in few.items() for word in pair))) == 0
    return results(output), log_in(output)


@pytest.fixture(scope="module")
def on_cpu(inputs, tmp_path_factory):
    """What `learn` gives on the CPU, each case once."""
    return cache(lambda case: learn(case, inputs, tmp_path_factory.mktemp("cpu") / "here"))


ON_MPS = (
    "lora",
    "lora with text encoder",
    "dreambooth fused, prior",
    "dreambooth lora",
    "finetune",
    "textual_inversion",
    "pretrain vae",
)


@pytest.mark.parametrize(
    ("kind", "case"),
    [
        *(pytest.param("cuda", case, marks=pytest.mark.slow) for case in CASES),
        *(pytest.param("mps", case, marks=pytest.mark.slow) for case in ON_MPS),
    ],
)
def test_each_trainer_learns_in_fp32_what_it_learns_on_the_cpu(kind, case, inputs, on_cpu, tmp_path, monkeypatch):
    monkeypatch.setattr(muon, "multiplies_bf16", lambda device: False)  # which not every CPU does
    if REAL[kind] and "dropped out" in case:
        pytest.skip("dropout draws its numbers on the device")
    with gpu(kind):
        found, _ = learn(case, inputs, tmp_path / "there", "--device", kind)
    wanted, _ = on_cpu(case)
    assert found.keys() == wanted.keys()
    # A slider's images are drawn on the device, and rounded; lion steps by a sign, which rounding turns near zero.
    share = 0.05 if case in ("slider", "lora lion") else 0.01
    # Attention does not depend on the keys' bias: its gradient is rounding, of which AdamW makes steps like any other.
    for name, tensor in ((name, tensor) for name, tensor in wanted.items() if not name.endswith("k_proj.bias")):
        assert (found[name] - tensor).norm() <= share * tensor.norm() + 1e-6, name


@pytest.mark.slow
@pytest.mark.parametrize(("major", "dtype"), [(8, "bf16"), (7, "fp16")])
@pytest.mark.parametrize(
    "case",
    [
        "lora accumulated, averaged, dropped out",
        "lora with text encoder",
        "dreambooth",
        "dreambooth fused, prior",
        "dreambooth lora",
        "finetune fused with text encoder",
        "textual_inversion",
        "slider",
        "dpo averaged, dropped out",
    ],
)
def test_in_half_precision_each_trainer_learns_nearly_the_same(case, major, dtype, inputs, on_cpu, tmp_path):
    """By the losses of all steps; `auto` takes bf16 where the GPU has it, and scales the loss of fp16 elsewhere."""
    with gpu(major=major):
        assert dtype in decide("auto").table()
        _, found = learn(case, inputs, tmp_path / "there", "--device", "auto", "--precision", "auto")
    _, wanted = on_cpu(case)
    losses = [torch.tensor([row["loss"] for row in rows if "loss" in row]) for rows in (found, wanted)]
    assert_close(*losses, rtol=0.03, atol=0)


@pytest.mark.slow
def test_a_checkpoint_goes_on_where_there_is_another_device(inputs, tmp_path, capsys):
    wanted, _ = learn("dreambooth lora", inputs, tmp_path / "run", "--checkpoint-every", "2")
    shutil.rmtree(tmp_path / "run/checkpoints/000003")  # as if it had been killed before its end
    (tmp_path / "run/out.safetensors").unlink()
    with gpu():
        assert cli.main(["resume", str(tmp_path / "run"), "--device", "cuda"]) == 0
    assert re.search(r"memory   \d\.\d GiB of the GPU at the peak", capsys.readouterr().err)
    found = results(tmp_path / "run")
    for name, tensor in wanted.items():
        assert (found[name] - tensor).norm() <= 0.01 * tensor.norm() + 1e-6, name


@pytest.mark.slow
def test_a_checkpoint_of_bf16_goes_on_in_fp16(inputs, tmp_path):
    """As on a rented machine, which is another each day: there the loss is scaled, here it was not."""
    with gpu(major=8):
        learn("lora", inputs, tmp_path / "run", "--device", "auto", "--precision", "auto", "--checkpoint-every", "2")
    shutil.rmtree(tmp_path / "run/checkpoints/000003")
    (tmp_path / "run/out.safetensors").unlink()
    with gpu(major=7):
        assert cli.main(["resume", str(tmp_path / "run")]) == 0
    assert results(tmp_path / "run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "words",
    [
        ["textual_inversion", "--placeholder", "<x>"],
        ["lora", "--train-words", "<x>", "--words-first", "1", "--rank", "1"],
    ],
)
def test_in_fp16_a_first_step_without_any_caption_learns_nothing_and_goes_on(words, inputs, tmp_path):
    """SDXL has zeros for dropped captions, so that no gradient reaches the words and nothing is scaled."""
    tiny_pipeline("sdxl", shallow=True).save_pretrained(tmp_path / "sdxl")
    options = ["--base", str(tmp_path / "sdxl"), "--images", inputs["lora"][inputs["lora"].index("--images") + 1]]
    options += ["--output", str(tmp_path / "run"), "--caption", "a <x>", "--caption-dropout", ".999", "--batch", "1"]
    options += ["--steps", "2", "--sample-every", "0", "--measure-every", "0", "--device", "auto"]
    with gpu(major=7):
        assert cli.main(["train", *words, *options]) == 0


@pytest.mark.slow
def test_a_folder_has_the_bases_very_vae_whatever_it_was_computed_in(inputs, tmp_path):
    base = Path(inputs["dreambooth"][inputs["dreambooth"].index("--base") + 1])
    with gpu():
        found, _ = learn("dreambooth", inputs, tmp_path / "run", "--device", "cuda", "--precision", "bf16")
    vae = {name.partition(":")[2]: tensor for name, tensor in found.items() if name.startswith("out/vae/")}
    kept = load_file(base / "vae/diffusion_pytorch_model.safetensors")
    assert vae.keys() == kept.keys()
    assert all(torch.equal(vae[name], tensor.float()) for name, tensor in kept.items())


# Each kind of adapter


@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("name", DEFINITIONS)
def test_each_kind_of_adapter_changes_a_weight_as_on_the_cpu(name, kind, tmp_path):
    """On its own, and in the fingerprint of what a mix is made of."""
    shape = DEFINITIONS[name][0]
    change = change_of(DEFINITIONS[name][1], shape, tmp_path)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    wanted = change.delta(weight)
    with gpu(kind):
        found = change.delta(weight.to(kind))
        assert found.device.type == kind
        assert_close(found.cpu(), wanted, rtol=1e-4, atol=1e-6)
        assert fingerprint({("unet", "layer"): found}) == fingerprint({("unet", "layer"): found.cpu()})


# Drawing


@pytest.fixture(scope="module")
def files(inputs, tmp_path_factory):
    """An adapter, another of text encoders and convolutions, a whole U-Net's difference and a word, by name."""
    folder = tmp_path_factory.mktemp("learned")
    fast = ("--steps", "1", "--learning-rate", "1e-2")
    learn("lora", inputs, folder / "a", *fast)
    learn("lora with text encoder", inputs, folder / "b", *fast)
    learn("dreambooth", inputs, folder / "d", *fast, "--save", "difference")
    learn("textual_inversion", inputs, folder / "w", *fast)
    return {name: folder / name / "out.safetensors" for name in "abdw"}


@pytest.fixture(scope="module")
def on_cpu_drawn():
    """What the CPU has drawn already, by way of drawing or family and mix."""
    return {}


WAYS = {
    "base": ["a crab"],
    "mixed": ["a crab <sq>", "--lora", "a={a}:0.8", "--lora", "b={b}:-0.6", "--embedding", "{w}"],
    "difference": ["a crab", "--lora", "{d}:0.8"],
    "guided": ["a crab", "--lora", "{a}", "--adapter-guidance", "2"],
    "steps": ["a crab", "--lora", "a={a}", "--over-steps", "a=0:0,1:1"],
    "switch": ["a crab", "--lora", "a={a}", "--lora", "b={b}", "--switch", "1"],
    "regions": [
        "a crab",
        "--lora",
        "a={a}",
        "--lora",
        "b={b}",
        "--region",
        "a=left:a key",
        "--region",
        "b=right:a cat",
    ],
    "from an image": ["a crab", "--lora", "{a}", "--image", "{picture}", "--strength", "0.9", "--mask", "{mask}"],
    "weighted words": ["(a crab:1.3) [x:y:0.5]", "--prompt-syntax", "a1111"],
    "compel": ["(a crab)++ x", "--prompt-syntax", "compel"],
    "sweep": ["a crab", "--lora", "a={a}", "--sweep", "a=0,1"],
    "pairs": ["a crab", "--lora", "{a}", "--before-after"],
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "precision", "more"),
    [
        ("cuda", "fp32", ()),
        ("cuda", "bf16", ()),
        ("cuda", "fp16", ()),
        ("mps", "fp32", ()),
        ("cuda", "fp32", ("--offload",)),
        ("cuda", "fp16", ("--offload",)),
    ],
)
@pytest.mark.parametrize("way", WAYS)
def test_each_way_of_drawing_draws_what_the_cpu_draws(
    way, kind, precision, more, inputs, files, on_cpu_drawn, tmp_path
):
    """In shades of 255. Without its adapters a way is 0.4 to 30 off, which fp32 and fp16 tell; bf16 rounds by 1."""
    skip_other_noise(precision)
    base = inputs["lora"][inputs["lora"].index("--base") + 1]
    Image.new("RGB", (64, 64), "teal").save(tmp_path / "picture.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "mask.png")
    named = {**files, "picture": tmp_path / "picture.png", "mask": tmp_path / "mask.png"}
    words = [word.format(**named) if "{" in word else word for word in WAYS[way]]
    words += ["--base", base, "--seed", "3", "--steps", "3"]

    def draw(name, *more):
        assert cli.main(["generate", *words, "-o", str(tmp_path / name), *more]) == 0
        made = sorted(tmp_path.glob(f"{name}*.png")) or sorted((tmp_path / name).glob("*.png"))
        return np.stack([np.asarray(Image.open(file), dtype=int) for file in made])

    with gpu(kind):
        found = draw("there", "--device", kind, "--precision", precision, *more)
    if way not in on_cpu_drawn:
        on_cpu_drawn[way] = draw("here", "--device", "cpu", "--precision", "fp32")
    assert np.abs(found - on_cpu_drawn[way]).mean() <= {"fp32": 0.01, "fp16": 0.2, "bf16": 2}[precision]


# Mixing into a pipeline of diffusers


LEFT, RIGHT = (0, 0, 0.5, 1), (0.5, 0, 1, 1)
MIXES = {
    "baked": lambda pipe, a, b: compose(pipe, a, b, way="baked"),
    "live": lambda pipe, a, b: compose(pipe, a, b, way="live"),
    "other weights": lambda pipe, a, b: compose(pipe, a, b).set(a=-0.3),
    "guided": lambda pipe, a, b: adapter_guidance(compose(pipe, a, b), 2, guidance=7.5),
    "by step": lambda pipe, a, b: over_steps(compose(pipe, a, b), a=Ramp((0, 0), (1, 1))),
    "by step, live": lambda pipe, a, b: over_steps(compose(pipe, a, b, way="live"), a=Ramp((0, 0), (1, 1))),
    "by image": lambda pipe, a, b: per_picture(pipe, [[a], [b]]),
    "composite": composite,
    "by region": lambda pipe, a, b: regions(pipe, Region(LEFT, a), Region(RIGHT, b, prompt="a cat")),
    "ties": lambda pipe, a, b: by_method(pipe, a, b, method="ties"),
    "knots": lambda pipe, a, b: by_method(pipe, a, b, method="knots"),
}
PLACES = {
    "moved": lambda pipe: pipe.to("cuda"),
    "no room for copies": lambda pipe: pipe.to("cuda"),
    "fp16": lambda pipe: pipe.to("cuda", torch.float16),
    "model offload": lambda pipe: pipe.enable_model_cpu_offload(device="cuda"),
    "sequential offload": lambda pipe: pipe.enable_sequential_cpu_offload(device="cuda"),
    "mps": lambda pipe: pipe.to("mps"),
    "group offload": lambda pipe: (
        pipe.unet.enable_group_offload(torch.device("cuda"), offload_type="leaf_level"),
        pipe.text_encoder.to("cuda"),
        pipe.vae.to("cuda"),
    ),
}
PLACED = [("sd1", place) for place in PLACES] + [("sdxl", place) for place in ("moved", "model offload")]


def pipeline(family):
    pipe = tiny_pipeline(family, shallow=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures_of(pipe):
    """(2, 64, 64, 3) of two prompts, in [0, 1]."""
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    options = {"num_inference_steps": 2, "guidance_scale": 7.5, "output_type": "np", "height": 64, "width": 64}
    return pipe(["a crab", "a dog"], generator=generators, **options).images


def test_where_there_is_no_room_for_copies_originals_are_on_the_cpu(monkeypatch):
    with gpu():
        weights = [torch.ones(2, 3, device="cuda"), torch.ones(3)]
        assert [each.device.type for each in originals._copies(weights)] == ["cuda", "cpu"]
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (4 * weights[0].nbytes - 1, 2**33))
        copies = originals._copies(weights)
    assert [each.device.type for each in copies] == ["cpu", "cpu"]
    assert_close(copies[0], torch.ones(2, 3))


def test_originals_in_main_memory_lie_in_one_piece_where_their_layout_allows_it(monkeypatch):
    monkeypatch.setattr(originals, "_HUGE", 1)
    with gpu():
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
        weights = [torch.randn(2, 3, 4, 4, device="cuda") for _ in range(3)]
        weights[1] = weights[1].to(memory_format=torch.channels_last)
        copies, wanted = originals._copies(weights), [weight.cpu() for weight in weights]
    assert [each.stride() for each in copies] == [each.stride() for each in weights]
    assert copies[0].untyped_storage().data_ptr() == copies[2].untyped_storage().data_ptr()
    assert copies[0].untyped_storage().data_ptr() != copies[1].untyped_storage().data_ptr()
    for copy, weight in zip(copies, wanted, strict=True):
        assert torch.equal(copy, weight)


def test_memory_that_torch_keeps_on_a_gpu_is_room_for_originals(monkeypatch):
    with gpu():
        weight = torch.ones(2, 3, device="cuda")
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
        monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 100)
        for reserved, where in ((100 + 4 * weight.nbytes - 1, "cpu"), (100 + 4 * weight.nbytes, "cuda")):
            monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_, reserved=reserved: reserved)
            assert originals._copies([weight])[0].device.type == where


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_in_half_precision_a_base_draws_what_its_plain_pipeline_draws(tmp_path, precision):
    tiny_pipeline("sd1", shallow=True).save_pretrained(tmp_path)
    with gpu():
        base = load_base(tmp_path, precision=decide(precision, device="cuda"))
        [found] = draw(base, "a crab", 1, steps=2, width=64, height=64)
        pipe = base.pipeline()
        pipe.set_progress_bar_config(disable=True)
        text, empty = base.encode_text(["a crab"]), base.unconditional(1)
        wanted = pipe(
            prompt_embeds=text.hidden, negative_prompt_embeds=empty.hidden, num_inference_steps=2, width=64, height=64,
            guidance_scale=base.defaults.guidance, generator=torch.Generator().manual_seed(1), output_type="latent",
        ).images  # fmt: skip
        levels = (base.decode(wanted)[0].cpu().permute(1, 2, 0) / 2 + 0.5) * 255
        assert_close(torch.from_numpy(np.asarray(found, np.float32)), levels.float(), atol=0.51, rtol=0)


def test_one_process_needs_no_gpus_that_reach_each_other(monkeypatch):
    monkeypatch.setattr("accelerate.state.check_cuda_p2p_ib_support", lambda: False)  # of several RTX 40
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    shared = dict(PartialState._shared_state)
    PartialState._reset_state()
    try:
        with gpu():
            assert Processes.join("auto").device.type == "cuda"
    finally:
        PartialState._shared_state.update(shared)
    assert "NCCL_P2P_DISABLE" not in os.environ


@pytest.mark.slow
@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_offloaded_parts_are_on_the_gpu_one_at_a_time(family, tmp_path):
    tiny_pipeline(family, shallow=True).save_pretrained(tmp_path)
    settings = {"steps": 2, "width": 64, "height": 64, "guidance": 7.5}
    wanted = draw(load_base(tmp_path, precision=decide("fp32", device="cpu")), "a crab", [1, 2], **settings)
    with gpu():
        base = load_base(tmp_path, precision=decide("fp32", device="cuda", offload=True))
        parts = {**base.parts(text=True), "vae": base.vae}
        seen = {name: [] for name in parts}

        def looked_at(name):
            return lambda *_: seen[name].append({other for other in parts if parts[other].device.type == "cuda"})

        for name in parts:
            (base.vae.decoder if name == "vae" else parts[name]).register_forward_hook(looked_at(name))
        found = draw(base, "a crab", [1, 2], **settings)
    assert all(places and all(place == {name} for place in places) for name, places in seen.items())
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


def test_an_offloaded_part_that_does_not_fit_leaves_the_others_usable(monkeypatch):
    with gpu():
        offload, parts = Offload(torch.device("cuda")), [nn.Linear(2, 2), nn.Linear(2, 2)]
        for part in parts:
            offload.add(part)
        x, move = torch.ones(1, 2, device="cuda"), nn.Module.to
        parts[0](x)

        def full(part, device):
            moved = move(part, device)
            if device != "cpu" and part is parts[1]:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return moved

        monkeypatch.setattr(nn.Module, "to", full)
        with pytest.raises(torch.OutOfMemoryError):
            parts[1](x)
        monkeypatch.undo()
        assert [part.weight.device.type for part in parts] == ["cpu", "cpu"]
        assert parts[0](x).device.type == "cuda"
        assert [part.weight.device.type for part in parts] == ["cuda", "cpu"]
        parts[0].weight, parts[0].bias = (nn.Parameter(each.to("meta")) for each in (parts[0].weight, parts[0].bias))
        assert parts[1](x).device.type == "cuda"  # while the other rests


@pytest.mark.slow
def test_an_offloaded_mix_under_guidance_holds_no_second_weights_on_the_gpu(inputs, tmp_path):
    learn("lora", inputs, tmp_path, "--steps", "1", "--targets", "everything", "--rank", "1")
    folder = inputs["lora"][inputs["lora"].index("--base") + 1]
    before = [each for each in gc.get_objects() if isinstance(each, torch.Tensor)]  # of other tests
    known = set(map(id, before))
    with gpu():
        base = load_base(folder, precision=decide("fp32", device="cuda", offload=True))
        adapter, beside = Adapter(tmp_path / "out.safetensors"), []
        guidance = base.defaults.guidance
        with compose(base, adapter, way=way_for(base, [adapter])) as mix, adapter_guidance(mix, 2, guidance=guidance):

            def look(*_):
                every = (each for each in gc.get_objects() if isinstance(each, torch.Tensor) and id(each) not in known)
                beside.append(sum(each.numel() for each in every if each.device.type == "cuda"))

            base.vae.decoder.register_forward_pre_hook(look)
            draw(base, "a crab", 1, steps=2)
    vae = sum(weight.numel() for weight in base.vae.parameters())
    unet = sum(weight.numel() for weight in base.unet.parameters())
    assert 0 < beside[0] < vae + 0.3 * unet


@pytest.mark.slow
@pytest.mark.parametrize("place", ["model offload", "sequential offload"])
def test_pipelines_that_diffusers_offloads_draw_as_others(place):
    wanted = draw(pipeline("sd1"), "a crab", [1, 2], steps=1, width=64, height=64)
    with gpu():
        pipe = pipeline("sd1")
        PLACES[place](pipe)
        found = draw(pipe, "a crab", [1, 2], steps=1, width=64, height=64)
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 1


@pytest.mark.slow
@pytest.mark.parametrize("said", ["CUDA out of memory", "GET was unable to find an engine to execute this computation"])
def test_what_a_gpu_cannot_decode_at_once_is_decoded_in_tiles(monkeypatch, said):
    tiled = pipeline("sd1")
    own, side = (tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size), 64 // tiled.vae_scale_factor
    assert own[0] >= side  # the VAE's own tiles hold the whole picture, as each family's do
    tiled.vae.enable_tiling()
    tiled.vae.tile_latent_min_size, tiled.vae.tile_sample_min_size = side // 2, 32
    wanted, asked = draw(tiled, "a crab", [1, 2], steps=1, width=64, height=64), []
    with gpu():
        pipe = pipeline("sd1").to("cuda")
        decode = pipe.vae.decoder.forward

        def small(latents, *args):
            asked.append((len(latents), latents.shape[-1]))
            if latents.shape[-1] == side:
                raise RuntimeError(said)
            return decode(latents, *args)

        monkeypatch.setattr(pipe.vae.decoder, "forward", small)
        found = draw(pipe, "a crab", [1, 2], steps=1, width=64, height=64)
    assert asked[0] == (2, side)
    assert max(asked[1:]) == (1, side // 2)
    assert not pipe.vae.use_tiling
    assert (pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size) == own
    for one, other in zip(found, wanted, strict=True):
        assert np.abs(np.asarray(one, float) - np.asarray(other, float)).max() <= 2


def test_who_decodes_in_tiles_anyway_goes_on_with_it(monkeypatch):
    asked = []
    with gpu():
        pipe = pipeline("sd1").to("cuda")
        pipe.vae.enable_tiling()

        def small(latents, **options):
            asked.append(pipe.vae.use_tiling)
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(pipe.vae, "decode", small)
        with pytest.raises(torch.OutOfMemoryError):
            draw(pipe, "a crab", 1, steps=1, width=64, height=64)
        assert asked == [True]
        assert pipe.vae.use_tiling


def test_an_error_of_another_kind_is_not_taken_for_a_lack_of_memory(monkeypatch):
    asked = []
    with gpu():
        pipe = pipeline("sd1").to("cuda")

        def broken(latents, **options):
            asked.append(pipe.vae.use_tiling)
            raise RuntimeError("no kernel for it")

        monkeypatch.setattr(pipe.vae, "decode", broken)
        with pytest.raises(RuntimeError, match="no kernel for it"):
            draw(pipe, "a crab", 1, steps=1, width=64, height=64)
    assert asked == [False]


@pytest.fixture(scope="module")
def unmixed():
    """What was drawn without adapters already, by family and place."""
    return {}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "place"), PLACED)
@pytest.mark.parametrize("way", MIXES)
def test_each_mix_draws_what_it_draws_on_the_cpu_and_leaves_no_trace(
    way, family, place, write, on_cpu_drawn, unmixed, monkeypatch  # noqa: F811
):  # fmt: skip
    skip_other_noise("fp16" if place == "fp16" else "fp32")
    if (family, way) not in on_cpu_drawn:
        here = pipeline(family)
        a, b = (
            Adapter(write(name, here, "to_q", "to_v", "proj_in", "conv1", seed=seed, family=family), 0.8, name=name)
            for seed, name in enumerate("ab")
        )
        with MIXES[way](here, a, b):
            on_cpu_drawn[family, way] = a, b, pictures_of(here)
    a, b, wanted = on_cpu_drawn[family, way]
    with gpu("mps" if place == "mps" else "cuda"):
        if place == "no room for copies":
            monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (0, 2**33))
        there = pipeline(family)
        PLACES[place](there)
        if (family, place) not in unmixed:
            unmixed[family, place] = pictures_of(there)
        plain = unmixed[family, place]
        with MIXES[way](there, a, b):
            found = pictures_of(there)
        if mix := current(there):  # what lasted for a block has ended with it, the mix below it has not
            mix.undo()
        again = pictures_of(there)
    assert np.abs(found - wanted).mean() <= (0.003 if place == "fp16" else 1e-4)
    assert np.abs(found - plain).mean() > 0.003
    assert np.array_equal(again, plain)
