"""What a step will take of memory: the same count as of a real step's tensors, and the base stays as it was."""

import copy
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest

from sfumato import cli, load_base
from sfumato.adapters import ByLayer, Kind, attach, target_layers
from sfumato.precision import choices, decide, forecast_precision
from sfumato.precision.layers import save_activation_memory
from sfumato.precision.quantization import Quantized, quantize
from sfumato.training import memory
from sfumato.training.memory import (
    RUNTIME_BYTES,
    TRAININGS,
    MemorySetting,
    TrainingTask,
    drawing_memory,
    encoding_memory,
    fake_base,
    samples_at_once,
    step_memory,
)

ON_CPU = MemorySetting("cpu", forecast_precision("auto", "cpu", adapting=False), 64, 1, 4)
BY_OPTIONS = {way.options: way for way in TRAININGS}
LORA = "lora --targets cross-attention"


@pytest.fixture(scope="module")
def shapes():
    return fake_base("pocket", "cpu")


@pytest.mark.parametrize(
    ("name", "checkpointing"),
    [
        ("textual_inversion", False),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("lora --targets everything", False),
                ("lora --targets everything", True),
                ("dreambooth --method full", False),
                ("dreambooth --method full", True),
                ("textual_inversion", True),
            )
        ),
    ],
)
def test_it_is_what_a_step_of_real_tensors_takes(name, checkpointing, shapes):
    way = replace(BY_OPTIONS[name], pictures=2)
    setting = replace(ON_CPU, checkpointing=checkpointing)
    base = load_base("pocket", precision=decide("fp32", device="cpu", gradient_checkpointing=checkpointing))
    save_activation_memory(base.unet)
    base.unet.requires_grad_(way.trained == "whole")
    learned = [] if way.trained == "words" else list(base.unet.parameters())
    if way.trained == "lora":
        learned = list(attach(target_layers(base.parts(text=False), way.targets), rank=4, alpha=4.0).parameters())
    real = memory._step(base, way, setting, learned)
    told = step_memory(shapes, way, setting)
    assert told.alive == pytest.approx(real.peak_with_gradients, rel=1e-3)
    assert told.fused == pytest.approx(real.peak, rel=1e-3)
    assert told.trained == tuple(weight.shape for weight in learned)


@pytest.mark.slow
def test_weights_and_state_are_counted(shapes):
    way = BY_OPTIONS["dreambooth --method full"]
    step = step_memory(shapes, way, ON_CPU)
    numbers = sum(weight.numel() for weight in shapes.unet.parameters())
    assert sum(shape.numel() for shape in step.trained) == numbers
    assert step.weights == 4 * numbers
    fused = replace(way, fused=True, optimizer="adamw8bit")
    assert step.total(way, "cpu") - step.total(fused, "cpu") == step.alive - step.fused + 6 * numbers
    assert step.alive - step.fused > 2 * numbers  # most of the gradients, beside what is alive near the end


def state_of(base):
    """What `step_memory` must leave as it was."""
    parts = [base.unet, base.vae, *base.text_encoders]
    return [
        *((t.is_meta, t.shape, t.dtype, t.requires_grad) for m in parts for t in [*m.parameters(), *m.buffers()]),
        *((len(m._forward_hooks), len(m._forward_pre_hooks)) for part in parts[:2] for m in part.modules()),
        base.unet.is_gradient_checkpointing,
    ]


