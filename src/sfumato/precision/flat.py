"""A small U-Net's pictures on a CPU in two thirds of the time: its blocks computed one after another, in one file.

At 64 px a U-Net of diffusers spends a third of a step between its operations: in calls of modules, in turning images
into tokens and back, in keys and values of a text that stays the same. Here images lie with their channels last, where
tokens are the same memory, and a text's keys and values are kept from step to step. `bench/pocket_drawing.py` measures
it. The arithmetic is diffusers' UNet2DConditionModel's; its rounding is another in the last bits of fp32.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.precision import products

__all__ = ["computed", "drawn_flat", "is_usual"]

MOST = 64_000_000
"""Weights of a U-Net above which its operations take so long that what is between them does not show."""

_FREE = {
    *("sample_size", "in_channels", "out_channels", "flip_sin_to_cos", "freq_shift", "norm_num_groups", "norm_eps"),
    *("down_block_types", "up_block_types", "block_out_channels", "layers_per_block", "transformer_layers_per_block"),
    *("attention_head_dim", "cross_attention_dim", "use_linear_projection", "upcast_attention"),
    *("addition_embed_type", "addition_time_embed_dim", "projection_class_embeddings_input_dim"),
}
"""Settings of a UNet2DConditionModel that may have any value; the others have diffusers' default in all of SD."""
_BLOCKS = {"DownBlock2D", "CrossAttnDownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"}
_KINDS = {
    *_BLOCKS,
    *("UNet2DConditionModel", "UNetMidBlock2DCrossAttn", "ResnetBlock2D", "Downsample2D", "Upsample2D"),
    *("Transformer2DModel", "BasicTransformerBlock", "Attention", "FeedForward", "GEGLU"),
    *("Timesteps", "TimestepEmbedding"),
    *("Conv2d", "Linear", "GroupNorm", "LayerNorm", "SiLU", "Dropout", "ModuleList"),
}
"""Classes of the modules that are computed here; one of another is somebody's adapter, or another architecture."""
_OURS = {
    *(f"sfumato.precision.{name}" for name in ("flat", "layer_norms", "lean", "products")),
    "sfumato.compose.uncopied",
}
"""Modules whose functions compute what a layer does, only quicker; and adapter guidance, which calls `computed`."""

_IN_USE: WeakKeyDictionary[nn.Module, dict[int, _Flat]] = WeakKeyDictionary()
"""By U-Net and thread, what computes its calls."""
_CHANGING = Lock()


@contextmanager
def drawn_flat(unet: Any) -> Iterator[None]:
    """Within the block this thread's calls of the U-Net without gradients are computed so where `is_usual`; all others
    are as they were."""
    if not is_usual(unet) or get_ident() in _IN_USE.get(unet, ()):
        yield
        return
    flat = _Flat(unet)
    with _CHANGING:
        by_thread = _IN_USE.setdefault(unet, {})
        by_thread[get_ident()] = flat
        if "forward" not in vars(unet):
            unet.forward = computed(unet, unet.forward)
    try:
        yield
    finally:
        with _CHANGING:
            del by_thread[get_ident()]
            if not by_thread:
                del _IN_USE[unet]
                if getattr(vars(unet).get("forward"), "func", None) is _forward:
                    del unet.forward


