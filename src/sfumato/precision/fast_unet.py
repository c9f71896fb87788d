"""A picture of a small U-Net on a CPU in two thirds of the time: its blocks computed one after another, in one file.

At 64 px a U-Net of diffusers spends a third of a step between its operations: in calls of modules, in turning images
into tokens and back, in keys and values of a text that stays the same. Here images lie with their channels last, where
tokens are the same memory, and a text's keys and values are kept from step to step. `bench/pocket_drawing.py` measures
it. The arithmetic is diffusers' UNet2DConditionModel's; its rounding is another in the last bits of fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from threading import Lock, get_ident
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sfumato.precision import cpu_matmul

__all__ = ["fast_forward", "fast_inference", "is_supported_unet"]

MAX_WEIGHTS = 64_000_000
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
_SETTINGS = {
    **{"padding_mode": "zeros", "dilation": (1, 1), "groups": 1},  # circular: for pictures that continue at their edges
    **{"output_scale_factor": 1, "rescale_output_factor": 1, "residual_connection": False},
    "_chunk_size": None,  # of the feed-forward
}
"""Attributes of modules that somebody may set on a loaded one, with the values that are computed here."""
_OURS = {
    *(f"sfumato.precision.{name}" for name in ("fast_unet", "layers", "layer_norms", "cpu_matmul")),
    "sfumato.compose.hooks",
}
"""Modules whose functions compute what a layer does, only quicker; and adapter guidance, which calls `computed`."""

_IN_USE: WeakKeyDictionary[nn.Module, dict[int, _FastUNet]] = WeakKeyDictionary()
"""By U-Net and thread, what computes its calls."""
_CHANGING = Lock()


@contextmanager
def fast_inference(unet: Any) -> Iterator[None]:
    """Within the block this thread's calls of the U-Net without gradients are computed so where `is_usual`; all others
    are as they were."""
    if not is_supported_unet(unet) or get_ident() in _IN_USE.get(unet, ()):
        yield
        return
    flat = _FastUNet(unet)
    with _CHANGING:
        by_thread = _IN_USE.setdefault(unet, {})
        by_thread[get_ident()] = flat
        if "forward" not in vars(unet):
            unet.forward = fast_forward(unet, unet.forward)
    try:
        yield
    finally:
        with _CHANGING:
            del by_thread[get_ident()]
            if not by_thread:
                del _IN_USE[unet]
                if getattr(vars(unet).get("forward"), "func", None) is _forward:
                    del unet.forward


def fast_forward(unet: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
    """This forward of the U-Net's, flat where the calling thread draws so; for what calls it in parts."""
    return partial(_forward, unet, forward)


def is_supported_unet(unet: Any) -> bool:
    """Whether this is a small SD 1.x, 2.x or SDXL U-Net in fp32 on the CPU, with nothing in it but its own layers:
    no adapter beside one, no hook, no attention of another kind."""
    return (
        type(unet).__name__ == "UNet2DConditionModel"
        and not unet.training
        and not torch.is_autocast_enabled("cpu")
        and _is_supported_config(unet.config)
        and _is_small_and_plain(unet.parameters())
        and all(map(_is_unpatched, unet.modules()))
        and not _is_hooked(_parts(unet))
    )


def _parts(unet: Any) -> list[nn.Module]:
    """All modules but the U-Net itself, whose own hooks come before a call and after it."""
    return list(unet.modules())[1:]


def _is_hooked(modules: Iterable[nn.Module]) -> bool:
    """Also by a hook of all modules there are."""
    every: Any = nn.modules.module
    return bool(every._global_forward_hooks or every._global_forward_pre_hooks) or any(
        module._forward_hooks or module._forward_pre_hooks for module in modules
    )


def _is_supported_config(config: Mapping[str, Any]) -> bool:
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
            count > MAX_WEIGHTS
            or weight.device.type != "cpu"
            or weight.dtype != torch.float32
            or type(weight) not in (nn.Parameter, Tensor)
            or weight.is_inference()  # no version tells its change
        ):
            return False
    return True


