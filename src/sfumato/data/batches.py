"""One slice of a step's global batch, and how two are put together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sfumato.bases import Base, TextEmbedding


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


def pairs(sizes: Sequence[tuple[int, int]]) -> Tensor:
    """(batch, 2) of (height, width), from (width, height)."""
    return torch.tensor([(second, first) for first, second in sizes])
