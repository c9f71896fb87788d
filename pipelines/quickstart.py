"""Quick start: learn a style from 16 images and a subject from a few, mix the two, generate a labelled sheet."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato import cli
from sfumato.config import parse
from sfumato.errors import ConfigError, RunError
from sfumato.training.teach.plan import program_word
from sfumato.utils.formatting import join_command, quote_argument

if TYPE_CHECKING:
    from PIL.Image import Image

    from sfumato.models import Base

SUBJECT = "sks flamingo"
PROMPTS = ("crab", "penguin", "cat face", "bus", SUBJECT, f"{SUBJECT}, blob style")
"""Prompts of the sheet's columns. No training image shows the first four."""
MIXES = ((0.5, 1.0), (0.7, 1.0), (1.0, 1.0))
"""Weights of style and subject in the rows that mix them."""
ROWS = {
    label: {"style": style, "subject": subject}
    for label, style, subject in (
        ("base", 0.0, 0.0),
        ("A: style", 1.0, 0.0),
        ("B: subject", 0.0, 1.0),
        *((f"{a:g} A + {b:g} B", a, b) for a, b in MIXES),
    )
}
"""Weights of the sheet's rows, by label."""
STYLE_STEPS = 200
"""On pocket, so that everything is done within four minutes on two slow cores: a sixth fewer than usual."""
SAMPLER_STEPS = 20
"""Sampling steps of the sheet's images."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn a style from 16 images and a subject from three, mix them, make a sheet: a few minutes on two CPU cores.

    Rows of the sheet: the base model, the style alone, the subject alone, both at several weights. Columns: prompts
    that were not trained on. Run it in a clone of the repository, where the folder datasets/ is.
    """

    output: Path = Path("runs/quickstart")
    """Folder for both adapters and the sheet. If it exists already, a number is added to its name."""
    style: Path = Path("datasets/line-style")
    """Folder of style images, each named after what it shows."""
    subject: Path = Path("datasets/flamingo")
    """Folder of subject images, with captions that call the subject "sks flamingo"."""
    base: str = "pocket"
    """Base model to train on."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts: noise (epsilon) or v. Set it where its file does not say."""
    zero_terminal_snr: bool = False
    """The base model's last timestep is pure noise (zero terminal SNR). Set it where its files do not say."""
    seed: int = 7
    """Seed of everything random."""
    steps: int | None = None
    """Optimizer steps for each of the two trainings. Unset: the base family's default; on pocket 200 for the style."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base model."""


def quickstart(config: Config) -> Path:
    """Train both, generate the sheet, print what was made. Returns the path of the sheet."""
    began = time.monotonic()
    for folder in (config.style, config.subject):
        if not folder.is_dir():
            raise ConfigError(
                f"{folder}: no such folder. Run this where datasets/ is, or name one with --style/--subject."
            )
    output = free(config.output)
    import torch

    threads, path = torch.get_num_threads(), output / "sheet.png"
    sheet = learn(config, output, threads)
    sheet.write(path, threads)
    print(f"\nDone in {time.monotonic() - began:.0f} s.\n")
    for what, file in {"sheet": path, **sheet.files}.items():
        print(f"  {what:<8}{file}")
    print("\nTry next:\n")
    for command in next_commands(sheet.files["style"], sheet.files["subject"], config):
        print(f"  {command}")
    return path


def free(folder: Path) -> Path:
    """The folder, or if it exists, the first folder of that name with a number that does not exist."""
    if folder.name in ("", ".."):
        raise ConfigError(f"--output {folder}: wanted a new folder for what is made, such as runs/quickstart.")
    candidates = (folder, *(folder.with_name(f"{folder.name}-{number}") for number in range(2, 1000)))
    for candidate in candidates:
        if not candidate.exists():
            return candidate
    raise ConfigError(f"{folder} and 998 more of that name exist; give another --output.")


