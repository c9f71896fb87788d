"""Broken, hostile and mistaken files: each is refused in one line that says what it is."""

# ruff: noqa: UP031 - JSON is full of braces

import json
import os
import pickle
import zipfile

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from sfumato.errors import FileError
from sfumato.files.header import HEADER_LIMIT, PART_LIMIT, TENSOR_LIMIT, read_header
from sfumato.files.read import read_tensors


def raw(header, data=b"", length=None):
    """A safetensors file of any header text and data."""
    text = header.encode() if isinstance(header, str) else header
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def entry(dtype="F32", shape=(1,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def one(dtype="F32", shape=(1,), offsets=(0, 4), data=b"\0" * 4, **more):
    return raw(json.dumps({"w": entry(dtype, shape, offsets, **more)}), data)


ENTRY = '{"dtype":"F32","shape":[1],"data_offsets":[0,4]}'
FOUR = b"\0" * 4
MANY = json.dumps({f"w{i}": entry(shape=[0], offsets=[0, 0]) for i in range(TENSOR_LIMIT + 1)})

BROKEN = {
    "duplicate tensor": (
        raw('{"w":%s,"w":%s}' % (ENTRY, ENTRY), FOUR),
        "'w' is listed twice in the header, so what it means depends on the reader. Do not trust this file.",
    ),
    "duplicate field": (
        raw('{"w":{"dtype":"F32","dtype":"I32","shape":[1],"data_offsets":[0,4]}}', FOUR),
        "'dtype' is listed twice in the header, so what it means depends on the reader. Do not trust this file.",
    ),
    "duplicate metadata": (
        raw('{"__metadata__":{"a":"1","a":"2"},"w":%s}' % ENTRY, FOUR),
        "'a' is listed twice in the header, so what it means depends on the reader. Do not trust this file.",
    ),
    "two metadata": (
        raw('{"__metadata__":{},"__metadata__":{},"w":%s}' % ENTRY, FOUR),
        "'__metadata__' is listed twice in the header, so what it means depends on the reader. Do not trust this file.",
    ),
    "header bomb": (
        raw("{" + " " * HEADER_LIMIT),
        "the header is 8,000,001 bytes long, at most 8,000,000 are read. No weight file needs that; "
        "do not trust this one.",
    ),
    "tensor bomb": (raw(MANY), "the header lists 20,001 tensors, at most 20,000 are read. Do not trust this file."),
    "part bomb": (
        raw('{"__metadata__":{"a":[' + "[]," * PART_LIMIT + "[]]}}"),
        "the header has 250,006 parts, at most 250,000 are read. Do not trust this file.",
    ),
    "tensor bomb in disguise": (
        raw(MANY.replace("data_offsets", "data_\\u006fffsets")),
        "the header lists 20,001 tensors, at most 20,000 are read. Do not trust this file.",
    ),
    "deep": (raw('{"a":' + "[" * 100_000), "the header is nested too deep. Do not trust this file."),
    "bad utf-8": (
        raw(b'{"\xff":1}'),
        "the header is not readable as JSON ('utf-8' codec can't decode byte 0xff in position 2: "
        "invalid start byte). Download the file again.",
    ),
    "bad json": (
        raw('{"w":}'),
        "the header is not readable as JSON (Expecting value: line 1 column 6 (char 5)). Download the file again.",
    ),
    "number of thousands of digits": (
        raw('{"w":' + "9" * 5000 + "}"),
        "the header is not readable as JSON (Exceeds the limit (4300 digits) for integer string "
        "conversion: value has 5000 di). Download the file again.",
    ),
    "two values": (
        raw("{}{}"),
        "the header is not readable as JSON (Extra data: line 1 column 3 (char 2)). Download the file again.",
    ),
    "no tensors": (
        raw('{"__metadata__":{"a":"b"}}'),
        "the file holds no tensors. Download it again, or ask its author.",
    ),
    "metadata no object": (
        raw('{"__metadata__":[],"w":%s}' % ENTRY, FOUR),
        "__metadata__ is a list, wanted an object of texts. Save the file again.",
    ),
    "metadata a number": (
        raw('{"__metadata__":{"a":1},"w":%s}' % ENTRY, FOUR),
        "__metadata__ 'a' is a number, wanted a text. Save it again.",
    ),
    "metadata nested": (
        raw('{"__metadata__":{"a":{}},"w":%s}' % ENTRY, FOUR),
        "__metadata__ 'a' is an object, wanted a text. Save it again.",
    ),
    "metadata half a character": (
        raw('{"__metadata__":{"a":"\\ud800"},"w":%s}' % ENTRY, FOUR),
        "__metadata__ 'a' holds half a character. Save it again.",
    ),
    "empty name": (
        raw('{"":%s}' % ENTRY, FOUR),
        "a tensor is named '' (0 characters); wanted 1 to 512 printable ones. Do not trust this file.",
    ),
    "long name": (
        raw('{"%s":%s}' % ("w" * 513, ENTRY), FOUR),
        "a tensor is named "
        "'wwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwwww...' (513 "
        "characters); wanted 1 to 512 printable ones. Do not trust this file.",
    ),
    "terminal name": (
        raw('{"\\u001b[2J":%s}' % ENTRY, FOUR),
        r"a tensor is named '\x1b[2J' (4 characters); wanted 1 to 512 printable ones. Do not trust "
        "this file.",
    ),
    "half a character": (
        raw('{"\\ud800":%s}' % ENTRY, FOUR),
        r"a tensor is named '\ud800' (1 characters); wanted 1 to 512 printable ones. Do not trust "
        "this file.",
    ),
    "entry no object": (
        raw('{"w":[]}'),
        "tensor 'w' does not have exactly dtype, shape and data_offsets. Save it again.",
    ),
    "field missing": (
        raw('{"w":{"dtype":"F32","shape":[1]}}'),
        "tensor 'w' does not have exactly dtype, shape and data_offsets. Save it again.",
    ),
    "field more": (one(strides=[1]), "tensor 'w' does not have exactly dtype, shape and data_offsets. Save it again."),
    "dtype unknown": (
        one(dtype="F31"),
        "tensor 'w' has the dtype 'F31', known are BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, F16, "
        "BF16, U32, I32, F32, U64, I64, F64. Save it in one of these.",
    ),
    "dtype lower case": (
        one(dtype="f32"),
        "tensor 'w' has the dtype 'f32', known are BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, F16, "
        "BF16, U32, I32, F32, U64, I64, F64. Save it in one of these.",
    ),
    "dtype no text": (
        one(dtype=["F32"]),
        "tensor 'w' has the dtype '['F32']', known are BOOL, U8, I8, F8_E4M3, F8_E5M2, U16, I16, "
        "F16, BF16, U32, I32, F32, U64, I64, F64. Save it in one of these.",
    ),
    "shape negative": (
        one(shape=[-1]),
        "tensor 'w' has a shape that no weight has; wanted at most 8 integers below 2,147,483,648. "
        "Do not trust this file.",
    ),
    "shape fraction": (
        one(shape=[1.0]),
        "tensor 'w' has a shape that no weight has; wanted at most 8 integers below 2,147,483,648. "
        "Do not trust this file.",
    ),
    "shape true": (
        one(shape=[True]),
        "tensor 'w' has a shape that no weight has; wanted at most 8 integers below 2,147,483,648. "
        "Do not trust this file.",
    ),
    "shape no list": (
        raw('{"w":{"dtype":"F32","shape":1,"data_offsets":[0,4]}}', FOUR),
        "tensor 'w' has a shape that no weight has; wanted at most 8 integers below 2,147,483,648. "
        "Do not trust this file.",
    ),
    "shape huge": (
        one(shape=[2**31]),
        "tensor 'w' has a shape that no weight has; wanted at most 8 integers below 2,147,483,648. "
        "Do not trust this file.",
    ),
    "shape deep": (
        one(shape=[1] * 9),
        "tensor 'w' has a shape that no weight has; wanted at most 8 integers below 2,147,483,648. "
        "Do not trust this file.",
    ),
    "zero-size": (
        one(shape=[0], offsets=[0, 0], data=b""),
        "tensor 'w' is empty (shape [0]). No weight is; save it again.",
    ),
    "zero-size of a huge one": (
        one(shape=[0, 2**30], offsets=[0, 0], data=b""),
        "tensor 'w' is empty (shape [0, 1073741824]). No weight is; save it again.",
    ),
    "overflow": (
        one(shape=[2**30] * 4),
        "tensor 'w' of shape [1073741824, 1073741824, 1073741824, 1073741824] in F32 needs "
        "5,316,911,983,139,663,491,615,228,241,121,378,304 bytes, its data_offsets give 4. Do not "
        "trust this file.",
    ),
    "offsets reversed": (one(offsets=[4, 0]), "tensor 'w' has no valid data_offsets. Do not trust this file."),
    "offsets negative": (one(offsets=[-4, 0]), "tensor 'w' has no valid data_offsets. Do not trust this file."),
    "offsets three": (one(offsets=[0, 4, 8]), "tensor 'w' has no valid data_offsets. Do not trust this file."),
    "offsets do not fit the shape": (
        one(shape=[2]),
        "tensor 'w' of shape [2] in F32 needs 8 bytes, its data_offsets give 4. Do not trust this file.",
    ),
    "overlap": (
        raw(json.dumps({"a": entry(), "b": entry(offsets=[2, 6])}), b"\0" * 6),
        "tensors 'a' and 'b' share bytes. Do not trust this file.",
    ),
    "the same bytes twice": (
        raw(json.dumps({"a": entry(), "b": entry()}), FOUR),
        "tensors 'a' and 'b' share bytes. Do not trust this file.",
    ),
    "hole": (
        raw(json.dumps({"a": entry(), "b": entry(offsets=[8, 12])}), b"\0" * 12),
        "4 bytes before tensor 'b' belong to no tensor. Do not trust this file.",
    ),
    "hole at the start": (
        one(offsets=[4, 8], data=b"\0" * 8),
        "4 bytes before tensor 'w' belong to no tensor. Do not trust this file.",
    ),
    "trailing bytes": (one(data=b"\0" * 5), "1 bytes follow the last tensor. Something was added; download it again."),
    "truncated data": (
        one(data=b"\0" * 3),
        "the tensors need 4 bytes, the file has 3 of them. The download was cut off; download it again.",
    ),
    "truncated header": (
        one()[:30],
        "the file ends after 30 bytes, inside its header of 61. The download was cut off; download it again.",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_header_is_refused_in_one_line(case, tmp_path):
    content, message = BROKEN[case]
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(FileError) as error:
        read_header(path)
    assert str(error.value) == f"a.safetensors: {message}"
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 320


class Canary:
    def __reduce__(self):
        return os.mkdir, (self.directory,)

    def __init__(self, directory):
        self.directory = directory


def containers(directory):
    """Pickles that would make a directory, in the ways in which they are stored."""
    canary = [pickle.dumps(Canary(str(directory)), protocol=protocol) for protocol in range(6)]
    yield from canary
    with zipfile.ZipFile(directory.parent / "zip", "w") as archive:
        archive.writestr("archive/data.pkl", canary[2])
    yield (directory.parent / "zip").read_bytes()
    yield b"data".ljust(257, b"\0") + b"ustar\x0000" + canary[2]


@pytest.mark.parametrize("suffix", [".safetensors", ".SafeTensors", ".ckpt", ".png", ""])
def test_a_pickle_is_named_and_never_run(suffix, tmp_path):
    canary = tmp_path / "canary"
    contents = list(containers(canary))
    assert len(contents) == 8
    for content in contents:
        (tmp_path / f"a{suffix}").write_bytes(content)
        with pytest.raises(FileError, match=r"pickle.*can run programs, so it was not opened"):
            read_tensors(tmp_path / f"a{suffix}")
    assert not canary.exists()


FOREIGN = {
    b"": ("the file is empty (0 bytes). Download the file itself again."),
    b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n": (
        "this is a Git-LFS pointer, the real file was not downloaded. Run `git lfs pull`, or "
        "download the file from its page."
    ),
    b"\n<!DOCTYPE html><html>": (
        "this is a web page saved under a weight file's name (a log-in, a licence or an error page). "
        "Open its address in a browser and download the file itself."
    ),
    b"<HTML><body>404": (
        "this is a web page saved under a weight file's name (a log-in, a licence or an error page). "
        "Open its address in a browser and download the file itself."
    ),
    b'{"error":"Entry not found"}': (
        "this is JSON text, perhaps a server's error message, not a weight file. Download the file itself again."
    ),
    b"Invalid username or password.": ("this is a text file, not a weight file. Download the file itself again."),
    b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR": (
        "this is a PNG image, not a weight file. Name the .safetensors file it belongs to."
    ),
    b"\xff\xd8\xff\xe0\0\x10JFIF": (
        "this is a JPEG image, not a weight file. Name the .safetensors file it belongs to."
    ),
    b"RIFF\0\0\0\0WEBPVP8 ": ("this is a WebP image, not a weight file. Name the .safetensors file it belongs to."),
    b"PK\x03\x04\x14\0\0\0\0\0lora.safetensors": (
        "this is a zip archive, not a weight file. Unpack it and name the .safetensors file in it."
    ),
    b"\x1f\x8b\x08\0": ("this is a gzip archive, not a weight file. Unpack it and name the .safetensors file in it."),
    b"GGUF\x03\0\0\0": ("this is a GGUF file; only safetensors files are read. Take the .safetensors version of it."),
    b"\x93NUMPY\x01\0": (
        "this is a NumPy array; only safetensors files are read. Take the .safetensors version of it."
    ),
    b"\0" * 600: (
        "the file begins with 512 zero bytes, as a broken-off download leaves it. Download the file itself again."
    ),
    b"\x01\x02\x03\xff\xfe\xfd\xfc\xfb\xfa": (
        "this is no safetensors file (the first 8 bytes do not tell the length of a JSON header). Name another file."
    ),
    b"\x08": (
        "this is no safetensors file (the first 8 bytes do not tell the length of a JSON header). Name another file."
    ),
}


@pytest.mark.parametrize("content", FOREIGN, ids=FOREIGN.values())
def test_what_a_file_really_is_is_said(content, tmp_path):
    (tmp_path / "a.safetensors").write_bytes(content)
    with pytest.raises(FileError) as error:
        read_header(tmp_path / "a.safetensors")
    assert str(error.value) == f"a.safetensors: {FOREIGN[content]}"


def test_a_folder_says_which_files_it_holds(tmp_path):
    (tmp_path / "line.safetensors").touch()
    with pytest.raises(FileError, match=r"this is a folder\. .* It holds line\.safetensors\."):
        read_header(tmp_path)


def test_a_wrong_name_suggests_the_near_one(tmp_path):
    (tmp_path / "line.safetensors").touch()
    with pytest.raises(
        FileError, match=r"lime\.safetensors: there is no such file\. Did you mean .*line\.safetensors\?"
    ):
        read_header(tmp_path / "lime.safetensors")


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.safetensors")
    with pytest.raises(FileError, match="this is a device or a pipe"):
        read_header(tmp_path / "a.safetensors")


def test_a_nul_in_a_name_is_an_error_of_ours():
    with pytest.raises(FileError, match="the file cannot be read"):
        read_header("a\0b")


DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.float8_e4m3fn]


@settings(max_examples=40, deadline=None)
@given(
    shapes=st.dictionaries(
        st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=20).filter(
            lambda n: n != "__metadata__"
        ),
        st.tuples(st.lists(st.integers(1, 4), max_size=4), st.sampled_from(DTYPES)),
        min_size=1,
        max_size=5,
    ),
    metadata=st.dictionaries(st.text(max_size=5), st.text(max_size=10), max_size=3),
)
def test_whatever_the_library_writes_is_accepted(shapes, metadata, tmp_path_factory):
    path = tmp_path_factory.mktemp("h") / "a"
    tensors = {name: torch.ones(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    path.write_bytes(save(tensors, metadata or None))
    header = read_header(path)
    assert dict(header.metadata) == metadata
    assert {name: list(info.shape) for name, info in header.tensors.items()} == {n: s for n, (s, _) in shapes.items()}
    assert all(torch.equal(read_tensors(path)[name], tensor) for name, tensor in tensors.items())


GOOD = save({"a": torch.ones(2, 3), "b": torch.zeros(4, dtype=torch.float16)}, {"k": "v"})


@settings(max_examples=300, deadline=None)
@given(place=st.integers(0, len(GOOD) - 1), value=st.integers(0, 255), cut=st.integers(0, len(GOOD)))
def test_a_damaged_file_is_read_or_refused_and_never_crashes(place, value, cut, tmp_path_factory):
    damaged = bytearray(GOOD)
    damaged[place] = value
    path = tmp_path_factory.getbasetemp() / "damaged"
    path.write_bytes(bytes(damaged[:cut]) if cut % 2 else bytes(damaged))
    try:
        tensors = read_tensors(path)
    except FileError as error:
        assert "\n" not in str(error)  # noqa: PT017
    else:
        assert sum(tensor.nbytes for tensor in tensors.values()) == 32


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_tensor_with_nan_or_inf_is_refused_by_name(value, dtype, tmp_path):
    tensor = torch.ones(3, 5, dtype=dtype)
    tensor[1, 2] = value
    (tmp_path / "a").write_bytes(save({"good": torch.ones(2), "unet.bad": tensor}))
    with pytest.raises(FileError, match=r"1 of 2 tensors hold NaN or Inf, first unet\.bad\."):
        read_tensors(tmp_path / "a")
    assert len(read_tensors(tmp_path / "a", allow_nonfinite=True)) == 2


def test_the_largest_finite_half_is_finite(tmp_path):
    (tmp_path / "a").write_bytes(save({"w": torch.full((1000,), 65504.0, dtype=torch.float16)}))
    assert read_tensors(tmp_path / "a")["w"].sum(dtype=torch.float32) == 65_504_000


def test_a_file_that_changed_after_its_header_was_read_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(save({"w": torch.ones(3)}))
    header = read_header(tmp_path / "a")
    (tmp_path / "a").write_bytes(save({"v": torch.ones(3)}))
    with pytest.raises(FileError, match="the file changed while it was read"):
        read_tensors(tmp_path / "a", header=header)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b'{"__metadata__":{"\\ud800":"a"},"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', "half a character"),
        (b'{"v_pred":{"dtype":"F32","shape":[0,5],"data_offsets":[0,0]}}', "is empty"),
    ],
)
def test_a_key_of_half_a_character_and_a_marker_with_a_shape_are_refused(text, said, tmp_path):
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 4 * (b"[0,4]" in text))
    with pytest.raises(FileError, match=said):
        read_header(tmp_path / "a")
