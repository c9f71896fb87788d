"""Which tensor of an adapter file belongs to which module and is what there: every key is accounted for. No torch.

Two grammars: kohya's `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and dotted ones, `unet.down_blocks.0....to_q.
lora_A.weight` as diffusers and peft write today and `....to_q.lora.down.weight`, `....processor.to_q_lora.down.weight`
as diffusers once wrote. Kinds other than LoRA are recognised, so that a reader can name what it cannot apply.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from sfumato.files.family import family_from_metadata, family_from_widths
from sfumato.files.header import Header
from sfumato.files.kohya import Target, is_sgm, kohya_target, text_path, unet_path

# What follows the module's name -> (role of the tensor, kind of adapter it makes); "" is every kind.
_ROLES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "lora_down.weight": ("down", "LoRA"),
        "lora_up.weight": ("up", "LoRA"),
        "lora_mid.weight": ("mid", "LoRA"),
        "lora_A.weight": ("down", "LoRA"),
        "lora_B.weight": ("up", "LoRA"),
        "lora.down.weight": ("down", "LoRA"),
        "lora.up.weight": ("up", "LoRA"),
        "lora_linear_layer.down.weight": ("down", "LoRA"),
        "lora_linear_layer.up.weight": ("up", "LoRA"),
        "alpha": ("alpha", ""),
        "lora_B.bias": ("up_bias", "LoRA with a bias"),
        "dora_scale": ("dora_scale", "DoRA"),
        "lora_magnitude_vector": ("dora_scale", "DoRA"),
        "lora_magnitude_vector.weight": ("dora_scale", "DoRA"),
        **{f"hada_{x}": (f"hada_{x}", "LoHa") for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")},
        **{f"lokr_{x}": (f"lokr_{x}", "LoKr") for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        "oft_blocks": ("oft_blocks", "OFT"),
        "oft_diag": ("oft_diag", "OFT"),
        "rescale": ("rescale", "OFT"),
        "on_input": ("on_input", "IA3"),
        "weight": ("weight", "IA3"),
        **{f"{x}.weight": (x, "GLoRA") for x in ("a1", "a2", "b1", "b2", "bm")},
        **{x: (x, "full difference") for x in ("diff", "diff_b", "set_weight")},
        **{x: (x, "norm difference") for x in ("w_norm", "b_norm")},
    }
)
# A file of one kind may hold the roles of another (DoRA is a LoRA with one more tensor); the later one names it.
_RANKED = (
    *("LoRA", "LoRA with a bias", "DoRA", "LoHa", "LoKr", "OFT", "IA3", "GLoRA"),
    *("full difference", "norm difference"),
)

_DOTTED = re.compile(
    r"(?P<module>.+?)\.(?P<role>lora_[AB](?:\.(?!weight$|bias$)\w+)?\.(?:weight|bias)|lora\.(?:down|up)\.weight|"
    r"lora_linear_layer\.(?:down|up)\.weight|lora_(?:down|up|mid)\.weight|lora_magnitude_vector(?:\.\w+)?(?:\.weight)?|"
    r"alpha|dora_scale|(?:hada|lokr)_\w+|oft_blocks|oft_diag)"
)
_PROCESSOR = re.compile(r"(?P<module>.+?)(?:\.processor)?\.to_(?P<which>q|k|v|out)_lora\.(?P<role>down|up)\.weight")
_PARTS = {
    "unet.": "unet",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder.": "text_encoder",
    "diffusion_model.": "unet",
}
_TEXT_PROJECTIONS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "out": "out_proj"}


@dataclass(frozen=True)
class ModuleKeys:
    """What the file holds for one module: the kind of adapter, and the tensor's name for each role."""

    kind: str
    names: Mapping[str, str]


@dataclass(frozen=True)
class Layout:
    """Every key of the file: by module, or `unknown`.

    spellings: which grammars were met, of "kohya", "kohya sgm", "diffusers". repeated: modules named twice, in
    different spellings, so that the file does not say which is meant.
    """

    modules: Mapping[Target, ModuleKeys]
    unknown: tuple[str, ...]
    spellings: tuple[str, ...]
    repeated: tuple[str, ...]

    @property
    def kinds(self) -> dict[str, int]:
        """The number of modules of each kind."""
        counts: dict[str, int] = {}
        for module in self.modules.values():
            counts[module.kind] = counts.get(module.kind, 0) + 1
        return counts


