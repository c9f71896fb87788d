"""sd-scripts' settings by block: each layer has the rank, the alpha and the rate that it has there."""

import json
import math
import re
from types import SimpleNamespace

import pytest
from converting import BASE, converted, written
from torch import nn

from sfumato.adapters import ByLayer, attach, target_layers
from sfumato.errors import ConfigError
from sfumato.files.module_names import kohya_names
from sfumato.interop.recipes import convert
from tests.tiny import tiny_pipeline

SD_DIMS = ",".join(str(2 + n % 5) for n in range(25))
SD_ALPHAS = ",".join(str(1 + n % 3) for n in range(25))
SD_SPARSE = ",".join(str(n % 3) for n in range(25))
XL_DIMS = ",".join(str(2 + n % 4) for n in range(23))
XL_SPARSE = ",".join(str(n % 3) for n in range(23))


@pytest.fixture(scope="module")
def models():
    """By family, the U-Net of a small model and its text encoders."""
    return {
        name: {part: getattr(pipe, part) for part in parts}
        for name, parts in (("sd1", ["unet", "text_encoder"]), ("sdxl", ["unet", "text_encoder", "text_encoder_2"]))
        for pipe in [tiny_pipeline(name)]
    }


def place_of(name, is_sdxl):
    """get_block_index of networks/lora.py."""
    if not is_sdxl:
        if "mid_block" in name:
            return 12
        way, level, kind, layer = re.search(
            r"(up|down)_blocks_(\d+)_(resnets|attentions|\w+samplers)_(\d+)_", name
        ).groups()
        place = 3 * int(level) + (2 if kind.endswith("samplers") else int(layer))
        return place + 1 if way == "down" else place + 13
    way, number = re.search(r"unet_(input|middle|output)_blocks?_(\d+)_", name).groups()
    return {"input": 1, "middle": 10, "output": 13}[way] + int(number)


def curve(text, size):
    name, _, base = text.partition("+")
    shares = {
        "sine": [math.sin(math.pi / 2 * n / (size - 1)) for n in range(size)],
        "linear": [n / (size - 1) for n in range(size)],
        "zeros": [0] * size,
    }
    shares |= {"cosine": shares["sine"][::-1], "reverse_linear": shares["linear"][::-1]}
    return [share + float(base or 0) for share in shares[name]]


def weights_of(args, is_sdxl):
    """parse_block_lr_kwargs and get_block_lr_weight there."""
    found = []
    for key, size in zip(("down", "mid", "up"), (9, 3, 9) if is_sdxl else (12, 1, 12), strict=True):
        text, least = args.get(f"{key}_lr_weight"), float(args.get("block_lr_zero_threshold", 0))
        if text is None:
            found += [1] * size
            continue
        numbers = text[0] in "0123456789.-,"
        own = [float(each or 0) for each in text.split(",")] if numbers else curve(text, size)
        found += [weight if weight > least else 0 for weight in [*own, *[1] * size][:size]]
    return [1, *found, 1] if is_sdxl else found


def theirs(name, host, args, is_sdxl):
    """(rank, alpha, factor of the rate) of a layer of the U-Net there, with a network_dim of 3 and a network_alpha of
    2; None where it is not adapted."""
    place, weights = place_of(name, is_sdxl), weights_of(args, is_sdxl)
    is_wide = isinstance(host, nn.Conv2d) and host.kernel_size != (1, 1)
    has_convolutions = bool({"conv_dim", "conv_block_dims"} & args.keys())
    is_in_transformer = re.search("attentions|(input|output)_blocks_[0-9]+_1_(proj|trans)|middle_block_1", name)
    if not has_convolutions and not is_in_transformer:
        return None
    if is_wide:
        rank, alpha = args.get("conv_dim", 0), args.get("conv_alpha", 1)
        if "conv_block_dims" in args:
            rank = args["conv_block_dims"].split(",")[place]
            alpha = args["conv_block_alphas"].split(",")[place] if "conv_block_alphas" in args else alpha
    else:
        rank = args["block_dims"].split(",")[place] if "block_dims" in args else 3
        alpha = args["block_alphas"].split(",")[place] if "block_alphas" in args else 2
    rank, alpha = int(rank) if weights[place] else 0, float(alpha)
    return (rank, alpha or rank, weights[place]) if rank else None


