"""Malformed safetensors: crashes, hangs, silent acceptance and memory of `sfumato.files`.

    python bench/files_malformed.py --generated 20000

Crafted files, each read in a process of its own whose peak memory is taken, and files that hypothesis generates: a
valid one with its bytes, its header's JSON or its length changed; one that goes wrong is shrunk. Each goes through
read_header and read_tensors. Refused means one line as FileError. What is accepted is looked at by rules of its own
here: the header as JSON without duplicate keys, tensors end to end over exactly the file's bytes, sizes that follow
from dtype and shape, finite values, and the safetensors library must agree. Prints JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import multiprocessing
import resource
import struct
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from sfumato.errors import FileError
from sfumato.files import read_header, read_tensors

BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}
BYTES |= {"I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}
MEMORY_SPARE = 50 * 2**20


def pack(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """The bytes of a file with this header: JSON, or text or bytes as they are."""
    text = header if isinstance(header, bytes) else (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def tensor(start: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    """A header's entry."""
    return {"dtype": dtype, "shape": list(shape) if isinstance(shape, tuple) else shape, "data_offsets": [start, end]}


ONES = struct.pack("<2f", 1, 1)
GOOD = pack({"__metadata__": {"a": "b"}, "w": tensor(), "v": tensor(8, 16)}, ONES + ONES)