def _is_unpatched(module: nn.Module) -> bool:
    """Whether the module computes what its class does, or what this package's quicker layers do in its place."""
    own: Any = vars(module)
    instead = [own[name] for name in ("forward", "_conv_forward") if name in own]
    processor = own.get("processor")
    return (
        type(module).__name__ in _KINDS
        and _is_original_class(type(module), "forward", "_conv_forward")  # peft's have the same names
        and own.get("_compiled_call_impl") is None
        and all(getattr(each, "func", each).__module__ in _OURS for each in instead)
        and type(processor).__name__ in ("NoneType", "AttnProcessor2_0")
        and (processor is None or _is_original_class(type(processor), "__call__"))
        and all(own.get(name, usual) == usual for name, usual in _SETTINGS.items())
        and not isinstance(own.get("padding"), str)
        and all(getattr(own["_modules"].get(name), "bias", None) is None for name in ("to_q", "to_k", "to_v"))
        and not (own.get("p") and module.training)  # a dropout by itself
        and not any(own.get(name) for name in ("s1", "s2", "b1", "b2"))  # FreeU
    )


def _is_original_class(kind: type, *methods: str) -> bool:
    """Whether the class and these methods of it, where it has them, are torch's or diffusers', put there by nobody."""
    parts = (kind, *(getattr(kind, name) for name in methods if hasattr(kind, name)))
    return all(each.__module__.startswith(("torch.nn.", "diffusers.")) for each in parts)


def _forward(unet: Any, plain: Callable[..., Any], /, *args: Any, **options: Any) -> Any:
    flat = _IN_USE.get(unet, {}).get(get_ident())
    if flat is None or torch.is_grad_enabled():
        return plain(*args, **options)
    return flat.forward(plain, *args, **options)


class _CachedTensor:
    """What is made of some weights, and of what comes with each call; made anew where one is another than before.

    Adapter guidance has two weights in turns, so that several are kept.
    """

    MOST = 4
    """A pipeline may hear its text in a new tensor at each step."""

    def __init__(self, make: Callable[..., Tensor], *weights: Tensor) -> None:
        self._make, self._weights = make, weights
        self.known: dict[Any, tuple[Tensor, list[Tensor]]] = {}

    def __call__(self, *given: Tensor) -> Tensor:
        tensors = (*given, *self._weights)
        key = tuple([(tensor.data_ptr(), tensor._version, tensor.shape, tensor.stride()) for tensor in tensors])
        if (found := self.known.get(key)) is None:
            while len(self.known) >= self.MOST:
                del self.known[next(iter(self.known))]
            # Holding the tensors' memory keeps its address from being another's.
            found = self.known[key] = self._make(*tensors), [tensor.detach() for tensor in tensors]
        return found[0]


Layer = Callable[[Tensor], Tensor]


