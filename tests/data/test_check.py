"""`sfumato check`: what is found, what is drawn, what is mended."""

import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from made_up import FakeBase, noise_picture
from matplotlib import font_manager, get_data_path
from PIL import Image, ImageChops, ImageCms, ImageFilter
from PIL.PngImagePlugin import PngInfo
from sfumato.pipelines.caption import Config
from sfumato.pipelines.check import main, render

from sfumato.bases.needs import needs_of
from sfumato.config import parse
from sfumato.data import Example, open_image, open_picture, prepare, read_folder
from sfumato.data.buckets import side_step
from sfumato.data.report import check
from sfumato.data.survey import measure_picture
from sfumato.drawing import crop_sheet
from sfumato.errors import BaseModelError, ConfigError, DataError


def smooth_noise(seed, side=256):
    """A picture with detail at every scale, as photographs have it."""
    tiles = [noise_picture(side, side, seed=seed).resize((n, n)).resize((side, side)) for n in (8, 64)]
    return Image.blend(*tiles, 0.5)


@pytest.fixture
def messy(messy_once, tmp_path) -> Path:
    """Pictures with one flaw each, and some without; a copy for each test."""
    return Path(shutil.copytree(messy_once, tmp_path / "messy"))


@pytest.fixture(scope="module")
def messy_once(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("messy")
    for number in range(3):
        smooth_noise(number).save(folder / f"good-{number}.png")
    smooth_noise(0).save(folder / "twin.png")
    smooth_noise(1).resize((240, 240)).save(folder / "near.jpg", quality=60)
    smooth_noise(5).filter(ImageFilter.GaussianBlur(24)).save(folder / "soft.png")
    Image.new("RGB", (64, 64)).save(folder / "black.png")
    Image.new("RGB", (64, 64), "teal").save(folder / "teal.png")
    noise_picture(20, 20, seed=9).save(folder / "tiny.png")
    noise_picture(200, 64, seed=10).save(folder / "wide.png")
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff\xe0 not much")
    exif = Image.Exif()
    exif[0x0112] = 6
    noise_picture(96, 64, seed=11).save(folder / "turned.jpg", exif=exif)
    (folder / "notes.doc").write_text("x")
    for path in folder.glob("*.*g"):
        path.with_suffix(".txt").write_text(f"a picture of {path.stem}")
    (folder / "tiny.txt").write_bytes("café élégant, déjà vu".encode("cp1252"))
    (folder / "good-2.txt").unlink()
    return folder


def found(report, kind):
    return sorted(name for line in report.lines if line.kind == kind for name in line.names)


@pytest.fixture(scope="module")
def report(messy_once):
    return check(messy_once, needs_of("pocket"), resolution=64, batch=4)


def test_each_flaw_is_found_in_its_picture_and_in_no_other(report):
    assert found(report, "bad") == ["broken.jpg"]
    assert found(report, "black") == ["black.png"]
    assert found(report, "one colour") == ["teal.png"]
    assert found(report, "blurred") == ["soft.png"]
    assert found(report, "too small") == ["tiny.png"]
    assert found(report, "cropped") == ["wide.png"]
    assert found(report, "duplicate") == ["good-0.png", "twin.png"]
    assert found(report, "near duplicate") == ["good-1.png", "near.jpg"]
    assert found(report, "caption missing") == ["good-2.png"]
    assert found(report, "caption encoding") == ["tiny.png"]
    assert [(entry.name, entry.reason) for entry in report.ignored] == [("notes.doc", "not an image by its name")]


def test_dark_pictures_are_no_copies_of_each_other_and_many_copies_are_said(tmp_path):
    for grey in range(3):
        Image.new("RGB", (64, 64), (grey, 0, 0)).save(tmp_path / f"{grey}.png")
    report = check(tmp_path, needs_of("pocket"), caption_template="x")
    assert found(report, "black") == ["0.png", "1.png", "2.png"]
    assert not [line for line in report.lines if "duplicate" in line.kind]
    for name in ("a", "b"):
        noise_picture().save(tmp_path / f"{name}.png")
    kinds = [line.kind for line in check(tmp_path, needs_of("pocket"), caption_template="x").lines]
    assert "duplicate" in kinds
    assert "many duplicates" not in kinds  # one of five
    noise_picture().save(tmp_path / "c.png")
    (text,) = [
        line.text
        for line in check(tmp_path, needs_of("pocket"), caption_template="x").lines
        if line.kind == "many duplicates"
    ]
    assert text == "33% of the images repeat others; what they show is learned by heart"


def test_the_crop_of_a_source_is_its_own(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture(200, 64).save(tmp_path / "dogs/wide.png")
    (tmp_path / "d.toml").write_text('[[source]]\npath = "dogs"\ncrop = "pad"\n')
    assert found(check(tmp_path / "dogs", needs_of("pocket"), caption_template="x"), "cropped") == ["wide.png"]
    assert not found(check(tmp_path / "d.toml", needs_of("pocket"), caption_template="x"), "cropped")


def test_a_side_below_the_base_s_step_is_refused(tmp_path):
    noise_picture().save(tmp_path / "a.png")
    with pytest.raises(ConfigError, match=r"--resolution 8: this base takes multiples of 16 px\. Give 16 or more\."):
        check(tmp_path, needs_of("pocket"), resolution=8)


def test_a_name_with_brackets_stays_whole(tmp_path):
    noise_picture(20, 20).save(tmp_path / "photo (1).png")
    noise_picture(200, 64, seed=1).save(tmp_path / "wide (2).png")
    report = check(tmp_path, needs_of("pocket"), caption_template="x")
    assert found(report, "too small") == ["photo (1).png"]
    assert found(report, "cropped") == ["wide (2).png"]


@pytest.fixture
def two_folders(tmp_path) -> Path:
    """A data set of two folders with files of the same names, one of which is broken; the second is of the class."""
    for number, folder in enumerate(["dogs/a", "dogs/b"]):
        (tmp_path / folder).mkdir(parents=True)
        noise_picture(seed=number).save(tmp_path / folder / "00.png")
        noise_picture(seed=9).save(tmp_path / folder / "01.png")
    cut = (tmp_path / "dogs/b/00.png").read_bytes()[:-40]
    (tmp_path / "dogs/b/00.png").write_bytes(cut)
    (tmp_path / "dataset.toml").write_text(
        '[[source]]\npath = "dogs/a"\nwords = "x"\nrepeats = 3\n'
        '[[source]]\npath = "dogs/b"\nwords = "y"\nclass = true\n'
    )
    return tmp_path / "dataset.toml"


def test_files_of_one_name_are_told_apart(two_folders, base):
    report = check(two_folders, needs_of("pocket"))
    assert found(report, "bad") == ["b/00.png"]
    assert next(line.text for line in report.lines if line.kind == "bad").startswith("b/00.png: ")
    assert found(report, "duplicate") == ["a/01.png", "b/01.png"]
    with pytest.raises(DataError, match=r"1 of 4 images cannot be learned from: b/00\.png: "):
        prepare(read_folder(two_folders), base, resolution=64)


def test_names_that_say_nothing_are_told_and_not_recommended(tmp_path):
    for number in range(3):
        smooth_noise(number).save(tmp_path / f"IMG_{number}.png")
    (tmp_path / "IMG_0.txt").write_text("a dog")
    report = check(tmp_path, needs_of("pocket"), trigger="sks dog")
    assert report.stops
    (text,) = (line.text for line in report.lines if line.kind == "caption missing")
    assert "{caption}" not in text
    assert '--caption "sks dog" as the caption of all. `dreambooth` and `textual_inversion` give them' in text
    words = re.search("`sfumato caption (.*?)`", text)[1].split()
    assert parse(Config, words, program="caption", first_may_be_config=False).write
    report = check(tmp_path, needs_of("pocket"), caption_template="{caption}")
    assert found(report, "caption says nothing") == ["IMG_1.png", "IMG_2.png"]
    assert not report.stops


def test_what_each_folder_gives_is_said(two_folders):
    report = check(two_folders, needs_of("pocket"))
    assert report.folders == ["a: 2 images x 3", "b: 2 images of the class"]
    assert "folder   a: 2 images x 3" in render(report)
    assert report.to_dict()["folders"] == report.folders


def test_pictures_of_a_class_are_in_no_epoch(two_folders):
    """As `lora` and `dreambooth` learn from them."""
    noise_picture(96, 48).save(two_folders.parent / "dogs/a/00.png")
    report = check(two_folders, needs_of("pocket"))
    assert (report.samples, report.buckets) == (6, {(64, 64): 3, (80, 48): 3})
    two_folders.write_text(two_folders.read_text().replace("class = true", ""))
    assert check(two_folders, needs_of("pocket")).buckets == {(64, 64): 4, (80, 48): 3}


def test_masks_are_missed_only_where_a_source_has_them(two_folders):
    noise_picture().save(two_folders.parent / "dogs/a/00.mask.png")
    two_folders.write_text(two_folders.read_text().replace("repeats = 3", 'mask = "files"'))
    assert found(check(two_folders, needs_of("pocket")), "mask missing") == ["a/01.png"]


def test_masks_of_one_source_are_not_missed_in_another_of_the_same_folder(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / "a.png")
    Image.new("L", (64, 64), 255).save(tmp_path / "dogs" / "a.mask.png")
    shared = '[[source]]\npath = "dogs"\nwords = "x"\n'
    (tmp_path / "d.toml").write_text(f'{shared}mask = "files"\n{shared}crop = "pad"\n')
    assert read_folder(tmp_path / "d.toml")[0].mask is not None
    report = check(tmp_path / "d.toml", needs_of("pocket"))
    assert not report.stops
    assert found(report, "no masks") == found(report, "mask missing") == []


def test_pictures_without_the_alpha_that_was_to_mask_them_are_told(tmp_path):
    for name in "ab":
        noise_picture().convert("RGBA" if name == "a" else "RGB").save(tmp_path / f"{name}.png")
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(tmp_path / "c.png")
    report = check(tmp_path, needs_of("pocket"), caption_template="x", mask="alpha")
    assert found(report, "mask missing") == ["a.png", "b.png"]
    assert not any(line.kind == "note" for line in report.lines)


def test_files_are_told_apart_wherever_their_folders_are_named_from(two_folders, monkeypatch):
    monkeypatch.chdir(two_folders.parent)
    text = two_folders.read_text().replace('"dogs/b"', f'"{two_folders.parent}/dogs/b"')
    Path("dataset.toml").write_text(text)
    assert found(check(Path("dataset.toml"), needs_of("pocket")), "bad") == ["b/00.png"]
    monkeypatch.chdir("dogs/b")
    Path("01.png").write_bytes(b"")
    with pytest.raises(DataError, match="1 of 2 images in b cannot be learned from"):
        read_folder(Path("."), caption_template="x")


def test_a_finding_about_several_pictures_comes_once(tmp_path):
    for suffix in ("png", "webp"):
        noise_picture(seed=len(suffix)).save(tmp_path / f"a.{suffix}")
    (tmp_path / "a.txt").write_text("")
    report = check(tmp_path, needs_of("pocket"), caption_template="x")
    assert [line.names for line in report.lines if line.kind == "caption"] == [("a.png", "a.webp")]


def test_what_training_will_see_is_counted(report):
    assert len(report.looks) == 12
    assert report.samples == 11
    assert sum(report.buckets.values()) == 11
    assert report.buckets[64, 64] == 9
    assert found(report, "small bucket") == []
    assert any("fewer than a batch of 4" in line.text for line in report.lines)
    assert report.stops


def test_the_text_names_what_stops_training_first(report):
    text = render(report)
    assert "11 of 12 images can be learned from" in text
    assert text.index("stops training") < text.index("broken.jpg") < text.index("to look at") < text.index("black.png")


def test_what_the_check_calls_fine_training_takes(pictures):
    report = check(pictures, needs_of("pocket"), caption_template="{caption}")
    assert not report.stops
    assert [e.caption for e in report.examples] == [
        e.caption for e in read_folder(pictures, caption_template="{caption}")
    ]


def test_the_end_of_a_long_caption_is_shown(pictures):
    (pictures / "crab.txt").write_text("crab, " + "very " * 75 + "end of it")
    report = check(pictures, needs_of("sd1"), caption_template="{caption}")
    cut = [line for line in report.lines if line.kind == "caption cut"]
    assert cut[0].names == ("crab.png",)
    assert "end of it'; --max-tokens 225" in cut[0].text
    assert "75 tokens" in cut[0].text
    report = check(pictures, needs_of("sd1", max_tokens=150), caption_template="{caption}")
    assert not [line for line in report.lines if line.kind == "caption cut"]


def test_a_very_long_end_is_shortened(pictures):
    (pictures / "crab.txt").write_text("crab, " + "very " * 300)
    report = check(pictures, needs_of("sd1"), caption_template="{caption}")
    (cut,) = [line.text for line in report.lines if line.kind == "caption cut"]
    assert len(cut) < 200


@pytest.mark.parametrize(
    ("word", "kind", "text"),
    [
        ("dog", "trigger ordinary", "'dog' is one token, number 1,929: an ordinary word"),
        ("tangerine", "trigger ordinary", "'tangerine' is one token, number 42,045"),
        ("sks", "trigger", "'sks' is one rare token, number 48,136"),
        ("zwxq", "trigger", "tokens: "),
    ],
)
def test_a_trigger_is_shown_as_it_tokenizes(pictures, word, kind, text):
    report = check(pictures, needs_of("sd1"), caption_template="{caption}, {trigger}", trigger=word)
    assert any(text in line.text for line in report.lines if line.kind == kind)


@pytest.mark.parametrize(("batch", "said"), [(2, None), (3, "once in 2 epochs"), (4, "once in 2 epochs"), (5, "in 3")])
def test_shapes_of_fewer_pictures_than_a_batch_are_told(batch, said, tmp_path):
    for number in range(2):
        noise_picture(seed=number).save(tmp_path / f"{number}.png")
    report = check(tmp_path, needs_of("pocket"), batch=batch, caption_template="x")
    texts = [line.text for line in report.lines if line.kind == "small bucket"]
    assert len(texts) == (said is not None)
    assert said is None or (said in texts[0] and f"2 samples an epoch, fewer than a batch of {batch}" in texts[0])


def test_a_placeholder_that_no_trigger_takes_the_place_of_is_told(tmp_path):
    for number, caption in enumerate(["[trigger] on grass", "a dog"]):
        noise_picture(seed=number).save(tmp_path / f"{number}.png")
        (tmp_path / f"{number}.txt").write_text(caption)
    report, data = check(tmp_path, needs_of("pocket")), prepare(read_folder(tmp_path), FakeBase(), resolution=64)
    (line,) = (line for line in report.lines if line.kind == "trigger missing")
    assert line.names == ("0.png",)
    assert line.text == "1 caption holds [trigger], and there is no trigger: 0.png; pass --trigger WORD"
    assert line.text in data.notes
    report = check(tmp_path, needs_of("pocket"), trigger="zwx")
    assert not [line for line in report.lines if line.kind == "trigger missing"]


def test_the_class_beside_a_rare_word_is_no_flaw(pictures):
    report = check(pictures, needs_of("sd1"), caption_template="{trigger}", trigger="sks dog")
    assert not [line for line in report.lines if line.kind == "trigger ordinary"]
    assert any("'dog' is an ordinary word, as the class" in line.text for line in report.lines)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("pocket", (4, 64, 16)), ("sd1", (8, 512, 64)), ("sdxl", (8, 1024, 64)), ("sd2", (8, 768, 64))],
)
def test_what_a_base_wants_is_known_without_its_weights(name, expected):
    needs = needs_of(name)
    step = side_step(needs.vae_factor, needs.levels, needs.resolution)
    assert (needs.vae_factor, needs.resolution, step) == expected
    assert needs.token_limit == 75


