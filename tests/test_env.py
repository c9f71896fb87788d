"""What `sfumato env` tells of a machine."""

import json
from pathlib import Path

import pytest
from sfumato.pipelines import env

from sfumato import __version__, cli


def test_it_tells_versions_extras_devices_and_precision_and_no_path(capsys, monkeypatch):
    there = env.version_of
    monkeypatch.setattr(env, "version_of", lambda name: {"xformers": "", "compel": "9.9"}.get(name) or there(name))
    assert cli.main(["env"]) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].startswith(f"sfumato {__version__}, Python 3.")
    assert f"torch {there('torch')}" in lines[1]
    assert lines[2].startswith("CPU: ")
    assert '  xformers    not installed: pip install "sfumato[xformers]"' in lines
    assert "  prompts     compel 9.9" in lines
    assert not any(line.split()[:1] == ["test"] for line in lines)
    assert any(line.split()[:2] == ["device", "cpu"] for line in lines)
    assert str(Path.home()) not in shown
    assert cli.main(["env", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert "\n".join(env.lines(found)) + "\n" == shown


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        (
            'OSError("/home/me/lib/libcudart.so.11: cannot open\\nshared object")',
            "libcudart.so.11: cannot open shared object",
        ),
        ("RuntimeError()", "RuntimeError"),
        ('ImportError("built for torch 2.4")', "built for torch 2.4"),
    ],
)
def test_an_extra_that_is_broken_is_told_with_its_reason(raised, said, tmp_path, monkeypatch):
    (tmp_path / "xformers_of_2_4.py").write_text(f"raise {raised}")
    (tmp_path / "works_well.py").write_text("import sys, warnings\nwarnings.warn('x')\nsys.stderr.write('x')")
    monkeypatch.syspath_prepend(tmp_path)
    assert env.problem_of("xformers-of-2-4") == f", which cannot be loaded ({said})"
    assert env.problem_of("works-well") == ""
