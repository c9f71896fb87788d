"""Load a base model: pocket, a diffusers folder, a hub id, or a single checkpoint."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sfumato.errors import BaseModelError, web_address_error
from sfumato.files.header import read_header
from sfumato.models import folder as folders
from sfumato.models import single_file
from sfumato.models.base import Base
from sfumato.models.diffusion import PREDICTION_TYPES, alphas_cumprod, base_scheduler, flow_alphas_cumprod
from sfumato.models.family import (
    FAMILIES,
    SD2_EPSILON_SIZE,
    Family,
    family_from_keys,
    family_of_config,
    family_with_loader,
    read_config,
)
from sfumato.models.folder import HUB_ID, hub_folder, hub_vae
from sfumato.models.vocabulary import clip_tokenizer
from sfumato.models.weights import LazyModel, LazyWeights, text_skeleton, unet_skeleton, vae_skeleton
from sfumato.precision import Part, Precision, decide
from sfumato.precision.quantization import quantize
from sfumato.utils.limits import MAX_CHUNKS

POCKET_VARIABLE = "SFUMATO_POCKET"
"""Names a diffusers folder to use for `pocket` instead of the one in the package."""
POCKET_FOLDER = Path(__file__).parent / "pocket"
WEIGHT_SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin")


@dataclass
class BaseParts:
    """A base's parts, whose weights have not been read yet."""

    family: Family
    denoiser: LazyModel
    vae: LazyModel
    text_encoders: list[LazyModel]
    tokenizers: list[Any]
    scheduler: dict[str, Any]
    zeros_for_empty_prompt: bool


def load_base(
    source: str | os.PathLike[str] = "pocket",
    *,
    precision: Precision | None = None,
    clip_skip: int | None = None,
    max_tokens: int | None = None,
    vae: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
    family: str | None = None,
    unet: bool = True,
) -> Base:
    """Load a base model, frozen and placed on the precision's device. precision: unset, `decide("auto")`.

    source: `pocket`, a diffusers folder, a hub id, or a .safetensors checkpoint of SD 1.x, SD 2.x or SDXL (read without
    network access). clip_skip: layers to skip at the end of the text encoder, counted as in diffusers (A1111's 2 is 1,
    and 0 on SDXL). max_tokens: tokens of a prompt that are read, 75, 150 or 225, in chunks of 75; unset, 75. vae: a
    folder, hub id or file of another VAE. prediction_type: `epsilon` or `v_prediction`, if the base model does not say
    it or says it wrongly. zero_terminal_snr: its last timestep is pure noise, if it does not say so. family: a name
    from `FAMILIES`, if it would be recognised wrongly. unet: read the U-Net's weights now; otherwise `base.unet` has
    only its config until it is needed.

    Raises BaseModelError, or FileError for a broken file; one line.
    """
    base = base_skeleton(
        source,
        precision=precision,
        clip_skip=clip_skip,
        max_tokens=max_tokens,
        vae=vae,
        prediction_type=prediction_type,
        zero_terminal_snr=zero_terminal_snr,
        family=family,
    )
    base.precision.apply()
    base.lazy_weights.load("vae", "text")
    if unet:
        base.lazy_weights.load("unet")
    return base


def base_skeleton(
    source: str | os.PathLike[str] = "pocket",
    *,
    precision: Precision | None = None,
    clip_skip: int | None = None,
    max_tokens: int | None = None,
    vae: str | os.PathLike[str] | None = None,
    prediction_type: str | None = None,
    zero_terminal_snr: bool = False,
    family: str | None = None,
) -> Base:
    """As `load_base`, but without reading weights: all parts know their shapes, and load their weights when needed."""
    precision = precision or decide("auto")
    if not isinstance(precision, Precision):
        raise BaseModelError(f"precision {precision!r:.40}: wanted what sfumato.precision.decide('fp32') gives.")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise BaseModelError(f"--prediction-type {prediction_type}: unknown; wanted epsilon or v_prediction.")
    if family is not None and family not in FAMILIES:
        raise BaseModelError(f"family {family!r}: unknown; wanted {', '.join(FAMILIES)}.")
    path, name = find_base(source)
    own = _own_family(path)
    if own is not None and own.load is not None:
        parts = own.load(path, precision)
    elif path.is_file():
        parts = _from_file(path, precision, prediction_type, vae)
    else:
        forced = family or ("pocket" if name == "pocket" else None)
        parts = _from_folder(path, precision, prediction_type, forced, vae)
    if precision.quantized:
        quantize(parts.denoiser.model, precision.quantized)
    if zero_terminal_snr:
        parts.scheduler.update(single_file.ZERO_TERMINAL_SNR)
    if own is None:
        _check(parts, name, clip_skip, max_tokens)
    chosen = FAMILIES[family] if family else parts.family
    shells: dict[Part, list[LazyModel]] = {"unet": [parts.denoiser], "vae": [parts.vae], "text": parts.text_encoders}
    of_flow = chosen.noise == "flow"
    return (chosen.base() if chosen.base else Base)(
        family=chosen,
        name=name,
        denoiser=parts.denoiser.model,
        vae=parts.vae.model,
        text_encoders=tuple(shell.model for shell in parts.text_encoders),
        tokenizers=tuple(parts.tokenizers),
        scheduler=base_scheduler(parts.scheduler, name),
        precision=precision,
        alpha_bar=(flow_alphas_cumprod if of_flow else alphas_cumprod)(parts.scheduler, name).to(precision.device),
        clip_skip=clip_skip,
        max_tokens=max_tokens,
        zeros_for_empty_prompt=parts.zeros_for_empty_prompt,
        files=tuple(dict.fromkeys(file for each in shells.values() for shell in each for file in shell.files)),
        lazy_weights=LazyWeights(shells, precision.place),
    )


