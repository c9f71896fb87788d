"""Names from users, prompts, words and files: what is written lies in the run's folder and on nothing that was there.

A hundred of each kind here; `python bench/runs_names.py --names 20000` for the figure.
"""

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sfumato.errors import ConfigError
from sfumato.files import write_tensors
from sfumato.runs.folder import WRITTEN
from sfumato.training.checks import check_name
from sfumato.training.options import RunOptions

NASTY = [
    "..", ".", "/", "\\", "../..", "/etc/passwd", "C:\\x", "\\\\host\\share", "%2e%2e%2f", "~", "$HOME", "`id`",
    "a/../b", "con", "NUL", "aux.txt", "com1", "\u202e", "\u200b", "e\u0301", "é", "\u2024\u2024/", "\uff0f",
    "\n", "\r", "\t", "\0",
    "\x1b[2J", ":", "*", "?", '"', "<", ">", "|", " ", "a" * 300, "checkpoints", "samples", "config.toml", "README",
    ".holder.json", "run.json", "-rf", "--output", "name.safetensors", "victim",
]  # fmt: skip
names = st.one_of(
    st.text(max_size=40),
    st.sampled_from(NASTY),
    st.lists(st.one_of(st.sampled_from(NASTY), st.text(max_size=5)), min_size=1, max_size=5).map("".join),
)
words = st.one_of(
    names.filter(lambda text: len(text.encode("utf-8", "replace")) < 100),
    st.text(alphabet="<a-1 2>", min_size=1, max_size=6),  # words whose files would have one name
)


def everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() if path.is_file() else b"" for path in root.rglob("*")}


def make_root(root: Path) -> Path:
    """A folder with a run in it, and files around it that nothing may touch."""
    (root / "run/checkpoints").mkdir(parents=True)
    (root / "run/samples").mkdir()
    for place in ("victim.safetensors", "run/victim.txt", *(f"run/{name}" for name in WRITTEN if "." in name)):
        (root / place).write_text("mine")
    return root


def refusal(config: RunOptions) -> str:
    try:
        check_name(config)
    except ConfigError as error:
        return str(error)
    return ""


def a_run_writes_its_file_into_its_folder(name: str, root: Path) -> bool:
    """Whether the name was taken; asserts that the file is where it belongs and that nothing else has changed."""
    config = RunOptions(output=root / "run", name=name)
    refused = refusal(config)
    if refused:
        assert refused.isprintable()  # one line, and nothing that moves a terminal's cursor
        return False
    before = everything(root)
    path = write_tensors(config.output / f"{name}.safetensors", {"a": torch.ones(1)})
    after = everything(root)
    assert path.resolve().parent == (root / "run").resolve()
    assert after.keys() - before.keys() == {root / "run" / f"{name}.safetensors"}
    assert all(after[place] == content for place, content in before.items())
    path.unlink()
    return True


def pictures_of_prompts_lie_in_their_folder(prompts: list[str], root: Path) -> None:
    from sfumato.generation.arguments.images import picture_files
    from sfumato.generation.image_options import PictureRequest

    asked = [PictureRequest(prompt, 7, None, {}) for prompt in prompts]
    files = picture_files(root / "run", asked, is_sheet=False, may_exist=False, given=prompts)
    assert len({str(file).casefold() for file in files}) == len(prompts)
    assert all(file.parent == root / "run" and file.resolve().parent == (root / "run").resolve() for file in files)
    assert all(len(file.name.encode()) < 255 and file.name.isprintable() for file in files)


def words_have_files_of_their_own(tokens: list[str], root: Path) -> None:
    from sfumato.adapters.embeddings.tokens import embedding_files

    found = embedding_files(root / "run", "name", tokens, alone=True)
    assert len({str(path) for path in found.values()}) == len(set(tokens)), found
    assert all(path.resolve().parent == (root / "run").resolve() for path in found.values())


QUIET = settings(
    max_examples=100, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=True
)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("root"))


@pytest.mark.slow
@QUIET
@given(name=names)
def test_no_name_of_a_run_leaves_its_folder_or_overwrites(name, root):
    a_run_writes_its_file_into_its_folder(name, root)


@pytest.mark.parametrize("name", ["otter", "v1.5", "my otter", "éclair", "水彩", "a-b_c (2)", "x" * 100])
def test_names_that_people_give_are_taken(name, root):
    assert a_run_writes_its_file_into_its_folder(name, root)


@pytest.mark.slow
@QUIET
@given(prompts=st.lists(names, min_size=1, max_size=4))
def test_no_prompt_names_a_file_elsewhere(prompts, root):
    pictures_of_prompts_lie_in_their_folder(prompts, root)


@QUIET
@given(tokens=st.lists(words, max_size=4, unique=True))
def test_no_new_word_names_a_file_elsewhere(tokens, root):
    words_have_files_of_their_own(tokens, root)


def test_a_number_does_not_make_two_words_one_file(root):
    words_have_files_of_their_own(["<a>", "<a", "<a-2>"], root)