class _FastUNet:
    """The forward pass of one U-Net for one thread, whatever happens to its weights from call to call.

    Images are (rows, channels, height, width) with their channels last in memory, tokens (rows, tokens, width).
    """

    def __init__(self, unet: Any) -> None:
        self._unet, self._parts = unet, _parts(unet)
        held = [own for part in self._parts for own in (vars(part), part._parameters, part._modules)]
        self._held: list[tuple[Any, Any]] = [(own, dict(own)) for own in (unet._modules, *held)]
        self._first, self._last = _conv(unet.conv_in), _conv(unet.conv_out)
        self._last_norm = _norm_then_silu(unet.conv_norm_out)
        self._down = [
            (_layers(block), [_conv(each.conv) for each in block.downsamplers or ()]) for block in unet.down_blocks
        ]
        self._up = [(_layers(block), [_conv(each.conv) for each in block.upsamplers or ()]) for block in unet.up_blocks]
        middle = unet.mid_block
        self._middle = _resnet(middle.resnets[0])
        self._after = [
            (_transformer(attention), _resnet(resnet))
            for attention, resnet in zip(middle.attentions, middle.resnets[1:], strict=True)
        ]

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
            or torch.is_autocast_enabled("cpu")  # since
            or any(each is not None for each in (*args, *(options[name] for name in further)))
            or _is_hooked(self._parts)  # since: an adapter beside a layer whose weight was 0 until this step
            or self._is_changed()
        ):
            return plain(sample, timestep, encoder_hidden_states, *args, **options)
        drawn = self(sample, timestep, encoder_hidden_states, options.get("added_cond_kwargs"))
        if options.get("return_dict", True):
            from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

            return UNet2DConditionOutput(sample=drawn)
        return (drawn,)

    def _is_changed(self) -> bool:
        """Whether any module has since got another attribute, weight or part: pipelines of perturbed attention set
        their processors within their call."""
        try:
            return not all(now == before for now, before in self._held)
        except (RuntimeError, ValueError):  # of tensors or arrays that are no longer the same and have no one answer
            return True

    def __call__(self, sample: Tensor, timestep: Any, text: Tensor, added: Any) -> Tensor:
        time = F.silu(self._time(sample, timestep, text, added))
        x = self._first(sample.contiguous(memory_format=torch.channels_last))
        skips = [x]
        for layers, downs in self._down:
            for layer in layers:
                x = layer(x, time, text)
                skips.append(x)
            for down in downs:
                x = down(x)
                skips.append(x)
        x = self._middle(x, time)
        for transformer, resnet in self._after:
            x = resnet(transformer(x, text), time)
        for layers, ups in self._up:
            for layer in layers:
                x = layer(torch.cat([x, skips.pop()], 1), time, text)
            for up in ups:
                x = up(F.interpolate(x, skips[-1].shape[2:], mode="nearest"))
        return self._last(self._last_norm(x)).contiguous()

    def _time(self, sample: Tensor, timestep: Any, text: Tensor, added: Any) -> Tensor:
        unet = self._unet
        time: Tensor = unet.time_embedding(unet.get_time_embed(sample, timestep))
        more = unet.get_aug_embed(emb=time, encoder_hidden_states=text, added_cond_kwargs=added)
        return time if more is None else time + more


