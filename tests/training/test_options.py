"""Options that trainers share: unset ones are filled in a known order, senseless ones refused before anything loads."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from sfumato.trainers import dreambooth, lora, textual_inversion

from sfumato.config import parse
from sfumato.data import ExampleSet
from sfumato.data.folder import Example
from sfumato.errors import ConfigError
from sfumato.models.family import FAMILIES
from sfumato.runs.options import persistent_config
from sfumato.training.checks import check_name, check_trainer, only_with
from sfumato.training.config_defaults import resolve, resolve_learning_rate, span_of
from sfumato.training.options import BaseOptions, DataOptions, TrainerOptions


@dataclass(frozen=True, kw_only=True)
class Config(TrainerOptions):
    rank: int | None = None
    word_learning_rate: float | None = None
    over_steps: str | None = None


CONFIG = Config(images=Path("pictures"), output=Path("runs/line"))
ALL_GIVEN = replace(
    CONFIG,
    trigger="zwx",
    caption="{caption}, {trigger}",
    caption_lines=True,
    wildcards=True,
    caption_dropout=0.25,
    resolution=96,
    flip=True,
    crop="random",
    shuffle_tags=True,
    keep_tags=2,
    tag_dropout=0.5,
    cache=Path("cache"),
    mask="alpha",
    inpaint_whole_share=0.5,
    validation_split=0.25,
    skip_bad=True,
    base="tiny",
    precision="bf16",
    device="cuda:1",
    quantize="int8",
    attention="xformers",
    gradient_checkpointing=True,
    clip_skip=1,
    max_tokens=150,
    vae="another",
    prediction_type="epsilon",
    zero_terminal_snr=True,
)
"""Where every option of the pictures and of the base is another than its default."""


def pictures_of(count):
    """So many, of which nobody looks at more."""
    return ExampleSet(tuple(Example(Path(f"{place}.png"), "a dog") for place in range(count)))


BASE = SimpleNamespace(defaults=FAMILIES["sd1"].defaults, alpha_bar=range(1000))


def test_what_is_given_wins_over_the_method_and_the_method_over_the_family():
    config, filled = resolve(replace(CONFIG, batch=3), BASE, pictures_of(16), 1, batch=7, steps=99)
    assert (config.batch, config.steps, config.rank) == (3, 99, FAMILIES["sd1"].defaults.rank)
    assert "batch" not in filled
    assert {"steps", "rank"} <= set(filled)


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("caption_dropout", 1.1, "--caption-dropout is 1.1; it must be 0 to 1."),
        ("tag_dropout", -0.1, "--tag-dropout is -0.1; it must be 0 to 1."),
        ("ema", 1.0, "--ema is 1.0; it must be at least 0 and below 1."),
        ("learning_rate", 0.0, "--learning-rate is 0.0; it must be a positive number."),
    ],
)
def test_numbers_out_of_their_range_are_refused(field, value, said):
    with pytest.raises(ConfigError) as refused:
        check_trainer(replace(CONFIG, **{field: value}))
    assert str(refused.value) == said


def test_all_captions_may_be_dropped():
    check_trainer(replace(CONFIG, caption_dropout=1.0, tag_dropout=1.0))


def test_a_warm_up_longer_than_the_run_is_refused():
    with pytest.raises(ConfigError, match="--warmup 20 is longer than the 10 steps"):
        resolve(replace(CONFIG, steps=10, warmup=20.0), BASE, pictures_of(16), 1)


def test_a_warm_up_below_one_is_a_share_of_the_steps():
    """As in sd-scripts' get_scheduler_fix, which cuts off what is left of a step."""
    for share, steps in ((0.1, 10), (0.1, 19), (0.99, 10), (0.001, 10)):
        found = resolve(replace(CONFIG, steps=steps, warmup=share), BASE, pictures_of(16), 1)[0]
        assert repr(found.warmup) == str(int(share * steps))
    by_epochs = resolve(replace(CONFIG, epochs=5, steps=None, batch=4, warmup=0.25), BASE, pictures_of(16), 1)[0]
    assert (by_epochs.steps, by_epochs.warmup) == (20, 5)
    # As a command line has it.
    assert repr(resolve(replace(CONFIG, steps=10, warmup=1.0), BASE, pictures_of(16), 1)[0].warmup) == "1"
    with pytest.raises(
        ConfigError, match=r"--warmup 1\.5: wanted whole steps, or below 1 a share of the run's steps\."
    ):
        check_trainer(replace(CONFIG, warmup=1.5))


