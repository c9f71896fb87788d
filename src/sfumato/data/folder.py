"""A folder of pictures -> examples: which files are learned from, with which captions and masks, and what is left out.

datasets/README.md has the format on one page. Nothing is decoded here; headers are read, so that most of what cannot be
learned from is refused before a base is loaded. Imports no torch.
"""

import os
import re
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, overload

from sfumato.data import captions as wildcards
from sfumato.data.captions import (
    METADATA_FILE,
    caption_command,
    check_template,
    fill_template,
    first_template,
    is_meaningless_name,
    normalize_spaces,
    words_in_name,
)
from sfumato.data.images import read_size
from sfumato.data.listing import (
    FOLDER_OF_PICTURES,
    FOLDER_OF_REPEATS,
    Ignored,
    ListedPicture,
    Listing,
    group_notes,
    own_name_note,
)
from sfumato.data.options import MaskSource, Options
from sfumato.data.tags import KeptTags, strip_keep_separator, unshuffled_captions
from sfumato.errors import DataError
from sfumato.models.prompts.syntax import has_phrase
from sfumato.utils.formatting import format_list, pluralize, truncate_text
from sfumato.utils.limits import truncation_hint

Group = Literal["instance", "class", "validation"]
PLACEHOLDER = "[trigger]"
"""What ai-toolkit writes in captions where the trigger is to be."""


@dataclass(frozen=True)
class Example:
    """One picture to learn from.

    further: captions of which a sample takes one as often as `caption`. repeats: how often an epoch holds the picture.
    mask: a picture, white where it is to be learned. alpha_mask: learn where it is opaque. group: "class" for pictures
    of the class that a subject belongs to (prior preservation), "validation" for those on which the loss is measured
    and that are not learned. checksums: sha256 of the picture and its mask, in hex, that their files must have; "" for
    any. template, trigger: what the captions were made with, None for nothing. kept_tags: of those of the captions that
    say themselves which of their tags stay in their places; captions with wildcards still have the marks for it.
    """

    path: Path
    caption: str
    repeats: int = 1
    mask: Path | None = None
    alpha_mask: bool = False
    options: Options = field(default_factory=Options)
    group: Group = "instance"
    checksums: tuple[str, str] = ("", "")
    template: str | None = None
    trigger: str | None = None
    further: tuple[str, ...] = ()
    kept_tags: Mapping[str, KeptTags] = field(default_factory=dict)

    @property
    def captions(self) -> tuple[str, ...]:
        """All of its captions."""
        return self.caption, *self.further

    @property
    def said(self) -> list[str]:
        """Its captions as samples have them, each alternative of a wildcard in one of them at least."""
        return list(
            dict.fromkeys(text for caption in self.captions for text in unshuffled_captions(caption, self.options))
        )

    @property
    def files(self) -> list[Path]:
        """The picture, and its mask if there is one."""
        return [self.path] if self.mask is None else [self.path, self.mask]


@dataclass(frozen=True)
class ExampleSet(Sequence[Example]):
    """The examples of a folder, sorted by name. notes: lines for the person. skip_bad: go on without bad files; None
    where nobody is asked whether to."""

    examples: tuple[Example, ...]
    ignored: tuple[Ignored, ...] = ()
    notes: tuple[str, ...] = ()
    skip_bad: bool | None = False

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[Example, ...]: ...
    def __getitem__(self, index: int | slice) -> Example | tuple[Example, ...]:
        return self.examples[index]

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def captions(self) -> list[str]:
        """What all examples say."""
        return [caption for example in self.examples for caption in example.said]

    @property
    def samples(self) -> int:
        """Pictures of one epoch, repeats counted."""
        return sum(example.repeats for example in self.examples)

    @property
    def triggers(self) -> list[str]:
        """The words that captions were made with to call up what is learned, each once; without those that none holds,
        which were not learned."""
        given = dict.fromkeys(example.trigger for example in self.examples if example.trigger)
        return [trigger for trigger in given if not unused_trigger_note(self.examples, trigger)]

    def in_group(self, group: Group) -> "ExampleSet":
        """The examples of one group only; may be empty."""
        chosen = tuple(example for example in self.examples if example.group == group)
        return ExampleSet(chosen, self.ignored, self.notes, self.skip_bad)


