"""The norm of each kind's update against the update itself, formed in numpy."""

import numpy as np
import pytest

from sfumato.files import norms
from sfumato.files.norms import is_update, square_norm

RNG = np.random.default_rng(0)


def noise(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def square(array):
    return pytest.approx(float(np.sum(np.asarray(array, np.float64) ** 2)), rel=1e-4)


def tucker(core, a, b):
    """a: (rank, out), b: (rank, in); einsum("ijhw,ip,jr->prhw")."""
    return np.einsum("ijhw,ip,jr->prhw", core, a, b)


DOWN, UP = noise(2, 8), noise(6, 2)


def test_a_lora_s():
    lora = {"down": DOWN, "up": UP}
    assert square_norm("LoRA", lora, None) == square(UP @ DOWN)
    assert square_norm("LoRA", lora, 3.0) == square(1.5 * UP @ DOWN)
    assert square_norm("DoRA", lora, 3.0) == square(1.5 * UP @ DOWN)
    convolution = {"down": noise(2, 4, 3, 3), "up": noise(6, 2, 1, 1)}
    wanted = np.einsum("or,rihw->oihw", convolution["up"][:, :, 0, 0], convolution["down"])
    assert square_norm("LoRA", convolution, 2.0) == square(wanted)
    core = noise(2, 2, 3, 3)
    with_core = {"down": DOWN.reshape(2, 8, 1, 1), "up": UP, "mid": core}
    assert square_norm("LoRA", with_core, 4.0) == square(2 * np.einsum("op,pqhw,qi->oihw", UP, core, DOWN))


@pytest.mark.parametrize("out", [6, 64, 130])
@pytest.mark.parametrize("factored", [0, 1e9])
def test_a_loha_s_by_its_factors_or_a_few_rows_at_a_time(out, factored, monkeypatch):
    monkeypatch.setattr(norms, "_FACTORED", factored)
    a, b, c, d = noise(out, 2), noise(2, 8), noise(out, 3), noise(3, 8)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    assert square_norm("LoHa", loha, None) == square((a @ b) * (c @ d))
    assert square_norm("LoHa", loha, 3.0) == square(1.5 * (a @ b) * (c @ d))
    first, second = noise(2, 2, 3, 3), noise(3, 3, 3, 3)
    cores = {"hada_w1_a": a.T, "hada_w1_b": b, "hada_w2_a": c.T, "hada_w2_b": d, "hada_t1": first, "hada_t2": second}
    assert square_norm("LoHa", cores, None) == square(tucker(first, a.T, b) * tucker(second, c.T, d))


def test_a_loha_that_is_too_large_or_of_two_sizes_has_none(monkeypatch):
    a, b = noise(6, 2), noise(2, 8)
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": a, "hada_w2_b": b}
    assert square_norm("LoHa", loha | {"hada_w2_a": noise(5, 2)}, None) is None
    assert square_norm("LoHa", loha | {"hada_w2_b": noise(2, 7)}, None) is None
    of_other_ranks = {"hada_w1_a": noise(6, 1), "hada_w2_a": noise(6, 4)}
    assert square_norm("LoHa", loha | of_other_ranks, None) is None
    monkeypatch.setattr(norms, "DENSE_LIMIT", 48)
    assert square_norm("LoHa", loha, None) is not None
    monkeypatch.setattr(norms, "DENSE_LIMIT", 47)
    assert square_norm("LoHa", loha, None) is None


def test_a_lokr_s():
    whole, large = noise(2, 2), noise(3, 4)
    left, right = noise(3, 5), noise(5, 4)
    assert square_norm("LoKr", {"lokr_w1": whole, "lokr_w2": large}, 9.0) == square(np.kron(whole, large))
    half = {"lokr_w1": whole, "lokr_w2_a": left, "lokr_w2_b": right}
    assert square_norm("LoKr", half, 10.0) == square(2 * np.kron(whole, left @ right))
    assert square_norm("LoKr", half, None) == square(np.kron(whole, left @ right))
    small = {"lokr_w1_a": noise(2, 4), "lokr_w1_b": noise(4, 2)}
    product = small["lokr_w1_a"] @ small["lokr_w1_b"]
    both = small | {"lokr_w2_a": left, "lokr_w2_b": right}
    assert square_norm("LoKr", both, 8.0) == square(2 * np.kron(product, left @ right))
    assert square_norm("LoKr", small | {"lokr_w2": large}, 8.0) == square(2 * np.kron(product, large))
    core = noise(5, 5, 3, 3)
    cored = {"lokr_w1": whole, "lokr_w2_a": left.T, "lokr_w2_b": right, "lokr_t2": core}
    assert square_norm("LoKr", cored, 5.0) == square(np.kron(whole, tucker(core, left.T, right).reshape(3, -1)))
    assert square_norm("LoKr", half | {"lokr_w2_b": noise(4, 4)}, None) is None


def test_of_the_others_what_is_stored():
    assert square_norm("difference", {"diff": UP}, None) == square(UP)
    assert square_norm("difference", {"bias": UP}, None) == 0
    assert square_norm("difference", {"set_weight": UP}, None) is None
    packed = noise(2, 3)
    skew = np.zeros((2, 3, 3))
    skew[:, [0, 0, 1], [1, 2, 2]] = packed
    skew -= skew.transpose(0, 2, 1)
    assert square_norm("OFT", {"oft_r": packed}, None) == square(skew)
    blocks = noise(2, 3, 3)
    assert square_norm("OFT", {"oft_blocks": blocks}, 0.1) == square(blocks - blocks.transpose(0, 2, 1))
    staged = noise(1, 2, 4, 4)
    turned = staged - staged.transpose(0, 1, 3, 2)
    assert square_norm("BOFT", {"oft_blocks": staged}, 0.1) == square(turned)
    assert square_norm("BOFT", {"boft_r": staged, "boft_s": noise(4)}, None) == square(turned / 2)
    assert square_norm("IA3", {"ia3_weight": packed}, None) == square(packed)
    assert square_norm("IA3", {"ia3_l": packed}, None) == square(packed - 1)
    up, down, core = noise(6, 2), noise(2, 8), noise(2, 2, 3, 3)
    glora = {"a1": noise(8, 2), "a2": noise(2, 8), "b1": up, "b2": down, "bm": core}
    assert square_norm("GLoRA", glora, 4.0) == square(2 * up @ down)
    old = {"a1": noise(2, 8), "a2": noise(8, 2), "b1": noise(3, 8), "b2": noise(6, 3)}
    assert square_norm("GLoRA", old, None) == square(old["b2"] @ old["b1"])
    old_of_a_square_layer = {"a1": noise(2, 8), "a2": noise(8, 2), "b1": noise(2, 8), "b2": noise(8, 2)}
    assert square_norm("GLoRA", old_of_a_square_layer, None) == square(
        old_of_a_square_layer["b2"] @ old_of_a_square_layer["b1"]
    )


@pytest.mark.parametrize(
    "values",
    [
        {"down": DOWN},
        {"down": DOWN, "up": noise(6, 3)},
        {"down": DOWN, "up": UP, "mid": noise(3, 2, 3, 3)},
        {"down": noise(8), "up": UP},
        {"down": np.zeros((0, 8), np.float32), "up": np.zeros((6, 0), np.float32)},
    ],
)
def test_what_does_not_fit_has_none(values):
    assert square_norm("LoRA", values, 1.0) is None


def test_which_norms_are_of_updates():
    assert [is_update(kind) for kind in ("LoRA", "LoHa", "LoKr", "difference")] == [True] * 4
    assert [is_update(kind) for kind in ("DoRA", "OFT", "BOFT", "IA3", "GLoRA")] == [False] * 5
