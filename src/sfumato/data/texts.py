"""Captions -> embeddings, computed once: in memory or in the cache, or in the loop for what could not be foreseen."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.data.cache import Cache, Entry, key_of, weights_digest
from sfumato.errors import DataError

if TYPE_CHECKING:
    from sfumato.bases import Base, TextEmbedding

MOST_BYTES = 2**31
"""Of embeddings in memory; with a cache they stay on disk."""
_AT_A_TIME = 32
_REMEMBERED = 256


class CaptionEmbeddings:
    """The embeddings of some captions; "" is what guidance calls no prompt, which is not the same for every family.

    Embeddings that were not computed beforehand are computed when they are asked for, and the latest are remembered.
    """

    def __init__(self, base: Base, cache: Cache | None):
        self._base, self._cache = base, cache
        self._empty = base.unconditional(1).to("cpu")
        self._rows: dict[str, TextEmbedding | Entry] = {"": self._empty}
        self._late: dict[str, TextEmbedding] = {}
        self._digest: str | None = None

    def fits(self, prompts: Collection[str], *, cached: bool = True) -> bool:
        """Whether those of so many can be kept: in the cache, if there is one and it is to have them, or in memory."""
        if self._cache is not None and cached:
            return True
        room = MOST_BYTES // self._chunk_bytes
        if len(prompts) > room:  # each is a chunk or more; to count them takes long
            return False
        return all(chunks <= room for chunks in accumulate(map(self._base.chunk_count, prompts)))

    @property
    def _chunk_bytes(self) -> int:
        pooled = self._empty.pooled
        return self._empty.hidden.nbytes + (0 if pooled is None else pooled.nbytes)

    def compute(
        self, prompts: Iterable[str], progress: Callable[[int, int], None] | None = None, *, cached: bool = True
    ) -> None:
        """Embed what is not embedded yet, and keep it. progress: told how many of how many are done. cached: as of
        `fits`."""
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows]
        for start in range(0, len(missing), _AT_A_TIME):
            some = missing[start : start + _AT_A_TIME]
            self._rows |= dict(self._stored(some) if cached else zip(some, self._encoded(some), strict=True))
            if progress:
                progress(min(start + _AT_A_TIME, len(missing)), len(missing))

    def _stored(self, prompts: Sequence[str]) -> Iterable[tuple[str, TextEmbedding | Entry]]:
        if self._cache is None:
            yield from zip(prompts, self._encoded(prompts), strict=True)
            return
        keys = {prompt: self._key(prompt) for prompt in prompts}
        found = {prompt: self._cache.find("text", key) for prompt, key in keys.items()}
        missing = [prompt for prompt in prompts if found[prompt] is None]
        if missing:
            for prompt, row in zip(missing, self._encoded(missing), strict=True):
                found[prompt] = self._cache.write("text", keys[prompt], _tensors(row))
        for prompt in prompts:
            entry = found[prompt]
            assert entry is not None
            yield prompt, entry

    def _encoded(self, prompts: Sequence[str]) -> list[TextEmbedding]:
        with torch.no_grad(), warnings.catch_warnings():
            # What is cut is said in the notes, before training.
            warnings.filterwarnings("ignore", message="prompt of")
            rows = [row.to("cpu") for row in self._base.encode_apart(prompts)]
        return [_copied(row) for row in rows]  # so that none keeps the others' memory

    def _key(self, prompt: str) -> str:
        base: Any = self._base
        if self._digest is None:
            self._digest = weights_digest(getattr(base, "text_encoders", ()))
        tokenizers = getattr(base, "tokenizers", ())
        # With their padding, which is not masked.
        ids = [[*chain(*base.chunk_ids(tokenizer, prompt))] for tokenizer in tokenizers]
        return key_of(
            kind="text",
            prompt=prompt,
            ids=ids,
            words=[_word_rows(tokenizer, number, ids[number]) for number, tokenizer in enumerate(tokenizers)],
            weights=self._digest,
            limit=base.token_limit,
            skip=getattr(base, "clip_skip", None),
            torch=torch.__version__,
        )

    def __getitem__(self, prompts: Sequence[str]) -> TextEmbedding:
        """The prompts' embeddings, on the CPU."""
        late = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._rows and prompt not in self._late]
        if late:
            self._late |= dict(zip(late, self._encoded(late), strict=True))
        rows = [self._row(prompt) for prompt in prompts]
        while len(self._late) > _REMEMBERED:
            self._late.pop(next(iter(self._late)))
        return type(self._empty).cat(rows)

    def _row(self, prompt: str) -> TextEmbedding:
        row = self._rows.get(prompt)
        if row is None:
            return self._late[prompt]
        if isinstance(row, Entry):
            try:
                tensors = row.tensors()
            except DataError:  # somebody emptied the cache meanwhile
                del self._rows[prompt]
                (self._late[prompt],) = self._encoded([prompt])
                return self._late[prompt]
            return type(self._empty)(tensors["hidden"], tensors.get("pooled"))
        return row


def _word_rows(tokenizer: Any, number: int, ids: Sequence[int]) -> list[list[float]]:
    """The vectors of the ids that are new words' (`sfumato.words.in_use.Words`), in order: no weight holds them."""
    return [
        words.rows[number][token - words.first[number]].tolist()
        for token in ids
        for words in getattr(tokenizer, "_sfumato_words", ())
        if 0 <= token - words.first[number] < len(words.rows[number])
    ]


def _tensors(row: TextEmbedding) -> dict[str, Tensor]:
    return {"hidden": row.hidden} | ({} if row.pooled is None else {"pooled": row.pooled})


def _copied(row: TextEmbedding) -> TextEmbedding:
    return type(row)(row.hidden.clone(), None if row.pooled is None else row.pooled.clone())
