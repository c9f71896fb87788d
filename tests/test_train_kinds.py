"""LoHa, LoKr and DoRA through the trainers: equal to plain loops, gone on with to the bit, read by our commands."""

import copy
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from sfumato import cli, data
from sfumato.adapters import Kind, attach, select
from sfumato.adapters.tuners.lora import weight_norm
from sfumato.files import read_adapter, read_header, read_tensors
from sfumato.models import diffusion, load_base
from sfumato.models.family import FAMILIES
from sfumato.precision import decide
from sfumato.utils import randomness
from tests.logged import log_beside

pytestmark = pytest.mark.usefixtures("quick")
SOME = r"mid_block.*(attn2\.to_q|proj_in|conv1)$"


@pytest.fixture
def train(pocket_folder, pictures, tmp_path):
    """Train with these options on the tiny base; returns the adapter's path."""

    def run(name, *options, program="lora", flags=()):
        words = {"--images": str(pictures), "--output": str(tmp_path / name), "--base": str(pocket_folder)}
        words |= {"--steps": "4", "--batch": "2", "--rank": "2", "--learning-rate": "1e-2", "--sample-every": "0"}
        words |= {"--measure-every": "0", "--checkpoint-every": "0"}
        words |= {"--caption": "{caption}"} if program == "lora" else {"--method": "lora", "--class-name": "square"}
        words |= dict(zip(options[::2], options[1::2], strict=True))
        words |= {"--learn": "plain"} if program == "lora" else {}
        assert cli.main(["train", program, *(word for pair in words.items() for word in pair), *flags]) == 0
        return tmp_path / name / f"{name}.safetensors"

    return run


def peft_layers(unet: nn.Module, kind: Kind, rank: int):
    """peft's LoHa or LoKr of a U-Net's cross-attention, which begins where ours does; by name, and what they learn."""
    from peft import LoHaConfig, LoKrConfig, inject_adapter_in_model

    start = attach({"unet": select(unet, "cross-attention")}, rank=rank, alpha=float(rank), seed=3, kind=kind)
    start.detach()
    names = [name for _, name in start.layers]
    settings = LoHaConfig if kind.algo == "loha" else LoKrConfig
    inject_adapter_in_model(settings(r=rank, alpha=rank, target_modules=names), unet)
    layers = {name: unet.get_submodule(name) for name in names}
    for (_, name), ours in start.layers.items():
        for tensor, value in ours.state_dict().items():
            known = {"w2.0": "w2" if "w2.1" not in ours.state_dict() else "w2_a", "w2.1": "w2_b"}
            prefix = "hada" if kind.algo == "loha" else "lokr"
            getattr(layers[name], f"{prefix}_{known.get(tensor, tensor)}")["default"].data.copy_(value)
    return lambda: {name: layer.get_delta_weight("default") for name, layer in layers.items()}


def dora_layers(unet: nn.Module, kind: Kind, rank: int):
    """The paper's formula in place of the layers: m (W + B A) / ||W + B A||, a constant norm, of columns."""
    start = attach({"unet": select(unet, "cross-attention")}, rank=rank, alpha=float(rank), seed=3, kind=kind)
    start.detach()
    weights = {}

    class Decomposed(nn.Module):
        def __init__(self, host, down):
            super().__init__()
            self.weight, self.bias = host.weight, host.bias
            self.down, self.up = nn.Parameter(down.clone()), nn.Parameter(torch.zeros(len(host.weight), rank))
            self.shift = nn.Parameter(torch.zeros(1, host.in_features))

        def changed(self):
            direction = self.weight + self.up @ self.down
            return (weight_norm(self.weight) + self.shift) * direction / direction.norm(dim=0, keepdim=True).detach()

        def forward(self, x):
            return nn.functional.linear(x, self.changed(), self.bias)

    for (_, name), ours in start.layers.items():
        parent, _, last = name.rpartition(".")
        weights[name] = Decomposed(unet.get_submodule(name), ours.inner.down.detach())
        setattr(unet.get_submodule(parent), last, weights[name])
    return lambda: {name: layer.changed() - layer.weight for name, layer in weights.items()}


