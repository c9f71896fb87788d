"""Forty kinds of files as people have them: whole, odd, damaged, hostile; and how bytes are mutated."""

import io
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from made_up import noise_picture
from PIL import Image, ImageCms
from PIL.PngImagePlugin import PngInfo

GREY = np.linspace(0, 65535, 48 * 64).astype(np.uint16).reshape(48, 64)
CHECKED = ("png",)
"""Formats whose files carry checksums over the pixels."""


@dataclass(frozen=True)
class Kind:
    """data: the file. suffix: of its name. pixels: what is to be seen, (h, w, 3), or None if it is to be refused.
    error: largest difference to them (formats that lose)."""

    data: bytes
    suffix: str
    pixels: np.ndarray | None
    error: int = 0


def saved(image: Image.Image, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def seen(image: Image.Image) -> np.ndarray:
    """What a picture shows: transparent parts on white."""
    rgba = image.convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))


def oriented(image: Image.Image, orientation: int, kind: str = "PNG") -> bytes:
    """A file whose pixels lie so that the orientation puts them upright."""
    undo = {3: Image.Transpose.ROTATE_180, 5: Image.Transpose.TRANSPOSE, 6: Image.Transpose.ROTATE_90}
    exif = Image.Exif()
    exif[0x0112] = orientation
    return saved(image.transpose(undo[orientation]), kind, exif=exif)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width: int, height: int, depth: int, colour: int, raw: bytes, *extra: bytes) -> bytes:
    """A PNG made by hand, so that depths that Pillow does not write are there."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(extra) + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")


def rows(values: np.ndarray) -> bytes:
    """PNG's raw data: each row after a filter byte of 0."""
    return b"".join(b"\0" + row.tobytes() for row in values)


