"""Module paths <-> the flat names of kohya's grammar, which every tool of the field reads. Imports no torch.

A module is (part, path): part is "unet", "text_encoder" or "text_encoder_2", path is its name in `named_modules()` of
diffusers and of transformers >= 5.6. There `CLIPTextModel` (text_encoder) has no `text_model.` level any more and
`CLIPTextModelWithProjection` (text_encoder_2) has it still; in files both always have it.

kohya writes a path with "_" for ".", after a prefix for the part. Because names have "_" of their own, reading needs a
vocabulary. SDXL U-Nets go by the block names of the original sgm code (`input_blocks_4_1_...`), all others by those of
diffusers (`down_blocks_1_attentions_0_...`); on reading both are understood for every family.

What single-file checkpoints (CompVis' LDM, Stability's sgm, OpenCLIP) call each weight of a diffusers model.

The layers of a model by name, as tables and pictures show them. Imports no torch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from sfumato.errors import AdapterError
from sfumato.files.metadata import LABELS

RESNET_IN_UNET = {
    "norm1.": "in_layers.0.",
    "conv1.": "in_layers.2.",
    "time_emb_proj.": "emb_layers.1.",
    "norm2.": "out_layers.0.",
    "conv2.": "out_layers.3.",
    "conv_shortcut.": "skip_connection.",
}
UNET_ENDS = {
    "time_embedding.linear_1.": "time_embed.0.",
    "time_embedding.linear_2.": "time_embed.2.",
    "add_embedding.linear_1.": "label_emb.0.0.",
    "add_embedding.linear_2.": "label_emb.0.2.",
    "conv_in.": "input_blocks.0.0.",
    "conv_norm_out.": "out.0.",
    "conv_out.": "out.2.",
}
_VAE_PARTS = {
    "group_norm.": "norm.",
    "to_q.": "q.",
    "to_k.": "k.",
    "to_v.": "v.",
    "to_out.0.": "proj_out.",
    "conv_shortcut.": "nin_shortcut.",
    "conv_norm_out.": "norm_out.",
    "mid_block.resnets.0.": "mid.block_1.",
    "mid_block.resnets.1.": "mid.block_2.",
    "mid_block.attentions.0.": "mid.attn_1.",
}
_OPEN_CLIP_PARTS = {
    "encoder.layers.": "transformer.resblocks.",
    "layer_norm1.": "ln_1.",
    "layer_norm2.": "ln_2.",
    "mlp.fc1.": "mlp.c_fc.",
    "mlp.fc2.": "mlp.c_proj.",
    "self_attn.out_proj.": "attn.out_proj.",
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.": "token_embedding.",
    "final_layer_norm.": "ln_final.",
}


def unet_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name, without `model.diffusion_model.`, of a weight of a UNet2DConditionModel with this config.

    LDM counts input and output blocks through all levels: a level has its resnets, then one downsampler.
    """
    layers = config["layers_per_block"]
    if match := re.match(r"down_blocks\.(\d+)\.(resnets|attentions|downsamplers)\.(\d+)\.", name):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        first = 1 + level * (layers + 1)
        rest = name[match.end() :]
        if kind == "downsamplers":
            return f"input_blocks.{first + layers}.0.op.{rest.removeprefix('conv.')}"
        return f"input_blocks.{first + layer}." + _in_block(kind, rest)
    if match := re.match(r"up_blocks\.(\d+)\.(resnets|attentions|upsamplers)\.(\d+)\.", name):
        level, kind, layer = int(match[1]), match[2], int(match[3])
        first = level * (layers + 1)
        rest = name[match.end() :]
        if kind == "upsamplers":  # after the resnet, and after the attention where the level has one
            place = 2 if "CrossAttn" in config["up_block_types"][level] else 1
            return f"output_blocks.{first + layers}.{place}.{rest}"
        return f"output_blocks.{first + layer}." + _in_block(kind, rest)
    if match := re.match(r"mid_block\.(resnets|attentions)\.(\d+)\.", name):
        kind, layer = match[1], int(match[2])
        inner = _in_block(kind, name[match.end() :]).split(".", 1)[1]
        return f"middle_block.{2 * layer + (kind == 'attentions')}.{inner}"
    return _replace(name, UNET_ENDS)