@pytest.mark.parametrize(
    ("family", "args"),
    [
        ("sd1", {"block_dims": SD_DIMS}),
        ("sd1", {"block_dims": SD_DIMS, "block_alphas": SD_ALPHAS}),
        ("sd1", {"block_dims": SD_SPARSE, "block_alphas": SD_SPARSE}),
        ("sd1", {"block_dims": SD_DIMS, "conv_dim": "3", "conv_alpha": "2"}),
        ("sd1", {"block_dims": SD_DIMS, "conv_block_dims": SD_DIMS, "conv_alpha": "2"}),
        ("sd1", {"block_dims": SD_SPARSE, "conv_block_dims": SD_DIMS, "conv_block_alphas": SD_SPARSE}),
        ("sd1", {"block_dims": ",".join(["3"] * 25), "conv_block_dims": ",".join(["3"] * 25), "conv_alpha": "2"}),
        ("sd1", {"block_dims": SD_DIMS, "conv_block_dims": ",".join(["0"] * 25)}),
        ("sd1", {"block_dims": ",".join(["3"] * 25), "conv_block_dims": SD_SPARSE}),
        ("sd1", {"down_lr_weight": "0,0,0,0,0.5,0.5,1,1,1.5,1.5,2,2"}),
        ("sd1", {"down_lr_weight": "sine", "mid_lr_weight": "0.5", "up_lr_weight": "cosine+.25"}),
        ("sd1", {"down_lr_weight": "linear", "up_lr_weight": "reverse_linear", "block_lr_zero_threshold": "0.4"}),
        ("sd1", {"down_lr_weight": "zeros+.3", "up_lr_weight": "zeros", "conv_dim": "5"}),
        ("sd1", {"down_lr_weight": "1,,2", "mid_lr_weight": "0", "block_dims": SD_DIMS, "conv_block_dims": SD_SPARSE}),
        ("sdxl", {"block_dims": XL_DIMS}),
        ("sdxl", {"block_dims": XL_SPARSE, "conv_block_dims": XL_DIMS}),
        ("sdxl", {"mid_lr_weight": "0.5,0,2", "up_lr_weight": "sine+0.1", "conv_dim": "4"}),
        ("sdxl", {"mid_lr_weight": "2", "down_lr_weight": "cosine"}),
    ],
)
def test_each_layer_has_the_rank_the_alpha_and_the_rate_that_it_has_there(family, args, home, models):
    is_sdxl = family == "sdxl"
    words = " ".join(f"{key}={value}" for key, value in args.items())
    command = f"{'sdxl_' * is_sdxl}train_network.py {BASE}=a --network_dim=3 --network_alpha=2 --network_args {words}"
    training = convert(written(home / "a.sh", command), home / "i.toml")
    assert training.notes == ()
    values = training.recipe.values
    by_layer = ByLayer.of(SimpleNamespace(rank_of=values.get("rank_of", ()), rate_of=values.get("rate_of", ())))
    parts = by_layer.kept(target_layers(models[family], values["targets"]))
    options = {key: values.get(key) for key in ("rank", "alpha", "conv_rank", "conv_alpha")}
    lora = attach(parts, **options, by_layer=by_layer)
    lora.detach()
    found = {
        key: (layer.rank, pytest.approx(layer.scale * layer.rank), pytest.approx(by_layer.factor_at(*key)))
        for key, layer in lora.layers.items()
    }
    everything = target_layers(models[family], "everything")
    names = kohya_names(family, [(part, path) for part, some in everything.items() for path in some], "it")
    wanted = {
        key: theirs(name, everything["unet"][key[1]], args, is_sdxl) if key[0] == "unet" else (3, 2.0, 1)
        for key, name in names.items()
    }
    assert {key: each for key, each in wanted.items() if each is not None} == found
    assert any(part == "unet" for part, _ in found)