def oft_layers(unet: nn.Module, kind: Kind, rank: int):
    """The paper's formula in place of the layers: R W, R the Cayley transform of each block."""
    weights = {}

    class Rotated(nn.Module):
        def __init__(self, host):
            super().__init__()
            self.weight, self.bias = host.weight, host.bias
            self.blocks = nn.Parameter(torch.zeros(len(host.weight) // rank, rank, rank))

        def changed(self):
            q = torch.block_diag(*(self.blocks - self.blocks.transpose(1, 2)))
            one = torch.eye(len(q))
            return ((one + q) @ (one - q).inverse()).T @ self.weight

        def forward(self, x):
            return nn.functional.linear(x, self.changed(), self.bias)

    for name in select(unet, "cross-attention"):
        parent, _, last = name.rpartition(".")
        weights[name] = Rotated(unet.get_submodule(name))
        setattr(unet.get_submodule(parent), last, weights[name])
    return lambda: {name: layer.changed() - layer.weight for name, layer in weights.items()}


@pytest.mark.parametrize(
    ("layers", "kind", "rank"),
    [
        (peft_layers, Kind("loha"), 2),
        (peft_layers, Kind("lokr"), 2),
        (peft_layers, Kind("lokr"), 4),
        (dora_layers, Kind(dora=True), 2),
        (oft_layers, Kind("oft"), 4),
    ],
)
def test_equal_to_a_plain_loop(layers, kind, rank, train, pocket_folder, pictures):
    """Same start, noise, timesteps and batches: the losses, and the deltas by peft or by the paper's formula."""
    options = ("--precision", "fp32", "--schedule", "constant", "--clip", "0.5", "--min-snr", "0", "--seed", "3")
    options += ("--weight-decay", "0.1", "--rank", str(rank), "--algo", kind.algo)
    path = train("run", *options, flags=["--dora"] if kind.dora else [])

    base = load_base(str(pocket_folder), precision=decide("fp32", device="cpu"))
    dataset = data.prepare(data.read_folder(pictures, caption_template="{caption}"), base, resolution=64)
    pristine = copy.deepcopy(base.unet)
    base.unet.requires_grad_(False)
    deltas = layers(base.unet, kind, rank)
    parameters = [p for p in base.unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    losses = []
    for step in range(4):
        batch = dataset.batch(3, step, 2)
        shape = tuple(batch.latents.shape[1:])
        noise = torch.stack([randomness.normal(shape, 3, "noise", step, i) for i in range(2)])
        timesteps = diffusion.stratified_timesteps(2, range(1000), 3, step)
        noisy = base.scheduler.add_noise(batch.latents, noise, timesteps)
        v = base.prediction_type == "v_prediction"
        wanted = base.scheduler.get_velocity(batch.latents, noise, timesteps) if v else noise
        loss = (base.unet(noisy, timesteps, batch.text.hidden).sample - wanted).square().mean((1, 2, 3)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

    assert_close([row["loss"] for row in log_beside(path)], losses, rtol=1e-4, atol=1e-6)
    wanted = deltas()
    changes = read_adapter(path).changes
    assert {name for _, name in changes} == wanted.keys()
    for (_, name), change in changes.items():
        delta, true = change.delta(pristine.get_submodule(name).weight), wanted[name].detach()
        # Of the whole: a number with almost no gradient goes where rounding tells AdamW's first steps to.
        assert (delta - true).norm() <= 1e-3 * true.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ("--algo", "loha", "--ema", "0.5"),
        ("--algo", "lokr", "--factor", "4", "--dropout", "0.3"),
        ("--rank-dropout", "0.3", "--module-dropout", "0.5"),
        ("--algo", "oft", "--rank-dropout", "0.3"),
    ],
)
def test_a_run_goes_on_to_the_bit(options, train, tmp_path):
    flags = [] if "oft" in options else ["--dora"]
    whole = train("run", "--checkpoint-every", "2", "--targets", SOME, *options, flags=flags)
    wanted = read_tensors(whole)
    shutil.rmtree(whole.parent / "checkpoints/000004")
    whole.unlink()
    assert cli.main(["resume", str(whole.parent)]) == 0
    found = read_tensors(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "flags", "args"),
    [
        (("--algo", "lokr", "--factor", "4"), [], {"algo": "lokr", "factor": "4"}),
        (
            ("--algo", "loha", "--conv-rank", "1"),
            ["--rank-stabilised"],
            {"algo": "loha", "conv_dim": "1", "rs_lora": "True"},
        ),
        ((), ["--dora"], {"algo": "lora", "dora_wd": "True", "wd_on_output": "False"}),
        (("--algo", "oft"), [], {"algo": "diag-oft"}),
    ],
)
def test_the_file_says_what_it_is_and_is_what_our_commands_read(
    options, flags, args, train, pocket_folder, tmp_path, capsys
):
    path = train("run", "--targets", SOME, "--save-precision", "fp16", "--save-every", "2", *options, flags=flags)
    metadata = read_header(path).metadata
    assert metadata["ss_network_module"] == "lycoris.kohya"
    said = json.loads(metadata["ss_network_args"])
    said.pop("conv_alpha", None)
    assert said == args
    assert metadata["ss_network_dim"] == "2"
    kinds = read_adapter(path).kinds
    assert read_adapter(path.parent / "adapters/run-step00000002.safetensors").kinds == kinds
    base = ["--base", str(pocket_folder)]
    assert cli.main(["verify", str(path), *base]) == 0
    assert "the same against its own fingerprint" in capsys.readouterr().out
    assert cli.main(["inspect", str(path)]) == 0
    assert next(iter(kinds)) in capsys.readouterr().out
    baked, merged = tmp_path / "baked.safetensors", tmp_path / "merged.safetensors"
    assert cli.main(["convert", str(path), "--bake", "lora", "--keep-energy", "0.9999", *base, "-o", str(baked)]) == 0
    assert read_adapter(baked).kinds == {"LoRA": sum(kinds.values())}
    assert cli.main(["verify", str(baked), "--against", str(path), *base, "--tolerance", "0.05"]) == 0
    assert cli.main(["merge", f"{path}:0.5", "--rank", "8", *base, "-o", str(merged)]) == 0
    drawn = tmp_path / "drawn"
    words = ["generate", "a red square", "--lora", f"{path}:0.7", *base, "--steps", "1", "--output", str(drawn)]
    assert cli.main(words) == 0
    card = (path.parent / "README.md").read_text(encoding="utf-8")
    title = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "diag-oft": "OFT"}[args["algo"]]
    title += " with weight decomposition (DoRA)" if flags == ["--dora"] else ""
    assert f"A {title} for" in card
    assert "load_lora_weights" not in card