def _in_block(kind: str, rest: str) -> str:
    """A block is a list: its resnet is module 0, its attention module 1."""
    return "0." + _replace(rest, RESNET_IN_UNET) if kind == "resnets" else "1." + rest


def vae_name(name: str, config: Mapping[str, Any]) -> str:
    """The LDM name, without `first_stage_model.`, of a weight of an AutoencoderKL with this config.

    LDM numbers the decoder's levels by their resolution, diffusers by their order.
    """
    last = len(config["block_out_channels"]) - 1
    if match := re.match(r"encoder\.down_blocks\.(\d+)\.(resnets|downsamplers)\.(\d+)\.", name):
        name = f"encoder.down.{match[1]}." + _vae_block(match, name)
    elif match := re.match(r"decoder\.up_blocks\.(\d+)\.(resnets|upsamplers)\.(\d+)\.", name):
        name = f"decoder.up.{last - int(match[1])}." + _vae_block(match, name)
    for old, new in _VAE_PARTS.items():
        name = name.replace(old, new)
    return name


def _vae_block(match: re.Match[str], name: str) -> str:
    place = {"resnets": f"block.{match[3]}.", "downsamplers": "downsample.", "upsamplers": "upsample."}[match[2]]
    return place + name[match.end() :]


def clip_name(name: str) -> str:
    """The name of a CLIPTextModel's weight without its level `text_model.`, which transformers 5.6 dropped."""
    return name.removeprefix("text_model.")


def open_clip_name(name: str) -> tuple[str, slice | None, bool]:
    """The OpenCLIP name of a CLIP text model's weight, the rows of it to take, and whether it is stored transposed.

    The rows are thirds of the fused query, key and value: slice(0, 1), slice(1, 2) or slice(2, 3), in thirds.
    """
    name = clip_name(name)
    if name == "text_projection.weight":
        return "text_projection", None, True
    for old, new in _OPEN_CLIP_PARTS.items():
        name = name.replace(old, new)
    if match := re.search(r"self_attn\.([qkv])_proj\.(weight|bias)$", name):
        third = "qkv".index(match[1])
        return f"{name[: match.start()]}attn.in_proj_{match[2]}", slice(third, third + 1), False
    return name, None, False


