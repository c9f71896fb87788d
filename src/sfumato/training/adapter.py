"""The adapter that a trainer's options ask for.

A config is that of a trainer with `KindOptions`, ranks, alphas and `targets`, resolved, and perhaps with `conv`,
`rank_stabilised` and `train_text_encoder`.

What an adapter's training writes: its file, and new words inside it or in files of their own beside it.

An adapter and words that start from those of a file, instead of from nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from sfumato.adapters import Attached, ByLayer, Kind, attach
from sfumato.adapters.embeddings.tokens import embedding_files
from sfumato.errors import AdapterError, ConfigError
from sfumato.files import describe, read_adapter
from sfumato.files.fingerprint import fingerprint_with_weights
from sfumato.files.metadata import (
    Sampling,
    adapter_guidance_of,
    family_mismatch,
    negatives_of,
    over_steps_of,
    prediction_type_of,
    sampling_of,
    trigger_words,
)
from sfumato.files.writing.embedding import write_embedding
from sfumato.runs.folder import snapshot_name
from sfumato.training.checks import check_module_dropout, refuse_missing
from sfumato.utils.formatting import quote_argument

if TYPE_CHECKING:
    import torch

    from sfumato.adapters.embeddings.added_tokens import Words
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.runs.run import Run
    from sfumato.training.additions.interface import Addition


Layers = Mapping[str, Mapping[str, nn.Module]]
"""By part and path."""


def adapted_layers(config: Any, base: Base) -> tuple[Layers, list[str]]:
    """The layers that are adapted, and what there is to say of them before any training.

    Raises AdapterError and ConfigError for options that fit none of the layers, or too few.
    """
    by_layer, kind = ByLayer.of(config), Kind.of(config)
    parts = base.parts(text=getattr(config, "train_text_encoder", False))
    conv, named = getattr(config, "conv", False), base.family.targets
    layers = by_layer.kept(kind.targets(parts, config.targets, conv=conv, named=named))
    check_module_dropout(config, sum(map(len, layers.values())))
    return layers, kind.notes(layers, config.rank, config.conv_rank, by_layer)


def new_adapter(layers: Layers, config: Any) -> Attached:
    """A new adapter of these layers that changes nothing yet."""
    return attach(
        layers,
        rank=config.rank,
        alpha=config.alpha or float(config.rank),  # an OFT has none, and no scale
        conv_rank=config.conv_rank,
        conv_alpha=config.conv_alpha,
        dropout=config.dropout,
        rank_dropout=config.rank_dropout,
        module_dropout=config.module_dropout,
        rank_stabilised=getattr(config, "rank_stabilised", False),
        kind=Kind.of(config),
        by_layer=ByLayer.of(config),
        seed=config.seed,
    )


def groups_of(config: Any, adapter: Attached) -> list[dict[str, Any]]:
    """The optimizer's groups of an adapter: the U-Net's, and the text encoders' with their own learning rate."""
    from sfumato.training.optim import optimizers

    rates = config.learning_rate, getattr(config, "text_learning_rate", None)
    ratio, factors = getattr(config, "loraplus_ratio", 1.0), adapter.rate_factors()
    return optimizers.parameter_groups(adapter.by_part(), *rates, ups=adapter.ups(), up_ratio=ratio, factors=factors)


@dataclass(frozen=True)
class TrainedAdapter:
    """An adapter and the words that learn with it, as they are at any step.

    about: what their files say of themselves, called with `steps` and, for files of words, `word_files`. dtype: of the
    adapter's file; words are written in fp32. average: whose `applied` gives the weights
    that are written while they learn. bundle: whether words go into that file.
    """

    adapter: Attached
    words: Words | None
    family: str
    about: Callable[..., Description]
    dtype: torch.dtype
    average: Addition
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
        from sfumato.training.cards.methods import add_words_section

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


@dataclass(frozen=True)
class RequestedUse:
    """What a file asks of those who draw with it, as `files.Description` has it."""

    trigger: tuple[str, ...] = ()
    adapter_guidance: float = 0.0
    negatives: tuple[str, ...] = ()
    over_steps: tuple[float, float] | None = None
    sampling: Sampling | None = None

    @classmethod
    def by(cls, path: Path) -> RequestedUse:
        """What this adapter asks for. Raises AdapterError for a file that is none."""
        told = read_adapter(path).metadata
        return cls(
            tuple(trigger_words(told)),
            adapter_guidance_of(told),
            negatives_of(told),
            over_steps_of(told),
            sampling_of(told),
        )


def init_from_file(
    path: Path | None,
    run: Run,
    base: Base,
    adapter: Attached,
    words: Words | None = None,
    initial_words: Sequence[str] = (),
    *,
    always: bool = False,
) -> dict[str, str]:
    """Start from the file of --init-from as `start_from`, and say what it leaves behind. Returns the fact by which the
    run knows it again; none without a file.

    always: also of a run that goes on from a checkpoint, which has all else from that, the file must be there. Raises
    ConfigError where it is not.
    """
    if path is None:
        return {}
    if always or not run.has_begun:
        refuse_missing(path)
    elif not path.exists():
        return {}
    fingerprint, left = copy_from_file(path, base, adapter, words, initial_words)
    run.say(*left)
    return {"init": fingerprint}


def copy_from_file(
    path: Path, base: Base, adapter: Attached, words: Words | None, initial_words: Sequence[str]
) -> tuple[str, list[str]]:
    """Copy the adapter in this file into `adapter`, and its words into those of `words` that are spelt alike.

    initial_words: what --initial-words says, which a word that starts from the file does not need. Returns a
    fingerprint of what was copied, and a line on each word of the file that is not learned here, and on a base that
    predicts otherwise than the file's. Raises ConfigError for a word that has both starts, and AdapterError for an
    adapter of another family, of other layers or of another rank.
    """
    name, file = path.name, read_adapter(path)
    width = base.denoiser.config.get("cross_attention_dim")
    theirs, ours = (file.family, file.text_width), (base.family.name, width if isinstance(width, int) else None)
    if other := family_mismatch(theirs, ours, "base"):
        raise AdapterError(f"--init-from {name}: {other}. Begin with an adapter of this family, or with nothing.")
    adapter.load(file.changes, name)
    digest = hashlib.sha256(fingerprint_with_weights(file.changes, adapter.weights()).encode())
    found = {token.lower(): parts for token, parts in file.embeddings.items()}  # as tokenizers read them
    tokens = list(words.tokens) if words else []
    for token in tokens:
        if (parts := found.get(token.lower())) is None:
            continue
        if initial_words:
            raise ConfigError(f"--initial-words: {token} starts from its vectors in {name}; leave them out.")
        assert words is not None
        words.copy_from(token, parts, name)
        digest.update(b"".join(rows.float().numpy().tobytes() for rows in parts.values()))
    left = sorted(found.keys() - {token.lower() for token in tokens})
    kind = prediction_type_of(file.metadata)
    otherwise = f"{name}: learned where the base predicts {kind}, and this one predicts {base.prediction_type}"
    return digest.hexdigest(), [
        *([otherwise] if kind not in ("", base.prediction_type) else []),
        *(
            f"{name}: its word {token} is left behind; `train lora --train-words {quote_argument(token)}` learns it on"
            for token in left
        ),
    ]
