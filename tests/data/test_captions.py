"""Captions, their encodings and templates."""

import codecs
import json

import pytest

from sfumato.data.captions import check_template, fill_template, read_metadata, read_text, words_in_name
from sfumato.errors import ConfigError, DataError


@pytest.mark.parametrize("text", ["a red apple", "ein gruener Käfer", "кот в шляпе", "赤いりんご", "naïve café"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_is_read_exactly_and_without_guessing(tmp_path, text, encoding):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert read_text(tmp_path / "a.txt") == (text, None)


def test_a_byte_order_mark_is_no_part_of_the_caption(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"sks dog")
    assert read_text(tmp_path / "a.txt")[0] == "sks dog"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp1252", "ein Hund für mich"),
        ("cp1252", "Käse"),
        ("cp1252", "photo d'été"),
        ("cp1252", "«niño con perro», Öl"),
        ("euc_kr", "강아지 사진"),
        ("cp1251", "кот"),
        ("cp932", "赤いりんごと青い鳥が木の上にいる写真です"),
        ("cp1251", "рыжий кот сидит на старом деревянном стуле перед окном"),
    ],
)
def test_other_encodings_are_guessed_and_said(tmp_path, encoding, text):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    found, guessed = read_text(tmp_path / "a.txt")
    assert found == text
    assert guessed


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_the_lines_of_a_caption_are_kept_without_what_is_empty(end, tmp_path):
    (tmp_path / "a.txt").write_bytes(f"a  crab,{end}  on a beach{end}{end}".encode())
    assert read_text(tmp_path / "a.txt")[0] == "a crab,\non a beach"


def test_metadata_is_read_by_file_name(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a crab"}\n\n{"file_name": "b.png"}\n')
    assert read_metadata(tmp_path / "metadata.jsonl") == {"a.png": "a crab", "b.png": ""}


def test_names_in_metadata_are_paths_however_they_are_written(tmp_path):
    rows = ['{"file_name": "./a.png", "text": "a"}', '{"file_name": "below\\\\b.png", "text": "b"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    assert read_metadata(tmp_path / "metadata.jsonl") == {"a.png": "a", "below/b.png": "b"}


@pytest.mark.parametrize(
    "line", ["{", "[]", '{"text": "x"}', '{"file_name": "../a.png"}', '{"file_name": "a", "text": 1}']
)
def test_a_bad_line_of_metadata_is_named_by_its_number(tmp_path, line):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a crab"}\n' + line)
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2"):
        read_metadata(tmp_path / "metadata.jsonl")


def test_only_the_end_of_a_line_ends_a_line_of_metadata(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a\u2028crab\x85"}\r\n', encoding="utf-8")
    assert read_metadata(tmp_path / "metadata.jsonl") == {"a.png": "a crab"}


def test_two_texts_for_one_picture_are_refused(tmp_path):
    rows = ['{"file_name": "a.png", "text": "a crab"}', '{"file_name": "./a.png", "text": "a house"}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    with pytest.raises(DataError, match=r"line 2: another text for a\.png"):
        read_metadata(tmp_path / "metadata.jsonl")


def test_a_file_name_gives_its_words():
    assert [words_in_name("red-apple"), words_in_name("cat_face--2"), words_in_name("crab")] == [
        "red apple",
        "cat face 2",
        "crab",
    ]


def test_a_template_is_filled_once():
    assert fill_template("{caption}, {trigger} style", "a {trigger} crab", "zwx") == "a {trigger} crab, zwx style"


def test_a_template_with_an_unknown_field_is_refused():
    with pytest.raises(ConfigError, match=r"\{style\}"):
        check_template("{caption}, {style}", "zwx")


def test_a_template_that_wants_a_trigger_needs_one():
    with pytest.raises(ConfigError, match="--trigger"):
        check_template("{caption}, {trigger}", None)


@pytest.mark.parametrize("template", ["{caption", "caption}", "{{caption}"])
def test_a_brace_by_itself_is_refused(template):
    with pytest.raises(ConfigError, match="by itself"):
        check_template(template, "zwx")


def test_half_a_character_is_refused_with_its_place(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a \\ud83d dog"}')
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 1: half of a character \('a \\ud83d dog'\)"):
        read_metadata(tmp_path / "metadata.jsonl")


def test_a_name_that_is_not_utf8_makes_no_caption():
    with pytest.raises(DataError, match="not in UTF-8"):
        words_in_name("caf\udce9-au-lait")


@pytest.mark.parametrize(
    "name", ["\\etc\\hostname.png", "/etc/a.png", "C:\\a.png", "c:a.png", "..\\a.png", "b/../../a.png"]
)
def test_a_file_name_of_metadata_leads_nowhere_else_on_any_system(tmp_path, name):
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name, "text": "a"}))
    with pytest.raises(DataError, match=r"line 1: .*outside the folder"):
        read_metadata(tmp_path / "metadata.jsonl")


@pytest.mark.parametrize(
    ("line", "said"), [("[" * 5000, "found no JSON"), ('{"file_name": "./"}', "found no file_name")]
)
def test_a_line_of_metadata_that_names_nothing_is_refused(tmp_path, line, said):
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(DataError, match=rf"metadata\.jsonl, line 1: .*{said}"):
        read_metadata(tmp_path / "metadata.jsonl")