@pytest.mark.slow
@pytest.mark.parametrize("device", ["gpu", "cpu"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_ways_of_every_family(family, device, family_folder):
    """Those that between them have everything a way may have: words, adapters, the whole U-Net, text encoders.

    `lora` is `--train-words` without the text encoders, and DreamBooth's LoRA `--targets everything` with two pictures.
    """
    base = fake_base(family_folder(family), device)
    setting = MemorySetting(device, forecast_precision("auto", device, adapting=False), 64, 1, 4)
    before = state_of(base)
    names = ("textual_inversion", "lora --targets everything", f"{LORA} --train-words", "dreambooth --method full")
    for way in (BY_OPTIONS[name] for name in names):
        one = step_memory(base, way, setting)
        two = step_memory(base, way, replace(setting, batch=2))
        lean = step_memory(base, way, replace(setting, checkpointing=True))
        assert 0 < lean.fused < one.fused < two.fused
        assert one.weights == two.weights
    four, one = (encoding_memory(base, replace(setting, side=side)) - RUNTIME_BYTES[device] for side in (512, 1024))
    assert 0.5 * one < four  # at once
    assert drawing_memory(base, setting) < drawing_memory(base, setting, samples_at_once(base, setting))
    assert state_of(base) == before


@pytest.mark.slow
def test_a_gpu_in_half_precision_keeps_less_than_in_fp32():
    base = fake_base("pocket", "gpu")
    way = BY_OPTIONS[LORA]
    half, full = (
        step_memory(base, way, MemorySetting("gpu", forecast_precision(name, "gpu", adapting=True), 64, 4, 4))
        for name in ("fp16", "fp32")
    )
    assert half.fused < full.fused
    assert half.weights < 0.6 * full.weights


@pytest.mark.slow
def test_convolutions_of_a_lower_rank_train_fewer_numbers(shapes):
    way = TrainingTask("", "lora", targets="mid_block.*(conv1|to_q)$")
    steps = (step_memory(shapes, way, replace(ON_CPU, conv_rank=rank)) for rank in (4, 1))
    plain, own = (sum(shape.numel() for shape in step.trained) for step in steps)
    learned = attach(target_layers(shapes.parts(text=False), way.targets), rank=4, alpha=4.0, conv_rank=1)
    learned.detach()
    assert own == learned.count() < plain


@pytest.mark.slow
def test_layers_with_ranks_of_their_own_train_as_many_numbers_as_in_a_training(shapes):
    """A layer that is left out has none, and a name of no layer that a way to train adapts is passed over."""
    way = TrainingTask("", "lora", targets="mid_block.*(conv1|to_q|to_k)$")
    rules = ByLayer.of(SimpleNamespace(rank_of=("conv1=1", "to_k=0", "to_v=2")))
    found = step_memory(shapes, way, replace(ON_CPU, by_layer=rules))
    hosts = target_layers(shapes.parts(text=False), way.targets)["unet"]
    ranks = {path: 1 if path.endswith("conv1") else 4 for path in hosts if not path.endswith("to_k")}
    assert sum(shape.numel() for shape in found.trained) == sum(
        rank * (hosts[path].weight.shape[0] + hosts[path].weight[0].numel()) for path, rank in ranks.items()
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Kind("loha"), Kind("lokr", factor=4), Kind("lora", dora=True)])
def test_other_kinds_keep_no_matrix_between_the_passes(kind, shapes):
    """Theirs is of the weight's size, and made again for the way back: few are alive beside a LoRA's step."""
    way = TrainingTask("", "lora", targets="(conv1|conv2|ff.net.2)$")
    lora, other = (step_memory(shapes, way, replace(ON_CPU, kind=one)) for one in (Kind(), kind))
    adapted = target_layers(shapes.parts(text=False), way.targets)
    attached = attach(adapted, rank=4, alpha=4.0, kind=kind)
    attached.detach()
    assert other.trained == tuple(weight.shape for weight in attached.parameters())
    sizes = [4 * host.weight.numel() for some in adapted.values() for host in some.values()]
    assert other.alive - lora.alive < 8 * max(sizes) < sum(sizes)


@pytest.mark.slow
def test_the_kind_of_the_adapters_is_told_and_checked(monkeypatch, capsys):
    monkeypatch.setattr(memory, "TRAININGS", [BY_OPTIONS[LORA]])
    assert (
        cli.main(["memory", "--device", "cpu", "--algo", "lokr", "--factor", "8", "--dora", "--precision", "fp32"]) == 0
    )
    assert capsys.readouterr().out.startswith(
        "pocket (pocket), 64 px, batch 1, rank 16, lokr factor 8 with dora, fp32 on"
    )
    assert cli.main(["memory", "--factor", "8"]) == 2
    assert "--factor has no effect without --algo lokr" in capsys.readouterr().err
    assert cli.main(["memory", "--algo", "lokr", "--factor", "0"]) == 2
    assert "--factor 0: must be a number above 0" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["int8", "nf4"])
def test_of_each_large_weight_its_format_s_bytes_are_counted_instead_of_two(shapes, name):
    frozen = copy.deepcopy(shapes)
    quantize(frozen.unet, name)
    setting = replace(ON_CPU, precision=forecast_precision("bf16", "gpu", adapting=True))
    plain, ours = (step_memory(base, BY_OPTIONS[LORA], setting) for base in (shapes, frozen))
    layers = [each for each in frozen.unet.modules() if hasattr(each, "codes")]
    held = sum(tensor.nbytes for each in layers for tensor in each.held)
    assert plain.weights - ours.weights == sum(2 * each.shape.numel() for each in layers) - held
    assert ours.trained == plain.trained
    assert all(tensor.is_meta for each in layers for tensor in each.held)


