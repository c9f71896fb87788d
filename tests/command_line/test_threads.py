"""As many threads as there are cores to use, and they let other programs run; what the person says is kept."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from sfumato.utils import processes


def system(root: Path, groups: str, files: dict[str, str]) -> Path:
    """A machine's folders of control groups, as Linux shows them."""
    written = {f"sys/fs/cgroup/{name}": text for name, text in files.items()}
    for name, text in (written | {"proc/self/cgroup": groups}).items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        pytest.param("0::/\n", {"cpu.max": "200000 100000\n"}, 2.0, id="docker --cpus 2"),
        pytest.param("0::/\n", {"cpu.max": "max 100000\n"}, float("inf"), id="no limit"),
        pytest.param("0::/\n", {}, float("inf"), id="the top of a machine, where there is no file"),
        pytest.param(
            "0::/pods/one\n",
            {"pods/one/cpu.max": "max 100000", "pods/cpu.max": "150000 100000", "cpu.max": "800000 100000"},
            1.5,
            id="the least of the groups around it",
        ),
        pytest.param(
            "4:memory:/a\n3:cpu,cpuacct:/docker/ab12\n1:name=systemd:/\n",
            {"cpu,cpuacct/cpu.cfs_quota_us": "50000\n", "cpu,cpuacct/cpu.cfs_period_us": "100000\n"},
            0.5,
            id="version 1 from within, where the path lies outside",
        ),
        pytest.param(
            "1:cpu:/\n", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, float("inf"), id="version 1"
        ),
        pytest.param("0::/\n", {"cpu.max": "many 0\n"}, float("inf"), id="what nobody can read"),
    ],
)
def test_the_cores_of_a_group_are_those_of_its_tightest_limit(tmp_path, groups, files, cores):
    assert processes.cgroup_cores(system(tmp_path, groups, files)) == cores


def test_a_system_without_groups_has_no_limit(tmp_path):
    assert processes.cgroup_cores(tmp_path) == float("inf")


@pytest.mark.parametrize(("quota", "said"), [(250, "2"), (50, "1"), (800, None)])
def test_there_are_no_more_threads_than_whole_cores_to_use(tmp_path, monkeypatch, quota, said):
    monkeypatch.setattr(processes, "available_cores", lambda: 8)
    root = system(tmp_path, "0::/\n", {"cpu.max": f"{quota * 1000} 100000"})
    environment: dict[str, str] = {}
    processes.set_thread_environment(environment, root)
    assert environment.get("OMP_NUM_THREADS") == said
    environment = {"OMP_NUM_THREADS": "7"}
    processes.set_thread_environment(environment, root)
    assert environment["OMP_NUM_THREADS"] == "7"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("said", "read"),
    [
        ({}, "4000"),
        ({"GOMP_SPINCOUNT": "77"}, "77"),
        ({"OMP_WAIT_POLICY": "active"}, "30000000000"),  # what libgomp makes of it
    ],
)
def test_threads_that_wait_let_other_programs_run_unless_the_person_says_how_they_wait(said, read):
    kept = {name: value for name, value in os.environ.items() if name not in {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT"}}
    script = "from sfumato import cli\ncli.run(lambda argv: __import__('torch'))"
    environment = kept | said | {"OMP_DISPLAY_ENV": "verbose"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    if "GOMP_SPINCOUNT" not in done.stderr:
        pytest.skip("torch here does not use GNU's OpenMP")
    assert f"GOMP_SPINCOUNT = '{read}'" in done.stderr
