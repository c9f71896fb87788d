"""Each limit of the reader and the writer of weight files, on its two sides."""

import json
import math
import struct
import tracemalloc

import pytest
import torch
from safetensors.torch import save

from sfumato.errors import FileError
from sfumato.files import read_header, read_tensors, write_tensors
from sfumato.files.header import DIM_LIMIT, HEADER_LIMIT, NAME_LIMIT, PART_LIMIT, RANK_LIMIT, describe_unknown_file
from sfumato.files.read import is_finite
from sfumato.files.save import hashes, header_bytes


def raw(header, data=b"", length=None):
    """A file of a header, as JSON or as text, and data."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(shape=(1,), offsets=(0, 4), dtype="F32"):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


FOUR = struct.pack("<f", 1)
ONE = json.dumps({"w": entry()})


@pytest.fixture
def refusal(tmp_path):
    """What is said of these bytes; empty if they are taken."""

    def look(blob):
        path = tmp_path / "a.safetensors"
        path.unlink(missing_ok=True)
        path.write_bytes(blob)
        try:
            read_header(path)
            read_tensors(path)
        except FileError as error:
            return str(error)
        return ""

    return look


# The header


def test_a_header_may_be_as_long_as_the_limit_and_no_longer(refusal):
    assert refusal(raw(ONE + " " * (HEADER_LIMIT - len(ONE)), FOUR)) == ""
    assert "at most 8,000,000" in refusal(raw(ONE + " " * (HEADER_LIMIT - len(ONE) + 1), FOUR))


def test_a_length_that_no_disk_holds_is_no_length(refusal):
    assert "at most 8,000,000" in refusal(raw(ONE, FOUR, length=2**40 - 1))
    assert "do not tell the length" in refusal(raw(ONE, FOUR, length=2**40))


@pytest.mark.parametrize("missing", [1, 7, 8])
def test_a_file_that_ends_in_its_header_is_cut_off(missing, refusal):
    assert f"inside its header of {len(ONE)}" in refusal(raw(ONE)[:-missing])


def test_a_header_has_as_many_parts_as_the_limit_and_no_more(refusal):
    own = 3 + 5 + 2  # objects, keys and lists of the header without what is in __metadata__
    for more, said in ((0, ""), (1, "has 250,001 parts, at most 250,000")):
        metadata = {str(number): "" for number in range(PART_LIMIT - own + more)}
        found = refusal(raw({"__metadata__": metadata, "w": entry()}, FOUR))
        assert said in found
        assert bool(found) is bool(said)


def test_parts_within_a_text_are_none(refusal):
    """kohya counts every tag of a data set in one text, and a hostile name cannot pass for such."""
    tags = json.dumps({f"{{[{number}": 1 for number in range(PART_LIMIT)})
    assert refusal(raw({"__metadata__": {"ss_tag_frequency": tags}, "w": entry()}, FOUR)) == ""
    keys = ",".join(f'"{number}\\\\" :""' for number in range(PART_LIMIT))
    said = refusal(raw(f'{{"__metadata__":{{{keys}}},{ONE[1:]}', FOUR))
    assert f"has {PART_LIMIT + 10:,} parts" in said
    assert "parts" in refusal(raw('{"a":' + "[" * (PART_LIMIT + 1) + '"' + '\\"' * 1_000_000))


@pytest.mark.slow
def test_to_refuse_half_a_million_keys_takes_little_memory(refusal):
    blob = raw({"__metadata__": {str(number): "" for number in range(2 * PART_LIMIT)}, "w": entry()}, FOUR)
    tracemalloc.start()
    assert "has 500,010 parts" in refusal(blob)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 4 * len(blob)


@pytest.mark.parametrize(("name", "taken"), [("w" * NAME_LIMIT, True), ("w" * (NAME_LIMIT + 1), False), ("", False)])
def test_a_name_has_1_to_512_characters(name, taken, refusal, tmp_path):
    assert (refusal(raw({name: entry()}, FOUR)) == "") is taken
    if taken:
        write_tensors(tmp_path / "b.safetensors", {name: torch.ones(1)})
        return
    with pytest.raises(FileError, match="cannot be written"):
        write_tensors(tmp_path / "b.safetensors", {name: torch.ones(1)})
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2J", "\u202e"])
def test_a_name_that_would_draw_on_the_terminal_is_refused_and_shown_harmless(name, refusal):
    said = refusal(raw({name: entry()}, FOUR))
    assert "printable" in said
    assert said.isprintable()


def test_a_name_of_80_characters_is_quoted_whole(refusal):
    assert "'" + "w" * 80 + "'" in refusal(raw({"w" * 80: entry(dtype="X")}))
    assert "'" + "w" * 77 + "...'" in refusal(raw({"w" * 81: entry(dtype="X")}))


def test_a_shape_has_8_dimensions_below_2_to_the_31(refusal):
    assert refusal(raw({"w": entry([1] * RANK_LIMIT)}, FOUR)) == ""
    assert "shape that no weight has" in refusal(raw({"w": entry([1] * (RANK_LIMIT + 1))}, FOUR))
    assert "shape that no weight has" in refusal(raw({"w": entry([DIM_LIMIT])}, FOUR))
    assert f"needs {4 * (DIM_LIMIT - 1):,} bytes" in refusal(raw({"w": entry([DIM_LIMIT - 1])}, FOUR))


@pytest.mark.parametrize("shape", [[-1], [True], [1.0], "1", [[1]]])
def test_a_shape_is_of_whole_numbers(shape, refusal):
    blob = raw({"w": {"dtype": "F32", "shape": shape, "data_offsets": [0, 4]}}, FOUR)
    assert "shape that no weight has" in refusal(blob)


@pytest.mark.parametrize("offsets", [[0.0, 4.0], [False, 4], [-4, 0], [0, 4, 4], [4, 0]])
def test_offsets_are_two_whole_numbers_in_order(offsets, refusal):
    assert "no valid data_offsets" in refusal(raw({"w": entry(offsets=offsets)}, FOUR))


def test_each_byte_belongs_to_one_tensor(refusal):
    def two(second, data):
        return refusal(raw({"w": entry(), "v": entry([4], second, "U8")}, data))

    assert two((4, 8), FOUR + b"abcd") == ""
    assert "share bytes" in two((3, 7), FOUR + b"abc")
    assert "1 bytes before tensor 'v' belong to no tensor" in two((5, 9), FOUR + b"abcde")
    assert "1 bytes follow the last tensor" in two((4, 8), FOUR + b"abcde")
    assert "need 8 bytes, the file has 7" in two((4, 8), FOUR + b"abc")


def test_tensors_come_in_the_order_of_their_bytes(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(raw({"w": entry(offsets=(4, 8)), "v": entry()}, FOUR * 2))
    assert list(read_header(tmp_path / "a.safetensors").tensors) == ["v", "w"]


def test_a_folder_tells_what_is_in_it(tmp_path):
    (tmp_path / "b.safetensors").touch()
    with pytest.raises(FileError, match=r"this is a folder.* It holds b\.safetensors\.$"):
        read_header(tmp_path)


# Values


def test_a_file_that_is_replaced_between_header_and_tensors_is_noticed(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(save({"w": torch.ones(2)}))
    header, before = read_header(path), path.read_bytes()
    for other in (save({"w": torch.ones(3)}), save({"v": torch.ones(2)}), before + bytes(8)):
        path.unlink()
        path.write_bytes(other)
        with pytest.raises(FileError, match="changed while it was read"):
            read_tensors(path, header=header)
    path.unlink()
    path.write_bytes(before)
    assert read_tensors(path, header=header)["w"].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_that_is_not_finite_is_found(dtype, value, tmp_path):
    values = torch.tensor([1.0, value, -1.0]).to(dtype)
    if dtype == torch.float8_e4m3fn and not math.isnan(value):
        assert is_finite(torch.tensor([448.0, -448.0]).to(dtype))  # it has no infinity
        return
    assert not is_finite(values)
    (tmp_path / "a.safetensors").write_bytes(save({"v": torch.ones(2), "w": values}))
    with pytest.raises(FileError, match="1 of 2 tensors hold NaN or Inf, first w"):
        read_tensors(tmp_path / "a.safetensors")
    assert set(read_tensors(tmp_path / "a.safetensors", allow_nonfinite=True)) == {"v", "w"}


def test_neighbours_of_two_dtypes_are_looked_at_as_what_they_are(tmp_path):
    """The last bits of the wide one would be NaN in the narrow one's format."""
    wide = torch.frombuffer(bytearray(b"\xff\xff\x7f\x3f"), dtype=torch.float32)
    (tmp_path / "a.safetensors").write_bytes(save({"a": wide, "b": torch.ones(2, dtype=torch.float16)}))
    assert read_tensors(tmp_path / "a.safetensors")["a"].item() == pytest.approx(1)


