"""Captions in eight encodings, five in a folder."""

import pytest
from made_up import noise_picture

from sfumato.data.listing import list_folder

EUROPEAN = ["a café in Zürich", "crème brûlée, façade", "“blue” period, 50 €", "niño, montaña", "Käfer auf Grün"]
RUSSIAN = ["рыжий кот", "кот", "дом за рекой, зима", "девочка в красном платье, акварель", "старый деревянный стул"]
JAPANESE = ["赤いりんご", "青い鳥が木の上にいる写真です", "猫", "1girl, 長い髪, 制服", "古い家の前に立つ少年"]
KOREAN = ["빨간 사과", "고양이", "긴 머리 소녀, 수채화", "오래된 집 앞에 서 있는 소년", "파란 하늘과 산"]


@pytest.mark.parametrize(
    ("encoding", "texts", "is_guessed"),
    [
        ("utf-8", JAPANESE, False),
        ("utf-8-sig", RUSSIAN, False),
        ("utf-16", EUROPEAN, False),
        ("utf-32", KOREAN, False),
        ("cp1252", EUROPEAN, True),
        ("cp1251", RUSSIAN, True),
        ("cp932", JAPANESE, True),
        ("euc_kr", KOREAN, True),
    ],
)
def test_five_captions_in_one_encoding_are_read_exactly(tmp_path, encoding, texts, is_guessed):
    for number, text in enumerate(texts):
        noise_picture(16, 16).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_bytes(text.encode(encoding))
    found = [picture.caption for picture in list_folder(tmp_path).pictures]
    assert [caption.text for caption in found] == texts
    assert any(caption.notes for caption in found) == is_guessed
    assert all("not UTF-8" in note for caption in found for note in caption.notes)


@pytest.mark.parametrize(
    ("encoding", "text"),
    [("gbk", "蓝天白云"), ("gbk", "穿红裙子的女孩"), ("gbk", "水墨画"), ("big5", "長髮女孩"), ("euc_kr", "고양이")],
)
def test_one_short_caption_is_read_in_the_encoding_whose_everyday_letters_it_has(tmp_path, encoding, text):
    noise_picture(16, 16).save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert list_folder(tmp_path).pictures[0].caption.text == text


def test_captions_of_one_folder_may_be_in_several_encodings(tmp_path):
    written = {"cp932": JAPANESE[1], "cp1252": "un chien très mignon, élégant et fidèle", "utf-16-le": "ein süßer Hund"}
    for encoding, text in written.items():
        noise_picture(16, 16).save(tmp_path / f"{encoding}.png")
        (tmp_path / f"{encoding}.txt").write_bytes(text.encode(encoding))
    found = {picture.path.stem: picture.caption for picture in list_folder(tmp_path).pictures}
    assert {name: caption.text for name, caption in found.items()} == written
    assert all("not UTF-8" in caption.notes[0] for caption in found.values())


def test_what_is_no_text_is_named_and_stops_nothing_else(tmp_path):
    for name in ("a", "b"):
        noise_picture(16, 16).save(tmp_path / f"{name}.png")
    (tmp_path / "a.txt").write_bytes(b"x" * 2_000_000)
    (tmp_path / "b.txt").write_text("fine")
    first, second = list_folder(tmp_path).pictures
    assert first.caption.error.startswith("a.txt: 2,000,000 bytes")
    assert second.caption.text == "fine"