def test_a_folder_tells_the_same_as_the_loaded_base(pocket_folder):
    from sfumato.bases import load_base
    from tests.tiny import CPU

    base, needs = load_base(str(pocket_folder), precision=CPU), needs_of(str(pocket_folder))
    assert (needs.vae_factor, needs.resolution) == (base.vae_factor, base.resolution)
    assert needs.token_limit == base.token_limit
    caption = "a red cat " * 40
    assert needs.cut_off(caption) == base.cut_off(caption) != ""


def test_a_folder_comes_before_a_family_and_a_home_is_expanded(pocket_folder, tmp_path, monkeypatch):
    """As the trainers find a base."""
    shutil.copytree(pocket_folder, tmp_path / "sd1")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert needs_of("sd1").resolution == needs_of("~/sd1").resolution == needs_of(str(pocket_folder)).resolution
    assert (needs_of("sd1").name, needs_of("~/sd1").name) == ("sd1", "sd1")


def test_a_base_whose_size_is_two_numbers_has_its_family_s_resolution(pocket_folder, tmp_path):
    """As the loaded base has it."""
    folder = Path(shutil.copytree(pocket_folder, tmp_path / "base"))
    for part in ("unet", "vae"):
        config = json.loads((folder / part / "config.json").read_text())
        (folder / part / "config.json").write_text(json.dumps(config | {"sample_size": [24, 16]}))
    assert needs_of(str(folder)).resolution == needs_of("pocket").resolution
    (folder / "vae" / "config.json").write_text("{}")
    with pytest.raises(BaseModelError, match=r"base/vae/config\.json: no block_out_channels in it"):
        needs_of(str(folder))


