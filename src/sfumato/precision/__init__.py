"""Which dtype each part is stored and computed in, on which device, with which attention, and why.

`decide` decides once and gives its reasons; nothing else in the package knows about dtypes. Trainable weights are
always fp32: AdamW's updates at a learning rate of 1e-4 are below half a unit in the last place of most bf16 weights,
and would be lost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from sfumato.errors import PrecisionError
from sfumato.precision import choices, cpu_matmul, layer_norms
from sfumato.precision.choices import DTYPES, NAMES, Requested
from sfumato.precision.memory import keep_freed_memory
from sfumato.precision.quantization import FORMATS, Quantization

if TYPE_CHECKING:
    from sfumato.precision.offload import Offload

__all__ = ["DTYPES", "NAMES", "Attention", "Part", "Precision", "Requested", "decide", "forecast_precision"]

Attention = Literal["sdpa", "xformers"]
Part = Literal["unet", "text", "vae"]
ModuleT = TypeVar("ModuleT", bound=nn.Module)


@dataclass(frozen=True)
class Precision:
    """The device and the number formats for one process. Made by `decide`.

    storage: dtype in which frozen weights of the U-Net and the text encoders are stored. compute: dtype of their matrix
    products. vae: dtype of the VAE, stored and computed. offload: where parts wait for their turn on the device; None
    if all are on it. quantized: what the frozen U-Net's large weights are kept in instead of `storage`, if anything.
    reasons: one sentence for each row of `table`.
    """

    device: torch.device
    storage: torch.dtype
    compute: torch.dtype
    vae: torch.dtype
    attention: Attention
    tf32: bool
    products: str
    channels_last: bool
    gradient_checkpointing: bool
    optimizer_state: str
    reasons: Mapping[str, str]
    offload: Offload | None = None
    quantized: Quantization | None = None

    def rows(self) -> list[tuple[str, str, str]]:
        """(what, decision, reason) for each part of the decision."""
        onoff = {True: "on", False: "off"}
        decided = {
            "device": str(self.device),
            "frozen weights": NAMES[self.storage],
            "compute": NAMES[self.compute],
            "VAE": NAMES[self.vae],
            "trained weights": "fp32",
            "optimizer state": self.optimizer_state,
            "attention": self.attention,
            "TF32": onoff[self.tf32],
            "fp32 products": self.products,
            "channels last": onoff[self.channels_last],
            "checkpointing": onoff[self.gradient_checkpointing],
        }
        if self.quantized:
            decided["large weights"] = self.quantized
        if self.offload is not None:
            decided["offload"] = "on"
        return [(what, value, self.reasons.get(what, "")) for what, value in decided.items()]

    def table(self) -> str:
        """The decision as a small table, one line a row, without a trailing newline."""
        rows = self.rows()
        widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
        lines = (f"{what:<{widths[0]}}  {value:<{widths[1]}}  {reason}" for what, value, reason in rows)
        return "\n".join(line.rstrip() for line in lines)

    def autocast(self) -> AbstractContextManager[None]:
        """The context in which frozen and trained weights are computed together; nothing at all in fp32."""
        if self.compute == torch.float32:
            return nullcontext()
        # Its cache holds the cast of every fp32 weight that learns until the context ends. That spares adapters some
        # casts, and of a whole model it is a second one.
        is_cached = self.storage == self.compute
        context: AbstractContextManager[None] = torch.autocast(
            self.device.type, dtype=self.compute, cache_enabled=is_cached
        )
        return context

    def drawing(self, *modules: nn.Module) -> AbstractContextManager[None]:
        """The context in which these modules draw: `autocast`, but nothing at all where all of their weights have the
        dtype of the products already. On a GPU autocast would only take the norms to fp32 and back."""
        weights = (weight for module in modules for weight in module.parameters() if weight.is_floating_point())
        return nullcontext() if all(weight.dtype == self.compute for weight in weights) else self.autocast()

    def scaler(self) -> torch.amp.GradScaler:
        """The loss scaler. It does nothing unless fp16 gradients would underflow without it."""
        return torch.amp.GradScaler(self.device.type, enabled=self.compute == torch.float16)

    def dtype(self, part: Part) -> torch.dtype:
        """The dtype in which the weights of a frozen part are stored."""
        return self.vae if part == "vae" else self.storage

    def place(self, module: ModuleT, part: Part = "unet") -> ModuleT:
        """The same module: frozen, in evaluation mode, in the part's dtype and memory format.

        It is on the device or, with `offload`, in main memory until its turn.
        """
        module.requires_grad_(False).eval()
        if self.channels_last and part != "text":
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        # Not `module.to`: diffusers overrides it to warn of modules kept in fp32, of which these models have none.
        nn.Module.to(module, "cpu" if self.offload else self.device, self.dtype(part))
        if self.offload is not None:
            self.offload.add(module)
        if part == "unet" and self.gradient_checkpointing:
            module.enable_gradient_checkpointing()  # type: ignore[operator]
        if part != "text" and self.attention == "xformers":
            module.enable_xformers_memory_efficient_attention()  # type: ignore[operator]
        if self.device.type == "cpu":
            cpu_matmul.use_fast_matmul(module)
            layer_norms.use_fp32_norm_gradients(module)
        return module

    def prepare_for_training(self, module: nn.Module) -> None:
        """Prepare a U-Net or text encoder for training: on a CPU in bf16 it gets attention with a faster backward pass.

        In fp32 torch's own attention is as fast (`bench/cpu_training.py`), and stays.
        """
        if self.device.type == "cpu":
            layer_norms.use_fp32_norm_gradients(module)
        if self.device.type == "cpu" and self.compute == torch.bfloat16 and self.attention == "sdpa":
            from sfumato.precision.layers import use_cpu_training_attention

            use_cpu_training_attention(module)

    def compiled(self, module: nn.Module) -> Callable[..., Any]:
        """The module compiled by `torch.compile`; it shares the module's weights.

        On a CPU in bf16 the module's memory layouts are kept. With the layouts that torch 2.13 chooses, gradients are
        zero everywhere below the last nearest-neighbour upsampling that a concatenation and a SiLU follow, as in every
        U-Net.
        """
        keeps_layouts = self.device.type == "cpu" and self.compute == torch.bfloat16
        return torch.compile(module, options={"layout_optimization": False} if keeps_layouts else None)

    def apply(self) -> None:
        """Set the switches of the whole process: TF32 on CUDA; on a CPU, keep freed memory for the next tensor."""
        if self.device.type == "cuda":
            if self.device.index is not None:  # else what asks for "cuda" opens the first one, too
                torch.cuda.set_device(self.device)
            torch.backends.cuda.matmul.allow_tf32 = self.tf32
            torch.backends.cudnn.allow_tf32 = self.tf32
        if self.device.type == "cpu":
            keep_freed_memory()


def decide(
    requested: Requested = "auto",
    *,
    device: str | torch.device = "auto",
    attention: Attention = "sdpa",
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw",
    adapting: bool = False,
    offload: bool = False,
    quantized: Quantization | None = None,
) -> Precision:
    """Decide on the precision for this machine.

    requested: `--precision`. device: `auto` takes CUDA, then MPS, then the CPU. optimizer: its name; the optimizer's
    state depends on it. adapting: whether something small is trained beside frozen weights; many CPUs do this faster in
    bf16. offload: `--offload`, the parts of a base model take turns on a GPU. quantized: `--quantize`, what the large
    weights of a frozen U-Net are kept in. Raises PrecisionError, one line, for what this machine cannot do.
    """
    if requested not in ("auto", *DTYPES):
        raise PrecisionError(f"--precision {requested}: unknown; wanted auto, fp32, fp16 or bf16.")
    if quantized not in (None, *FORMATS):
        raise PrecisionError(f"--quantize {quantized!s:.40}: unknown; wanted {' or '.join(FORMATS)}.")
    reasons: dict[str, str] = {"trained weights": "bf16 would lose most of the optimizer's small updates"}
    place, reasons["device"] = choices.choose_device(device)
    compute, reasons["compute"] = choices.choose_compute_dtype(requested, place, adapting)
    storage, reasons["frozen weights"] = choices.choose_storage_dtype(compute, place, adapting)
    vae, reasons["VAE"] = choices.choose_vae_dtype(compute, place)
    reasons["attention"] = choices.attention_reason(attention, place, compute)
    state, reasons["optimizer state"] = choices.optimizer_state_format(optimizer, place)
    tf32, reasons["TF32"] = choices.choose_tf32(requested, place)
    by, reasons["fp32 products"] = choices.choose_matmul(place)
    channels_last = place.type == "cuda" and compute != torch.float32
    reasons["channels last"] = choices.channels_last_reason(channels_last, place)
    reasons["checkpointing"] = "asked for: less memory, more time" if gradient_checkpointing else "not asked for"
    if quantized:
        size = FORMATS[quantized].a_weight
        reasons["large weights"] = f"asked for, of the frozen U-Net: {size}, made again for each product"
    if offload:
        reasons["offload"] = "asked for: each part is on the GPU only while it computes"
    return Precision(
        device=place,
        storage=storage,
        compute=compute,
        vae=vae,
        attention=attention,
        tf32=tf32,
        products=by,
        channels_last=channels_last,
        gradient_checkpointing=gradient_checkpointing,
        optimizer_state=state,
        reasons=reasons,
        offload=_offload(place) if offload else None,
        quantized=quantized,
    )


def forecast_precision(requested: Requested, kind: Literal["gpu", "cpu"], *, adapting: bool) -> Precision:
    """What `decide` would choose for weights and products on a device of this kind. The result has the CPU as its
    device, so that no GPU is needed: for programs that only count bytes."""
    here = decide("fp32", device="cpu")
    there = torch.device("cuda" if kind == "gpu" else "cpu")
    if kind == "gpu":
        compute = DTYPES["bf16" if requested == "auto" else requested]
    else:
        compute, _ = choices.choose_compute_dtype(requested, there, adapting)
    storage, vae = (
        choices.choose_storage_dtype(compute, there, adapting)[0],
        choices.choose_vae_dtype(compute, there)[0],
    )
    return replace(here, compute=compute, storage=storage, vae=vae)


def _offload(device: torch.device) -> Offload:
    """Raises PrecisionError where a device has no memory of its own."""
    from sfumato.precision.offload import Offload

    if device.type != "cuda":
        where = "an Apple GPU has" if device.type == "mps" else "a CPU has"
        raise PrecisionError(f"--offload: keeps a GPU's own memory free, and {where} none. Leave it out.")
    return Offload(device)
