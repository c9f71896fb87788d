"""A subject and its class in words: captions of its pictures, and the prompts of what must stay as it is.

DreamBooth's instance prompt is "IDENTIFIER CLASS", its class prompt "CLASS" (Ruiz et al. 2023, section 3.2). Pictures
that have captions of their own, such as "sks otter, flat style", keep them, and the class then has "otter, flat style".
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.models.prompts.syntax import phrase_pattern

if TYPE_CHECKING:
    from sfumato.data import ExampleSet
    from sfumato.data.options import MaskSource


@dataclass(frozen=True)
class Subject:
    """prompt: what calls the subject up, such as "sks otter". of_class: the same of any one of its class: "otter"."""

    prompt: str
    of_class: str

    def class_prompts(self, captions: Sequence[str]) -> list[str]:
        """The class prompt, and each caption with the class in the subject's place; none twice.

        "Sks otter" is the subject, too, since text encoders read small letters alone.
        """
        subject = re.compile(phrase_pattern(self.prompt, plural=True), re.IGNORECASE)
        said = [subject.sub(lambda _: self.of_class, caption) for caption in captions if subject.search(caption)]
        return list(dict.fromkeys([self.of_class, *said]))

    def sample_prompts(self, captions: Sequence[str], unrelated: str) -> list[str]:
        """Two captions of the subject, the class, and something else: what to look at while training."""
        return list(dict.fromkeys([*list(dict.fromkeys(captions))[:2], self.of_class, unrelated]))


@dataclass(frozen=True)
class PreservedPrompts:
    """Prompts that shall draw as before: those of the class, and further ones. `of` lets none be there twice.

    Where there are both, each kind has half, however many prompts it has: beside a dozen everyday things the class
    would else have a thirteenth.
    """

    of_class: tuple[str, ...]
    further: tuple[str, ...] = ()

    @classmethod
    def of(cls, of_class: Iterable[str], further: Iterable[str]) -> PreservedPrompts:
        """The prompts, each once; a further one that is of the class counts as that."""
        own = tuple(dict.fromkeys(of_class))
        return cls(own, tuple(prompt for prompt in dict.fromkeys(further) if prompt not in own))

    @property
    def prompts(self) -> list[str]:
        """Each once, the class's first."""
        return [*self.of_class, *self.further]

    def interleaved(self) -> list[str]:
        """As they follow each other: one of the class, a further one; those of the shorter kind come several times."""
        if not (self.of_class and self.further):
            return self.prompts
        pairs = range(max(len(self.of_class), len(self.further)))
        kinds = (self.of_class, self.further)
        return [prompts[place % len(prompts)] for place in pairs for prompts in kinds]

    def counts(self, count: int) -> dict[str, int]:
        """Prompt -> its share of `count` pictures, of an odd one the class has more; without those that have none."""
        further = (count // 2 if self.of_class else count) if self.further else 0
        both = [*shares(count - further, self.of_class), *shares(further, self.further)]
        return {prompt: share for prompt, share in both if share}


def shares(count: int, prompts: Sequence[str]) -> list[tuple[str, int]]:
    """`count` in a share for each prompt; they differ by one at most."""
    return [(prompt, (count + len(prompts) - 1 - place) // len(prompts)) for place, prompt in enumerate(prompts)]


def read_subject(
    path: Path,
    words: str,
    *,
    template: str | None = None,
    trigger: str | None = None,
    mask: MaskSource = "none",
    caption_lines: bool = False,
    wildcards: bool = False,
    skip_bad: bool = False,
    in_all: bool = False,
    of_class: bool = True,
) -> ExampleSet:
    """The examples of a folder in which pictures without a caption have the caption `words`, or of a dataset.toml.

    caption_lines: each line of a caption is one of its own. wildcards: {a|b} in a caption is one of its alternatives.
    in_all: whether the subject's pictures have it in a dataset.toml, too, which may hold several subjects. of_class:
    whether that one's sources of a class are read. Raises as `sfumato.data.read_folder` does.
    """
    from sfumato.data import Options, read_folder
    from sfumato.data.dataset_config import Source
    from sfumato.data.folder import make_examples

    if path.suffix.lower() == ".toml" and not path.is_dir():
        return read_folder(
            path,
            caption_template=template,
            trigger=trigger,
            mask=mask,
            caption_lines=caption_lines,
            wildcards=wildcards,
            skip_bad=skip_bad,
            words=words,
            otherwise=words if in_all else "",
            of_class=of_class,
        )
    listing = Source(path, words=words).list()
    by_line = caption_lines or None
    options = Options(wildcards=wildcards or None)
    return make_examples(
        listing, template=template, trigger=trigger, mask=mask, skip_bad=skip_bad, by_line=by_line, options=options
    )


def with_caption(folder: ExampleSet, caption: str) -> ExampleSet:
    """The same pictures of the subject with this caption, whatever theirs were; those of the class as they are."""
    examples = tuple(
        example
        if example.group == "class"
        else dataclasses.replace(
            example, caption=caption, further=(), options=dataclasses.replace(example.options, wildcards=False)
        )
        for example in folder
    )
    return dataclasses.replace(folder, examples=examples)