def make_examples(
    listing: Listing,
    *,
    template: str | None,
    trigger: str | None,
    mask: MaskSource,
    skip_bad: bool | None,
    by_line: bool | None = None,
    words: str | None = "",
    options: Options | None = None,
) -> ExampleSet:
    """The examples of one listed folder, headers checked. Raises as `read_folder` does.

    by_line: each line of a caption is one of its own; unset, they are not, and that is told, as it is of wildcards.
    words: that captions have to hold, to advise them where there are none; None where the options for captions, such as
    --caption, do not hold.
    """
    options = options or Options()
    if template is not None:
        check_template(template, trigger, has_wildcards=bool(options.wildcards))
    path = listing.root
    if not listing.pictures:
        raise no_images_message(path, listing.ignored)
    bad = unreadable_pictures(listing.pictures)
    (name,) = unique_labels([path])
    refuse_bad_pictures(list(bad.values()), len(listing.pictures), skip_bad, f" in {name}")
    for found in listing.pictures:
        if found.caption.error:
            raise DataError(found.caption.error)
    left_out = [
        Ignored(picture.relative_to(path).as_posix(), reason.removeprefix(f"{picture.name}: "))
        for picture, reason in bad.items()
    ]
    good = [found for found in listing.pictures if found.path not in bad]
    examples = [
        make_example(found, template=template, trigger=trigger, mask=mask, by_line=bool(by_line), options=options)
        for found in good
    ]
    for example in examples:
        if fault := unmatched_braces(example):
            raise DataError(f"{example.path.name}: {fault}")
    _check_captions(examples, template, words, path)
    counted = f"{pluralize(len(examples), 'image')} in {name}{ignored_summary(listing.ignored)}"
    numbers = [found.path.name for found in good if is_caption_meaningless(found, template)]
    unused = trigger and unused_trigger_note(examples, trigger)
    notes = [
        *([counted] if listing.ignored or bad else []),
        *(f"left out: {reason}" for reason in bad.values()),
        *listing.notes,
        *group_notes(note for found in good for note in found.caption.notes),
        *caption_lines_notes(good, template, by_line, of_class=words is None),
        *wildcards_notes(examples, options.wildcards, of_class=words is None),
        *_mask_notes(path, examples, mask),
        *([meaningless_captions_note(numbers, template or "", trigger)] if numbers else []),
        *([f"{unused} to add it"] if unused else []),
    ]
    return ExampleSet(tuple(examples), (*listing.ignored, *left_out), tuple(dict.fromkeys(notes)), skip_bad)


def make_example(
    found: ListedPicture,
    *,
    template: str | None,
    trigger: str | None,
    mask: MaskSource,
    by_line: bool = False,
    options: Options,
) -> Example:
    """A listed picture as one to learn from."""
    if template and trigger:
        template = template.replace(PLACEHOLDER, "{trigger}")
    texts = found.caption.text.split("\n") if by_line else [found.caption.text]
    whole = [_filled(text, found.path, template, trigger) for text in texts]
    # Which tags the marks keep depends on the alternatives that are chosen.
    filled = [(text, None) if options.wildcards else strip_keep_separator(text, options) for text in whole]
    caption, *further = dict.fromkeys(text for text, _ in filled)
    return Example(
        found.path,
        caption,
        found.repeats,
        found.mask if mask == "files" else None,
        mask == "alpha",
        options,
        checksums=found.checksums,
        template=first_template(template) if template and options.wildcards else template,
        trigger=trigger,
        further=tuple(further),
        kept_tags={text: kept for text, kept in filled if kept},
    )


