"""What an adapter's training writes: its file, and new words inside it or in files of their own beside it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.files import describe
from sfumato.files.write_embedding import write_embedding
from sfumato.runs.folder import snapshot_name
from sfumato.words.placeholders import embedding_files

if TYPE_CHECKING:
    import torch

    from sfumato.adapters import Attached
    from sfumato.files import Description
    from sfumato.runs.run import Run
    from sfumato.training.ema import Ema
    from sfumato.words.in_use import Words


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and the words that learn with it, as they are at any step.

    about: what their files say of themselves, called with `steps` and, for files of words, `word_files`. dtype: of the
    adapter's file; words are written in fp32. average: the running mean that is written in place of the weights while
    they learn. bundle: whether words go into that file.
    """

    adapter: Attached
    words: Words | None
    family: str
    about: Callable[..., Description]
    dtype: torch.dtype
    average: Ema
    bundle: bool = False

    def keep(self, run: Run, name: str, step: int) -> None:
        """Write the adapter as it is after this step into the run's folder, beside the last one; nothing before the
        first step, and one process alone."""
        if step and run.is_main:
            with self.average.applied():
                self.write(run.folder / "adapters" / f"{snapshot_name(name, step)}.safetensors", step)

    def write(self, path: Path, steps: int) -> tuple[Description, dict[str, Path]]:
        """Write the adapter as it is now, after so many steps, with its words in it or beside it.

        Returns what its file says of itself, and the files beside it, by word.
        """
        words = self.words
        beside = word_files(path, words.tokens) if words and not self.bundle else {}
        named = {"word_files": {token: file.name for token, file in beside.items()}} if beside else {}
        description = self.about(steps=steps, **named)
        if words and beside:  # first, so that no adapter is ever there without its words
            _write_words(words, beside, description)
        self.adapter.write(
            path,
            family=self.family,
            metadata=describe(description),
            dtype=self.dtype,
            words=words.vectors() if words and self.bundle else None,
        )
        return description, beside

    def report_words(self, path: Path, beside: Mapping[str, Path], description: Description, run: Run) -> None:
        """Say where each word's file is, if it has one, and what the words are near to; add them to the card.

        path: of the adapter's file. beside: the words' files, as `write` returns them.
        """
        from sfumato.cards.words import add_words_section

        if self.words is None:
            return
        for token, file in beside.items():
            run.say(f"word     {token}  {file}")
        paths = dict(beside) or word_files(path, self.words.tokens)
        add_words_section(path.with_name("README.md"), paths, description, inside=None if beside else path)
        run.say("nearest of the base's words, by cosine:\n" + "\n".join(self.words.report()))


def word_files(path: Path, words: Iterable[str]) -> dict[str, Path]:
    """By word, its file beside the adapter's at `path`."""
    return embedding_files(path.parent, path.stem, list(words), alone=False)


def _write_words(words: Words, paths: Mapping[str, Path], description: Description) -> None:
    for token, vectors in words.vectors().items():
        metadata = describe(dataclasses.replace(description, trigger=[token], word_files={}))
        write_embedding(paths[token], token, vectors, metadata=metadata)