def _replace(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


DENOISERS = ("unet", "transformer")
"""What the part of a pipeline that denoises is called, one of them in each."""
PARTS = (*DENOISERS, "text_encoder", "text_encoder_2")
"""The parts of a pipeline that adapters change."""
Target = tuple[str, str]
"""(part, path) of one module."""

_PREFIXES: Mapping[str, Mapping[str, str]] = MappingProxyType(
    {
        family: {"unet": "lora_unet_", "text_encoder": "lora_te1_", "text_encoder_2": "lora_te2_"}
        if family == "sdxl"
        else {"unet": "lora_unet_", "text_encoder": "lora_te_"}
        for family in LABELS
    }
)
_READ = (
    ("lora_unet_", "unet"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te_", "text_encoder"),
)

# The names that have a "_" of their own; whatever else stands between two "_" is a name or a number by itself.
_UNET_WORDS = (
    "down_blocks up_blocks mid_block transformer_blocks to_q to_k to_v to_out proj_in proj_out conv_in conv_out "
    "conv_norm_out conv_shortcut time_emb_proj time_embedding add_embedding linear_1 linear_2"
)
_TEXT_WORDS = (
    "text_model self_attn q_proj k_proj v_proj out_proj layer_norm1 layer_norm2 final_layer_norm text_projection "
    "token_embedding position_embedding"
)

_ATTENTION = (
    r"(?:norm|proj_in|proj_out|transformer_blocks\.\d+\."
    r"(?:attn[12]\.(?:to_q|to_k|to_v|to_out\.0)|ff\.net\.(?:0\.proj|2)|norm[123]))"
)
_RESNET = r"(?:norm[12]|conv[12]|time_emb_proj|conv_shortcut)"
_INNER = rf"(?:attentions\.\d+\.{_ATTENTION}|resnets\.\d+\.{_RESNET})"
_UNET_PATH = re.compile(
    rf"down_blocks\.\d+\.(?:{_INNER}|downsamplers\.0\.conv)|up_blocks\.\d+\.(?:{_INNER}|upsamplers\.0\.conv)"
    rf"|mid_block\.{_INNER}|conv_in|conv_out|conv_norm_out|(?:time|add)_embedding\.linear_[12]"
)
_TEXT_PATH = re.compile(
    r"encoder\.layers\.\d+\.(?:self_attn\.(?:q|k|v|out)_proj|mlp\.fc[12]|layer_norm[12])"
    r"|embeddings\.(?:token|position)_embedding|final_layer_norm"
)

_SGM_TOP, _SGM_RESNET = (
    {theirs[:-1].replace(".", "_"): ours[:-1] for ours, theirs in table.items()}
    for table in (UNET_ENDS, RESNET_IN_UNET)
)
_SDXL = {"layers_per_block": 2, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
_SGM_LAYERS = 3
"""sgm blocks a diffusers block, for SD 1, SD 2 and SDXL: two layers and the down-sampler, going up three layers."""


def kohya_name(family: str, part: str, path: str) -> str:
    """The flat name, without `.lora_down.weight`, of a module in a file for `family`.

    Raises AdapterError for a part that the family lacks or a module that no other tool has a name for.
    """
    prefixes = _PREFIXES.get(family)
    if prefixes is None:
        raise AdapterError(f"there is no family {family!r:.40}; wanted {', '.join(_PREFIXES)}.")
    if part not in prefixes:
        raise AdapterError(f"{part} is no part of {LABELS[family].title}; its parts are {', '.join(prefixes)}.")
    if part == "unet":
        if not _UNET_PATH.fullmatch(path):
            raise AdapterError(
                f"unet module {path} has no name in other tools, so a file with it could not be loaded. "
                "Choose --targets without it."
            )
        return prefixes[part] + (_to_sgm(path) if family == "sdxl" else path.replace(".", "_"))
    inner = path.removeprefix("text_model.")
    if inner == "text_projection" and part == "text_encoder_2":
        return prefixes[part] + inner
    if not _TEXT_PATH.fullmatch(inner):
        raise AdapterError(
            f"{part} module {path} has no name in other tools, so a file with it could not be loaded. "
            "Choose --targets without it."
        )
    return f"{prefixes[part]}text_model_{inner.replace('.', '_')}"


def file_names(family: str, targets: Iterable[Target], file: str) -> dict[Target, str]:
    """What a file of this family calls each module: `kohya_names`, or `PART.PATH` where its labels say so. Raises
    AdapterError as that."""
    targets = list(targets)
    if family in LABELS and LABELS[family].keys == "diffusers" and targets:
        return {(part, path): f"{part}.{path}" for part, path in targets}
    return kohya_names(family, targets, file)


def kohya_names(family: str, targets: Iterable[Target], file: str) -> dict[Target, str]:
    """`kohya_name` of each module of a file. Raises AdapterError, too, for no modules and for two of one name."""
    names = {target: kohya_name(family, *target) for target in targets}
    if not names:
        raise AdapterError(f"{file}: there are no modules to write; the adapter is attached to nothing.")
    for name, count in Counter(names.values()).items():
        if count > 1:
            raise AdapterError(f"{file}: two modules are both called {name} in the file; give each module once.")
    return names


def kohya_target(name: str) -> Target | None:
    """The module of a flat name with kohya's prefix, in either spelling of the blocks; None if there is none such."""
    for prefix, part in _READ:
        if name.startswith(prefix):
            flat = name.removeprefix(prefix)
            path = unet_path(flat) if part == "unet" else text_path(flat, part)
            return None if path is None else (part, path)
    return None


def unet_path(flat: str) -> str | None:
    """The U-Net module of a name with "_" for ".", by diffusers' or sgm's block names; None if it is none."""
    path = _from_sgm(flat) or _unflatten(flat, _UNET_SPLIT)
    return path if _UNET_PATH.fullmatch(path) else None


def text_path(flat: str, part: str) -> str | None:
    """The text encoder's module of a name with "_" for "."; None if it is none."""
    path = _unflatten(flat, _TEXT_SPLIT).removeprefix("text_model.")
    if path == "text_projection" and part == "text_encoder_2":
        return path
    if not _TEXT_PATH.fullmatch(path):
        return None
    return f"text_model.{path}" if part == "text_encoder_2" else path


def is_sgm(name: str) -> bool:
    """Whether a U-Net's flat name goes by sgm's block names."""
    return name in _SGM_TOP or name.startswith(("input_blocks_", "middle_block_", "output_blocks_"))


def _splitter(words: str) -> re.Pattern[str]:
    longest_first = sorted(words.split(), key=len, reverse=True)
    return re.compile(rf"(?:{'|'.join(longest_first)}|[^_]+)(?=_|$)")


_UNET_SPLIT = _splitter(_UNET_WORDS)
_TEXT_SPLIT = _splitter(_TEXT_WORDS)


def _unflatten(flat: str, split: re.Pattern[str]) -> str:
    path = ".".join(split.findall(flat))
    return path if path.replace(".", "_") == flat else ""


def _to_sgm(path: str) -> str:
    return unet_name(f"{path}.", _SDXL)[:-1].replace(".", "_")


def _from_sgm(flat: str) -> str:
    """The diffusers path of an sgm name, "" if it is none."""
    if flat in _SGM_TOP:
        return _SGM_TOP[flat]
    if middle := re.fullmatch(r"middle_block_([012])_(\w+)", flat):
        place, rest = int(middle[1]), middle[2]
        if place == 1:
            return f"mid_block.attentions.0.{_unflatten(rest, _UNET_SPLIT)}"
        return f"mid_block.resnets.{place // 2}.{_SGM_RESNET.get(rest, '')}"
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(\w+)", flat)
    if not found:
        return ""
    down, place, rest = found[1] == "input", int(found[3]), found[4]
    i, j = divmod(int(found[2]) - down, _SGM_LAYERS)
    block = f"{'down' if down else 'up'}_blocks.{i}"
    if down and j == _SGM_LAYERS - 1:
        return f"{block}.downsamplers.0.conv" if (place, rest) == (0, "op") else ""
    if not down and j == _SGM_LAYERS - 1 and place > 0 and rest == "conv":
        return f"{block}.upsamplers.0.conv"
    if place == 0:
        return f"{block}.resnets.{j}.{_SGM_RESNET.get(rest, '')}"
    return f"{block}.attentions.{j}.{_unflatten(rest, _UNET_SPLIT)}" if place == 1 else ""


def block_of(target: Target) -> str:
    """The attention, resnet or text layer that a module is in."""
    part, path = target
    names = path.removeprefix("text_model.").split(".")
    if part not in DENOISERS:
        return f"{part}.{names[2]}" if names[:2] == ["encoder", "layers"] else f"{part}.{names[0]}"
    if names[0] in ("down_blocks", "up_blocks"):
        return ".".join(names[:4])
    return ".".join(names[:3]) if names[0] == "mid_block" else names[0]


def target_name(target: Target) -> str:
    """ "unet attn2.to_k" and the like: what is changed, whichever block it is in."""
    part, path = target
    names = path.split(".")
    for mark in ("attn1", "attn2", "ff", "self_attn", "mlp"):
        if mark in names:
            return f"{part} {'.'.join(names[names.index(mark) :])}"
    return f"{part} {names[-1] if len(names) > 2 else path}"


def block_order(name: str) -> tuple[int, list[tuple[bool, int, str]]]:
    """What sorts the names that `block_of` gives in the order of the model."""
    starts = ("text_encoder.", "text_encoder_2.", "conv_in", "time_", "add_", "down_blocks", "mid_block", "up_blocks")
    place = next((i for i, start in enumerate(starts) if name.startswith(start)), len(starts))
    return place, [(not word.isdigit(), int(word) if word.isdigit() else 0, word) for word in name.split(".")]
