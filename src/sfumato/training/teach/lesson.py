"""What `sfumato teach` makes of pictures and a name: a style, a subject or a word, and why.

The rule uses only what can be known without a model: the name, the captions, and the files' names. What a picture
looks like does not tell sixteen drawings by one hand from sixteen drawings of one thing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from sfumato.adapters.embeddings.tokens import is_common_word
from sfumato.data.captions import is_meaningless_name, words_in_name
from sfumato.errors import ConfigError
from sfumato.models.prompts.syntax import has_phrase
from sfumato.utils.formatting import pluralize

Kind = Literal["style", "subject", "word"]
IDENTIFIER = "sks"
"""The customary word for one subject, which means nothing yet."""
FEWEST_OF_A_STYLE = 8
"""Differently named pictures that are taken for a style. Fewer may as well be one thing at several places."""
_LONGEST_IDENTIFIER = 5
_WORD = re.compile(r"<[^<>\s]+>")


@dataclass(frozen=True)
class Named:
    """A picture in words. caption: its own, or empty. words: of its file's name, or empty if that is a number."""

    caption: str
    words: str

    @property
    def text(self) -> str:
        """What is known of it."""
        return self.caption or self.words


@dataclass(frozen=True)
class Lesson:
    """What is to be learned. name: as the person said it. reason: of the kind, in one clause. trigger: what a prompt
    says to call it up; empty for a style, which the adapter brings by itself. of_class: what a subject is, or the plain
    words for what a new word stands for; else empty."""

    kind: Kind
    name: str
    reason: str
    trigger: str = ""
    of_class: str = ""

    @property
    def slug(self) -> str:
        """The name for files and folders."""
        return slug_of(self.name)


def slug_of(name: str) -> str:
    """The name with - for what files and shells take amiss. Raises ConfigError if nothing is left of it."""
    found = re.sub(r"[^\w]+", "-", name).strip("-_").lower()
    if not found:
        raise ConfigError(f"NAME {name!r}: it has no letter; give a name such as line-style, dog or <dog>.")
    return found


def named_pictures(captions: Sequence[str], stems: Sequence[str]) -> list[Named]:
    """Of each picture its own caption, empty if it has none, and its file's name without the ending."""
    return [
        Named(caption, "" if is_meaningless_name(stem) else words_in_name(stem))
        for caption, stem in zip(captions, stems, strict=True)
    ]


def lesson_of(name: str, pictures: Sequence[Named], said: Kind | None) -> Lesson | None:
    """The lesson, or None if it cannot be told. said: the kind that the person named.

    The rule: a name in angle brackets is a word, a name that says "style" is a style; captions or file names that all
    say the name are of one subject; eight or more that all say different things are of one style.
    """
    kind, reason = (said, f"you said so (--{said})") if said else _told(name, pictures)
    if kind is None:
        return None
    texts = [each.text for each in pictures]
    if kind == "style":
        return Lesson("style", name, reason)
    plain = _plain(name)
    identifier, of_class = _split(plain)
    said_in_all = next((p for p in (f"{identifier} {of_class}", plain) if _in_all(p, texts)), "")
    if kind == "word":
        token = name if _WORD.fullmatch(name) else f"<{slug_of(name)}>"
        return Lesson("word", name, reason, token.lower(), said_in_all or plain)
    return Lesson("subject", name, reason, f"{identifier} {of_class}", of_class)


def _told(name: str, pictures: Sequence[Named]) -> tuple[Kind | None, str]:
    """The kind and its reason; (None, "") if it cannot be told."""
    if _WORD.fullmatch(name):
        return "word", f"{name} is in angle brackets"
    if has_phrase("style", name):
        return "style", f'the name "{name}" says so'
    texts = [each.text for each in pictures]
    what = "caption" if all(each.caption for each in pictures) else "name"
    every = f"each of the {pluralize(len(texts), what)}" if len(texts) > 1 else f"the {what}"
    plain = _plain(name)
    if _in_all(f"{plain} style", texts):
        return "style", f'{every} says "{plain} style"'
    identifier, of_class = _split(plain)
    for phrase in (f"{identifier} {of_class}", plain):
        if _in_all(phrase, texts):
            return "subject", f'{every} says "{phrase}"'
    different = len({_key(text) for text in texts if text})
    if len(texts) >= FEWEST_OF_A_STYLE and all(texts) and different >= 0.75 * len(texts) and not _shared(texts):
        return "style", f"{pluralize(len(texts), 'picture')} are named after {different} different things"
    return None, ""


