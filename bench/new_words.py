"""What learning new words costs beside the U-Net: state, optimizer time, checkpoint. Prints JSON.

    python -m bench.new_words [--vectors 1 4 16] [--threads 1] [--peer]

On text encoders of full size with random weights: CLIP ViT-L's (SD 1.5), and the token table of OpenCLIP bigG beside it
(SDXL). The peer's way is diffusers' examples/textual_inversion: AdamW over the whole table, whose old rows are then
written back (`--peer` measures that, too, and theirs over ours; it takes about a gigabyte). Times are CPU milliseconds,
the median of the steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import CLIPTextConfig, CLIPTextModel

from bench.real import at_least
from sfumato.adapters.embeddings import embedding
from sfumato.files.writing.embedding import write_embedding
from sfumato.models.vocabulary import clip_tokenizer
from sfumato.runs.checkpoints import Checkpoints
from sfumato.training.optim import optimizers

STEPS = 50


def source(family: str) -> Any:
    """What looks like a base to `new_words`."""
    sizes = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
    encoders = [CLIPTextModel(CLIPTextConfig(**sizes)).requires_grad_(False)]
    if family == "sdxl":  # its table is all that matters here
        sizes |= {"hidden_size": 1280, "num_hidden_layers": 1, "num_attention_heads": 20}
        encoders.append(CLIPTextModel(CLIPTextConfig(**sizes)).requires_grad_(False))
    tokenizers = tuple(clip_tokenizer(positions=77) for _ in encoders)
    return SimpleNamespace(text_encoders=tuple(encoders), tokenizers=tokenizers)


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Of an optimizer's tensors."""
    return sum(v.nbytes for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor))


def ours(family: str, vectors: int) -> dict[str, float]:
    """One word of so many vectors, with made-up gradients."""
    words = embedding.new_words(source(family), ["<x>"], vectors=vectors, start="random")
    parameters = list(words.parameters())
    optimizer = optimizers.build_optimizer("adamw", [{"params": parameters, "lr": 1e-3}], weight_decay=0.01)
    words.keep_scale()  # the first measures the table
    taken = []
    for _ in range(STEPS):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        start = time.process_time()
        optimizers.clip_grad_norm(parameters, 1.0)
        optimizer.step()
        words.keep_scale()
        taken.append(time.process_time() - start)
    with tempfile.TemporaryDirectory() as folder:
        state = {"kept": {"words": words.state_dict(), "optimizer": optimizer.state_dict()}, "rate_factor": 1.0}
        place = Checkpoints(Path(folder)).save(STEPS, state)
        checkpoint = sum(file.stat().st_size for file in place.iterdir())
        file = write_embedding(Path(folder) / "x.safetensors", "<x>", words.vectors()["<x>"]).stat().st_size
    return {
        "state_bytes": state_bytes(optimizer),
        "optimizer_cpu_ms": round(statistics.median(taken) * 1e3, 3),
        "checkpoint_bytes": checkpoint,
        "file_bytes": file,
    }


def peer(vectors: int) -> dict[str, float]:
    """The whole table of SD 1.5 in AdamW, old rows written back after each step."""
    table = torch.nn.Parameter(torch.randn(49408 + vectors, 768) * 0.014)
    before = table.detach().clone()
    optimizer = torch.optim.AdamW([table], lr=1e-3)
    old = torch.ones(len(table), dtype=torch.bool)
    old[-vectors:] = False
    taken = []
    for _ in range(5):
        table.grad = torch.zeros_like(table)
        table.grad[-vectors:] = torch.randn(vectors, 768)
        start = time.process_time()
        optimizer.step()
        with torch.no_grad():
            table[old] = before[old]
        taken.append(time.process_time() - start)
    return {"state_bytes": state_bytes(optimizer), "optimizer_cpu_ms": round(statistics.median(taken) * 1e3, 3)}


def over(theirs: dict[str, float], ours: dict[str, float]) -> dict[str, int]:
    """Their figures in multiples of ours."""
    return {name: round(value / ours[name]) for name, value in theirs.items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--vectors", type=at_least(1), nargs="+", default=[1, 4, 16])
    parser.add_argument("--threads", type=at_least(1), default=1)
    parser.add_argument("--peer", action="store_true", help="measure diffusers' way on SD 1.5, too")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"torch": torch.__version__, "threads": options.threads}
    for family in ("sd1", "sdxl"):
        found[family] = {str(count): ours(family, count) for count in options.vectors}
    if options.peer:
        theirs = {str(count): peer(count) for count in options.vectors}
        found["peer_sd1"] = theirs
        found["peer_over_sd1"] = {count: over(row, found["sd1"][count]) for count, row in theirs.items()}
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
