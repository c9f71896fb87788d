"""Which tensor of an adapter file belongs to which module and is what there: every key is accounted for. No torch.

Two grammars: kohya's `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and dotted ones, `unet.down_blocks.0....to_q.
lora_A.weight` as diffusers and peft write today and `....to_q.lora.down.weight`, `....processor.to_q_lora.down.weight`
as diffusers once wrote. OneTrainer's dotted names begin with `clip_l.`, `lora_te1.` and the like, those of ComfyUI's
text encoders with `text_encoders.clip_l.transformer.`; LyCORIS's own wrapper and SimpleTuner write `lycoris_` for
kohya's `lora_unet_`. What follows the module's name is in `sfumato.files.kinds`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType

from sfumato.files.embedding_keys import EmbeddingKey, embedding_key
from sfumato.files.family import family_from_metadata, family_from_widths
from sfumato.files.header import Header
from sfumato.files.kinds import ROLES, Shape, is_whole, kind_of, weight_shape
from sfumato.files.kohya import Target, is_sgm, kohya_target, text_path, unet_path

_FLAT_ONLY = ("weight", "on_input", "rescale")
"""Suffixes of kohya's grammar only: after a dotted path `weight` is any checkpoint's."""
_PROCESSOR = re.compile(r"(?P<module>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<role>down|up)\.weight")
_COMFYUI = "text_encoders.{}.transformer."
"""What ComfyUI's LoraSave writes before the path within a text encoder; clip_h is SD 2's."""
_PARTS = {
    **{_COMFYUI.format(name): "text_encoder" for name in ("clip_l", "clip_h")},
    _COMFYUI.format("clip_g"): "text_encoder_2",
    **{prefix: "unet" for prefix in ("unet.", "diffusion_model.", "lora_unet.")},
    **{prefix: "text_encoder_2" for prefix in ("text_encoder_2.", "clip_g.", "lora_te2.")},
    **{prefix: "text_encoder" for prefix in ("text_encoder.", "clip_l.", "lora_te1.", "lora_te.")},
}
TRANSFORMER = "an adapter for a transformer model (Flux, SD 3 and the like)"
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True)
class ModuleKeys:
    """What the file holds for one module: the kind of adapter, and the tensor's name for each role."""

    kind: str
    names: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """Every key of the file: by module, of a bundled textual inversion, or `unknown`.

    spellings: which grammars were met, of "kohya", "kohya sgm", "diffusers". repeated: modules named twice, in
    different spellings, so that the file does not say which is meant.
    """

    modules: Mapping[Target, ModuleKeys]
    unknown: tuple[str, ...]
    spellings: tuple[str, ...]
    repeated: tuple[str, ...]
    embeddings: Mapping[str, EmbeddingKey]

    @property
    def kinds(self) -> dict[str, int]:
        """The number of modules of each kind."""
        return dict(Counter(module.kind for module in self.modules.values()))

    @cached_property
    def incomplete(self) -> dict[Target, ModuleKeys]:
        """The modules of which tensors are missing."""
        return {target: keys for target, keys in self.modules.items() if not is_whole(keys.kind, keys.names)}


def read_layout(names: Iterable[str] | Header, part: str | None = None) -> Layout:
    """The modules that a file's tensor names speak of.

    names: a header says more, as BOFT is told from OFT by its dimensions. part: the one that dotted names without a
    part's name belong to, where the file beside says so.
    """
    header = names if isinstance(names, Header) else None
    roles: dict[Target, dict[str, str]] = {}
    unknown: list[str] = []
    repeated: list[str] = []
    spellings: set[str] = set()
    embeddings: dict[str, EmbeddingKey] = {}
    for name in names.tensors if isinstance(names, Header) else names:
        parsed = _split(name, part)
        if parsed is None:
            found = embedding_key(name, bundled=True)
            if found is None:
                unknown.append(name)
            else:
                embeddings[name] = found
            continue
        target, role, spelling = parsed
        spellings.add(spelling)
        if role in roles.setdefault(target, {}):
            repeated.append(name)
        roles[target][role] = name
    modules: dict[Target, ModuleKeys] = {}
    for target, found_roles in roles.items():
        blocks = found_roles.get("oft_blocks")
        kind = kind_of(found_roles, len(header.tensors[blocks].shape) if header and blocks else None)
        if not kind:  # an alpha and nothing that it could scale
            unknown.extend(found_roles.values())
            continue
        modules[target] = ModuleKeys(kind, MappingProxyType(found_roles))
    return Layout(
        MappingProxyType(modules),
        tuple(unknown),
        tuple(sorted(spellings)),
        tuple(repeated),
        MappingProxyType(embeddings),
    )


