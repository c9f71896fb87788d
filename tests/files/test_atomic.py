"""A file appears whole and beside its place, and on nothing that was there unless that was asked for."""

from sfumato.files.atomic import atomic_path, beside, check_free, write_text
from tests.files.said import said


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
    assert said(check_free, place, False) == (
        f"--output {place}: exists already; name another place, or say --overwrite."
    )
    check_free(place, True)
    check_free(tmp_path / "free", False)


def test_two_that_write_one_file_at_once_are_not_in_each_others_way(tmp_path):
    """Two threads of one process, or two containers whose processes have one number."""
    place = tmp_path / "a.tar.gz"
    with atomic_path(place) as first:
        first.write_bytes(b"1")
        with atomic_path(place) as second:
            second.write_bytes(b"22")
        assert place.read_bytes() == b"22"
    assert place.read_bytes() == b"1"
    names = {beside(place, ".gz").name for _ in range(100)} | {beside(place).name}
    assert len(names) == 101
    assert all(name.startswith(".a.tar.") and name.endswith((".part", ".part.gz")) for name in names)