def crafted() -> dict[str, bytes]:
    """Files none of which may be taken."""
    w = json.dumps(tensor())
    found: dict[str, bytes] = {
        "empty": b"",
        "one byte": b"\x01",
        "eight zeros": bytes(8),
        "length only": struct.pack("<Q", 2),
        "header of nothing": pack(b""),
        "no tensors": pack({}),
        "metadata only": pack({"__metadata__": {"a": "b"}}),
        "length past the end": pack({"w": tensor()}, ONES, length=10_000),
        "length of 2^63": pack({"w": tensor()}, ONES, length=2**63),
        "length of 2^64 - 1": pack({"w": tensor()}, ONES, length=2**64 - 1),
        "length of 100 MB": pack({"w": tensor()}, ONES, length=100_000_000),
        "length short by one": pack({"w": tensor()}, ONES, length=len(json.dumps({"w": tensor()})) - 1),
        "length long by one": pack({"w": tensor()}, ONES, length=len(json.dumps({"w": tensor()})) + 1),
        "a list": pack([1, 2], ONES),
        "a text": pack('"w"', ONES),
        "a number": pack("17", ONES),
        "null": pack("null", ONES),
        "cut JSON": pack('{"w": ', ONES),
        "trailing comma": pack('{"w": ' + w + ",}", ONES),
        "two objects": pack('{"w": ' + w + "}{}", ONES),
        "bad UTF-8": pack(b'{"\xff": ' + w.encode() + b"}", ONES),
        "UTF-16": pack(json.dumps({"w": tensor()}).encode("utf-16"), ONES),
        "BOM": pack(b"\xef\xbb\xbf" + json.dumps({"w": tensor()}).encode(), ONES),
        "deep lists": pack('{"w": ' + "[" * 100_000 + "]" * 100_000 + "}", ONES),
        "deep objects": pack('{"a":' * 50_000 + "1" + "}" * 50_000, ONES),
        "duplicate tensor": pack('{"w": ' + w + ', "w": ' + w + "}", ONES),
        "duplicate key inside": pack('{"w": {"dtype": "F32", "dtype": "F32", ' + w[16:] + "}", ONES),
        "duplicate metadata key": pack('{"__metadata__": {"a": "1", "a": "2"}, "w": ' + w + "}", ONES),
        "duplicate metadata": pack('{"__metadata__": {}, "__metadata__": {}, "w": ' + w + "}", ONES),
        "metadata is a list": pack({"__metadata__": ["a"], "w": tensor()}, ONES),
        "metadata holds a number": pack({"__metadata__": {"a": 1}, "w": tensor()}, ONES),
        "metadata holds an object": pack({"__metadata__": {"a": {}}, "w": tensor()}, ONES),
        "missing dtype": pack({"w": {"shape": [2], "data_offsets": [0, 8]}}, ONES),
        "missing shape": pack({"w": {"dtype": "F32", "data_offsets": [0, 8]}}, ONES),
        "missing offsets": pack({"w": {"dtype": "F32", "shape": [2]}}, ONES),
        "one more key": pack({"w": tensor() | {"code": "x"}}, ONES),
        "unknown dtype": pack({"w": tensor(dtype="F31")}, ONES),
        "dtype is a number": pack({"w": tensor(dtype=4)}, ONES),
        "small-letter dtype": pack({"w": tensor(dtype="f32")}, ONES),
        "shape is a number": pack({"w": tensor(shape=2)}, ONES),
        "shape of texts": pack({"w": tensor(shape=["2"])}, ONES),
        "shape of floats": pack({"w": tensor(shape=[2.0])}, ONES),
        "shape of truth": pack({"w": tensor(0, 4, shape=[True])}, ONES[:4]),
        "negative shape": pack({"w": tensor(shape=[-2])}, ONES),
        "two negatives": pack({"w": tensor(shape=[-1, -2])}, ONES),
        "huge shape": pack({"w": tensor(shape=[2**62, 4])}, ONES),
        "overflow to the right size": pack({"w": tensor(shape=[2**32, 2**32, 2])}, ONES),
        "nothing times much": pack({"w": tensor(0, 0, shape=[0, 2**40]), "v": tensor()}, ONES),
        "empty tensor": pack({"w": tensor(0, 0, shape=[0]), "v": tensor()}, ONES),
        "shape of 100 dimensions": pack({"w": tensor(shape=[1] * 99 + [2])}, ONES),
        "offsets backwards": pack({"w": tensor(8, 0)}, ONES),
        "negative offset": pack({"w": tensor(-8, 0)}, ONES),
        "offsets of floats": pack({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0.0, 8.0]}}, ONES),
        "three offsets": pack({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, ONES),
        "past the end": pack({"w": tensor(0, 16, shape=[4])}, ONES),
        "a hole": pack({"w": tensor(8, 16)}, ONES + ONES),
        "a hole between": pack({"w": tensor(), "v": tensor(16, 24)}, ONES * 3),
        "shared bytes": pack({"w": tensor(), "v": tensor()}, ONES),
        "half shared": pack({"w": tensor(), "v": tensor(4, 12)}, ONES + ONES[:4]),
        "bytes behind": pack({"w": tensor()}, ONES + b"x"),
        "a zip behind": pack({"w": tensor()}, ONES + b"PK\x03\x04"),
        "wrong size": pack({"w": tensor(shape=[3])}, ONES),
        "nameless": pack({"": tensor()}, ONES),
        "a name of 100,000": pack({"w" * 100_000: tensor()}, ONES),
        "NaN": pack({"w": tensor()}, struct.pack("<2f", 1, math.nan)),
        "Inf": pack({"w": tensor()}, struct.pack("<2f", 1, math.inf)),
        "a number of 10,000 digits": pack('{"w": ' + w.replace("[2]", "[" + "9" * 10_000 + "]") + "}", ONES),
        "pickle": b"\x80\x04\x95" + bytes(200),
        "zip": b"PK\x03\x04" + bytes(200),
        "web page": b"<!DOCTYPE html><html></html>" + bytes(100),
        "LFS pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }  # fmt: skip
    return found


def crafted_large() -> dict[str, bytes]:
    """More of them, of megabytes; making these takes seconds."""
    w = json.dumps(tensor())
    return {
        "400,000 empty tensors": pack({f"w{i}": tensor(0, 0, shape=[0]) for i in range(400_000)}),
        "30,000 tensors": pack({f"w{i}": tensor(i, i + 1, (1,), "U8") for i in range(30_000)}, bytes(30_000)),
        "95 MB of metadata": pack('{"__metadata__": {"a": "' + "x" * 95_000_000 + '"}, "w": ' + w + "}", ONES),
        "7 MB of metadata keys": pack({"__metadata__": {str(i): "" for i in range(500_000)}, "w": tensor()}, ONES),
    }


ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**63, 2**64, 1e308, 0.5, "", "F32", "w"),
    *([], [0], [0, 8], {}, {"a": 1}, tensor(), tensor(8, 16), tensor(16, 24)),
)
"""Values that a header's entry, or a part of one, may be replaced by."""
PIECES = ('"', "{", "}", "[", "]", ",", ":", "\\u0000", "\\ud800", " ", "\0", "1e999", "NaN")
HEADER = json.loads(GOOD[8 : 8 + int.from_bytes(GOOD[:8], "little")])