def _filled(text: str, picture: Path, template: str | None, trigger: str | None) -> str:
    """The picture's caption of this text; empty if it has none. The placeholder in it becomes the trigger."""
    text = normalize_spaces(text.replace(PLACEHOLDER, trigger) if trigger else text)
    if template is None:
        return text
    takes_words = not text and "{caption}" in template
    return fill_template(template, words_in_name(picture.stem) if takes_words else text, trigger)


def no_images_message(path: Path, ignored: Sequence[Ignored]) -> DataError:
    """What to say of a folder without pictures; of those below it that hold some, to name one of them."""
    if below := [entry.name for entry in ignored if entry.reason == FOLDER_OF_PICTURES]:
        return DataError(
            f"{path}: no images in it, but in its folders {format_list(below)}. Name one of them, list them in a "
            'dataset.toml, or call them "10_sks dog", whose images come 10 times an epoch as "sks dog".'
        )
    if deeper := [entry.name for entry in ignored if entry.reason == FOLDER_OF_REPEATS]:
        return DataError(
            f"{path}: no images in it, but in folders with repeats within {format_list(deeper)}. Name that "
            f"folder, as in "
            f"--images {path / deeper[0]}."
        )
    return DataError(f"{path}: no images in it{ignored_summary(ignored)}. Put PNG or JPEG files there.")


def no_masks_message(path: Path) -> DataError:
    """What to say of a folder without masks where they were asked for."""
    return DataError(
        f"{path}: no masks in it. Put NAME.mask.png beside NAME.png, or masks/NAME.png; to learn its images whole, "
        'write mask = "none" in its source of a dataset.toml.'
    )


def no_subject_message(path: Path) -> DataError:
    """What to say of pictures of which none is to be learned."""
    return DataError(
        f"{path}: has no images to learn, but of a class or for validation only. Name a source without class = true "
        "and validation = true."
    )


def unreadable_pictures(pictures: Sequence[ListedPicture]) -> dict[Path, str]:
    """The pictures whose header tells that they cannot be learned from, and the whole reason."""
    bad: dict[Path, str] = {}
    for picture, label in zip(pictures, unique_labels([picture.path for picture in pictures]), strict=True):
        try:
            read_size(picture.path)
        except DataError as error:
            bad[picture.path] = replace_label(str(error), picture.path, label)
    return bad


def truncated_captions_note(ends: Mapping[str, str], limit: int, *, varies: bool = False) -> str:
    """What to say of captions of which no more than `limit` tokens are read; empty for none.

    ends: by whose caption it is, what is cut of it. varies: whether its tags change places, so that others are cut.
    """
    if not ends:
        return ""
    name, end = next(iter(ends.items()))
    if len(ends) == 1:
        found = f"{name}: the caption is longer than {limit} tokens; its end is not seen: ... {truncate_text(end)!r}"
    else:
        found = (
            f"{len(ends):,} captions are longer than {limit} tokens; their ends are not seen, such as of {name}: ... "
            f"{truncate_text(end)!r}"
        )
    return f"{found}{'; others where the tags change places' if varies else ''}{truncation_hint(limit)}"


def unique_labels(paths: Sequence[Path]) -> list[str]:
    """Each file's name; of several with one name, the path from the folder on that holds all the files."""
    names = [path.name or path.resolve().name for path in paths]
    counts = Counter(names)
    if len(counts) == len(names):
        return names
    # Sources may be named from here on and from the root on.
    whole = [Path(os.path.abspath(path)) for path in paths]
    try:
        shared = os.path.commonpath([path.parent for path in whole])
    except ValueError:  # two drives
        return [path.as_posix() for path in whole]
    return [
        path.relative_to(shared).as_posix() if counts[name] > 1 else name
        for path, name in zip(whole, names, strict=True)
    ]


