"""Folders as people have them."""

import json
import os
import re
from pathlib import Path, PurePath

import pytest
from made_up import noise_picture
from PIL import Image

from sfumato.data import read_folder
from sfumato.data.captions import is_meaningless_name
from sfumato.data.folder import unused_trigger_note
from sfumato.data.listing import list_folder
from sfumato.errors import DataError

SETS = Path(__file__).parents[2] / "datasets"


def names(folder):
    return [example.path.name for example in folder]


def captions(folder):
    return [example.caption for example in folder]


def test_pictures_come_sorted_by_name_with_the_words_of_their_names(pictures):
    folder = read_folder(pictures, caption_template="{caption}, {trigger} style", trigger="zwx")
    assert names(folder) == ["crab.png", "house.png", "pizza.png", "red-apple.png", "rocket.png", "tulip.png"]
    assert captions(folder)[3] == "red apple, zwx style"
    assert folder.notes == ()


def test_the_order_is_that_of_the_letters_on_every_system(tmp_path, monkeypatch):
    """Windows compares paths in small letters, and with another order a seed would train another model there."""
    for name in ("a", "B", "img_1", "IMG_2"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    monkeypatch.setattr(PurePath, "__lt__", lambda one, other: str(one).lower() < str(other).lower())
    assert names(read_folder(tmp_path, caption_template="a")) == ["B.png", "IMG_2.png", "a.png", "img_1.png"]


def test_caption_files_come_before_metadata_and_names(pictures):
    (pictures / "crab.txt").write_text("from txt")
    (pictures / "house.caption").write_text("from caption")
    (pictures / "metadata.jsonl").write_text(
        '{"file_name": "crab.png", "text": "from metadata"}\n{"file_name": "pizza.png", "text": "from metadata"}\n'
    )
    found = captions(read_folder(pictures, caption_template="{caption}"))
    assert found == ["from txt", "from caption", "from metadata", "red apple", "rocket", "tulip"]


def test_captions_that_contradict_each_other_are_told(pictures):
    (pictures / "crab.txt").write_text("a crab")
    (pictures / "crab.caption").write_text("a lobster")
    assert list_folder(pictures).notes == ("crab.png: crab.txt is read; crab.caption says otherwise",)
    (pictures / "house.caption").write_text("a house")
    (pictures / "metadata.jsonl").write_text('{"file_name": "house.png", "text": "a hut"}')
    said = "2 images have captions that differ, such as crab.png: crab.txt is read; crab.caption says otherwise"
    assert read_folder(pictures, caption_template="{caption}").notes == (said,)


def test_the_same_caption_in_two_places_is_no_news(pictures):
    (pictures / "crab.txt").write_text("a crab\n")
    (pictures / "crab.caption").write_text("a crab")
    (pictures / "metadata.jsonl").write_text('{"file_name": "crab.png", "text": "a  crab"}')
    (pictures / "house.caption").write_text("a house")
    (pictures / "house.txt").touch()
    assert list_folder(pictures).notes == ()


def test_missing_captions_name_the_files_and_the_ways_to_give_them(pictures):
    (pictures / "crab.txt").write_text("a crab")
    with pytest.raises(DataError, match=r"5 of 6 images have no caption: house\.png.*NAME\.txt.*--caption"):
        read_folder(pictures)


def test_names_that_say_nothing_are_no_captions_to_recommend(tmp_path):
    """A camera's names would be learned as words; what all pictures show is what to say then."""
    for name in ("IMG_1234.png", "00.png", "b07.png"):
        Image.new("RGB", (64, 64), "teal").save(tmp_path / name)
    with pytest.raises(DataError, match=r'or pass --caption "sks dog" as the caption of all\.$'):
        read_folder(tmp_path, trigger="sks dog")
    with pytest.raises(DataError, match=r'or pass --caption "a dog" as the caption of all\.$'):
        read_folder(tmp_path)
    (note,) = read_folder(tmp_path, caption_template="{caption}").notes
    assert note.startswith("3 captions are names of files that say nothing, such as '00'; write captions, or pass")
    assert note.endswith('pass --caption "a dog" as the caption of all')
    (note,) = read_folder(tmp_path, caption_template="<w>, {caption}").notes
    assert note.endswith('pass --caption "<w>, a dog" as the caption of all')
    assert read_folder(tmp_path, caption_template="a dog").notes == ()
    (tmp_path / "00.txt").write_text("a dog on a beach")
    (note,) = read_folder(tmp_path, caption_template="{caption}").notes
    assert note.startswith("2 captions are names of files that say nothing, such as 'IMG 1234'")


@pytest.mark.parametrize(
    ("name", "nothing"),
    [("DSC00012 (1)", True), ("20240102-0003", True), ("PXL_20240102", True), ("犬", False), ("dog-01", False),
     ("img of ox 1", False), ("WhatsApp Image 2024-01-01 at 10.10.10", True), ("IMG-20240101-WA0001", True),
     ("Screenshot 2024-01-01 at 10.10.10", True), ("Screen Shot 2024-01-01 at 9.00.00 AM", True), ("_MG_1234", True),
     ("FB_IMG_1700000000", True), ("PXL_20240101_101010.PORTRAIT", True), ("DSC_0001-edited", True),
     ("portrait 1", False), ("shot 2", False), ("edited-3", False)],
)  # fmt: skip
def test_which_names_say_nothing(name, nothing):
    assert is_meaningless_name(name) is nothing


def test_a_name_of_another_encoding_is_no_matter_where_no_caption_is_made_of_it(tmp_path):
    noise_picture().save(tmp_path / os.fsdecode(b"caf\xe9.png"))
    (example,) = read_folder(tmp_path, caption_template="{trigger}", trigger="sks dog")
    assert example.caption == "sks dog"
    with pytest.raises(DataError, match="not in UTF-8"):
        read_folder(tmp_path, caption_template="{caption}")


def test_a_year_is_told_from_repeats(tmp_path):
    for name in ("2019_berlin", "10_paris"):
        (tmp_path / name).mkdir()
        noise_picture().save(tmp_path / name / "a.png")
    (note,) = [note for note in read_folder(tmp_path).notes if "repeats" in note]
    assert note.startswith("2019_berlin: 2,019 repeats an epoch, as kohya's folders are named")


def test_a_trigger_is_to_be_added_to_the_subjects_template(tmp_path):
    for name in ("dogs", "cats"):
        (tmp_path / name).mkdir()
        noise_picture().save(tmp_path / name / "a.png")
    sources = ['path = "cats"\nclass = true\ncaption = "a {caption}"', 'path = "dogs"\ncaption = "my {caption}"']
    (tmp_path / "d.toml").write_text("".join(f"[[source]]\n{source}\n" for source in sources))
    assert '"my {caption}, {trigger}"' in unused_trigger_note(read_folder(tmp_path / "d.toml"), "zwx")


def test_metadata_may_lead_into_folders_below(pictures):
    below = pictures / "more"
    below.mkdir()
    noise_picture().save(below / "a.png")
    (pictures / "metadata.jsonl").write_text('{"file_name": "more/a.png", "text": "found below"}\n')
    assert "found below" in captions(read_folder(pictures, caption_template="{caption}"))


def test_a_folder_with_repeats_that_is_named_itself_says_that_they_do_not_count(tmp_path):
    folder = tmp_path / "10_sks dog"
    folder.mkdir()
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    said = f"10_sks dog: its 10 repeats and the caption 'sks dog' count where {tmp_path}, the folder above it, is named"
    with pytest.raises(DataError, match=re.escape(said)):
        read_folder(folder)
    (folder / "a.txt").write_text("a dog")
    found = read_folder(folder)
    assert found.notes == (f"{said}; here they do not",)
    assert [example.repeats for example in found] == [1]
    (tmp_path / "dataset.toml").write_text('[[source]]\npath = "10_sks dog"\nrepeats = 3\n')
    assert read_folder(tmp_path / "dataset.toml").notes == ()


def test_folders_with_repeats_give_repeats_and_captions(tmp_path):
    for name, count in (("10_sks dog", 2), ("1_dog", 1), ("0_off", 1)):
        (tmp_path / name).mkdir()
        for number in range(count):
            noise_picture().save(tmp_path / name / f"{number}.png")
    noise_picture().save(tmp_path / "beside.png")
    folder = read_folder(tmp_path)
    assert [(e.repeats, e.caption) for e in folder] == [(10, "sks dog"), (10, "sks dog"), (1, "dog")]
    assert folder.samples == 21
    assert {entry.name for entry in folder.ignored} == {"beside.png", "0_off"}


@pytest.mark.parametrize("mask", ["crab.mask.png", "masks/crab.png"])
def test_a_mask_is_not_read_from_outside_of_the_folder(mask, tmp_path):
    (tmp_path / "pictures/masks").mkdir(parents=True)
    for name in ("private.png", "pictures/crab.png"):
        noise_picture().save(tmp_path / name)
    (tmp_path / "pictures" / mask).symlink_to(tmp_path / "private.png")
    (crab,) = (listing := list_folder(tmp_path / "pictures")).pictures
    assert crab.mask is None
    assert [(entry.name, entry.reason) for entry in listing.ignored] == [(mask, "leads out of the folder")]


def test_what_is_ignored_is_listed_with_its_reason(pictures):
    for name in (".DS_Store", "._crab.png", "Thumbs.db", "film.mp4", "stray.txt", "README.md"):
        (pictures / name).write_bytes(b"x")
    (pictures / "sub").mkdir()
    os.mkfifo(pictures / "pipe.png")
    (pictures / "loop.png").symlink_to("loop.png")
    (pictures / "out.png").symlink_to(Path(__file__))
    folder = read_folder(pictures, caption_template="{caption}")
    assert len(folder) == 6
    assert {entry.name: entry.reason for entry in folder.ignored} == {
        ".DS_Store": "hidden",
        "._crab.png": "hidden",
        "Thumbs.db": "not an image by its name",
        "film.mp4": "not an image by its name",
        "loop.png": "a broken link",
        "out.png": "leads out of the folder",
        "pipe.png": "not a plain file",
        "stray.txt": "a caption without an image",
        "sub": "a folder",
    }
    assert folder.notes[0].startswith("6 images in pictures, 9 ignored: ")


def test_bad_pictures_stop_by_name_or_are_skipped(pictures):
    (pictures / "bad.png").write_bytes(b"")
    (pictures / "page.jpg").write_text("<html>")
    with pytest.raises(
        DataError, match=r"2 of 8 images in pictures cannot be learned from: bad\.png: .*page\.jpg: .*--skip-bad"
    ):
        read_folder(pictures, caption_template="{caption}")
    folder = read_folder(pictures, caption_template="{caption}", skip_bad=True)
    assert len(folder) == 6
    assert {entry.name for entry in folder.ignored} == {"bad.png", "page.jpg"}
    for name in ("bad.png", "page.jpg"):  # each by name, however many other files are ignored
        assert any(note.startswith(f"left out: {name}: ") for note in folder.notes)


def test_a_folder_that_metadata_leads_into_is_not_ignored(pictures):
    (pictures / "deep").mkdir()
    noise_picture(seed=9).save(pictures / "deep" / "a.png")
    assert [entry.reason for entry in list_folder(pictures).ignored] == ["a folder; its images are not read"]
    (pictures / "metadata.jsonl").write_text('{"file_name": "deep/a.png", "text": "a"}\n')
    listing = list_folder(pictures)
    assert (len(listing.pictures), listing.ignored) == (7, ())


def test_ai_toolkit_s_placeholder_becomes_the_trigger(pictures):
    (pictures / "crab.txt").write_text("[trigger] on a beach")
    folder = read_folder(pictures, caption_template="{caption}", trigger="zwx")
    assert "zwx on a beach" in [example.caption for example in folder]
    folder = read_folder(pictures, caption_template="[trigger], {caption}", trigger="zwx")
    (crab,) = (example for example in folder if example.path.name == "crab.png")
    assert (crab.caption, crab.template) == ("zwx, zwx on a beach", "{trigger}, {caption}")


def test_skipping_all_is_refused(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match="None is left"):
        read_folder(tmp_path, caption_template="{caption}", skip_bad=True)


def test_no_folder_a_file_and_an_empty_folder_are_one_line_each(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "concepts.json").write_text("[]")
    (tmp_path / "empty").mkdir()
    refused = {"none": "no such folder", "file": r"is a file.*dataset\.toml\.$", "empty": "no images in it"}
    refused |= {"concepts.json": r"is a file.*sfumato dataset converts other tools' configs\.$"}
    for name, words in refused.items():
        with pytest.raises(DataError, match=words):
            read_folder(tmp_path / name)


def test_masks_are_found_beside_and_in_their_folder(pictures):
    Image.new("L", (64, 64), 255).save(pictures / "crab.mask.png")
    (pictures / "masks").mkdir()
    Image.new("L", (64, 64), 255).save(pictures / "masks" / "house.png")
    folder = read_folder(pictures, caption_template="{caption}", mask="files")
    assert [example.mask and example.mask.name for example in folder][:3] == ["crab.mask.png", "house.png", None]
    assert "4 images have no mask" in folder.notes[0]
    assert folder.ignored == ()
    assert all(e.mask is None for e in read_folder(pictures, caption_template="{caption}"))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_is_no_mask(pictures):
    os.mkfifo(pictures / "crab.mask.png")
    Image.new("L", (64, 64), 255).save(pictures / "house.mask.png")
    folder = read_folder(pictures, caption_template="{caption}", mask="files")
    assert [example.mask and example.mask.name for example in folder][:2] == [None, "house.mask.png"]


def test_a_trigger_that_no_caption_holds_is_said(pictures):
    folder = read_folder(pictures, caption_template="{caption}", trigger="zwx")
    assert folder.notes[0] == "no caption holds the trigger 'zwx'; pass --caption \"{caption}, {trigger}\" to add it"
    folder = read_folder(pictures, caption_template="a dog", trigger="zwx")
    assert 'pass --caption "a dog, {trigger}"' in folder.notes[0]


def test_a_guessed_encoding_is_said(pictures):
    (pictures / "crab.txt").write_bytes("рыжий кот сидит на старом деревянном стуле".encode("cp1251"))
    assert "crab.txt: not UTF-8; read as" in read_folder(pictures, caption_template="{caption}").notes[0]


def test_what_is_to_be_said_of_many_captions_is_one_line(pictures):
    for path in sorted(pictures.glob("*.png")):
        path.with_suffix(".txt").write_bytes(f"d\xe9j\xe0 vu, {path.stem}".encode("cp1252"))
    (pictures / "tulip.txt").write_text("")
    said = read_folder(pictures, caption_template="{caption}").notes
    assert said == (
        "crab.txt, house.txt, pizza.txt and 2 more: not UTF-8; read as cp1252: 'déjà vu, crab'",
        "tulip.txt: empty, so taken for missing",
    )


@pytest.mark.parametrize(
    ("name", "count", "template"), [("line-style", 16, "{caption}"), ("teddy-bear", 3, None), ("flamingo", 3, None)]
)
def test_the_sample_sets_read_without_a_word(name, count, template):
    folder = read_folder(SETS / name, caption_template=template)
    assert (len(folder), folder.notes) == (count, ())
    assert (SETS / name / "ATTRIBUTION.md").is_file()


def test_companions_may_have_their_suffix_in_capitals(pictures):
    (pictures / "crab.TXT").write_text("from TXT")
    Image.new("L", (64, 64), 255).save(pictures / "house.mask.PNG")
    folder = read_folder(pictures, caption_template="{caption}", mask="files")
    assert captions(folder)[0] == "from TXT"
    assert [example.mask and example.mask.name for example in folder][:2] == [None, "house.mask.PNG"]
    assert folder.ignored == ()


def test_names_are_one_however_their_accents_are_composed(tmp_path):
    """A Mac's files have "é" as two characters, what is written on other systems has it as one."""
    (tmp_path / "masks").mkdir()
    for name in ("cafe\u0301", "u\u0308"):
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "masks/caf\u00e9.png")
    (tmp_path / "caf\u00e9.txt").write_text("from txt")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "\u00fc.png", "text": "from metadata"}', encoding="utf-8")
    folder = read_folder(tmp_path, mask="files")
    assert captions(folder) == ["from txt", "from metadata"]
    assert [example.mask is None for example in folder] == [False, True]
    assert (folder.ignored, list_folder(tmp_path).notes) == ((), ())


