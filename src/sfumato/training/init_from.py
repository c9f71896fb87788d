"""An adapter and words that start from those of a file, instead of from nothing."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato import shell
from sfumato.errors import AdapterError, ConfigError
from sfumato.files import read_adapter
from sfumato.files.family import of_another_family
from sfumato.files.fingerprint import fingerprint_on
from sfumato.files.metadata import (
    Sampling,
    adapter_guidance_of,
    negatives_of,
    over_steps_of,
    prediction_of,
    sampling_of,
    trigger_words,
)
from sfumato.training.checks import refuse_missing

if TYPE_CHECKING:
    from sfumato.adapters import Attached
    from sfumato.bases import Base
    from sfumato.runs.run import Run
    from sfumato.words.in_use import Words


@dataclass(frozen=True)
class Asked:
    """What a file asks of those who draw with it, as `files.Description` has it."""

    trigger: tuple[str, ...] = ()
    adapter_guidance: float = 0.0
    negatives: tuple[str, ...] = ()
    over_steps: tuple[float, float] | None = None
    sampling: Sampling | None = None

    @classmethod
    def by(cls, path: Path) -> Asked:
        """What this adapter asks for. Raises AdapterError for a file that is none."""
        told = read_adapter(path).metadata
        return cls(
            tuple(trigger_words(told)),
            adapter_guidance_of(told),
            negatives_of(told),
            over_steps_of(told),
            sampling_of(told),
        )


def begin_with(
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
    fingerprint, left = start_from(path, base, adapter, words, initial_words)
    run.say(*left)
    return {"init": fingerprint}


def start_from(
    path: Path, base: Base, adapter: Attached, words: Words | None, initial_words: Sequence[str]
) -> tuple[str, list[str]]:
    """Copy the adapter in this file into `adapter`, and its words into those of `words` that are spelt alike.

    initial_words: what --initial-words says, which a word that starts from the file does not need. Returns a
    fingerprint of what was copied, and a line on each word of the file that is not learned here, and on a base that
    predicts otherwise than the file's. Raises ConfigError for a word that has both starts, and AdapterError for an
    adapter of another family, of other layers or of another rank.
    """
    name, file = path.name, read_adapter(path)
    width = base.unet.config.cross_attention_dim
    theirs, ours = (file.family, file.text_width), (base.family.name, width if isinstance(width, int) else None)
    if other := of_another_family(theirs, ours, "base"):
        raise AdapterError(f"--init-from {name}: {other}. Begin with an adapter of this family, or with nothing.")
    adapter.load(file.changes, name)
    digest = hashlib.sha256(fingerprint_on(file.changes, adapter.weights()).encode())
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
    kind = prediction_of(file.metadata)
    otherwise = f"{name}: learned where the base predicts {kind}, and this one predicts {base.prediction_type}"
    return digest.hexdigest(), [
        *([otherwise] if kind not in ("", base.prediction_type) else []),
        *(
            f"{name}: its word {token} is left behind; `train lora --train-words {shell.quote(token)}` learns it on"
            for token in left
        ),
    ]
