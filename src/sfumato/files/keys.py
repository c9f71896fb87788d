"""Which tensor of an adapter file belongs to which module and is what there: every key is accounted for. No torch.

Two grammars: kohya's `lora_unet_down_blocks_0_..._to_q.lora_down.weight`, and dotted ones, `unet.down_blocks.0....to_q.
lora_A.weight` as diffusers and peft write today and `....to_q.lora.down.weight`, `....processor.to_q_lora.down.weight`
as diffusers once wrote. OneTrainer's dotted names begin with `clip_l.`, `lora_te1.` and the like, those of ComfyUI's
text encoders with `text_encoders.clip_l.transformer.`; LyCORIS's own wrapper and SimpleTuner write `lycoris_` for
kohya's `lora_unet_`. What follows the module's name is in `sfumato.files.keys`.

The kinds of adapter, what files call their tensors, and what `--algo` calls them: one table. Imports no torch.

A tensor's name is its module's name and a suffix. The suffix tells the tensor's role, and the roles of a module tell
its kind. There are two sorts of kinds. One changes weights: the class that computes its change from a file's tensors is
in `sfumato.files.kinds.KINDS`, the layer that trains it in `sfumato.adapters.kinds.ALGOS`. The other changes no
weight, and is a module beside one of the model's: its one class does all, and its row here names it.

What files call the vectors of a textual inversion. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from math import isqrt, prod
from types import MappingProxyType
from typing import TYPE_CHECKING

from sfumato.files.header import Header
from sfumato.files.metadata import LABELS, family_from_metadata, family_from_widths
from sfumato.files.module_names import PARTS, Target, is_sgm, kohya_target, text_path, unet_path
from sfumato.files.peft import PeftSettings

if TYPE_CHECKING:
    from sfumato.files.kinds.modules import ModuleAdapter


Shape = tuple[int, ...]


@dataclass(frozen=True)
class Trained:
    """How a kind is trained. algo: what `--algo` and LyCORIS call it. about: what `--help` says of it, a sentence that
    goes on after "algo:". rate: how many times a LoRA's default learning rate its own is, by how fast a loss begins to
    fall (bench/adapter_kinds.py)."""

    algo: str
    about: str
    rate: float = 1.0


@dataclass(frozen=True, eq=False)
class KindKeys:
    """roles: the role by suffix. whole: the sets of roles of which one at least makes a module complete.

    trained: None for a kind that is only read. module: for a kind that changes no weight, returns its class, and
    imports it as late as that. rank: (role, axis) of the tensor whose size is the kind's rank; None for kinds without
    one, and for those that `rank_of` knows.
    """

    roles: Mapping[str, str]
    whole: tuple[frozenset[str], ...]
    trained: Trained | None = None
    module: Callable[[], type[ModuleAdapter]] | None = None
    rank: tuple[str, int] | None = None


def _keys(roles: Mapping[str, str] | Iterable[str], *whole: str, trained: Trained | None = None) -> KindKeys:
    named = roles if isinstance(roles, Mapping) else {name: name for name in roles}
    return KindKeys(MappingProxyType(dict(named)), tuple(frozenset(names.split()) for names in whole), trained)


def module_kind(
    module: Callable[[], type[ModuleAdapter]],
    roles: Iterable[str],
    *,
    trained: Trained | None = None,
    rank: tuple[str, int] | None = None,
    optional: Iterable[str] = (),
) -> KindKeys:
    """The row of a kind that changes no weight. roles: the names of its tensors, in its class and in files, of which
    `optional` may be missing; no other kind has them."""
    names = tuple(roles)
    row = _keys(names, " ".join(name for name in names if name not in set(optional)), trained=trained)
    return replace(row, module=module, rank=rank)


KIND_KEYS: dict[str, KindKeys] = {
    "LoRA": _keys(
        {
            **{f"{name}.weight": "down" for name in ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")},
            **{f"{name}.weight": "up" for name in ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")},
            "lora_mid.weight": "mid",
            "lora_B.bias": "up_bias",
        },
        "down up",
        trained=Trained("lora", "the product of two low-rank factors"),
    ),
    "LoHa": _keys(
        (f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        "hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        trained=Trained(
            "loha",
            "two such products multiplied element by element; its rank is up to the square of --rank",
            rate=0.1,
        ),
    ),
    "LoKr": _keys(
        (f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
        *(
            f"{first} {second}"
            for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
            for second in ("lokr_w2", "lokr_w2_a lokr_w2_b")
        ),
        trained=Trained(
            "lokr", "the Kronecker product of a small and a large factor; its file is the smallest", rate=3
        ),
    ),
    "OFT": _keys(
        {"oft_blocks": "oft_blocks", "rescale": "rescale"}
        | {"oft_R.weight": "oft_r", "oft_R": "oft_r", "oft_R.scaled_oft": "oft_scaled"},
        "oft_blocks",
        "oft_r",
        trained=Trained(
            "oft",
            "rotations of blocks of up to --rank outputs (orthogonal fine-tuning), which keep the angles between them",
            rate=0.2,
        ),
    ),
    "BOFT": _keys({"boft_R": "boft_r", "boft_s": "boft_s"}, "boft_r boft_s"),
    "IA3": _keys({"weight": "ia3_weight", "on_input": "on_input", "ia3_l": "ia3_l"}, "ia3_weight on_input", "ia3_l"),
    "GLoRA": _keys({f"{x}.weight": x for x in ("a1", "a2", "b1", "b2", "bm")}, "a1 a2 b1 b2"),
    "difference": _keys(
        {"diff": "diff", "w_norm": "diff", "set_weight": "set_weight", "diff_b": "bias", "b_norm": "bias"},
        "diff",
        "set_weight",
        "bias",
    ),
}
"""LoRA is LoCon too. `oft_blocks` of four dimensions is BOFT; a magnitude beside LoRA, LoHa or LoKr makes it DoRA."""

COMMON: Mapping[str, str] = MappingProxyType(
    {
        "alpha": "alpha",
        "dora_scale": "magnitude",
        "lora_magnitude_vector": "peft_magnitude",
        "lora_magnitude_vector.weight": "peft_magnitude",
        "magnitude": "peft_magnitude",  # ai-toolkit
    }
)
"""Suffixes that a module of several kinds may have."""


def trained_kinds() -> dict[str, Trained]:
    """What `--algo` takes, in the order of the table."""
    return {keys.trained.algo: keys.trained for keys in KIND_KEYS.values() if keys.trained}


def kind_named(algo: str) -> str:
    """The kind that `--algo` calls so, a key of KIND_KEYS."""
    return next(kind for kind, keys in KIND_KEYS.items() if keys.trained and keys.trained.algo == algo)


def module_class(kind: str) -> type[ModuleAdapter] | None:
    """The class of a kind that changes no weight; None for the others."""
    row = KIND_KEYS.get(kind)
    return None if row is None or row.module is None else row.module()


def roles() -> Mapping[str, str]:
    """The role of every suffix that a tensor of some kind has."""
    return _tables(tuple(KIND_KEYS.items()))[0]


@lru_cache(maxsize=4)
def _tables(rows: tuple[tuple[str, KindKeys], ...]) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """(the role by suffix, the kind by role) of these rows of KIND_KEYS."""
    by_suffix = {suffix: role for _, keys in rows for suffix, role in keys.roles.items()} | dict(COMMON)
    return by_suffix, {role: kind for kind, keys in rows for role in keys.roles.values() if role != "bias"}


SCALED = ("LoRA", "LoHa", "LoKr", "GLoRA")
"""The kinds whose alpha is divided by a rank. OFT's alpha is a constraint."""


