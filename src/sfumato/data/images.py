"""A picture file as the network should see it: upright, 8-bit sRGB, on white.

Only the decoders named here are ever run, a picture's size is judged by its header, and a file that is cut short is
refused: Pillow's LOAD_TRUNCATED_IMAGES would fill what is missing with grey.
"""

import io
import math
import threading
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageChops, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from sfumato.errors import DataError

FORMATS = ("PNG", "JPEG", "WEBP", "AVIF", "BMP", "TIFF", "GIF")
"""Pillow's names of the decoders that may run; HEIF joins them when its extra is installed."""

SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".avif", ".bmp", ".dib", ".tif", ".tiff", ".gif"}
    | {".heic", ".heif", ".hif"}
)
"""Endings, in lower case, of the files that are taken for pictures."""

LARGEST_MEGAPIXELS = 50.0
LARGEST_RATIO = 4.0

_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_OTHERS: Mapping[bytes, str] = MappingProxyType(
    {
        b"version https://git-lfs": "a Git-LFS pointer; the image was not downloaded. Run `git lfs pull`.",
        b"<?xml": "a drawing in SVG or another XML file. Export it as PNG.",
        b"<svg": "a drawing in SVG. Export it as PNG.",
        b"<": "a web page saved under an image's name. Download the image itself.",
        b"{": "text in JSON, perhaps a server's error message. Download the image itself.",
        b"%PDF": "a PDF. Export its images as PNG.",
        b"%!PS": "PostScript, which is a program. Export it as PNG.",
        b"8BPS": "a Photoshop file. Export it as PNG.",
        b"\xff\x0a": "JPEG XL, which is not read here. Convert it to PNG.",
        b"\0\0\0\x0cJXL ": "JPEG XL, which is not read here. Convert it to PNG.",
        b"\0\0\0\x0cjP  ": "JPEG 2000, which is not read here. Convert it to PNG.",
        b"v/1\x01": "OpenEXR, whose white is unknown. Save it with 8 or 16 bits.",
        b"PK\x03\x04": "a zip archive, or a document. Unpack it.",
        b"Rar!": "a RAR archive. Unpack it.",
        b"\x1aE\xdf\xa3": "a film. Export frames of it as PNG.",
    }
)
"""What else is found under a picture's name, by how it begins, and what to do."""
_FILM = "a film. Export frames of it as PNG."
# Pillow warns of large pictures; we refuse them. Filters of warnings belong to the process, so one thread at a time.
_WARNINGS = threading.Lock()


@dataclass(frozen=True)
class Picture:
    """image: RGB. alpha: L, 255 where opaque, None if nothing is transparent. notes: for the person."""

    image: Image.Image
    alpha: Image.Image | None = None
    notes: tuple[str, ...] = ()


def open_image(path: Path, *, any_ratio: bool = False) -> Image.Image:
    """The picture in RGB; see `open_picture`."""
    return open_picture(path, any_ratio=any_ratio).image


def open_picture(path: Path, *, any_ratio: bool = False) -> Picture:
    """Decode a picture wholly: first frame, EXIF orientation, colour profile, transparency on white, 8 bits.

    any_ratio: of its sides, as where nothing is cropped. Raises DataError, which names the file, for one that is no
    picture, is cut short or broken, has more than 50 megapixels, or is more than four times as long as wide.
    """
    with _decoding(path):
        image, alpha, notes = _layers(path, any_ratio)
        return Picture(_on_white(image, alpha), alpha, notes)


def convert_image(image: Image.Image) -> Image.Image:
    """A picture that is open already as `open_image` has it. Raises DataError for pixels whose white is unknown."""
    return _on_white(*_colours_and_alpha(image, Path("an image"), []))


