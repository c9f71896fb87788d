"""What training sees of odd and damaged files."""

import io
import struct
import sys
import tracemalloc
import zlib

import numpy as np
import pytest
from made_up import noise_picture
from odd_files import chunk, png, rows
from PIL import Image, ImageCms, ImageFile
from PIL.PngImagePlugin import PngInfo

import sfumato.data
from sfumato.data.images import _eight_bits, convert_image, open_image, open_mask, open_picture, read_size, upright_size
from sfumato.errors import DataError


def _grey_profile() -> bytes:
    """An ICC profile of greys with a linear tone curve, made by hand (ICC.1:2001-04)."""
    white = b"XYZ \0\0\0\0" + struct.pack(">iii", 63190, 65536, 54061)  # D50, in 1/65536
    curve = b"curv\0\0\0\0" + struct.pack(">I", 0)
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"grey\0" + bytes(78)
    parts, tags, place = b"", b"", 128 + 4 + 3 * 12
    for name, body in ((b"desc", text), (b"wtpt", white), (b"kTRC", curve)):
        body += bytes(-len(body) % 4)
        tags += name + struct.pack(">II", place + len(parts), len(body))
        parts += body
    size = place + len(parts)
    header = struct.pack(">I", size) + bytes(4) + b"\x02\x10\0\0mntrGRAYXYZ " + bytes(12) + b"acsp" + bytes(28)
    header += struct.pack(">iii", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + struct.pack(">I", 3) + tags + parts


LINEAR_GREY = _grey_profile()


def largest_difference(image, other):
    return int(np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max())


def test_importing_leaves_truncated_files_refused():
    assert sfumato.data
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("suffix", ["png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_gives_the_same_pixels(tmp_path, orientation, suffix):
    upright = noise_picture(64, 48)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright if orientation == 1 else upright.transpose(undo[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{suffix}", exif=exif, **({"lossless": True} if suffix == "webp" else {}))
    assert largest_difference(open_image(tmp_path / f"a.{suffix}"), upright) == 0
    assert upright_size(tmp_path / f"a.{suffix}") == (64, 48)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_costs_no_pixel(tmp_path):
    noise_picture().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01")
    assert largest_difference(open_image(tmp_path / "a.png"), noise_picture()) == 0


def test_sixteen_bit_grey_is_scaled_by_257(tmp_path):
    ramp = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    seen = np.asarray(open_image(tmp_path / "ramp.png"))[..., 0]
    assert np.abs(seen - ramp / 257).max() <= 0.5


def test_sixteen_bit_grey_takes_little_memory(tmp_path):
    """Of 50 megapixels a number of 64 bits for each would take 400 MB, three times."""
    grey = Image.fromarray(np.arange(2**16, dtype=np.uint16).reshape(256, 256)).resize((1024, 1024))
    tracemalloc.start()
    _eight_bits(grey, tmp_path / "a.png")
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert most <= 10 * 1024 * 1024


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_what_is_transparent_is_white_whatever_hides_beneath(tmp_path, mode):
    image = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    image.paste((0, 0, 0, 255), (0, 0, 4, 8))
    image.convert(mode).save(tmp_path / "a.png")
    picture = open_picture(tmp_path / "a.png")
    assert picture.image.getpixel((0, 0)) == (0, 0, 0)
    assert picture.image.getpixel((7, 7)) == (255, 255, 255)
    assert picture.alpha.getpixel((0, 0)) == 255
    assert picture.alpha.getpixel((7, 7)) == 0


def test_a_mask_counts_where_it_is_white_and_not_transparent(tmp_path):
    """As background removers write it; on white, as a picture is, all of it would count."""
    image = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    image.paste((255, 255, 255, 255), (0, 0, 4, 8))
    image.paste((0, 0, 0, 255), (0, 0, 4, 2))
    image.save(tmp_path / "a.png")
    image.convert("RGB").save(tmp_path / "b.png")
    for name in "ab":
        mask = open_mask(tmp_path / f"{name}.png")
        assert [mask.getpixel(place) for place in ((0, 0), (0, 7), (7, 7))] == [0, 255, 0]


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_the_clear_grey_of_few_bits_is_the_one_that_its_file_names(tmp_path, depth):
    """As programs that make PNG files small write them: each grey in turn, of which the lightest but one is clear."""
    greys = np.arange(2**depth, dtype=np.uint8).repeat(8)
    bits = (greys[:, None] >> np.arange(depth)[::-1]) & 1
    clear = 2**depth - 2
    row = np.packbits(bits.astype(np.uint8).ravel())
    data = png(len(greys), 64, depth, 0, rows(np.tile(row, (64, 1))), chunk(b"tRNS", struct.pack(">H", clear)))
    (tmp_path / "a.png").write_bytes(data)
    picture = open_picture(tmp_path / "a.png", any_ratio=True)
    assert np.array_equal(np.asarray(picture.alpha)[0], np.where(greys == clear, 0, 255))
    shown = np.where(greys == clear, 255, greys * (255 // (2**depth - 1)))
    assert np.array_equal(np.asarray(picture.image)[0, :, 0], shown)


def test_an_opaque_picture_has_no_alpha(tmp_path):
    noise_picture().convert("RGBA").save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").alpha is None


def test_a_colour_profile_is_applied(tmp_path):
    """In a space whose red is what sRGB calls blue, pure red is blue."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = data.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "zRGB".encode("utf-16-be"))
    Image.new("RGB", (16, 16), (255, 0, 0)).save(tmp_path / "a.png", icc_profile=swapped)
    found = open_image(tmp_path / "a.png")
    assert largest_difference(found, Image.new("RGB", (16, 16), (0, 0, 255))) <= 3
    assert largest_difference(convert_image(found), found) == 0  # and not once more


def test_a_linear_profile_is_not_srgb_whatever_its_name(tmp_path):
    """Its 55 of 255 is as bright as sRGB's 128. The curve is gamma 1, of no entry; the name is of the same length."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    place = data.index(b"para")  # the one curve of all three colours
    linear = data[:place] + struct.pack(">4sIHHI", b"para", 0, 0, 0, 65536) + data[place + 16 :]
    for name, bright in (("sRGB built-in", 55), ("linear sRGB in", 128)):
        said = linear.replace("sRGB built-in".encode("utf-16-be"), name[:13].encode("utf-16-be"))
        Image.new("RGB", (16, 16), (55, 55, 55)).save(tmp_path / "a.png", icc_profile=said)
        assert largest_difference(open_image(tmp_path / "a.png"), Image.new("RGB", (16, 16), (bright,) * 3)) <= 3


def test_a_colour_profile_is_applied_below_transparency_too(tmp_path):
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    swapped = data.replace(b"rXYZ", b"....").replace(b"bXYZ", b"rXYZ").replace(b"....", b"bXYZ")
    swapped = swapped.replace("sRGB".encode("utf-16-be"), "zRGB".encode("utf-16-be"))
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((255, 0, 0, 0), (0, 0, 8, 16))
    for name, options in (("a.png", {}), ("b.png", {"palette": True})):
        stored = image.quantize(4) if options else image
        stored.save(tmp_path / name, icc_profile=swapped)
        picture = open_picture(tmp_path / name)
        assert largest_difference(picture.image.crop((8, 0, 16, 16)), Image.new("RGB", (8, 16), (0, 0, 255))) <= 3
        assert picture.image.getpixel((0, 0)) == (255, 255, 255)
        assert picture.alpha.getpixel((0, 0)) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "1"])
def test_a_profile_of_greys_is_applied(tmp_path, mode):
    """A profile whose tone curve is a straight line: its middle grey is far lighter in sRGB."""
    Image.new("L", (8, 8), 128 if mode != "1" else 255).convert(mode).save(tmp_path / "a.png", icc_profile=LINEAR_GREY)
    picture = open_picture(tmp_path / "a.png")
    assert abs(picture.image.getpixel((4, 4))[0] - (188 if mode != "1" else 255)) <= 2
    assert not picture.notes


def test_the_profile_of_srgb_moves_no_pixel(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    noise_picture().save(tmp_path / "srgb.png", icc_profile=srgb.tobytes())
    assert largest_difference(open_image(tmp_path / "srgb.png"), noise_picture()) == 0


def test_cmyk_without_a_profile_is_converted_with_a_word(tmp_path):
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "a.jpg", quality=100)
    picture = open_picture(tmp_path / "a.jpg")
    assert largest_difference(picture.image, Image.new("RGB", (16, 16), (255, 0, 0))) <= 3
    assert "CMYK" in picture.notes[0]


@pytest.mark.parametrize("suffix", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame_and_a_word(tmp_path, suffix):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    options = {"lossless": True} if suffix == "webp" else {}
    frames[0].save(tmp_path / f"a.{suffix}", save_all=True, append_images=frames[1:], **options)
    picture = open_picture(tmp_path / f"a.{suffix}")
    assert picture.image.getpixel((8, 8)) == (255, 0, 0)
    assert "animation" in picture.notes[0]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"<!DOCTYPE html><html><body>404</body></html>", "a web page"),
        (b"\xef\xbb\xbf\n<html>", "a web page"),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', "a drawing in SVG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d", "a Git-LFS pointer"),
        (b'{"error": "not found"}', "text in JSON"),
        (b"\0\0\0\x18ftypmp42" + bytes(64), "a film"),
        (b"\0\0\0\x18ftypavif" + bytes(64), "not an image that is opened here"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n", "PostScript"),
        (b"\xff\x0a" + bytes(20), "JPEG XL"),
        (b"PK\x03\x04" + bytes(20), "a zip archive"),
        (b"what is this?", "not an image that is opened here"),
    ],
)
def test_what_is_no_picture_is_called_what_it_is(tmp_path, data, words):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(DataError, match=rf"^a\.png: .*{words}"):
        open_picture(tmp_path / "a.png")


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "bmp", "tiff", "gif"])
def test_each_allowed_format_opens(tmp_path, suffix):
    Image.new("RGB", (16, 16), (200, 40, 40)).save(tmp_path / f"a.{suffix}", quality=95)
    assert largest_difference(open_image(tmp_path / f"a.{suffix}"), Image.new("RGB", (16, 16), (200, 40, 40))) <= 6


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "avif", "bmp", "tiff", "gif"])
def test_a_file_cut_short_is_refused_by_name(tmp_path, suffix):
    noise_picture(96, 96).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    path = tmp_path / f"cut.{suffix}"
    for percent in range(0, 90, 10):
        path.write_bytes(data[: len(data) * percent // 100])
        with pytest.raises(DataError, match=rf"cut\.{suffix}: .*"):
            open_picture(path)


@pytest.mark.filterwarnings("ignore")
def test_mutated_files_open_or_are_refused_and_never_crash(tmp_path):
    random = np.random.default_rng(0)
    for suffix in ("png", "jpg", "webp", "bmp", "tiff", "gif"):
        noise_picture(32, 32).save(tmp_path / f"whole.{suffix}")
        data = np.frombuffer((tmp_path / f"whole.{suffix}").read_bytes(), dtype=np.uint8)
        for _ in range(25):
            mutated = data.copy()
            mutated[random.integers(0, len(data), 6)] = random.integers(0, 256, 6)
            (tmp_path / f"a.{suffix}").write_bytes(mutated.tobytes())
            line = ""
            try:
                assert open_picture(tmp_path / f"a.{suffix}").image.size[0] > 0
            except DataError as error:
                line = str(error)
            assert not line or (line.startswith(f"a.{suffix}: ") and "\n" not in line)


def png_header(width, height):
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))