def unsure(name: str, pictures: Sequence[Named]) -> str:
    """Why the kind cannot be told, and how the person says it."""
    silent = sum(not each.text for each in pictures)
    few = len(pictures) < FEWEST_OF_A_STYLE
    found = (
        f"{pluralize(silent, 'picture')} of {len(pictures)} are called by numbers and have no caption"
        if silent
        else f'no caption or file name says "{name}", and {pluralize(len(pictures), "picture")} may be one thing '
        f"{'as well as' if few else 'or'} one style"
    )
    return f'{found}: is "{name}" a style, a subject or a word? Say --style, --subject or --word.'


def own_identifier(lesson: Lesson, pictures: Sequence[Named]) -> str:
    """The word before the class that captions use in place of ours, as "zwx" in "zwx dog"; empty for none."""
    from sfumato.adapters.embeddings.tokens import words_before_class

    captions = [each.caption for each in pictures if each.caption]
    if not captions or any(has_phrase(IDENTIFIER, caption) for caption in captions):
        return ""
    found = [word for word in words_before_class(lesson.of_class, captions) if not is_common_word(word)]
    return found[0] if len(found) == 1 else ""


def _plain(name: str) -> str:
    """The name without brackets and without "my" and articles."""
    bare = " ".join(re.sub(r"[<>]", " ", name).replace("-", " ").split())
    return re.sub(r"^(?:my|our|the|a|an)\s+(?=\S)", "", bare, flags=re.IGNORECASE)


def _split(plain: str) -> tuple[str, str]:
    """(identifier, class): "zwx dog" names both, and of others the identifier is the customary one."""
    first, _, rest = plain.partition(" ")
    rare = rest and len(first) <= _LONGEST_IDENTIFIER and not is_common_word(first.lower())
    return (first, rest) if rare else (IDENTIFIER, plain)


def _in_all(phrase: str, texts: Sequence[str]) -> bool:
    return bool(texts) and all(has_phrase(phrase, text) for text in texts)


def _key(text: str) -> str:
    return re.sub(r"[\d\W_]+", " ", text).strip().lower()


def _shared(texts: Sequence[str]) -> bool:
    """Whether all name the same thing, such as "dog 1" and "dog on a beach", by a first word in common that is none of
    the words that begin a description."""
    firsts = {_key(text).split(" ")[0] for text in texts}
    return len(firsts) == 1 and not firsts & {"a", "an", "the", "photo", "picture", "drawing", "painting", "image"}


# --- what is drawn of it on the sheet -------------------------------------------------------------------------------

_THINGS = ("crab", "penguin", "bus", "guitar", "owl", "castle", "tulip", "cat face", "teapot", "train", "snail", "key")
_POCKET_STYLES = ("blob style", "flat style", "noto style", "twemoji style")
"""That pocket was trained with."""
_PLACES = ("on a beach", "in the snow", "as an oil painting", "as a pencil drawing")
WEIGHTS = (0.0, 0.5, 0.75, 1.0)
"""Of the sheet's rows; at 0 it is the base model."""


def unseen_prompts(lesson: Lesson, texts: Sequence[str], base: str, apart: Sequence[str] = ()) -> list[str]:
    """Prompts for the sheet that training did not see. texts: the captions. apart: further prompts that it saw."""
    seen = " , ".join([*texts, *apart])
    things = [thing for thing in _THINGS if not has_phrase(thing.split()[0], seen)]
    pairs = [f"{one} and {other}" for one, other in zip(_THINGS[::2], _THINGS[1::2], strict=True)]
    things = [*things, *(pair for pair in pairs if not has_phrase(pair, seen))]
    if lesson.kind == "style":
        return things[:5]
    if base == "pocket":
        around = [f"{lesson.trigger}, {style}" for style in _POCKET_STYLES if not has_phrase(style, seen)][:2]
    else:
        around = [f"{lesson.trigger} {place}" for place in _PLACES]
    around = [lesson.trigger, *around] if lesson.trigger not in texts else around
    return [*around[:3], *things[: 5 - len(around[:3])]]
