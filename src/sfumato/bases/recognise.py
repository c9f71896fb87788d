"""What a single-file checkpoint is, told by the names of its weights. Imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from sfumato.bases.family import FAMILIES, Family
from sfumato.errors import BaseModelError
from sfumato.files.header import Header
from sfumato.numerals import pluralize

UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TEXT_PREFIXES: Mapping[str, tuple[str, ...]] = {"sdxl": (XL_CLIP, XL_OPEN_CLIP), "sd2": (OPEN_CLIP,), "sd1": (CLIP,)}
"""Where each family keeps its text encoders, in the order in which the families are tried."""

WHOLE = "Name a whole checkpoint of SD 1.x, SD 2.x or SDXL."
OTHERS: tuple[tuple[str, str, str], ...] = (
    (
        r"(^|[._])lora[._]|hada_w\d|lokr_w\d|\.dora_scale$|\.alpha$",
        "an adapter (a LoRA or its kin)",
        "Name the model that it was made for as the base.",
    ),
    (r"^control_model\.|^controlnet_|^input_hint_block\.|^zero_convs\.", "a ControlNet", WHOLE),
    (r"^(emb_params|clip_[lg]|\*)$", "a textual inversion", WHOLE),
    (r"joint_blocks\.|double_blocks\.|single_blocks\.|double_layers\.", "a transformer (SD 3, FLUX)", WHOLE),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner", WHOLE),
    (r"^edm_mean$|^edm_vpred\.", "an EDM model", WHOLE),
    (r"motion_modules\.", "a motion module", WHOLE),
)
"""(pattern of a weight's name, what such a file is, what to do with it)."""
LONE_PARTS: tuple[tuple[str, str, str], ...] = (
    (r"^(down_blocks|mid_block|up_blocks)\.", "the U-Net of a diffusers folder", "Name its whole folder."),
    (r"^(text_model|embeddings|encoder\.layers)\.", "a text encoder alone", WHOLE),
    (r"^(encoder|decoder)\.", "a VAE alone", "Pass it with --vae, and its base with --base."),
)


def family_of_names(names: Iterable[str], file: str, *, needs_vae: bool = True) -> Family:
    """The family of a checkpoint. Raises BaseModelError that says what the file is instead, or what it lacks."""
    names = set(names)
    _refuse(names, OTHERS, file)
    has_unet, has_vae = _has(names, UNET), _has(names, VAE)
    if has_unet and (has_vae or not needs_vae):
        for family, prefixes in TEXT_PREFIXES.items():
            if all(_has(names, prefix) for prefix in prefixes):
                return FAMILIES[family]
    if has_unet:
        if not has_vae and needs_vae:
            raise BaseModelError(f"{file}: a checkpoint without its VAE. Give one with --vae, or n{WHOLE[1:]}")
        raise BaseModelError(f"{file}: a checkpoint without its text encoder. {WHOLE}")
    _refuse(names, LONE_PARTS, file)
    raise BaseModelError(f"{file}: none of its {pluralize(len(names), 'weight')} belongs to a known base. {WHOLE}")


def stated_prediction(header: Header) -> str:
    """What a checkpoint says that it predicts, "epsilon" or "v_prediction"; empty where it says nothing.

    Files mark v-prediction by a tensor `v_pred`; ModelSpec has a field of its own, which ComfyUI calls otherwise.
    """
    if "v_pred" in header.tensors:
        return "v_prediction"
    kinds = {"epsilon": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
    said = (header.metadata.get(f"modelspec.{key}", "") for key in ("prediction_type", "predict_key"))
    return next((kinds[each] for each in said if each in kinds), "")


SD2_EPSILON_SIZE = 64
"""Latents on a side of the models of SD 2.x that predict the noise, which are those of 512 px."""


def predicted(header: Header, family: str, prediction_type: str | None) -> str:
    """What a checkpoint of this family predicts: as the user says, or the file. Raises BaseModelError for one of SD 2.x
    of which neither is known."""
    found = prediction_type or stated_prediction(header)
    if not found and family == "sd2":
        raise BaseModelError(
            f"{header.path.name}: SD 2.x comes in two kinds that no weight tells apart. Say --prediction-type epsilon "
            "(the 512 px models, -base) or --prediction-type v_prediction (the 768 px ones)."
        )
    return found or "epsilon"


def _has(names: set[str], prefix: str) -> bool:
    return any(name.startswith(prefix) for name in names)


def _refuse(names: set[str], kinds: tuple[tuple[str, str, str], ...], file: str) -> None:
    for pattern, what, advice in kinds:
        if any(re.search(pattern, name) for name in names):
            raise BaseModelError(f"{file}: this is {what}, not a base. {advice}")
