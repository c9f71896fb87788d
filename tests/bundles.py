"""Adapters' files with new words in them, made of files without."""

import os
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from sfumato.files.header import checked_path, read_header
from sfumato.files.read import read_tensors
from sfumato.files.save import hashes, write_tensors
from sfumato.files.writing.embedding import bundled_tensors


def add_words(path: str | os.PathLike[str], words: Mapping[str, Mapping[str, Tensor]]) -> Path:
    """Put new words into the adapter's file at `path`, as `bundled` takes them; it is replaced."""
    path = checked_path(path)
    header = read_header(path)
    tensors = dict(read_tensors(path, header=header)) | bundled_tensors(path, words)
    return write_tensors(path, tensors, {**header.metadata, **hashes(tensors, header.metadata)})
