"""What a file really is, told from its first bytes: the suffix is only somebody's word for it."""

import re

HEAD_BYTES = 512

_PICTURES = {
    b"\x89PNG\r\n\x1a\n": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"GIF8": "a GIF image",
}
_ARCHIVES = {
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"Rar!": "a RAR archive",
    b"\xfd7zXZ": "an xz archive",
    b"BZh": "a bzip2 archive",
    b"\x28\xb5\x2f\xfd": "a zstd archive",
}
_OTHER_WEIGHTS = {
    b"GGUF": "a GGUF file",
    b"\x89HDF\r\n": "an HDF5 file",
    b"\x93NUMPY": "a NumPy array",
}
_PICKLE_ADVICE = (
    "a pickle can run programs, so it was not opened. Take the .safetensors version of it, or convert it on a machine "
    "you can throw away."
)
_PICTURE_ADVICE = ", not a weight file. Name the .safetensors file it belongs to."
_BY_MAGIC = (
    (_PICTURES, _PICTURE_ADVICE),
    (_ARCHIVES, ", not a weight file. Unpack it and name the .safetensors file in it."),
    (_OTHER_WEIGHTS, "; only safetensors files are read. Take the .safetensors version of it."),
)
_DOWNLOAD_ADVICE = "Download the file itself again."

# Protocol 0 and 1 have no magic: GLOBAL "cmodule\nname\n", or MARK followed by a container and a memo.
_OLD_PICKLE = re.compile(rb"c[\w.]+\n[\w.]+\n|\((?:dp|lp|i)\d*|\}q|\]q|\(c[\w.]+\n")


def foreign(head: bytes) -> str:
    """One sentence on a file that is not safetensors: what it is and what to do, to follow "NAME: ".

    head: its first HEAD_BYTES bytes, or all of a shorter file.
    """
    if not head:
        return f"the file is empty (0 bytes). {_DOWNLOAD_ADVICE}"
    if head.startswith(b"version https://git-lfs"):
        return (
            "this is a Git-LFS pointer, the real file was not downloaded. Run `git lfs pull`, or download the file "
            "from its page."
        )
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06")):
        if re.search(rb"\.pkl|\.data/|/version", head):
            return f"this is a PyTorch .ckpt/.pt file, a zip with a pickle in it; {_PICKLE_ADVICE}"
        return "this is a zip archive, not a weight file. Unpack it and name the .safetensors file in it."
    if re.match(rb"\x80[\x02-\x05]", head) or _OLD_PICKLE.match(head):
        return f"this is a pickle file (.ckpt/.pt/.bin); {_PICKLE_ADVICE}"
    if head[257:262] == b"ustar":
        return f"this is a tar archive, as early PyTorch wrote with a pickle in it; {_PICKLE_ADVICE}"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return f"this is a WebP image{_PICTURE_ADVICE}"
    for kinds, advice in _BY_MAGIC:
        for magic, kind in kinds.items():
            if head.startswith(magic):
                return f"this is {kind}{advice}"
    if not head.strip(b"\0"):
        return f"the file begins with {len(head)} zero bytes, as a broken-off download leaves it. {_DOWNLOAD_ADVICE}"
    return _text(head)


def _text(head: bytes) -> str:
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if re.match(rb"<(!doctype|html|head|body|\?xml|!--)", start, re.IGNORECASE):
        return (
            "this is a web page saved under a weight file's name (a log-in, a licence or an error page). Open its "
            "address in a browser and download the file itself."
        )
    if start[:1] in (b"{", b"[") and _is_text(head):
        return f"this is JSON text, perhaps a server's error message, not a weight file. {_DOWNLOAD_ADVICE}"
    if _is_text(head):
        return f"this is a text file, not a weight file. {_DOWNLOAD_ADVICE}"
    return "this is no safetensors file (the first 8 bytes do not tell the length of a JSON header). Name another file."


def _is_text(head: bytes) -> bool:
    try:
        text = head[: max(len(head) - 3, 1)].decode("utf-8")  # a character may be cut at the end
    except UnicodeDecodeError:
        return False
    return all(letter.isprintable() or letter in "\t\r\n" for letter in text)