def test_more_falls_of_the_rate_than_the_steps_hold_are_refused():
    """Of as many cycles as steps each would stay at its peak."""
    for warmup, most in ((0, 5), (3, 3)):
        given = replace(CONFIG, steps=10, warmup=warmup)
        assert resolve(replace(given, cycles=most), BASE, pictures_of(16), 1)[0].cycles == most
        with pytest.raises(ConfigError, match=f"--cycles {most + 1}: in 10 steps.* can fall {most} times at most"):
            resolve(replace(given, cycles=most + 1), BASE, pictures_of(16), 1)
    assert resolve(replace(CONFIG, steps=1), BASE, pictures_of(16), 1)[0].cycles == 1
    assert resolve(replace(CONFIG, steps=2, cycles=50, resume=True), BASE, pictures_of(16), 1)[0].cycles == 50


def test_a_weighting_of_timesteps_replaces_the_familys():
    assert resolve(CONFIG, BASE, pictures_of(16), 1)[0].min_snr == 5.0
    config, _ = resolve(replace(CONFIG, debiased=True), BASE, pictures_of(16), 1)
    assert (config.min_snr, config.loss().debiased) == (0.0, True)
    check_trainer(config)
    with pytest.raises(ConfigError, match="--debiased and --min-snr both weight the timesteps"):
        check_trainer(replace(CONFIG, debiased=True, min_snr=5.0))


def test_cycles_of_a_rate_that_stays_are_refused():
    check_trainer(replace(CONFIG, cycles=3, schedule="linear"))
    with pytest.raises(ConfigError, match="--cycles has no effect without --schedule cosine or linear"):
        check_trainer(replace(CONFIG, cycles=3, schedule="constant"))
    with pytest.raises(ConfigError, match="--cycles is 0; it must be at least 1"):
        check_trainer(replace(CONFIG, cycles=0))


def test_a_repository_that_the_hub_cannot_have_is_refused_before_the_training():
    check_trainer(replace(CONFIG, push_to_hub="me/line"))
    with pytest.raises(ConfigError, match=r"--push-to-hub not a repo!!/x/y: no repository of the hub"):
        check_trainer(replace(CONFIG, push_to_hub="not a repo!!/x/y"))


def test_steps_of_the_run_are_not_those_of_the_command_line():
    with pytest.raises(ConfigError, match=r"both given \(the run has its steps already\)"):
        check_trainer(replace(CONFIG, steps=10, epochs=3, resume=True))


def test_epochs_become_steps_of_the_global_batch():
    """10 passes over 24 samples, 2 pictures x 3 accumulated x 2 processes a step: 20 steps."""
    config, _ = resolve(replace(CONFIG, epochs=10, batch=2, accumulate=3), BASE, pictures_of(24), 2)
    assert (config.steps, config.epochs) == (20, None)


@pytest.mark.parametrize(
    ("samples", "batch", "epochs", "steps"), [(10, 4, 1, 3), (5, 2, 1, 3), (10, 4, 2, 5), (3, 8, 1, 1)]
)
def test_the_last_step_of_epochs_that_do_not_divide_is_taken(samples, batch, epochs, steps):
    config, _ = resolve(replace(CONFIG, epochs=epochs, batch=batch), BASE, pictures_of(samples), 1)
    assert config.steps == steps


def test_looks_and_checkpoints_come_four_times_unless_told():
    config, _ = resolve(replace(CONFIG, steps=10, sample_every=0), BASE, pictures_of(16), 1)
    assert (config.sample_every, config.measure_every, config.checkpoint_every) == (0, 3, 3)