def _on_white(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is None:
        return image
    image.putalpha(alpha)
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def open_mask(path: Path, *, any_ratio: bool = False) -> Image.Image:
    """A mask, L, white where it counts; what is transparent counts as little as black. Raises as `open_picture`."""
    with _decoding(path):
        image, alpha, _ = _layers(path, any_ratio)
        return _masking(image, alpha)


def convert_mask(image: Image.Image) -> Image.Image:
    """The same of a picture that is open already. Raises DataError for pixels whose white is unknown."""
    return _masking(*_colours_and_alpha(image, Path("a mask"), []))


def _masking(image: Image.Image, alpha: Image.Image | None) -> Image.Image:
    grey = image.convert("L")
    return grey if alpha is None else ImageChops.multiply(grey, alpha)


def open_transparent(path: Path) -> Image.Image:
    """The picture in RGB as `open_picture` has it, or in RGBA, not yet on white, where some of it is transparent."""
    with _decoding(path):
        image, alpha, _ = _layers(path)
        if alpha is not None:
            image.putalpha(alpha)
        return image


def _layers(path: Path, any_ratio: bool = False) -> tuple[Image.Image, Image.Image | None, tuple[str, ...]]:
    """(the colours in RGB, alpha as in `Picture`, notes)."""
    with _open(path) as file:
        check_size(path, file.size, any_ratio=any_ratio)
        clear = _check_png(path) if file.format == "PNG" else None
        notes = [f"{path.name}: an animation; its first frame is taken"] if _animated(file) else []
        image = _loaded(file, path)
        if clear is not None:
            image.info["transparency"] = clear
        return *_colours_and_alpha(image, path, notes), tuple(notes)


@contextmanager
def open_as_stored(path: Path) -> Iterator[Image.Image]:
    """The picture in its file's own format, mode, colours and orientation. Raises DataError as `open_picture`."""
    with _decoding(path), _open(path) as file:
        check_size(path, file.size)
        yield _loaded(file, path)


def read_size(path: Path) -> tuple[int, int]:
    """(width, height) in the file, from the header alone. Raises DataError as `open_picture` does."""
    with _decoding(path), _open(path) as file:
        check_size(path, file.size)
        return file.size


def upright_size(path: Path) -> tuple[int, int]:
    """(width, height) once turned as its EXIF data says, from the header alone. Raises DataError as `open_picture`."""
    with _decoding(path), _open(path) as file:
        check_size(path, file.size)
        if file.format == "TIFF":  # Pillow turns these itself
            return file.size
        try:
            turned = file.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except Exception:  # a broken EXIF block says nothing about the pixels
            turned = False
        return (file.size[1], file.size[0]) if turned else file.size


def pixels_of(path: Path) -> int:
    """How many pixels a picture has by its header; 0 where it cannot be opened."""
    try:
        return math.prod(read_size(path))
    except DataError:
        return 0


def check_size(path: Path, size: tuple[int, int], *, any_ratio: bool = False) -> None:
    """Refuse what is too large to decode, or, unless any ratio of the sides will do, too long to crop."""
    width, height = size
    if width * height > LARGEST_MEGAPIXELS * 1e6:
        raise DataError(
            f"{path.name}: {width} x {height} px, {width * height / 1e6:.0f} megapixels; at most "
            f"{LARGEST_MEGAPIXELS:.0f} are opened. Make it smaller."
        )
    if not any_ratio and max(size) > LARGEST_RATIO * min(size):
        raise DataError(
            f"{path.name}: {width} x {height} px; the longer side may be {LARGEST_RATIO:.0f} x the shorter. Crop it."
        )


def _open(path: Path) -> Image.Image:
    formats = list(FORMATS)
    with path.open("rb") as file:
        head = file.read(12)
    if not head:
        raise DataError(f"{path.name}: the file is empty (0 bytes). Copy it anew, or remove it.")
    if head[4:8] == b"ftyp" and head[8:12] in _HEIC_BRANDS:
        _register_heif(path)
        formats.append("HEIF")
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        try:
            return Image.open(path, formats=formats)
        except ValueError as error:
            if "MAX_TEXT_CHUNK" not in str(error):
                raise
            return _reopened_without_text(path)


def _loaded(file: Image.Image, path: Path) -> Image.Image:
    """The picture with its pixels decoded."""
    try:
        file.load()
    except ValueError as error:
        if "MAX_TEXT_CHUNK" not in str(error):
            raise
        return _reopened_without_text(path)
    return file


def _register_heif(path: Path) -> None:
    try:
        import pillow_heif
    except ImportError:
        raise DataError(f'{path.name}: HEIC needs an extra: pip install "sfumato[heic]", or save it as JPEG.') from None
    # Earlier ones read outside their buffers (CVE-2026-28231).
    if tuple(int(part) for part in pillow_heif.__version__.split(".")[:2]) < (1, 3):
        version = pillow_heif.__version__
        raise DataError(f"{path.name}: pillow-heif {version} is unsafe; pip install -U 'sfumato[heic]'.")
    pillow_heif.register_heif_opener()


@contextmanager
def _decoding(path: Path) -> Iterator[None]:
    """Turn whatever a decoder raises into one line with the file's name."""
    try:
        yield
    except DataError:
        raise
    except UnidentifiedImageError:
        raise DataError(f"{path.name}: {_describe_undecodable(path)}") from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{path.name}: far more than {LARGEST_MEGAPIXELS:.0f} megapixels by its header. Make it smaller."
        ) from None
    except MemoryError:
        raise DataError(f"{path.name}: there is not enough memory to decode it. Make it smaller.") from None
    # Broken files make decoders raise nearly anything: OSError, SyntaxError, struct.error, IndexError, zlib.error ...
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None:  # the system's, not a decoder's
            raise DataError(f"{path.name}: cannot be read ({error.strerror}). See to its permissions.") from None
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path.name}: cannot be decoded ({reason}). Copy it anew, or remove it.") from None


