"""How a picture was made, inside its file, in the form that other tools read.

The text `parameters` of AUTOMATIC1111 and Forge (read by Civitai and many viewers), and beside it our own `sfumato`, a
JSON object. PNG keeps both as text chunks; JPEG and WebP keep the first in EXIF's UserComment, as those tools do, and
the second in an XMP packet, which they leave alone.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any
from xml.sax.saxutils import escape, unescape

from PIL import Image, PngImagePlugin

from sfumato.errors import ConfigError, DataError
from sfumato.utils.atomic import atomic_path
from sfumato.utils.formatting import format_number

Value = str | int | float

# Forge's modules/infotext_utils.py; a last line with fewer than three pairs belongs to the prompt. Its names have no
# largest length, by which a long prompt without settings is read in the square of its length.
_PAIR = re.compile(r'(\w[\w \-/]{1,100}):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
_FEWEST_PAIRS = 3
_NEGATIVE = "Negative prompt: "
A1111_KEYS: Mapping[str, str] = MappingProxyType(
    {"DPM++ 2M": "karras", "DPM2": "karras", "DPM2 a": "karras", "DPM++ 2M SDE": "exponential"}
)
"""Samplers that take another schedule than the uniform one where A1111's and Forge's is "Automatic"."""
_USER_COMMENT, _EXIF = 0x9286, 0x8769
_LARGEST_PX = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383}
"""Pixels on a side that a format has room for."""
_JPEG_CHARACTERS = 32_700
"""Of UTF-16: a segment of a JPEG has at most 65,533 bytes, of which EXIF's own take less than 100."""


_LARGEST_XMP = 65_533 - 29
"""Bytes of a segment of a JPEG without the name that XMP's begins with."""
_OWN_BEGINS, _OWN_ENDS = b"<sfumato:settings>", b"</sfumato:settings>"


@dataclass(frozen=True)
class Parameters:
    """prompt: with <lora:name:weight> tags. settings: "Steps", "Sampler", "CFG scale", "Seed" ... in their order."""

    prompt: str
    negative: str = ""
    settings: Mapping[str, Value | None] = field(default_factory=dict)


@dataclass(frozen=True)
class PictureInfo:
    """What a picture says of itself. own: our JSON object. graph: ComfyUI's, and invoke: InvokeAI's metadata, as they
    stand there."""

    parameters: Parameters | None
    own: dict[str, Any] | None
    graph: str = ""
    invoke: str = ""


def format_parameters(parameters: Parameters) -> str:
    """The text as A1111 writes it: prompt, negative prompt if any, and the settings on one line, None left out."""
    pairs = [f"{name}: {_quoted(value)}" for name, value in parameters.settings.items() if value is not None]
    lines = [parameters.prompt]
    if parameters.negative:
        lines.append(_NEGATIVE + parameters.negative)
    return "\n".join([*lines, ", ".join(pairs)])


def parse_parameters(text: str) -> Parameters:
    """The inverse of `format_parameters`, by A1111's own rule. Values come back as text."""
    *lines, last = text.strip().split("\n")
    pairs = _PAIR.findall(last)
    if len(pairs) < _FEWEST_PAIRS:
        lines, pairs = [*lines, last], []
    prompt: list[str] = []
    negative: list[str] = []
    for line in lines:
        stripped = line.strip()
        text = stripped.removeprefix(_NEGATIVE.strip())  # of each line that begins so, as A1111 has it
        to = negative if negative or text != stripped else prompt
        to.append(text.strip())
    settings = {name: _unquoted(value) for name, value in pairs}
    return Parameters("\n".join(prompt), "\n".join(negative), settings)


def lora_tag(name: str, weight: float) -> str:
    """<lora:name:0.8>, as it stands in a prompt."""
    return f"<lora:{infotext_name(name)}:{format_number(weight)}>"


