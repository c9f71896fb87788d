"""Each kind of adapter against its definition, written out in float64; what does not fit is refused beforehand."""

import pytest
import torch
from safetensors.torch import save_file

from sfumato.errors import AdapterError
from sfumato.files import read_adapter
from sfumato.files.keys import KIND_KEYS
from sfumato.files.kinds import KINDS, Change

OUT, IN, RANK = 6, 8, 2
LINEAR, CONV = (OUT, IN), (OUT, IN, 3, 3)
PATHS = {2: "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", 4: "down_blocks.0.resnets.0.conv1"}


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skew(blocks):
    return blocks - blocks.transpose(-1, -2)


def cayley(q):
    eye = torch.eye(q.shape[-1], dtype=q.dtype)
    return (eye + q) @ torch.linalg.inv(eye - q)


def lora(w, down, up):
    return 1.5 * torch.einsum("or,r...->o...", up.flatten(1), down.flatten(1)).view(w.shape)


def decomposed(w, update, magnitude, axes):
    changed = w + update
    return changed * magnitude / changed.pow(2).sum(axes, keepdim=True).sqrt() - w


A, B = noise(1, RANK, IN), noise(2, OUT, RANK)
A33, CORE = noise(3, RANK, IN, 3, 3), noise(4, RANK, RANK, 3, 3)
BLOCKS = 0.3 * noise(5, 2, 3, 3)
ALPHA = torch.tensor(3.0)  # 1.5 times the rank
PAIR = {"lora_down.weight": A, "lora_up.weight": B, "alpha": ALPHA}
HADA = {f"hada_w{n}_{x}": noise(10 * n + (x == "b"), *((OUT, RANK) if x == "a" else (RANK, IN)))
        for n in (1, 2) for x in "ab"}  # fmt: skip
GLORA = [noise(20, IN, RANK), noise(21, RANK, IN), noise(22, OUT, RANK), noise(23, RANK, IN)]


SQUARE_GLORA = [*GLORA[:2], noise(24, IN, RANK), GLORA[3]]


def glora(w, parts=GLORA):
    a_up, a_down, b_up, b_down = parts
    return 1.5 * (w @ a_up @ a_down + b_up @ b_down)


def named(names, values):
    return {f"{name}.weight": value for name, value in zip(names, values, strict=True)} | {"alpha": ALPHA}


def kohya_oft(w):
    """networks/oft.py of sd-scripts: the constraint clamps always; the blocks multiply from the left, transposed."""
    q = skew(BLOCKS)
    norm = q.norm()
    q = q * ((norm.clamp(max=0.01 * OUT) + 1e-8) / (norm + 1e-8))
    turned = torch.einsum("knm,knp->kmp", cayley(q), w.view(2, 3, -1))
    return turned.reshape(w.shape) - w


WIDE = (8, 5)
STAGES = 0.3 * noise(60, 2, 2, 4, 4)
RESCALE = noise(61, 8)


def shortened(q, limit):
    return q * min(1.0, float(limit / q.norm()))


def lycoris_boft(w, limit=float("inf"), rescale=None):
    """Stage i takes outputs (c, 2, k) as (c, k, 2), k = 2^i size / 2, and turns blocks of `size` neighbours."""
    turned = w.clone()
    for stage, turns in enumerate(cayley(shortened(skew(STAGES), limit))):
        places = torch.arange(8).view(-1, 2, 2**stage * 2).transpose(1, 2).reshape(-1)
        turned[places] = torch.block_diag(*turns) @ turned[places]
    return (turned if rescale is None else rescale[:, None] * turned) - w


def lycoris_oft(w, limit=float("inf"), rescale=None):
    turned = torch.block_diag(*cayley(shortened(skew(BLOCKS), limit))).T @ w
    return (turned if rescale is None else rescale[:, None] * turned) - w


def tucker(core, a, b):
    return torch.einsum("ijhw,ip,jr->prhw", core, a, b)


CORES = noise(62, RANK, RANK, 3, 3), noise(63, RANK, RANK, 3, 3)
TURNED = {name: value if name.endswith("b") else value.T for name, value in HADA.items()}
FIRST, SECOND_A, SECOND_B = noise(30, 2, 4), noise(64, RANK, 3), noise(65, RANK, 2)

