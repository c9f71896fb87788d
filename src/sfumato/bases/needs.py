"""What a base needs of its pictures and captions, read from its configs: no weight is loaded, nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import sfumato
from sfumato.bases.config_file import read_config
from sfumato.bases.family import FAMILIES, family_of_config
from sfumato.bases.recognise import SD2_EPSILON_SIZE, family_of_names, predicted
from sfumato.errors import BaseModelError
from sfumato.files.header import read_header

_PACKAGE = Path(sfumato.__file__).parent


@dataclass(frozen=True)
class Needs:
    """name: of the base. folder: with the configs. vae_factor: pixels to a latent. levels: of the U-Net. resolution:
    side in pixels of what it was trained on. token_limit: tokens of a caption that are read, both ends not counted."""

    name: str
    folder: Path
    vae_factor: int
    levels: int
    resolution: int
    token_limit: int

    @cached_property
    def tokenizer(self) -> Any:
        """The base's own tokenizer; that of CLIP's vocabulary where its files are not here."""
        from transformers import CLIPTokenizer

        from sfumato.bases.vocabulary import clip_tokenizer, reading_its_padding

        folder = self.folder / "tokenizer"
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return reading_its_padding(CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
        return clip_tokenizer(positions=77)

    def ids(self, text: str) -> list[int]:
        """The tokens of a text, both ends not counted."""
        return list(self.tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def cut_off(self, caption: str) -> str:
        """The end of a caption that the text encoder will not see; empty if it sees all."""
        ids = self.ids(caption)
        return str(self.tokenizer.decode(ids[self.token_limit :])).strip()

    def pieces(self, word: str) -> list[tuple[str, int]]:
        """(piece, its id) of each token of a word; a lower id is a more frequent piece, "</w>" ends a word."""
        ids = self.ids(word)
        return list(zip(self.tokenizer.convert_ids_to_tokens(ids), ids, strict=True))


def needs_of(base: str, prediction_type: str | None = None, max_tokens: int | None = None) -> Needs:
    """What `base` needs: pocket, a diffusers folder, a checkpoint, sd1, sd2, sdxl, or a hub id in the local cache.

    prediction_type, max_tokens: as of `load_base`; the first tells the sizes of SD 2.x apart. Raises BaseModelError
    where the base's configs are not on this machine, or its file does not say which of the two it is.
    """
    if not base:
        raise BaseModelError("--base is empty; name pocket, a folder, a file, a hub id or a family, such as sdxl.")
    path, family = Path(base).expanduser(), base
    if base != "pocket" and path.is_file():
        header = read_header(path)
        family = family_of_names(header.tensors, path.name, needs_vae=False).name
        prediction_type = predicted(header, family, prediction_type)
    folder = path if base != "pocket" and path.is_dir() else _folder(family)
    unet, vae = read_config(folder, "unet/config.json"), read_config(folder, "vae/config.json")
    if folder == _folder("sd2") and prediction_type == "epsilon":
        unet |= {"sample_size": SD2_EPSILON_SIZE}
    text = read_config(folder, "text_encoder/config.json")
    factor = 2 ** (_levels(vae, folder, "vae") - 1)
    size = unet.get("sample_size")
    return Needs(
        path.name if path.exists() else base,
        folder,
        factor,
        _levels(unet, folder, "unet"),
        size * factor if isinstance(size, int) else family_of_config(unet).defaults.resolution,  # as Base.resolution
        max_tokens or int(text.get("max_position_embeddings", 77)) - 2,
    )


def _levels(config: Mapping[str, Any], folder: Path, part: str) -> int:
    channels = config.get("block_out_channels")
    if not isinstance(channels, list) or not channels:
        raise BaseModelError(f"{folder.name}/{part}/config.json: no block_out_channels in it. Name a whole base.")
    return len(channels)


def _folder(base: str) -> Path:
    if base == "pocket":
        return _PACKAGE / "pocket"
    if base in FAMILIES:
        return _PACKAGE / "bases" / "configs" / base
    if (cached := _cached(base)) is not None:
        return cached
    raise BaseModelError(
        f"{base}: not on this machine, so what it wants is not known. Name its family: {', '.join(FAMILIES)}."
    )


def _cached(hub_id: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(hub_id, "unet/config.json")
    except HFValidationError:
        return None
    return Path(found).parents[1] if isinstance(found, str) else None