@st.composite
def bytes_changed(draw: st.DrawFn) -> bytes:
    """A few bytes anywhere are others."""
    blob = bytearray(GOOD)
    for place in draw(st.lists(st.integers(0, len(GOOD) - 1), min_size=1, max_size=4)):
        blob[place] = draw(st.integers(0, 255))
    return bytes(blob)


@st.composite
def blocks_moved(draw: st.DrawFn) -> bytes:
    """A block is lost, doubled, or written over another."""
    at, length, lost, times = draw(st.tuples(st.integers(0, len(GOOD)), *[st.integers(0, 20)] * 2, st.integers(0, 3)))
    return GOOD[:at] + GOOD[at : at + length] * times + GOOD[at + lost :]


@st.composite
def length_changed(draw: st.DrawFn) -> bytes:
    """The first eight bytes say another length."""
    powers = st.integers(0, 63).map(lambda power: 2**power)
    return struct.pack("<Q", draw(st.one_of(st.integers(0, 400), st.integers(0, 2**64 - 1), powers))) + GOOD[8:]


@st.composite
def values_changed(draw: st.DrawFn) -> bytes:
    """Entries of the header, or parts of them, are of other kinds, or there are more of them."""
    header = copy.deepcopy(HEADER)
    json_values = st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5), _containers, max_leaves=4
    )
    for _ in range(draw(st.integers(1, 3))):
        name = draw(st.sampled_from([*header, "x", "w" * 600, "\xe9\n"]))
        value = copy.deepcopy(draw(st.one_of(st.sampled_from(ODD), json_values)))
        entry = header.get(name)
        if isinstance(entry, dict) and entry and draw(st.booleans()):
            entry[draw(st.sampled_from([*entry, "more"]))] = value
        else:
            header[name] = value
    return pack(header, ONES * draw(st.integers(0, 3)))


def _containers(inside: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=3), inside, max_size=3)


@st.composite
def sizes_that_may_fit(draw: st.DrawFn) -> bytes:
    """A tensor of any dtype and shape, whose offsets and data are right or off by a little."""
    dtype = draw(st.sampled_from([*BYTES, "F4", "C64"]))
    shape = draw(st.lists(st.integers(0, 3), max_size=9).filter(lambda sizes: math.prod(sizes) < 2000))
    size = BYTES.get(dtype, 1) * math.prod(shape)
    start, spare = draw(st.sampled_from([0, 0, 0, 1, 8])), draw(st.sampled_from([0, 0, 0, 1, -1]))
    data = (draw(st.binary(max_size=64)) or b"\0") * size
    return pack({"w": tensor(start, start + size, shape, dtype)}, data[: max(0, size + spare)])


@st.composite
def text_changed(draw: st.DrawFn) -> bytes:
    """Something is put into the header's JSON."""
    text = json.dumps(HEADER)
    at = draw(st.integers(0, len(text)))
    return pack(text[:at] + draw(st.sampled_from(PIECES)) + text[at:], ONES + ONES)


malformed: st.SearchStrategy[bytes] = st.one_of(
    bytes_changed(), blocks_moved(), length_changed(), values_changed(), sizes_that_may_fit(), text_changed()
)
"""Valid files with something changed; a few of them are valid still. Hypothesis shrinks the one that goes wrong."""


def outcome_of(blob: bytes, path: Path) -> tuple[str, float]:
    """`look` at these bytes in a new file at `path`. Raises AssertionError for what is neither refused nor valid."""
    path.unlink(missing_ok=True)  # a mapped file must not change
    path.write_bytes(blob)
    outcome, seconds = look(path)
    assert outcome in ("refused", "accepted"), f"{outcome}: {blob!r}"
    return outcome, seconds


def look(path: Path) -> tuple[str, float]:
    """("refused", "accepted" or what went wrong, seconds) of one file."""
    began = time.perf_counter()
    try:
        read_header(path)
        tensors = read_tensors(path)
    except FileError as error:
        seconds = time.perf_counter() - began
        one_line = len(str(error).splitlines()) == 1 and str(error).isprintable()
        return ("refused" if one_line else f"no clean line: {str(error)!r:.200}"), seconds
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}", time.perf_counter() - began
    seconds = time.perf_counter() - began
    problem = doubt(path.read_bytes(), tensors)
    return (f"accepted though {problem}" if problem else "accepted"), seconds


