"""The main job: learn a style from 16 pictures and a subject from a few, mix the two, draw a labelled sheet."""

from __future__ import annotations

import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato import cli
from sfumato.config import parse
from sfumato.errors import ConfigError, RunError

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.bases import Base

PROMPTS = ("crab", "penguin", "cat face", "bus")
"""Drawn in the style; none is among the pictures it is learned from."""
SUBJECT = "sks flamingo"
MIXES = ((0.5, 0.5), (0.7, 1.0), (1.0, 0.7), (1.0, 1.0))
"""Weights of style and subject in the rows that mix them."""
SAMPLE_EVERY = 1000
"""More than either training has steps: both draw samples at their ends only, and the sheet shows what they learned."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn a style from 16 pictures and a subject from three, mix them, and draw a sheet: a few minutes on two cores.

    Rows of the sheet: the base, the style alone, the subject alone, both at several weights. Columns: prompts that were
    not trained. Run it in a clone, where the folder datasets/ is.
    """

    output: Path = Path("runs/quickstart")
    """Folder for both adapters and the sheet; where it holds a run already, a number is added to its name."""
    style: Path = Path("datasets/line-style")
    """Pictures of the style, each named after what it shows."""
    subject: Path = Path("datasets/flamingo")
    """Pictures of the subject, with captions that call it "sks flamingo"."""
    base: str = "pocket"
    """The model that learns."""
    seed: int = 7
    """Everything random is a function of it."""
    steps: int | None = None
    """Optimizer steps for each of the two. Unset: the base family's default."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base."""


def quickstart(config: Config) -> Path:
    """Train both, draw the sheet, say what came out; returns the sheet's path."""
    began = time.monotonic()
    for folder in (config.style, config.subject):
        if not folder.is_dir():
            raise ConfigError(
                f"{folder}: no such folder. Run this where datasets/ is, or name one with --style/--subject."
            )
    output = free(config.output)
    style, subject = learn(config, output)
    sheet = draw_sheet(config, style, subject, output / "sheet.png")
    print(f"\nDone in {time.monotonic() - began:.0f} s.\n")
    for what, path in (("sheet", sheet), ("style", style), ("subject", subject)):
        print(f"  {what:<8}{path}")
    print("\nTry next:\n")
    for command in next_commands(style, subject, config.base):
        print(f"  {command}")
    return sheet


def free(folder: Path) -> Path:
    """The folder, or the first of its name with a number that does not exist yet."""
    candidates = (folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000)))
    for candidate in candidates:
        if not candidate.exists():
            return candidate
    raise ConfigError(f"{folder} and 998 more of that name exist; give another --output.")


def learn(config: Config, output: Path) -> tuple[Path, Path]:
    """Train both adapters by the very commands that a person would type; on a CPU side by side."""
    import torch

    from sfumato.bases.loading import base_at_rest
    from sfumato.command_line import side_by_side
    from sfumato.precision import decide

    commands = {
        "style": command(config, "lora-style.toml", config.style, output / "style"),
        "subject": command(config, "lora-subject.toml", config.subject, output / "subject", "--trigger", SUBJECT),
    }
    for words in commands.values():
        check(words)
    precision, threads = decide(config.precision), torch.get_num_threads()
    base_at_rest(config.base, precision=precision)  # what is wrong with it is told once, before a training's lines
    # Of a larger base two at once may be more than the memory holds.
    at_once = config.base == "pocket" and precision.device.type == "cpu" and threads > 1
    for words in commands.values():
        print(f"\n$ sfumato {shlex.join(words)}", flush=True)
    if at_once:
        if failed := side_by_side.run(commands, threads=threads):
            name, code, reason = failed
            reason = reason or f"it stopped with exit code {code}; the lines above say why."
            raise RunError(f"the training of the {name}: {reason}")
    else:
        for words in commands.values():
            if code := cli.main(words):  # which has said why
                raise SystemExit(code)
    style, subject = (output / name / f"{name}.safetensors" for name in commands)
    return style, subject


def command(config: Config, recipe: str, images: Path, output: Path, *options: str) -> list[str]:
    """The words of one training after `sfumato`."""
    file = cli.source("sfumato.trainers.lora").parent / "configs" / recipe
    words = ["train", "lora", shown(file), "--images", str(images), "--output", str(output), *options]
    words += ["--base", config.base, "--seed", str(config.seed), "--precision", config.precision]
    words += ["--sample-every", str(SAMPLE_EVERY)]
    return words if config.steps is None else [*words, "--steps", str(config.steps)]


def check(words: Sequence[str]) -> None:
    """Refuse what the training would, before another one is under way beside it."""
    from sfumato.trainers import lora

    training = parse(lora.Config, words[2:], program="train lora")
    lora.check(training)
    lora.read_examples(training)


def shown(file: Path) -> str:
    """The file's path as a person would type it here."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def draw_sheet(config: Config, style: Path, subject: Path, path: Path) -> Path:
    """Every row draws the same prompts from the same seeds; only the weights differ."""
    from sfumato import Adapter, compose, load_base
    from sfumato.compose import adapter_guidance
    from sfumato.compose.steps import over_asked_steps
    from sfumato.drawing.pictures import draw
    from sfumato.drawing.sheet import contact_sheet
    from sfumato.files.atomic import atomic_path
    from sfumato.precision import decide

    base: Base = load_base(config.base, precision=decide(config.precision))
    prompts = [*PROMPTS, SUBJECT, f"{SUBJECT}, blob style"]
    seeds = [config.seed + place for place in range(len(prompts))]
    weights = {"base": (0.0, 0.0), "A: style": (1.0, 0.0), "B: subject": (0.0, 1.0)}
    weights |= {f"{a:g} A + {b:g} B": (a, b) for a, b in MIXES}
    rows: list[list[Image]] = []
    with compose(base, Adapter(style, name="A"), Adapter(subject, name="B")) as mix:
        for a, b in weights.values():
            mix.set(A=a, B=b)
            with adapter_guidance(mix, guidance=base.defaults.guidance), over_asked_steps(mix):
                rows.append(draw(base, prompts, seeds))
    sheet = contact_sheet(rows, row_labels=list(weights), column_labels=prompts)
    with atomic_path(path) as temporary:
        sheet.save(temporary)
    return path


def next_commands(style: Path, subject: Path, base: str) -> list[str]:
    """Three commands that work as they stand, also where no environment is active: sfumato as it was called."""
    a, b = shlex.quote(str(style)), shlex.quote(str(subject))
    on = "" if base == "pocket" else f"--base {shlex.quote(base)} "
    by_path = Path(sys.argv[0]).name == "sfumato" and shutil.which("sfumato") is None
    program = shlex.quote(sys.argv[0]) if by_path else "sfumato"
    return [
        f'{program} generate "{SUBJECT}" {on}--lora {a} --lora {b} --seed 3 -o flamingo.png',
        f"{program} generate guitar tulip owl {on}--lora {a} --sweep style=0,0.5,1 -o sweep.png",
        f"{program} inspect {a}",
    ]


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    quickstart(parse(Config, argv, program="quickstart"))
    return 0


if __name__ == "__main__":
    cli.run(main)
