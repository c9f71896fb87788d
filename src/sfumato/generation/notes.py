"""Lines on what of a drawing has no effect, or not the one that was meant: words, marks, adapters, guidance."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.adapters.embeddings.tokens import contains_placeholder, placeholder_pattern
from sfumato.files.metadata import clip_skip_of, embedding_files_of, prediction_type_of
from sfumato.models.prompts.syntax import escape_emphasis, unescape_emphasis
from sfumato.utils.formatting import pluralize, to_single_line

if TYPE_CHECKING:
    from sfumato.adapters.weights import Span
    from sfumato.models import Base
    from sfumato.models.prompts.syntax import Syntax


def base_mismatch_notes(told: Mapping[str, Mapping[str, str]], base: Base) -> list[str]:
    """A line on each adapter that was learned on another release of the base or one which predicts otherwise, or with
    another --clip-skip, or beside a word that is not loaded. told: the files' metadata, by label."""
    lines = []
    loaded = {token.lower() for words in getattr(base.tokenizers[0], "_sfumato_words", ()) for token in words.tokens}
    for label, metadata in told.items():
        if base.is_another_release(metadata):
            lines.append(
                f"{label}: learned on another release of {base.name}; on this one it draws something else. Train it "
                "anew."
            )
        if (kind := prediction_type_of(metadata)) and kind != base.prediction_type:
            lines.append(
                f"{label}: learned where the base predicts {kind}, and this one predicts {base.prediction_type}; "
                f"--prediction-type {kind} draws as it was learned."
            )
        skipped, drawn = clip_skip_of(metadata), base.clip_skip or 0
        if skipped is not None and skipped != drawn:
            lines.append(f"{label}: learned with --clip-skip {skipped}, and drawn with {drawn}.")
        for word, file in embedding_files_of(metadata).items():
            if word.lower() not in loaded:
                named = f"its file, {to_single_line(file)}," if file else "its file"
                lines.append(f"{label}: its word {to_single_line(word)} is not loaded; name {named} with --embedding.")
    return lines


def unguided_notes(pictures: Iterable[tuple[float, str, bool]]) -> list[str]:
    """A line on what counts for nothing in a picture without guidance. pictures: of each the guidance, the negative
    prompt and whether an adapter guidance is asked for."""
    alone = [each for each in pictures if each[0] <= 1]
    asked = ["the negative prompt"] * any(negative for _, negative, _ in alone)
    asked += ["--adapter-guidance"] * any(is_asked for _, _, is_asked in alone)
    if not asked:
        return []
    counts = "counts" if len(asked) == 1 else "count"
    return [f"guidance {alone[0][0]:g}: {' and '.join(asked)} {counts} for nothing; it takes one above 1."]


def requested_negative_notes(negatives: Iterable[str]) -> list[str]:
    """A line on each negative prompt that a file has asked for; "" is none."""
    return [
        f'the negative prompt is {negative!r}, as its file asks; --negative "" draws without.'
        for negative in dict.fromkeys(negatives)
        if negative
    ]


def skipped_module_notes(skipped: Mapping[str, int]) -> list[str]:
    """A line on each adapter of which --partial has left modules out. skipped: how many, by label."""
    return [f"{label}: {pluralize(count, 'module')} left out (--partial)." for label, count in skipped.items()]


def skipped_key_notes(skipped: Iterable[tuple[str, Sequence[str]]]) -> list[str]:
    """A line on each file of which --partial has left keys out. skipped: which, with the file's label."""
    return [
        f"{label}: {pluralize(len(keys), 'key')} left out (--partial), first {to_single_line(keys[0])}."
        for label, keys in skipped
        if keys
    ]


def unused_word_notes(files: Sequence[tuple[Path, Iterable[str]]], prompts: Sequence[str], syntax: Syntax) -> list[str]:
    """A line on each word that no prompt holds. files: with the words of each; prompts: negative ones, too."""
    said = [unescape_emphasis(text, syntax) for text in prompts]
    return [
        f"{file.name}: its word {to_single_line(token)} is in no prompt."
        for file, tokens in files
        for token in tokens
        if not any(contains_placeholder(token, text) for text in said)
    ]