def _own_family(path: Path) -> Family | None:
    """The family of a folder, if it is one that reads its own folders."""
    if not (path / "model_index.json").is_file():
        return None
    index = read_config(path, "model_index.json")
    return family_with_loader(_class_of(index, "transformer") or _class_of(index, "unet"))


def family_skeleton(name: str, prediction_type: str | None = None) -> Base:
    """A base model with the family's published shapes and no weights: for counting memory, it cannot be loaded.

    prediction_type: tells the two sizes of SD 2.x apart.
    """
    family, config = FAMILIES[name], single_file.packaged_config(name, "scheduler/scheduler_config.json")
    texts = [
        text_skeleton(each.class_name, single_file.packaged_config(name, f"{each.folder}/config.json"))
        for each in family.encoders
    ]
    shape = single_file.packaged_config(name, "unet/config.json")
    if name == "sd2" and prediction_type == "epsilon":
        shape["sample_size"] = SD2_EPSILON_SIZE
    unet = unet_skeleton(shape)
    vae = vae_skeleton(single_file.packaged_config(name, "vae/config.json"))
    for model in (unet, vae, *texts):
        model.requires_grad_(False).eval()
    return Base(
        family=family,
        name=name,
        denoiser=unet,
        vae=vae,
        text_encoders=tuple(texts),
        tokenizers=tuple(_shipped_tokenizer(family, index, text) for index, text in enumerate(texts)),
        scheduler=base_scheduler(config, name),
        precision=decide("fp32", device="cpu"),
        alpha_bar=alphas_cumprod(config, name),
    )


def find_base(source: str | os.PathLike[str], fetch: Callable[[str], Path] = hub_folder) -> tuple[Path, str]:
    """(folder or file, public name) of a base model. fetch: downloads a hub id into the cache.

    Raises BaseModelError that says how the name was understood.
    """
    if not isinstance(source, str | os.PathLike) or not str(source):
        what = "nothing" if source == "" else f"a {type(source).__name__}"
        raise BaseModelError(f"a base or VAE is named by a text, such as pocket, a folder or a hub id; got {what}.")
    text = os.fspath(source)
    if said := web_address_error(text, of_hub="repositories"):
        raise BaseModelError(said)
    if text == "pocket":
        return _pocket_folder(), "pocket"
    path = Path(text).expanduser()
    if os.path.isdir(path):  # a text that is too long for a name is none
        return path, path.resolve().name
    if os.path.isfile(path):
        if path.suffix.lower() in WEIGHT_SUFFIXES[1:]:
            raise BaseModelError(
                f"{path.name}: a pickle file; it can run programs and is never opened. Get the base as .safetensors."
            )
        return path, path.name
    if path.suffix.lower() in WEIGHT_SUFFIXES:
        raise BaseModelError(f"{text}: there is no such file. Check the name and the folder.")
    if HUB_ID.fullmatch(text) and not text.startswith("."):
        return fetch(text), text
    raise BaseModelError(
        f"{text}: there is no such folder or file, for a base or a VAE. Wanted pocket, a diffusers folder, a hub id "
        "(owner/name) or a .safetensors file."
    )