DEFINITIONS = {
    "LoRA": (LINEAR, PAIR, lambda w: lora(w, A, B)),
    "LoRA without alpha": (
        LINEAR,
        {"lora_down.weight": A, "lora_up.weight": B},
        lambda w: B @ A,
    ),
    "LoCon": (CONV, PAIR | {"lora_down.weight": A33}, lambda w: lora(w, A33, B)),
    "LoCon, up of 1x1": (
        CONV,
        PAIR | {"lora_down.weight": A33, "lora_up.weight": B[..., None, None]},
        lambda w: lora(w, A33, B),
    ),
    "LoCon, Tucker": (
        CONV,
        PAIR | {"lora_down.weight": A[..., None, None], "lora_mid.weight": CORE, "lora_up.weight": B[..., None, None]},
        lambda w: 1.5 * torch.einsum("op,pqhw,qi->oihw", B, CORE, A),
    ),
    "DoRA, LyCORIS out": (
        LINEAR,
        PAIR | {"dora_scale": noise(6, OUT, 1)},
        lambda w: decomposed(w, lora(w, A, B), noise(6, OUT, 1), 1),
    ),
    "DoRA, LyCORIS in": (
        CONV,
        PAIR | {"lora_down.weight": A33, "dora_scale": noise(6, 1, IN, 1, 1)},
        lambda w: decomposed(w, lora(w, A33, B), noise(6, 1, IN, 1, 1), (0, 2, 3)),
    ),
    "DoRA, flat": (
        LINEAR,
        PAIR | {"dora_scale": noise(6, OUT)},
        lambda w: decomposed(w, lora(w, A, B), noise(6, OUT)[:, None], 1),
    ),
    "DoRA, ai-toolkit": (
        LINEAR,
        {"lora_down.weight": A, "lora_up.weight": B, "magnitude": noise(6, OUT)},
        lambda w: decomposed(w, B @ A, noise(6, OUT)[:, None], 1),
    ),
    "DoRA, peft": (
        CONV,  # [1, out, 1, 1]: peft's magnitude of a convolution is of its outputs
        PAIR | {"lora_down.weight": A33, "lora_magnitude_vector": noise(6, 1, OUT, 1, 1)},
        lambda w: decomposed(w, lora(w, A33, B), noise(6, 1, OUT, 1, 1).transpose(0, 1), (1, 2, 3)),
    ),
    "LoHa": (
        LINEAR,
        HADA | {"alpha": ALPHA},
        lambda w: 1.5 * (HADA["hada_w1_a"] @ HADA["hada_w1_b"]) * (HADA["hada_w2_a"] @ HADA["hada_w2_b"]),
    ),
    "LoKr, whole": (
        LINEAR,
        {"lokr_w1": noise(30, 2, 4), "lokr_w2": noise(31, 3, 2), "alpha": torch.tensor(77.0)},
        lambda w: torch.kron(noise(30, 2, 4), noise(31, 3, 2)),
    ),
    "LoKr, of a kernel": (
        CONV,
        {"lokr_w1": noise(30, 2, 4), "lokr_w2": noise(31, 3, 2, 3, 3)},
        lambda w: torch.kron(noise(30, 2, 4)[..., None, None], noise(31, 3, 2, 3, 3)),
    ),
    "LoKr, second factored": (
        LINEAR,
        {"lokr_w1": noise(30, 2, 4), "lokr_w2_a": noise(32, 3, 2), "lokr_w2_b": noise(33, 2, 2), "alpha": ALPHA},
        lambda w: 1.5 * torch.kron(noise(30, 2, 4), noise(32, 3, 2) @ noise(33, 2, 2)),
    ),
    "IA3, out": (
        CONV,
        {"weight": noise(40, 1, OUT, 1, 1), "on_input": torch.tensor(0)},
        lambda w: w * noise(40, OUT, 1, 1, 1),
    ),
    "IA3, in": (LINEAR, {"weight": noise(40, IN), "on_input": torch.tensor(1)}, lambda w: w * noise(40, IN)),
    "OFT, LyCORIS": (
        LINEAR,
        {"oft_blocks": BLOCKS},
        lambda w: torch.block_diag(*cayley(skew(BLOCKS))).T @ w - w,
    ),
    "OFT, LyCORIS, constrained": (
        LINEAR,
        {"oft_blocks": BLOCKS, "alpha": torch.tensor(0.05)},
        lambda w: lycoris_oft(w, 0.05 * OUT),
    ),
    "OFT, LyCORIS, constrained by nothing": (LINEAR, {"oft_blocks": BLOCKS, "alpha": torch.tensor(0.0)}, lycoris_oft),
    "OFT, LyCORIS, rescaled": (
        LINEAR,
        {"oft_blocks": BLOCKS, "rescale": noise(66, OUT, 1)},
        lambda w: lycoris_oft(w, rescale=noise(66, OUT)),
    ),
    "BOFT, LyCORIS": (WIDE, {"oft_blocks": STAGES}, lycoris_boft),
    "BOFT, LyCORIS, constrained": (
        WIDE,
        {"oft_blocks": STAGES, "alpha": torch.tensor(0.05)},
        lambda w: lycoris_boft(w, 0.05 * 8),
    ),
    "BOFT, LyCORIS, rescaled": (
        WIDE,
        {"oft_blocks": STAGES, "rescale": RESCALE[:, None]},
        lambda w: lycoris_boft(w, rescale=RESCALE),
    ),
    "LoHa, Tucker": (
        CONV,
        TURNED | {"hada_t1": CORES[0], "hada_t2": CORES[1], "alpha": ALPHA},
        lambda w: (
            1.5
            * tucker(CORES[0], TURNED["hada_w1_a"], TURNED["hada_w1_b"])
            * tucker(CORES[1], TURNED["hada_w2_a"], TURNED["hada_w2_b"])
        ),
    ),
    "LoKr, Tucker": (
        CONV,
        {"lokr_w1": FIRST, "lokr_w2_a": SECOND_A, "lokr_w2_b": SECOND_B, "lokr_t2": CORES[0], "alpha": ALPHA},
        lambda w: 1.5 * torch.einsum("ab,cdhw->acbdhw", FIRST, tucker(CORES[0], SECOND_A, SECOND_B)).reshape(CONV),
    ),
    "LoKr, both factored": (
        LINEAR,
        {"lokr_w1_a": B[:2], "lokr_w1_b": A[:, :4], "lokr_w2_a": B[:3, :1], "lokr_w2_b": A[:1, :2], "alpha": ALPHA},
        lambda w: 1.5 * torch.kron(B[:2] @ A[:, :4], B[:3, :1] @ A[:1, :2]),
    ),
    "GLoRA": (LINEAR, named(("a1", "a2", "b1", "b2"), GLORA), glora),
    "GLoRA, its first version": (LINEAR, named(("a2", "a1", "b2", "b1"), GLORA), glora),
    "GLoRA of a square layer": (
        (IN, IN),
        named(("a1", "a2", "b1", "b2"), SQUARE_GLORA),
        lambda w: glora(w, SQUARE_GLORA),
    ),
    "GLoRA of a square layer, its first version": (
        (IN, IN),
        named(("a2", "a1", "b2", "b1"), SQUARE_GLORA),
        lambda w: glora(w, SQUARE_GLORA),
    ),
    "difference": (CONV, {"diff": noise(50, *CONV)}, lambda w: noise(50, *CONV)),
    "a weight to set": (LINEAR, {"set_weight": noise(50, *LINEAR)}, lambda w: noise(50, *LINEAR) - w),
}


