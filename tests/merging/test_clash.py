"""What clashes, from factors written out by hand, and `sfumato clash`."""

import json
from dataclasses import replace

import pytest
import torch
from PIL import Image
from sfumato.pipelines.clash import main

from sfumato.cli import guarded
from sfumato.errors import AdapterError
from sfumato.files.kinds import LoraModule
from sfumato.merging.merge import MergeSource
from sfumato.merging.overlap import clashes, conflict_by_pair
from tests.bundles import add_words

TARGET = ("unet", "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k")
E = torch.eye(3)


def source(name, up, down, weight=1.0, target=TARGET):
    rank = down.shape[0]
    return MergeSource(name, {target: LoraModule(down, up, float(rank))}, weight)


def one(first, second):
    (pair,) = clashes([first, second])
    return pair


def test_orthogonal_adapters_share_nothing():
    pair = one(source("a", E[:, :1], E[:1]), source("b", E[:, 1:2], E[1:2]))
    assert (pair.cosine, pair.rows, pair.columns, pair.conflict) == pytest.approx((0, 0, 0, 0))
    assert (pair.row_angle, pair.column_angle) == pytest.approx((90, 90))
    assert pair.block == "down_blocks.0.attentions.1"


def test_an_adapter_and_itself_share_all_and_do_not_conflict():
    a = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    pair = one(source("a", a, a.T), source("b", a, a.T))
    assert (pair.cosine, pair.rows, pair.columns, pair.conflict) == pytest.approx((1, 1, 1, 0), abs=1e-9)
    assert pair.row_angle == pytest.approx(0, abs=1e-3)


def test_opposite_adapters_cancel_wholly_and_by_their_weights():
    a = source("a", E[:, :1], E[:1])
    assert one(a, source("b", -E[:, :1], E[:1])).conflict == pytest.approx(1)
    assert one(a, source("b", E[:, :1], E[:1], weight=-1.0)).conflict == pytest.approx(1)
    assert one(a, source("b", E[:, :1], E[:1], weight=-0.5)).conflict == pytest.approx(2 * 0.5 / 1.25)


def test_a_block_counts_by_its_energy_in_the_conflict_of_the_whole():
    """Which is then what the sum of both lacks: here 99 % of the energy lies where nothing cancels."""
    other = ("unet", "mid_block.attentions.0.transformer_blocks.0.attn2.to_k")
    small = LoraModule(E[:1], E[:, :1], 1.0)
    large = [LoraModule(E[i : i + 1] * 10, E[:, i : i + 1], 1.0) for i in range(2)]
    a = MergeSource("a", {TARGET: small, other: large[0]})
    b = MergeSource("b", {TARGET: replace(small, up=-small.up), other: large[1]})
    assert conflict_by_pair(clashes([a, b])) == {("a", "b"): pytest.approx(2 / 202)}


@pytest.mark.parametrize(("weight", "said"), [(0.0, "0"), ((0.0, 0.5), "0:0.5")])
def test_an_adapter_that_changes_nothing_at_its_weight_is_named(weight, said):
    a, c = (source(name, E[:, :1], E[:1]) for name in "ac")
    with pytest.raises(AdapterError, match=f"^b changes nothing at its weight {said}, so"):
        clashes([a, source("b", E[:, :1], E[:1], weight=weight), c])


def test_the_same_inputs_with_other_outputs_overlap_in_rows_alone():
    pair = one(source("a", E[:, :1], E[:1]), source("b", E[:, 1:2], E[:1]))
    assert (pair.rows, pair.columns, pair.conflict) == pytest.approx((1, 0, 0))
    assert (pair.row_angle, pair.column_angle) == pytest.approx((0, 90))


def test_an_angle_of_60_degrees():
    turned = torch.tensor([[0.5, 0.75**0.5, 0.0]])
    pair = one(source("a", E[:, :1], E[:1]), source("b", E[:, :1], turned))
    assert pair.row_angle == pytest.approx(60, abs=1e-4)
    assert pair.rows == pytest.approx(0.25)
    assert pair.cosine == pytest.approx(0.5)


def test_a_direction_counts_by_its_energy():
    # a reads e0 with energy 9 and e1 with 1, b reads e1 alone: 0.1 of 1 over sqrt(0.82)
    pair = one(source("a", E[:, :2] * torch.tensor([3.0, 1.0]), E[:2]), source("b", E[:, 2:], E[1:2]))
    assert pair.rows == pytest.approx(0.1 / 0.82**0.5)


def test_blocks_stand_in_the_order_of_the_model():
    paths = ["up_blocks.1.attentions.0.proj_in", "mid_block.resnets.0.conv1", "down_blocks.10.resnets.0.conv1"]
    targets = [("unet", path) for path in [*paths, "down_blocks.2.resnets.0.conv1"]]
    targets.append(("text_encoder", "encoder.layers.3.mlp.fc1"))
    both = [MergeSource(name, {t: LoraModule(E[:1], E[:, :1], 1.0) for t in targets}) for name in "ab"]
    assert [pair.block for pair in clashes(both)] == [
        "text_encoder.3",
        "down_blocks.2.resnets.0",
        "down_blocks.10.resnets.0",
        "mid_block.resnets.0",
        "up_blocks.1.attentions.0",
    ]


def test_adapters_that_share_no_module_are_refused():
    other = ("unet", "conv_in")
    with pytest.raises(AdapterError, match="no two of the adapters change the same module"):
        clashes([source("a", E[:, :1], E[:1]), source("b", E[:, :1], E[:1], target=other)])


def run(*words):
    return guarded(main, [str(word) for word in words])


@pytest.mark.slow
def test_the_program_prints_a_table_and_draws_a_map(adapter_file, tmp_path, capsys):
    files = [adapter_file(name, seed=seed) for seed, name in enumerate("abc")]
    assert run(*files, "-o", tmp_path / "clash.png") == 0
    text = capsys.readouterr().out
    for names in ("a and b", "a and c", "b and c"):
        assert f"{names}: " in text
    assert text.count("down_blocks.0.attentions.0") == 3
    with Image.open(tmp_path / "clash.png") as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300
    before = (tmp_path / "clash.png").read_bytes()
    assert run(*files, "-o", tmp_path / "clash.png") == 2
    assert run(*files, "-o", tmp_path / "clash.png", "--overwrite") == 0
    assert (tmp_path / "clash.png").read_bytes() == before


def test_a_files_name_does_not_command_the_terminal(adapter_file, capsys):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    assert run(a.rename(a.with_name("\x1b[2J.safetensors")), b) == 0
    assert capsys.readouterr().out.startswith("\\x1b[2J and b: ")


def test_json_has_a_row_for_each_pair_and_block(adapter_file, capsys):
    a, b = adapter_file("a", seed=1), adapter_file("b", seed=2)
    assert run(a, f"{b}:0.5", "--json", "--blocks", "up") == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["first"] for row in found} == {"a"}
    assert all(row["block"].startswith("up_blocks") and 0 <= row["conflict"] <= 1 for row in found)


def test_new_words_are_no_obstacle(adapter_file, capsys):
    a = add_words(adapter_file("a", seed=1), {"<cat>": {"text_encoder": torch.ones(2, 8)}})
    assert run(a, adapter_file("b", seed=2)) == 0
    assert "a and b: " in capsys.readouterr().out


def test_one_adapter_or_two_families_are_refused(adapter_file, capsys):
    a, b = adapter_file("a"), adapter_file("b", "sd1")
    assert run(a) == 2
    assert run(a, b) == 2
    error = capsys.readouterr().err
    assert "wanted two adapters or more" in error
    assert "only adapters of one family" in error