def computed(unet: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """This forward of the U-Net's, flat where the calling thread draws so; for what calls it in parts."""
    return partial(_forward, unet, forward)


def is_usual(unet: Any) -> bool:
    """Whether this is a small SD 1.x, 2.x or SDXL U-Net in fp32 on the CPU, with nothing in it but its own layers:
    no adapter beside one, no hook, no attention of another kind."""
    return (
        type(unet).__name__ == "UNet2DConditionModel"
        and not unet.training
        and not torch.is_autocast_enabled("cpu")
        and _is_usual_config(unet.config)
        and _is_small_and_plain(unet.parameters())
        and all(map(_is_itself, unet.modules()))
        and not _is_hooked(_parts(unet))
    )


def _parts(unet: Any) -> list[nn.Module]:
    """All modules but the U-Net itself, whose own hooks come before a call and after it."""
    return list(unet.modules())[1:]


def _is_hooked(modules: Iterable[nn.Module]) -> bool:
    return any(module._forward_hooks or module._forward_pre_hooks for module in modules)


def _is_usual_config(config: Mapping[str, Any]) -> bool:
    blocks = (*config["down_block_types"], *config["up_block_types"])
    return (
        _BLOCKS.issuperset(blocks)
        and config["addition_embed_type"] in (None, "text_time")
        and all(config.get(name, value) == value for name, value in _defaults().items())
    )


@cache
def _defaults() -> dict[str, Any]:
    from diffusers import UNet2DConditionModel

    settings = inspect.signature(UNet2DConditionModel.__init__).parameters.values()
    return {each.name: each.default for each in settings if each.name not in _FREE and each.name != "self"}


def _is_small_and_plain(weights: Iterable[Tensor]) -> bool:
    count = 0
    for weight in weights:
        count += weight.numel()
        if (
            count > MOST
            or weight.device.type != "cpu"
            or weight.dtype != torch.float32
            or type(weight) not in (nn.Parameter, Tensor)
            or weight.is_inference()  # no version tells its change
        ):
            return False
    return True


def _is_itself(module: nn.Module) -> bool:
    """Whether the module computes what its class does, or what this package's quicker layers do in its place."""
    own: Any = vars(module)
    computed = [own[name] for name in ("forward", "_conv_forward") if name in own]
    return (
        type(module).__name__ in _KINDS
        and all(getattr(each, "func", each).__module__ in _OURS for each in computed)
        and type(own.get("processor")).__name__ in ("NoneType", "AttnProcessor2_0")
        and own.get("_chunk_size") is None  # feed-forward in chunks
        and not any(own.get(name) for name in ("s1", "s2", "b1", "b2"))  # FreeU
    )


def _forward(unet: Any, plain: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    flat = _IN_USE.get(unet, {}).get(get_ident())
    if flat is None or torch.is_grad_enabled():
        return plain(*args, **options)
    return flat.forward(plain, *args, **options)


class _Kept:
    """What is made of tensors, kept by them and by what they are: adapter guidance has two weights in turns."""

    _MOST = 4
    """Of each kind; a pipeline may hear its text in a new tensor at each step."""

    def __init__(self) -> None:
        self._made: defaultdict[Hashable, dict[Hashable, tuple[Tensor, tuple[Tensor, ...]]]] = defaultdict(dict)

    def of(self, kind: Hashable, make: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """make(*tensors), made once for the same ones."""
        known = self._made[kind]
        key = tuple((tensor.data_ptr(), tensor._version, tensor.shape) for tensor in tensors)
        if (found := known.get(key)) is None:
            while len(known) >= self._MOST:
                del known[next(iter(known))]
            # Holding the tensors' memory keeps its address from being another's.
            found = known[key] = make(*tensors), tuple(tensor.detach() for tensor in tensors)
        return found[0]


class _Flat:
    """The forward pass of one U-Net for one thread, whatever happens to its weights from call to call."""

    def __init__(self, unet: Any) -> None:
        self._unet, self._parts, self._kept = unet, _parts(unet), _Kept()

    def forward(
        self,
        plain: Callable[..., Any],
        /,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Tensor,
        *args: Any,
        **options: Any,
    ) -> Any:
        """As UNet2DConditionModel's, `plain`, which takes over where it is asked for more."""
        further = options.keys() - {"added_cond_kwargs", "return_dict"}
        if (
            sample.dtype != torch.float32
            or encoder_hidden_states.dtype != torch.float32
            or encoder_hidden_states.is_inference()
            or any(each is not None for each in (*args, *(options[name] for name in further)))
            or _is_hooked(self._parts)  # since: an adapter beside a layer whose weight was 0 until this step
        ):
            return plain(sample, timestep, encoder_hidden_states, *args, **options)
        drawn = self(sample, timestep, encoder_hidden_states, options.get("added_cond_kwargs"))
        if options.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=drawn)
        return (drawn,)

    def __call__(self, sample: Tensor, timestep: Any, text: Tensor, added: Any) -> Tensor:
        unet = self._unet
        time = unet.time_embedding(unet.get_time_embed(sample, timestep))
        more = unet.get_aug_embed(emb=time, encoder_hidden_states=text, added_cond_kwargs=added)
        time = F.silu(time if more is None else time + more)
        x = self._conv(unet.conv_in, sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for block in unet.down_blocks:
            for resnet, attention in _layers(block):
                x = self._layer(resnet, attention, x, time, text)
                skips.append(x)
            for down in block.downsamplers or ():
                x = self._conv(down.conv, x)
                skips.append(x)
        middle = unet.mid_block
        x = self._resnet(middle.resnets[0], x, time)
        for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True):
            x = self._resnet(resnet, self._transformer(attention, x, text), time)
        for block in unet.up_blocks:
            for resnet, attention in _layers(block):
                x = self._layer(resnet, attention, torch.cat([x, skips.pop()], 1), time, text)
            for up in block.upsamplers or ():
                x = self._conv(up.conv, F.interpolate(x, skips[-1].shape[2:], mode="nearest"))
        return self._conv(unet.conv_out, _norm_then_silu(unet.conv_norm_out, x)).contiguous()

    def _conv(self, conv: nn.Conv2d, x: Tensor) -> Tensor:
        stride: Any = conv.stride
        padding: Any = conv.padding
        return F.conv2d(x, self._kept.of(conv, _channels_last, conv.weight), conv.bias, stride, padding)

    def _layer(self, resnet: Any, attention: Any, x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = self._resnet(resnet, x, time)
        return x if attention is None else self._transformer(attention, x, text)

    def _resnet(self, block: Any, x: Tensor, time: Tensor) -> Tensor:
        inner = self._conv(block.conv1, _norm_then_silu(block.norm1, x))
        inner += _linear(block.time_emb_proj, time)[:, :, None, None]
        inner = self._conv(block.conv2, _norm_then_silu(block.norm2, inner))
        inner += x if block.conv_shortcut is None else _pointwise(block.conv_shortcut, x)
        return inner

    def _transformer(self, model: Any, x: Tensor, text: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        tokens = _linear(model.proj_in, _norm(model.norm, x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in model.transformer_blocks:
            own, other, feed = block.attn1, block.attn2, block.ff.net
            all_three = self._kept.of(own, _stacked, own.to_q.weight, own.to_k.weight, own.to_v.weight)
            asked = products.linear(_layer_norm(block.norm1, tokens), all_three)
            tokens = tokens + _attended(own, *_by_heads(asked, 3, own.heads))
            asked = _linear(other.to_q, _layer_norm(block.norm2, tokens))
            heard = self._kept.of(other, partial(_heard, other.heads), text, other.to_k.weight, other.to_v.weight)
            tokens += _attended(other, *_by_heads(asked, 1, other.heads), *heard)
            kept, gate = _linear(feed[0].proj, _layer_norm(block.norm3, tokens)).chunk(2, -1)
            tokens += _linear(feed[2], F.gelu(gate).mul_(kept))
        drawn = _linear(model.proj_out, tokens).view(rows, height, width, -1).permute(0, 3, 1, 2)
        drawn += x
        return drawn


def _layers(block: Any) -> Iterator[tuple[Any, Any]]:
    """A block's resnets, each with the transformer after it, None in blocks without attention."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return zip(block.resnets, attentions, strict=True)


def _linear(layer: Any, x: Tensor) -> Tensor:
    """A linear layer, or a convolution of one pixel as one, of (..., in)."""
    return products.linear(x, layer.weight.flatten(1), layer.bias)


def _pointwise(conv: nn.Conv2d, x: Tensor) -> Tensor:
    return _linear(conv, x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps)


def _norm_then_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return F.silu(_norm(norm, x), inplace=True)


def _layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.detach().contiguous(memory_format=torch.channels_last)


def _stacked(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def _heard(heads: int, text: Tensor, of_keys: Tensor, of_values: Tensor) -> Tensor:
    """The keys and values of a text, (2, rows, heads, tokens, a head's width)."""
    return _by_heads(products.linear(text, torch.cat([of_keys, of_values])), 2, heads).contiguous()


def _by_heads(x: Tensor, count: int, heads: int) -> Tensor:
    """So many projections side by side, (rows, tokens, all widths), as (count, rows, heads, tokens, a head's width)."""
    rows, tokens, _ = x.shape
    return x.view(rows, tokens, count, heads, -1).permute(2, 0, 3, 1, 4)


def _attended(attention: Any, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    drawn = F.scaled_dot_product_attention(queries, keys, values)
    return _linear(attention.to_out[0], drawn.transpose(1, 2).flatten(2))