def read_layout(names: Iterable[str]) -> Layout:
    """The modules that a file's tensor names speak of."""
    roles: dict[Target, dict[str, str]] = {}
    kinds: dict[Target, set[str]] = {}
    unknown: list[str] = []
    repeated: list[str] = []
    spellings: set[str] = set()
    for name in names:
        parsed = _split(name)
        if parsed is None:
            unknown.append(name)
            continue
        target, role, kind, spelling = parsed
        spellings.add(spelling)
        if role in roles.setdefault(target, {}):
            repeated.append(name)
        roles[target][role] = name
        kinds.setdefault(target, set()).add(kind)
    modules: dict[Target, ModuleKeys] = {}
    for target, found in roles.items():
        named = [kind for kind in _RANKED if kind in kinds[target]]
        if not named:  # an alpha and nothing that it could scale
            unknown.extend(found.values())
            continue
        modules[target] = ModuleKeys(named[-1], MappingProxyType(found))
    return Layout(MappingProxyType(modules), tuple(unknown), tuple(sorted(spellings)), tuple(repeated))


def _split(name: str) -> tuple[Target, str, str, str] | None:
    """(module, role, kind, spelling) of a tensor's name, None if it is not an adapter's."""
    flat, _, suffix = name.partition(".")
    if flat.startswith(("lora_", "oft_")) and suffix in _ROLES:
        target = kohya_target("lora_" + flat.removeprefix("oft_").removeprefix("lora_"))
        if target is None:
            return None
        sgm = target[0] == "unet" and is_sgm(flat.removeprefix("lora_unet_"))
        return target, *_ROLES[suffix], "kohya sgm" if sgm else "kohya"
    if found := _PROCESSOR.fullmatch(name):
        role = found["role"]
        target = _dotted_target(found["module"], found["which"])
        return None if target is None else (target, role, "LoRA", "diffusers")
    if found := _DOTTED.fullmatch(name):
        suffix = re.sub(r"^(lora_[AB])\.\w+\.(weight|bias)$", r"\1.\2", found["role"])  # peft's adapter name between
        suffix = re.sub(r"^lora_magnitude_vector.*$", "lora_magnitude_vector", suffix)
        target = _dotted_target(found["module"])
        return None if target is None or suffix not in _ROLES else (target, *_ROLES[suffix], "diffusers")
    return None


def _dotted_target(module: str, attention: str | None = None) -> Target | None:
    """The module of a dotted path; attention: which projection, where old names leave it to the suffix."""
    module = module.removeprefix("base_model.model.")
    prefix = next((prefix for prefix in _PARTS if module.startswith(prefix)), "")
    part = _PARTS.get(prefix)
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
        return "an adapter for a transformer model (Flux, SD 3 and the like)"
    if any_starts("lora_transformer_", "lora_te3_", "diffusion_model.double_blocks", "diffusion_model.layers"):
        return "an adapter for a transformer model (Flux, SD 3 and the like)"
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


def text_widths(layout: Layout, header: Header) -> set[int]:
    """The input widths of the cross-attention's keys and values that the file changes."""
    return {
        header.tensors[keys.names["down"]].shape[1]
        for (part, path), keys in layout.modules.items()
        if part == "unet" and path.endswith((".attn2.to_k", ".attn2.to_v")) and "down" in keys.names
        if len(header.tensors[keys.names["down"]].shape) > 1
    }


def guess_family(layout: Layout, header: Header) -> str | None:
    """The family by the shapes, which cannot be wrong, else by the metadata; None where neither tells."""
    second = any(part == "text_encoder_2" for part, _ in layout.modules)
    by_shapes = family_from_widths(text_widths(layout, header), second_encoder=second)
    return by_shapes or family_from_metadata(header.metadata)
