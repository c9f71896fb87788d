"""Pictures ready to be learned from: batches as pure functions.

Order, crops, mirror images, captions and posterior noise depend on (seed, step, place in the global batch) alone, so
any number of processes, accumulated micro-batches or restarts sees the same samples.

Which samples a batch holds: a pure function of (seed, step, size of the global batch).
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterator, Mapping, Sequence

import torch

from sfumato.data.buckets import Size
from sfumato.data.preparation.latents import (
    Decoder,
    Encoder,
    InpaintingMasks,
    Noise,
    PreparedPicture,
    pixels_of,
    sample_latents,
)
from sfumato.data.preparation.texts import Batch, CaptionEmbeddings, as_height_width
from sfumato.data.tags import vary_caption
from sfumato.errors import DataError
from sfumato.utils import randomness


class BatchOrder:
    """The batches of one seed and one global batch size, of samples that lie together in one bucket.

    samples: the picture of each sample of an epoch, a picture with repeats several times. buckets: the bucket of each
    picture. together: how many samples of a batch are of one bucket, as a call of the U-Net wants them; it divides the
    batch. Epoch e runs through the samples by `permutation(n, seed, "order", e)`; each joins the queue of its bucket,
    and the queues that are full are the next batch, one after another: so the pictures of an accumulated step, or of
    several processes, are of several buckets. What is queued when an epoch ends stays queued, so that over time all
    samples come equally often, no batch is short and none is dropped. With one bucket that is the epochs one after
    another, cut into batches.

    Of pictures 0 to 4, of which 1 and 3 are tall, with seed 0 and batches of two:

        epoch 0 is 4 1 0 3 2    batches [4, 0] and [1, 3]; 2 stays queued
        epoch 1 is 0 3 1 2 4    batches [2, 0], [3, 1] and [2, 4]
    """

    def __init__(self, samples: Sequence[int], buckets: Sequence[object], seed: int, batch: int, together: int):
        self._samples, self._buckets = samples, buckets
        self._seed, self._batch, self._together = seed, batch, together
        self._epoch = 0
        self._queues: dict[object, list[int]] = {}
        self._full: list[int] = []

    def __getitem__(self, step: int) -> list[int]:
        """The pictures of a step's global batch. Steps may be asked for in any order."""
        while len(self._full) < (step + 1) * self._batch:
            self._next_epoch()
        return self._full[step * self._batch : (step + 1) * self._batch]

    def unseen(self, steps: int) -> int:
        """How many pictures come in none of the steps 0 to `steps`."""
        left = set(self._samples)
        for step in range(steps):
            left.difference_update(self[step])
            if not left:
                break
        return len(left)

    def _next_epoch(self) -> None:
        for place in randomness.permutation(len(self._samples), self._seed, "order", self._epoch):
            picture = self._samples[place]
            queue = self._queues.setdefault(self._buckets[picture], [])
            queue.append(picture)
            if len(queue) == self._together:
                self._full.extend(queue)
                queue.clear()
        self._epoch += 1


