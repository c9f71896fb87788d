"""The names that `sfumato.files` shows."""

import sfumato.files


def test_every_public_name_is_there_and_sorted():
    assert sfumato.files.__all__ == sorted(sfumato.files.__all__) == sorted(sfumato.files._HOME)
    assert all(callable(getattr(sfumato.files, name)) for name in sfumato.files.__all__)
