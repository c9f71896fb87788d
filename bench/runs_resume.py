"""Is a training that was killed and resumed the training that was not? Every trainer, random cut points.

    python bench/runs_resume.py --cuts 50 [--only lora,pretrain] [--seed 0]

Each cut: N steps at once, and the same with SIGKILL in the middle of a random step, a resume that is killed as well,
and a resume to the end; the tensors that come out must be equal to the bit. Small bases with random weights, fp32, CPU.
Prints JSON.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

STEPS = 5
_SHARED = ["--steps", str(STEPS), "--batch", "2", "--resolution", "64", "--precision", "fp32"]
_SHARED += ["--sample-every", "0", "--measure-every", "0", "--device", "cpu"]
_PRETRAIN = ["--steps", str(STEPS), "--fall-at", "3", "--warmup", "2", "--batch", "2", "--precision", "fp32"]
_PRETRAIN += ["--sample-every", "0", "--device", "cpu"]
_PLAIN = [*_SHARED, "--learn", "plain"]
CASES: Mapping[str, Sequence[str]] = {
    "lora": [*_SHARED, "--rank", "2"],
    "lora accumulated, averaged, dropped out": [
        *_PLAIN, "--rank", "2", "--accumulate", "2", "--ema", "0.9", "--dropout", "0.3", "--caption-dropout", "0.4",
        "--flip", "--noise-offset", "0.1", "--warmup", "2", "--crossed-share", "0.5", "--rank-dropout", "0.2",
        "--module-dropout", "0.3",
    ],
    "lora with text encoder": [
        *_PLAIN, "--rank", "2", "--train-text-encoder", "--rank-of", "mid,te=1", "--rank-of", "to_k=0", "--rate-of",
        "up.0=0.5",
    ],
    "lora prodigy": [*_PLAIN, "--rank", "2", "--optimizer", "prodigy"],
    "lora muon": [*_PLAIN, "--rank", "2", "--optimizer", "muon"],
    "lora int8": [*_PLAIN, "--rank", "2", "--quantize", "int8"],
    "lora nf4": [*_PLAIN, "--rank", "2", "--quantize", "nf4"],
    "lora lion": [*_PLAIN, "--rank", "2", "--optimizer", "lion"],
    "dreambooth": [*_SHARED, "--method", "full", "--class-name", "square", "--prior", "none", "--ema", "0.9"],
    "dreambooth lora": [
        *_SHARED, "--class-name", "square", "--prior", "none", "--method", "lora", "--rank", "2", "--accumulate", "2",
    ],
    "dreambooth lora, dropped out": [
        *_SHARED, "--class-name", "square", "--prior", "base", "--method", "lora", "--rank", "2", "--dropout", "0.2",
        "--rank-dropout", "0.2", "--module-dropout", "0.3", "--fused",
        # So few samples have gradients that are rounding, of which AdamW makes steps like any other.
        "--optimizer-args", "eps=1e-5",
    ],
    "dreambooth 8-bit": [
        *_SHARED, "--method", "full", "--class-name", "square", "--prior", "none", "--optimizer", "adamw8bit",
    ],
    "dreambooth fused, prior": [*_SHARED, "--method", "full", "--class-name", "square", "--prior", "base", "--fused"],
    "finetune": [*_SHARED, "--ema", "0.9", "--ema-on-cpu", "--accumulate", "2", "--caption-dropout", "0.4", "--flip"],
    "finetune fused with text encoder": [*_SHARED, "--train-text-encoder", "--fused", "--noise-offset", "0.1"],
    "textual_inversion": [
        *_SHARED, "--placeholder", "<sq>", "--initial-words", "red", "--vectors", "2", "--ema", "0.9",
        "--accumulate", "2", "--caption", "{trigger}, {caption}",
    ],
    "slider": [
        *_SHARED, "--rank", "2", "--concept", "square", "--more", "a red {concept}", "--drawn", "4", "--ema", "0.9",
        "--prior-prompts", "a key", "--module-dropout", "0.3",
    ],
    "slider by pairs, dropped out": [
        *_SHARED, "--rank", "2", "--caption", "{caption}", "--accumulate", "2", "--dropout", "0.3",
    ],
    "lcm averaged, dropped out": [
        *_SHARED, "--rank", "2", "--caption", "{caption}", "--ema", "0.9", "--accumulate", "2", "--dropout", "0.2",
        "--optimizer-args", "eps=1e-5",
    ],
    "dpo averaged, dropped out": [
        *_SHARED, "--rank", "2", "--caption", "{caption}", "--ema", "0.9", "--accumulate", "2", "--dropout", "0.2",
        "--caption-dropout", "0.4", "--prior-prompts", "a key", "--beta", "100", "--optimizer-args", "eps=1e-5",
    ],
    "dpo from an adapter": [
        *_SHARED, "--rank", "2", "--targets", "cross-attention", "--caption", "{caption}", "--optimizer-args",
        "eps=1e-5",
    ],
    "pretrain vae": [*_PRETRAIN, "--stage", "vae", "--hands-share", "0.5"],
    "pretrain unet muon": [*_PRETRAIN, "--stage", "unet", "--optimizer", "muon", "--hands-share", "0.5"],
    "pretrain style_emphasis": [*_PRETRAIN, "--stage", "style_emphasis"],
    "pretrain self_play": [*_PRETRAIN, "--stage", "self_play"],
}  # fmt: skip


def make_inputs(folder: Path) -> dict[str, list[str]]:
    """Tiny bases and pictures; returns the options that name them, by program."""
    import numpy as np
    import torch
    from PIL import Image

    from sfumato.training.pretrain.model import build_vae
    from tests.tiny import tiny_pocket_folder

    base = tiny_pocket_folder(folder / "pocket")
    (folder / "pictures").mkdir()
    for number, colour in enumerate(["red", "green", "blue", "gold"]):
        picture = Image.new("RGB", (64, 64), "white")
        picture.paste(colour, (8 + number, 8, 40, 48))
        picture.save(folder / "pictures" / f"{colour}-square.png")
    for s, style in enumerate(("noto", "flat")):
        (folder / "data" / style).mkdir(parents=True)
        for c, concept in enumerate(("red-apple", "crab", "key")):
            pixels = np.full((64, 64, 3), 255, np.uint8)
            pixels[10 + 10 * s : 40, 10 : 20 + 15 * c, c] = 0
            Image.fromarray(pixels).save(folder / "data" / style / f"{concept}.png")
    concepts = {"red apple": "a fruit", "crab": "a sea animal", "key": "a tool"}
    manifest = {"styles": ["noto", "flat"], "concepts": concepts, "withheld": [["key", "flat"]]}
    (folder / "data/manifest.json").write_text(json.dumps(manifest))
    (folder / "data/words.txt").write_text("picture\nof\n")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        build_vae().save_pretrained(folder / "vae")
    (folder / "partners").mkdir()
    for file in (folder / "pictures").iterdir():
        Image.open(file).convert("L").save(folder / "partners" / file.name)
    write_start(base, folder / "start.safetensors")
    preferences = ["--base", str(base), "--preferred", str(folder / "pictures"), "--rejected", str(folder / "partners")]
    adapters = ["--base", str(base), "--images", str(folder / "pictures")]
    return {
        "lora": adapters,
        "dreambooth": adapters,
        "finetune": adapters,
        "textual_inversion": adapters,
        "lcm": adapters,
        "slider": ["--base", str(base)],
        "slider by pairs, dropped out": [
            *("--base", str(base), "--more-images", str(folder / "pictures")),
            *("--less-images", str(folder / "partners")),
        ],
        "dpo": preferences,
        "dpo from an adapter": [*preferences, "--init-from", str(folder / "start.safetensors")],
        "pretrain": ["--data", str(folder / "data")],
        "pretrain style_emphasis": ["--data", str(folder / "data"), "--base", str(base)],
        "pretrain self_play": ["--data", str(folder / "data"), "--base", str(base)],
        "vae": ["--vae", str(folder / "vae")],
    }


def write_start(base: Path, file: Path) -> None:
    """An adapter of rank 2 of the base's cross-attention, that changes something."""
    import torch

    from sfumato.adapters import attach, target_layers
    from sfumato.models import load_base
    from sfumato.precision import decide

    parts = load_base(str(base), precision=decide("fp32", device="cpu")).parts(text=False)
    adapter = attach(target_layers(parts, "cross-attention"), rank=2, alpha=2.0, seed=1)
    for layer in adapter.layers.values():
        for up in layer.ups():
            up.data += 0.1
    adapter.write(file, family="pocket", metadata={}, dtype=torch.float32)