def change_of(tensors, shape, tmp_path, prefix="lora_unet_") -> Change:
    flat = prefix + PATHS[len(shape)].replace(".", "_")
    tensors = {f"{flat}.{key}": (t.float() if t.is_floating_point() else t).contiguous() for key, t in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    return read_adapter(tmp_path / "a.safetensors").changes["unet", PATHS[len(shape)]]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_the_delta_is_the_definition(name, tmp_path):
    shape, tensors, definition = DEFINITIONS[name]
    weight = noise(0, *shape)
    change = change_of(tensors, shape, tmp_path)
    delta = change.delta(weight.float())
    assert isinstance(change, Change)
    assert (delta.dtype, delta.shape) == (torch.float32, weight.shape)
    torch.testing.assert_close(delta.double(), definition(weight), rtol=1e-5, atol=1e-5)
    other = change.delta(2 * weight.float())
    assert change.needs_weight == (not torch.allclose(other, delta))
    if (low := change.low_rank()) is not None:
        torch.testing.assert_close(low.delta(weight), delta)


def test_kohyas_oft_is_told_by_its_prefix_and_always_constrained(tmp_path):
    weight = noise(0, *LINEAR)
    change = change_of({"oft_blocks": BLOCKS, "alpha": torch.tensor(0.01)}, LINEAR, tmp_path, prefix="oft_unet_")
    torch.testing.assert_close(change.delta(weight.float()).double(), kohya_oft(weight), rtol=1e-5, atol=1e-6)


def read_from_comfyui(tensors, tmp_path):
    save_file({f"diffusion_model.{key}": value.float() for key, value in tensors.items()}, tmp_path / "a.safetensors")
    [change] = read_adapter(tmp_path / "a.safetensors").changes.values()
    return change


def test_comfyuis_oft_is_constrained_by_alpha_itself(tmp_path):
    """weight_adapter/oft.py of ComfyUI, where the Train LoRA node's alpha is 1: the norm of Q is at most alpha."""
    weight = noise(0, *LINEAR)
    key = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    change = read_from_comfyui({f"{key}.oft_blocks": 3 * BLOCKS, f"{key}.alpha": torch.tensor(1.0)}, tmp_path)
    q = 3 * (BLOCKS - BLOCKS.transpose(1, 2))
    assert q.norm() > 1
    turn = [torch.linalg.solve(torch.eye(3) - each, torch.eye(3) + each, left=False) for each in q.double() / q.norm()]
    wanted = torch.block_diag(*turn).T @ weight - weight
    torch.testing.assert_close(change.delta(weight.float()).double(), wanted, rtol=1e-5, atol=1e-5)


def test_comfyuis_lora_of_a_convolution_is_flat(tmp_path):
    """weight_adapter/lora.py of ComfyUI, as its Train LoRA node writes it: mm(up, down).reshape(weight.shape)."""
    down, up = noise(1, RANK, IN * 9), noise(2, OUT, RANK)
    key = "input_blocks.1.0.in_layers.2"
    change = read_from_comfyui({f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up}, tmp_path)
    assert change.fits(CONV)
    assert change.shape == CONV
    torch.testing.assert_close(change.delta().double(), (up @ down).view(CONV), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [LINEAR, (*LINEAR, 1, 1)])
def test_lycoriss_lokr_of_a_1x1_convolution_is_one_of_a_linear_layer_too(shape, tmp_path):
    """SD 2's projections, which sd-scripts had as convolutions, and diffusers and checkpoints have as linear layers."""
    first, second = noise(60, 2, 2), noise(61, OUT // 2, IN // 2, 1, 1)
    change = change_of({"lokr_w1": first, "lokr_w2": second}, LINEAR, tmp_path)
    wanted = torch.kron(first, second.flatten(1)).view(shape)
    torch.testing.assert_close(change.delta(torch.zeros(shape)).double(), wanted, rtol=1e-5, atol=1e-5)
    assert not change.fits((OUT, IN // 4, 2, 2))


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_weight_that_does_not_fit_is_refused(name, tmp_path):
    shape, tensors, _ = DEFINITIONS[name]
    change = change_of(tensors, shape, tmp_path)
    for other in ((OUT + 1, IN + 1, *shape[2:]), (OUT,), ()):
        assert not change.fits(other)
    with pytest.raises(AdapterError, match=f"this {change.kind} does not fit a weight of shape"):
        change.delta(torch.zeros(OUT + 1, IN + 1, *shape[2:]))


def packed_rotation(packed, terms):
    """OneTrainer's and peft's `_cayley_batch`: I + 2 Q + 2 Q^2 + ... + Q^(terms - 1)."""
    size = 4
    q = torch.zeros(len(packed), size, size, dtype=torch.float64)
    rows, columns = torch.triu_indices(size, size, 1)
    q[:, rows, columns] = packed
    q = q - q.transpose(1, 2)
    powers = [torch.linalg.matrix_power(q, exponent) for exponent in range(terms)]
    return powers[0] + 2 * sum(powers[1:-1]) + powers[-1]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("shape", [LINEAR, CONV])
def test_onetrainers_oft_rotates_inputs_and_a_convolution_the_other_way(shape, scaled, tmp_path):
    """oft_utils.py and LoRAModule.py: x R for a linear layer, so W R'; W R for a convolution."""
    weight = noise(0, *shape)
    packed = 0.2 * noise(7, weight[0].numel() // 4, 6)
    tensors = {"oft_R.weight": packed} | ({"oft_R.scaled_oft": torch.tensor(True)} if scaled else {})
    change = change_of(tensors, shape, tmp_path)
    packed = packed / (2 * 3**0.5) if scaled else packed
    turn = torch.block_diag(*packed_rotation(packed, 5))
    wanted = (weight.flatten(1) @ (turn if len(shape) == 4 else turn.T)).view(shape) - weight
    torch.testing.assert_close(change.delta(weight.float()).double(), wanted, rtol=1e-5, atol=1e-5)


def test_onetrainers_oft_in_other_names_is_told_by_the_files_metadata(tmp_path):
    weight, packed = noise(0, *LINEAR), 0.2 * noise(7, IN // 4, 6)
    path, key = tmp_path / "a.safetensors", f"unet.{PATHS[2]}.oft_R.weight"
    save_file({key: packed.float()}, path, {"ot_branch": "master"})
    [change] = read_adapter(path).changes.values()
    wanted = weight @ torch.block_diag(*packed_rotation(packed, 5)).T - weight
    torch.testing.assert_close(change.delta(weight.float()).double(), wanted, rtol=1e-5, atol=1e-5)


def test_a_bias_alone_is_a_difference(tmp_path):
    change = change_of({"diff_b": torch.ones(OUT)}, LINEAR, tmp_path)
    assert change.fits(LINEAR)
    assert change.delta(torch.ones(LINEAR)).count_nonzero() == 0
    assert change.bias_delta.tolist() == [1.0] * OUT


def test_every_kind_of_the_table_has_its_class():
    assert KINDS.keys() == {kind for kind, row in KIND_KEYS.items() if row.module is None}


TUCKER = {"lora_down.weight": (2, 8, 1, 1), "lora_up.weight": (6, 2)}
HALVES = {"lora_down.weight": (2, 8), "lora_up.weight": (6, 2)}
SHAPES = {key: tuple(value.shape) for key, value in HADA.items()}
GLORA_SHAPES = {"a1.weight": (8, 2), "a2.weight": (2, 8), "b1.weight": (6, 2), "b2.weight": (2, 8)}
NO_KIND = "which no tool defines; wanted those of one kind"
BROKEN = {
    "halves of other ranks": (
        {"lora_down.weight": (2, 8), "lora_up.weight": (6, 3)},
        "the halves do not fit: lora_down [2, 8], lora_up [6, 3]; wanted (rank, in) and (out, rank)",
    ),
    "halves of three dimensions": (
        {"lora_down.weight": (2, 8, 1), "lora_up.weight": (6, 2)},
        "the halves do not fit: lora_down [2, 8, 1], lora_up [6, 2]; wanted (rank, in) and (out, rank)",
    ),
    "a Tucker core of another rank": (
        TUCKER | {"lora_mid.weight": (3, 2, 3, 3)},
        "weight (mid) is [3, 2, 3, 3]; wanted (2, 2, height, width)",
    ),
    "a kernel of a million": (
        TUCKER | {"lora_mid.weight": (2, 2, 999, 999)},
        "weight (mid) is [2, 2, 999, 999]; wanted a kernel of at most 1,024 values",
    ),
    "a kernel of one value more than the limit": (
        TUCKER | {"lora_mid.weight": (2, 2, 1025, 1)},
        "weight (mid) is [2, 2, 1025, 1]; wanted a kernel of at most 1,024 values",
    ),
    "a Tucker core beside a kernel": (
        {"lora_down.weight": (2, 8, 3, 3), "lora_up.weight": (6, 2), "lora_mid.weight": (2, 2, 3, 3)},
        "weight (down) is [2, 8, 3, 3]; wanted (rank, in, 1, 1) beside lora_mid",
    ),
    "two biases": (
        HALVES | {"lora_B.bias": (6,), "diff_b": (6,)},
        "there are two changes of the bias, lora_B.bias and diff_b",
    ),
    "a bias of another length": (HALVES | {"diff_b": (5,)}, "the bias has 5 values; wanted 6, as lora_up has rows"),
    "a bias of two axes": (HALVES | {"diff_b": (2, 3)}, "diff_b (bias) is [2, 3]; wanted one value a channel"),
    "two alphas": (HALVES | {"alpha": (2,)}, "alpha (alpha) is [2]; wanted one number"),
    "one core of two": (
        SHAPES | {"hada_t1": (2, 2, 3, 3)},
        "hada_t1 and hada_t2 do not go together; wanted both, with one kernel, or neither",
    ),
    "LoHa of two widths": (
        SHAPES | {"hada_w2_b": (2, 9)},
        "the factors of LoHa do not fit ([6, 2] and [2, 8], [6, 2] and [2, 9]); "
        "wanted (out, rank) and (rank, in) twice",
    ),
    "LoHa of other ranks": (
        SHAPES | {"hada_w2_b": (3, 8)},
        "the factors of LoHa do not fit ([6, 2] and [2, 8], [6, 2] and [3, 8]); "
        "wanted (out, rank) and (rank, in) twice",
    ),
    "a matrix with a kernel": (
        SHAPES | {"hada_w1_a": (6, 2, 3, 3)},
        "hada_w1_a (hada_w1_a) is [6, 2, 3, 3]; wanted (rows, columns)",
    ),
    "a factor twice": (
        {"lokr_w1": (2, 2), "lokr_w1_a": (2, 1), "lokr_w2": (3, 4)},
        "lokr_w1 (lokr_w1) is [2, 2]; wanted (rows, columns[, height, width]), alone",
    ),
    "a factor of three dimensions": (
        {"lokr_w1": (2, 2, 2), "lokr_w2": (3, 4)},
        "lokr_w1 (lokr_w1) is [2, 2, 2]; wanted (rows, columns[, height, width]), alone",
    ),
    "a small factor with a kernel": (
        {"lokr_w1": (2, 2, 3, 3), "lokr_w2": (3, 4)},
        "lokr_w1 (lokr_w1) is [2, 2, 3, 3]; wanted (rows, columns)",
    ),
    "LoKr of other ranks": (
        {"lokr_w1": (2, 2), "lokr_w2_a": (3, 1), "lokr_w2_b": (2, 4)},
        "lokr_w2_a [3, 1] and lokr_w2_b [2, 4] do not fit",
    ),
    "blocks that are not square": (
        {"oft_blocks": (2, 3, 4)},
        "oft_blocks (oft_blocks) is [2, 3, 4]; wanted (blocks, size, size)",
    ),
    "packed blocks of no size": (
        {"oft_R.weight": (2, 5)},
        "weight (oft_r) is [2, 5]; wanted (blocks, size * (size - 1) / 2)",
    ),
    "stages of odd blocks": (
        {"oft_blocks": (2, 2, 3, 3)},
        "oft_blocks (oft_blocks) is [2, 2, 3, 3]; wanted (stages, blocks, size, size), size even",
    ),
    "peft's stages of odd blocks": (
        {"boft_R": (2, 2, 3, 3), "boft_s": (6,)},
        "boft_R (boft_r) is [2, 2, 3, 3]; wanted (stages, blocks, size, size), size even where there are stages",
    ),
    "magnitudes of both axes": (
        HALVES | {"dora_scale": (6, 8)},
        "dora_scale (magnitude) is [6, 8]; wanted one value a channel",
    ),
    "magnitudes along neither axis": (
        HALVES | {"dora_scale": (1, 1, 6)},
        "dora_scale (magnitude) is [1, 1, 6]; wanted (out, 1) or (1, in)",
    ),
    "two magnitudes": (
        HALVES | {"dora_scale": (6, 1), "magnitude": (6,)},
        "there are two magnitudes, dora_scale and lora_magnitude_vector",
    ),
    "a DoRA with a bias": (
        HALVES | {"dora_scale": (6, 1), "diff_b": (6,)},
        "a DoRA with a bias, which no tool defines",
    ),
    "two kinds": (HALVES | {"oft_blocks": (2, 3, 3)}, f"its tensors are of LoRA + OFT, {NO_KIND}"),
    "DoRA of OFT": ({"oft_blocks": (2, 3, 3), "dora_scale": (6, 1)}, f"its tensors are of DoRA of OFT, {NO_KIND}"),
    "stages of blocks that are not square": (
        {"oft_blocks": (2, 2, 4, 3)},
        "oft_blocks (oft_blocks) is [2, 2, 4, 3]; wanted (stages, blocks, size, size), size even",
    ),
    "on_input of two": ({"weight": (8,), "on_input": (2,)}, "on_input (on_input) is [2]; wanted one number"),
    "a factor on no axis": ({"ia3_l": (6,)}, "ia3_l (ia3_l) is [6]; wanted (out, 1) or (1, in)"),
    "a convolution's factor": (
        {"ia3_l": (1, 8, 1, 1)},
        "ia3_l of a convolution, whose axis only peft's config tells; wanted peft's folder",
    ),
    "GLoRA of other ranks": (
        GLORA_SHAPES | {"b2.weight": (3, 8)},
        "a1 [8, 2], a2 [2, 8], b1 [6, 2], b2 [3, 8] do not fit; wanted (in, rank), (rank, in), (out, rank), (rank, in)",
    ),
    "GLoRA's core beside a kernel": (
        GLORA_SHAPES | {"b2.weight": (2, 8, 3, 3), "bm.weight": (2, 2, 3, 3)},
        "weight (b2) is [2, 8, 3, 3]; wanted (rank, in, 1, 1) beside bm",
    ),
    "alpha beside a difference": (
        {"diff": (6, 8), "alpha": ()},
        "an alpha beside a difference, which no tool scales",
    ),
    "a difference and a weight": (
        {"diff": (6, 8), "set_weight": (6, 8)},
        "a difference and a weight to set; wanted one of them",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_tensors_that_make_no_change_are_refused_by_module(name, tmp_path):
    shapes, what = BROKEN[name]
    with pytest.raises(AdapterError) as error:
        change_of({key: torch.ones(shape) for key, shape in shapes.items()}, LINEAR, tmp_path)
    assert str(error.value) == f"a.safetensors: unet.{PATHS[2]}: {what}. Take the file from its source again."


BIASED = ("LoRA", "LoHa", "LoHa, Tucker", "LoKr, whole", "OFT, LyCORIS", "BOFT, LyCORIS", "IA3, in", "GLoRA")


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_comes_with_any_kind(name, tmp_path):
    shape, tensors, _ = DEFINITIONS[name]
    bias = noise(70, shape[0])
    assert change_of(tensors, shape, tmp_path).bias_delta is None
    change = change_of(tensors | {"diff_b": bias}, shape, tmp_path)
    torch.testing.assert_close(change.bias_delta, bias.float())
    assert change.fits(shape)


@pytest.mark.parametrize("name", DEFINITIONS)
def test_another_shape_does_not_fit(name, tmp_path):
    shape, tensors, _ = DEFINITIONS[name]
    change = change_of(tensors, shape, tmp_path)
    wrong = [(shape[0] + 1, *shape[1:]), shape[:1], (2 * shape[0], *shape[1:])]
    assert not any(change.fits(other) for other in wrong if not name.startswith("IA3, in"))
    if "OFT" not in name and name not in ("IA3, out",):  # those turn or scale outputs, whatever the inputs are
        assert not change.fits((shape[0], shape[1] + 1, *shape[2:]))


def test_on_input_is_a_truth_value(tmp_path):
    with pytest.raises(AdapterError, match=r"on_input \(on_input\) is \[\]; wanted 0 or 1\."):
        change_of({"weight": torch.ones(8), "on_input": torch.tensor(2.0)}, LINEAR, tmp_path)


def test_an_alpha_may_be_a_whole_number(tmp_path):
    change = change_of(PAIR | {"alpha": torch.tensor(3)}, LINEAR, tmp_path)
    assert change.alpha == 3.0


def test_kohyas_oft_wants_its_constraint(tmp_path):
    with pytest.raises(AdapterError, match="there is no alpha, by which kohya's OFT is constrained"):
        change_of({"oft_blocks": torch.ones(2, 3, 3)}, LINEAR, tmp_path, prefix="oft_unet_")


def test_a_small_file_never_costs_much_memory(tmp_path):
    """Factors of 4 MB whose product takes 4 TB, which no machine has: reading and comparing shapes forms nothing."""
    size = 1 << 20
    for tensors in (
        {"lora_down.weight": torch.ones(1, size), "lora_up.weight": torch.ones(size, 1)},
        {f"hada_w{n}_{x}": torch.ones((size, 1) if x == "a" else (1, size)) for n in (1, 2) for x in "ab"},
        {"lokr_w1": torch.ones(1024, 1024), "lokr_w2": torch.ones(1024, 1024)},
        {f"{x}1.weight": torch.ones(size, 1) for x in "ab"} | {f"{x}2.weight": torch.ones(1, size) for x in "ab"},
    ):
        change = change_of(tensors, LINEAR, tmp_path)
        assert not change.fits(LINEAR)
        with pytest.raises(AdapterError):
            change.delta(torch.ones(LINEAR))
