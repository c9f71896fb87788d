"""`sfumato check --fix`: the mended copy of a folder, and of a data set."""

import json
from pathlib import Path

import pytest
from made_up import noise_picture
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo
from sfumato.pipelines.check import main

from sfumato.data import open_image, open_picture, read_folder
from sfumato.data.checks.report import check
from sfumato.errors import ConfigError
from sfumato.models.family import read_requirements
from tests.data.findings import found


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
    assert not found(check(target, read_requirements("pocket")), "bad")


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


@pytest.mark.parametrize("place", [".", "inside", "..", "full"])
def test_nothing_is_mended_over_or_into_the_originals(messy, tmp_path, place):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("x")
    target = tmp_path / "full" if place == "full" else messy / place
    before = sorted(path.name for path in messy.iterdir())
    with pytest.raises(ConfigError, match="--fix"):
        main([str(messy), "--fix", str(target)])
    assert sorted(path.name for path in messy.iterdir()) == before


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
