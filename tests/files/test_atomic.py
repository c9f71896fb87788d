"""A file appears whole and beside its place, and on nothing that was there unless that was asked for."""

import errno
import os

import numpy as np
import pytest
from safetensors import SafetensorError
from safetensors.numpy import save_file

from sfumato import cli
from sfumato.errors import ConfigError, FileError
from sfumato.files.save import atomic_model_folder
from sfumato.utils import atomic
from sfumato.utils.atomic import atomic_folder, atomic_path, check_overwrite, temporary_sibling, write_text
from tests.files.said import said
from tests.runs.faults import failing


def test_a_file_appears_whole_and_beside_its_place(tmp_path):
    place = tmp_path / "new/folder/picture.png"
    with atomic_path(place) as temporary:
        assert (temporary.parent, temporary.suffix) == (place.parent, ".png")
        assert temporary.name.startswith(".picture.")
        temporary.write_bytes(b"1")
        assert not place.exists()
    assert place.read_bytes() == b"1"
    write_text(place, "ä\n")
    assert place.read_bytes() == b"\xc3\xa4\n"
    assert list(place.parent.iterdir()) == [place]
    assert said(check_overwrite, place, False) == (
        f"--output {place}: exists already; name another place, or say --overwrite."
    )
    check_overwrite(place, True)
    assert said(check_overwrite, place, True, folder=True) == (
        f"--output {place}: exists already, and folders are not written over; name another place."
    )
    check_overwrite(tmp_path / "free", False)


@pytest.mark.parametrize("named", [False, True])
def test_a_full_disk_is_told_with_the_name_that_was_asked_for(named, tmp_path):
    place = tmp_path / "a.png"
    with pytest.raises(OSError, match="No space") as caught, atomic_path(place) as temporary:
        raise OSError(errno.ENOSPC, "No space left on device", *([str(temporary)] if named else []))
    assert caught.value.filename == str(place)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_cannot_be_written_is_told_with_the_name_that_was_asked_for(tmp_path, monkeypatch):
    """Such a disk refuses to remove a file that is not there, too."""

    def refuse(self, missing_ok=False):
        raise OSError(errno.EROFS, "Read-only file system", str(self))

    monkeypatch.setattr(type(tmp_path), "unlink", refuse)
    place = tmp_path / "a.png"
    with pytest.raises(OSError, match="Read-only") as caught, atomic_path(place) as temporary:
        raise OSError(errno.EROFS, "Read-only file system", str(temporary))
    assert caught.value.filename == str(place)


def test_two_that_write_one_file_at_once_are_not_in_each_others_way(tmp_path):
    """Two threads of one process, or two containers whose processes have one number."""
    place = tmp_path / "a.tar.gz"
    with atomic_path(place) as first:
        first.write_bytes(b"1")
        with atomic_path(place) as second:
            second.write_bytes(b"22")
        assert place.read_bytes() == b"22"
    assert place.read_bytes() == b"1"
    names = {temporary_sibling(place, ".gz").name for _ in range(100)} | {temporary_sibling(place).name}
    assert len(names) == 101
    assert all(name.startswith(".a.tar.") and name.endswith((".part", ".part.gz")) for name in names)


@pytest.mark.parametrize("name", ["a" * 250 + ".png", "ä" * 125 + ".png", "a" + "ä" * 127])
def test_the_longest_names_are_written_as_well(name, tmp_path):
    """What is written meanwhile has a longer name, of which a part goes."""
    write_text(tmp_path / name, "1")
    with atomic_folder(tmp_path / f"b{name[1:]}"):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {name, f"b{name[1:]}"}


def test_a_folder_takes_the_place_of_an_earlier_one_once_it_is_whole(tmp_path):
    place = tmp_path / "new/model"
    for content in ("1", "2"):
        with atomic_folder(place) as temporary:
            (temporary / "weights").write_text(content)
            assert not place.exists() or (place / "weights").read_text() == "1"
        assert (place / "weights").read_text() == content
    assert list(place.parent.iterdir()) == [place]


def test_what_is_in_a_folder_reaches_the_disk_before_its_name_does(tmp_path, monkeypatch):
    """A power cut would leave empty files under a finished name: here the disk takes none of three, and no model."""
    place = tmp_path / "model"

    def write():
        with atomic_folder(place) as new:
            (new / "unet").mkdir()
            (new / "unet/weights").write_text("1")

    for at, part in enumerate(("unet", "unet/weights", "")):
        with failing(monkeypatch, tmp_path, "fsync", at, errno.ENOSPC), pytest.raises(OSError, match="space"):
            write()
        assert list(tmp_path.iterdir()) == [], part


