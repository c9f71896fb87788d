"""The base that draws, as a command line names it. Imports no torch by itself."""

# No annotations as texts: a program that inherits the options reads them in its own module.
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from sfumato.bases import Base


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The base that draws, and how it is computed."""

    base: str = "pocket"
    """`pocket`, a hub id, a diffusers folder or a .safetensors checkpoint."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format to compute in."""
    device: str = "auto"
    """`auto`, `cuda`, `cuda:1`, `mps` or `cpu`."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Which attention computes; xformers is an extra."""
    offload: bool = False
    """Keep on the GPU only what computes: text encoders, U-Net and VAE take turns. Slower; for a GPU that does not hold
    the whole base."""
    clip_skip: int | None = None
    """Layers of the text encoder to leave out, from its end: 0 is the base's own. A1111's number is one higher, on SDXL
    two. With --prompt-syntax a1111 or compel 0 and 1 are taken, on SDXL 0."""
    max_tokens: Literal[75, 150, 225] | None = None
    """Tokens of a prompt that are read. Those of a longer one than 75 are encoded 75 at a time, as in web interfaces.
    Unset: 75, the text encoder's own. With --prompt-syntax a1111 or compel all are read, whatever is given here."""
    vae: str | None = None
    """A folder, hub id or file whose VAE replaces the base's."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, where its file does not say."""
    zero_terminal_snr: bool = False
    """The base ends in pure noise (zero terminal SNR), where its files do not say."""

    def drawn_with(self) -> dict[str, Any]:
        """What of this, beside base, VAE and clip skip, makes other pictures, as JSON; only what was asked for."""
        asked = {
            "precision": self.precision if self.precision != "auto" else None,
            "prediction_type": self.prediction_type,
            "zero_terminal_snr": self.zero_terminal_snr or None,
            "max_tokens": self.max_tokens,
        }
        return {name: value for name, value in asked.items() if value is not None}

    def load_base(self) -> "Base":
        """The base, ready to draw."""
        from sfumato.bases import load_base
        from sfumato.precision import decide

        return load_base(
            self.base,
            precision=decide(self.precision, device=self.device, attention=self.attention, offload=self.offload),
            clip_skip=self.clip_skip,
            max_tokens=self.max_tokens,
            vae=self.vae,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
        )
