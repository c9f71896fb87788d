"""The kinds of adapter and what files call their tensors: one table. Imports no torch.

A tensor's name is its module's name and a suffix. The suffix tells the tensor's role, and the roles of a module tell
its kind. The class of each kind is in `sfumato.files.changes.KINDS`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isqrt, prod
from types import MappingProxyType

Shape = tuple[int, ...]


@dataclass(frozen=True)
class KindKeys:
    """roles: the role by suffix. whole: the sets of roles of which one at least makes a module complete."""

    roles: Mapping[str, str]
    whole: tuple[frozenset[str], ...]


def _keys(roles: Mapping[str, str] | Iterable[str], *whole: str) -> KindKeys:
    named = roles if isinstance(roles, Mapping) else {name: name for name in roles}
    return KindKeys(MappingProxyType(dict(named)), tuple(frozenset(names.split()) for names in whole))


KIND_KEYS: Mapping[str, KindKeys] = MappingProxyType(
    {
        "LoRA": _keys(
            {
                **{f"{name}.weight": "down" for name in ("lora_down", "lora_A", "lora.down", "lora_linear_layer.down")},
                **{f"{name}.weight": "up" for name in ("lora_up", "lora_B", "lora.up", "lora_linear_layer.up")},
                "lora_mid.weight": "mid",
                "lora_B.bias": "up_bias",
            },
            "down up",
        ),
        "LoHa": _keys(
            (f"hada_{x}" for x in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
            "hada_w1_a hada_w1_b hada_w2_a hada_w2_b",
        ),
        "LoKr": _keys(
            (f"lokr_{x}" for x in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
            *(
                f"{first} {second}"
                for first in ("lokr_w1", "lokr_w1_a lokr_w1_b")
                for second in ("lokr_w2", "lokr_w2_a lokr_w2_b")
            ),
        ),
        "OFT": _keys(
            {"oft_blocks": "oft_blocks", "rescale": "rescale"}
            | {"oft_R.weight": "oft_r", "oft_R": "oft_r", "oft_R.scaled_oft": "oft_scaled"},
            "oft_blocks",
            "oft_r",
        ),
        "BOFT": _keys({"boft_R": "boft_r", "boft_s": "boft_s"}, "boft_r boft_s"),
        "IA3": _keys(
            {"weight": "ia3_weight", "on_input": "on_input", "ia3_l": "ia3_l"}, "ia3_weight on_input", "ia3_l"
        ),
        "GLoRA": _keys({f"{x}.weight": x for x in ("a1", "a2", "b1", "b2", "bm")}, "a1 a2 b1 b2"),
        "difference": _keys(
            {"diff": "diff", "w_norm": "diff", "set_weight": "set_weight", "diff_b": "bias", "b_norm": "bias"},
            "diff",
            "set_weight",
            "bias",
        ),
    }
)
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

ROLES: Mapping[str, str] = MappingProxyType(
    {suffix: role for keys in KIND_KEYS.values() for suffix, role in keys.roles.items()} | dict(COMMON)
)
_KIND_OF = {role: kind for kind, keys in KIND_KEYS.items() for role in keys.roles.values() if role != "bias"}


def kind_of(roles: Iterable[str], blocks_ndim: int | None = None) -> str:
    """The kind of a module that has these roles: a key of KIND_KEYS, "DoRA", "DoRA of LoHa", ..., or "" for no kind.

    Roles of two kinds give "LoRA + LoHa", which no tool's arithmetic covers. blocks_ndim: oft_blocks' dimensions.
    """
    roles = set(roles)
    kinds = list(dict.fromkeys(_KIND_OF[role] for role in sorted(roles) if role in _KIND_OF))
    kind = " + ".join(kinds)
    if kind == "OFT" and blocks_ndim == 4:
        return "BOFT"
    if roles & {"magnitude", "peft_magnitude"}:
        return "DoRA" if kind in ("", "LoRA") else f"DoRA of {kind}"
    return kind or ("difference" if "bias" in roles else "")


def base_kind(kind: str) -> str:
    """The kind that a DoRA rescales; any other kind itself."""
    return "LoRA" if kind == "DoRA" else kind.removeprefix("DoRA of ")


def is_whole(kind: str, roles: Iterable[str]) -> bool:
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
    for role, axis in (("down", 0), ("hada_w1_b", 0), ("lokr_w2_b", 0), ("lokr_w1_b", 0), ("oft_blocks", -1)):
        shape = roles.get(role, ())
        if len(shape) > 1:
            return shape[axis]
    if len(roles.get("a1", ())) > 1:
        return min(roles["a1"][:2])
    if len(roles.get("oft_r", ())) == 2:
        return side_of(roles["oft_r"][1])
    return roles["boft_r"][-1] if len(roles.get("boft_r", ())) == 4 else None


def side_of(triangle: int) -> int:
    """The side of a skew matrix, by how many numbers its upper triangle has."""
    return (1 + isqrt(1 + 8 * triangle)) // 2


def _times(first: int | None, second: int | None) -> int | None:
    return None if first is None or second is None else first * second