def _describe_undecodable(path: Path) -> str:
    """What a file is that no decoder knows, and what to do."""
    with path.open("rb") as file:
        head = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    is_film = head[4:8] == b"ftyp" and head[8:12] not in (b"avif", b"avis", *_HEIC_BRANDS)
    if is_film or (head[:4] == b"RIFF" and head[8:12] == b"AVI "):
        return f"this is {_FILM}"
    known = next((words for start, words in _OTHERS.items() if head.startswith(start)), None)
    if known is not None:
        return f"this is {known}"
    allowed = ", ".join(FORMATS)
    return f"not an image that is opened here ({allowed}), or its beginning is lost. Convert it, or remove it."


def _animated(file: Image.Image) -> bool:
    # An MPO is a photograph with a second, smaller one inside; nothing moves.
    return file.format != "MPO" and bool(getattr(file, "is_animated", False))


def _reopened_without_text(path: Path) -> Image.Image:
    """A PNG whose texts are larger than Pillow reads: the pixels are fine, so the texts are left out."""
    data = path.read_bytes()
    kept, place = [data[:8]], 8
    while place + 12 <= len(data):
        end = place + 12 + int.from_bytes(data[place : place + 4], "big")
        if data[place + 4 : place + 8] not in (b"tEXt", b"zTXt", b"iTXt"):
            kept.append(data[place:end])
        place = end
    file = Image.open(io.BytesIO(b"".join(kept)), formats=["PNG"])
    file.load()
    return file


def _colours_and_alpha(file: Image.Image, path: Path, notes: list[str]) -> tuple[Image.Image, Image.Image | None]:
    # Pillow turns these round only where they have 8 bits or fewer.
    if file.mode.startswith("I") and getattr(file, "tag_v2", {}).get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0:
        raise DataError(
            f"{path.name}: 16-bit grey whose 0 is white, which would be read as its negative. Save it as PNG."
        )
    profile = file.info.get("icc_profile")
    image = _eight_bits(_upright(file, path, notes), path)
    if image.mode == "1":
        image = image.convert("L")
    is_grey, alpha = image.mode in ("L", "LA", "La"), None
    if image.has_transparency_data or image.mode in ("RGBa", "La"):
        rgba = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        # A profile of greys wants greys.
        image, alpha = rgba.convert("RGB").convert("L" if is_grey else "RGB"), rgba.getchannel("A")
        if alpha.getextrema() == (255, 255):
            alpha = None
    elif image.mode not in ("L", "CMYK", "LAB"):
        image = image.convert("RGB")
    return _srgb(image, profile, path, notes).convert("RGB"), alpha