def misread_word_notes(known: Iterable[str], prompts: Sequence[str], syntax: Syntax) -> list[str]:
    """A line on each of the new words in use of which A1111's syntax takes the brackets in a prompt for its own."""
    return [
        f"{to_single_line(token)}: --prompt-syntax a1111 takes its brackets for emphasis; write "
        f"{to_single_line(escape_emphasis(token))} for the "
        "word."
        for token in known
        if syntax == "a1111"
        and escape_emphasis(token) != token
        and any(contains_placeholder(token, text) for text in prompts)
    ]


# Numbers and {red|blue} fit in one way alone: fitting in several, a long prompt would take minutes.
_NUMBER = r":\s*(?:\d+(?:\.\d+)?|\.\d+)\s*"
_MARKS = re.compile(
    rf"\([^()]*[^()\d]{_NUMBER}\)|\[[^\[\]]*{_NUMBER}\]|\[[^\[\]|]*\|[^\[\]]*\]"
    r"|\(\([^()]*\)\)|\\[()\[\]]|\bBREAK\b",
    re.DOTALL,
)
"""What A1111 and ComfyUI do not take for words: weights, times, turns, brackets by which they are marked, BREAK."""
_WILDCARDS = re.compile(r"\{[^{}|]*\|[^{}]*\}|__[\w/*-]+?__")
"""Of A1111's dynamic prompts, InvokeAI's and ComfyUI's: {red|blue}, __animals__."""


def unread_syntax_notes(prompts: Sequence[str], syntax: Syntax) -> list[str]:
    """A line on the first of what other programs would not draw as words, where prompts are plain; one on ComfyUI's
    `embedding:NAME` in any syntax."""
    lines = []
    marks = [found[0] for text in prompts if (found := _MARKS.search(text))] if syntax == "plain" else []
    if marks:
        lines.append(f"{marks[0]} is drawn as letters: prompts are plain unless --prompt-syntax a1111 is given.")
    if wild := [found[0] for text in prompts if (found := _WILDCARDS.search(text))]:
        lines.append(
            f"{wild[0]} is drawn as letters: there are no wildcards. Give each prompt by itself, or draw them with "
            'sfumato grid --x "prompt=red crab|blue crab".'
        )
    if named := [found[0] for text in prompts if (found := re.search(r"\bembedding:[\w.-]+", text))]:
        lines.append(
            f"{named[0]} is drawn as letters: write the new word itself, such as <otter>, and name its file with "
            "--embedding."
        )
    return lines


def no_effect_notes(without_effect: Iterable[str]) -> list[str]:
    """A line on each adapter that draws as the base does, whatever its weight. without_effect: their labels."""
    return [
        f"{label}: all of its changes are zero, so it draws as the base does; it was not trained, or saved in a format "
        "that is too coarse for it."
        for label in without_effect
    ]


def empty_span_notes(spans: Mapping[str, Span], timesteps: Mapping[int, Sequence[float]], scheduler: Any) -> list[str]:
    """A line on each adapter whose span of the steps holds none of them. timesteps: of a drawing, by its steps."""
    from sfumato.compose.schedules import Ramp, progress_of

    lines = []
    for label, span in spans.items():
        within = Ramp.within(span.start, span.end, 1.0)
        for steps, each in timesteps.items():
            if not any(within(progress_of(float(timestep), scheduler)) for timestep in each):
                lines.append(
                    f"{label}: its span {span.start:g}-{span.end:g} holds none of {pluralize(steps, 'step')}, so that "
                    "it counts for nothing; more --steps or a wider --over-steps brings it in."
                )
    return lines


def unknown_word_notes(prompts: Sequence[str], known: Iterable[str], base: Base) -> list[str]:
    """A line on each "<word>" of the prompts, as textual inversions are spelt, that no file brings.

    known: the new words in use. Those of the base's own vocabulary are no new ones.
    """
    known = list(known)
    loaded = "|".join(map(placeholder_pattern, known)) or r"(?!)"  # <s0><s1> may be one word
    unread = [re.sub(loaded, " ", text, flags=re.IGNORECASE) for text in prompts]
    found = dict.fromkeys(word for text in unread for word in re.findall(r"<[^\s<>:|]+>", text))
    spelt = [word for word in found if re.search(r"\w", word)]
    own = base.tokenizers[0].get_vocab() if spelt else {}  # a large table, for which the tokenizer takes its time
    return [
        f"{to_single_line(word)}: no file brings this word, so its letters are read one by one; name its file "
        f"with --embedding."
        for word in spelt
        if word not in own and not any(contains_placeholder(token, word) for token in known)
    ]
