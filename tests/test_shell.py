"""Commands to copy: whole in bash, and as Windows' C library reads them."""

import shlex
import subprocess

import pytest

from sfumato.utils import formatting

WORDS = [
    "",
    "a b",
    "<otter>",
    "it's",
    'a "b"',
    "$HOME",
    "a!b",
    "50%",
    "a\\b",
    "(x:1.2), é",
    "runs/line",
    "a\nb",
    "`ls`",
    "~",
]


@pytest.mark.parametrize("word", WORDS)
def test_a_shell_hands_the_word_on_whole(word):
    command = formatting.quote_argument(word)
    assert shlex.split(command) == [word]
    assert subprocess.run(["bash", "-c", f"printf %s {command}"], capture_output=True, text=True).stdout == word


@pytest.mark.parametrize("word", ["a b", "<otter>", "it's", "(x:1.2), é", ""])
def test_what_no_shell_reads_is_in_double_quotes(word):
    assert formatting.quote_argument(word) == f'"{word}"'


def test_windows_paths_stay_bare(monkeypatch):
    monkeypatch.setattr(formatting, "_WINDOWS", True)
    assert formatting.quote_argument(r"C:\runs\line") == r"C:\runs\line"
    assert formatting.quote_argument(r"C:\my runs\line") == r'"C:\my runs\line"'
    assert formatting.quote_argument("C:\\my runs\\") == subprocess.list2cmdline(["C:\\my runs\\"])
    assert formatting.quote_argument('say "a"') == r'"say \"a\""'


def test_words_are_joined(tmp_path):
    assert (
        formatting.join_command(["inspect", "my line.safetensors", "--verify"])
        == 'inspect "my line.safetensors" --verify'
    )
