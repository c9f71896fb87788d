"""What is no weight file, by its name, its first bytes and its header, to the letter: `sniff` and `header`."""

import os
import re

import pytest

from sfumato.files import read_header
from sfumato.files.header import describe_unknown_file
from tests.files.said import said


@pytest.mark.parametrize(
    ("head", "what"),
    [
        (b"\x80\x01.", "this is no safetensors file"),
        (b"\x80\x02}", "this is a pickle file (.ckpt/.pt/.bin); a pickle can run programs, so it was not opened. "),
        (b"\x80\x06}", "this is no safetensors file"),
        (b"cos\nmkdir\n", "this is a pickle file"),
        (b"(dp0\n", "this is a pickle file"),
        (b"}q\x00", "this is a pickle file"),
        (b"]q\x00", "this is a pickle file"),
        (b"PK\x03\x04" + bytes(26) + b"archive/data.pkl", "this is a PyTorch .ckpt/.pt file, a zip with a pickle in"),
        (b"PK\x03\x04" + bytes(26) + b"archive/version", "this is a PyTorch .ckpt/.pt file"),
        (bytes(257) + b"ustar\x0000", "this is a tar archive, as early PyTorch wrote with a pickle in it; a"),
        (b"GIF89a\x01\x02\xff", "this is a GIF image, not a weight file. Name the .safetensors file it belongs to."),
        (b"RIFF\x01\x02\x03\x04WAVE\xff\xfe\xfd", "this is no safetensors file"),
        (b"7z\xbc\xaf\x27\x1c", "this is a 7z archive, not a weight file. Unpack it"),
        (b"Rar!\x1a", "this is a RAR archive"),
        (b"\xfd7zXZ", "this is an xz archive"),
        (b"BZh9", "this is a bzip2 archive"),
        (b"\x28\xb5\x2f\xfd", "this is a zstd archive"),
        (b"\x89HDF\r\n\x1a\n", "this is an HDF5 file; only safetensors files are read. Take the .safetensors version"),
        (bytes(5), "the file begins with 5 zero bytes"),
        (b"\t<?xml version", "this is a web page"),
        (b"<!-- x", "this is a web page"),
        (b"<pre>", "this is a text file"),
        (b"{\xff\xfe\xfd\xfc", "this is no safetensors file"),
        (b"a\tb\r\nc", "this is a text file"),
        (b"a\x01b...", "this is no safetensors file"),
    ],
)  # fmt: skip
def test_the_first_bytes_tell(head, what):
    assert describe_unknown_file(head).startswith(what)


def test_a_pickle_s_advice_is_whole():
    assert describe_unknown_file(b"\x80\x04").endswith(
        "a pickle can run programs, so it was not opened. Take the .safetensors version of it, or convert it on a "
        "machine you can throw away."
    )


def test_a_name_that_is_none(tmp_path):
    for name in "abcde":
        (tmp_path / f"{name}.safetensors").touch()
    assert said(read_header, tmp_path) == (
        f"{tmp_path.name}: this is a folder. Name the .safetensors file in it. It holds a.safetensors, b.safetensors, "
        "c.safetensors."
    )
    (tmp_path / "empty").mkdir()
    assert said(read_header, tmp_path / "empty") == "empty: this is a folder. Name the .safetensors file in it."
    assert said(read_header, tmp_path / "empty/a.safetensors") == (
        f"{tmp_path}/empty/a.safetensors: there is no such file. Check the name and the folder."
    )
    (tmp_path / "line.safetensors").touch()
    assert said(read_header, tmp_path / "lime.safetensors") == (
        f"{tmp_path}/lime.safetensors: there is no such file. Did you mean {tmp_path}/line.safetensors?"
    )
    assert said(read_header, tmp_path / "a").endswith(f"there is no such file. Did you mean {tmp_path}/a.safetensors?")
    assert said(read_header, tmp_path / "nowhere/a") == (
        f"{tmp_path}/nowhere/a: there is no such file. Check the name and the folder."
    )
    os.mkfifo(tmp_path / "pipe")
    assert said(read_header, tmp_path / "pipe") == (
        "pipe: this is a device or a pipe, not a file. Name a .safetensors file."
    )
    # Python's versions name the null byte in other words.
    assert re.fullmatch(
        r"'a\\x00b': the file cannot be read \(.*embedded null .*\)\. Check its name and permissions\.",
        said(read_header, "a\0b"),
    )
    assert said(read_header, tmp_path / ("x" * 300)) == (
        f"{'x' * 300!r}: the file cannot be read (File name too long). Check its name and permissions."
    )


@pytest.mark.parametrize(
    ("value", "kind"),
    [("[]", "a list"), ("{}", "an object"), ("true", "a truth value"), ("null", "nothing"), ("1.5", "a number")],
)
def test_what_stands_in_place_of_a_text_is_named(value, kind, tmp_path):
    text = f'{{"__metadata__":{{"a":{value}}},"w":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'.encode()
    (tmp_path / "a").write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    assert said(read_header, tmp_path / "a") == f"a: __metadata__ 'a' is {kind}, wanted a text. Save it again."
