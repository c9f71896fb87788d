"""A CMYK picture with a profile has the colours that the profile says, not those of a formula.

The profile is made here: a table of two points an ink, so that each corner of the ink cube has a Lab colour of its own.
"""

import io
import struct
from pathlib import Path

import pytest
from PIL import Image, ImageCms

from sfumato.data import open_image

CORNERS = {
    # cyan, magenta, yellow, black: L in 0..100, a, b
    (0, 0, 0, 0): (100, 0, 0),
    (0, 0, 0, 1): (0, 0, 0),
    (1, 0, 0, 0): (50, 40, 20),  # a cyan ink that prints red, which no formula would guess
    (0, 1, 0, 0): (60, -40, 30),
}

SRGB = {
    (0, 0, 0, 0): (255, 255, 255),
    (0, 0, 0, 1): (0, 0, 0),
    (1, 0, 0, 0): (185, 88, 87),
    (0, 1, 0, 0): (74, 162, 88),
}
"""The sRGB of these Lab colours, by CIE's formulas with D50 adapted to D65."""
BLACK_POINT = 20
"""How far the perceptual intent may move a colour from that, to keep shadows apart."""


def profile() -> bytes:
    """An ICC 2.4 output profile, CMYK to Lab through one lut8 table (ICC.1:2001-04, 6.5.8)."""
    table = b""
    for corner in range(16):
        inks = tuple(corner >> place & 1 for place in (3, 2, 1, 0))
        lightness, a, b = CORNERS.get(inks, (20, 0, 0))
        table += bytes((round(lightness * 2.55), a + 128, b + 128))
    identity = struct.pack(">9i", *(65536 if place % 4 == 0 else 0 for place in range(9)))
    ramp = bytes(range(256))
    lut = b"mft1\0\0\0\0" + bytes((4, 3, 2, 0)) + identity + ramp * 4 + table + ramp * 3
    text = b"CMYK of a test\0"
    described = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(12 + 67 + 4)
    white = b"XYZ \0\0\0\0" + struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    tags, body, start = [], b"", 128 + 4 + 3 * 12
    for name, content in ((b"desc", described), (b"wtpt", white), (b"A2B0", lut)):
        content += bytes(-len(content) % 4)
        tags.append(name + struct.pack(">2I", start + len(body), len(content)))
        body += content
    table_of_tags = struct.pack(">I", len(tags)) + b"".join(tags)
    illuminant = struct.pack(">3i", *(round(v * 65536) for v in (0.9642, 1.0, 0.8249)))
    head = struct.pack(">I4sI4s4s4s", start + len(body), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += struct.pack(">6H", 2020, 1, 1, 0, 0, 0) + b"acsp" + bytes(4) + bytes(4) + bytes(4) + bytes(4) + bytes(8)
    head += bytes(4) + illuminant
    return head + bytes(128 - len(head)) + table_of_tags + body


def picture(inks: tuple[int, ...], path: Path, icc: bytes | None) -> Path:
    options = {"icc_profile": icc} if icc else {}
    Image.new("CMYK", (64, 64), tuple(255 * ink for ink in inks)).save(path, **options)
    return path


def test_the_profile_is_one():
    opened = ImageCms.getOpenProfile(io.BytesIO(profile()))
    assert opened.profile.xcolor_space.strip() == "CMYK"


@pytest.mark.parametrize("inks", list(CORNERS))
def test_each_ink_has_the_colour_of_the_profile(inks, tmp_path):
    found = open_image(picture(inks, tmp_path / "a.tif", profile())).getpixel((32, 32))
    assert max(abs(a - b) for a, b in zip(found, SRGB[inks], strict=True)) <= (BLACK_POINT if sum(inks[:3]) else 0)


def test_without_the_profile_cyan_is_cyan(tmp_path):
    """What the formula says, so that the test above can fail."""
    red, green, blue = open_image(picture((1, 0, 0, 0), tmp_path / "a.tif", None)).getpixel((32, 32))
    assert red < 60
    assert min(green, blue) > 150