def test_a_long_run_loses_at_most_a_thousand_steps():
    config, _ = resolve(replace(CONFIG, steps=100_000), BASE, pictures_of(16), 1)
    assert (config.sample_every, config.measure_every, config.checkpoint_every) == (25_000, 25_000, 1000)
    config, _ = resolve(replace(CONFIG, steps=100_000, checkpoint_every=9000), BASE, pictures_of(16), 1)
    assert config.checkpoint_every == 9000


def test_prodigys_rate_is_a_factor_of_one():
    assert resolve(replace(CONFIG, optimizer="prodigy"), BASE, pictures_of(16), 1)[0].learning_rate == 1.0
    assert (
        resolve(replace(CONFIG, optimizer="prodigy", learning_rate=0.5), BASE, pictures_of(16), 1)[0].learning_rate
        == 0.5
    )


def test_an_adapter_asks_for_the_steps_that_were_given_or_learned_where_these_are_not_all():
    assert span_of(CONFIG, BASE) is None
    assert span_of(replace(CONFIG, over_steps="0-0.8"), BASE) == (0.0, 0.8)
    learned = replace(CONFIG, min_timestep=200, max_timestep=900)
    assert span_of(learned, BASE) == (1 - 900 / 999, 1 - 200 / 999)
    assert span_of(replace(learned, over_steps="0-1"), BASE) is None
    assert span_of(replace(CONFIG, min_timestep=999), BASE) == (0.0, 1 / 999)  # the first step alone


def test_with_prodigy_all_that_learns_has_one_rate():
    config = replace(CONFIG, optimizer="prodigy", learning_rate=0.5)
    assert resolve_learning_rate(config, "word_learning_rate", 0.02) == 0.5
    assert resolve_learning_rate(replace(config, word_learning_rate=0.5), "word_learning_rate", 0.02) == 0.5
    with pytest.raises(ConfigError, match=r"--word-learning-rate 0.1 beside --learning-rate 0.5: prodigy"):
        resolve_learning_rate(replace(config, word_learning_rate=0.1), "word_learning_rate", 0.02)
    others = replace(config, optimizer="adamw")
    assert resolve_learning_rate(others, "word_learning_rate", 0.02) == 0.02
    assert resolve_learning_rate(replace(others, word_learning_rate=0.1), "word_learning_rate", 0.02) == 0.1


@pytest.mark.parametrize("rank", [0, 2**31, 10**23])
def test_a_number_that_cannot_be_counted_out_is_refused(rank):
    with pytest.raises(ConfigError, match=f"--rank is {rank}; it must be "):
        check_trainer(replace(CONFIG, rank=rank))


@pytest.mark.parametrize("name", ["class", "Images", "adapters", "checkpoints", "config.toml"])
def test_a_folder_of_a_run_s_own_is_no_name_for_a_folder_that_is_learned(name):
    """Wherever the name is from; a file of the name would be NAME.safetensors, and lies beside it."""
    by_name, by_output = replace(CONFIG, name=name), replace(CONFIG, output=Path("runs") / name)
    for config, option in ((by_name, "--name"), (by_output, "--output")):
        with pytest.raises(ConfigError, match=f"{option} '{name}': it is what a run calls"):
            check_name(config, folder=True)
    check_name(by_output)
    check_name(replace(CONFIG, output=Path("runs/class-1")), folder=True)


def test_what_has_no_effect_is_refused_where_it_is_given_and_a_run_begins():
    only_with(CONFIG, "--words", "word_learning_rate")
    given = replace(CONFIG, word_learning_rate=0.1)
    with pytest.raises(ConfigError, match="--word-learning-rate has no effect without --words"):
        only_with(given, "--words", "word_learning_rate")
    only_with(replace(given, resume=True), "--words", "word_learning_rate")