@pytest.mark.slow
def test_starting_from_an_adapter_goes_on_where_it_stopped(train, capsys):
    kind = ("--algo", "lokr", "--targets", SOME)
    first = train("first", *kind, "--measure-every", "4", flags=["--dora"])
    second = train("second", *kind, "--measure-every", "4", "--init-from", str(first), flags=["--dora"])
    fits = [[row["fit"] for row in log_beside(path) if "fit" in row] for path in (first, second)]
    assert_close(fits[1][0], fits[0][-1], rtol=1e-4, atol=0)
    assert fits[0][0] != fits[0][-1]
    capsys.readouterr()
    with pytest.raises(AssertionError):
        train("refused", *kind, "--init-from", str(first))
    assert "is DoRA of LoKr, this run trains LoKr. Give the --algo and --dora" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("algo", "flags"), [("lokr", ["--dora"]), ("loha", []), ("oft", [])])
def test_dreambooth_and_text_encoders_learn_them_too(algo, flags, train):
    options = ("--algo", algo, "--targets", SOME, "--steps", "2", "--class-count", "2")
    path = train("booth", *options, program="dreambooth", flags=[*flags, "--train-text-encoder"])
    changes = read_adapter(path).changes
    assert {change.kind for change in changes.values()} == {
        {"lokr": "DoRA of LoKr", "loha": "LoHa", "oft": "OFT"}[algo]
    }
    assert {part for part, _ in changes} == {"unet", "text_encoder"}


@pytest.mark.slow
@pytest.mark.parametrize("program", ["lora", "dreambooth"])
def test_updates_stay_within_the_largest_norm(program, train):
    more = ("--class-count", "2") if program == "dreambooth" else ()
    options = ("--targets", SOME, "--steps", "4", "--learning-rate", "0.05", *more)
    norms = {}
    for name, most in (("free", "0"), ("limited", "0.1")):
        path = train(name, *options, "--max-norm", most, program=program)
        norms[name] = [float(change.delta().norm()) for change in read_adapter(path).changes.values()]
    assert max(norms["free"]) > 0.2
    assert max(norms["limited"]) <= 0.1 + 1e-5
    shares = [row["limited"] for row in log_beside(path) if "loss" in row]
    assert len(shares) == 4
    assert 0 < shares[-1] <= 1


