"""`--optimizer-args`: what optimizers are told, and what they are not."""

import importlib.util
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from bench.runs_resume import command, make_inputs
from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.files.header import read_header
from sfumato.runs.checkpoints import CheckpointedParts
from sfumato.training.checks import check_trainer
from sfumato.training.optim import optimizers
from sfumato.training.optim.settings import DEFAULTS, settings
from sfumato.training.options import TrainerOptions

PACKAGES = {"prodigy": "prodigyopt", "lion": "lion_pytorch", "adamw8bit": "bitsandbytes"}
GIVEN = {
    "adamw": {"betas": (0.8, 0.95), "eps": 1e-6},
    "adamw8bit": {"betas": (0.8, 0.95), "eps": 1e-6},
    "prodigy": {"betas": (0.8, 0.95), "eps": 1e-6, "d0": 1e-5, "d_coef": 2.0, "growth_rate": 1.5}
    | {"safeguard_warmup": False, "use_bias_correction": False},
    "lion": {"betas": (0.8, 0.95)},
    "adafactor": {"eps": (1e-20, 1e-4), "clip_threshold": 2.0, "decay_rate": -0.5, "scale_parameter": True},
    "muon": {"momentum": 0.5},
}


def built(name, args=(), weight=None):
    if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
        pytest.skip(f"{PACKAGES[name]} is not installed")
    weight = nn.Parameter(torch.ones(2, 3)) if weight is None else weight
    return optimizers.build_optimizer(name, [{"params": [weight], "lr": 0.1}], weight_decay=0.0, args=args)


def written(given):
    return [
        f"{key}={','.join(map(str, value)) if isinstance(value, tuple) else str(value)}" for key, value in given.items()
    ]


@pytest.mark.parametrize("name", GIVEN)
def test_what_is_given_reaches_the_optimizer(name):
    assert GIVEN[name].keys() == DEFAULTS[name].keys()
    (usual,), (group,) = (built(name, args).param_groups for args in ((), written(GIVEN[name])))
    for key, value in GIVEN[name].items():
        assert group[key] == value != DEFAULTS[name][key]
        assert usual[key] == DEFAULTS[name][key]


def test_adamw_steps_by_the_betas_and_the_eps_that_are_given():
    """Algorithm 2 of Loshchilov & Hutter 2019."""
    torch.manual_seed(0)
    p, mean, square = nn.Parameter(torch.zeros(4)), torch.zeros(4), torch.zeros(4)
    optimizer, wanted = built("adamw", ["betas=0.5,0.9", "eps=0.01"], p), torch.zeros(4)
    for step in range(1, 4):
        p.grad = torch.randn(4)
        mean, square = 0.5 * mean + 0.5 * p.grad, 0.9 * square + 0.1 * p.grad.square()
        wanted = wanted - 0.1 * mean / (1 - 0.5**step) / ((square / (1 - 0.9**step)).sqrt() + 0.01)
        optimizer.step()
        assert_close(p.data, wanted)


@pytest.mark.parametrize("text", ["betas=(0.9, 0.95)", " betas = 0.9,0.95 ", "betas=[0.9,0.95]"])
def test_pairs_are_read_as_recipes_write_them(text):
    assert settings("adamw", [text])["betas"] == (0.9, 0.95)


def test_what_recipes_of_other_tools_state_though_it_is_always_so_is_taken():
    recipe = ["decouple=True", "use_bias_correction=True", "safeguard_warmup=true", "d_coef=2"]
    assert settings("prodigy", recipe) == {**DEFAULTS["prodigy"], "d_coef": 2.0}
    recipe = ["scale_parameter=False", "relative_step=False", "warmup_init=False"]
    assert settings("adafactor", recipe) == DEFAULTS["adafactor"]


@pytest.mark.parametrize(
    ("name", "args", "said"),
    [
        ("prodigy", ["dcoef=2"], " 'dcoef=2': prodigy has no such setting; did you mean d_coef?"),
        ("lion", ["gamma=2"], " 'gamma=2': lion has no such setting; known: betas."),
        ("adamw", ["weight_decay=0.1"], " 'weight_decay=0.1': that is an option here, --weight-decay 0.1."),
        ("prodigy", ["decouple=False"], " 'decouple=False': decouple is always True here; leave it out."),
        ("adamw", ["eps=1e-6", "eps=1e-7"], ": eps is given twice; leave one of them."),
        ("adamw", ["betas=0.9"], " 'betas=0.9': wanted two numbers at least 0 and below 1, such as betas=0.9,0.99."),
        (
            "adamw",
            ["betas=0.9,1"],
            " 'betas=0.9,1': wanted two numbers at least 0 and below 1, such as betas=0.9,0.99.",
        ),
        ("muon", ["momentum"], " 'momentum=': wanted a number at least 0 and below 1, such as momentum=0.9."),
        ("adamw", ["eps=nan"], " 'eps=nan': wanted a number above 0, such as eps=1e-08."),
        ("adafactor", ["decay_rate=0.8"], " 'decay_rate=0.8': wanted a number below 0, such as decay_rate=-0.8."),
        ("prodigy", ["growth_rate=1"], " 'growth_rate=1': wanted a number above 1, such as growth_rate=inf."),
        ("adafactor", ["scale_parameter=1"], " 'scale_parameter=1': wanted true or false."),
    ],
)
def test_what_an_optimizer_cannot_be_told_is_refused_before_anything_is_loaded(name, args, said):
    config = TrainerOptions(images=Path("i"), output=Path("runs/o"), optimizer=name, optimizer_args=tuple(args))
    with pytest.raises(ConfigError) as refused:
        check_trainer(config)
    assert str(refused.value) == f"--optimizer-args{said}"


def test_settings_changed_by_force_count_where_a_run_goes_on():
    """A checkpoint holds all settings of its optimizer; of those that can be given it is the given ones that hold."""
    parts = CheckpointedParts()
    parts.parts["optimizer"] = after = built("adamw", ["betas=0.5,0.6"])
    parts.load({"optimizer": built("adamw", ["eps=1e-3"]).state_dict()}, 1)
    assert (after.param_groups[0]["betas"], after.param_groups[0]["eps"]) == ((0.5, 0.6), 1e-8)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("case", ["lora", "dreambooth lora", "textual_inversion"])
def test_every_trainer_hands_them_on(case, tmp_path):
    words = command(case, make_inputs(tmp_path), tmp_path / "run", "--steps", "1", "--checkpoint-every", "1")
    assert cli.main([*words, "--optimizer-args", "betas=0.5,0.625"]) == 0
    state = (tmp_path / "run/checkpoints/000001/state.json").read_text()
    assert "[0.5, 0.625]" in state
    (saved,) = (tmp_path / "run").glob("*.safetensors")
    assert read_header(saved).metadata["ss_optimizer"] == "adamw(betas=0.5,0.625)" or case == "textual_inversion"
