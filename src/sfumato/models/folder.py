"""The parts of a base from a folder in diffusers' format: safetensors only, every weight accounted for.

A diffusers folder, a VAE's, an adapter or a new word, from the Hugging Face hub or from its cache.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)
from torch import nn
from transformers import CLIPTokenizer

from sfumato.errors import BaseModelError, package_error
from sfumato.files.header import read_header
from sfumato.models.family import Encoder, read_config
from sfumato.models.vocabulary import with_readable_pad_token
from sfumato.models.weights import LazyModel, StoredWeight, text_skeleton, unet_skeleton, vae_skeleton

STEMS = ("diffusion_pytorch_model", "model")
VARIANTS = (".fp16", ".bf16")
"""Of files, where there are none without; what diffusers calls fp16 and bf16."""
PICKLED = (".bin", ".ckpt", ".pt", ".pth")
OLD_VAE_NAMES = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What diffusers before 0.18 called the projections of the VAE's attention; SD 1.5's published VAE still does."""


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of one model: without a variant, its shards, or else those of half precision."""
    for variant in ("", *VARIANTS):
        for stem in STEMS:
            single = folder / f"{stem}{variant}.safetensors"
            if single.is_file():
                return [single]
            for index in (f"{stem}.safetensors.index{variant}.json", f"{stem}{variant}.safetensors.index.json"):
                if (folder / index).is_file():
                    return _shards(folder, index)
    where = f"{folder.parent.name}/{folder.name}"
    pickled = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLED)
    if pickled:
        raise BaseModelError(
            f"{where}: only pickled weights ({pickled[0]}), which can run programs and are never opened. "
            "Get the base as .safetensors."
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    there = f"; it has {others[0]}. Rename it, if it is whole." if others else ". Download it again."
    raise BaseModelError(f"{where}: no {STEMS[0]}.safetensors or {STEMS[1]}.safetensors in it{there}")


def _shards(folder: Path, index: str) -> list[Path]:
    listed = read_config(folder, index).get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise BaseModelError(f"{folder.name}/{index}: lists no files of this folder. Download it again.")
    return [folder / name for name in sorted(set(names))]


def _stored(files: list[Path]) -> dict[str, StoredWeight]:
    headers = [read_header(file) for file in files]
    return {name: StoredWeight(header, name) for header in headers for name in header.tensors}


def load_unet(folder: Path, dtype: torch.dtype) -> LazyModel:
    """The U-Net in `folder/unet`, to be read in `dtype`."""
    files = weight_files(folder / "unet")
    model = unet_skeleton(read_config(folder, "unet/config.json"))
    return LazyModel(model, _stored(files), dtype, f"{folder.name}/unet")


def load_part(model: nn.Module, folder: Path, part: str, dtype: torch.dtype) -> LazyModel:
    """Any part of the folder, to be read in `dtype`. model: it, with its shapes and without weights (device `meta`)."""
    return LazyModel(model, _stored(weight_files(folder / part)), dtype, f"{folder.name}/{part}")


def load_vae(folder: Path, dtype: torch.dtype) -> LazyModel:
    """The VAE whose config.json is in `folder`, to be read in `dtype`."""
    config = read_config(folder, "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise BaseModelError(f"{folder.name}: a {config['_class_name']}, wanted an AutoencoderKL. Name another VAE.")
    stored = {_current_vae_name(name): tensor for name, tensor in _stored(weight_files(folder)).items()}
    return LazyModel(vae_skeleton(config), stored, dtype, folder.name)


def _current_vae_name(name: str) -> str:
    if match := re.match(r"(.*\.attentions\.\d+\.)(query|key|value|proj_attn)\.(weight|bias)$", name):
        return f"{match[1]}{OLD_VAE_NAMES[match[2]]}.{match[3]}"
    return name


def load_text_encoder(folder: Path, encoder: Encoder, dtype: torch.dtype) -> LazyModel:
    """One text encoder of the folder, to be read in `dtype`."""
    files = weight_files(folder / encoder.folder)
    model = text_skeleton(encoder.class_name, read_config(folder, f"{encoder.folder}/config.json"))
    stored = _as_named_here(_stored(files), set(model.state_dict()))
    return LazyModel(model, stored, dtype, f"{folder.name}/{encoder.folder}")


def _as_named_here(stored: Mapping[str, StoredWeight], wanted: set[str]) -> dict[str, StoredWeight]:
    """The tensors under the names this transformers gives them: 5.6 dropped the level `text_model` of CLIPTextModel."""
    named = {}
    for name, tensor in stored.items():
        bare = name.removeprefix("text_model.")
        if bare == "embeddings.position_ids" or (bare.startswith("text_projection") and bare not in wanted):
            continue
        named[bare if bare in wanted else f"text_model.{bare}" if f"text_model.{bare}" in wanted else name] = tensor
    return named


def load_tokenizer(folder: Path, part: str, positions: int) -> Any:
    """The tokenizer in `folder/part`. positions: tokens its text encoder takes, both ends included."""
    if not any((folder / part / name).is_file() for name in ("vocab.json", "tokenizer.json")):
        raise BaseModelError(f"{folder.name}/{part}: no vocabulary in it. Download the folder again.")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(folder / part), local_files_only=True)
    except Exception as error:  # the libraries check each value in a way of its own, or not at all
        if package_error(error):
            raise
        reason = " ".join(str(error).split())[:100]
        raise BaseModelError(
            f"{folder.name}/{part}: the tokenizer cannot be read ({reason}). Download it again."
        ) from None
    tokenizer.model_max_length = positions  # one number, the text encoder's, decides
    return with_readable_pad_token(tokenizer)


HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler")
CONFIGS = ("model_index.json", *(f"{part}/*.{ending}" for part in PARTS for ending in ("json", "txt")))


DISK_ERRORS = frozenset((errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS))
"""What the system says where a download cannot be written."""


def hub_folder(hub_id: str) -> Path:
    """The folder of a base's hub id in the local cache; downloaded first where it is not complete there.

    Raises BaseModelError: which of no network, no access, no room and no such id it was, and the command that fetches
    it.
    """
    return _snapshot(hub_id, _is_complete, lambda files: [*CONFIGS, *files_to_fetch(files, hub_id)])


def hub_vae(hub_id: str) -> Path:
    """The same for a VAE that has a repository of its own, or is part of a base's. Raises as `hub_folder`."""

    def wanted(files: Sequence[str]) -> list[str]:
        part = "" if "config.json" in files else "vae"
        place = f"{part}/" if part else ""
        weights = files_to_fetch(files, hub_id, (part,))
        if not weights or f"{place}config.json" not in files:
            raise BaseModelError(f"{hub_id}: no VAE with a config.json and safetensors in it. Name another.")
        return [f"{place}config.json", *weights]

    return _snapshot(hub_id, lambda place: any(_has_model(each) for each in (place, place / "vae")), wanted)


