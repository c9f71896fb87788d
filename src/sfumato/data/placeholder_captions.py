"""New words in captions, in place of what they stand for."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Sequence
from unicodedata import normalize

from sfumato.adapters.embeddings.tokens import contains_placeholder
from sfumato.data.folder import Example, ExampleSet
from sfumato.errors import DataError
from sfumato.models.prompts.syntax import has_phrase, phrase_pattern
from sfumato.utils.formatting import pluralize


def insert_placeholders(folder: ExampleSet, placeholders: Sequence[str], stands_for: Sequence[str] = ()) -> ExampleSet:
    """The folder with each placeholder as it is spelt here, and in place of what it stands for, if that is given.

    So it is in the template; a trigger whose place is taken is none any more. Captions of the class stay as they are.
    Raises DataError where a caption holds no placeholder, or one of the class does, or a placeholder, or what one
    stands for, is in no caption.
    """
    _check_stands_for(stands_for, folder.in_group("instance").captions)
    rename = _renaming(placeholders, stands_for)
    examples = tuple(e if e.group == "class" else _with_words(e, rename) for e in folder.examples)
    _check_captions(examples, placeholders)
    return dataclasses.replace(folder, examples=examples)


def _renaming(placeholders: Sequence[str], stands_for: Sequence[str]) -> Callable[[str], str]:
    """What puts the placeholders into a text."""
    # A placeholder in capitals stands for itself: by the spelling that was given diffusers finds all of its vectors.
    meant = [*zip(placeholders, placeholders, strict=True), *zip(stands_for, placeholders, strict=False)]
    names = {normalize("NFC", phrase).lower(): token for phrase, token in meant}
    # Longest first, and all at once: of "sks otter" and "otter" each takes its own place.
    # "{caption}" is what a template is filled at, also where a word stands for "caption".
    # "Otter" is an otter, too, since text encoders read small letters alone.
    parts = [r"\{caption\}", *map(phrase_pattern, sorted(names, key=len, reverse=True))]
    phrases = re.compile("|".join(parts), re.IGNORECASE)

    def rename(text: str) -> str:
        # As `has_phrase` finds them, and as the tokenizer reads a caption: with each accent in its letter.
        return phrases.sub(lambda found: names.get(found[0].lower(), found[0]), normalize("NFC", text))

    return rename


def _with_words(example: Example, rename: Callable[[str], str]) -> Example:
    template, trigger = example.template, example.trigger
    caption, *further = dict.fromkeys(map(rename, example.captions))
    if template is not None:
        template = rename(template.replace("{trigger}", trigger or ""))
    if trigger and trigger in example.caption and trigger not in caption:
        trigger = None
    kept = {rename(text): tags for text, tags in example.kept_tags.items()}
    return dataclasses.replace(
        example, caption=caption, further=tuple(further), kept_tags=kept, template=template, trigger=trigger
    )


def _check_stands_for(stands_for: Sequence[str], captions: Sequence[str]) -> None:
    """Raises DataError for what is in no caption."""
    for phrase in stands_for:
        if not any(has_phrase(phrase, caption) for caption in captions):
            raise DataError(
                f"--stands-for {phrase!r} is in none of {pluralize(len(captions), 'caption')}, first {captions[0]!r}. "
                "Name words that are in some, or leave it out."
            )


def _check_captions(examples: Sequence[Example], placeholders: Sequence[str]) -> None:
    """Raises DataError for captions that hold no placeholder, for one that is in none, and for one of the class that
    holds any."""
    ours = [caption for e in examples if e.group != "class" for caption in e.said]
    learned = [caption for e in examples if e.group == "instance" for caption in e.said]
    without = [caption for caption in ours if not any(contains_placeholder(token, caption) for token in placeholders)]
    unused = [token for token in placeholders if not any(contains_placeholder(token, caption) for caption in learned)]
    if without:
        raise DataError(
            f"{len(without)} of {len(ours)} captions hold no placeholder, first {without[0]!r}. Write it there, "
            f'name the words it --stands-for, or give --caption "{placeholders[0]}, {{caption}}".'
        )
    if unused:
        raise DataError(f"{unused[0]} is in no caption, so it would learn nothing. Write it into some.")
    for caption in (caption for e in examples if e.group == "class" for caption in e.said):
        if held := [token for token in placeholders if contains_placeholder(token, caption)]:
            raise DataError(
                f"the caption {caption!r} of an image of the class holds {held[0]}, which is learned for the subject "
                "alone. Leave it out there."
            )
