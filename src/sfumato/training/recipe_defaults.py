"""What a trainer takes where nothing is said: the recipes with which the figures of the README were measured.

A LoRA learns a style, a subject or a new word, each of which wants other settings. They were measured on the pocket
base; elsewhere only those count that hold for any base, and the layers are those that users of sd-scripts expect, since
all layers at rank 32 take much more memory and disk of a large U-Net.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

from sfumato.errors import ConfigError, DataError
from sfumato.utils.formatting import format_list
from sfumato.utils.text_files import read_toml

if TYPE_CHECKING:
    from sfumato.data import ExampleSet
    from sfumato.runs.options import FolderOptions
    from sfumato.training.options import DataOptions

Learned = Literal["style", "subject", "word", "plain"]
EVERYDAY_THINGS = (
    *("cat", "fish", "rose", "mountain", "bread", "bicycle", "ship", "cloud", "mushroom", "guitar", "door", "umbrella"),
)
"""Prompts of many kinds that a subject leaves as the base draws them. Without them all that is drawn comes to look like
the subject."""
NAMED = "{caption}"
"""The template of a style's captions: the things alone, also by the names of their files. The adapter itself brings the
style, and the base reads its prompts as before."""

PLAIN: Mapping[str, Any] = MappingProxyType(
    {
        "targets": "cross-attention",
        "flip": False,
        "adapter_guidance": 0.0,
        "crossed_share": 0.0,
        "own_negative": False,
        "prior_prompts": (),
    }
)
"""What holds where a recipe says nothing, and of runs before 0.28."""

_ON_POCKET: Mapping[Learned, Mapping[str, Any]] = MappingProxyType(
    {
        # A style shows in every layer that draws, and at rank 16 and a scale of 1 it is only half learned. Guidance
        # strengthens it if it leads away from what the base draws without the adapter. Its later steps see images that
        # are still half the base's, and so do crossed samples.
        "style": {
            **{"targets": "everything", "rank": 32, "flip": True, "caption": NAMED},
            **{"adapter_guidance": 2.0, "crossed_share": 0.5},
        },
        # A subject kept its shape in a mix with all blocks adapted, and lost it with cross-attention alone.
        "subject": {"targets": "everything", "prior_prompts": EVERYDAY_THINGS},
        # With the word itself as the negative prompt, the style that a prompt names counts for more.
        "word": {"targets": "everything", "own_negative": True},
        "plain": {},
    }
)
_ELSEWHERE: Mapping[Learned, Mapping[str, Any]] = MappingProxyType(
    {
        "style": {"targets": "transformers", "flip": True, "caption": NAMED},
        "subject": {"targets": "transformers", "prior_prompts": EVERYDAY_THINGS},
        "word": {"targets": "transformers"},
        "plain": {},
    }
)
STYLE_SCALE = 2.0
"""alpha / rank of a style's LoRA on pocket."""


def of_run(config: FolderOptions) -> Mapping[str, Any] | None:
    """The config of the run that goes on, which keeps what was chosen for it; None where none does, or it is gone."""
    if not config.resume:
        return None
    try:
        return read_toml(config.output / "config.toml")
    except (OSError, ConfigError):
        return None


def learned_by(config: Any) -> Learned | None:
    """What a LoRA learns: --learn, or a word where --train-words names one, a subject where --trigger or
    --prior-prompts is given, else a style. None for a run that a version before 0.28 began, which chose nothing."""
    if config.learn is not None:
        learned: Learned = config.learn
        return learned
    if (run := of_run(config)) is not None:
        return run.get("learn")
    if config.train_words:
        return "word"
    return "subject" if config.prior_prompts or config.trigger else "style"


def without_empty(prompts: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """The prompts without those of no words: a command line has no other way to say that there are none."""
    return None if prompts is None else tuple(prompt for prompt in prompts if prompt.strip())


def lora_defaults(learned: Learned | None, family: str) -> dict[str, Any]:
    """Option -> value, of what this kind of LoRA takes on a base of the family."""
    recipes = _ON_POCKET if family == "pocket" else _ELSEWHERE
    return {**PLAIN, **recipes[learned or "plain"]}


def is_plain(config: Any, name: str) -> bool:
    """Whether the option has the value of no recipe, which need not be told."""
    return name in PLAIN and bool(getattr(config, name) == PLAIN[name])


def style_scale(learned: Learned | None, family: str) -> float:
    """alpha / rank, where none is given."""
    return STYLE_SCALE if learned == "style" and family == "pocket" else 1.0


def read_named(config: DataOptions, **asked: Any) -> ExampleSet:
    """The examples of a style: images without captions have the words of their files' names. asked: as of
    `DataOptions.read_examples`.

    Raises DataError where such a name says nothing, as a camera's: nobody asked to learn that.
    """
    from sfumato.data.captions import caption_command, is_meaningless_name, words_in_name

    examples = dataclasses.replace(config, caption=NAMED).read_examples(**asked)
    paths = [
        each.path
        for each in examples.in_group("instance")
        if is_meaningless_name(each.path.stem) and each.caption == words_in_name(each.path.stem)
    ]
    if paths:
        names = format_list([path.name for path in paths])
        raise DataError(
            f"{len(paths)} of {len(examples.in_group('instance'))} images have no caption, and their names say "
            f"nothing: {names}. {caption_command(paths[0].parent)} writes captions; or pass --caption "
            '"a dog" as the caption of all.'
        )
    return examples
