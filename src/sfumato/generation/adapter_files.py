"""The file that a tag in a prompt names: `<lora:line:0.8>`. Imports no torch.

What files of adapters ask for that are distilled for few steps.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sfumato.adapters.weights import Adapter, without_suffix
from sfumato.errors import ConfigError
from sfumato.files.header import read_header
from sfumato.files.metadata import Sampling, sampling_of
from sfumato.files.peft import adapter_folders_below, adapter_sources, is_adapter_folder
from sfumato.generation.metadata.png_info import infotext_name


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
    found = found or [path for path, stem in zip(files, stems, strict=True) if infotext_name(stem).strip() == composed]
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


def requested_samplings(adapters: Iterable[Adapter]) -> dict[str, Sampling]:
    """What the files of these adapters ask for, by label and in their order; those that ask for nothing are left out.
    Of several the first counts."""
    found = {}
    for adapter in adapters:
        path = Path(adapter.path)
        is_file = path.suffix == ".safetensors" and path.is_file()
        sources = adapter_sources(path) if is_file or is_adapter_folder(path) else []
        for asked in filter(None, (sampling_of(source.header.metadata) for source in sources)):
            found[adapter.label] = asked
    return found


def apply_sampling(settings: Mapping[str, Any], asked: Sampling) -> dict[str, Any]:
    """The settings with what is asked for where they have None."""
    return {**settings, **{name: value for name, value in asdict(asked).items() if settings[name] is None}}


def overridden_notes(asked: Mapping[str, Sampling]) -> list[str]:
    """A line on each adapter that asks for something else than the first of them."""
    if not asked:
        return []
    (first, counts), *others = asked.items()
    return [
        f"{label}: asks for {each}, but {first} counts, which is named before it. Name {label} first, or give "
        "--sampler, --steps and --guidance."
        for label, each in others
        if each != counts
    ]
