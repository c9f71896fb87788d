"""What `sfumato env` tells of a machine."""

import json
from pathlib import Path

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