def replace_label(text: str, path: Path, label: str) -> str:
    """A line that begins with a file's name, with its label instead."""
    return f"{label}{text.removeprefix(path.name)}" if text.startswith(f"{path.name}: ") else text


def unused_trigger_note(examples: Sequence[Example], trigger: str) -> str:
    """What to say of a trigger that no caption holds, by their template; empty where one does."""
    if any(has_phrase(trigger, caption, plural=True) for example in examples for caption in example.said):
        return ""
    own = (example.template for example in examples if example.template and example.group == "instance")
    template = next(own, "{caption}")
    return f'no caption holds the trigger {trigger!r}; pass --caption "{template}, {{trigger}}"'


def missing_trigger_note(captions: Iterable[tuple[str, str]]) -> str:
    """What to say of those of (picture's name, caption) in which [trigger] is left; empty for none."""
    if names := [name for name, caption in captions if PLACEHOLDER in caption]:
        held = f"{pluralize(len(names), 'caption holds', 'captions hold')} {PLACEHOLDER}"
        return f"{held}, and there is no trigger: {format_list(names)}; pass --trigger WORD"
    return ""


def refuse_bad_pictures(reasons: Sequence[str], total: int, skip: bool | None, where: str = "") -> None:
    """End with the bad pictures' names and reasons, unless they may be skipped and some are left. skip: None where
    there is no option for that."""
    if not reasons or (skip and len(reasons) < total):
        return
    shown = "; ".join(reason.rstrip(".") for reason in reasons[:3])
    more = f"; and {len(reasons) - 3} more" if len(reasons) > 3 else ""
    otherwise = "." if skip is None else ", or pass --skip-bad to go on without them."
    advice = "None is left to learn from." if skip else f"Mend or remove them{otherwise}"
    raise DataError(f"{len(reasons)} of {total} images{where} cannot be learned from: {shown}{more}. {advice}")


def _check_captions(examples: Sequence[Example], template: str | None, words: str | None, folder: Path) -> None:
    missing = [example.path.name for example in examples if not example.caption]
    if not missing:
        return
    shown = format_list(missing)
    if template is not None:
        raise DataError(f"{shown}: the caption is empty once put into {template!r}. Put words into the template.")
    own = own_name_note(folder) if folder == examples[0].path.parent else ""
    ways = ["write NAME.txt beside each", f'list them as "text" in {METADATA_FILE}']
    ways += [f'give their source words = "{words or "a dog"}"']
    ways += [] if words is None else [f"pass {template_note(missing, examples[0].trigger, words)}"]
    at = next(example.path.parent for example in examples if not example.caption)
    raise DataError(
        f"{len(missing)} of {len(examples)} images have no caption: {shown}. {caption_command(at)} writes them; or "
        f"{', '.join(ways[:-1])}, or {ways[-1]}." + (f" {own}." if own else "")
    )


def template_note(names: Sequence[str], trigger: str | None, words: str = "") -> str:
    """How --caption gives captions, which hold these words, to pictures of these names. The names of a camera say
    nothing of a picture."""
    same = f'--caption "{words or trigger or "a dog"}" as the caption of all'
    if all(is_meaningless_name(Path(name).stem) for name in names):
        return same
    before = f"{words}, " if words else ""
    return f'--caption "{before}{{caption}}" to take the words of the file names, or {same}'


def is_caption_meaningless(found: ListedPicture, template: str | None) -> bool:
    """Whether the template takes for the picture's caption the words of a name that says nothing."""
    takes = template is not None and "{caption}" in template
    return takes and not found.caption.text and is_meaningless_name(found.path.stem)


def meaningless_captions_note(names: Sequence[str], template: str, trigger: str | None) -> str:
    """What to say of pictures with such names in the place of captions. template: what takes them."""
    same = trigger if trigger and template == "{caption}" else template.replace("{caption}", "a dog")
    found = pluralize(len(names), "caption is a name of a file that says", "captions are names of files that say")
    return (
        f"{found} nothing, such as {words_in_name(Path(names[0]).stem)!r}; write "
        f'captions, or pass --caption "{same}" as the caption of all'
    )


