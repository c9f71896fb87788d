"""What files call the vectors of a textual inversion. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

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