LORA, WORD = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
"""What diffusers' trainers call their files."""
_SECOND = {WORD: "learned_embeds_2.safetensors"}
"""What lies beside them: a word's vectors for SDXL's second encoder."""
_PEFT = ("adapter_config.json", "adapter_model.safetensors")


def hub_file(name: str, usual: str = LORA) -> Path:
    """The adapter's or word's file of `owner/name`, or the one that `owner/name/file.safetensors` names.

    usual: the file that is meant of a repository with several. Where a whole model or peft's adapter is there, its
    folder; diffusers' trainer of words writes a whole model beside the word, which is not fetched for it. Raises
    BaseModelError as `hub_folder` does, and for a repository that does not tell which file is meant.
    """
    hub_id, inside = "/".join(name.split("/")[:2]), "/".join(name.split("/")[2:])
    if inside:
        found = _snapshot(hub_id, lambda place: (place / inside).is_file(), lambda _: [inside]) / inside
        if not found.is_file():
            raise BaseModelError(f"{hub_id}: has no file {inside}. Check the spelling.")
        return found

    def is_model(files: Sequence[str]) -> bool:
        return usual not in files and "model_index.json" in files

    def wanted(files: Sequence[str]) -> list[str]:
        if not is_model(files):
            return _adapter_files(files, hub_id, usual)
        if usual == WORD:
            raise BaseModelError(f"{hub_id}: is a whole model without {WORD}, not a new word. Name another.")
        return [*CONFIGS, *files_to_fetch(files, hub_id)]

    def is_there(place: Path) -> bool:
        files = _files_in(place)
        if is_model(files):
            return usual != WORD and _is_complete(place)
        try:
            return bool(_adapter_files(files, hub_id, usual))
        except BaseModelError:
            return False

    def is_sure(place: Path) -> bool:  # a file of another name may be one of several, of which the cache has one
        files = _files_in(place)
        return is_there(place) and (usual in files or is_model(files) or len(_adapter_files(files, hub_id, usual)) > 1)

    folder = _snapshot(hub_id, is_sure, wanted, without_network=is_there)
    files = _files_in(folder)
    if is_model(files):
        return folder
    found_in = _adapter_files(files, hub_id, usual)
    return folder if _last(found_in[0]) in _PEFT else folder / found_in[0]


def _files_in(folder: Path) -> list[str]:
    return [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]


