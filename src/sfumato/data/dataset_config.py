"""What `--images` names -> examples: a folder, or a dataset.toml that names several with their options.

    caption = "{caption}, {trigger} style"     # keys before the first [[source]] hold for all of them
    trigger = "zwx"

    [[source]]
    path = "drawings"                          # from the file's own folder on
    repeats = 4

datasets/README.md lists the keys. Imports no torch.

Pictures that are not learned from, so that the loss on them says what the learning is worth on others.

Imports no torch.
"""

import hashlib
import os
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from os.path import realpath
from pathlib import Path
from typing import Any, get_args

from sfumato.config import expand_home
from sfumato.data.captions import CAPTION_SUFFIXES, check_template
from sfumato.data.folder import NO_LINES, NO_WILDCARDS, Example, ExampleSet, Group, make_examples, merge_notes
from sfumato.data.listing import Ignored, Listing, list_folder, own_name_note
from sfumato.data.options import MaskSource, Options
from sfumato.errors import ConfigError, DataError, did_you_mean
from sfumato.utils.formatting import format_list, pluralize, quote_argument
from sfumato.utils.text_files import check_toml_path, read_toml

_OPTION_KEYS = tuple(option.name for option in fields(Options) if option.name != "resolution")
_KEYS: Mapping[str, type | tuple[type, ...]] = {
    "path": str,
    "repeats": int,
    "class": bool,
    "validation": bool,
    "caption": str,
    "trigger": str,
    "words": str,
    "caption_suffix": str,
    "caption_lines": bool,
    "wildcards": bool,
    "mask": str,
    "resolution": (int, list),
    "flip": bool,
    "crop": str,
    "caption_dropout": (int, float),
    "shuffle_tags": bool,
    "keep_tags": int,
    "tag_dropout": (int, float),
    "separator": str,
    "keep_tags_separator": str,
    "secondary_separator": str,
    "weight": (int, float),
}
_OF_THE_SUBJECT = ("caption", "trigger", "words", "caption_lines", "wildcards", "caption_dropout", "tag_dropout")
"""Keys before the first source that do not hold for pictures of a class."""
_NAMES: Mapping[type | tuple[type, ...], str] = {
    **{str: "a text", int: "a whole number", bool: "true or false", (int, float): "a number"},
    (int, list): "a whole number, or a list of some",
}


@dataclass(frozen=True)
class Source:
    """One folder of a data set. template: what captions are put into. words: the caption of pictures without one.
    by_line: each line of a caption is one of its own; unset, they are not, and that is told. read: the real paths of
    all sources' folders, so that none of them is called ignored. resolutions: at each of which its images are learned;
    none for that of the training."""

    path: Path
    repeats: int = 1
    group: Group = "instance"
    template: str | None = None
    trigger: str | None = None
    words: str = ""
    suffixes: tuple[str, ...] = CAPTION_SUFFIXES
    by_line: bool | None = None
    mask: MaskSource = "none"
    options: Options = field(default_factory=Options)
    read: frozenset[str] = frozenset()
    resolutions: tuple[int, ...] = ()

    def at_resolutions(self, example: Example) -> Iterator[Example]:
        """The example at each of the source's resolutions."""
        for resolution in self.resolutions or (example.options.resolution,):
            yield replace(example, options=replace(example.options, resolution=resolution))

    @property
    def asks(self) -> tuple[str, ...]:
        """What it would say if what it asks for changed nothing."""
        return (NO_LINES,) * bool(self.by_line) + (NO_WILDCARDS,) * bool(self.options.wildcards)

    def list(self) -> Listing:
        """The folder's files. Raises DataError as `list_folder` does."""
        listing = list_folder(self.path, words=self.words, suffixes=self.suffixes)
        pictures = tuple(replace(found, repeats=found.repeats * self.repeats) for found in listing.pictures)
        ignored = tuple(entry for entry in listing.ignored if realpath(self.path / entry.name) not in self.read)
        # A dataset.toml says repeats and words itself.
        notes = tuple(filter(None, [*listing.notes, "" if self.read else own_name_note(self.path)]))
        return replace(listing, pictures=pictures, ignored=ignored, notes=notes)