def test_blocks_are_named_together(home):
    args = "block_dims=0,4,8,4,4,4,4,4,4,4,4,4,0,4,4,4,4,4,4,4,4,4,4,4,4 up_lr_weight=1,1,1,.5,.5,1,1,1,1,1,1,1"
    told, usual, _ = converted(
        home, f"train_network.py {BASE}=a --network_dim=4 --network_alpha=2 --network_args {args}"
    )
    assert told["rank_of"] == ["IN02=8:2", "M00=0"]
    assert told["rate_of"] == ["OUT03,OUT04=0.5"]
    assert (usual["targets"], "conv_rank" in told) == ("transformers", False)


@pytest.mark.parametrize(
    ("args", "note"),
    [
        ("network_reg_dims=mid=4", "network_args network_reg_dims=mid=4: of no effect there on SD and SDXL; --rank-of"),
        (
            "conv_block_dims=1,2",
            "network_args conv_block_dims=1,2: does nothing there without block_dims or an lr_weight",
        ),
        ("block_lr_zero_threshold=0.1", "network_args block_lr_zero_threshold=0.1: does nothing there without block_d"),
        (
            "up_lr_weight=0.5",
            "network_args up_lr_weight=0.5: neither numbers nor a curve's name there, and so 1 in each",
        ),
    ],
)
def test_what_does_nothing_there_is_named(args, note, home):
    told, _, notes = converted(home, f"train_network.py {BASE}=a --network_dim=4 --network_args {args}")
    assert [each[: len(note)] for each in notes] == [note]
    assert not {"rank_of", "rate_of"} & told.keys()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ("block_dims=1,2", "a.sh: block_dims has 2 numbers; sd-scripts wants 25 of this model."),
        ("mid_lr_weight=x", "a.sh: mid_lr_weight is 'x'; wanted a number."),
        (f"block_dims={SD_DIMS.replace('2', '2.5', 1)}", "a.sh: block_dims is 2.5; wanted a whole number."),
        ("down_lr_weight=sine+x", "a.sh: down_lr_weight is 'x'; wanted a number."),
    ],
)
def test_what_sd_scripts_refuses_is_refused(args, said, home):
    with pytest.raises(ConfigError, match=re.escape(said)):
        converted(home, f"train_network.py {BASE}=a --network_dim=4 --network_args {args}", "a.sh")


def test_what_kohya_ss_saves_of_blocks(home):
    """Of a text even 0 is told to sd-scripts, which then leaves the block out."""
    saved = {"LoRA_type": "Standard", "pretrained_model_name_or_path": "a", "network_dim": 4, "network_alpha": 2}
    saved |= {"unet_lr": 1e-4, "text_encoder_lr": 0, "block_dims": "", "conv_dim": 1, "block_alphas": ""}
    blocks = {"mid_lr_weight": "0", "up_lr_weight": "zeros+0.5", "block_lr_zero_threshold": "0.1"}
    training = convert(written(home / "a.json", json.dumps({**saved, **blocks})), home / "i.toml")
    names = ",".join(f"OUT{n:02}" for n in range(3, 12))
    assert (training.recipe.told["rank_of"], training.recipe.told["rate_of"]) == (["M00=0"], [f"{names}=0.5"])
    assert training.notes == ()
    blocks = {"LoRA_type": "Kohya LoCon", "conv_alpha": 1, "block_dims": ",".join(["8"] * 25)}
    recipe = convert(written(home / "a.json", json.dumps({**saved, **blocks})), home / "i.toml").recipe
    assert (recipe.told["rank_of"][-1][-4:], recipe.usual["targets"]) == ("=8:2", "everything")