def _pocket_folder() -> Path:
    if given := os.environ.get(POCKET_VARIABLE):
        if not (Path(given) / "model_index.json").is_file():
            raise BaseModelError(f"{POCKET_VARIABLE} names {given}, where no model_index.json is. Correct it.")
        return Path(given)
    if not (POCKET_FOLDER / "model_index.json").is_file():
        raise BaseModelError(
            f"pocket: not in this installation. Install sfumato again, or set {POCKET_VARIABLE} to its folder."
        )
    return POCKET_FOLDER


def _from_file(
    path: Path, precision: Precision, prediction_type: str | None, vae: str | os.PathLike[str] | None
) -> BaseParts:
    header = read_header(path)
    family = family_from_keys(header.tensors, path.name, needs_vae=vae is None)
    dtype = precision.dtype("vae")
    if vae is None:
        own = single_file.load_vae(header, family, dtype)
    else:
        own = _load_vae(vae, family, dtype, single_file.packaged_config(family.name, "vae/config.json"))
    scheduler = single_file.scheduler_config(family, header, prediction_type)
    config = single_file.unet_config(header, family)
    if family.name == "sd2" and scheduler["prediction_type"] == "epsilon":
        config["sample_size"] = SD2_EPSILON_SIZE
    text_encoders = [
        single_file.load_text_encoder(header, family, index, precision.dtype("text"))
        for index in range(len(family.encoders))
    ]
    return BaseParts(
        family=family,
        denoiser=single_file.load_unet(header, config, precision.dtype("unet")),
        vae=own,
        text_encoders=text_encoders,
        tokenizers=[_shipped_tokenizer(family, index, shell.model) for index, shell in enumerate(text_encoders)],
        scheduler=scheduler,
        zeros_for_empty_prompt=_wants_zeros(single_file.packaged_config(family.name, "model_index.json")),
    )


def _shipped_tokenizer(family: Family, index: int, text_encoder: Any) -> Any:
    config = single_file.packaged_config(family.name, f"{family.encoders[index].tokenizer}/tokenizer_config.json")
    positions = text_encoder.config.max_position_embeddings
    return clip_tokenizer(pad_token=config["pad_token"], positions=positions)


def _from_folder(
    folder: Path,
    precision: Precision,
    prediction_type: str | None,
    forced: str | None,
    vae: str | os.PathLike[str] | None,
) -> BaseParts:
    if not (folder / "model_index.json").is_file():
        inside = sorted(path.name for path in folder.glob("*.safetensors"))
        hint = f"Name {inside[0]} in it, or pass that with --lora if it is an adapter." if inside else "Check the path."
        if (folder.resolve().parent / "model_index.json").is_file():
            hint = f"It is a part of one: name the folder above it, {folder.resolve().parent.name}."
        raise BaseModelError(f"{folder.name}: no model_index.json, so it is no diffusers folder. {hint}")
    index = read_config(folder, "model_index.json")
    kind = index.get("_class_name")
    if _class_of(index, "unet") != "UNet2DConditionModel":
        raise BaseModelError(f"{folder.name}: a {kind} has no U-Net of Stable Diffusion. Name SD 1.x, SD 2.x or SDXL.")
    config = read_config(folder, "unet/config.json")
    family = FAMILIES[forced] if forced else family_of_config(config)
    lacking = [encoder.folder for encoder in family.encoders if not _class_of(index, encoder.folder)]
    if lacking:
        raise BaseModelError(f"{folder.name}: a {kind} without {lacking[0]}. Name a whole {family.title}.")
    scheduler = read_config(folder, "scheduler/scheduler_config.json")
    scheduler["prediction_type"] = prediction_type or scheduler.get("prediction_type", "epsilon")
    unet = folders.load_unet(folder, precision.dtype("unet"))
    dtype = precision.dtype("vae")
    if vae is None:
        own = folders.load_vae(folder / "vae", dtype)
    else:
        has_one = (folder / "vae/config.json").is_file()
        own = _load_vae(vae, family, dtype, read_config(folder, "vae/config.json") if has_one else None)
    text_encoders, tokenizers = [], []
    for encoder in family.encoders:
        shell = folders.load_text_encoder(folder, encoder, precision.dtype("text"))
        text_encoders.append(shell)
        positions = shell.model.config.max_position_embeddings
        tokenizers.append(folders.load_tokenizer(folder, encoder.tokenizer, positions))
        if (count := len(tokenizers[-1])) > (rows := shell.model.config.vocab_size):
            raise BaseModelError(
                f"{folder.name}: {encoder.tokenizer} has {count:,} tokens, and {encoder.folder} rows for {rows:,}. "
                "Name a whole base."
            )
    return BaseParts(family, unet, own, text_encoders, tokenizers, scheduler, _wants_zeros(index))


