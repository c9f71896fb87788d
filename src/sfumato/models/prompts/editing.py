"""Words of a prompt that change between the steps of a picture, as A1111 writes them.

`[crab:otter:0.4]` asks for a crab in the first two fifths of the steps and for an otter in the others, `[in fog:0.4]`
says its words from then on and `[in fog::0.4]` until then. A number without a point counts steps: `[crab:otter:10]`.
`[crab|otter]` takes turns, a step each. All of them nest. Importing this loads no torch.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import get_ident
from typing import TYPE_CHECKING, Any

from sfumato.models import calls

if TYPE_CHECKING:
    from torch import nn

    from sfumato.models import TextEmbedding

Part = str | Callable[[int, int], Sequence["Part"]]
"""What a part of a prompt says: a text, or by (step, counted from 1, of so many) the parts that it is then."""

_CLOSING = {"[": "]", "(": ")"}
"""What closes each bracket."""
_TOKENS = re.compile(r"\\.|[\[\]():|]|[^\\\[\]():|]+|\\", re.DOTALL)
_WHEN = re.compile(r"\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?\s*", re.IGNORECASE)
"""A number as A1111's grammar has it: `[a:b:-1]` says b from the first step on."""


def prompt_stages(prompt: str, steps: int) -> list[tuple[int, str]]:
    """(last step, counted from 1, what is said until then), in order; one for a prompt whose words do not change.

    Emphasis, brackets that do not pair and characters after a backslash are left as they are.
    """
    parts = _parsed(prompt)
    found: list[tuple[int, str]] = []
    for step in range(1, steps + 1):
        text = _text(parts, step, steps)
        if found and found[-1][1] == text:
            found.pop()
        found.append((step, text))
    return found


def has_edits(prompt: str) -> bool:
    """Whether its words change in pictures of any number of steps that Stable Diffusion takes."""
    return len(prompt_stages(prompt, 1000)) > 1


def _parsed(prompt: str) -> list[Part]:
    """The parts of the whole prompt.

    `[a:b:0.4]` is read so: `[` opens a bracket, each `:` is noted as a mark and begins another part, and when `]` comes
    the bracket has the parts a, b and 0.4 and says a or b, by the step. Its marks and its last part tell that it is a
    change and no text: see `_Bracket.said`.
    """
    open_: list[_Bracket] = [_Bracket("")]
    for token in _TOKENS.findall(prompt):
        if token in _CLOSING:
            open_.append(_Bracket(token))
        elif token == _CLOSING.get(open_[-1].opening):
            closed = open_.pop()
            open_[-1].parts[-1].extend(closed.said())
        elif token in ":|" and open_[-1].opening == "[":
            open_[-1].marks.append(token)
            open_[-1].parts.append([])
        else:
            open_[-1].parts[-1].append(token)
    while len(open_) > 1:  # what is not closed is text
        left = open_.pop()
        open_[-1].parts[-1].extend(left.as_text(closing=""))
    return open_[0].parts[0]


def _text(parts: Sequence[Part], step: int, steps: int) -> str:
    """What the parts say at a step. Brackets nest as deep as they like, which functions that call each other do not."""
    said: list[str] = []
    left = list(reversed(parts))
    while left:
        part = left.pop()
        if isinstance(part, str):
            said.append(part)
        else:
            left.extend(reversed(part(step, steps)))
    return "".join(said)


class _Bracket:
    """What stands in a bracket so far. parts: between the marks, `:` or `|`, at this bracket's own depth."""

    def __init__(self, opening: str) -> None:
        self.opening = opening
        self.parts: list[list[Part]] = [[]]
        self.marks: list[str] = []

    def said(self) -> list[Part]:
        """What the closed bracket says.

        Of `[a:b:0.4]` the marks are : and :, the parts a, b and 0.4: in a picture of 10 steps a until step 4, then b.
        """
        kinds, parts = set(self.marks), self.parts
        if kinds == {"|"}:
            return [lambda step, steps: parts[(step - 1) % len(parts)]]
        if kinds == {":"} and len(parts) <= 3 and _WHEN.fullmatch(last := _text(parts[-1], 1, 1)):
            before, after = parts[:-1] if len(parts) == 3 else ([], parts[0])
            return [lambda step, steps: before if step <= _end(last, steps) else after]
        return self.as_text(_CLOSING[self.opening])

    def as_text(self, closing: str) -> list[Part]:
        """The bracket as it is written."""
        said = list(self.parts[0])
        for mark, part in zip(self.marks, self.parts[1:], strict=True):
            said += [mark, *part]
        return [self.opening, *said, closing]


def _end(when: str, steps: int) -> int:
    """The last step before a change: a share of the steps, or a count where there is no point."""
    return int(max(0, min(float(when) * (steps if "." in when else 1), steps)))  # int() takes no infinity


@dataclass(frozen=True)
class Stage:
    """What a batch of pictures is told until a step. last: that step, counted from 1. text: of the prompts; negative:
    of what guidance leads away from. (batch, tokens, width) each.
    """

    last: int
    text: TextEmbedding
    negative: TextEmbedding


def concat_stages(pictures: Sequence[Sequence[Stage]]) -> list[Stage]:
    """The stages of several pictures, all of as many tokens, as those of one batch."""
    found = []
    for last in sorted({stage.last for told in pictures for stage in told}):
        now = [next(stage for stage in told if last <= stage.last) for told in pictures]
        cat = type(now[0].text).cat
        found.append(Stage(last, cat([stage.text for stage in now]), cat([stage.negative for stage in now])))
    return found


@contextmanager
def staged_prompts(unet: nn.Module, told: Sequence[Stage], scheduler: Any) -> Iterator[None]:
    """Within the block each call of the U-Net, for one batch of pictures, hears the stage of its step.

    scheduler: the one that draws, by whose timesteps the steps are told apart. A call has a row for each picture, or
    two, the first for the other text. Other threads' calls of the U-Net are told nothing.
    """
    thread = get_ident()
    clock = calls.StepClock()
    heard: dict[tuple[int, bool], TextEmbedding] = {}  # the same tensor each time, by which layers know a text again

    def tell(module: Any, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if get_ident() != thread:
            return args, options
        sample = calls.sample_of(args, options)
        step = clock.step(calls.timestep_of(args, options), scheduler) + 1
        stage = next((each for each in told if step <= each.last), told[-1])
        is_guided = len(sample) == 2 * len(stage.text)
        if (text := heard.get((stage.last, is_guided))) is None:
            text = type(stage.text).cat([stage.negative, stage.text]) if is_guided else stage.text
            text = heard[stage.last, is_guided] = text.to(options["encoder_hidden_states"])
        options = {**options, "encoder_hidden_states": text.hidden}
        if text.pooled is not None:
            options["added_cond_kwargs"] = {**options["added_cond_kwargs"], "text_embeds": text.pooled}
        return args, options

    with unet.register_forward_pre_hook(tell, with_kwargs=True, prepend=True):
        yield
