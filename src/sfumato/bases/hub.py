"""A diffusers folder from the Hugging Face hub, or from its cache."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from sfumato.errors import BaseModelError

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
CONFIGS = ("model_index.json", *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "txt")))


def hub_folder(hub_id: str) -> Path:
    """The folder of a hub id in the local cache; downloaded first where it is not complete there.

    Raises BaseModelError: which of no network, no access and no such id it was, and the command that fetches it.
    """
    cached = _cached(hub_id)
    if cached is not None and _is_complete(cached):
        return cached
    fetch = f"hf download {hub_id}"
    try:
        files = HfApi().list_repo_files(hub_id)
        return Path(snapshot_download(hub_id, allow_patterns=[*CONFIGS, *weight_files(files, hub_id)]))
    except GatedRepoError:
        raise BaseModelError(
            f"{hub_id}: gated; its owner asks for an agreement. Accept it on the model's page, run `hf auth login`, "
            f"then `{fetch}`."
        ) from None
    except RepositoryNotFoundError:
        raise BaseModelError(
            f"{hub_id}: neither a path here nor a model on the hub (or it is private: run `hf auth login`). "
            "Check the spelling."
        ) from None
    except HFValidationError:
        raise BaseModelError(f"{hub_id}: neither a path here nor a valid hub id. Check the spelling.") from None
    except BaseModelError:
        raise
    except Exception as error:  # the hub's library has changed its network library twice; there is no common error
        raise BaseModelError(
            f"{hub_id}: no folder here, not in the hub's local cache, and the hub cannot be reached "
            f"({type(error).__name__}). Run `{fetch}` where there is a network, or name a folder or a file."
        ) from None


def weight_files(files: Sequence[str], where: str) -> list[str]:
    """The safetensors files to take for each model of a repository: those without a variant, else those of fp16.

    Raises BaseModelError for a repository without safetensors.
    """
    chosen = []
    for part in PARTS[:4]:
        inside = [name for name in files if name.startswith(f"{part}/") and name.endswith(".safetensors")]
        plain = [name for name in inside if re.fullmatch(r"[^.]+\.safetensors", name.rsplit("/", 1)[1])]
        half = [name for name in inside if ".fp16" in name]
        if not inside and any(name.startswith(f"{part}/") and name.endswith(".bin") for name in files):
            raise BaseModelError(
                f"{where}: {part} has only pickled weights (.bin), which can run programs and are never opened. "
                "Name a base with .safetensors."
            )
        chosen += plain or half
    return chosen


def _cached(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _is_complete(folder: Path) -> bool:
    """Whether the snapshot holds the index and the weights of its U-Net and VAE."""
    return (folder / "model_index.json").is_file() and all(
        any((folder / part).glob("*.safetensors")) for part in ("unet", "vae", "text_encoder")
    )
