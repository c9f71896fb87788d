"""Plain things that no training is about: what they become tells what is lost beside what is learned."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.data.captions import fill_template
from sfumato.words.placeholders import holds

UNRELATED = ("a ball", "a dog", "a house", "a car", "a tree", "a chair", "a bird", "a cup")
"""Plain things that any base can draw: samples show some, and all are prompts for the drift."""


def unrelated_to(prompts: Sequence[str]) -> list[str]:
    """The plain things without those that one of the prompts is about, as "a dog" is of no use beside the class dog."""
    found = [thing for thing in UNRELATED if not any(holds(thing.split()[-1], prompt) for prompt in prompts)]
    return found or list(UNRELATED)


def default_prompts(captions: Sequence[str], template: str | None, trigger: str | None) -> list[str]:
    """Two captions, and two plain things put into the caption template; none twice."""
    form = template or ("{caption}, {trigger}" if trigger else "{caption}")
    unseen = [fill_template(form, thing, trigger) for thing in UNRELATED[:2]]
    return list(dict.fromkeys([*captions[:2], *unseen]))
