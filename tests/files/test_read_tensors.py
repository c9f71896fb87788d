"""Tensors out of the mapped file: the values that the safetensors library reads, and none that are not finite."""

import functools
import json
import struct
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from sfumato.errors import FileError
from sfumato.files import read_header, read_tensors, write_tensors
from sfumato.files.header import DTYPE_BYTES, FLOATS
from sfumato.files.read import DTYPES, read_copies
from tests.files.said import said


def test_every_dtype_of_the_header_is_torchs_of_that_size():
    assert DTYPES.keys() == DTYPE_BYTES.keys()
    assert {name: dtype.itemsize for name, dtype in DTYPES.items()} == dict(DTYPE_BYTES)
    assert {name for name, dtype in DTYPES.items() if dtype.is_floating_point} == FLOATS


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_they_are_what_the_library_reads(dtype, tmp_path):
    bits = torch.arange(2 * 3 * dtype.itemsize, dtype=torch.uint8) % 2
    one = bits[: dtype.itemsize].clone().view(dtype)[0]
    values = {"a": bits.view(dtype).view(2, 3), "scalar": one, "z": torch.ones(5)}
    (tmp_path / "a").write_bytes(save(values))
    wanted, found = load_file(tmp_path / "a"), read_tensors(tmp_path / "a")
    assert {name: (x.dtype, x.shape) for name, x in found.items()} == {n: (x.dtype, x.shape) for n, x in wanted.items()}
    for name, value in found.items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), wanted[name].reshape(-1).view(torch.uint8))


def test_the_named_ones_alone(tmp_path):
    (tmp_path / "a").write_bytes(save({name: torch.full((3,), float(i)) for i, name in enumerate("abc")}))
    assert {name: x.tolist() for name, x in read_tensors(tmp_path / "a", ["c", "a"]).items()} == {
        "c": [2.0] * 3,
        "a": [0.0] * 3,
    }


def test_a_name_that_is_not_there_is_one_line(tmp_path):
    write_tensors(tmp_path / "a", {"w": torch.ones(1)})
    assert said(read_tensors, tmp_path / "a", ["v"]) == (
        "a: there is no tensor 'v' in it; read_header tells which there are."
    )


def test_a_header_that_leaves_the_values_at_an_odd_address(tmp_path):
    text = json.dumps({"w": {"dtype": "F32", "shape": [3], "data_offsets": [0, 12]}}).encode()
    text += b" " * (1 - len(text) % 2)
    assert len(text) % 2
    (tmp_path / "a").write_bytes(struct.pack("<Q", len(text)) + text + struct.pack("<3f", 1, 2, 3))
    assert read_tensors(tmp_path / "a")["w"].tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("place", [0, -1])
@pytest.mark.parametrize("dtype", [torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_value_that_is_not_finite_is_found_at_either_end_of_each_tensor(dtype, place, tmp_path):
    """Neighbours are looked at together: of their own dtype, of others, and whole numbers between."""
    good = {f"{name}{i}": torch.ones(3).to(each) for i, each in enumerate([dtype, torch.float16]) for name in "abc"}
    good["whole"] = torch.ones(3, dtype=torch.int32)
    for name in [name for name, x in good.items() if x.dtype == dtype]:
        bad = good[name].float().clone()
        bad[place] = float("inf")
        (tmp_path / "a").unlink(missing_ok=True)
        (tmp_path / "a").write_bytes(save(good | {name: bad.to(dtype)}))
        with pytest.raises(FileError, match=rf"1 of 7 tensors hold NaN or Inf, first {name}\."):
            read_tensors(tmp_path / "a")
        rest = [other for other in good if other != name]
        assert read_tensors(tmp_path / "a", rest).keys() == set(rest)


@pytest.mark.parametrize(
    ("other", "said"),
    [
        (save({"w": torch.ones(3)}, {"k": "c"}), "the file changed while it was read"),
        (save({"w": torch.ones(4)}, {"k": "b"}), "the file changed while it was read"),
        (save({"w": torch.ones(1)}, {"k": "b"}), "could not be mapped"),
    ],
)
def test_a_file_replaced_after_its_header_was_read_is_refused(other, said, tmp_path):
    (tmp_path / "a").write_bytes(save({"w": torch.ones(3)}, {"k": "b"}))
    header = read_header(tmp_path / "a")
    (tmp_path / "a").unlink()
    (tmp_path / "a").write_bytes(other)
    with pytest.raises(FileError, match=said):
        read_tensors(tmp_path / "a", header=header)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_are_the_same_in_one_dtype_and_outlive_the_file(dtype, tmp_path):
    path = tmp_path / "a"
    path.write_bytes(
        save({"h": torch.randn(2, 3).half(), "f": torch.randn(4), "ids": torch.arange(3), "x": torch.ones(1)})
    )
    wanted = {n: (t.to(dtype) if t.is_floating_point() else t).clone() for n, t in read_tensors(path).items()}
    found = read_copies(read_header(path), ["f", "ids", "h"], dtype)
    path.write_bytes(bytes(path.stat().st_size))
    assert found.keys() == {"h", "f", "ids"}
    assert all(t.dtype == wanted[name].dtype and torch.equal(t, wanted[name]) for name, t in found.items())


def test_copies_of_a_file_that_changed_or_holds_what_is_not_finite_are_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(save({"w": torch.ones(3), "v": torch.full((2,), float("nan"))}))
    header = read_header(path)
    assert read_copies(header, ["w"], torch.float32)["w"].tolist() == [1.0] * 3
    with pytest.raises(FileError, match=r"a: 1 of 2 tensors hold NaN or Inf, first v\."):
        read_copies(header, ["w", "v"], torch.float32)
    path.write_bytes(save({"w": torch.ones(3), "u": torch.ones(2)}))
    with pytest.raises(FileError, match="the file changed while it was read"):
        read_copies(header, ["w"], torch.float32)
    path.unlink()
    with pytest.raises(FileError, match=r"could not be read \(No such file"):
        read_copies(header, ["w"], torch.float32)


def fail(words):
    raise RuntimeError(words)


def test_what_cannot_be_mapped_or_has_no_numbers(tmp_path, monkeypatch):
    path = write_tensors(tmp_path / "a.safetensors", {"w": torch.ones(2)})
    header = read_header(path)
    path.unlink()
    assert said(read_tensors, path, header=header).startswith("a.safetensors: the file could not be mapped (")
    save_file({"v": torch.ones(1), "w": torch.tensor([1.0, float("nan")])}, path)
    with monkeypatch.context() as patched:
        empty = SimpleNamespace(data_ptr=functools.partial(fail, "data pointer on an invalid python storage"))
        patched.setattr(torch.UntypedStorage, "from_file", lambda *_: empty)
        assert said(read_tensors, path) == (
            "a.safetensors: the file could not be mapped (data pointer on an invalid python storage). Close other "
            "programs, or enlarge Windows' page file."
        )
    assert said(read_tensors, path) == (
        "a.safetensors: 1 of 2 tensors hold NaN or Inf, first w. The training that wrote it diverged; use an earlier "
        "save."
    )
    assert read_tensors(path, ["v"])["v"].tolist() == [1.0]