def short_hashes(hashes: Mapping[str, str]) -> str:
    """The value of "Lora hashes", names with the first 12 hex digits of `sshs_model_hash`, and of "TI hashes", with
    those of the file's sha256."""
    return ", ".join(f"{infotext_name(name)}: {digest[:12]}" for name, digest in hashes.items())


def infotext_name(name: str) -> str:
    """A name without what would end it early in a tag or among hashes."""
    return re.sub(r"[:,<>]", "", name)


def check_size(path: Path, size: tuple[int, int]) -> None:
    """Raises ConfigError for a picture that is larger than the format of its file can be."""
    suffix = path.suffix.lower()
    if (side := max(size)) > (largest := _LARGEST_PX.get(suffix, side)):
        raise ConfigError(
            f"{path.name}: {side:,} pixels on a side, and a {suffix} has at most {largest:,}; name a .png."
        )


def save_picture(
    image: Image.Image, path: Path, parameters: Parameters | None = None, own: Mapping[str, Any] | None = None
) -> Path:
    """Write a .png, .jpg or .webp with its parameters and our own JSON, whole or not at all.

    Warns of prompts that are longer than a JPEG can hold, whose ends are cut in the file, and of an `own` that is, and
    is left out. Raises ConfigError for another ending, and for a picture that is larger than the format can be.
    """
    check_size(path, image.size)
    suffix = path.suffix.lower()
    if parameters and suffix in (".jpg", ".jpeg"):
        parameters = _cut_for_jpeg(parameters, path)
    text = format_parameters(parameters) if parameters else ""
    options: dict[str, Any]
    if suffix == ".png":
        options = {"format": "PNG", "pnginfo": _chunks(text, own)}
    elif suffix in (".jpg", ".jpeg"):
        options = {"format": "JPEG", "quality": 95, "subsampling": 0, "exif": _exif(text)}
        options["xmp"] = _short_enough(_xmp(own), path)
    elif suffix == ".webp":
        options = {"format": "WEBP", "quality": 95, "exif": _exif(text), "xmp": _xmp(own)}
    else:
        raise ConfigError(f"{path.name}: images are written as .png, .jpg or .webp. Give one of these endings.")
    with atomic_path(path) as temporary:
        image.save(temporary, **options)
    return path


def read_picture_info(path: Path) -> PictureInfo:
    """What a picture's file says of how it was made; nothing is no error. Raises DataError if it cannot be opened."""
    try:
        with Image.open(path, formats=["PNG", "JPEG", "WEBP"]) as file:
            texts = dict(file.info)
            comment = file.getexif().get_ifd(_EXIF).get(_USER_COMMENT, b"")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path.name}: cannot be read as PNG, JPEG or WebP ({error}).") from None
    text = texts.get("parameters") or _comment_text(comment)
    try:
        own = json.loads(texts.get("sfumato") or _own_in(texts.get("xmp")))
    except (TypeError, ValueError, RecursionError):
        own = None
    return PictureInfo(
        parse_parameters(text) if isinstance(text, str) and text else None,
        own if isinstance(own, dict) else None,
        graph if isinstance(graph := texts.get("prompt"), str) else "",
        invoke if isinstance(invoke := texts.get("invokeai_metadata") or texts.get("sd-metadata"), str) else "",
    )


