"""`sfumato`: finds programs by name and runs them.

Listing and help load no torch: a program imports what is heavy only when it runs.
"""

import errno
import importlib
import importlib.util
import io
import json
import logging
import os
import shlex
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import sfumato
from sfumato.errors import ConfigError, SfumatoError

TRAINERS = {
    "dreambooth": "the whole U-Net, or a LoRA, on a subject bound to a rare word, with the class kept",
    "textual_inversion": "one to sixteen vectors for a new word, and nothing else",
    "lora": "a LoRA on the U-Net's cross-attention, or more: a style or a subject in a file of a few megabytes",
    "pretrain": "a small base from nothing: first its VAE, then its U-Net and text encoder",
}
PIPELINES = {
    "check": (
        "sfumato.pipelines.check",
        "look at a folder of pictures before training: what will be seen, what is wrong",
    ),
    "memory": ("sfumato.pipelines.memory", "what training and drawing take of memory, before anything is loaded"),
    "caption": ("sfumato.pipelines.caption", "write captions for pictures that have none"),
    "dataset": ("sfumato.pipelines.dataset_config", "another tool's data set config as a dataset.toml"),
    "generate": ("sfumato.pipelines.generate", "draw pictures with any base and any mix of adapters"),
    "grid": ("sfumato.pipelines.grid", "an XY plot over weights, prompts, adapters, seeds: pictures to choose by"),
    "inspect": ("sfumato.pipelines.inspect_file", "what a weight file is, without loading it"),
    "verify": ("sfumato.pipelines.verify", "whether a file is whole, and the same adapter as another"),
    "convert": ("sfumato.pipelines.convert", "an adapter in another tool's grammar"),
    "merge": ("sfumato.pipelines.merge", "adapters into one file, or into a checkpoint"),
    "clash": ("sfumato.pipelines.clash", "where adapters clash, told from their files"),
    "extract": ("sfumato.pipelines.extract", "an adapter out of a fine-tuned model and its base"),
    "resize": ("sfumato.pipelines.resize", "a LoRA of another rank"),
    "quickstart": ("sfumato.pipelines.quickstart", "the main job: learn a style and a subject, mix them, draw a sheet"),
}

Main = Callable[[Sequence[str]], object]
_SHORT = {
    "resume": "RUN [OPTIONS]     RUN is the folder of a training; its trainer's options may follow",
    "ls": "               the programs and where their files are",
    "cp": "NAME FILE      copy a program, to change it; sfumato ls shows the names",
}
"""The commands that are no program of their own, and how each is called."""


def usage() -> str:
    """The text of `sfumato --help`."""
    lines = [
        "Teach a Stable Diffusion model a style or a subject from a dozen pictures, and mix what was learned.",
        "",
        "Usage: sfumato COMMAND [OPTIONS]          every command answers --help",
        "",
        "  train NAME    train; NAME is one of",
        *(f"    {name:<19}{text}" for name, text in TRAINERS.items()),
        *(f"  {name:<14}{text}" for name, (_, text) in PIPELINES.items()),
        "  resume RUN    go on with a training that was stopped",
        "  ls            the programs and where their files are",
        "  cp NAME FILE  copy a program, to change it; the copy runs",
        "",
        "Examples:",
        "  sfumato quickstart",
        "  sfumato train lora trainers/configs/lora-style.toml --images datasets/line-style --output runs/line",
        "  sfumato generate crab --lora runs/line/line.safetensors:0.8 --seed 7 -o crab.png",
    ]
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sfumato` with these arguments; returns the exit code."""
    return _as_process(_dispatch) if argv is None else guarded(_dispatch, list(argv))


def run(program_main: Main) -> NoReturn:
    """Run a program's `main` as a script does: the process's arguments in, the process's exit code out."""
    sys.exit(_as_process(program_main))


def _as_process(program_main: Main) -> int:
    """`guarded`, after which nothing is left to do: Ctrl-C then ends the process without a trace of its closing."""
    try:
        return guarded(program_main, sys.argv[1:])
    finally:
        # Not where a shell has it ignored, or a notebook handles it.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, signal.SIG_DFL)


_MEMORY_IS_FULL = ("out of memory", "can't allocate memory", "ALLOC_FAILED")
"""What torch says for GPUs, for CPUs and for cuBLAS, each as a RuntimeError."""


def guarded(program_main: Main, argv: Sequence[str]) -> int:
    """Call `program_main(argv)`; what a user can mend becomes one line on stderr and exit code 2."""
    shown, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        return _guarded(program_main, argv)
    finally:
        warnings.formatwarning = shown


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as a person reads it, without the place in the code that it comes from."""
    return f"sfumato: {message}\n"


def _guarded(program_main: Main, argv: Sequence[str]) -> int:
    # Its warnings are about parts that are not used here, such as image processors without torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers loads it wherever it is installed; without a GPU it warns of a 4-bit product that nobody asked for.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):  # a console that lacks a letter shows its number
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        for word in argv:
            if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
                raise ConfigError(f"{word!a} is not UTF-8; give names that are, or rename the file.")
        result = program_main(argv)
    except SfumatoError as error:
        if runs := sys.modules.get("sfumato.runs"):
            runs.withdraw()
        print(f"sfumato: {error}{_kept()}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if runs := sys.modules.get("sfumato.runs"):
            runs.let_go()
        print(f"sfumato: interrupted.{_kept()}", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:  # `sfumato ls | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (MemoryError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, MemoryError) and not any(words in reason for words in _MEMORY_IS_FULL):
            raise
        if runs := sys.modules.get("sfumato.runs"):
            runs.withdraw()
        print(
            f"sfumato: there is not enough memory ({reason[:100] or 'of this machine'}). Train with "
            "--gradient-checkpointing, a smaller --batch and more --accumulate, or a smaller --resolution; draw fewer "
            f"or smaller pictures. `sfumato memory` tells what each way to train takes.{_kept()}",
            file=sys.stderr,
        )
        return 2
    except OSError as error:  # a disk that fills while a card or a plot is written
        place = error.filename2 or error.filename
        where = f"{place}: " if place is not None else ""
        is_name = error.errno == errno.ENAMETOOLONG
        advice = "Give a shorter one." if is_name else "Make room or see to its permissions."
        print(f"sfumato: {where}{error.strerror or error}. {advice}{_kept()}", file=sys.stderr)
        return 2
    return result if isinstance(result, int) else 0


