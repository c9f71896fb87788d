"""By what a base is known again: digests over its configs, tokenizers and weights."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from sfumato.bases.tokenizers import plain_tokenizer
from sfumato.files.save import raw_bytes

if TYPE_CHECKING:
    from sfumato.bases.base import Base


def of_settings(base: Base, vocabularies: Iterable[str]) -> hashlib._Hash:
    """A sha256 over all of the base that is no weight, to go on with. vocabularies: `vocabulary` of each tokenizer."""
    digest = hashlib.sha256()
    for module in (base.unet, base.vae, *base.text_encoders, base.scheduler):
        digest.update(public_config(module).encode())
    digest.update(json.dumps([list(vocabularies), base.zeros_for_empty_prompt]).encode())
    return digest


def add_weights(digest: hashlib._Hash, base: Base) -> None:
    """Let a digest go on over the base's weight files, or over the weights in memory where there are no files."""
    for path in base.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for module in () if base.files else (base.unet, base.vae, *base.text_encoders):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(raw_bytes(tensor))


def of_pages(pages: Iterable[bytes], digest: hashlib._Hash | None = None) -> str:
    """sha256, in hex, over a page of each weight, and before them over what `digest` has seen."""
    digest = hashlib.sha256() if digest is None else digest
    for page in pages:
        digest.update(page)
    return digest.hexdigest()


def vocabulary(tokenizer: Any) -> str:
    """sha256 over all that decides what a tokenizer makes of a text; without new words, which come from elsewhere."""
    plain = plain_tokenizer(tokenizer)
    found = json.loads(plain.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # of the latest call
        found.pop(name, None)
    described = json.dumps([found, plain.special_tokens_map, plain.padding_side], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def public_config(module: Any) -> str:
    """A module's config as JSON, without what only says where it came from."""
    config = getattr(module, "config", {})
    items = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {key: value for key, value in items.items() if not key.startswith("_") and "version" not in key}
    return json.dumps(kept, sort_keys=True, default=str)
