"""Captions -> embeddings, computed once: in memory or in the cache, or in the loop for what could not be foreseen.

One slice of a step's global batch, and how two are put together.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sfumato.data.preparation.cache import Cache, Entry, cache_key, weights_digest
from sfumato.errors import DataError

if TYPE_CHECKING:
    from sfumato.models import Base, TextEmbedding


MAX_BYTES = 2**31
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
        room = MAX_BYTES // self._chunk_bytes
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
        return cache_key(
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
    """The vectors of the ids that are new words' (`sfumato.adapters.embeddings.added_tokens.Words`), in order: no
    weight holds them."""
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


@dataclass(frozen=True)
class Batch:
    """A slice of a step's global batch, on the base's device.

    latents: (batch, channels, height/f, width/f) fp32, sampled from the posterior. text: the captions' embeddings, None
    where they were not asked for. captions: as used, "" where dropped. mask: (batch, 1, height/f, width/f) in [0, 1],
    or None. original_sizes, target_sizes: (height, width) and crops: (top, left) in pixels, each (batch, 2). indices:
    the pictures' places in the data set. variants: which crop of each it is, and whether mirrored. weights: (batch,)
    fp32, of each sample in the loss; 1 unless a source says so. known: as of `Base.known`, for an inpainting model;
    None hides the pictures as a whole.
    """

    latents: Tensor
    text: TextEmbedding | None
    captions: list[str]
    mask: Tensor | None
    original_sizes: Tensor
    crops: Tensor
    target_sizes: Tensor
    indices: list[int]
    variants: list[int]
    weights: Tensor
    known: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    def added(self, base: Base, text: TextEmbedding) -> dict[str, Tensor] | None:
        """SDXL's further conditions for this batch; None for the other families."""
        return base.added_conditions(text, self.original_sizes, self.crops, self.target_sizes)


def concat_batches(first: Batch, second: Batch) -> Batch:
    """Both batches as one, the first one's samples first; where only one has masks, the other is learned whole.

    indices and variants stay each batch's own. Raises ValueError for latents of two shapes, and if only one has text
    embeddings, or what is known of its pictures.
    """
    if first.latents.shape[1:] != second.latents.shape[1:]:
        shapes = " and ".join(str(list(batch.latents.shape[1:])) for batch in (first, second))
        raise ValueError(f"batches of two shapes, {shapes}, cannot be one")
    if (first.text is None) != (second.text is None):
        raise ValueError("one batch has text embeddings, the other has none; prepare both with the same embed_text")
    if (first.known is None) != (second.known is None):
        raise ValueError("of one batch's pictures a part is known, of the other's nothing; prepare both alike")
    text = None
    if first.text is not None and second.text is not None:
        text = type(first.text).cat([first.text, second.text])
    masks = None
    if first.mask is not None or second.mask is not None:
        masks = torch.cat([_mask(first), _mask(second)])
    both = (first, second)
    known = None
    if first.known is not None and second.known is not None:
        known = torch.cat([first.known, second.known])
    return Batch(
        torch.cat([batch.latents for batch in both]),
        text,
        [*first.captions, *second.captions],
        masks,
        torch.cat([batch.original_sizes for batch in both]),
        torch.cat([batch.crops for batch in both]),
        torch.cat([batch.target_sizes for batch in both]),
        [*first.indices, *second.indices],
        [*first.variants, *second.variants],
        torch.cat([batch.weights for batch in both]),
        known,
    )


def _mask(batch: Batch) -> Tensor:
    if batch.mask is not None:
        return batch.mask
    return torch.ones_like(batch.latents[:, :1])


def as_height_width(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(batch, 2) of (height, width), from (width, height)."""
    return torch.tensor([(second, first) for first, second in sizes])