NO_LINES = "caption_lines changes nothing: no caption has several lines"


def caption_lines_notes(
    pictures: Sequence[ListedPicture], template: str | None, by_line: bool | None, *, of_class: bool
) -> Iterator[str]:
    """What to say of captions of several lines where by_line is unset, or that there are none of those it is for.

    of_class: whether --caption-lines is not for these pictures.
    """
    read = template is None or "{caption}" in template
    several = [found.caption.origin for found in pictures if read and "\n" in found.caption.text]
    if by_line and not several:
        yield NO_LINES
    elif several and by_line is None:
        counted = pluralize(len(several), "caption of several lines is", "captions of several lines are")
        how = "caption_lines = true in the source of their class" if of_class else "--caption-lines"
        yield f"{counted} read as one, such as {several[0]}; with {how} each line is a caption of its own"


NO_WILDCARDS = "wildcards changes nothing: no caption holds any, such as {red|blue}"
_ALTERNATIVES = re.compile(r"\{[^{}]*\|[^{}]*\}")


def wildcards_notes(examples: Sequence[Example], asked: bool | None, *, of_class: bool) -> Iterator[str]:
    """What to say of captions with {a|b} where wildcards are neither asked for nor refused, or that there are none.

    of_class: as of `lines_notes`.
    """
    told = [(each.path.name, text) for each in examples for text in each.captions]
    if asked and not any(re.search(r"[{}]", text) for _, text in told):
        yield NO_WILDCARDS
    elif asked is None and (found := [(name, here[0]) for name, text in told if (here := _ALTERNATIVES.search(text))]):
        name, letters = found[0]
        counted = pluralize(len(found), "caption has", "captions have")
        how = "wildcards = true in the source of their class" if of_class else "--wildcards"
        yield (
            f"{counted} braces that are read as letters, such as {truncate_text(letters)!r} of {name}; with {how} each "
            "sample has one of the alternatives"
        )


def unmatched_braces(example: Example) -> str:
    """What to say of a picture whose caption has wildcards that do not end or begin; empty for one that has none."""
    faults = map(wildcards.wildcard_fault, example.captions) if example.options.wildcards else ()
    return next((f"its caption has {fault}" for fault in faults if fault), "")


def merge_notes(sources: Iterable[tuple[Container[str], Iterable[str]]]) -> list[str]:
    """The notes of several sources, each once. sources: of each what it would say if what it asks for changed nothing,
    and its notes. That is said where it holds of all that ask for it."""
    each = [(asked, list(notes)) for asked, notes in sources]
    joined = dict.fromkeys(note for _, notes in each for note in notes)
    return [note for note in joined if not any(note in asked and note not in notes for asked, notes in each)]


def _mask_notes(root: Path, examples: Sequence[Example], mask: MaskSource) -> Iterator[str]:
    if mask != "files":
        return
    without = [example.path.name for example in examples if example.mask is None]
    if len(without) == len(examples):
        raise no_masks_message(root)
    if without:
        found = pluralize(len(without), "image has", "images have")
        yield f"{found} no mask, learned whole: {', '.join(without[:3])}"


def no_alpha_note(names: Sequence[str]) -> str:
    """What to say of pictures whose alpha was to be their mask, and that have none."""
    found = pluralize(len(names), "image has", "images have")
    return f"{found} no transparent part, learned whole: {format_list(list(names), 4)}"


def ignored_summary(ignored: Sequence[Ignored]) -> str:
    """ ", 2 ignored: a (reason), b (reason)"; empty for none."""
    if not ignored:
        return ""
    shown = format_list([f"{entry.name} ({entry.reason.rstrip('.')})" for entry in ignored], 5)
    return f", {len(ignored)} ignored: {shown}"