def noted(work, formats):
    """The work, of which it is noted what its base is quantized to."""

    def noting(base, *given, **named):
        formats.append(next((each.format for each in base.unet.modules() if isinstance(each, Quantized)), None))
        return work(base, *given, **named)

    return noting


@pytest.mark.slow
def test_the_table_beside_a_quantized_u_net_tells_what_it_takes(pocket_folder, monkeypatch, capsys):
    full, drawing = "finetune --fused --optimizer adafactor", "drawing an image"
    monkeypatch.setattr(memory, "TRAININGS", [BY_OPTIONS[LORA], BY_OPTIONS[full]])
    monkeypatch.setattr(memory, "step_memory", noted(memory.step_memory, frozen := []))
    monkeypatch.setattr(memory, "drawing_memory", noted(memory.drawing_memory, drawn := []))
    words = ["memory", "--base", str(pocket_folder), "--device", "cpu", "--precision", "fp32", "--json"]
    found = []
    for more in ([], ["--quantize", "int8"], ["--quantize", "nf4"]):
        assert cli.main([*words, *more]) == 0
        found.append(json.loads(capsys.readouterr().out)["gib"])
    plain, eight, four = found
    assert plain.keys() == eight.keys() == four.keys() >= {LORA, full, drawing}
    assert frozen == [None] * 4 + ["int8", "int8", None, None] + ["nf4", "nf4", None, None]
    assert drawn == [None, None, "int8", "int8", "nf4", "nf4"]


@pytest.mark.slow
def test_the_table_marks_what_does_not_fit(monkeypatch, capsys):
    full = "dreambooth --method full"
    shown = [full, f"{full} --fused", f"{full} --fused --optimizer adamw8bit"]
    monkeypatch.setattr(memory, "TRAININGS", [BY_OPTIONS[name] for name in shown])
    monkeypatch.setattr(choices, "cpu_has_bf16", lambda: True)
    assert cli.main(["memory", "--device", "cpu", "--within", "0.95"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "pocket (pocket), 64 px, batch 1, rank 16, bf16 (fp32 where no adapter is trained) on a CPU"
    marked = [line for line in lines if "*" in line]
    assert [line.split("  ")[0] for line in marked[:-1]] == shown[:2]
    assert marked[-1] == "* more than 0.95 GiB"


@pytest.mark.slow
def test_the_table_as_json(pocket_folder, monkeypatch, capsys):
    monkeypatch.setattr(memory, "TRAININGS", [BY_OPTIONS["textual_inversion"]])
    assert cli.main(["memory", "--base", str(pocket_folder), "--device", "cpu", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["gib"]
    assert next(iter(told)) == "textual_inversion"
    assert [len(row) for row in told.values()] == [2, 1, 1, 1]
    assert list(told)[-1] == "drawing samples of a training, 4 at once"
    least = min(row[0] for row in told.values())
    assert cli.main(["memory", "--base", str(pocket_folder), "--device", "cpu", "--json", "--within", str(least)]) == 0
    again = json.loads(capsys.readouterr().out)
    assert again["more_than_within"] == [name for name, row in told.items() if row[0] > least]
    assert again["within"] == least


@pytest.mark.parametrize(
    ("name", "numbers", "texts"), [("sd1", 859_520_964, 1), ("sd2", 865_910_724, 1), ("sdxl", 2_567_463_684, 2)]
)
def test_a_family_by_its_name_has_its_published_shapes(name, numbers, texts):
    base = fake_base(name, "gpu")
    assert sum(weight.numel() for weight in base.unet.parameters()) == numbers
    assert len(base.text_encoders) == texts
    assert base.family.name == name
    assert base.token_limit == 75
    assert not any(p.requires_grad for part in (base.unet, base.vae, *base.text_encoders) for p in part.parameters())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "0"], "--batch 0: must be a number above 0."),
        (["--conv-rank", "0"], "--conv-rank 0: must be a number above 0."),
        (["--rank-of", "te=4"], "--rank-of te=4: names none of the"),
        (
            ["--rank-of", "attn2=0"],
            "--rank-of leaves out all that lora --targets cross-attention adapts (cross-attention); leave fewer out.",
        ),
        (["--within", "-1"], "--within -1: must be a number above 0."),
        (["--device", "cpu", "--precision", "fp16"], "--precision fp16: is for GPUs."),
        (["--base", "sd1", "--vae", "pocket"], "--vae pocket: --base sd1 names no model"),
        (["--base", "nowhere"], "--base nowhere: no model here, and no family."),
        (["--base", "no/where/at/all"], "no/where/at/all: there is no such folder or file, for a base or a VAE."),
    ],
)
def test_wrong_use_is_one_line(words, said, capsys):
    assert cli.main(["memory", *words]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