def _kept() -> str:
    """What is kept of a training that an error stopped after its last step, after a space; nothing of others."""
    runs = sys.modules.get("sfumato.runs")
    return runs.stopped_while_writing() if runs else ""


def _dispatch(words: Sequence[str]) -> object:
    if not words or words[0] in ("--help", "-h", "help"):
        print(usage())
        return 0
    if words[0] == "--version":
        print(sfumato.__version__)
        return 0
    command, rest = words[0], list(words[1:])
    if command == "train":
        if not rest:
            raise ConfigError(
                f"train wants a trainer: {', '.join(TRAINERS)}. sfumato train lora --help has its options."
            )
        if rest[0] in ("--help", "-h"):
            print(usage())
            return 0
        return _load(find(rest[0], TRAINERS))(rest[1:])
    if command in _SHORT and rest[:1] in (["--help"], ["-h"]):
        print(f"Usage: sfumato {command} {_SHORT[command]}")
        return 0
    if command == "resume":
        return _resume(rest)
    if command in PIPELINES:
        return _load(PIPELINES[command][0])(rest)
    if command == "ls":
        if rest:
            raise ConfigError(f"ls takes nothing; {rest[0]!r} is left over.")
        return _list()
    if command == "cp":
        return _copy(rest)
    known = ["train", "resume", *PIPELINES, "ls", "cp"]
    raise ConfigError(f"there is no command {command!r}; {_nearest(command, known)} See sfumato --help.")


def _resume(words: list[str]) -> object:
    """Go on with a run by what its folder says: program and config."""
    if not words or words[0].startswith("-"):
        raise ConfigError("resume wants the folder of a run: sfumato resume RUN [OPTIONS of its trainer].")
    folder = Path(words[0])
    config = folder / "config.toml"
    try:
        facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        program, copy = facts["program"], facts.get("copy")
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ConfigError(f"{folder} holds no run to resume; name the folder that --output named.") from None
    if copy:
        raise ConfigError(
            f"{folder}: its program is {copy}, which may do otherwise than sfumato's own. Go on with: python "
            f"{shlex.quote(copy)} {shlex.quote(str(config))} --output {shlex.quote(str(folder))} --resume"
        )
    return _load(find(str(program), TRAINERS))([str(config), "--output", str(folder), "--resume", *words[1:]])


def find(name: str, among: dict[str, str]) -> str:
    """The module of the trainer called `name`."""
    if name not in among:
        raise ConfigError(f"there is no trainer {name!r}; {_nearest(name, list(among))} See sfumato --help.")
    return f"sfumato.trainers.{name}"


def _nearest(name: str, known: list[str]) -> str:
    import difflib

    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."


def _load(module: str) -> Main:
    program: Main = importlib.import_module(module).main
    return program


def source(module: str) -> Path:
    """The file of a program, found without running it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        raise ConfigError(f"the program {module} is not part of this installation; install sfumato again.")
    return Path(spec.origin)


def _programs() -> dict[str, str]:
    trainers = {name: f"sfumato.trainers.{name}" for name in TRAINERS}
    return trainers | {name: module for name, (module, _) in PIPELINES.items()}


def _list() -> int:
    for name, module in _programs().items():
        print(f"{name:<19}{source(module)}")
    return 0


def _copy(words: list[str]) -> int:
    if len(words) != 2:
        raise ConfigError("cp wants a program and a file: sfumato cp lora mine.py (sfumato ls shows the programs).")
    name, target = words[0], Path(words[1])
    programs = _programs()
    if name not in programs:
        raise ConfigError(f"there is no program {name!r}; {_nearest(name, list(programs))}")
    if target.is_dir():
        target = target / f"{name}.py"
    if target.exists():
        raise ConfigError(f"{target} exists and is not overwritten; name another file.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder; make it first, or name another place.")
    target.write_text(source(programs[name]).read_text(encoding="utf-8"), encoding="utf-8")
    print(f"{target} is yours; run it with: python {shlex.quote(str(target))} --help")
    return 0