def command(case: str, inputs: Mapping[str, list[str]], output: Path, *more: str) -> list[str]:
    """The words after `sfumato` that train this case. more: options that win over the case's."""
    program = case.split()[0]
    words = list(CASES[case])
    for option in more:
        if option.startswith("--") and option in words:
            at = words.index(option)
            del words[at : at + 2]
    vae = inputs["vae"] if "unet" in case.split() else []
    makes_a_base = program == "pretrain"
    name = [] if makes_a_base else ["--name", "out"]
    if not makes_a_base and program != "slider" and "--caption" not in words:
        name += ["--caption", "{caption}"]
    return ["train", program, *words, *inputs.get(case, inputs[program]), *vae, "--output", str(output), *name, *more]


def _child(words: list[str], kill_at: int | None, log: str, place: Mapping[str, str]) -> None:
    os.environ.update(place)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    from accelerate import PartialState

    from sfumato import cli
    from sfumato.runs.run import Step

    PartialState._reset_state()  # the parent's, which has been alone
    done = Step.done

    def killed(step: Step, **values: object) -> None:
        if step.number == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        done(step, **values)  # type: ignore[arg-type]

    Step.done = killed  # type: ignore[assignment,method-assign]
    code = cli.main(words)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(words: list[str], *, log: Path, kill_at: int | None = None, processes: int = 1) -> int:
    """The exit code of the training in a process of its own; -9 if step `kill_at` (from 0) killed it.

    processes: several meet as those of `accelerate launch` do, and load nothing again.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    children = []
    for rank in map(str, range(processes)):
        place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
        place |= {"ACCELERATE_USE_CPU": "true", **meeting}
        arguments = (words, kill_at, str(log), place if processes > 1 else {})
        children.append(multiprocessing.get_context("fork").Process(target=_child, args=arguments))
        children[-1].start()
    for child in children:
        child.join()
    codes = [int(child.exitcode or 0) for child in children]
    return min(codes) or max(codes)


def results(output: Path) -> dict[str, object]:
    """Every tensor that came out, by file and name."""
    from sfumato.files import read_tensors

    files = [f for f in sorted(output.rglob("*.safetensors")) if "checkpoints" not in f.relative_to(output).parts]
    return {f"{f.relative_to(output)}:{name}": t for f in files for name, t in read_tensors(f).items()}


def cut(
    case: str,
    inputs: Mapping[str, list[str]],
    whole: Path,
    output: Path,
    kills: list[int],
    every: int,
    processes: int = 1,
) -> str:
    """Empty if the training that was killed in the steps `kills` gives what the whole one gave, else what is wrong."""
    import torch

    log = output.with_suffix(".log")
    more = ["--checkpoint-every", str(every)]
    for number, step in enumerate(kills):
        words = command(case, inputs, output, *more, *(["--resume"] if number else []))
        code = run(words, log=log, kill_at=step, processes=processes)
        if code != -signal.SIGKILL:
            return f"exit code {code} instead of the kill in step {step}: {log.read_text()[-2000:]}"
    code = run(["resume", str(output)], log=log, processes=processes)
    if code:
        return f"the resume ended with {code}: {log.read_text()[-2000:]}"
    expected, found = results(whole), results(output)
    if expected.keys() != found.keys() or not expected:
        return f"other tensors: {sorted(expected.keys() ^ found.keys())[:5]}"
    different = [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]  # type: ignore[arg-type]
    return f"{len(different)} of {len(expected)} tensors differ, first {different[0]}" if different else ""


def main() -> None:
    """Print the figures; exit code 1 unless every cut was equal."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="programs, by comma")
    options = parser.parse_args()
    only = [name for name in options.only.split(",") if name]
    cases = [case for case in CASES if not only or case.split()[0] in only]
    rng = random.Random(options.seed)
    began, equal, wrong = time.monotonic(), 0, {}
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        inputs = make_inputs(folder)
        for case in cases:
            code = run(command(case, inputs, folder / case / "whole"), log=folder / f"{case}.log")
            if code:
                wrong[case] = f"the whole run ended with {code}: {(folder / f'{case}.log').read_text()[-2000:]}"
        for number in range(options.cuts):
            case = cases[number % len(cases)]
            first = rng.randrange(STEPS)
            kills = [first, rng.randrange(first, STEPS)]
            if case in wrong:
                continue
            problem = cut(case, inputs, folder / case / "whole", folder / case / str(number), kills, rng.randint(1, 3))
            equal += not problem
            if problem:
                wrong[f"{case}, cut {number} in steps {kills}"] = problem
    figures = {"cuts": options.cuts, "equal": equal, "cases": cases, "wrong": wrong}
    print(json.dumps({**figures, "seconds": round(time.monotonic() - began, 1)}, indent=1))
    sys.exit(equal != options.cuts)


if __name__ == "__main__":
    main()