def kind_of(roles: Iterable[str], blocks_ndim: int | None = None) -> str:
    """The kind of a module that has these roles: a key of KIND_KEYS, "DoRA", "DoRA of LoHa", ..., or "" for no kind.

    Roles of two kinds give "LoRA + LoHa", which no tool's arithmetic covers. blocks_ndim: oft_blocks' dimensions.
    """
    roles, by_role = set(roles), _tables(tuple(KIND_KEYS.items()))[1]
    kinds = list(dict.fromkeys(by_role[role] for role in sorted(roles) if role in by_role))
    kind = " + ".join(kinds)
    if kind == "OFT" and blocks_ndim == 4:
        return "BOFT"
    if roles & {"magnitude", "peft_magnitude"}:
        return "DoRA" if kind in ("", "LoRA") else f"DoRA of {kind}"
    return kind or ("difference" if "bias" in roles else "")


def base_kind(kind: str) -> str:
    """The kind that a DoRA rescales; any other kind itself."""
    return "LoRA" if kind == "DoRA" else kind.removeprefix("DoRA of ")


def is_complete(kind: str, roles: Iterable[str]) -> bool:
    """Whether the tensors that make a module of this kind are all there; True for kinds that are not known."""
    roles = set(roles)
    keys = KIND_KEYS.get("OFT" if kind == "BOFT" and "oft_blocks" in roles else base_kind(kind))
    return keys is None or any(needed <= roles for needed in keys.whole)