def _wants_zeros(index: Mapping[str, Any]) -> bool:
    """Whether the pipeline takes zeros for no negative prompt; diffusers' default for SDXL."""
    is_xl = str(index.get("_class_name", "")).startswith("StableDiffusionXL")
    return bool(index.get("force_zeros_for_empty_prompt", is_xl))


def _load_vae(
    source: str | os.PathLike[str], family: Family, dtype: torch.dtype, own: Mapping[str, Any] | None
) -> LazyModel:
    """A VAE in place of the base's, whose config is `own`, if it has one. Raises BaseModelError for other latents."""
    path, name = find_vae(source)
    if path.is_file() and family.name == "pocket":
        raise BaseModelError(f"{name}: a single file does not tell the shape of a VAE for pocket. Name its folder.")
    found = single_file.load_vae(read_header(path), family, dtype) if path.is_file() else folders.load_vae(path, dtype)
    for what, value in _LATENTS.items():
        here, there = value(found.model.config), None if own is None else value(own)
        if there is not None and here != there:
            raise BaseModelError(
                f"{name}: a VAE whose {what} is {here:g}, and this base's is {there:g}. Name a VAE for {family.title}."
            )
    return found


_LATENTS: Mapping[str, Callable[[Mapping[str, Any]], float]] = {
    "number of pixels for one of latents": lambda config: 2 ** (len(config["block_out_channels"]) - 1),
    "scaling factor": lambda config: config.get("scaling_factor", 0.18215),
}
"""What latents of one space have in common, by a VAE's config; a file of its own is read with the family's."""


def _class_of(index: Mapping[str, Any], part: str) -> Any:
    """The class that a model_index.json names for a part, as ["diffusers", "AutoencoderKL"]; None for none."""
    named = index.get(part)
    return named[1] if isinstance(named, list) and len(named) == 2 else None


def find_vae(source: str | os.PathLike[str]) -> tuple[Path, str]:
    """(folder with the VAE's config.json or single file, public name)."""
    path, name = find_base(source, hub_vae)
    if path.is_dir() and not (path / "config.json").is_file():
        if not (path / "vae/config.json").is_file():
            raise BaseModelError(
                f"{name}: no VAE is in this folder. Name one with a VAE's config.json, or a base's folder."
            )
        path = path / "vae"
    return path, name


def _check(parts: BaseParts, name: str, clip_skip: int | None, max_tokens: int | None) -> None:
    """Raises BaseModelError where the parts do not belong together."""
    unet, vae = parts.denoiser.model.config, parts.vae.model.config
    texts = [shell.model.config for shell in parts.text_encoders]
    if unet.in_channels not in (vae.latent_channels, 2 * vae.latent_channels + 1):  # the latter inpaints
        what = " (8 is an editing model)" if unet.in_channels == 8 else ""
        raise BaseModelError(
            f"{name}: the U-Net takes {unet.in_channels} channels{what}, the VAE gives {vae.latent_channels}. "
            "Name another base or VAE."
        )
    if unet.get("addition_embed_type") == "text_time":
        pooled = texts[-1].projection_dim
        taken = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        if pooled != taken:
            raise BaseModelError(
                f"{name}: the U-Net takes a pooled text of {taken} numbers, the second text encoder gives {pooled}. "
                "Name another base."
            )
    if unet.get("class_embed_type") or unet.get("num_class_embeds"):
        raise BaseModelError(
            f"{name}: the U-Net takes an image's embedding or a class beside the prompt, as unCLIP and upscalers do. "
            "Name another base."
        )
    width = sum(text.hidden_size for text in texts)
    if unet.cross_attention_dim != width:
        raise BaseModelError(
            f"{name}: the U-Net takes text of width {unet.cross_attention_dim}, the text encoder gives {width}. "
            "Name another base."
        )
    layers = min(text.num_hidden_layers for text in texts)
    if clip_skip is not None and not (type(clip_skip) is int and 0 <= clip_skip < layers - 1):
        raise BaseModelError(f"--clip-skip {clip_skip!r}: of {layers} layers, 0 to {layers - 2} can be skipped.")
    at_once = texts[0].max_position_embeddings - 2
    sizes = [at_once * count for count in range(1, MAX_CHUNKS + 1)]
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens not in sizes):
        *others, last = map(str, sizes)
        wanted = f"{', '.join(others)} or {last}"
        raise BaseModelError(f"--max-tokens {max_tokens!r}: the text encoder reads {at_once} at once; wanted {wanted}.")