def _upright(file: Image.Image, path: Path, notes: list[str]) -> Image.Image:
    try:
        return ImageOps.exif_transpose(file)
    except Exception as error:  # a broken EXIF block says nothing about the pixels
        notes.append(f"{path.name}: its EXIF data cannot be read ({type(error).__name__}); taken as it lies")
        return file.copy()


def _eight_bits(image: Image.Image, path: Path) -> Image.Image:
    """16-bit grey scaled by 257, with the one grey that a PNG may call transparent; Pillow itself would clip it to
    white."""
    if image.mode == "F":
        raise DataError(f"{path.name}: floating-point pixels, whose white is unknown. Save it with 8 or 16 bits.")
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    if values.min() < 0 or values.max() > 65535:
        raise DataError(f"{path.name}: 32-bit pixels, whose white is unknown. Save it with 8 or 16 bits.")
    values = values.astype(np.uint16)
    # (values + 128) // 257, but in 16 bits: in more a large picture takes a gigabyte.
    grey = Image.fromarray((values // 257 + (values % 257 > 128)).astype(np.uint8))
    clear = image.info.get("transparency")
    if not isinstance(clear, int):
        return grey
    # Compared in 16 bits: in 8 its neighbours would be transparent, too.
    return Image.merge("LA", (grey, Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))))


_OTHER_SRGB = ("linear", "g10", "scrgb")
"""In the names of profiles that have sRGB's colours at another brightness."""


def _srgb(image: Image.Image, embedded: bytes | None, path: Path, notes: list[str]) -> Image.Image:
    """An L, RGB, CMYK or LAB picture through the file's colour profile, if that says anything but sRGB."""
    if image.mode == "LAB":
        return _apply_profile(image, ImageCms.createProfile("LAB"))
    if not embedded:
        if image.mode == "CMYK":
            notes.append(f"{path.name}: CMYK without a colour profile; its colours are a guess")
        return image
    try:
        profile = ImageCms.getOpenProfile(io.BytesIO(embedded))
        if profile.profile.xcolor_space.strip() == "RGB":
            image = image.convert("RGB") if image.mode == "L" else image
            said = ImageCms.getProfileDescription(profile).lower()
            if "srgb" in said and not any(word in said for word in _OTHER_SRGB):
                return image
        return _apply_profile(image, profile)
    except (ImageCms.PyCMSError, OSError, ValueError):
        notes.append(f"{path.name}: its colour profile cannot be used; its colours are a guess")
        return image


def _apply_profile(image: Image.Image, profile: Any) -> Image.Image:
    converted = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert converted is not None  # None only for in-place conversions
    return converted


def _check_png(path: Path) -> int | None:
    """Refuse a PNG whose pixels' checksums are wrong, or of whose 16-bit colours one is transparent, which Pillow shows
    as other pixels.

    Gives the transparent grey of one with 2 or 4 bits, None for others: Pillow makes its pixels 8 bits, but not that
    grey, and takes another one for transparent.
    """
    data = memoryview(path.read_bytes())
    place, clear = 8, None
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4], "big"), bytes(data[place + 4 : place + 8])
        body, end = data[place + 4 : place + 8 + length], place + 12 + length
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT"):
            if end > len(data):
                raise DataError(f"{path.name}: cut short; {end - len(data):,} bytes are missing. Copy it anew.")
            if zlib.crc32(body) != int.from_bytes(data[end - 4 : end], "big"):
                raise DataError(f"{path.name}: damaged; a checksum of its pixels is wrong. Copy it anew, or remove it.")
        if kind == b"tRNS" and bytes(data[24:26]) == b"\x10\x02":  # bits, and RGB
            raise DataError(
                f"{path.name}: one of its 16-bit colours is transparent, which is lost in 8 bits. Save it with an "
                "alpha channel, or with 8 bits."
            )
        if kind == b"tRNS" and bytes(data[24:26]) in (b"\x02\0", b"\x04\0"):  # bits, and grey
            largest = 2 ** data[24] - 1
            clear = (body[-1] & largest) * 255 // largest
        if kind == b"IEND":
            break
        place = end
    return clear