def weight_shape(roles: Mapping[str, Shape]) -> tuple[int | None, int | None]:
    """(out, in) of the weight that a module changes, by its tensors' shapes; None where they do not tell."""
    shapes = {role: shape for role, shape in roles.items() if shape}

    def at(role: str, axis: int) -> int | None:
        shape = shapes.get(role, ())
        return shape[axis] if len(shape) > axis else None

    if "down" in shapes or "up" in shapes:
        return at("up", 0), at("down", 1)
    if "hada_w1_a" in shapes:
        tucker = "hada_t1" in shapes
        return at("hada_w1_a", 1 if tucker else 0), at("hada_w1_b", 1)
    if "lokr_w1" in shapes or "lokr_w1_a" in shapes:
        first = at("lokr_w1", 0) or at("lokr_w1_a", 0), at("lokr_w1", 1) or at("lokr_w1_b", 1)
        second_out = at("lokr_w2", 0) or at("lokr_w2_a", 1 if "lokr_t2" in shapes else 0)
        second = second_out, at("lokr_w2", 1) or at("lokr_w2_b", 1)
        return _times(first[0], second[0]), _times(first[1], second[1])
    if "diff" in shapes or "set_weight" in shapes:
        role = "diff" if "diff" in shapes else "set_weight"
        return at(role, 0), at(role, 1)
    if "a1" in shapes and "b1" in shapes:  # LyCORIS today; its first GLoRA has the halves the other way round
        rank = min(shapes["a1"][:2])
        old = at("a1", 0) == rank and at("b2", 1) == rank
        return (at("b2", 0), at("a1", 1)) if old else (at("b1", 0), at("a1", 0))
    if "oft_blocks" in shapes and len(shapes["oft_blocks"]) > 2:
        return prod(shapes["oft_blocks"][-3:-1]), None
    return None, None


def rank_of(roles: Mapping[str, Shape]) -> int | None:
    """The rank of a module, for OFT the size of a block; None for kinds without one and for unusual shapes."""
    of_rows = (keys.rank for keys in KIND_KEYS.values() if keys.rank)
    known = (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("oft_blocks", -1))
    for role, axis in (*known, *of_rows):
        shape = roles.get(role, ())
        if len(shape) > 1:
            return shape[axis]
    if len(roles.get("a1", ())) > 1:
        return min(roles["a1"][:2])
    if len(roles.get("oft_r", ())) == 2:
        return triangle_side(roles["oft_r"][1])
    return roles["boft_r"][-1] if len(roles.get("boft_r", ())) == 4 else None


def triangle_side(triangle: int) -> int:
    """The side of a skew matrix, by how many numbers its upper triangle has."""
    return (1 + isqrt(1 + 8 * triangle)) // 2


