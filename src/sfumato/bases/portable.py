"""What a folder needs beside what transformers writes today, so that earlier versions read it, too.

Since 5.6 transformers saves a CLIPTextModel without the level `text_model`. Earlier versions then draw with a random
text encoder, and only warn. Since 5.0 it saves a tokenizer as `tokenizer.json` alone, which versions before 5.0 cannot
load. InvokeAI, OneTrainer, ai-toolkit and sd-scripts take earlier versions; ComfyUI and diffusers' scripts that make
single files look for the level, too. Current versions read both (and `bases.folder` does by itself).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.torch import save_file

_LEVEL = "text_model."


def make_portable(folder: Path, pipe: Any) -> None:
    """Give a diffusers folder, as `pipe.save_pretrained` has just left it, the names and files of earlier versions."""
    for part in ("text_encoder", "text_encoder_2"):
        encoder = getattr(pipe, part, None)
        weights = {} if encoder is None else encoder.state_dict()
        # SDXL's second encoder has the level in every version.
        if weights and not any(name.startswith(_LEVEL) for name in weights):
            named = {_LEVEL + name: weight for name, weight in weights.items()}
            save_file(named, folder / part / "model.safetensors", {"format": "pt"})
    for part in ("tokenizer", "tokenizer_2"):
        tokenizer = getattr(pipe, part, None)
        if tokenizer is not None:
            tokenizer.backend_tokenizer.model.save(str(folder / part))  # vocab.json and merges.txt
