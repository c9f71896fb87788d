"""A step computed otherwise: fused, in parts, twice, in two processes, or with parts left out."""

import weakref

import pytest
import torch
from torch.testing import assert_close

from bench.runs_resume import run
from sfumato.files import read_lora, read_tensors
from sfumato.runs.run import Step
from sfumato.training.loss import objective
from sfumato.utils import randomness
from tests.dreambooth.subject import CLASS, PROMPT, STEPS, unet_of
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")


def test_what_led_to_a_loss_is_gone_before_the_next_is_computed(train, monkeypatch):
    """Where fp16 overflows, --fused does not go back through it a second time, which would let go of it."""
    losses, alive = objective.per_sample_losses, []

    def looked_at(*args, **options):
        assert [each() for each in alive] == [None] * len(alive)
        found = losses(*args, **options)
        alive.append(weakref.ref(found))
        return found

    monkeypatch.setattr(objective, "per_sample_losses", looked_at)

    def overflows(step, *_, **__):
        step.skipped = True
        return False

    monkeypatch.setattr(Step, "healthy", overflows)
    train("run", "--fused")
    assert len(alive) == STEPS


@pytest.mark.slow
@pytest.mark.parametrize("clip", [pytest.param("0", marks=pytest.mark.slow), "0.05"])
def test_fused_weights_are_those_of_the_plain_run(train, clip):
    plain, fused = train("plain", "--clip", clip), train("fused", "--clip", clip, "--fused")
    weights, others = unet_of(plain), unet_of(fused)
    assert all(torch.equal(tensor, others[name]) for name, tensor in weights.items())
    norms = [row["gradient_norm"] for row in log_beside(plain)]
    assert norms == [row["gradient_norm"] for row in log_beside(fused)]
    assert min(norms) > 0.05


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("--prior", "base")])
def test_what_is_dropped_of_a_lora_is_the_same_however_a_step_is_computed(options, train):
    """As one batch or two, with activations computed twice, or fused; of each step other updates are left out."""
    lora = ("--method", "lora", "--precision", "fp32", "--targets", "attention", *options)
    dropped = (*lora, "--dropout", "0.2", "--rank-dropout", "0.3", "--module-dropout", "0.4")
    whole, without = (
        read_tensors(train(name, *words, "--batch", "4")) for name, words in (("a", dropped), ("b", lora))
    )
    ups = [key for key in whole if key.endswith("lora_up.weight")]  # which began at 0
    size = sum(whole[key].square().sum() for key in ups).sqrt()

    def off(other):
        return sum((other[key] - whole[key]).square().sum() for key in ups).sqrt() / size

    assert off(without) > 0.1
    for name, *how in (("parts", "--accumulate", "2"), ("twice", "--batch", "4", "--gradient-checkpointing"),
                       ("fused", "--batch", "4", "--fused")):  # fmt: skip
        assert off(read_tensors(train(name, *dropped, *how))) < 0.01, name


def test_module_dropout_of_dreambooth_leaves_whole_updates_out_of_a_step(train):
    """What is left out of both steps is as it began."""
    found = read_lora(train("run", "--method", "lora", "--steps", "2", "--module-dropout", "0.5")).modules
    out = [
        {(part, path) for part, path in found if randomness.uniform(0, f"module dropout/{part}/{path}", step) < 0.5}
        for step in range(2)
    ]
    assert out[0] - out[1]
    assert {key for key, module in found.items() if not module.up.any()} == out[0] & out[1] != set()


@pytest.mark.slow
def test_checkpointing_accumulating_and_the_mean_on_the_cpu_change_no_weight(train, pocket_folder):
    """To rounding, which AdamW blows up where a gradient is almost 0: measured against how far the weights moved."""
    plain, start = unet_of(train("plain", "--batch", "4", "--ema", "0.5")), unet_of(pocket_folder)
    moved = sum((tensor - start[key]).square().sum() for key, tensor in plain.items()).sqrt()
    for name, *options in (("checkpointed", "--batch", "4", "--gradient-checkpointing", "--ema-on-cpu"),
                           ("parts", "--accumulate", "2")):  # fmt: skip
        other = unet_of(train(name, "--ema", "0.5", *options))
        assert sum((other[key] - tensor).square().sum() for key, tensor in plain.items()).sqrt() < 0.01 * moved


def test_the_mean_of_the_weights_is_what_is_saved(train):
    """After one step it is 0.9 of the way from the start, at which an update's `up` is 0."""
    one_step = ("--method", "lora", "--prior", "none", "--steps", "1")
    whole, mean = read_tensors(train("whole", *one_step)), read_tensors(train("mean", *one_step, "--ema", "0.75"))
    ups = [key for key in whole if key.endswith("lora_up.weight")]
    assert any(whole[key].any() for key in ups)
    for key in ups:
        assert_close(mean[key], 0.9 * whole[key])


@pytest.mark.slow
def test_two_processes_draw_one_class_and_give_the_result_of_one(train, pocket_folder, pictures, tmp_path):
    """Two CPU processes: one global batch of 4, to rounding."""
    one = train("one", "--batch", "4", "--method", "lora", "--save", "lora", "--precision", "fp32")
    words = ["train", "dreambooth", "--prior-prompts", "", "--images", str(pictures), "--output", str(tmp_path / "two")]
    words += ["--base", str(pocket_folder), "--class-name", CLASS, "--instance-prompt", PROMPT, "--steps", str(STEPS)]
    words += ["--batch", "2", "--learning-rate", "1e-3", "--rank", "2", "--method", "lora", "--class-count", "3"]
    words += ["--sample-every", "0", "--measure-every", "2", "--precision", "fp32"]
    # A cache of its own: both processes draw.
    log = tmp_path / "log"
    assert run(words, log=log, processes=2) == 0, log.read_text()[-2000:]
    assert len(list((tmp_path / "two/class").glob("*/*.png"))) == 3
    whole, parts = read_tensors(one), read_tensors(tmp_path / "two" / "two.safetensors")
    ups = [key for key in whole if key.endswith("lora_up.weight")]  # which began at 0
    off = sum((parts[key] - whole[key]).square().sum() for key in ups).sqrt()
    assert off < 0.01 * sum(whole[key].square().sum() for key in ups).sqrt()