def doubt(blob: bytes, tensors: dict[str, torch.Tensor]) -> str:
    """Why a file that was accepted should not have been; empty if it is right."""
    from safetensors import SafetensorError, safe_open

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise KeyError("a key twice")
        return dict(pairs)

    length = int.from_bytes(blob[:8], "little")
    try:
        header = json.loads(blob[8 : 8 + length].decode(), object_pairs_hook=once)
        header.pop("__metadata__", None)
        spans = []
        for entry in header.values():
            start, end = entry["data_offsets"]
            spans.append((start, end))
            if end - start != BYTES[entry["dtype"]] * math.prod(entry["shape"]) or end == start:
                return "a size is wrong"
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return f"the header is broken ({error})"
    position = 0
    for start, end in sorted(spans):
        if start != position:
            return "the tensors do not lie end to end"
        position = end
    if 8 + length + position != len(blob):
        return "bytes are left over or missing"
    if header.keys() != tensors.keys():
        return "other tensors came back"
    if not all(torch.isfinite(t.double()).all() for t in tensors.values() if t.is_floating_point()):
        return "a value is not finite"
    with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
        file.write(blob)
        file.flush()
        try:
            with safe_open(file.name, framework="pt") as opened:
                return "" if set(opened.keys()) == set(tensors) else "the library sees other tensors"
        except SafetensorError as error:
            return f"the library refuses it ({error})"


def _alone(path: str, results: Any) -> None:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    outcome, seconds = look(Path(path))
    results.put((outcome, seconds, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024))


def _generated(count: int, number: int, folder: Path, wrong: dict[str, str]) -> tuple[Counter[str], float]:
    """(how many were refused and accepted, the slowest one's seconds); what went wrong, shrunk, joins `wrong`."""
    counts: Counter[str] = Counter()
    slowest = 0.0

    @seed(number)
    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(blob=malformed)
    def each(blob: bytes) -> None:
        nonlocal slowest
        outcome, seconds = outcome_of(blob, folder / "generated.safetensors")
        counts[outcome] += 1
        slowest = max(slowest, seconds)

    try:
        each()
    except AssertionError as error:
        wrong["generated"] = " ".join(str(error).split())[:500]
    if slowest > 1:
        wrong["generated, slow"] = f"{slowest:.2f} s"
    return counts, slowest


def main() -> None:
    """Print the figures; exit code 1 unless all are as demanded."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--generated", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.generated < 1:
        parser.error(f"--generated {options.generated}: wanted at least 1")
    wrong: dict[str, str] = {}
    slowest, most_memory = 0.0, 0.0
    context = multiprocessing.get_context("fork")
    files = crafted() | crafted_large()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "good.safetensors").write_bytes(GOOD)
        assert look(folder / "good.safetensors")[0] == "accepted"
        for name, blob in files.items():
            path = folder / "crafted.safetensors"
            path.write_bytes(blob)
            size, blob = len(blob), b""
            results = context.Queue()
            child = context.Process(target=_alone, args=(str(path), results))
            child.start()
            try:
                outcome, seconds, memory = results.get(timeout=60)
            except Exception:
                outcome, seconds, memory = "the process died or hung", 60.0, 0
            child.join(1)
            over = memory - 2 * size
            slowest, most_memory = max(slowest, seconds), max(most_memory, over)
            if outcome != "refused" or seconds > 1 or over > MEMORY_SPARE:
                wrong[name] = f"{outcome}, {seconds:.2f} s, {over / 2**20:.0f} MB over twice the file"
        counts, slow = _generated(options.generated, options.seed, folder, wrong)
        slowest = max(slowest, slow)
    figures = {
        "crafted": len(files),
        "generated": counts.total(),
        "generated_refused": counts["refused"],
        "generated_valid_and_accepted": counts["accepted"],
        "slowest_s": round(slowest, 3),
        "most_memory_over_twice_the_file_mb": round(most_memory / 2**20, 1),
        "wrong_count": len(wrong),
        "wrong": dict(list(wrong.items())[:20]),
    }
    print(json.dumps(figures, indent=1))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
