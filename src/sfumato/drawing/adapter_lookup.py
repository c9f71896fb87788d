"""The file that a tag in a prompt names: `<lora:line:0.8>`. Imports no torch."""

from __future__ import annotations

import unicodedata
from pathlib import Path

from sfumato.drawing.pnginfo import plain_name
from sfumato.errors import ConfigError
from sfumato.files.header import read_header
from sfumato.files.peft_folder import adapter_folders_below
from sfumato.weighting.adapter import without_suffix


def find_adapter(name: str, folder: Path) -> Path:
    """The one file of this name, without its suffix, or folder of peft's in the folder or below it; its header is
    checked.

    Where none has it, a name is meant that a picture's tag cannot hold: "my line v2" is my line, v2.safetensors.
    Raises ConfigError where there is none, or several of which none is in the folder itself.
    """
    composed = unicodedata.normalize("NFC", name)  # a Mac's files have accents apart
    files = [path for path in folder.rglob("*.safetensors") if path.is_file()]
    files += [path for path in adapter_folders_below(folder) if path != folder]
    stems = [unicodedata.normalize("NFC", without_suffix(path.name)) for path in files]
    found = [path for path, stem in zip(files, stems, strict=True) if stem == composed]
    found = found or [path for path, stem in zip(files, stems, strict=True) if plain_name(stem).strip() == composed]
    found = [path for path in found if path.parent == folder] or found
    if len(found) != 1:
        what = (
            f"{len(found)} files are called that, first {found[0]} and {found[1]}"
            if found
            else "no file is called that"
        )
        raise ConfigError(f"<lora:{name}>: {what} in {folder}; name the folder that it is in, or its file.")
    if found[0].is_file():
        read_header(found[0])
    return found[0]
