"""Shared by the tests of programs: tiny bases, a folder of pictures, runs that take no time for looks, no network."""

import dataclasses
import functools
import gc
import os
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from sfumato.runs.reporting import plot

PLOT_LOG = plot.plot_log

os.environ["HF_HUB_OFFLINE"] = "1"
# Small models gain nothing from threads, and the tests run in as many processes as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Garbage is not looked for among what the tests import, a million objects that stay to the end; and in what they
    make, which is large where bases are kept, less often."""
    gc.disable()
    collected = yield
    gc.freeze()
    gc.set_threshold(10_000, 10, 10)
    gc.enable()
    return collected


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, each process takes a stretch of the tests, and of what another has left, where xdist deals them out in
    turns: so what is made once for a module is made in one process."""
    if config.getoption("dist") != "load":  # asked for otherwise
        return None
    from xdist.scheduler import WorkStealingScheduling

    return WorkStealingScheduling(config, log)


@pytest.fixture(scope="session", autouse=True)
def skeletons_made_once() -> Iterator[None]:
    """A base's modules without weights are made once for each config, and then copied: of a tiny base they take longer
    than all else that is read of it."""
    with pytest.MonkeyPatch.context() as patch:
        if "sfumato.models.loading" in sys.modules:
            from sfumato.models import folder, loading, single_file
            from tests.copies import made_once

            for module in (folder, loading, single_file):
                for name in ("unet_skeleton", "vae_skeleton", "text_skeleton"):
                    patch.setattr(module, name, made_once(getattr(module, name)))
        yield


@pytest.fixture(scope="session", autouse=True)
def options_read_once() -> Iterator[None]:
    """What cyclopts makes of a config's fields at each call, which takes longer than to parse by it, is made once."""
    with pytest.MonkeyPatch.context() as patch:
        if "sfumato.config" in sys.modules:
            import cyclopts

            from tests.copies import copies

            assemble, known = cyclopts.App.assemble_argument_collection, {}

            def assembled(app: Any, **asked: Any) -> Any:
                config = typing.get_args(getattr(app.default_command, "__annotations__", {}).get("config"))
                if asked or not config:  # for --help, and of an app that is not ours
                    return assemble(app, **asked)
                if config not in known:
                    known[config] = copies(assemble(app), shared=(cyclopts.Parameter, type, types.FunctionType))
                return known[config]()

            patch.setattr(cyclopts.App, "assemble_argument_collection", assembled)
        yield


@pytest.fixture(scope="session")
def pocket_folder(tmp_path_factory) -> Path:
    """A pocket-like base with random weights, as a diffusers folder named pocket."""
    from tests.tiny import tiny_pocket_folder

    return tiny_pocket_folder(tmp_path_factory.mktemp("base") / "pocket")


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Six pictures of coloured squares, named after what they show."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(["red", "green", "blue", "gold", "black", "pink"]):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colour, (8 + number, 8, 40, 48))
        picture.save(folder / f"{colour}-square.png")
    return folder


@pytest.fixture(scope="session")
def family_folder(tmp_path_factory) -> Callable[[str], Path]:
    """By name of a family, a base of it with random weights as a diffusers folder; written once, never changed."""
    from tests.tiny import tiny_pipeline, write_folder

    folder = tmp_path_factory.mktemp("families")

    @functools.cache
    def of(family: str) -> Path:
        return write_folder(tiny_pipeline(family, shallow=True), folder / family)

    return of


@pytest.fixture
def quick(monkeypatch) -> None:
    """For runs that are not about their pictures: bases draw in two steps, and curves are read and not drawn.

    A plot alone takes as long as a training of four steps. What the sampler's steps and the plot are in a run that
    nobody hurried is told by tests/drawing/test_pictures.py and by the tests that ask for `plotted`.
    """
    from sfumato.models import family, loading
    from sfumato.models import family as recognise

    hasty = {
        name: dataclasses.replace(one, defaults=dataclasses.replace(one.defaults, sampling_steps=2))
        for name, one in family.FAMILIES.items()
    }
    for module in (family, loading, recognise):
        monkeypatch.setattr(module, "FAMILIES", hasty)
    monkeypatch.setattr(plot, "plot_log", lambda log, path: plot.read_log(log))


@pytest.fixture
def plotted(quick, monkeypatch) -> None:
    """Draws the curves all the same."""
    monkeypatch.setattr(plot, "plot_log", PLOT_LOG)