def test_a_base_that_is_not_here_names_the_families():
    with pytest.raises(BaseModelError, match=r"somebody/something: not on this machine.*sd1, sd2, sdxl"):
        needs_of("somebody/something")
    with pytest.raises(BaseModelError, match=r"^--base is empty; name pocket, a folder, a file, a hub id or a family"):
        needs_of("")


def test_json_holds_every_picture_and_finding_and_the_exit_code_is_1(messy, capsys):
    assert main([str(messy), "--json"]) == 1
    printed = json.loads(capsys.readouterr().out)
    assert printed["pictures"] == 12
    assert {"bad", "duplicate", "blurred"} <= {finding["kind"] for finding in printed["findings"]}
    assert [entry["file"] for entry in printed["files"] if entry["error"]] == [(messy / "broken.jpg").as_posix()]


def test_a_sheet_shows_every_crop(messy, tmp_path):
    main([str(messy), "--sheet", str(tmp_path / "sheet.png")])
    sheet = Image.open(tmp_path / "sheet.png")
    assert sheet.width > 8 * 192
    assert sheet.height > 2 * 192


def test_what_a_sheet_shows_takes_little_memory_and_looks_as_the_crop(tmp_path):
    colours = [Image.linear_gradient("L").rotate(turn).resize((512, 512)) for turn in (0, 90, 180)]
    crop = Image.merge("RGB", colours)
    crop.save(tmp_path / "a.png")
    look = measure_picture(Example(tmp_path / "a.png", "x"), [(512, 512)], 8, thumbnail=True)
    shown = Image.open(io.BytesIO(look.thumbnail))
    crop.thumbnail((192, 192))
    assert len(look.thumbnail) < len(crop.tobytes()) / 4
    assert shown.size == crop.size
    assert max(high for _, high in ImageChops.difference(shown, crop).getextrema()) <= 4
    assert measure_picture(Example(tmp_path / "a.png", "x"), [(512, 512)], 8).thumbnail == b""


