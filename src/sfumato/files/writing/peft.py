"""LoRA files with the names of diffusers and of peft. Hardly any other tool reads these.

Both scale a module by alpha / rank, with alpha equal to rank unless the file says otherwise. So every other scale is
folded into lora_B, and files of mixed ranks need nothing besides the tensors (in diffusers from 0.42.1 on).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sfumato.errors import FileError
from sfumato.files.fingerprint import FINGERPRINT_KEY, fingerprint
from sfumato.files.header import checked_path
from sfumato.files.kinds import LoraModule
from sfumato.files.module_names import Target, kohya_names
from sfumato.files.peft import CONFIG, MODEL
from sfumato.files.save import cast, check_metadata, write_hashed, write_tensors
from sfumato.files.writing.kohya import down_and_up
from sfumato.utils.atomic import atomic_folder

_CLASSES = {
    "unet": ("UNet2DConditionModel", "diffusers.models.unets.unet_2d_condition"),
    "text_encoder": ("CLIPTextModel", "transformers.models.clip.modeling_clip"),
    "text_encoder_2": ("CLIPTextModelWithProjection", "transformers.models.clip.modeling_clip"),
}


def write_diffusers(
    path: str | os.PathLike[str],
    modules: Mapping[Target, LoraModule],
    *,
    family: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `modules` as `load_lora_weights` of diffusers saves them; otherwise as `write_lora`.

    Biases are kept (`lora_B.bias`). ComfyUI loads none of the attention of such a file, A1111 and sd-scripts nothing.
    """
    path = checked_path(path)
    kohya_names(family, modules, path.name)  # what has none is refused here, too
    tensors = _tensors({_dotted_name(target): module for target, module in modules.items()}, dtype, path)
    described = _peft_metadata(metadata, fingerprint(modules))
    return write_hashed(path, tensors, described)


def write_peft(
    folder: str | os.PathLike[str],
    modules: Mapping[Target, LoraModule],
    *,
    family: str,
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write `modules` as a folder of peft, for `PeftModel.from_pretrained`; complete or not at all.

    An adapter of one part is the folder itself; an adapter of several parts has a folder for each: unet, text_encoder,
    ... Module names are those of this transformers and diffusers. Raises FileError for a folder that exists.
    """
    folder = Path(folder)
    kohya_names(family, modules, folder.name)  # what has none is refused here, too
    if folder.exists():
        raise FileError(f"{folder.name}: exists already, and folders are not written over. Name another one.")
    parts, whole = list(dict.fromkeys(part for part, _ in modules)), fingerprint(modules)
    try:
        with atomic_folder(folder) as temporary:
            for part in parts:
                place = temporary / part if len(parts) > 1 else temporary
                place.mkdir(exist_ok=True)
                own = {target: module for target, module in modules.items() if target[0] == part}
                named = {f"base_model.model.{path}": module for (_, path), module in own.items()}
                tensors = _tensors(named, dtype, folder)
                described = _peft_metadata(metadata, whole)
                check_metadata(described, folder)
                write_tensors(place / MODEL, tensors, described)
                text = json.dumps(_config(part, own), indent=2, sort_keys=True) + "\n"
                (place / CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise FileError(f"{folder.name}: the folder could not be written ({error.strerror}). Make room.") from None
    return folder


def _peft_metadata(metadata: Mapping[str, str] | None, whole: str) -> dict[str, str]:
    """The metadata without what kohya's file said of its network and of its bytes, which these are not."""
    of_bytes = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
    given = (metadata or {}).items()
    kept = {key: value for key, value in given if key not in of_bytes and not key.startswith("ss_network_")}
    return {**kept, FINGERPRINT_KEY: whole}


def _dotted_name(target: Target) -> str:
    part, path = target
    inner = path.removeprefix("text_model.")
    # Files have the level that CLIPTextModel lost in transformers 5.6, so that older ones read them too.
    return f"{part}.{inner}" if part == "unet" or inner == "text_projection" else f"{part}.text_model.{inner}"


def _tensors(named: Mapping[str, LoraModule], dtype: torch.dtype, path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, given in named.items():
        module = given.plain()
        up = module.up if module.scale == 1 else module.up.float() * module.scale
        for half, value in zip(("lora_A", "lora_B"), down_and_up(replace(module, up=up), dtype), strict=True):
            tensors[f"{name}.{half}.weight"] = cast(value, dtype, f"{name}.{half}", path)
        if module.bias_delta is not None:
            tensors[f"{name}.lora_B.bias"] = cast(module.bias_delta, dtype, f"{name}.lora_B.bias", path)
    biased = sum(name.endswith(".bias") for name in tensors)
    if 0 < biased < len(named):  # peft and diffusers give every module of a config a bias, or none
        for name, module in named.items():
            tensors.setdefault(f"{name}.lora_B.bias", torch.zeros(module.up.shape[0], dtype=dtype))
    return tensors


def _config(part: str, modules: Mapping[Target, LoraModule]) -> dict[str, Any]:
    """peft's config; patterns are anchored, because peft matches them on the ends of names."""
    rank = Counter(module.rank for module in modules.values()).most_common(1)[0][0]
    others = {f"^{path}": module.rank for (_, path), module in modules.items() if module.rank != rank}
    class_name, library = _CLASSES[part]
    return {
        "peft_type": "LORA",
        "task_type": None,
        "auto_mapping": {"base_model_class": class_name, "parent_library": library},
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(path for _, path in modules),
        "lora_dropout": 0.0,
        "bias": "none",
        "lora_bias": any(module.bias_delta is not None for module in modules.values()),
        "use_rslora": False,
        "use_dora": False,
    }
