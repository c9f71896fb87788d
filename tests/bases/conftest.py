"""Tiny bases of each family, as a pipeline, a folder and a single file; no test here reaches a network."""

import shutil
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from sfumato.models import Base, load_base, loading
from tests.tiny import CPU, few_words, tiny_pipeline, write_folder, write_single_file


@dataclass(frozen=True)
class Tiny:
    """One tiny model in its three forms."""

    pipe: Any
    folder: Path
    file: Path
    base: Base


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object) -> None:
        raise AssertionError("a test tried to reach the network")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(autouse=True)
def short_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single file is read with the tokenizer that its tiny text encoder is of."""
    monkeypatch.setattr(loading, "clip_tokenizer", few_words)


def _make(family: str, folder: Path) -> Tiny:
    pipe = tiny_pipeline(family)
    write_folder(pipe, folder / family)
    write_single_file(pipe, folder / f"{family}.safetensors")
    return Tiny(pipe, folder / family, folder / f"{family}.safetensors", load_base(folder / family, precision=CPU))


@pytest.fixture(scope="session")
def sd1(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _make("sd1", tmp_path_factory.mktemp("sd1"))


@pytest.fixture(scope="session")
def sd2(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _make("sd2", tmp_path_factory.mktemp("sd2"))


@pytest.fixture(scope="session")
def sdxl(tmp_path_factory: pytest.TempPathFactory) -> Tiny:
    return _make("sdxl", tmp_path_factory.mktemp("sdxl"))


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def tiny(request: pytest.FixtureRequest) -> Tiny:
    """Each family in turn."""
    made: Tiny = request.getfixturevalue(request.param)
    return made


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A hub's local cache; puts a folder's files into it under a hub id."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def put(hub_id: str, *files: tuple[Path, str | Path]) -> Path:
        home = tmp_path / "hub" / f"models--{hub_id.replace('/', '--')}"
        (home / "refs").mkdir(parents=True, exist_ok=True)
        (home / "refs/main").write_text("0" * 40)
        for file, place in files:
            target = home / "snapshots" / ("0" * 40) / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
        return home / "snapshots" / ("0" * 40)

    return put
