"""SHA256SUMS beside the pictures: in every format a changed byte is named, and nothing changed is learned from."""

import subprocess
import sys

import numpy as np
import pytest
from made_up import FakeBase, noise_picture
from odd_files import kinds, mutations
from PIL import Image
from sfumato.pipelines.check import main

from sfumato.data import prepare, read_folder
from sfumato.data.buckets import bucket_sizes
from sfumato.data.checks.repair import repair_folder
from sfumato.data.checks.report import check
from sfumato.data.checks.survey import measure_picture
from sfumato.data.checksums import CHECKSUMS_FILE, file_digest, read_sums, write_sums
from sfumato.data.dataset_config import read_sources
from sfumato.data.folder import Example
from sfumato.errors import ConfigError, DataError
from sfumato.models.family import read_requirements

KINDS = kinds()
SIZES = bucket_sizes(64, 16)


@pytest.fixture
def summed(tmp_path):
    """Three pictures with captions, one with a mask, and their checksums."""
    folder = tmp_path / "summed"
    folder.mkdir()
    for number, name in enumerate(["a.bmp", "b.jpg", "c.png"]):
        noise_picture(seed=number).save(folder / name)
        (folder / name).with_suffix(".txt").write_text(f"picture {number}")
    Image.new("L", (64, 64), 255).save(folder / "a.mask.png")
    write_sums(folder, [path for path in folder.iterdir()])
    return folder


def change(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_no_mutated_file_of_any_format_is_learned_from(name, tmp_path):
    """0 wrong pixels: what is not the listed file byte for byte is refused by its name."""
    kind = KINDS[name]
    path = tmp_path / f"odd.{kind.suffix}"
    path.write_bytes(kind.data)
    example = Example(path, "x", checksums=(file_digest(path), ""))
    assert measure_picture(example, SIZES, 4) == measure_picture(Example(path, "x"), SIZES, 4)
    for what, data in mutations(kind.data, np.random.default_rng(len(name))):
        path.write_bytes(data)
        look = measure_picture(example, SIZES, 4)
        if data != kind.data:
            assert look.error.startswith(f"{path.name}: not the file that {CHECKSUMS_FILE} lists"), what
            assert look.crop is None


def test_a_bmp_with_another_pixel_is_refused_before_training_with_or_without_a_cache(summed, tmp_path):
    prepare(read_folder(summed), FakeBase(), resolution=64, cache=tmp_path / "cache")
    change(summed / "a.bmp")
    for cache in (None, tmp_path / "cache"):
        with pytest.raises(DataError, match=r"^1 of 3 images .*: a.bmp: not the file that SHA256SUMS lists"):
            prepare(read_folder(summed), FakeBase(), resolution=64, cache=cache)
    data = prepare(read_folder(summed, skip_bad=True), FakeBase(), resolution=64)
    assert len(data) == 2
    (summed / CHECKSUMS_FILE).unlink()
    assert len(prepare(read_folder(summed), FakeBase(), resolution=64, cache=tmp_path / "cache")) == 3
    write_sums(summed, [summed / "a.bmp"])
    assert len(prepare(read_folder(summed), FakeBase(), resolution=64, cache=tmp_path / "cache")) == 3


def test_what_the_cache_holds_of_a_changed_file_is_not_taken(summed, tmp_path):
    sums = (summed / CHECKSUMS_FILE).read_text()
    (summed / CHECKSUMS_FILE).unlink()
    change(summed / "a.bmp")
    prepare(read_folder(summed), FakeBase(), resolution=64, cache=tmp_path / "cache")
    (summed / CHECKSUMS_FILE).write_text(sums)
    with pytest.raises(DataError, match=r"a\.bmp: not the file"):
        prepare(read_folder(summed), FakeBase(), resolution=64, cache=tmp_path / "cache")


def test_a_mask_is_checked_where_it_is_used(summed):
    change(summed / "a.mask.png")
    assert len(prepare(read_folder(summed), FakeBase(), resolution=64)) == 3
    with pytest.raises(DataError, match=r"a\.mask\.png: not the file"):
        prepare(read_folder(summed, mask="files"), FakeBase(), resolution=64)


def test_a_changed_caption_is_refused_before_anything_is_decoded(summed):
    (summed / "b.txt").write_text("picture 7")
    with pytest.raises(DataError, match=r"^b.txt: not the file that SHA256SUMS lists; .* or write SHA256SUMS anew"):
        read_folder(summed)


def test_so_is_a_changed_list_of_captions(tmp_path):
    noise_picture().save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a"}')
    write_sums(tmp_path, [tmp_path / "metadata.jsonl", tmp_path / "a.png"])
    assert read_folder(tmp_path)[0].caption == "a"
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "b"}')
    with pytest.raises(DataError, match=r"^metadata.jsonl: not the file"):
        read_folder(tmp_path)


def test_what_is_missing_or_not_listed_is_said(summed):
    assert read_folder(summed).notes == ()
    write_sums(summed, summed.iterdir())
    assert CHECKSUMS_FILE not in read_sums(summed), "it cannot hold its own"
    (summed / "c.png").rename(summed / "d.png")
    (summed / "c.txt").rename(summed / "d.txt")
    assert read_folder(summed).notes == (
        "SHA256SUMS lists 2 files that are not there: c.png, c.txt",
        "SHA256SUMS does not list 1 image, left unchecked: d.png",
    )


def test_check_names_it_as_what_stops_training(summed):
    assert not check(summed, read_requirements("pocket")).stops
    change(summed / "a.bmp")
    (summed / "b.txt").write_text("other")
    report = check(summed, read_requirements("pocket"))
    assert report.stops
    assert sorted(text.split(":")[0] for text in (line.text for line in report.lines if line.stops)) == [
        "a.bmp",
        "b.txt",
    ]