def read_folder(
    path: Path,
    *,
    caption_template: str | None = None,
    trigger: str | None = None,
    skip_bad: bool | None = False,
    mask: MaskSource = "none",
    caption_lines: bool = False,
    wildcards: bool = False,
    words: str = "",
    otherwise: str = "",
    of_class: bool = True,
) -> ExampleSet:
    """The pictures of a folder, or of the sources that a dataset.toml names, with their captions.

    A caption comes from NAME.txt, NAME.caption, metadata.jsonl, the words of a kohya folder ("10_sks dog": 10 repeats),
    or, if there is a template, from the file's name; the template is then filled with it. mask: "alpha" learns the
    opaque part, "files" what is white in NAME.mask.png or masks/NAME.png. caption_lines: each line of a caption is one
    of its own, and a sample takes any of them. wildcards: {a|b} in a caption is one of its alternatives. skip_bad:
    leave out the pictures whose header cannot be read, and (in `prepare`) those that cannot be decoded; None
    where nobody is asked whether to. words: that
    captions have to hold, to advise them where there are none. otherwise: the caption of those of the subject that have
    none. of_class: whether sources of a class are read.

    Raises DataError for no folder, no pictures, bad pictures, missing captions and braces that do not match;
    ConfigError for a bad template.
    """
    sources = read_sources(
        path,
        caption_template=caption_template,
        trigger=trigger,
        mask=mask,
        caption_lines=caption_lines,
        wildcards=wildcards,
    )
    sources = [source for source in sources if of_class or source.group != "class"]
    if otherwise:
        sources = [s if s.words or s.group == "class" else replace(s, words=otherwise) for s in sources]
    parts = [_read(source, skip_bad, words) for source in sources]
    if len(parts) == 1:
        return parts[0]
    named = list(zip(sources, parts, strict=True))
    return ExampleSet(
        tuple(example for part in parts for example in part.examples),
        tuple(Ignored(f"{s.path.name}/{entry.name}", entry.reason) for s, part in named for entry in part.ignored),
        tuple(merge_notes((source.asks, part.notes) for source, part in named)),
        skip_bad,
    )


def _read(source: Source, skip_bad: bool | None, words: str) -> ExampleSet:
    part = make_examples(
        source.list(),
        template=source.template,
        trigger=source.trigger,
        mask=source.mask,
        skip_bad=skip_bad,
        by_line=source.by_line,
        words=None if source.group == "class" else words,  # no --caption is for it
        options=source.options,
    )
    examples = [replace(example, group=source.group) for example in part.examples]
    return replace(part, examples=tuple(each for example in examples for each in source.at_resolutions(example)))


def read_sources(
    path: Path,
    *,
    caption_template: str | None = None,
    trigger: str | None = None,
    mask: MaskSource = "none",
    caption_lines: bool = False,
    wildcards: bool = False,
) -> list[Source]:
    """The folder itself, or what the dataset.toml names. Raises DataError and ConfigError."""
    if path.suffix.lower() != ".toml" or path.is_dir():
        if caption_template is not None:
            check_template(caption_template, trigger, has_wildcards=wildcards)
        options = Options(wildcards=wildcards or None)
        by_line = caption_lines or None
        return [Source(path, template=caption_template, trigger=trigger, by_line=by_line, mask=mask, options=options)]
    given = {
        "caption": caption_template,
        "trigger": trigger,
        "caption_lines": caption_lines or None,
        "wildcards": wildcards or None,
        "mask": None if mask == "none" else mask,
    }
    values = _load(path)
    entries = values.pop("source", None)
    if entries is None and "datasets" in values:
        raise ConfigError(
            f"{path.name}: a config of kohya's tools; sfumato dataset {quote_argument(str(path))} -o "
            f"dataset.toml "
            "converts it."
        )
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f'{path.name}: no sources in it; write [[source]] and path = "DIR" for each folder.')
    check_keys(values, f"{path.name}: ", known=[key for key in _KEYS if key != "path"] + ["source"])
    defaults = {key: value for key, value in given.items() if value is not None} | values
    sources = [
        parse_source({**_shared(defaults, entry), **entry}, path.parent, f"{path.name}, source {number}: ")
        for number, entry in enumerate(entries, start=1)
    ]
    read = frozenset(realpath(source.path) for source in sources)
    return [replace(source, read=read) for source in sources]


