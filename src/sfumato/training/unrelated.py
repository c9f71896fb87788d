"""Plain things that no training is about: what they become tells what is lost beside what is learned."""

from __future__ import annotations

from collections.abc import Sequence

from sfumato.data.captions import fill_template
from sfumato.words.placeholders import holds

UNRELATED = ("a ball", "a dog", "a house", "a car", "a tree", "a chair", "a bird", "a cup")
"""Plain things that most bases can draw, prompts for the drift in this order: samples show some."""
_CLEAR = ("a dog", "a car", "a tree")
"""Those that also pocket draws so that one sees what they are: beside the others nobody could tell what a training
has cost."""


def unrelated_to(prompts: Sequence[str]) -> list[str]:
    """The plain things without those that one of the prompts is about, as "a dog" is of no use beside the class dog."""
    found = [thing for thing in UNRELATED if not any(holds(thing.split()[-1], prompt) for prompt in prompts)]
    return found or list(UNRELATED)


def clear_first(things: Sequence[str]) -> list[str]:
    """The things in the order in which samples show them: those first that any base draws."""
    return sorted(things, key=lambda thing: thing not in _CLEAR)


def default_prompts(captions: Sequence[str], template: str | None, trigger: str | None) -> list[str]:
    """Two captions, and two plain things put into the caption template; none twice."""
    form = template or ("{caption}, {trigger}" if trigger else "{caption}")
    unseen = [fill_template(form, thing, trigger) for thing in clear_first(UNRELATED)[:2]]
    return list(dict.fromkeys([*captions[:2], *unseen]))