def test_captions_under_another_key_of_metadata_are_told(tmp_path):
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "prompt": "a crab"}')
    with pytest.raises(DataError, match=r'no caption: a\.png\..* as "text" in metadata\.jsonl'):
        read_folder(tmp_path)
    (tmp_path / "a.txt").write_text("a crab")
    assert read_folder(tmp_path).notes == ('metadata.jsonl: no line of it has a "text", so it holds no caption',)


def test_single_lines_of_metadata_without_a_text_are_told(pictures):
    lines = ['{"file_name": "crab.png", "text": "a crab"}', '{"file_name": "house.png", "prompt": "a house"}']
    (pictures / "metadata.jsonl").write_text("\n".join(lines))
    notes = read_folder(pictures, caption_template="{caption}").notes
    assert notes == ('metadata.jsonl: 1 line has no "text", so no caption: house.png',)


def test_masks_that_are_not_read_are_listed(pictures):
    (pictures / "masks").mkdir()
    for name in ("masks/crab.jpg", "masks/nobody.png", "house.mask.jpg"):
        Image.new("L", (64, 64), 255).save(pictures / name)
    ignored = {entry.name: entry.reason for entry in list_folder(pictures).ignored}
    assert ignored == {
        "masks/crab.jpg": "masks are read from .png",
        "masks/nobody.png": "a mask that no image takes",
        "house.mask.jpg": "masks are read from .png",
    }


