"""Pictures that are not learned from, so that the loss on them says what the learning is worth on others.

Imports no torch.
"""

import hashlib
import os
import unicodedata
from dataclasses import replace
from pathlib import Path

from sfumato.data.folder import ExampleSet
from sfumato.errors import DataError
from sfumato.numerals import pluralize, some


def hold_out(examples: ExampleSet, share: float) -> ExampleSet:
    """The set with this share of the subject's pictures, at least one unless it is 0, in the group "validation".

    Which ones depends on the names of their files alone, so that another picture changes few of them. A picture that
    several sources name is held out of all. Raises DataError where none would be left to learn from, and
    for a picture that is both learned and held out.
    """
    file_of = {each.path: _file(each.path) for each in examples}
    learned = {file_of[each.path]: each.path.name for each in examples if each.group == "instance"}
    held = {file_of[each.path] for each in examples if each.group == "validation"}
    if both := [name for file, name in learned.items() if file in held]:
        raise DataError(
            f"{some(both)}: in a source with validation = true and in one that is learned; what is learned says "
            "nothing of others. Name it in one of them."
        )
    if not share:
        return examples
    count = max(1, round(share * len(learned)))
    if count >= len(learned):
        raise DataError(
            f"--validation-split {share:g} of {pluralize(len(learned), 'image')} leaves none to learn from; give "
            "more images, or a smaller share."
        )
    chosen = set(sorted(learned, key=lambda file: _lot(learned[file]))[:count])
    moved = tuple(
        replace(each, group="validation") if each.group == "instance" and file_of[each.path] in chosen else each
        for each in examples
    )
    return replace(examples, examples=moved)


def _file(path: Path) -> tuple[int, int] | str:
    """The same for one file by whatever name, where letters' cases are one, too."""
    try:
        found = path.stat()
    except OSError:
        return str(path)
    return (found.st_dev, found.st_ino) if found.st_ino else os.path.realpath(path)


def _lot(name: str) -> bytes:
    """Where a name comes among others, on every system: they spell accents differently."""
    return hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).digest()
