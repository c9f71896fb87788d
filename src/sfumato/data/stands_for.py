"""New words in captions, in place of what they stand for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from sfumato.data.folder import Example, Folder
from sfumato.errors import DataError
from sfumato.numerals import so_many
from sfumato.words.placeholders import holds


def put_into_captions(folder: Folder, placeholders: Sequence[str], stands_for: Sequence[str] = ()) -> Folder:
    """The folder with each placeholder as it is spelt here, and in place of what it stands for, if that is given.

    So it is in the template; a trigger whose place is taken is none any more. Captions of the class stay as they are.
    Raises DataError where a caption holds no placeholder, or one of the class does, or a placeholder, or what one
    stands for, is in no caption.
    """
    # A placeholder in capitals stands for itself: by the spelling that was given diffusers finds all of its vectors.
    meant = [*zip(placeholders, placeholders, strict=True), *zip(stands_for, placeholders, strict=False)]
    names = {phrase.lower(): token for phrase, token in meant}
    # Longest first, and all at once: of "sks otter" and "otter" each takes its own place.
    # "{caption}" is what a template is filled at, also where a word stands for "caption".
    # "Otter" is an otter, too, since text encoders read small letters alone.
    parts = [r"\{caption\}", *map(_whole, sorted(names, key=len, reverse=True))]
    phrases = re.compile("|".join(parts), re.IGNORECASE)

    def renamed(caption: str) -> str:
        return phrases.sub(lambda found: names.get(found[0].lower(), found[0]), caption)

    def with_words(example: Example) -> Example:
        if example.group == "class":
            return example
        caption, template, trigger = renamed(example.caption), example.template, example.trigger
        if template is not None:
            template = renamed(template.replace("{trigger}", trigger or ""))
        if trigger and trigger in example.caption and trigger not in caption:
            trigger = None
        return dataclasses.replace(example, caption=caption, template=template, trigger=trigger)

    before = [example.caption for example in folder.of("instance")]
    for phrase in stands_for:
        if not any(re.search(_whole(phrase), caption, re.IGNORECASE) for caption in before):
            raise DataError(
                f"--stands-for {phrase!r} is in none of {so_many(len(before), 'caption')}, first {before[0]!r}. Name "
                "words that are in some, or leave it out."
            )
    examples = tuple(map(with_words, folder.examples))
    ours = [e for e in examples if e.group == "instance"]
    without = [e.caption for e in ours if not any(holds(token, e.caption) for token in placeholders)]
    unused = [token for token in placeholders if not any(holds(token, e.caption) for e in ours)]
    if without:
        raise DataError(
            f"{len(without)} of {len(ours)} captions hold no placeholder, first {without[0]!r}. Write it there, "
            f'name the words it --stands-for, or give --caption "{placeholders[0]}, {{caption}}".'
        )
    if unused:
        raise DataError(f"{unused[0]} is in no caption, so it would learn nothing. Write it into some.")
    for caption in (e.caption for e in examples if e.group == "class"):
        if held := [token for token in placeholders if holds(token, caption)]:
            raise DataError(
                f"the caption {caption!r} of a picture of the class holds {held[0]}, which is learned for the subject "
                "alone. Leave it out there."
            )
    return dataclasses.replace(folder, examples=examples)


def _whole(phrase: str) -> str:
    """Where a phrase stands in a text by itself: "ring" is not in "string"."""
    before = r"(?<!\w)" if re.match(r"\w", phrase) else ""
    after = r"(?!\w)" if re.search(r"\w\Z", phrase) else ""
    return f"{before}{re.escape(phrase)}{after}"