def learn(config: Config, output: Path, threads: int) -> Sheet:
    """Train both adapters by the same commands that a person would type; on a CPU side by side.

    threads: number of torch threads, in all. Returns the sheet of both adapters; some rows may be generated already.
    """
    from sfumato.precision import decide
    from sfumato.precision.memory import release_dropped_models
    from sfumato.utils import processes

    commands = {
        "style": command(config, "style", config.style, output),
        "subject": command(config, "subject", config.subject, output),
    }
    for words in commands.values():
        check(words)
    precision = decide(config.precision)
    if not is_pocket(config):
        from sfumato.models.loading import base_skeleton

        # What is wrong with it is told once, before a training's lines.
        base_skeleton(
            config.base,
            precision=precision,
            prediction_type=config.prediction_type,
            zero_terminal_snr=config.zero_terminal_snr,
        )
    sheet = Sheet(config, {name: output / name / f"{name}.safetensors" for name in commands})
    # Of a larger base two at once may be more than the memory holds.
    at_once = is_pocket(config) and precision.device.type == "cpu" and threads > 1
    for words in commands.values():
        print(f"\n$ sfumato {join_command(words)}", flush=True)
    if at_once:
        # The subject has the shorter steps: its rows are drawn by its core while the style goes on learning.
        if failed := processes.run_commands(
            commands, threads=threads, after={"subject": sheet.draw("subject", threads=1)}
        ):
            name, code, reason = failed
            reason = reason or f"it stopped with exit code {code}; the lines above say why."
            raise RunError(f"the training of the {name}: {reason}")
    else:
        for words in commands.values():
            if code := cli.main(words):  # which has said why
                raise SystemExit(code)
            release_dropped_models()
    return sheet


def command(config: Config, kind: Literal["style", "subject"], photos: Path, output: Path) -> list[str]:
    """The words after `sfumato` that teach the style or the subject."""
    name = "line style" if kind == "style" else SUBJECT
    words = ["teach", str(photos), name, f"--{kind}", "--output", str(output / kind), *base_words(config)]
    words += ["--seed", str(config.seed), "--precision", config.precision, "--no-sheet", "--no-measure"]
    shorter = kind == "style" and is_pocket(config) and config.steps is None
    steps = STYLE_STEPS if shorter else config.steps
    return words if steps is None else [*words, "--steps", str(steps)]


def base_words(config: Config) -> list[str]:
    """The options that name the base model."""
    kind = config.prediction_type
    ends = ["--zero-terminal-snr"] if config.zero_terminal_snr else []
    return ["--base", config.base, *(["--prediction-type", kind] if kind else []), *ends]


def is_pocket(config: Config) -> bool:
    """Whether the base model is the embedded one, which is small enough for two trainings at once."""
    return config.base == "pocket"


def check(words: Sequence[str]) -> None:
    """Refuse what the training would refuse, before another one runs beside it."""
    from sfumato.pipelines import teach

    asked = parse(teach.Config, words[1:], program="teach", first_may_be_config=False)
    teach.plan_of(asked, *teach.look(asked))


class Sheet:
    """Rows of images with the same prompts and seeds; only the weights of style and subject differ.

    files: of "style" and "subject".
    """

    def __init__(self, config: Config, files: Mapping[str, Path]) -> None:
        self.files, self._config = files, config
        self._rows: dict[str, list[Image]] = {}

    def draw(self, *names: str, threads: int) -> Iterator[str]:
        """Generate the rows that need only these adapters and do not exist yet; yields each row's label.

        threads: number of torch threads.
        """
        import torch

        from sfumato import Adapter, compose, load_base
        from sfumato.compose import adapter_guidance
        from sfumato.compose.schedules import over_asked_steps
        from sfumato.generation.draw import draw
        from sfumato.precision import decide

        torch.set_num_threads(threads)
        seeds = [self._config.seed + place for place in range(len(PROMPTS))]
        base: Base = load_base(
            self._config.base,
            precision=decide(self._config.precision),
            prediction_type=self._config.prediction_type,
            zero_terminal_snr=self._config.zero_terminal_snr,
        )
        with compose(base, *(Adapter(self.files[name], name=name) for name in names)) as mix:
            for label, weights in ROWS.items():
                if label in self._rows or any(weights[name] for name in weights.keys() - names):
                    continue
                mix.set_weights({name: weights[name] for name in names})
                with adapter_guidance(mix, guidance=base.defaults.guidance), over_asked_steps(mix):
                    self._rows[label] = draw(base, PROMPTS, seeds, steps=SAMPLER_STEPS)
                yield label

    def write(self, path: Path, threads: int) -> None:
        """Generate the rows that are left, and save the labelled rows as one image. threads: as for `draw`."""
        from sfumato.utils.atomic import atomic_path
        from sfumato.utils.image_grid import contact_sheet

        for _ in self.draw(*self.files, threads=threads):
            pass
        sheet = contact_sheet([self._rows[label] for label in ROWS], row_labels=list(ROWS), column_labels=PROMPTS)
        with atomic_path(path) as temporary:
            sheet.save(temporary)


def next_commands(style: Path, subject: Path, config: Config) -> list[str]:
    """Three commands that work as they are, even without an active environment: they call sfumato as it was called."""
    a, b = quote_argument(str(style)), quote_argument(str(subject))
    on = "" if is_pocket(config) else f"{join_command(base_words(config))} "
    program = program_word()
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