def test_permissions_of_one_call_are_not_written_down():
    before = replace(CONFIG, overwrite=True, force=True, dry_run=True, finish=True)
    assert persistent_config(before) == CONFIG


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"steps": 0}, "--steps is 0"),
        ({"steps": 5, "epochs": 5}, "--steps and --epochs"),
        ({"resume": True, "overwrite": True}, "--resume and --overwrite"),
        ({"resume": True, "dry_run": True}, "--resume and --dry-run"),
        ({"finish": True}, "--finish ends a run that was stopped"),
        ({"learning_rate": float("nan")}, "--learning-rate is nan"),
        ({"ema": 1.0}, "--ema is 1.0"),
        ({"weight_decay": -0.1}, "--weight-decay is -0.1"),
        ({"checkpoint_every": -1}, "--checkpoint-every is -1"),
        ({"rank": 0}, "--rank is 0"),
        *[({"word_learning_rate": rate}, f"--word-learning-rate is {rate}") for rate in (-1.0, 0.0, float("nan"))],
    ],
)
def test_senseless_numbers_are_refused_by_name(changes, said):
    with pytest.raises(ConfigError, match=said):
        check_trainer(replace(CONFIG, **changes))


def test_a_plain_config_passes():
    check_trainer(CONFIG)


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ("a crab --w 99992 --h 99992", "99992x99992 pixels: wanted at most as many as 8192x8192 has"),
        ("a crab --w 500", "--w 500 in a prompt: wanted a multiple of 8; the nearest is 496"),
        ("a crab --ar 3:2", "the prompt 'a crab': --ar is not read there"),
        ("a crab --s 0", "0 steps; wanted at least 1"),
        ("a crab --d -1", "seed -1"),
    ],
)
def test_settings_of_a_sample_prompt_that_make_no_sense_are_refused(prompt, said):
    with pytest.raises(ConfigError, match=said):
        check_trainer(replace(CONFIG, sample_prompts=(prompt,)))


def test_sample_prompts_have_settings_of_their_own():
    config = replace(CONFIG, sample_prompts=("a crab --n blurry --w 512 --d 7", "a crab -- at the sea"))
    check_trainer(config)
    own = [{"negative": "blurry", "width": 512, "seed": 7}, {}]
    assert config.asked_samples() == (["a crab", "a crab -- at the sea"], own)


@pytest.mark.parametrize("trainer", [lora, dreambooth, textual_inversion])
def test_sample_prompts_are_those_of_a_file(trainer, tmp_path):
    (tmp_path / "prompts.txt").write_text("# at the sea\na crab --w 512\n\nan owl\n")
    more = [] if trainer is lora else ["--class-name" if trainer is dreambooth else "--placeholder", "<x>"]
    words = ["--images", "a", "--output", "b", *more, "--sample-prompts", str(tmp_path / "prompts.txt")]
    config = parse(trainer.Config, [*words, "--sample-prompts", "a fox"], program="train x")
    assert config.sample_prompts == ("a crab --w 512", "an owl", "a fox")
    assert config.asked_samples() == (["a crab", "an owl", "a fox"], [{"width": 512}, {}, {}])
    (tmp_path / "prompts.txt").write_text("another")
    assert replace(config, steps=1).sample_prompts == config.sample_prompts


def test_a_tag_in_a_sample_prompt_is_refused():
    with pytest.raises(ConfigError, match=r"--sample-prompts: <lora:line:...> is not read here; leave it out"):
        check_trainer(replace(CONFIG, sample_prompts=("a crab <lora:line:1>",)))


def test_a_run_among_the_pictures_that_it_learns_from_is_refused(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "dataset.toml").write_text('[[source]]\npath = "."')
    config = replace(CONFIG, images=tmp_path, output=tmp_path / "." / "", caption="a dog")
    for images in (tmp_path, tmp_path / "dataset.toml"):
        with pytest.raises(ConfigError, match=r"is a folder of the images; .* such as runs/test_a_run_among"):
            replace(config, images=images).read_examples()
    replace(config, output=tmp_path / "runs").read_examples()