def test_metadata_leads_through_no_link_out_of_the_folder(tmp_path):
    for name in ("inside", "outside"):
        (tmp_path / name).mkdir()
    noise_picture().save(tmp_path / "inside/a.png")
    noise_picture().save(tmp_path / "outside/z.png")
    (tmp_path / "inside/sub").symlink_to(tmp_path / "outside")
    rows = ['{"file_name": "a.png", "text": "a"}', '{"file_name": "sub/z.png", "text": "z"}']
    (tmp_path / "inside/metadata.jsonl").write_text("\n".join(rows))
    folder = read_folder(tmp_path / "inside")
    assert [example.caption for example in folder] == ["a"]
    assert ("sub/z.png", "leads out of the folder") in [(entry.name, entry.reason) for entry in folder.ignored]


def test_onetrainers_masks_are_masks_and_its_conditioning_pictures_are_left_out(tmp_path):
    for name in ("a.png", "a-masklabel.png", "a-condlabel.png", "b.png", "gone-masklabel.png"):
        noise_picture().save(tmp_path / name)
    folder = read_folder(tmp_path, caption_template="{caption}", mask="files")
    assert [(e.path.name, e.mask and e.mask.name) for e in folder] == [("a.png", "a-masklabel.png"), ("b.png", None)]
    assert [(entry.name, entry.reason) for entry in folder.ignored] == [
        ("a-condlabel.png", "OneTrainer's image to inpaint by"),
        ("gone-masklabel.png", "a mask that no image takes"),
    ]