def test_a_sheet_replaces_no_picture_but_an_earlier_sheet(messy, tmp_path, monkeypatch):
    picture = next(file for file in messy.iterdir() if file.suffix == ".png")
    before = picture.read_bytes()
    (tmp_path / "sheet-2.webp").write_bytes(before)
    assert main([str(messy), "--sheet", str(tmp_path / "sheet.webp")]) in (0, 1)  # one is enough
    monkeypatch.setattr(crop_sheet, "_PAGE", 5)
    for sheet in (picture, tmp_path / "sheet.webp"):
        with pytest.raises(ConfigError, match=r"exists, and is no sheet of crops; name another file"):
            main([str(messy), "--sheet", str(sheet)])
    assert picture.read_bytes() == before
    for suffix in ("jpg", "png"):
        for _ in range(2):
            assert main([str(messy), "--sheet", str(tmp_path / f"sheet.{suffix}")]) in (0, 1)


def test_what_does_not_fit_on_a_sheet_goes_on_the_next(messy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(crop_sheet, "_PAGE", 5)
    main([str(messy), "--sheet", str(tmp_path / "sheet.png")])
    sheets = [tmp_path / name for name in ("sheet.png", "sheet-2.png", "sheet-3.png")]
    assert [line for line in capsys.readouterr().out.splitlines() if "drawn" in line] == [
        f"crops drawn on {sheet}" for sheet in sheets
    ]
    first, _, last = (Image.open(sheet).width for sheet in sheets)
    assert last < first  # two of twelve are left


@pytest.mark.skipif(os.name == "nt", reason="no such names there")
def test_a_sheet_shows_names_with_line_breaks_and_signs_that_the_usual_font_lacks(tmp_path, monkeypatch):
    """U+1D81 is in STIX and not in DejaVu."""
    (tmp_path / "odd").mkdir()
    for number, name in enumerate(["a\nb.png", "a\u2029\u1d81.png"]):
        noise_picture(seed=number).save(tmp_path / "odd" / name)
    sheets = []
    for fonts in ([f"{get_data_path()}/fonts/ttf/STIXGeneral.ttf"], []):
        monkeypatch.setattr(font_manager, "findSystemFonts", lambda fonts=fonts: fonts)
        assert main([str(tmp_path / "odd"), "--caption", "x", "--sheet", str(tmp_path / "sheet.png")]) == 0
        sheets.append((tmp_path / "sheet.png").read_bytes())
    assert sheets[0] != sheets[1]


def test_a_picture_with_broken_exif_data_is_mended_too(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / "dog.png", exif=b"garbage")
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    assert open_image(tmp_path / "mended" / "dog.png").tobytes() == noise_picture().tobytes()
    assert not read_folder(tmp_path / "mended", caption_template="x").notes


def translucent_picture():
    picture = noise_picture(seed=3).convert("RGBA")
    picture.putalpha(noise_picture(seed=4).convert("L"))
    return picture


def test_what_is_half_transparent_is_the_same_in_the_mended_copy(tmp_path):
    (tmp_path / "dogs").mkdir()
    translucent_picture().save(tmp_path / "dogs" / "dog.tiff")
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    before, after = (open_picture(tmp_path / name) for name in ("dogs/dog.tiff", "mended/dog.png"))
    assert before.image.tobytes() == after.image.tobytes()
    assert before.alpha.tobytes() == after.alpha.tobytes()


def test_a_transparent_picture_in_srgb_stays_as_it_is(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    translucent_picture().save(tmp_path / "dogs" / "dog.png", icc_profile=profile)
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    assert (tmp_path / "mended" / "dog.png").read_bytes() == (tmp_path / "dogs" / "dog.png").read_bytes()
    assert "1 copied, 0 written anew" in capsys.readouterr().out


def test_a_mask_stays_with_its_picture_where_folders_become_one(tmp_path):
    for folder, end in (("images", "png"), ("more", "webp")):
        (tmp_path / "dogs" / folder).mkdir(parents=True)
        noise_picture(seed=len(folder)).save(tmp_path / "dogs" / folder / f"a.{end}")
    Image.new("L", (64, 64), 255).save(tmp_path / "dogs/images/a.mask.png")
    rows = [{"file_name": name, "text": "a dog"} for name in ("images/a.png", "more/a.webp")]
    (tmp_path / "dogs/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([str(tmp_path / "dogs"), "--fix", str(tmp_path / "mended")])
    found = {each.path.name: each.mask and each.mask.name for each in read_folder(tmp_path / "mended", mask="files")}
    assert found == {"a.png": "a.mask.png", "a-2.webp": None}


def test_folders_that_differ_in_capitals_alone_are_two_on_every_disk(tmp_path):
    for number, folder in enumerate(("one/dogs", "two/Dogs")):
        (tmp_path / folder).mkdir(parents=True)
        noise_picture(seed=number).save(tmp_path / folder / "a.png")
    (tmp_path / "d.toml").write_text('[[source]]\npath = "one/dogs"\n[[source]]\npath = "two/Dogs"\n')
    main([str(tmp_path / "d.toml"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    assert sorted(path.name for path in (tmp_path / "mended").iterdir()) == ["Dogs-2", "d.toml", "dogs"]


@pytest.mark.parametrize("name", ["dog.png", "dog.bmp"])
def test_a_profile_that_cannot_be_used_is_not_in_the_mended_copy(name, tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / name, format="PNG", icc_profile=b"no profile at all")
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    assert "1 written anew" in capsys.readouterr().out
    main([str(tmp_path / "mended"), "--caption", "x"])
    assert "colours" not in capsys.readouterr().out
    before, after = (open_picture(path) for path in (tmp_path / "dogs" / name, tmp_path / "mended" / "dog.png"))
    assert before.image.tobytes() == after.image.tobytes()


def test_a_picture_that_gets_another_name_keeps_the_words_of_its_own(tmp_path):
    (tmp_path / "dogs").mkdir()
    for number, name in enumerate(("red-dog.bmp", "red-dog.png", "red-dog.tif")):
        noise_picture(seed=number).save(tmp_path / "dogs" / name)
    main([str(tmp_path / "dogs"), "--caption", "{caption}", "--fix", str(tmp_path / "mended")])
    captions = [example.caption for example in read_folder(tmp_path / "mended", caption_template="{caption}")]
    assert captions == ["red dog"] * 3


def test_a_picture_whose_mask_is_broken_is_left_out_wholly(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    for number, name in enumerate(("dog", "cat")):
        noise_picture(seed=number).save(tmp_path / "dogs" / f"{name}.png")
    (tmp_path / "dogs" / "dog.mask.png").write_bytes(b"not a picture")
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    assert [path.name for path in (tmp_path / "mended").iterdir()] == ["cat.png"]
    said = "1 copied, 0 written anew, 1 left out\n  dog.png is left out: dog.mask.png: not an image"
    assert said in capsys.readouterr().out


def test_equal_pictures_with_masks_of_their_own_are_both_in_the_mended_copy(tmp_path):
    """Which --mask does not name here, and are copied all the same; of a broken one the other picture is left."""
    (tmp_path / "dogs").mkdir()
    for name, side in (("a", 0), ("b", 32), ("c", 32), ("broken", 0)):
        noise_picture().save(tmp_path / "dogs" / f"{name}.png")
        mask = Image.new("L", (64, 64))
        mask.paste(255, (side, 0, side + 32, 64))
        mask.save(tmp_path / "dogs" / f"{name}.mask.png")
    (tmp_path / "dogs" / "broken.mask.png").write_bytes(b"not a picture")
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    names = ["a.mask.png", "a.png", "b.mask.png", "b.png"]
    assert sorted(path.name for path in (tmp_path / "mended").iterdir()) == names


def test_a_folder_that_two_sources_name_is_mended_for_both(tmp_path):
    """So that it may be cropped in two ways; and a source of which nothing is left would stop training."""
    for folder, number in (("dogs", 0), ("copies", 0), ("more", 1)):
        (tmp_path / folder).mkdir()
        noise_picture(seed=number).save(tmp_path / folder / f"{folder}.png")
    ways = ('path = "dogs"', 'path = "copies"', 'path = "../' + tmp_path.name + '/dogs"\ncrop = "pad"', 'path = "more"')
    (tmp_path / "d.toml").write_text("".join(f"[[source]]\n{way}\n" for way in ways))
    main([str(tmp_path / "d.toml"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    mended = read_folder(tmp_path / "mended" / "d.toml", caption_template="x")
    found = [(example.path.relative_to(tmp_path / "mended").as_posix(), example.options.crop) for example in mended]
    assert found == [("dogs/dogs.png", None), ("dogs/dogs.png", "pad"), ("more/more.png", None)]
    assert not (tmp_path / "mended" / "copies").exists()


def test_of_equal_pictures_the_mended_copy_keeps_the_captioned_one(tmp_path):
    (tmp_path / "dogs").mkdir()
    for name in ("copy of dog.png", "dog.png", "zoo.png"):
        noise_picture().save(tmp_path / "dogs" / name)
    (tmp_path / "dogs" / "dog.txt").write_text("a dog on grass")
    main([str(tmp_path / "dogs"), "--fix", str(tmp_path / "mended")])
    assert sorted(path.name for path in (tmp_path / "mended").iterdir()) == ["dog.png", "dog.txt"]


def test_pictures_of_one_stem_keep_their_names_unless_their_captions_differ(tmp_path):
    (tmp_path / "dogs").mkdir()
    for seed, name in enumerate(("a.jpg", "a.png", "b.png", "b.webp", "c.png", "c.tif")):
        noise_picture(seed=seed).save(tmp_path / "dogs" / name)
    rows = [{"file_name": name, "text": f"the text of {name}"} for name in ("b.png", "b.webp")]
    (tmp_path / "dogs" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([str(tmp_path / "dogs"), "--fix", str(tmp_path / "mended")])
    texts = {path.name: path.read_text().strip() for path in (tmp_path / "mended").glob("*.txt")}
    names = sorted(path.name for path in (tmp_path / "mended").iterdir() if path.suffix != ".txt")
    assert names == ["a.jpg", "a.png", "b-2.webp", "b.png", "c.png", "c_.png"]  # the TIFF becomes a PNG
    assert texts == {"b.txt": "the text of b.png", "b-2.txt": "the text of b.webp"}


def test_pictures_that_differ_outside_of_their_crops_are_both_kept(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    for name, edge in (("a", "red"), ("b", "blue"), ("c", "red")):
        wide = Image.new("RGB", (800, 200), edge)
        wide.paste(noise_picture(500, 200, seed=1), (150, 0))
        wide.save(tmp_path / "dogs" / f"{name}.png")
    main([str(tmp_path / "dogs"), "--caption", "x", "--resolution", "64", "--fix", str(tmp_path / "mended")])
    assert "c.png is left out: the same image as a.png" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mended").glob("*.png")} == {"a.png", "b.png"}


def test_many_findings_of_a_kind_hide_no_other(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    for number in range(23):
        noise_picture(20, 20, seed=number).save(tmp_path / "dogs" / f"{number:02}.png")
        (tmp_path / "dogs" / f"{number:02}.txt").write_bytes(f"café {number}".encode("cp1252") + b", very" * 90)
    main([str(tmp_path / "dogs")])
    said = capsys.readouterr().out
    assert "23 captions are longer than 75 tokens; their ends are not seen, such as of 00.png: ..." in said
    assert said.count("longer than") == 1
    assert "smaller than is learned" in said
    assert said.count("\n") < 60


def test_the_mended_copy_is_fine_and_the_originals_are_untouched(messy, tmp_path):
    before = {path.name: path.read_bytes() for path in messy.iterdir()}
    target = tmp_path / "mended"
    main([str(messy), "--fix", str(target)])
    assert {path.name: path.read_bytes() for path in messy.iterdir()} == before
    names = {path.name for path in target.iterdir()}
    assert not {"broken.jpg", "twin.png", "turned.jpg"} & names
    assert {"turned.png", "near.jpg", "good-0.png"} <= names
    assert Image.open(target / "turned.png").size == (64, 96)
    assert open_image(target / "turned.png").tobytes() == open_image(messy / "turned.jpg").tobytes()
    assert (target / "tiny.txt").read_text(encoding="utf-8") == "café élégant, déjà vu\n"
    assert not found(check(target, needs_of("pocket")), "bad")


def test_a_mended_data_set_names_its_copies(messy, tmp_path):
    (tmp_path / "dataset.toml").write_text('[[source]]\npath = "messy"\nrepeats = 3\nwords = "x"\n')
    main([str(tmp_path / "dataset.toml"), "--fix", str(tmp_path / "mended")])
    folder = read_folder(tmp_path / "mended" / "dataset.toml")
    assert {example.repeats for example in folder} == {3}
    assert all(example.path.parent == tmp_path / "mended" / "messy" for example in folder)


def test_a_data_set_of_notepad_is_mended(tmp_path):
    """Which writes UTF-16 where it is asked for Unicode."""
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs/a.png")
    (tmp_path / "dataset.toml").write_text('[[source]]\npath = "dogs"\nwords = "ein süßer Hund"\n', "utf-16")
    main([str(tmp_path / "dataset.toml"), "--fix", str(tmp_path / "mended")])
    (example,) = read_folder(tmp_path / "mended" / "dataset.toml")
    assert example.caption == "ein süßer Hund"


def test_a_folder_that_sources_share_is_mended_once(tmp_path, capsys):
    """Unless they read other captions in it."""
    for folder in ("dogs", "broken"):
        (tmp_path / folder).mkdir()
    noise_picture().save(tmp_path / "dogs/a.png")
    (tmp_path / "dogs/a.txt").write_text("a dog")
    (tmp_path / "dogs/a.tags").write_text("dog, sitting")
    (tmp_path / "broken/b.png").write_text("no image")
    sources = [
        'path = "dogs"\ncaption = "{caption}, far"',
        'path = "broken"\nwords = "x"',
        'path = "./dogs"\nflip = true',
        'path = "broken"\nwords = "y"',
        'path = "dogs"\ncaption_suffix = ".tags"',
    ]
    (tmp_path / "d.toml").write_text("".join(f"[[source]]\n{source}\n" for source in sources))
    main([str(tmp_path / "d.toml"), "--fix", str(tmp_path / "mended")])
    assert "2 copied, 0 written anew, 1 left out" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "mended").iterdir()} == {"d.toml", "dogs", "dogs-2"}
    found = [(example.path.parent.name, example.caption) for example in read_folder(tmp_path / "mended/d.toml")]
    assert found == [("dogs", "a dog, far"), ("dogs", "a dog"), ("dogs-2", "dog, sitting")]


def test_of_many_files_that_are_left_out_the_rest_is_counted(tmp_path, capsys):
    (tmp_path / "dogs").mkdir()
    for number in range(23):
        noise_picture().save(tmp_path / "dogs" / f"{number:02}.png")
    main([str(tmp_path / "dogs"), "--caption", "x", "--fix", str(tmp_path / "mended")])
    assert capsys.readouterr().out.endswith(
        "  20.png is left out: the same image as 00.png\n  ... and 2 more (--json has them all)\n"
    )


def test_a_data_set_whose_template_wants_the_trigger_is_mended(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs/a.png")
    (tmp_path / "dogs/a.txt").write_text("a dog")
    (tmp_path / "d.toml").write_text('caption = "{caption}, {trigger}"\n[[source]]\npath = "dogs"\n')
    assert main([str(tmp_path / "d.toml"), "--trigger", "zwx", "--fix", str(tmp_path / "mended")]) == 0
    (example,) = read_folder(tmp_path / "mended/d.toml", trigger="zwx")
    assert example.caption == "a dog, zwx"


@pytest.mark.parametrize(("path", "name"), [("..", "pictures"), (".", "config"), ("../pictures", "pictures")])
def test_a_mended_folder_is_named_as_its_source_is_whatever_way_leads_there(path, name, tmp_path, monkeypatch):
    (tmp_path / "pictures/config").mkdir(parents=True)
    for folder in (tmp_path / "pictures", tmp_path / "pictures/config"):
        noise_picture().save(folder / "a.png")
        (folder / "a.txt").write_text("a dog")
    (tmp_path / "copies").mkdir()
    (tmp_path / "copies/a.png").write_text("precious")
    monkeypatch.chdir(tmp_path / "pictures/config")
    Path("d.toml").write_text(f'[[source]]\npath = "{path if path != "../pictures" else "../../pictures"}"\n')
    main(["d.toml", "--fix", str(tmp_path / "copies/fixed")])
    assert (tmp_path / "copies/a.png").read_text() == "precious"
    (example,) = read_folder(tmp_path / "copies/fixed/d.toml")
    assert (example.path, example.caption) == (tmp_path / "copies/fixed" / name / "a.png", "a dog")


def test_a_mended_copy_has_the_pictures_that_were_named_further_below(tmp_path):
    for folder in ("images", "more"):
        (tmp_path / "dogs" / folder).mkdir(parents=True)
        noise_picture(seed=len(folder)).save(tmp_path / "dogs" / folder / "a.png")
    rows = [{"file_name": f"{folder}/a.png", "text": f"of {folder}"} for folder in ("images", "more")]
    (tmp_path / "dogs/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    main([str(tmp_path / "dogs"), "--fix", str(tmp_path / "mended")])
    found = {example.path.name: example.caption for example in read_folder(tmp_path / "mended")}
    assert found == {"a.png": "of images", "a-2.png": "of more"}


def test_a_mended_copy_has_its_captions_where_the_source_looks_for_them(tmp_path):
    (tmp_path / "dogs").mkdir()
    for name in "ab":
        noise_picture(seed=ord(name)).save(tmp_path / "dogs" / f"{name}.png")
    (tmp_path / "dogs/a.tags.txt").write_text("a dog")
    (tmp_path / "dogs/metadata.jsonl").write_text('{"file_name": "b.png", "text": "a cat"}')
    (tmp_path / "d.toml").write_text('[[source]]\npath = "dogs"\ncaption_suffix = ".tags.txt"\n')
    main([str(tmp_path / "d.toml"), "--fix", str(tmp_path / "mended")])
    folder = read_folder(tmp_path / "mended/d.toml")
    assert [example.caption for example in folder] == ["a dog", "a cat"]
    assert not folder.ignored


def test_a_picture_with_a_text_that_is_too_large_is_mended_too(tmp_path):
    (tmp_path / "dogs").mkdir()
    text = PngInfo()
    text.add_text("workflow", "x" * 2_000_000, zip=True)
    noise_picture().save(tmp_path / "dogs/a.png", pnginfo=text)
    (tmp_path / "dogs/a.txt").write_text("a dog")
    assert main([str(tmp_path / "dogs"), "--fix", str(tmp_path / "mended")]) == 0
    assert (tmp_path / "mended/a.png").read_bytes() == (tmp_path / "dogs/a.png").read_bytes()


@pytest.mark.parametrize(
    ("toml", "what"),
    [
        ('[[source]]\npath = "dogs"\nmask = "files"\n', "no masks in it"),
        ('[[source]]\npath = "dogs"\n[[source]]\npath = "empty"\n', "no images in it"),
        ('[[source]]\npath = "dogs"\nclass = true\n', "no images to learn, but of a class"),
    ],
)
def test_what_training_refuses_stops_it_in_the_report(toml, what, tmp_path):
    for name in ("dogs", "empty"):
        (tmp_path / name).mkdir()
    noise_picture().save(tmp_path / "dogs/a.png")
    (tmp_path / "dogs/a.txt").write_text("a dog")
    (tmp_path / "d.toml").write_text(toml)
    report = check(tmp_path / "d.toml", needs_of("pocket"))
    assert [what in line.text for line in report.lines if line.stops] == [True]
    assert not any("learned whole" in line.text for line in report.lines)


def test_who_has_no_masks_of_the_class_is_told_how_it_is_learned_whole(tmp_path):
    for name in ("dogs", "class"):
        (tmp_path / name).mkdir()
        noise_picture().save(tmp_path / name / "a.png")
        (tmp_path / name / "a.txt").write_text("a dog")
    noise_picture().convert("L").save(tmp_path / "dogs/a.mask.png")
    text = '[[source]]\npath = "dogs"\n[[source]]\npath = "class"\nclass = true\n'
    (tmp_path / "d.toml").write_text(text)
    with pytest.raises(DataError, match=r'class: no masks in it\..*write mask = "none" in its source'):
        read_folder(tmp_path / "d.toml", mask="files")
    (tmp_path / "d.toml").write_text(f'{text}mask = "none"\n')
    assert [example.mask is None for example in read_folder(tmp_path / "d.toml", mask="files")] == [False, True]


@pytest.mark.parametrize(
    ("second", "found"),
    [
        ('caption = "a dog"', []),  # a folder with two prompts, as SimpleTuner has them
        ('caption = "sks dog"', ["in several sources with the same caption: a.png, b.png"]),
        ("class = true\ncaption = 'a dog'", ["the same image: a.png, a.png", "the same image: b.png, b.png"]),
    ],
)
def test_a_file_that_several_sources_name_is_no_duplicate_of_itself(second, found, tmp_path):
    (tmp_path / "dogs").mkdir()
    for seed, name in enumerate("ab"):
        noise_picture(seed=seed).save(tmp_path / f"dogs/{name}.png")
    (tmp_path / "d.toml").write_text(
        f'[[source]]\npath = "dogs"\ncaption = "sks dog"\n[[source]]\npath = "dogs"\n{second}\n'
    )
    report = check(tmp_path / "d.toml", needs_of("pocket"))
    kinds = ("duplicate", "near duplicate", "named twice")
    assert [line.text for line in report.lines if line.kind in kinds] == found
    assert any(line.kind == "many duplicates" for line in report.lines) == ("class" in second)


@pytest.mark.parametrize("place", [".", "inside", "..", "full"])
def test_nothing_is_mended_over_or_into_the_originals(messy, tmp_path, place):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    target = tmp_path / "full" if place == "full" else messy / place
    before = sorted(path.name for path in messy.iterdir())
    with pytest.raises(ConfigError, match="--fix"):
        main([str(messy), "--fix", str(target)])
    assert sorted(path.name for path in messy.iterdir()) == before


def test_a_folder_without_pictures_is_one_line(tmp_path):
    with pytest.raises(DataError, match="no images in it"):
        main([str(tmp_path)])
    (tmp_path / "dogs").mkdir()
    noise_picture().save(tmp_path / "dogs" / "a.png")
    with pytest.raises(DataError, match=r"no images in it, but in its folders dogs\. Name one"):
        main([str(tmp_path)])
    (tmp_path / "img").mkdir()
    (tmp_path / "dogs").rename(tmp_path / "img" / "10_dog")
    with pytest.raises(DataError, match=rf"in folders with repeats within img\. Name .* --images {tmp_path / 'img'}\."):
        main([str(tmp_path)])


@pytest.mark.slow
def test_a_console_without_letters_shows_their_numbers_and_nothing_loads_torch(pictures, tmp_path):
    """Both of one process, since starting one takes longest."""
    (pictures / "crab.txt").write_text("краб на пляже", encoding="utf-8")
    program = (
        "import sys, transformers.models.clip.tokenization_clip; theirs = 'torch' in sys.modules;"  # before 5.18
        "from sfumato.cli import main; main(['check', *sys.argv[1:]]); assert theirs or 'torch' not in sys.modules"
    )
    words = [str(pictures), "--caption", "{caption}", "--trigger", "zwx", "--sheet", str(tmp_path / "sheet.png")]
    done = subprocess.run(
        [sys.executable, "-c", program, *words],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "LC_ALL": "C"},
    )
    assert (done.returncode, "\\u043a\\u0440\\u0430\\u0431" in done.stdout) == (0, True), done.stderr
    assert (tmp_path / "sheet.png").is_file()


def test_no_mended_picture_is_written_over_another_whose_name_differs_in_capitals(tmp_path):
    (tmp_path / "dogs").mkdir()
    noise_picture(seed=1).save(tmp_path / "dogs/IMG_1.PNG")
    noise_picture(seed=2).save(tmp_path / "dogs/img_1.bmp")
    for name in ("IMG_1", "img_1"):
        (tmp_path / "dogs" / f"{name}.txt").write_text("a dog")
    main([str(tmp_path / "dogs"), "--fix", str(tmp_path / "mended")])
    names = [path.name.casefold() for path in (tmp_path / "mended").iterdir()]
    assert len([name for name in names if name.endswith(".png")]) == 2
    assert len(set(names)) == len(names)


def test_a_files_name_does_not_command_the_terminal(tmp_path):
    for name in ("\x1b]0;x\x07\x1b[2Jb.png", "a.png"):
        noise_picture(64, 64).save(tmp_path / "new.png")
        (tmp_path / "new.png").rename(tmp_path / name)
    (tmp_path / "\x1b[31mnote\nb.xyz").touch()
    text = render(check(tmp_path, needs_of("pocket"), caption_template="x"))
    assert r"\x1b[31mnote\nb.xyz: not an image by its name" in text
    assert r"\x1b]0;x\x07\x1b[2Jb.png" in text
    assert "\x1b" not in text