@pytest.mark.parametrize("at", [0, 1])
def test_an_earlier_folder_stays_where_a_rename_fails(at, tmp_path, monkeypatch):
    """The first moves it aside, the second brings the new one in, and what failed once is tried once more."""
    place = tmp_path / "model"
    place.mkdir()
    (place / "weights").write_text("1")
    with pytest.raises(OSError, match="space"), failing(monkeypatch, tmp_path, "rename", at, errno.ENOSPC):  # noqa: SIM117
        with atomic_folder(place) as new:
            (new / "weights").write_text("2")
    assert (place / "weights").read_text() == "1"
    assert list(tmp_path.iterdir()) == [place]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error")])
def test_a_disk_that_takes_no_model_is_one_line_and_the_earlier_one_stays(error, tmp_path):
    place = tmp_path / "model"
    place.mkdir()
    with (
        pytest.raises(FileError, match=r"could not be written \((No space|I/O).*Make room"),
        atomic_model_folder(place),
    ):
        raise error
    assert list(tmp_path.iterdir()) == [place]


def test_whoever_may_read_a_models_configs_may_read_its_weights(tmp_path):
    with atomic_model_folder(tmp_path / "model") as temporary:
        (temporary / "unet").mkdir()
        (temporary / "unet/config.json").write_text("{}")
        (temporary / "unet/weights.safetensors").touch(0o600)
    config, weights = (
        (tmp_path / "model/unet" / name).stat().st_mode for name in ("config.json", "weights.safetensors")
    )
    assert weights == config


def test_a_rename_that_windows_denies_is_tried_again(tmp_path, monkeypatch):
    """A virus scanner has what has just been written open, for a moment or for good."""
    replace, denied = os.replace, []

    def scanned(source, target):
        if len(denied) < at_most:
            denied.append(target)
            raise PermissionError(errno.EACCES, "Access is denied", str(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", scanned)
    monkeypatch.setattr(atomic, "_PATIENCE_S", 0.2)
    at_most = 2
    write_text(tmp_path / "a.txt", "1")
    with atomic_folder(tmp_path / "model") as new:
        (new / "weights").write_text("1")
    assert len(denied) == 2
    at_most = 10**9
    with pytest.raises(PermissionError):
        write_text(tmp_path / "a.txt", "2")
    assert (tmp_path / "a.txt").read_text() == "1"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "model"]


def test_what_does_not_reach_the_disk_is_not_written(tmp_path, monkeypatch):
    with failing(monkeypatch, tmp_path, "fsync", 0, errno.ENOSPC), pytest.raises(OSError, match="No space"):
        write_text(tmp_path / "a.txt", "1")
    assert list(tmp_path.iterdir()) == []


def test_a_file_under_another_name_is_not_written_over(tmp_path):
    (tmp_path / "a").write_text("1")
    (tmp_path / "b").hardlink_to(tmp_path / "a")
    with pytest.raises(ConfigError, match="is what it would be made of"):
        check_overwrite(tmp_path / "a", True, read=[tmp_path / "b"])


@pytest.mark.parametrize("command", ["merge", "extract", "resize", "convert", "clash"])
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(command, tmp_path, monkeypatch, capsys):
    """Nor is said that what it would be made of is no adapter."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    for name in ("a.safetensors", "b.safetensors"):
        save_file({"x": np.zeros(1)}, tmp_path / name)
    words = {
        "merge": ["a.safetensors", "b.safetensors"],
        "extract": ["--tuned", "a.safetensors", "--base", "b.safetensors", "--rank", "4"],
        "resize": ["a.safetensors", "--rank", "4"],
        "convert": ["a.safetensors", "--to", "kohya"],
        "clash": ["a.safetensors", "b.safetensors"],
    }[command]
    suffix = ".png" if command == "clash" else ".safetensors"
    beneath = f"file/out{suffix}"
    assert cli.main([command, *words, "-o", beneath]) == 2
    assert f"--output {beneath}: file is a file, not a folder; name another place." in capsys.readouterr().err
    monkeypatch.setattr("os.access", lambda *_: False)  # a superuser may write everywhere
    assert cli.main([command, *words, "-o", f"new/out{suffix}"]) == 2
    assert f"nothing can be written to {tmp_path}; see to its permissions." in capsys.readouterr().err
