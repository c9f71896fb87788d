"""The base model to generate with, as a command line names it. Imports no torch by itself."""

# No annotations as texts: a program that inherits the options reads them in its own module.
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sfumato.config import TypedConfig

if TYPE_CHECKING:
    from sfumato.models import Base


@dataclass(frozen=True, kw_only=True)
class DrawingBaseOptions(TypedConfig):
    """The base model, and how it is computed."""

    base: str = "pocket"
    """Base model: `pocket`, a hub id, a diffusers folder or a .safetensors checkpoint."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format to compute in."""
    device: str = "auto"
    """Device to generate on: `auto`, `cuda`, `cuda:1`, `mps` or `cpu`. auto takes CUDA, then MPS, then the CPU."""
    quantize: Literal["int8", "nf4"] | None = None
    """Keep the large weights of the U-Net in fewer bits, for a little more time: int8 takes half the memory of bf16 or
    fp16, for a small error; nf4 little more than a quarter, for a larger one. Adapters are then beside the layers, and
    not summed into the weights. Unset: neither."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention to compute with: torch's own (sdpa) or xformers (pip install "sfumato[xformers]")."""
    offload: bool = False
    """Keep only the part on the GPU that is computing: text encoders, U-Net and VAE take turns. Slower. Use it for a
    GPU that does not hold the whole base model."""
    clip_skip: int | None = None
    """Skip this many layers at the end of the text encoder; 0 is the base model's own output. A1111's number is one
    higher, on SDXL two. --prompt-syntax a1111 and compel accept 0 and 1, on SDXL only 0."""
    max_tokens: Literal[75, 150, 225] | None = None
    """Tokens of a prompt that are read. A prompt of more than 75 tokens is encoded in chunks of 75, as in web
    interfaces. Unset: 75, the text encoder's own limit. --prompt-syntax a1111 and compel always read the whole
    prompt."""
    vae: str | None = None
    """Use another VAE: a folder, a hub id or a file."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts: noise (epsilon) or v. Set it where its file does not say."""
    zero_terminal_snr: bool = False
    """The base model's last timestep is pure noise (zero terminal SNR). Set it where its files do not say."""

    def drawn_with(self, *, partial: bool = False) -> dict[str, Any]:
        """The options that change the image, besides base model, VAE and clip skip, as JSON; only those that were
        set. partial: --partial, of programs that have it."""
        asked = {
            "precision": self.precision if self.precision != "auto" else None,
            "quantize": self.quantize,
            "prediction_type": self.prediction_type,
            "zero_terminal_snr": self.zero_terminal_snr or None,
            "max_tokens": self.max_tokens,
            "partial": partial or None,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def load_base(self) -> "Base":
        """Load the base model, ready to generate."""
        from sfumato.models import load_base
        from sfumato.precision import decide

        computed: dict[str, Any] = {"device": self.device, "attention": self.attention, "offload": self.offload}
        return load_base(
            self.base,
            precision=decide(self.precision, **computed, quantized=self.quantize),
            clip_skip=self.clip_skip,
            max_tokens=self.max_tokens,
            vae=self.vae,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
        )