def _adapter_files(files: Sequence[str], hub_id: str, usual: str) -> list[str]:
    """Of a repository's files those of its one adapter. Raises BaseModelError for none, and for several."""
    peft = [file for file in files if _last(file) in _PEFT and file.rpartition("/")[0] in ("", *PARTS)]
    if {_last(file) for file in peft} == set(_PEFT):
        return peft
    weights = [file for file in files if file.endswith(".safetensors") and "/" not in file]
    if usual in weights:
        return [usual, *(file for file in weights if file == _SECOND.get(usual))]
    if len(weights) == 1:
        return weights
    if weights:
        raise BaseModelError(
            f"{hub_id}: holds {len(weights)} files; name one of them, as {hub_id}/{weights[0]}. There are "
            f"{', '.join(weights[:8])}{', ...' if len(weights) > 8 else ''}."
        )
    pickled = any(file.endswith((".bin", ".pt", ".ckpt")) for file in files)
    why = "only pickled weights, which can run programs and are never opened" if pickled else "no .safetensors"
    raise BaseModelError(f"{hub_id}: has {why}. Name another.")


def _snapshot(
    hub_id: str,
    is_complete: Callable[[Path], bool],
    wanted: Callable[[Sequence[str]], list[str]],
    without_network: Callable[[Path], bool] = lambda _: False,
) -> Path:
    """The snapshot, from the cache if it is complete there. wanted: of a repository's files those to download.

    without_network: whether the cached snapshot will do where the hub cannot be reached.
    """
    cached = _cached(hub_id)
    if cached is not None and is_complete(cached):
        return cached
    fetch = f"hf download {hub_id}"
    owner, _, name = hub_id.partition("/")
    if cached is None and Path(owner).is_dir():
        raise BaseModelError(
            f"{hub_id}: there is no {name} in the folder {owner}. Check the spelling; if the hub's is meant, let it be "
            f"fetched once from another folder, where there is no {owner}."
        )
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted(_files_on_hub(hub_id))))
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
        if reason := disk_error(error):
            raise BaseModelError(f"{hub_id}: {reason}") from None
        if cached is not None and without_network(cached):
            return cached
        raise BaseModelError(
            f"{hub_id}: no folder here, not in the hub's local cache, and the hub cannot be reached "
            f"({type(error).__name__}). Run `{fetch}` where there is a network, or name a folder or a file."
        ) from None


def _files_on_hub(hub_id: str) -> list[str]:
    """A repository's files. A hub that is not there is asked once, one that is busy again and again."""
    try:
        asked = HfApi().model_info(hub_id, timeout=constants.HF_HUB_ETAG_TIMEOUT)
        return [file.rfilename for file in asked.siblings or ()]
    except HfHubHTTPError as error:
        status = getattr(getattr(error, "response", None), "status_code", 0)
        if status != 429 and status < 500:
            raise
        return HfApi().list_repo_files(hub_id)


def disk_error(error: Exception) -> str:
    """What to say of a download that the disk did not take; empty where the error is another one."""
    if not isinstance(error, OSError) or error.errno not in DISK_ERRORS:
        return ""
    return (
        f"the download could not be written to {constants.HF_HUB_CACHE} ({error.strerror}). Make room there, or set "
        "HF_HOME to another folder."
    )


def files_to_fetch(files: Sequence[str], where: str, parts: Sequence[str] = PARTS[:4]) -> list[str]:
    """The safetensors files to take for each model of a repository: without a variant, else of half precision.

    parts: the models' folders, "" for the repository's own. Raises BaseModelError for a model without safetensors.
    """
    chosen = []
    for part in parts:
        here = [name for name in files if name.rpartition("/")[0] == part]
        inside = [name for name in here if re.fullmatch(rf"({'|'.join(STEMS)})\b.*\.safetensors", _last(name))]
        plain = [name for name in inside if re.fullmatch(r"[^.]+\.safetensors", _last(name))]
        halves = ([name for name in inside if variant in _last(name)] for variant in VARIANTS)
        half = next((names for names in halves if names), [])
        if not inside and any(name.endswith(".bin") for name in here):
            raise BaseModelError(
                f"{where}: {part or 'it'} has only pickled weights (.bin), which can run programs and are never "
                "opened. Name one with .safetensors."
            )
        if inside and not plain and not half:
            raise BaseModelError(
                f"{where}: of {part or 'it'} there is {_last(inside[0])} alone. Fetch it, and rename it if it is whole."
            )
        chosen += plain or half
    return chosen


def _last(name: str) -> str:
    return name.rpartition("/")[2]


def _cached(hub_id: str) -> Path | None:
    try:
        return Path(snapshot_download(hub_id, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError, OSError):
        return None


def _is_complete(folder: Path) -> bool:
    """Whether the snapshot holds the index and what that names: models with their weights, tokenizers."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
        named = {part for part in PARTS if index.get(part) and index[part][0]} | {"unet", "vae", "text_encoder"}
    except (OSError, ValueError, AttributeError, TypeError, LookupError, RecursionError):
        return False
    return all(_has_model(folder / part) if part in PARTS[:4] else any((folder / part).glob("*")) for part in named)


def _has_model(folder: Path) -> bool:
    """Whether it holds a model's config and all of its weights."""
    try:
        return (folder / "config.json").is_file() and all(file.is_file() for file in weight_files(folder))
    except BaseModelError:
        return False
