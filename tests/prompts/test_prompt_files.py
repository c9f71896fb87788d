"""Prompts out of a file."""

import json

import pytest

from sfumato.adapters.prompt_tags import split_flags
from sfumato.errors import ConfigError
from sfumato.models.prompts.files import expand_prompt_files, read_prompts

SUBSETS = """
[prompt]
width = 512
negative_prompt = "blurry, -- grey"

[[prompt.subset]]
prompt = "a crab"
seed = 7

[[prompt.subset]]
prompt = "an owl"
width = 768
height = 64
sample_steps = 30
scale = 7.5
"""


def refused(work):
    with pytest.raises(ConfigError) as found:
        work()
    return str(found.value)


def test_a_line_is_a_prompt_whatever_editor_wrote_it(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes(b"\xef\xbb\xbfa crab\r\n\r\n  # for later\r\n an owl #2 \r\n")
    assert read_prompts(file, "--x") == ["a crab", "an owl #2"]
    file.write_bytes("caf\u00e9\r\nowl\r\n".encode("utf-16"))
    assert read_prompts(file, "--x") == ["caf\u00e9", "owl"]
    file.write_bytes("caf\u00e9".encode("cp1252"))
    with pytest.raises(ConfigError, match=r"--x .*prompts\.txt: not readable as text \(not UTF-8\)"):
        read_prompts(file, "--x")


@pytest.mark.parametrize(
    ("name", "text"), [("a.txt", "\n# a crab\n"), ("a.json", "[]"), ("a.json", "{}"), ("a.toml", "prompt.subset = []")]
)
def test_a_file_without_a_prompt_is_refused(name, text, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"--x .*{name}: there is no prompt in it; write one on each line"):
        read_prompts(tmp_path / name, "--x")


def of_load_prompts(prompts):
    """What sd-scripts' load_prompts makes of these, by our names: each of its own keys, `enum` left out."""
    names = {"negative_prompt": "negative", "sample_steps": "steps", "scale": "guidance"}
    return [(each["prompt"], {names.get(k, k): v for k, v in each.items() if k != "prompt"}) for each in prompts]


def test_a_toml_of_sd_scripts_says_of_each_prompt_what_it_says_of_all(tmp_path):
    (tmp_path / "a.toml").write_text(SUBSETS)
    shared = {"width": 512, "negative_prompt": "blurry, -- grey"}
    owl = {"prompt": "an owl", "width": 768, "height": 64, "sample_steps": 30, "scale": 7.5}
    wanted = of_load_prompts([{**shared, "prompt": "a crab", "seed": 7}, {**shared, **owl}])
    assert [split_flags(line) for line in read_prompts(tmp_path / "a.toml", "--x")] == wanted


def test_a_json_is_a_list_of_texts_and_objects_or_has_them_by_name(tmp_path):
    crab = {"prompt": "a crab", "negative_prompt": "", "seed": 7, "scale": None}
    (tmp_path / "a.json").write_text(json.dumps(["an owl --w 512", crab]))
    assert read_prompts(tmp_path / "a.json", "--x") == ["an owl --w 512", "a crab --d 7"]
    (tmp_path / "a.json").write_text(json.dumps({"bird": "an owl --w 512", "sea": crab}))
    assert read_prompts(tmp_path / "a.json", "--x") == ["an owl --w 512", "a crab --d 7"]


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.json", "[1", "not readable as JSON"),
        ("a.json", '"a crab"', "neither a list of prompts nor prompts by name"),
        ("a.json", "[7]", "7 has no prompt"),
        ("a.json", '[{"seed": 7}]', "{'seed': 7} has no prompt"),
        (
            "a.json",
            '[{"prompt": "a crab", "sample_sampler": "k"}]',
            "sample_sampler of 'a crab' is not read there; neg",
        ),
        ("a.json", "[" * 9999, "not readable as JSON"),
        ("a.toml", "a = [", "not readable as TOML"),
        ("a.toml", "a = 1", "no [[prompt.subset]] in it"),
        ("a.toml", "prompt = 'a crab'", "no [[prompt.subset]] in it"),
    ],
)
def test_a_file_of_another_form_is_refused(name, text, said, tmp_path):
    (tmp_path / name).write_text(text)
    line = refused(lambda: read_prompts(tmp_path / name, "--x"))
    assert f"{name}: {said}" in line
    assert "\n" not in line


def test_files_among_prompts_are_read_where_they_stand(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my prompts.TXT").write_text("a crab\nan owl")
    (tmp_path / "b.json").write_text('["a fox"]')
    given = ("a bear", "~/my prompts.TXT", str(tmp_path / "b.json"), "a .txt file", "")
    assert expand_prompt_files(given, "--x") == ("a bear", "a crab", "an owl", "a fox", "a .txt file", "")


def test_a_file_that_is_not_there_or_names_another_is_refused(tmp_path):
    missing = refused(lambda: expand_prompt_files([str(tmp_path / "a.txt")], "--x"))
    assert missing == f"--x {tmp_path / 'a.txt'}: there is no such file; name one with prompts, or give a prompt."
    (tmp_path / "a.txt").write_text("a crab\nb.json")
    nested = refused(lambda: expand_prompt_files([str(tmp_path / "a.txt")], "--x"))
    assert nested.endswith("a.txt: 'b.json' in it names a file; wanted a prompt.")
    assert "not readable as text (Is a directory)" in refused(lambda: read_prompts(tmp_path, "--x"))
    assert "no.txt: not readable as text" in refused(lambda: expand_prompt_files(["\0no.txt"], "--x"))