def _layers(block: Any) -> list[Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """A block's resnets, each with the transformer after it where the block has attention."""
    attentions = getattr(block, "attentions", None) or [None] * len(block.resnets)
    return [_layer(*pair) for pair in zip(block.resnets, attentions, strict=True)]


def _layer(block: Any, attention: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    resnet, transformer = _resnet(block), None if attention is None else _transformer(attention)

    def layer(x: Tensor, time: Tensor, text: Tensor) -> Tensor:
        x = resnet(x, time)
        return x if transformer is None else transformer(x, text)

    return layer


def _resnet(block: Any) -> Callable[[Tensor, Tensor], Tensor]:
    first_norm, second_norm = _norm_then_silu(block.norm1), _norm_then_silu(block.norm2)
    first, second, of_time = _conv(block.conv1), _conv(block.conv2), _linear(block.time_emb_proj)
    shortcut = None if block.conv_shortcut is None else _conv(block.conv_shortcut)

    def resnet(x: Tensor, time: Tensor) -> Tensor:
        inner = first(first_norm(x))
        inner += of_time(time)[:, :, None, None]
        inner = second(second_norm(inner))
        inner += x if shortcut is None else shortcut(x)
        return inner

    return resnet


def _transformer(model: Any) -> Callable[[Tensor, Tensor], Tensor]:
    norm, enter, leave = _group_norm(model.norm), _linear(model.proj_in), _linear(model.proj_out)
    blocks = [_block(block) for block in model.transformer_blocks]

    def transformer(x: Tensor, text: Tensor) -> Tensor:
        rows, _, height, width = x.shape
        tokens = enter(norm(x).permute(0, 2, 3, 1).flatten(1, 2))
        for block in blocks:
            tokens = block(tokens, text)
        drawn = leave(tokens).view(rows, height, width, -1).permute(0, 3, 1, 2)
        drawn += x
        return drawn

    return transformer


def _block(block: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """Attention to the image itself, attention to the text, and a gated linear unit."""
    own, other = block.attn1, block.attn2
    own_norm, other_norm, last_norm = (_layer_norm(norm) for norm in (block.norm1, block.norm2, block.norm3))
    own_out, other_out, asking = _linear(own.to_out[0]), _linear(other.to_out[0]), _linear(other.to_q)
    gated, back = _linear(block.ff.net[0].proj), _linear(block.ff.net[2])
    projections = _CachedTensor(_stacked, own.to_q.weight, own.to_k.weight, own.to_v.weight)
    heard = _CachedTensor(partial(_keys_and_values, other.heads), other.to_k.weight, other.to_v.weight)
    product = cpu_matmul.linear

    def attend(x: Tensor, text: Tensor) -> Tensor:
        queries, keys, values = _by_heads(product(own_norm(x), projections()), 3, own.heads)
        x = x + own_out(_attention(queries, keys, values))
        (queries,) = _by_heads(asking(other_norm(x)), 1, other.heads)
        keys, values = heard(text)
        x += other_out(_attention(queries, keys, values))
        kept, gate = gated(last_norm(x)).chunk(2, -1)
        x += back(F.gelu(gate).mul_(kept))
        return x

    return attend


def _conv(conv: nn.Conv2d) -> Layer:
    if conv.kernel_size == (1, 1):
        pointwise = _linear(conv)
        return lambda x: pointwise(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    weights, bias, (out, inner, height, width) = (
        _CachedTensor(_channels_last, conv.weight),
        conv.bias,
        conv.weight.shape,
    )
    stride: Any = conv.stride
    padding: Any = conv.padding

    def convolve(x: Tensor) -> Tensor:
        pixels = x.numel() // (inner * stride[0] * stride[1])
        if pixels > out:
            return F.conv2d(x, weights(), bias, stride, padding)
        # For few pixels oneDNN's packing of the weight takes longer than the product.
        around = (0, 0, padding[1], padding[1], padding[0], padding[0])
        patches = F.pad(x.permute(0, 2, 3, 1), around).unfold(1, height, stride[0]).unfold(2, width, stride[1])
        columns = patches.permute(0, 1, 2, 4, 5, 3).flatten(3)
        return cpu_matmul.linear(columns, weights().permute(0, 2, 3, 1).flatten(1), bias).permute(0, 3, 1, 2)

    return convolve


def _linear(layer: Any) -> Layer:
    """A linear layer, or a convolution of one pixel as one, of (..., in)."""
    weight, bias, product = layer.weight, layer.bias, cpu_matmul.linear
    if weight.ndim == 2:
        return lambda x: product(x, weight, bias)
    return lambda x: product(x, weight.flatten(1), bias)


def _group_norm(norm: nn.GroupNorm) -> Layer:
    groups, weight, bias, eps = norm.num_groups, norm.weight, norm.bias, norm.eps
    return lambda x: torch.group_norm(x, groups, weight, bias, eps)


def _norm_then_silu(norm: nn.GroupNorm) -> Layer:
    normal = _group_norm(norm)
    return lambda x: F.silu(normal(x), inplace=True)


def _layer_norm(norm: nn.LayerNorm) -> Layer:
    shape, weight, bias, eps = norm.normalized_shape, norm.weight, norm.bias, norm.eps
    return lambda x: torch.layer_norm(x, shape, weight, bias, eps)


def _channels_last(weight: Tensor) -> Tensor:
    return weight.detach().contiguous(memory_format=torch.channels_last)


def _stacked(*weights: Tensor) -> Tensor:
    return torch.cat(weights)


def _keys_and_values(heads: int, text: Tensor, of_keys: Tensor, of_values: Tensor) -> Tensor:
    """The keys and values of a text, (2, rows, heads, tokens, a head's width)."""
    return _by_heads(cpu_matmul.linear(text, torch.cat([of_keys, of_values])), 2, heads).contiguous()


def _by_heads(x: Tensor, count: int, heads: int) -> Tensor:
    """So many projections side by side, (rows, tokens, all widths), as (count, rows, heads, tokens, a head's width)."""
    rows, tokens, _ = x.shape
    return x.view(rows, tokens, count, heads, -1).permute(2, 0, 3, 1, 4)


def _attention(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """By heads, as (rows, tokens, width)."""
    return F.scaled_dot_product_attention(queries, keys, values).transpose(1, 2).flatten(2)