# Writing


def test_what_is_written_is_what_the_library_writes(tmp_path):
    """Wide dtypes first, then by name, the header padded to eight bytes."""
    for count in range(1, 9):
        tensors = {"a" * count: torch.ones(1, dtype=torch.float16), "z": torch.ones(1), "y": torch.ones(1)}
        path = write_tensors(tmp_path / f"{count}.safetensors", tensors, {"k": "v"})
        assert path.read_bytes() == save(tensors, {"k": "v"})


def test_metadata_are_in_order():
    tensors = {"w": torch.ones(1)}
    assert header_bytes(tensors, {"b": "2", "a": "1"}) == header_bytes(tensors, {"a": "1", "b": "2"})


def test_nothing_is_not_written(tmp_path):
    with pytest.raises(FileError, match="no tensors to write"):
        write_tensors(tmp_path / "a.safetensors", {})


def test_the_old_hash_is_of_64_kib_at_1_mib_with_the_training_s_metadata_only():
    import hashlib

    tensors = {"w": torch.arange(400_000, dtype=torch.float32)}
    head = header_bytes(tensors, {"ss_tag": "x"})
    blob = head + tensors["w"].numpy().tobytes()
    wanted = hashlib.sha256(blob[0x100000 : 0x100000 + 0x10000]).hexdigest()[:8]
    assert hashes(tensors, {"ss_tag": "x", "sshs": "y", "name": "z"})["sshs_legacy_hash"] == wanted


# What a file really is


@pytest.mark.parametrize(
    ("head", "said"),
    [
        (b"\x80\x02}", "pickle"),
        (b"\x80\x05\x95", "pickle"),
        (b"PK\x05\x06" + bytes(18), "a zip archive"),
        (bytes(257) + b"ustar", "a tar archive"),
        (b"\n \t<!DOCTYPE html>", "a web page"),
        (b"\xef\xbb\xbf<html>", "a web page"),
        (b'[{"error": 1}]', "JSON text"),
        ("é".encode() * 255 + b"ab\xc3", "a text file"),
    ],
)
def test_it_is_told_from_the_first_bytes(head, said):
    assert said in describe_unknown_file(head)