def _cut_for_jpeg(parameters: Parameters, path: Path) -> Parameters | None:
    """The parameters with prompts that fit, tags at the end whole; None where the settings alone do not fit."""
    if (length := _length(format_parameters(parameters))) <= _JPEG_CHARACTERS:
        return parameters
    warnings.warn(
        f"{path.name}: {length:,} characters of prompt and settings, and a JPEG holds {_JPEG_CHARACTERS:,}; the "
        "prompt's end is left out of the file. A .png keeps it.",
        stacklevel=3,
    )
    room = _JPEG_CHARACTERS - _length(format_parameters(replace(parameters, prompt="", negative=""))) - len(_NEGATIVE)
    tags = re.search(r"(?: <lora:[^<>]*>)*$", parameters.prompt)
    ends = tags[0] if tags and _length(tags[0]) < room // 2 else ""
    said = parameters.prompt.removesuffix(ends)
    negative = _cut(parameters.negative, max(room // 2, room - _length(parameters.prompt)))
    prompt = _cut(said, room - _length(negative) - _length(ends)) + ends
    return replace(parameters, prompt=prompt, negative=negative) if room > 0 else None


def _cut(text: str, length: int) -> str:
    end = " ..."
    if _length(text) <= length:
        return text
    return text.encode("utf-16-be")[: 2 * max(0, length - len(end))].decode("utf-16-be", "ignore") + end


def _length(text: str) -> int:
    return len(text.encode("utf-16-be")) // 2


def _quoted(value: Value) -> str:
    text = format_number(value) if isinstance(value, float) else str(value)
    return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n]|^"', text) else text


def _unquoted(text: str) -> str:
    if not (text.startswith('"') and text.endswith('"')):
        return text
    try:
        return str(json.loads(text))
    except ValueError:
        return text


def _chunks(text: str, own: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    # Pillow's add_text chooses iTXt by itself for what Latin-1 cannot say.
    if text:
        info.add_text("parameters", text)
    if own is not None:
        info.add_text("sfumato", json.dumps(own, ensure_ascii=True, sort_keys=True))
    return info


def _xmp(own: Mapping[str, Any] | None) -> bytes:
    """Our JSON as a packet of XMP."""
    if own is None:
        return b""
    said = escape(json.dumps(own, ensure_ascii=True, sort_keys=True)).encode()
    return (
        b'<?xpacket begin="\xef\xbb\xbf" id="W5M0MpCehiHzreSzNTczkc9d"?>'  # as XMP's own text has it
        b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        b'<rdf:Description rdf:about="" xmlns:sfumato="urn:sfumato">'
        + (_OWN_BEGINS + said + _OWN_ENDS)
        + b"</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end='w'?>"
    )


def _short_enough(xmp: bytes, path: Path) -> bytes:
    """The packet, or none where a JPEG has no room for it."""
    if len(xmp) <= _LARGEST_XMP:
        return xmp
    warnings.warn(
        f"{path.name}: {len(xmp):,} bytes of sfumato's own settings, and a JPEG holds {_LARGEST_XMP:,}; they are left "
        "out of the file, so that `sfumato inspect` knows less of it. A .png keeps them.",
        stacklevel=3,
    )
    return b""


def _own_in(xmp: object) -> str:
    """The text of our JSON in a packet of XMP; empty without one. Not by a regex, which may read a long packet in the
    square of its length."""
    if not isinstance(xmp, bytes):
        return ""
    return unescape(xmp.partition(_OWN_BEGINS)[2].partition(_OWN_ENDS)[0].decode("utf-8", errors="replace"))


def _exif(text: str) -> Image.Exif:
    exif = Image.Exif()
    if text:
        exif.get_ifd(_EXIF)[_USER_COMMENT] = b"UNICODE\0" + text.encode("utf-16-be")
    return exif


def _comment_text(comment: object) -> str:
    if not isinstance(comment, bytes) or not comment:
        return ""
    head, body = comment[:8], comment[8:]
    if head == b"UNICODE\0":
        return body.decode(_unicode_of(body), errors="replace")
    return body.decode("utf-8", errors="replace") if head == b"ASCII\0\0\0" else ""


def _unicode_of(body: bytes) -> str:
    """The encoding of a UserComment. EXIF leaves the order of UTF-16's bytes open, and Civitai's pictures have both:
    the zeros beside the ASCII of the settings' names tell, where no mark does; a text without any is UTF-8."""
    if body[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    first, second = body[::2].count(0), body[1::2].count(0)
    if first or second:
        return "utf-16-be" if first >= second else "utf-16-le"
    return "utf-8"
