"""New words that learn in a training: beside an adapter (pivotal tuning), or alone (Textual Inversion)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sfumato.adapters.embeddings.added_tokens import Words
from sfumato.training.additions.interface import Addition, Training


class NewWords(Addition):
    """The vectors of new words.

    rate: the peak learning rate of words that learn beside an adapter; None for words that are all that is trained.
    keep_scale: whether vectors are kept at a usual length. first: steps in which they learn alone, and after which the
    adapter does; 0: both learn throughout.
    """

    def __init__(
        self, training: Training, words: Words, rate: float | None, *, keep_scale: bool = True, first: int = 0
    ):
        self.training, self.words, self.rate = training, words, rate
        self.keep_scale, self.first = keep_scale, first

    @classmethod
    def of(cls, training: Training) -> NewWords | None:
        if training.words is None:
            return None
        config = training.config
        rate = None if training.trained is training.words else config.word_learning_rate
        keep_scale, first = getattr(config, "keep_scale", True), getattr(config, "words_first", 0)
        return cls(training, training.words, rate, keep_scale=keep_scale, first=first)

    def parameters(self) -> Sequence[nn.Parameter]:
        return [] if self.rate is None else list(self.words.parameters())

    def groups(self) -> list[dict[str, Any]]:
        return [] if self.rate is None else [{"params": self.parameters(), "lr": self.rate, "is_table": True}]

    def kept(self) -> Mapping[str, Any]:
        return {"words": self.words}

    def before_step(self, step: int) -> None:
        """The adapter's turn begins beside the words as they will be saved."""
        if not self.first:
            return
        self.training.trained.requires_grad_(step >= self.first)
        self.words.requires_grad_(step < self.first)
        if step == self.first:
            self.training.added.settle(self.words.parameters())

    def after_gradients(self) -> None:
        self.words.zero_missing_gradients()

    def after_step(self) -> None:
        if self.keep_scale:
            self.words.keep_scale()

    def close(self) -> None:
        self.words.remove()