@pytest.mark.slow
def test_in_half_precision_and_with_checkpointing_nearly_the_same_is_learned(train):
    kind = ("--algo", "lokr", "--targets", SOME)
    losses = []
    for name, more, flags in (("a", "fp32", []), ("b", "bf16", []), ("c", "fp32", ["--gradient-checkpointing"])):
        path = train(name, *kind, "--precision", more, flags=["--dora", *flags])
        losses.append([row["loss"] for row in log_beside(path)])
    assert_close(losses[1], losses[0], rtol=0.05, atol=0)
    assert_close(losses[2], losses[0], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("program", "options", "said"),
    [
        ("lora", ["--factor", "4"], "--factor has no effect without --algo lokr"),
        ("lora", ["--algo", "loha", "--factor", "4"], "--factor has no effect without --algo lokr"),
        ("lora", ["--algo", "lokr", "--factor", "0"], "--factor is 0; it must be at least 1"),
        ("lora", ["--algo", "lokr", "--loraplus-ratio", "4"], "--loraplus-ratio has no effect without --algo lora"),
        ("lora", ["--algo", "loha", "--rank", "65"], "--rank 65: the widest layer has 64 directions"),
        ("lora", ["--algo", "oft", "--dora"], "--dora has no effect without --algo lora, loha or lokr"),
        ("lora", ["--algo", "oft", "--max-norm", "1"], "--max-norm has no effect without --algo lora, loha or lokr"),
        ("lora", ["--algo", "oft", "--rank-stabilised"], "--rank-stabilised has no effect without --algo lora, loha"),
        ("lora", ["--algo", "oft", "--rank-of", "up=4:2"], "--rank-of up=4:2: --algo oft has no scale; give the rank"),
        ("lora", ["--algo", "oft", "--rank", "1"], "--rank 1: 32 outputs make blocks of one, which nothing turns"),
        ("dreambooth", ["--method", "full", "--algo", "loha"], "--algo has no effect without --method lora"),
        ("dreambooth", ["--method", "full", "--dora"], "--dora has no effect without --method lora"),
        ("dreambooth", ["--factor", "4"], "--factor has no effect without"),
        ("dreambooth", ["--method", "full", "--max-norm", "1"], "--max-norm has no effect without --method lora"),
        ("lora", ["--max-norm", "-1"], "--max-norm is -1.0; it must not be negative"),
    ],
)
def test_wrong_use_is_one_line(program, options, said, pocket_folder, pictures, tmp_path, capsys):
    words = ["--images", str(pictures), "--output", str(tmp_path / "run"), "--base", str(pocket_folder)]
    words += ["--caption", "{caption}"] if program == "lora" else ["--class-name", "square"]
    assert cli.main(["train", program, *words, *options]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("sfumato: ")]
    assert len(error) == 1
    assert said in error[0]


@pytest.mark.parametrize("algo", ["loha", "lokr", "oft"])
@pytest.mark.parametrize("program", ["slider", "lcm", "dpo"])
def test_a_kind_needs_no_option_that_its_trainer_lacks(program, algo, tmp_path):
    from sfumato.training.checks import check_kind
    from trainers import dpo, lcm, slider

    folders = {"preferred": tmp_path, "rejected": tmp_path} if program == "dpo" else {}
    config = {"slider": slider, "lcm": lcm, "dpo": dpo}[program].Config(output=tmp_path, algo=algo, **folders)
    check_kind(config)


@pytest.mark.parametrize("program", ["lora", "dreambooth", "slider", "dpo"])
def test_each_dropout_reaches_the_adapter(program, tmp_path):
    from sfumato.training.adapter import new_adapter
    from trainers import dpo, dreambooth, lora, slider

    shares = {"dropout": 0.1, "rank_dropout": 0.2, "module_dropout": 0.3}
    folders = {"slider": {}, "dpo": {"preferred": tmp_path, "rejected": tmp_path}}.get(program, {"images": tmp_path})
    program_of = {"lora": lora, "dreambooth": dreambooth, "slider": slider, "dpo": dpo}[program]
    config = program_of.Config(output=tmp_path, rank=1, alpha=1.0, **shares, **folders)
    made = new_adapter({"unet": {"to_q": nn.Linear(3, 3)}}, config)
    assert {name: getattr(made, name) for name in shares} == shares


def test_each_kind_has_its_default_rate(tmp_path):
    from trainers.lora import Config, resolve

    family = FAMILIES["sd1"]
    base = SimpleNamespace(family=family, defaults=family.defaults, alpha_bar=range(1000))
    rates = {}
    for algo in ("lora", "loha", "lokr", "oft"):
        config = Config(images=tmp_path, output=tmp_path, learn="plain", algo=algo)
        config, filled = resolve(config, base, data.ExampleSet(()), 1, kinds=1)
        rates[algo] = config.learning_rate
        assert "learning_rate" in filled
        assert config.alpha == (None if algo == "oft" else 16)
    assert rates == pytest.approx({"lora": 1e-4, "loha": 1e-5, "lokr": 3e-4, "oft": 2e-5})
