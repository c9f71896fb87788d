"""Prompts out of a file."""

import pytest

from sfumato.command_line.pictures import prompts_in
from sfumato.errors import ConfigError


def test_a_line_is_a_prompt_whatever_editor_wrote_it(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa crab\r\n\r\n  # for later\r\n an owl #2 \r\n")
    assert prompts_in(file) == ["a crab", "an owl #2"]
    file.write_bytes("caf\u00e9\r\nowl\r\n".encode("utf-16"))
    assert prompts_in(file) == ["caf\u00e9", "owl"]
    file.write_bytes("caf\u00e9".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"prompts\.txt: not readable as text \(not UTF-8\)"):
        prompts_in(file)


def test_a_file_without_a_prompt_is_refused(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n# a crab\n")
    with pytest.raises(ConfigError, match=r"prompts\.txt: there is no prompt in it; write one on each line"):
        prompts_in(file)