def _split(name: str, part: str | None) -> tuple[Target, str, str] | None:
    """(module, role, spelling) of a tensor's name, None if it is not a module's."""
    flat, _, suffix = name.partition(".")
    if suffix in ROLES and flat.startswith(("lora_", "oft_", "lycoris_")):
        found = _flat_target(flat)
        return None if found is None else (found[0], ROLES[suffix], found[1])
    if old := _PROCESSOR.fullmatch(name):
        target = _dotted_target(old["module"], part, old["which"])
        return None if target is None else (target, old["role"], "diffusers")
    words = name.split(".")
    if words[-1] in ("weight", "bias") and len(words) > 3 and words[-3] in ("lora_A", "lora_B"):
        del words[-2]  # peft's name of the adapter
    elif len(words) > 2 and "lora_magnitude_vector" in words[-3:-1]:
        del words[words.index("lora_magnitude_vector", len(words) - 3) + 1 :]
    for count in (3, 2, 1):
        suffix = ".".join(words[-count:])
        if suffix in ROLES and suffix not in _FLAT_ONLY and len(words) > count:
            target = _dotted_target(".".join(words[:-count]), part)
            return None if target is None else (target, ROLES[suffix], "diffusers")
    return None


@lru_cache(maxsize=8192)  # a module's name comes three times a file, and again with the next file
def _flat_target(flat: str) -> tuple[Target, str] | None:
    """The module and the spelling of a name in kohya's grammar."""
    if flat.startswith("lycoris_"):
        flat = "lora_unet_" + flat.removeprefix("lycoris_")
    elif flat.startswith("oft_"):
        flat = "lora_" + flat.removeprefix("oft_")
    target = kohya_target(flat)
    if target is None:
        return None
    return target, "kohya sgm" if target[0] == "unet" and is_sgm(flat.removeprefix("lora_unet_")) else "kohya"


@lru_cache(maxsize=8192)
def _dotted_target(module: str, said: str | None, attention: str | None = None) -> Target | None:
    """The module of a dotted path. said: its part, if the path has none. attention: which projection, where old names
    leave it to the suffix."""
    module = module.removeprefix("base_model.model.")
    prefix = next((prefix for prefix in _PARTS if module.startswith(prefix)), "")
    part = _PARTS.get(prefix, said)
    flat = module.removeprefix(prefix).removeprefix("base_model.model.").replace(".", "_")
    if part in (None, "unet"):
        projection = {None: "", "out": "_to_out_0"}.get(attention, f"_to_{attention}")
        path = unet_path(flat + projection)
        if path is not None:
            return "unet", path
    if part != "unet":
        projection = f"_{_TEXT_PROJECTIONS[attention]}" if attention else ""
        path = text_path(flat + projection, part or "text_encoder")
        if path is not None:
            return part or "text_encoder", path
    return None


def describe_foreign(names: Iterable[str]) -> str | None:
    """What a file is that is no SD or SDXL adapter, to follow "this is": "a VAE", "a textual inversion", ...

    None if its names do not tell.
    """
    known = set(names)

    def any_starts(*prefixes: str) -> bool:
        return any(name.startswith(prefixes) for name in known)

    if any_starts("model.diffusion_model.", "first_stage_model.", "cond_stage_model.", "conditioner.embedders."):
        return "a full checkpoint"
    if any_starts("transformer.", "lora_unet_double_blocks", "lora_unet_single_blocks", "lora_unet_joint_blocks"):
        return TRANSFORMER
    if any_starts("lora_transformer_", "lora_te3_", "diffusion_model.double_blocks", "diffusion_model.layers"):
        return TRANSFORMER
    if {"conv_in.weight", "time_embedding.linear_1.weight"} <= known:
        return "a whole U-Net"
    if {"encoder.conv_in.weight", "decoder.conv_in.weight"} & known:
        return "a VAE"
    if any(name.endswith("embeddings.token_embedding.weight") for name in known):
        return "a whole text encoder"
    if known <= {"clip_l", "clip_g"} or known == {"emb_params"}:
        return "a textual inversion"
    if len(known) <= 4 and all("." not in name or name.startswith("<") for name in known):
        return "a textual inversion"
    return None


def shapes_of(keys: ModuleKeys, header: Header) -> dict[str, Shape]:
    """The shape of each of a module's tensors, by role."""
    return {role: header.tensors[name].shape for role, name in keys.names.items()}


def text_widths(layout: Layout, header: Header) -> set[int]:
    """The input widths of the cross-attention's keys and values that the file changes."""
    widths = (
        weight_shape(shapes_of(keys, header))[1]
        for (part, path), keys in layout.modules.items()
        if part == "unet" and path.endswith((".attn2.to_k", ".attn2.to_v"))
    )
    return {width for width in widths if width is not None}


def guess_family(layout: Layout, header: Header) -> str | None:
    """The family by the shapes, which cannot be wrong, else by the metadata; None where neither tells."""
    second = any(part == "text_encoder_2" for part, _ in layout.modules)
    second = second or any(key.part == "text_encoder_2" for key in layout.embeddings.values())
    by_shapes = family_from_widths(text_widths(layout, header), second_encoder=second)
    return by_shapes or family_from_metadata(header.metadata)
