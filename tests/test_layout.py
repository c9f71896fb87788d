"""The two trees and their one rule: programs import the library, the library never imports a program."""

import ast
import importlib
import importlib.util
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROGRAMS = sorted(
    p for folder in ("trainers", "pipelines") for p in (ROOT / folder).glob("*.py") if p.stem != "__init__"
)
TRAINERS = [p for p in PROGRAMS if p.parent.name == "trainers"]


def imported(path: Path) -> set[str]:
    """The modules that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def test_datasets_holds_no_python():
    assert list((ROOT / "datasets").rglob("*.py")) == []


def test_the_package_map_is_the_tree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    listed = set(project["tool"]["setuptools"]["packages"])
    folders = {"sfumato"} | {
        ".".join(("sfumato", *p.parent.relative_to(ROOT / "src/sfumato").parts))
        for p in (ROOT / "src/sfumato").rglob("__init__.py")
        if p.parent != ROOT / "src/sfumato"
    }
    assert listed == folders | {"sfumato.trainers", "sfumato.pipelines", "sfumato.pipelines.custom"}


def test_the_wheel_tells_type_checkers_of_its_types():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert "py.typed" in project["tool"]["setuptools"]["package-data"]["sfumato"]
    assert (ROOT / "src/sfumato/py.typed").is_file()


def test_a_source_distribution_holds_what_its_readme_links_to_and_its_tests_read():
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines()]
    taken = {name for command, *names in lines if command in ("include", "graft") for name in names}
    there = {path.name for path in ROOT.glob("[!.]*.md")} | {"datasets", "docs", "examples", "bench", "tests"}
    assert there - {"README.md"} <= taken  # which setuptools takes by itself


def test_contributing_says_where_every_module_is():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("| where |") : text.index("## Design decisions")]
    modules = {p.name for p in (ROOT / "src/sfumato").glob("*.py") if not p.name.startswith("__")}
    folders = {f"{p.parent.name}/" for p in (ROOT / "src/sfumato").glob("*/__init__.py")}
    assert {name for name in modules | folders if f"`{name}`" not in table} == set()


@pytest.mark.parametrize("path", sorted((ROOT / "src/sfumato").rglob("*.py")), ids=lambda p: p.stem)
def test_the_library_imports_no_program(path):
    names = [name for name in imported(path) if name.startswith(("sfumato.trainers", "sfumato.pipelines"))]
    assert names == []


def test_the_packages_of_the_library_stand_on_each_other():
    """What lies below is read, and changed, without what lies above: no package imports one that needs it."""
    library = ROOT / "src/sfumato"
    parts = {p.stem for p in library.glob("*.py")} | {p.parent.name for p in library.glob("*/__init__.py")}
    needs: dict[str, set[str]] = {part: set() for part in parts}
    for path in library.rglob("*.py"):
        part = path.relative_to(library).with_suffix("").parts[0]
        named = {name.split(".")[1] for name in imported(path) if name.startswith("sfumato.")}
        needs[part] |= named & parts - {part}
    del needs["__init__"]  # the public names, found when they are asked for
    TopologicalSorter(needs).prepare()


def test_no_files_of_the_library_import_each_other_in_a_circle():
    """Also inside functions and for types alone: what lies below is read without what lies above."""
    files = {
        ".".join(p.relative_to(ROOT / "src").with_suffix("").parts): p
        for p in (ROOT / "src/sfumato").rglob("*.py")
        if p.stem != "__init__"
    }
    assert len(files) > 100
    TopologicalSorter({name: imported(path) & files.keys() - {name} for name, path in files.items()}).prepare()


def test_no_room_is_too_full_to_be_taken_in():
    rooms = {p.parent for p in (ROOT / "src/sfumato").rglob("*.py")}
    assert len([room for room in rooms if room.parent == ROOT / "src/sfumato"]) <= 12
    assert {room.name: len(list(room.glob("*.py"))) for room in rooms if len(list(room.glob("*.py"))) > 12} == {}


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_no_program_imports_another(path):
    found = {name for name in imported(path) if name.startswith(("sfumato.trainers", "sfumato.pipelines", "trainers"))}
    allowed = {"sfumato.pipelines", "sfumato.pipelines.teach"} if path.stem == "quickstart" else set()
    assert found == allowed


@pytest.mark.parametrize("path", TRAINERS, ids=lambda p: p.stem)
def test_every_trainer_has_the_same_shape(path):
    names = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
    assert {"Config", "train", "main"} <= names


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda p: p.stem)
def test_no_program_hides_a_module_of_the_standard_library(path):
    """A script's folder comes first in sys.path: pipelines/inspect.py would break dataclasses."""
    import sys

    assert path.stem not in sys.stdlib_module_names


def test_only_one_module_knows_dtypes_by_name():
    """`--precision` is answered in precision/ and nowhere else; others may only turn autocast off."""
    import re

    asking = [
        path.name
        for path in (ROOT / "src/sfumato").rglob("*.py")
        if path.parent.name != "precision"
        and re.search(r"is_bf16_supported|torch\.autocast\((?![^)]*enabled=False)", path.read_text(encoding="utf-8"))
    ]
    assert asking == []


def test_no_pickle_anywhere():
    for path in (ROOT / "src").rglob("*.py"):
        assert not {"pickle", "dill", "joblib"} & imported(path)
        assert "torch.load(" not in path.read_text(encoding="utf-8")


def test_every_public_name_is_there():
    import sfumato

    assert sorted(sfumato.__all__) == sfumato.__all__
    assert all(hasattr(sfumato, name) for name in sfumato.__all__)


def test_help_and_completion_know_names_that_are_not_loaded_yet():
    packages = ("sfumato", "sfumato.models", "sfumato.compose", "sfumato.data", "sfumato.files")
    code = "import importlib\nfor name in {}:\n    package = importlib.import_module(name)\n"
    code += "    assert set(package.__all__) <= set(dir(package)), name"
    assert subprocess.run([sys.executable, "-c", code.format(packages)], cwd=ROOT).returncode == 0


@pytest.mark.parametrize("path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda p: f"{p.parent.stem}-{p.stem}")
def test_what_a_bench_imports_of_the_library_is_there(path):
    """Not every bench is run by the tests: some want another program's checkout, or hours."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "sfumato":
            module = importlib.import_module(node.module)
            for name in (alias.name for alias in node.names):
                assert hasattr(module, name) or importlib.import_module(f"{node.module}.{name}")


def test_old_names_of_modules_lead_to_the_new_ones_and_say_so():
    from sfumato.utils.old_names import NEW_NAMES

    for new in set(NEW_NAMES.values()):
        assert importlib.util.find_spec(f"sfumato.{new}"), new
    code = (
        "import warnings\n"
        "with warnings.catch_warnings(record=True) as said:\n"
        "    warnings.simplefilter('always')\n"
        "    from sfumato.bases.family import FAMILIES\n"
        "from sfumato.models.family import FAMILIES as new\n"
        "assert FAMILIES is new\n"
        "print([str(each.message) for each in said if each.category is FutureWarning][-1])"
    )
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "sfumato.models.family" in said