def _times(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second


_ENCODERS = {
    "emb_params": "text_encoder",  # sd-scripts
    "emp_params": "text_encoder",  # OneTrainer's SD 1.x and 2.x, spelled so
    "string_to_param.*": "text_encoder",  # A1111's pickle, packed into a safetensors file by LyCORIS
    "clip_l": "text_encoder",  # everybody's SDXL
    "clip_g": "text_encoder_2",
    "text_encoders_0": "text_encoder",  # diffusers' advanced dreambooth scripts
    "text_encoders_1": "text_encoder_2",
}
_IGNORED = ("string_to_token.*",)
"""A1111's own number of the token."""
_OUTPUTS = ("clip_l_out", "clip_g_out", "emp_params_out")
"""OneTrainer's vectors of a token beyond the encoder, which a prompt cannot hold."""
SECOND_WIDTH = 1280
"""The width of SDXL's second encoder, by which a vector under its token's name goes to that."""


@dataclass(frozen=True)
class EmbeddingKey:
    """token: "" where the file's name is the token. part: of the pipeline; "" where the width tells, None to ignore."""

    token: str
    part: str | None


def embedding_key(name: str, *, bundled: bool, token: str | None = None) -> EmbeddingKey | None:
    """Whose vectors a tensor holds, None if no one's. bundled: in an adapter's file, where other names tell nothing.
    token: the file's, where it says so; then the name may look like anything.
    """
    if name == token:
        return EmbeddingKey(name, "")
    prefix = "bundle_emb."
    rest = name.removeprefix(prefix)
    if name in _ENCODERS:
        return EmbeddingKey("", _ENCODERS[name])
    for suffix, part in [*_ENCODERS.items(), *((ignored, None) for ignored in _IGNORED)]:
        if name.startswith(prefix) and rest.endswith(f".{suffix}") and rest != f".{suffix}":
            return EmbeddingKey(rest.removesuffix(f".{suffix}"), part)
    if name.startswith(prefix):
        return EmbeddingKey(rest, "") if rest and "." not in rest else None
    if bundled or name in _IGNORED:
        return None if bundled else EmbeddingKey("", None)
    # Whatever is not a path is a token: "<my-cat>", "my-cat", "easynegative-v1.1".
    path = name.endswith((".weight", ".bias", ".alpha")) or name.count(".") > 1 or name in _OUTPUTS
    return None if path and not name.startswith("<") else EmbeddingKey(name, "")


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
_PATH = re.compile(r"\w+(?:\.\w+)*")
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

    spellings: which grammars were met, of "kohya", "kohya sgm", "diffusers", and "sfumato" of kinds that change no
    weight. repeated: modules named twice, in different spellings, so that the file does not say which is meant.
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
        return {target: keys for target, keys in self.modules.items() if not is_complete(keys.kind, keys.names)}


def read_layout(names: Iterable[str] | Header, part: str | None = None) -> Layout:
    """The modules that a file's tensor names speak of.

    names: a header says more, as BOFT is told from OFT by its dimensions. part: the one that dotted names without a
    part's name belong to, where the file beside says so.
    """
    header = names if isinstance(names, Header) else None
    known, of_modules = roles(), _module_roles()
    is_dotted = header is not None and _goes_by_paths(header.metadata)
    found_roles: dict[Target, dict[str, str]] = {}
    unknown: list[str] = []
    repeated: list[str] = []
    spellings: set[str] = set()
    embeddings: dict[str, EmbeddingKey] = {}
    for name in names.tensors if isinstance(names, Header) else names:
        parsed = _module_tensor(name, of_modules) or _split(name, part, known)
        if parsed is None and is_dotted:
            parsed = _by_path(name, known)
        if parsed is None:
            found = embedding_key(name, bundled=True)
            if found is None:
                unknown.append(name)
            else:
                embeddings[name] = found
            continue
        target, role, spelling = parsed
        spellings.add(spelling)
        if role in found_roles.setdefault(target, {}):
            repeated.append(name)
        found_roles[target][role] = name
    modules: dict[Target, ModuleKeys] = {}
    for target, by_role in found_roles.items():
        blocks = by_role.get("oft_blocks")
        kind = kind_of(by_role, len(header.tensors[blocks].shape) if header and blocks else None)
        if not kind:  # an alpha and nothing that it could scale
            unknown.extend(by_role.values())
            continue
        modules[target] = ModuleKeys(kind, MappingProxyType(by_role))
    return Layout(
        MappingProxyType(modules),
        tuple(unknown),
        tuple(sorted(spellings)),
        tuple(repeated),
        MappingProxyType(embeddings),
    )


def _module_roles() -> frozenset[str]:
    """The roles of all kinds that change no weight."""
    return frozenset(role for keys in KIND_KEYS.values() if keys.module for role in keys.roles)


def _module_tensor(name: str, known: frozenset[str]) -> tuple[Target, str, str] | None:
    """(module, role, spelling) of a tensor of a kind that changes no weight, PART.PATH.ROLE; None of any other.

    known: the roles of these kinds. The path is taken as it is: such a module may stand beside any of the model's.
    """
    place, _, role = name.rpartition(".")
    part, _, path = place.partition(".")
    if role not in known or part not in PARTS or not _PATH.fullmatch(path):
        return None
    return (part, path), role, "sfumato"


def _goes_by_paths(metadata: Mapping[str, str]) -> bool:
    """Whether a file says that it is of a family whose files have the paths of the model's own modules."""
    family = family_from_metadata(metadata)
    return family is not None and LABELS[family].keys == "diffusers"


def _by_path(name: str, known: Mapping[str, str]) -> tuple[Target, str, str] | None:
    """(module, role, spelling) of PART.PATH.SUFFIX, the path taken as it is. known: the role by suffix."""
    part, _, rest = name.partition(".")
    words = rest.split(".")
    for count in (3, 2, 1):
        suffix = ".".join(words[-count:])
        if part in PARTS and suffix in known and len(words) > count and _PATH.fullmatch(".".join(words[:-count])):
            return (part, ".".join(words[:-count])), known[suffix], "diffusers"
    return None


def _split(name: str, part: str | None, known: Mapping[str, str]) -> tuple[Target, str, str] | None:
    """(module, role, spelling) of a tensor's name, None if it is not a module's. known: the role by suffix."""
    flat, _, suffix = name.partition(".")
    if suffix in known and flat.startswith(("lora_", "oft_", "lycoris_")):
        found = _flat_target(flat)
        return None if found is None else (found[0], known[suffix], found[1])
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
        if suffix in known and suffix not in _FLAT_ONLY and len(words) > count:
            target = _dotted_target(".".join(words[:-count]), part)
            return None if target is None else (target, known[suffix], "diffusers")
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


def lacks_alpha(layout: Layout, settings: PeftSettings) -> bool:
    """Whether a file with modules that alpha / rank scales says no alpha of any; all readers take the rank then."""
    scaled = [keys for keys in layout.modules.values() if base_kind(keys.kind) in SCALED]
    return bool(scaled) and not settings.says_alpha and not any("alpha" in keys.names for keys in scaled)


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