Known = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""As `Base.known`."""
View = tuple[int, int]
"""A picture, and which of its crops and whether mirrored."""


class Dataset:
    """What `prepare` made. len() is the number of pictures.

    notes: one line each, for the person. fingerprint: sha256 over file bytes, captions, masks, crops and options, hex.
    contents: by picture's name, digests of its files and of its caption and options, to tell two fingerprints apart.
    together: how many samples of a batch are of one size; unset, all. holes, known: of an inpainting model, what is
    hidden of its samples, and what it is told of them; None for others.
    """

    def __init__(
        self,
        items: Sequence[PreparedPicture],
        repeats: Sequence[int],
        device: torch.device,
        encoder: Encoder,
        decoder: Decoder,
        *,
        fingerprint: str,
        contents: Mapping[str, str],
        notes: Sequence[str],
        together: int | None = None,
        holes: InpaintingMasks | None = None,
        known: Known | None = None,
    ):
        self.fingerprint, self.contents, self.notes = fingerprint, contents, list(notes)
        self._items, self._device, self._encoder, self._decoder = list(items), device, encoder, decoder
        self._samples = [i for i, count in enumerate(repeats) for _ in range(count)]
        self._together, self._holes, self._known = together, holes, known
        self._orders: dict[tuple[int, int], BatchOrder] = {}
        self._texts: CaptionEmbeddings | None = None
        self._heard: Callable[[int, Batch], None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def samples(self) -> int:
        """Samples of one epoch: pictures with their repeats."""
        return len(self._samples)

    @property
    def captions(self) -> list[str]:
        """Each picture's caption; the first of those that have several, or wildcards."""
        return [item.said[0] for item in self._items]

    @property
    def names(self) -> list[str]:
        """Each picture's name, for the person."""
        return [item.name for item in self._items]

    @property
    def sizes(self) -> list[Size]:
        """Each picture's (width, height) after the crop."""
        return [item.crop.size for item in self._items]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels of a batch's latents, fp32, (batch, 3, height, width) in [-1, 1]."""
        return self._decoder(latents)

    def listen(self, heard: Callable[[int, Batch], None]) -> None:
        """Have each `batch` whose captions are used told from now on, with the size of its step's global batch."""
        self._heard = heard

    def embed(self, texts: CaptionEmbeddings) -> None:
        """Take the captions' embeddings from `texts` from now on."""
        self._texts = texts

    def share_embeddings(self, other: Dataset) -> None:
        """Take the captions' embeddings from where another data set takes them."""
        self._texts = other._texts

    def order(self, seed: int, step: int, batch_size: int) -> list[int]:
        """The pictures of a step's global batch, those of a micro-batch of one size; see
        `sfumato.data.preparation.dataset.Order`."""
        key = (seed, batch_size)
        if key not in self._orders:
            self._orders[key] = BatchOrder(self._samples, self.sizes, seed, batch_size, self._together or batch_size)
        return self._orders[key][step]

    def drawn_captions(self, seed: int, steps: int, batch_size: int) -> set[str]:
        """Every caption that the steps 0 to `steps` of a run hold."""
        return {
            self._caption(self._items[index], seed, step, place)
            for step in range(steps)
            for place, index in enumerate(self.order(seed, step, batch_size))
        }

    def batch(
        self,
        seed: int,
        step: int,
        batch_size: int,
        first: int = 0,
        count: int | None = None,
        *,
        embed_text: bool = True,
    ) -> Batch:
        """Samples `first` to `first + count` of a step's global batch of `batch_size`.

        Without `embed_text` the captions come without their embeddings.
        """
        places = range(batch_size)[first : None if count is None else first + count]
        views = self.drawn_views(seed, step, batch_size)
        indices, variants = [views[place][0] for place in places], [views[place][1] for place in places]

        def noise(row: int, shape: tuple[int, ...]) -> torch.Tensor:
            return randomness.normal(shape, seed, "posterior", step, places[row])

        drawn = zip(indices, places, strict=True)
        captions = [self._caption(self._items[index], seed, step, place) for index, place in drawn]
        lots = [(seed, step, place) for place in places]
        batch = self._batch(indices, variants, captions, noise, lots, embed_text=embed_text)
        if self._heard and embed_text:
            self._heard(batch_size, batch)
        return batch

    def drawn_views(self, seed: int, step: int, batch_size: int) -> list[View]:
        """The view of each place of a step's global batch."""
        order = self.order(seed, step, batch_size)
        return [(index, self._variant(self._items[index], seed, step, place)) for place, index in enumerate(order)]

    @property
    def view_count(self) -> int:
        """How many there are: of each picture one, and one more where it may be mirrored."""
        return sum(2 if item.flip else 1 for item in self._items)

    def views(self, pixels: int, wanted: Container[View] | None = None) -> Iterator[Batch]:
        """Each picture once, and once mirrored where it may be, or those of them that are wanted; by sizes, at most so
        many pixels at once.

        The latents are the posteriors' means, the captions whole, without embeddings; an inpainting model is shown
        nothing of the pictures. Raises DataError for pictures that are cut at random places.
        """
        if any(item.crop.positions > 1 for item in self._items):
            raise random_crops_note()
        turns = [(0, 1) if item.flip else (0,) for item in self._items]
        views = [(index, variant) for index, own in enumerate(turns) for variant in own]
        for some in self._by_size([view for view in views if wanted is None or view in wanted], pixels):
            yield self._batch([index for index, _ in some], [variant for _, variant in some], embed_text=False)

    def middles(self, count: int, pixels: int) -> Iterator[Batch]:
        """So many of the pictures, drawn by lot and always the same, in turns if there are fewer; each cut in its
        middle, else as `views`, and of each a part hidden from an inpainting model."""
        indices = center_view_indices(len(self), count)
        place = 0
        for some in self._by_size([(index, self._middle(self._items[index])) for index in indices], pixels):
            lots = [(0, 0, place + row) for row in range(len(some))]
            place += len(some)
            indices, variants = [index for index, _ in some], [variant for _, variant in some]
            yield self._batch(indices, variants, lots=lots, embed_text=False)

    def _by_size(self, views: Sequence[View], pixels: int) -> Iterator[Sequence[View]]:
        """The views in lots, each of one size."""
        of_size: dict[Size, list[View]] = {}
        for index, variant in views:
            of_size.setdefault(self._items[index].crop.size, []).append((index, variant))
        for (width, height), alike in of_size.items():
            most = max(1, pixels // (width * height))
            for start in range(0, len(alike), most):
                yield alike[start : start + most]

    def _batch(
        self,
        indices: list[int],
        variants: list[int],
        captions: list[str] | None = None,
        noise: Noise | None = None,
        lots: Sequence[tuple[int, int, int]] | None = None,
        *,
        embed_text: bool,
    ) -> Batch:
        """These pictures: under their own captions, and as the posteriors' means, where nothing else is given. lots: of
        each (seed, step, place), by which a part is hidden from an inpainting model; None hides all."""
        items = [self._items[index] for index in indices]
        captions = [item.said[0] for item in items] if captions is None else captions
        latents, mask = sample_latents(items, variants, noise, self._encoder)
        crops = [item.crop.at(*item.place_of(variant)) for item, variant in zip(items, variants, strict=True)]
        return Batch(
            latents.to(self._device),
            self._texts[captions].to(self._device) if self._texts is not None and embed_text else None,
            captions,
            None if mask is None else mask.to(self._device),
            as_height_width([item.crop.original for item in items]),
            as_height_width(crops),
            as_height_width([item.crop.size for item in items]),
            indices,
            variants,
            torch.tensor([item.options.weight for item in items], device=self._device),
            None if lots is None else self._known_of(items, variants, mask, lots),
        )

    def _known_of(
        self,
        items: Sequence[PreparedPicture],
        variants: Sequence[int],
        mask: torch.Tensor | None,
        lots: Sequence[tuple[int, int, int]],
    ) -> torch.Tensor | None:
        """What an inpainting model is told of these pictures. mask: the batch's."""
        if self._holes is None or self._known is None:
            return None
        masks = [mask[row] if mask is not None and "mask" in item.load() else None for row, item in enumerate(items)]
        told = zip(items, masks, lots, strict=True)
        hidden = [self._holes.draw(item.crop.size, own, *lot) for item, own, lot in told]
        return self._known(pixels_of(items, variants), torch.stack(hidden))

    def _middle(self, item: PreparedPicture) -> int:
        return item.crop.middle * (2 if item.flip else 1)

    def _variant(self, item: PreparedPicture, seed: int, step: int, place: int) -> int:
        mirrored = item.flip and randomness.uniform(seed, "flip", step, place) < 0.5
        if item.crop.positions == 1:
            return int(mirrored)
        position = int(randomness.uniform(seed, "crop", step, place) * item.crop.positions)
        return 2 * position + mirrored if item.flip else position

    def _caption(self, item: PreparedPicture, seed: int, step: int, place: int) -> str:
        dropout = item.options.caption_dropout
        if dropout and randomness.uniform(seed, "caption dropout", step, place) < dropout:
            return ""
        caption = item.caption
        if item.further:
            line = randomness.uniform(seed, "caption line", step, place) * len(item.captions)
            caption = item.captions[int(line)]
        return vary_caption(caption, item.options, seed, step, place, kept=item.kept_tags.get(caption))


def center_view_indices(pictures: int, count: int) -> list[int]:
    """Which of so many pictures `Dataset.middles` gives."""
    lot = randomness.permutation(pictures, 0, "middles")
    return [lot[place % pictures] for place in range(count)]


def random_crops_note() -> DataError:
    """That pictures are cut at random places, where all are to be drawn over."""
    return DataError(
        "images are cut at random places, too many to draw them all over; use --crop center or pad, or in a "
        'dataset.toml crop = "center" of each source, or --crossed-share 0.'
    )