@pytest.mark.parametrize(
    ("size", "word"), [((8000, 7000), "56 megapix"), ((40000, 40000), "megapix"), ((100, 401), "4 x")]
)
def test_bombs_and_absurd_shapes_are_refused_from_the_header(tmp_path, size, word):
    (tmp_path / "a.png").write_bytes(png_header(*size) + struct.pack(">I", 0) + b"IDAT" + bytes(8))
    with pytest.raises(DataError, match=word):
        read_size(tmp_path / "a.png")


def test_a_text_too_large_to_read_costs_no_pixel(tmp_path):
    info = PngInfo()
    info.add_text("Comment", "x" * 2_000_000, zip=True)
    noise_picture().save(tmp_path / "a.png", pnginfo=info)
    assert largest_difference(open_image(tmp_path / "a.png"), noise_picture()) == 0


def test_heic_without_its_extra_says_which_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    (tmp_path / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(64))
    with pytest.raises(DataError, match=r"sfumato\[heic\]"):
        open_picture(tmp_path / "a.heic")


def test_heic_with_its_extra_opens(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    buffer = io.BytesIO()
    heif.from_pillow(Image.new("RGB", (64, 64), (200, 40, 40))).save(buffer, quality=95)
    (tmp_path / "a.heic").write_bytes(buffer.getvalue())
    assert largest_difference(open_image(tmp_path / "a.heic"), Image.new("RGB", (64, 64), (200, 40, 40))) <= 6