def test_metadata_is_read_where_the_system_opens_a_file_by_another_spelling(tmp_path, monkeypatch):
    """A Mac's disk: the folder lists "cafe\u0301.png" and opens "caf\u00e9.png", too."""
    Image.new("RGB", (64, 64)).save(tmp_path / "cafe\u0301.png")
    line = {"file_name": "caf\u00e9.png", "text": "a red cup"}
    (tmp_path / "metadata.jsonl").write_text(json.dumps(line))
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: path.name == line["file_name"] or is_file(path))
    assert captions(read_folder(tmp_path)) == ["a red cup"]


def test_metadata_that_a_link_leads_elsewhere_for_is_not_read(pictures, tmp_path):
    (tmp_path / "private.jsonl").write_text('{"file_name": "crab.png", "text": "private"}')
    (pictures / "metadata.jsonl").symlink_to(tmp_path / "private.jsonl")
    listing = list_folder(pictures)
    assert [found.caption.text for found in listing.pictures] == [""] * 6
    assert listing.notes == ("metadata.jsonl: leads out of the folder, so it is not read",)


def test_a_trigger_within_another_word_is_none(tmp_path):
    noise_picture().save(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("a cartoon cat")
    examples = read_folder(tmp_path, trigger="art")
    assert unused_trigger_note(examples, "art")
    assert examples.triggers == []
    assert not unused_trigger_note(examples, "cartoon cat")
