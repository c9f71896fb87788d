"""The families of base models: what each consists of, and its defaults. Imports no torch.

What differs between families and can be read from a model (widths, factors, prediction type) is read from the model.
This table holds the rest.

The JSON files of a diffusers folder. Imports no torch.

What a single-file checkpoint is, told by the names of its weights. Imports no torch.

What a base needs of its pictures and captions, read from its configs: no weight is loaded, nor torch.

A base's tokenizer as it came, whatever new words it knows at present.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import sfumato
from sfumato.errors import BaseModelError
from sfumato.files.header import Header, read_header
from sfumato.files.metadata import LABELS
from sfumato.utils.formatting import pluralize

if TYPE_CHECKING:
    from sfumato.precision import Precision


@dataclass(frozen=True)
class Defaults:
    """Values for the settings that a config leaves unset."""

    resolution: int
    """Side in pixels. A base model whose U-Net says otherwise (SD 2.x at 768) overrides it."""
    batch: int
    learning_rate: float
    """For a LoRA with alpha equal to its rank. Other kinds of adapter use a multiple of it
    (`sfumato.adapters.ALGOS`)."""
    steps: int
    rank: int
    guidance: float
    """Guidance scale for generating (classifier-free guidance)."""
    sampling_steps: int
    sampler: str
    """A name from `sfumato.utils.schedulers`."""
    min_snr: float
    """Gamma of min-SNR weighting; 0 for none."""


@dataclass(frozen=True)
class Encoder:
    """The folder and the class of one text encoder in a diffusers folder."""

    folder: str
    tokenizer: str
    class_name: Literal["CLIPTextModel", "CLIPTextModelWithProjection"]


@dataclass(frozen=True)
class Family:
    """One family of base models. `sfumato.files.metadata` has the names that people and files use for it.

    A family of another kind than Stable Diffusion's is one file, with a `load` and a subclass of Base, one row
    here, and one with its labels there.
    """

    name: str
    defaults: Defaults
    encoders: tuple[Encoder, ...]
    denoiser: Literal["unet", "transformer"] = "unet"
    """The part that denoises: its folder in a diffusers folder, its name in a pipeline and in files of adapters."""
    denoiser_class: str = "UNet2DConditionModel"
    """The class of that part."""
    noise: Literal["discrete", "flow"] = "discrete"
    """discrete: timesteps with betas, where noise or v is predicted. flow: a straight way from the latents to noise,
    where the velocity on it is predicted (Lipman et al. 2023)."""
    targets: Mapping[str, str] | None = None
    """What `--targets` calls sets of the denoiser's layers, as regular expressions over their paths; None for those of
    a U-Net (`sfumato.adapters.TARGETS`). A first of them is called cross-attention, as the default is."""
    load: Callable[[Path, Precision], Any] | None = None
    """Finds the parts of a diffusers folder of this family, whose weights are read later. None for the families that
    `sfumato.models.loading` knows."""
    base: Callable[[], type[Any]] | None = None
    """Returns the subclass of Base that says how the denoiser is called and the pipeline made; None for Base itself."""

    @property
    def title(self) -> str:
        """Its name for people."""
        return LABELS[self.name].title


_FIRST = Encoder("text_encoder", "tokenizer", "CLIPTextModel")
_SECOND = Encoder("text_encoder_2", "tokenizer_2", "CLIPTextModelWithProjection")

# diffusers' and sd-scripts' LoRA guides agree on 1e-4; 800 steps of 4 pass over 16 pictures 200 times.
_SD = Defaults(
    resolution=512, batch=4, learning_rate=1e-4, steps=800, rank=16,
    guidance=7.5, sampling_steps=30, sampler="dpm++", min_snr=5.0,
)  # fmt: skip

FAMILIES: dict[str, Family] = {
    "pocket": Family(
        name="pocket",
        # Tuned by eye on datasets/line-style and a base of the same shape. No min-SNR weighting: with v-prediction
        # it takes weight from the steps of little noise, which is where a small base draws its outlines.
        defaults=Defaults(
            resolution=64, batch=8, learning_rate=6e-4, steps=240, rank=16,
            guidance=2.5, sampling_steps=12, sampler="dpm++", min_snr=0.0,
        ),
        encoders=(_FIRST,),
    ),
    "sd1": Family(
        name="sd1",
        defaults=_SD,
        encoders=(_FIRST,),
    ),
    "sd2": Family(
        name="sd2",
        defaults=_SD,
        encoders=(_FIRST,),
    ),
    "sdxl": Family(
        name="sdxl",
        defaults=Defaults(
            resolution=1024, batch=2, learning_rate=1e-4, steps=800, rank=16,
            guidance=6.0, sampling_steps=30, sampler="euler", min_snr=5.0,
        ),
        encoders=(_FIRST, _SECOND),
    ),
}  # fmt: skip


def family_of_denoiser(part: str, class_name: str, config: Mapping[str, Any]) -> Family:
    """The family of a pipeline by its denoiser. part: "unet" or "transformer". Raises BaseModelError for none."""
    own = [family for family in FAMILIES.values() if family.load and family.denoiser_class == class_name]
    if own:
        return own[0]
    if part != "unet":
        raise BaseModelError(f"a {class_name} is of no family that is known; there are {', '.join(FAMILIES)}.")
    return family_of_config(config)


def family_with_loader(class_name: object) -> Family | None:
    """The family that reads folders with a denoiser of this class by itself; None where there is none."""
    return next((one for one in FAMILIES.values() if one.load and one.denoiser_class == class_name), None)


def family_of_config(unet: Mapping[str, Any]) -> Family:
    """The family of a U-Net, from its diffusers config.

    Widths do not matter, so that a small model belongs to its family. SDXL takes sizes and a pooled embedding. SD 2 has
    linear projections in its attention blocks. SD 1 has a lowest level without attention or, in the smallest distilled
    models, no middle block. pocket has a middle block and attention at every level. Raises BaseModelError.
    """
    if unet.get("addition_embed_type") == "text_time":
        return FAMILIES["sdxl"]
    if unet.get("use_linear_projection"):
        return FAMILIES["sd2"]
    blocks = unet.get("down_block_types", ("DownBlock2D",))
    if not isinstance(blocks, list | tuple):
        raise BaseModelError(
            f"unet/config.json: down_block_types is {blocks!r:.40}; wanted a list of names. Download it again."
        )
    if "DownBlock2D" in blocks or unet.get("mid_block_type", "") is None:
        return FAMILIES["sd1"]
    return FAMILIES["pocket"]


def read_config(folder: Path, part: str) -> dict[str, Any]:
    """A JSON file of the folder. Raises BaseModelError if it is missing or no JSON object."""
    where = f"{folder.name}/{part}"
    try:
        config = json.loads((folder / part).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BaseModelError(f"{where}: missing. The folder is incomplete; download it again.") from None
    except (OSError, ValueError, RecursionError):
        raise BaseModelError(f"{where}: not readable as JSON. Download it again.") from None
    if not isinstance(config, dict):
        raise BaseModelError(f"{where}: no JSON object. Download it again.")
    return config


UNET, VAE = "model.diffusion_model.", "first_stage_model."
CLIP, OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPEN_CLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
TEXT_PREFIXES: Mapping[str, tuple[str, ...]] = {"sdxl": (XL_CLIP, XL_OPEN_CLIP), "sd2": (OPEN_CLIP,), "sd1": (CLIP,)}
"""Where each family keeps its text encoders, in the order in which the families are tried."""

WHOLE_CHECKPOINT_ADVICE = "Name a whole checkpoint of SD 1.x, SD 2.x or SDXL."
OTHER_MODELS: tuple[tuple[str, str, str], ...] = (
    (
        r"(^|[._])lora[._]|hada_w\d|lokr_w\d|\.dora_scale$|\.alpha$",
        "an adapter (a LoRA or its kin)",
        "Name the model that it was made for as the base.",
    ),
    (r"^control_model\.|^controlnet_|^input_hint_block\.|^zero_convs\.", "a ControlNet", WHOLE_CHECKPOINT_ADVICE),
    (r"^(emb_params|clip_[lg]|\*)$", "a textual inversion", WHOLE_CHECKPOINT_ADVICE),
    (
        r"joint_blocks\.|double_blocks\.|single_blocks\.|double_layers\.",
        "a transformer (SD 3, FLUX)",
        WHOLE_CHECKPOINT_ADVICE,
    ),
    (r"^conditioner\.embedders\.0\.model\.", "an SDXL refiner", WHOLE_CHECKPOINT_ADVICE),
    (r"^edm_mean$|^edm_vpred\.", "an EDM model", WHOLE_CHECKPOINT_ADVICE),
    (r"motion_modules\.", "a motion module", WHOLE_CHECKPOINT_ADVICE),
)
"""(pattern of a weight's name, what such a file is, what to do with it)."""
SINGLE_PARTS: tuple[tuple[str, str, str], ...] = (
    (r"^(down_blocks|mid_block|up_blocks)\.", "the U-Net of a diffusers folder", "Name its whole folder."),
    (r"^(text_model|embeddings|encoder\.layers)\.", "a text encoder alone", WHOLE_CHECKPOINT_ADVICE),
    (r"^(encoder|decoder)\.", "a VAE alone", "Pass it with --vae, and its base with --base."),
)


def family_from_keys(names: Iterable[str], file: str, *, needs_vae: bool = True) -> Family:
    """The family of a checkpoint. Raises BaseModelError that says what the file is instead, or what it lacks."""
    names = set(names)
    _refuse(names, OTHER_MODELS, file)
    has_unet, has_vae = _has(names, UNET), _has(names, VAE)
    if has_unet and (has_vae or not needs_vae):
        for family, prefixes in TEXT_PREFIXES.items():
            if all(_has(names, prefix) for prefix in prefixes):
                return FAMILIES[family]
    if has_unet:
        if not has_vae and needs_vae:
            raise BaseModelError(
                f"{file}: a checkpoint without its VAE. Give one with --vae, or n{WHOLE_CHECKPOINT_ADVICE[1:]}"
            )
        raise BaseModelError(f"{file}: a checkpoint without its text encoder. {WHOLE_CHECKPOINT_ADVICE}")
    _refuse(names, SINGLE_PARTS, file)
    raise BaseModelError(
        f"{file}: none of its {pluralize(len(names), 'weight')} belongs to a known base. {WHOLE_CHECKPOINT_ADVICE}"
    )


def stated_prediction_type(header: Header) -> str:
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


def resolve_prediction_type(header: Header, family: str, prediction_type: str | None) -> str:
    """What a checkpoint of this family predicts: as the user says, or the file. Raises BaseModelError for one of SD 2.x
    of which neither is known."""
    found = prediction_type or stated_prediction_type(header)
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


_PACKAGE = Path(sfumato.__file__).parent


@dataclass(frozen=True)
class BaseRequirements:
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

        from sfumato.models.vocabulary import clip_tokenizer, with_readable_pad_token

        folder = self.folder / "tokenizer"
        if any((folder / name).is_file() for name in ("tokenizer.json", "vocab.json")):
            return with_readable_pad_token(CLIPTokenizer.from_pretrained(str(folder), local_files_only=True))
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


def read_requirements(base: str, prediction_type: str | None = None, max_tokens: int | None = None) -> BaseRequirements:
    """What `base` needs: pocket, a diffusers folder, a checkpoint, sd1, sd2, sdxl, or a hub id in the local cache.

    prediction_type, max_tokens: as of `load_base`; the first tells the sizes of SD 2.x apart. Raises BaseModelError
    where the base's configs are not on this machine, or its file does not say which of the two it is.
    """
    if not base:
        raise BaseModelError("--base is empty; name pocket, a folder, a file, a hub id or a family, such as sdxl.")
    path, family = Path(base).expanduser(), base
    if base != "pocket" and path.is_file():
        header = read_header(path)
        family = family_from_keys(header.tensors, path.name, needs_vae=False).name
        prediction_type = resolve_prediction_type(header, family, prediction_type)
    folder = path if base != "pocket" and path.is_dir() else _folder(family)
    unet, vae = read_config(folder, "unet/config.json"), read_config(folder, "vae/config.json")
    if folder == _folder("sd2") and prediction_type == "epsilon":
        unet |= {"sample_size": SD2_EPSILON_SIZE}
    text = read_config(folder, "text_encoder/config.json")
    factor = 2 ** (_levels(vae, folder, "vae") - 1)
    size = unet.get("sample_size")
    return BaseRequirements(
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
        return _PACKAGE / "models/pocket"
    if base in FAMILIES:
        return _PACKAGE / "models" / "configs" / base
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


def plain_tokenizer(tokenizer: Any) -> Any:
    """The tokenizer without the new words that it knows at present (`sfumato.adapters.embeddings.added_tokens` puts
    the plain one aside)."""
    return getattr(tokenizer, "_sfumato_plain", (tokenizer,))[0]