def test_a_mended_copy_leaves_the_changed_file_out_and_has_checksums_of_its_own(summed, tmp_path):
    change(summed / "a.bmp")
    mended = repair_folder(summed, read_sources(summed), tmp_path / "new", leave_out={})
    assert [name for name, _ in mended.left_out] == ["a.bmp"]
    assert set(read_sums(tmp_path / "new")) == {"b.jpg", "b.txt", "c.png", "c.txt"}
    assert read_folder(tmp_path / "new").notes == ()
    (summed / CHECKSUMS_FILE).unlink()
    repair_folder(summed, read_sources(summed), tmp_path / "plain", leave_out={})
    assert not (tmp_path / "plain" / CHECKSUMS_FILE).exists()


def test_folders_with_repeats_are_listed_from_above_or_in_each(tmp_path):
    for name in ("2_a cat", "3_a dog"):
        (tmp_path / name).mkdir()
        noise_picture(seed=len(name)).save(tmp_path / name / "x.bmp")
    write_sums(tmp_path, [tmp_path / "2_a cat/x.bmp"])
    write_sums(tmp_path / "3_a dog", [tmp_path / "3_a dog/x.bmp"])
    folder = read_folder(tmp_path)
    assert [example.checksums[0] for example in folder] == [file_digest(example.path) for example in folder]
    assert folder.ignored == ()


def test_the_list_that_other_tools_write_is_read(tmp_path):
    digest = "A" * 64
    (tmp_path / CHECKSUMS_FILE).write_text(f"{digest}  a b.png\n{digest} *c.png\r\n{digest}  ./d/e.png\n\n")
    assert read_sums(tmp_path) == {name: "a" * 64 for name in ("a b.png", "c.png", "d/e.png")}
    assert read_sums(tmp_path / "d") == {}


@pytest.mark.skipif(sys.platform != "linux", reason="sha256sum is GNU's")
def test_sha256sum_reads_what_is_written_here(summed):
    done = subprocess.run(
        ["sha256sum", "--check", "--strict", CHECKSUMS_FILE], cwd=summed, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert done.stdout.count(": OK") == 7


@pytest.mark.skipif(sys.platform != "linux", reason="sha256sum is GNU's, and other systems have no such names")
def test_names_that_sha256sum_escapes_are_read_and_written_as_it_does(tmp_path):
    names = ["a\nb.png", "a\rb.png", "a\\nb.png", "a\u2028b.png", "\\.png"]
    for name in names:
        (tmp_path / name).write_bytes(name.encode())
    write_sums(tmp_path, [tmp_path / name for name in names])
    ours = read_sums(tmp_path)
    assert ours == {name: file_digest(tmp_path / name) for name in names}
    theirs = subprocess.run(["sha256sum", *names], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert sorted(theirs.split("\n")) == sorted((tmp_path / CHECKSUMS_FILE).read_text().split("\n"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"{'a' * 63}  a.png", "line 1: wanted 64 hex digits"),
        (f"\n{'a' * 64}", "line 2: wanted 64 hex digits"),
        (f"{'a' * 64}  /a.png", "line 1: /a.png is outside the folder"),
        (f"{'a' * 64}  b/../../a.png", "outside the folder"),
    ],
)
def test_a_broken_list_is_refused_with_its_line(text, said, tmp_path):
    (tmp_path / CHECKSUMS_FILE).write_text(text)
    with pytest.raises(DataError, match=f"^{CHECKSUMS_FILE}, .*{said}"):
        read_sums(tmp_path)


def test_a_list_that_is_no_text_is_refused(tmp_path):
    (tmp_path / CHECKSUMS_FILE).write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="cannot be read as UTF-8"):
        read_sums(tmp_path)


def test_check_writes_checksums_of_pictures_masks_and_captions_once_nothing_stops_training(summed, capsys):
    wanted = read_sums(summed)
    (summed / CHECKSUMS_FILE).unlink()
    assert main([str(summed), "--mask", "files", "--checksums"]) == 0
    assert f"checksums written to {summed / CHECKSUMS_FILE}" in capsys.readouterr().out
    assert read_sums(summed) == wanted
    change(summed / "b.jpg")
    before = (summed / CHECKSUMS_FILE).read_bytes()
    assert main([str(summed), "--mask", "files", "--checksums"]) == 1
    assert "no checksums written" in capsys.readouterr().out
    assert (summed / CHECKSUMS_FILE).read_bytes() == before


def test_checksums_are_of_captions_in_capitals_and_of_masks_that_are_not_asked_for(summed):
    wanted = read_sums(summed)
    (summed / CHECKSUMS_FILE).unlink()
    (summed / "a.txt").rename(summed / "a.TXT")
    assert main([str(summed), "--checksums"]) == 0
    found = read_sums(summed)
    assert found.pop("a.TXT") == wanted.pop("a.txt")
    assert found == wanted


def test_checksums_want_a_folder(tmp_path):
    with pytest.raises(ConfigError, match=r"--checksums: .* is no folder"):
        main([str(tmp_path / "dataset.toml"), "--checksums"])


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="their names of files are Unicode")
def test_a_name_that_is_not_utf8_has_no_checksum(tmp_path):
    (tmp_path / "caf\udce9.png").write_bytes(b"x")
    with pytest.raises(DataError, match="its name is not in UTF-8"):
        write_sums(tmp_path, tmp_path.iterdir())
    assert not (tmp_path / "SHA256SUMS").exists()
