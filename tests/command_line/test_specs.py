"""Where a command line may write."""

import os

import pytest

from sfumato.command_line.specs import checked_folder
from sfumato.errors import ConfigError


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_made(tmp_path, monkeypatch):
    assert checked_folder(tmp_path / "new" / "newer", "--output x") == tmp_path / "new" / "newer"
    monkeypatch.setattr(os, "access", lambda path, mode: (path, mode) != (tmp_path, os.W_OK))
    with pytest.raises(ConfigError, match=r"--output x: nothing can be written to .*; see to its permissions\."):
        checked_folder(tmp_path / "new" / "newer", "--output x")