def _load(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except FileNotFoundError:
        raise DataError(
            f"{path}: there is no such file. --images wants a folder of images, or a dataset.toml."
        ) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). See to its permissions.") from None


def check_keys(values: Mapping[str, Any], where: str, known: Sequence[str] = tuple(_KEYS)) -> None:
    """Raises ConfigError, which begins with `where`, for a key that is none of `known`, or a value of another type."""
    for key, value in values.items():
        if key not in known:
            raise ConfigError(f"{where}unknown key {key!r}; {did_you_mean(key, known)}")
        kind = _KEYS[key]
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise ConfigError(f"{where}{key} is {value!r}; wanted {_NAMES[kind]}.")


def _shared(defaults: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in defaults.items() if not entry.get("class") or k not in _OF_THE_SUBJECT}


def parse_source(values: Mapping[str, Any], home: Path, where: str) -> Source:
    """The source that these keys describe, its path counted from `home`. Raises ConfigError beginning with `where`."""
    check_keys(values, where)
    if "path" not in values:
        raise ConfigError(f'{where}no path; write path = "DIR", from the folder of the dataset.toml on.')
    check_toml_path(values["path"], f"{where}path ")
    if not 1 <= values.get("repeats", 1) <= 99_999:
        raise ConfigError(f"{where}repeats is {values['repeats']}; it must be 1 to 99,999.")
    if values.get("mask", "none") not in get_args(MaskSource):
        raise ConfigError(f"{where}mask is {values['mask']!r}; wanted one of {', '.join(get_args(MaskSource))}.")
    if values.get("class") and values.get("validation"):
        raise ConfigError(f"{where}class and validation are both true; what is held out is the subject's. Give one.")
    options = Options(**{key: values[key] for key in _OPTION_KEYS if key in values})
    options.check(where)
    template, trigger = values.get("caption"), values.get("trigger")
    if template is not None:
        check_template(
            template,
            trigger,
            has_wildcards=bool(options.wildcards),
            said=f"{where}caption",
            do='write trigger = "WORD" beside it',
        )
    suffix = values.get("caption_suffix")
    if suffix is not None and not suffix.startswith("."):
        raise ConfigError(f'{where}caption_suffix is {suffix!r}; wanted an ending such as ".wd14".')
    return Source(
        home / expand_home(values["path"]),
        repeats=values.get("repeats", 1),
        group="class" if values.get("class") else "validation" if values.get("validation") else "instance",
        template=template,
        trigger=trigger,
        words=values.get("words", ""),
        suffixes=CAPTION_SUFFIXES if suffix is None else (suffix.lower(),),
        by_line=values.get("caption_lines"),
        mask=values.get("mask", "none"),
        options=options,
        resolutions=_resolutions(values.get("resolution", []), where),
    )


def _resolutions(value: Any, where: str) -> tuple[int, ...]:
    each = value if isinstance(value, list) else [value]
    for number in each:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise ConfigError(f"{where}resolution is {value!r:.60}; wanted pixels, such as 512 or [512, 768].")
    if len(set(each)) < len(each):
        raise ConfigError(f"{where}resolution is {value!r:.60}; name each once.")
    return tuple(each)


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
            f"{format_list(both)}: in a source with validation = true and in one that is learned; what is learned says "
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
    chosen = set(sorted(learned, key=lambda file: _hash_order(learned[file]))[:count])
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


def _hash_order(name: str) -> bytes:
    """Where a name comes among others, on every system: they spell accents differently."""
    return hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).digest()