def kinds() -> dict[str, Kind]:  # one line each, so that they can be counted
    plain = noise_picture(64, 48)
    grey, alpha = plain.convert("L"), plain.convert("RGBA")
    alpha.putalpha(Image.fromarray(np.tile(np.linspace(0, 255, 64).astype(np.uint8), (48, 1))))
    palette = plain.quantize(32)
    clear = plain.quantize(31)
    frames = [plain, Image.new("RGB", (64, 48), "blue")]
    deep = np.repeat(GREY[:, :, None], 3, axis=2)
    wide = np.concatenate([deep, GREY[::-1, :, None]], axis=2)
    text = PngInfo()
    text.add_text("Comment", "x" * 2_000_000, zip=True)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    exact, flat = np.asarray(plain), Image.new("RGB", (64, 48), (200, 40, 40))
    whole_png, whole_jpeg = saved(plain, "PNG"), saved(plain, "JPEG", quality=95)
    tall = saved(Image.new("L", (8, 40)), "PNG")
    found = {
        "png": Kind(whole_png, "png", exact),
        "png grey": Kind(saved(grey, "PNG"), "png", seen(grey)),
        "png one bit": Kind(saved(plain.convert("1"), "PNG"), "png", seen(plain.convert("1"))),
        "png palette": Kind(saved(palette, "PNG"), "png", seen(palette)),
        "png palette with a clear colour": Kind(
            saved(clear, "PNG", transparency=0),
            "png",
            seen(Image.open(io.BytesIO(saved(clear, "PNG", transparency=0)))),
        ),
        "png alpha": Kind(saved(alpha, "PNG"), "png", seen(alpha)),
        "png grey and alpha": Kind(saved(alpha.convert("LA"), "PNG"), "png", seen(alpha.convert("LA"))),
        "png grey of 16 bits": Kind(saved(Image.fromarray(GREY), "PNG"), "png", seen16(GREY), 1),
        "png grey of 16 bits with a clear one": Kind(
            png(64, 48, 16, 0, rows(GREY.astype(">u2")), chunk(b"tRNS", struct.pack(">H", GREY[24, 32]))),
            "png",
            np.where((GREY[24, 32] == GREY)[..., None], np.uint8(255), seen16(GREY)),
            1,
        ),
        "png RGB of 16 bits with a clear one": Kind(
            png(64, 48, 16, 2, rows(deep.astype(">u2")), chunk(b"tRNS", struct.pack(">3H", 0, 0, 0))), "png", None
        ),
        "png RGB of 16 bits": Kind(png(64, 48, 16, 2, rows(deep.astype(">u2"))), "png", seen16(GREY), 1),
        "png RGBA of 16 bits": Kind(
            png(64, 48, 16, 6, rows(wide.astype(">u2"))), "png", seen(Image.fromarray((wide >> 8).astype(np.uint8))), 2
        ),
        "png two bits": Kind(
            png(64, 48, 2, 0, rows(np.full((48, 16), 0b00011011, np.uint8))),
            "png",
            np.repeat(np.tile(np.array([0, 85, 170, 255], np.uint8), (48, 16))[..., None], 3, axis=2),
        ),
        "png two bits with a clear one": Kind(
            png(64, 48, 2, 0, rows(np.full((48, 16), 0b00011011, np.uint8)), chunk(b"tRNS", struct.pack(">H", 2))),
            "png",
            np.repeat(np.tile(np.array([0, 85, 255, 255], np.uint8), (48, 16))[..., None], 3, axis=2),
        ),
        "png with sRGB's profile": Kind(saved(plain, "PNG", icc_profile=srgb), "png", exact),
        "png with a broken profile": Kind(saved(plain, "PNG", icc_profile=b"no profile at all"), "png", exact),
        "png with a huge text": Kind(saved(plain, "PNG", pnginfo=text), "png", exact),
        "png turned": Kind(oriented(plain, 6), "png", exact),
        "png with broken EXIF": Kind(saved(plain, "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01"), "png", exact),
        "png animation": Kind(saved(plain, "PNG", save_all=True, append_images=frames[1:]), "png", exact),
        "png named jpg": Kind(whole_png, "jpg", exact),
        "jpeg": Kind(whole_jpeg, "jpg", seen(Image.open(io.BytesIO(whole_jpeg)))),
        "jpeg progressive": Kind(saved(flat, "JPEG", progressive=True, quality=95), "jpg", seen(flat), 3),
        "jpeg grey": Kind(saved(grey, "JPEG", quality=100), "jpg", seen(grey), 4),
        "jpeg CMYK": Kind(saved(flat.convert("CMYK"), "JPEG", quality=100), "jpg", seen(flat), 4),
        "jpeg turned": Kind(oriented(flat, 3, "JPEG"), "jpg", seen(flat), 3),
        "jpeg transposed": Kind(oriented(flat, 5, "JPEG"), "jpeg", seen(flat), 3),
        "mpo": Kind(saved(flat, "MPO", save_all=True, append_images=frames[1:]), "jpg", seen(flat), 3),
        "webp lossless": Kind(saved(plain, "WEBP", lossless=True), "webp", exact),
        "webp alpha": Kind(saved(alpha, "WEBP", lossless=True, exact=True), "webp", seen(alpha), 1),
        "webp animation": Kind(
            saved(plain, "WEBP", lossless=True, save_all=True, append_images=frames[1:]), "webp", exact
        ),
        "avif": Kind(saved(flat, "AVIF", quality=95), "avif", seen(flat), 6),
        "bmp": Kind(saved(plain, "BMP"), "bmp", exact),
        "tiff": Kind(saved(plain, "TIFF"), "tif", exact),
        "tiff compressed": Kind(saved(plain, "TIFF", compression="tiff_lzw"), "tiff", exact),
        "tiff grey of 16 bits": Kind(saved(Image.fromarray(GREY), "TIFF"), "tiff", seen16(GREY), 1),
        "tiff grey of 16 bits whose 0 is white": Kind(
            saved(Image.fromarray(GREY), "TIFF").replace(
                struct.pack("<HHIHH", 262, 3, 1, 1, 0), struct.pack("<HHIHH", 262, 3, 1, 0, 0)
            ),
            "tiff",
            None,
        ),
        "tiff LAB": Kind(saved(lab(flat), "TIFF"), "tiff", seen(flat), 3),
        "tiff of floats": Kind(saved(Image.new("F", (8, 8), 0.5), "TIFF"), "tiff", None),
        "gif": Kind(saved(palette, "GIF"), "gif", seen(palette)),
        "gif animation": Kind(saved(palette, "GIF", save_all=True, append_images=frames[1:]), "gif", seen(palette)),
        "png too long": Kind(tall, "png", None),
        "bomb": Kind(png(40_000, 40_000, 8, 2, b"\0"), "png", None),
        "empty": Kind(b"", "png", None),
        "a web page": Kind(b"<!DOCTYPE html><html><body>404</body></html>", "jpg", None),
        "postscript": Kind(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n", "png", None),
        "film": Kind(b"\0\0\0\x18ftypmp42" + bytes(64), "png", None),
        "photoshop": Kind(b"8BPS\0\1" + bytes(6) + b"\0\3\0\0\0\x30\0\0\0\x40\0\x08\0\3" + bytes(64), "png", None),
    }
    return found


def seen16(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.round(values / 257).astype(np.uint8)[..., None], 3, axis=2)


def lab(image: Image.Image) -> Image.Image:
    profiles = [ImageCms.createProfile(name) for name in ("sRGB", "LAB")]
    return ImageCms.profileToProfile(image, *profiles, outputMode="LAB")


def mutations(data: bytes, random: np.random.Generator) -> list[tuple[str, bytes]]:
    """Twenty-five: ten cuts, five with bytes changed, and blocks of zeros, doubled, lost, turned round, appended."""
    size = len(data)
    found = [
        (f"cut at {percent} %", data[: size * percent // 100]) for percent in (0, 3, 10, 25, 40, 55, 70, 85, 94, 99)
    ]
    for number in range(5):
        changed = bytearray(data)
        for place in random.integers(0, max(size, 1), 1 + 2 * number):
            if size:
                changed[place] ^= int(random.integers(1, 256))
        found.append((f"{1 + 2 * number} bytes changed", bytes(changed)))
    edits: dict[str, Callable[[bytes], bytes]] = {
        "zeros": lambda block: bytes(len(block)),
        "doubled": lambda block: block + block,
        "lost": lambda block: b"",
        "turned round": lambda block: block[::-1],
        "inserted": lambda block: bytes(random.integers(0, 256, 64, dtype=np.uint8)) + block,
    }
    for name, edit in edits.items():
        for share in (0.3, 0.7):
            start = int(size * share)
            end = start + max(1, size // 12)
            found.append((f"{name} at {share:.0%}", data[:start] + edit(data[start:end]) + data[end:]))
    return found