@pytest.fixture
def recorded(monkeypatch):
    """What a function that is replaced is called with, by name; it gives back `made`."""

    def record(function, made=None):
        given = {}
        monkeypatch.setattr(function, lambda *first, **named: given.update(named, first=first) or made)
        return given

    return record


def test_every_option_has_another_value_than_its_default():
    known = [field for group in (DataOptions, BaseOptions) for field in fields(group)]
    assert [field.name for field in known if getattr(ALL_GIVEN, field.name) == field.default] == []


def test_every_option_of_the_pictures_reaches_what_reads_them(recorded):
    pictures = pictures_of(4)
    given = recorded("sfumato.data.read_folder", pictures)
    read = replace(ALL_GIVEN, resume=True).read_examples(["<x>", "<y>"], of_class=False)
    assert len(read) == 4
    assert len(read.in_group("validation")) == 1
    assert given == {
        "first": (Path("pictures"),),
        "caption_template": "{caption}, {trigger}",
        "trigger": "zwx",
        "mask": "alpha",
        "skip_bad": True,
        "caption_lines": True,
        "wildcards": True,
        "words": "<x> <y>",
        "of_class": False,
    }


def test_every_option_of_the_pictures_reaches_what_prepares_them(recorded):
    given = recorded("sfumato.data.prepare", "prepared")
    draws = (3, 10, 4)
    base = SimpleNamespace(inpaints=True)
    assert ALL_GIVEN.prepare("examples", base, embed_text=False, will_draw=draws, drawn_over=True) == "prepared"
    assert given.pop("progress") is not None
    assert given.pop("say") is not None
    assert given == {
        "first": ("examples", base),
        "resolution": 96,
        "flip": True,
        "crop": "random",
        "caption_dropout": 0.25,
        "shuffle_tags": True,
        "keep_tags": 2,
        "tag_dropout": 0.5,
        "cache": Path("cache"),
        "inpaint_whole_share": 0.5,
        "embed_text": False,
        "will_draw": draws,
        "drawn_over": True,
    }
    ALL_GIVEN.prepare("examples", base, flip=False, cache=None)
    assert (given["flip"], given["cache"], given["crop"]) == (False, None, "random")


def test_every_option_of_the_base_reaches_what_loads_it(recorded):
    made = SimpleNamespace(denoiser=SimpleNamespace(config={}))
    learned = []
    precision = SimpleNamespace(device=SimpleNamespace(type="cuda"), prepare_for_training=learned.append)
    given = recorded("sfumato.models.load_base", made)
    assert ALL_GIVEN.load_base(precision) is made
    assert given == {
        "first": ("tiny",),
        "precision": precision,
        "clip_skip": 1,
        "max_tokens": 150,
        "vae": "another",
        "prediction_type": "epsilon",
        "zero_terminal_snr": True,
        "unet": False,
    }
    assert learned == [made.denoiser]


@pytest.mark.parametrize(("processes", "device"), [(1, "cuda:1"), (2, "cuda:0")])
def test_every_option_of_the_precision_reaches_its_decision(processes, device, recorded):
    """Of several processes each has a device of its own."""
    applied = []
    decided = SimpleNamespace(apply=lambda: applied.append(True), compute=torch.bfloat16)
    given = recorded("sfumato.precision.decide", decided)
    ALL_GIVEN.decide_precision(
        SimpleNamespace(count=processes, device="cuda:0", is_everywhere=lambda _: True), "adafactor", adapting=False
    )
    assert given == {
        "first": ("bf16",),
        "device": device,
        "attention": "xformers",
        "gradient_checkpointing": True,
        "optimizer": "adafactor",
        "adapting": False,
        "quantized": "int8",
    }
    assert applied == [True]


@pytest.mark.parametrize("asked", [True, False])
def test_activations_are_computed_again_where_that_is_asked_for(asked, pocket_folder):
    config = replace(CONFIG, base=str(pocket_folder), device="cpu", gradient_checkpointing=asked)
    base = config.load_base(config.decide_precision(SimpleNamespace(count=1)))
    base.lazy_weights.load_only("unet")
    assert base.unet.is_gradient_checkpointing == asked
