"""CLIP's tokenizer, from the one copy of its vocabulary that travels with the package (see configs/clip/LICENSE)."""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import CLIPTokenizer

CLIP_MERGES_FILE = Path(__file__).parent / "configs" / "clip" / "merges.txt.gz"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer(*, pad_token: str = END, positions: int) -> CLIPTokenizer:
    """The tokenizer of CLIP's 49,408 tokens, as transformers builds it from vocab.json and merges.txt.

    pad_token: CLIP ViT-L pads with its end token; OpenCLIP (SD 2, SDXL's second encoder) with token 0, "!".
    positions: tokens a text encoder takes, both ends included.
    """
    return byte_pair_tokenizer(clip_merges(), pad_token=pad_token, positions=positions)


def byte_pair_tokenizer(merges: list[tuple[str, str]], *, pad_token: str = END, positions: int) -> CLIPTokenizer:
    """A tokenizer of CLIP's kind: 256 bytes, each also as the end of a word, then one token a merge, then both ends."""
    symbols = bytes_to_unicode()
    tokens = symbols + [symbol + "</w>" for symbol in symbols] + ["".join(pair) for pair in merges] + [START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    settings: dict[str, Any] = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    return with_readable_pad_token(
        CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=positions, **settings)
    )


def with_readable_pad_token(tokenizer: Any) -> Any:
    """The tokenizer, which reads its padding token in a text as any other word, if it is one of the vocabulary.

    OpenCLIP pads with token 0, which is the letter "!". transformers takes each "!" of a text for padding then, where
    OpenCLIP itself and sd-scripts read "k-on!," as CLIP does.
    """
    if tokenizer.pad_token in (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token):
        return tokenizer
    told = json.loads(tokenizer.backend_tokenizer.to_str())
    if tokenizer.pad_token not in told["model"]["vocab"]:  # a token of its own, which would be lost
        return tokenizer
    told["added_tokens"] = [token for token in told["added_tokens"] if token["content"] != tokenizer.pad_token]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(told))
    if wrap := getattr(tokenizer, "_wrap_decode_method_backend_tokenizer", None):  # which reads </w> as a space
        wrap()
    return tokenizer


@cache
def clip_merges() -> list[tuple[str, str]]:
    """The pairs CLIP's vocabulary was grown by, in their order."""
    text = gzip.decompress(CLIP_MERGES_FILE.read_bytes()).decode("utf-8")
    return [(left, right) for left, right in (line.split(" ") for line in text.splitlines())]


def bytes_to_unicode() -> list[str]:
    """256 printable characters that stand for the bytes, in the order of CLIP's token ids (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = range(256 - len(printable))  # the rest, in byte order, are moved above the first 256 characters
    return [chr(code) for code in printable] + [chr(256 + index) for index in others]
