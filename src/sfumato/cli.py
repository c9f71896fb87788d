"""`sfumato`: finds programs by name and runs them.

Listing and help load no torch: a program imports what is heavy only when it runs.
"""

import errno
import gc
import importlib
import importlib.metadata
import importlib.util
import io
import logging
import os
import signal
import sys
import textwrap
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Literal, NoReturn

import sfumato
from sfumato.errors import ConfigError, SfumatoError, did_you_mean, is_out_of_memory, package_error
from sfumato.utils import processes
from sfumato.utils.formatting import escape_control, quote_argument
from sfumato.utils.processes import ignore_broken_pipes
from sfumato.utils.text_files import read_json_object

TRAINERS = {
    "lora": "a style or a subject as a LoRA: a file of a few megabytes",
    "dreambooth": "a subject bound to a rare word, as a LoRA or in the whole U-Net; its class is preserved",
    "textual_inversion": "a new word of one to sixteen embedding vectors, and nothing else",
    "finetune": "a style or a domain in all weights of the U-Net, from images and their captions",
    "slider": "a LoRA whose weight moves images between two ends, which prompts or pairs of images give",
    "lcm": "an adapter with which a base model draws in four steps instead of 30 or so (LCM-LoRA)",
    "dpo": "an adapter that draws more like the preferred ones of pairs of images (Diffusion-DPO)",
    "pretrain": "a small base model from scratch: first its VAE, then its U-Net and text encoder",
}
STAGES = {"style_emphasis": "pretrain", "self_play": "pretrain"}
"""By its name up to 0.27, each trainer that is now a stage of another: the name goes on working."""
PIPELINES = {
    "teach": ("sfumato.pipelines.teach", "learn a style, a subject or a word from pictures and a name"),
    "quickstart": ("sfumato.pipelines.quickstart", "learn a style and a subject, mix them, make a sheet"),
    "check": ("sfumato.pipelines.check", "what training will see in a folder of images, and what is wrong"),
    "memory": ("sfumato.pipelines.memory", "how much memory training and generating take"),
    "caption": ("sfumato.pipelines.caption", "write captions for images that have none"),
    "runs": ("sfumato.pipelines.runs", "compare trainings: steps, measurements, settings, samples"),
    "ask": ("sfumato.pipelines.ask", "ask a training under way for samples, its adapter so far, or to end"),
    "generate": ("sfumato.pipelines.generate", "make images with any base model and any mix of adapters"),
    "grid": ("sfumato.pipelines.grid", "compare images in an XY plot over weights, prompts, adapters or seeds"),
    "merge": ("sfumato.pipelines.merge", "combine adapters into one file, or bake them into a checkpoint"),
    "clash": ("sfumato.pipelines.clash", "show where adapters conflict, from their files alone"),
    "extract": ("sfumato.pipelines.extract", "make an adapter from a fine-tuned model and its base model"),
    "resize": ("sfumato.pipelines.resize", "reduce the rank of a LoRA"),
    "inspect": ("sfumato.pipelines.inspect_file", "show what a weight file contains, without loading it"),
    "verify": ("sfumato.pipelines.verify", "whether a file is complete, or the same adapter as another"),
    "env": ("sfumato.pipelines.env", "show versions, extras, devices and the precision that follows"),
    "convert": ("sfumato.pipelines.convert", "rewrite an adapter in another tool's file format"),
    "dataset": ("sfumato.pipelines.dataset_config", "convert another tool's data set config"),
    "recipe": ("sfumato.pipelines.recipe", "convert another tool's training config"),
}
"""Command -> (module, what it does). The help has them in the groups of `GROUPS`."""
_OTHERS = {
    "resume": "go on with a training that was stopped",
    "ls, cp": "where the programs' files are; copy one, to change it (sfumato cp lora mine.py)",
}
GROUPS = {
    "teach": ("teach", "quickstart"),
    "train": ("resume", "check", "memory", "caption", "runs", "ask", "ls, cp"),
    "draw": ("generate", "grid"),
    "mix": ("merge", "clash", "extract", "resize"),
    "look": ("inspect", "verify", "env"),
    "convert": ("convert", "dataset", "recipe"),
}
"""What one wants -> the commands for it. A command that is not there yet is left out."""

Main = Callable[[Sequence[str]], object]
_SHORT = {
    "resume": "RUN [OPTIONS]     RUN is the folder of a training; its trainer's options may follow",
    "ls": "               the programs and where their files are",
    "cp": "NAME FILE      copy a program, to change it; sfumato ls shows the names",
}
"""The commands that are no program of their own, and how each is called."""


def usage() -> str:
    """The text of `sfumato --help`, which fits a screen of 25 lines."""
    lines = [
        "Teach a Stable Diffusion model a style or a subject from a dozen images, and mix what was learned.",
        "Usage: sfumato COMMAND [OPTIONS]; every COMMAND answers --help, as does sfumato train NAME.",
    ]
    texts = _OTHERS | {name: text for name, (_, text) in PIPELINES.items()}
    for title, names in GROUPS.items():
        rows = [(name, texts[name]) for name in names if name in texts]
        if title == "train":
            trainers = textwrap.wrap(", ".join(TRAINERS), 78)
            rows = [*zip(["train NAME", *[""] * (len(trainers) - 1)], trainers, strict=True), *rows]
        lines += [
            f"{title if not place else '':<8} {name:<11} {text}".rstrip() for place, (name, text) in enumerate(rows)
        ]
    return "\n".join(lines)


def usage_of_train() -> str:
    """The text of `sfumato train --help`."""
    return "\n".join(
        [
            "Usage: sfumato train NAME [CONFIG.toml] [OPTIONS]     sfumato train NAME --help has the options",
            "",
            *(f"  {name:<19}{text}" for name, text in TRAINERS.items()),
            "",
            "Example: sfumato train lora --images datasets/line-style --output runs/line",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run `sfumato` with these arguments; returns the exit code."""
    return _as_process(_dispatch) if argv is None else guarded(_dispatch, list(argv))


def run(program_main: Main) -> NoReturn:
    """Run a program's `main` as a script does: the process's arguments in, the process's exit code out."""
    sys.exit(_as_process(program_main))


class _Terminated(KeyboardInterrupt):
    """A signal, its argument, that ends a program as Ctrl-C does: with a line, and with what it holds let go."""


def _terminate(number: int, _: object) -> NoReturn:
    raise _Terminated(number)


_TERMINATIONS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name)]
"""What asks a process to end: the second comes of a closed terminal, the third is Windows' Ctrl-Break, by which
`side_by_side` asks."""


def _as_process(program_main: Main) -> int:
    """`guarded`, after which nothing is left to do: Ctrl-C and SIGTERM then end the process without a trace of its
    closing."""
    if hasattr(sys, "ps1") or sys.flags.interactive:  # IPython's %run, python -i: the process goes on, and its Ctrl-C
        return guarded(program_main, sys.argv[1:])
    # torch, diffusers and transformers come as half a million objects that stay: looking for garbage among them as
    # often as Python does holds up a command's start.
    gc.set_threshold(10_000, 20, 20)
    ignore_broken_pipes()
    # A training takes both over for its steps (sfumato.runs.progress).
    for number in _TERMINATIONS:
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, _terminate)
    try:
        return guarded(program_main, sys.argv[1:])
    finally:
        # Not where a shell has it ignored, or a notebook handles it.
        ours = {signal.SIGINT: signal.default_int_handler, **dict.fromkeys(_TERMINATIONS, _terminate)}
        for number, handler in ours.items():
            if signal.getsignal(number) is handler:
                signal.signal(number, signal.SIG_DFL)


_OUTPUT_CLOSED = 141
"""What shells say of a program that SIGPIPE ended: what it was to write may be missing."""


def guarded(program_main: Main, argv: Sequence[str]) -> int:
    """Call `program_main(argv)`; what a user can mend becomes one line on stderr and exit code 2."""
    before, warnings.formatwarning = warnings.formatwarning, _warning_line
    try:
        return _guarded(program_main, argv)
    finally:
        warnings.formatwarning = before


def _warning_line(message: Warning | str, *_: object, **__: object) -> str:
    """A warning as a person reads it, without the place in the code that it comes from."""
    return f"sfumato: {escape_control(' '.join(str(message).split()))}\n"


def _guarded(program_main: Main, argv: Sequence[str]) -> int:
    _quieten()
    processes.set_thread_environment(os.environ)
    _forget_no_width(os.environ)
    try:
        _refuse_surrogates(argv)
        _refuse_no_docstrings()
        result = program_main(argv)
    except SfumatoError as error:
        _end_unbegun_runs("abandon_unbegun")
        return _failed(str(error))
    except KeyboardInterrupt as error:
        _end_unbegun_runs("close_unbegun")
        return _failed("interrupted.", 128 + (error.args[0] if isinstance(error, _Terminated) else signal.SIGINT))
    except BrokenPipeError:  # of a program in another's process, whose streams are as they are
        _end_unbegun_runs("close_unbegun")
        with suppress(OSError):  # it may be the stream for errors
            return _failed("what it says is read no more, or what it sends.", _OUTPUT_CLOSED)
        return _OUTPUT_CLOSED
    except Exception as error:
        line = _on_memory(error) if is_out_of_memory(error) else package_error(error)
        if not line and isinstance(error, OSError):  # a disk that fills while a card or a plot is written
            line = _on_file(error)
        if not line:
            raise
        _end_unbegun_runs("abandon_unbegun")
        return _failed(line)
    return result if isinstance(result, int) else 0


def _quieten() -> None:
    """Leave out what other libraries say of things that nobody asked for; a console that lacks a letter shows its
    number."""
    # Its warnings are about parts that are not used here, such as image processors without torchvision.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    # diffusers loads it wherever it is installed; without a GPU it warns of a 4-bit product that nobody asked for.
    logging.getLogger("bitsandbytes.backends.cpu").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_NARROWEST = 10
"""Columns of a help that can be read at all."""


def _forget_no_width(environment: MutableMapping[str, str]) -> None:
    """Leave the width of the terminal to be found where COLUMNS says none: at 0, 1 or 2 rich, which lays the help out,
    never ends and fills the memory."""
    width = environment.get("COLUMNS", "")
    if width.isdecimal() and int(width) < _NARROWEST:
        del environment["COLUMNS"]


def _refuse_surrogates(argv: Sequence[str]) -> None:
    """Raise ConfigError for a word that was not UTF-8, of which Python has made surrogates."""
    for word in argv:
        if not word.isascii() and any("\ud800" <= character <= "\udfff" for character in word):
            if (read_as := sys.getfilesystemencoding()) != "utf-8":
                raise ConfigError(f"{word!a}: Python reads words as {read_as} here; set PYTHONUTF8=1.")
            raise ConfigError(f"{word!a} is not UTF-8; give names that are, or rename the file.")


def _refuse_no_docstrings() -> None:
    """Raise ConfigError where Python drops docstrings: transformers reads its own as it loads."""
    if sys.flags.optimize > 1:
        raise ConfigError(
            "Python drops docstrings (-OO, PYTHONOPTIMIZE=2), which transformers needs; use -O, or neither."
        )


def _end_unbegun_runs(how: Literal["abandon_unbegun", "close_unbegun"]) -> None:
    """Call this function of `sfumato.runs.progress`, which only a program that trains has loaded."""
    if runs := sys.modules.get("sfumato.runs.progress"):
        getattr(runs, how)()


def _failed(line: str, code: int = 2) -> int:
    """Say why on stderr, and what is kept of a training; returns the exit code."""
    print(f"sfumato: {escape_control(f'{line}{_kept()}')}", file=sys.stderr)
    return code


def _kept() -> str:
    """What is kept of a training that an error stopped after its last step, after a space; nothing of others."""
    runs = sys.modules.get("sfumato.runs.progress")
    return runs.stopped_while_writing() if runs else ""


def _reason(error: Exception) -> str:
    """What it says, in one line."""
    return " ".join(str(error).split())


def _on_memory(error: Exception) -> str:
    advice = (
        "Close what else takes some; draw at a smaller --size, with --quantize int8, on a GPU with --offload, or with "
        "--precision fp16. `sfumato memory` tells what drawing takes."
    )
    if "sfumato.runs.run" in sys.modules:  # which only a program that trains has loaded
        advice = (
            "Train at a smaller --resolution, an adapter or words with --quantize int8, or with "
            "--gradient-checkpointing and --micro-batch 1 if that was not tried. `sfumato memory` tells what it takes."
        )
    return f"there is not enough memory ({_reason(error)[:100] or 'of this machine'}). {advice}"


_ADVICE = {
    errno.ENAMETOOLONG: "Give a shorter one.",
    errno.ENOENT: "See that its folder is there and takes files, or name another.",
    errno.EROFS: "Name a place that can be written to.",
}
"""By the system's error."""


def _on_file(error: OSError) -> str:
    place = error.filename2 or error.filename
    where = f"{place}: " if place is not None else ""
    advice = _ADVICE.get(error.errno or 0, "Make room or see to its permissions.")
    return f"{where}{error.strerror or error}. {advice}"


def _dispatch(words: Sequence[str]) -> object:
    command, rest = (words[0], list(words[1:])) if words else ("help", [])
    if command in ("--help", "-h", "help", "--help-all"):
        return _say(usage())
    if command == "--version":
        return _say(sfumato.__version__)
    if command in _SHORT and rest[:1] in (["--help"], ["-h"]):
        return _say(f"Usage: sfumato {command} {_SHORT[command]}")
    if command in PIPELINES:
        return _load(PIPELINES[command][0])(rest)
    own: dict[str, Callable[[list[str]], object]] = {"train": _train, "resume": _resume, "ls": _list, "cp": _copy}
    if command not in own:
        known = ["train", "resume", *PIPELINES, "ls", "cp"]
        raise ConfigError(f"there is no command {command!r}; {did_you_mean(command, known)} See sfumato --help.")
    return own[command](rest)


def _say(text: str) -> int:
    print(text)
    return 0


def _train(words: list[str]) -> object:
    """Run a trainer by its name."""
    if not words:
        raise ConfigError(f"train wants a trainer: {', '.join(TRAINERS)}. sfumato train lora --help has its options.")
    if words[0] in ("--help", "-h", "--help-all"):
        return _say(usage_of_train())
    return _trainer(words[0])(words[1:])


def _resume(words: list[str]) -> object:
    """Go on with a run by what its folder says: program and config."""
    if not words or words[0].startswith("-"):
        raise ConfigError("resume wants the folder of a run: sfumato resume RUN [OPTIONS of its trainer].")
    folder = Path(words[0])
    config = folder / "config.toml"
    facts = read_json_object(folder / "run.json")
    if "program" not in facts:
        raise ConfigError(f"{folder} holds no run to resume; {_runs_near(folder)}")
    copy = facts.get("copy")
    if isinstance(copy, str) and copy:
        raise ConfigError(
            f"{folder}: its program is {copy}, which may do otherwise than sfumato's own. Go on with: python "
            f"{quote_argument(copy)} {quote_argument(str(config))} --output "
            f"{quote_argument(str(folder))} --resume"
        )
    trainer = _trainer(str(facts["program"]))
    if not config.is_file():
        raise ConfigError(
            f"{config} is gone, and with it the options of the run. Give the same again: sfumato train "
            f"{facts['program']} [OPTIONS] --output {quote_argument(str(folder))} --resume --force"
        )
    return trainer([str(config), "--output", str(folder), "--resume", *words[1:]])


def _runs_near(folder: Path) -> str:
    """What to name instead of a folder that is no run: those in it, or the one that it or the file lies in."""
    if not folder.exists():
        return "there is no such folder; name the one that --output named."
    if (folder.parent / "run.json").is_file():
        return f"{folder.parent} does: sfumato resume {quote_argument(str(folder.parent))}"
    if found := sorted(each.parent.name for each in folder.glob("*/run.json")):
        return f"there are {', '.join(found[:4])}{' and more' if found[4:] else ''} in it; name one."
    return "name the folder that --output named."


def find(name: str, among: dict[str, str]) -> str:
    """The module of the trainer called `name`."""
    if name not in among:
        raise ConfigError(f"there is no trainer {name!r}; {did_you_mean(name, among)} See sfumato --help.")
    return f"sfumato.trainers.{name}"


def _trainer(name: str) -> Main:
    """What runs the trainer called `name`, or the stage of a trainer."""
    if name not in STAGES:
        return _load(find(name, TRAINERS))
    main_of: Callable[..., object] = _load(find(STAGES[name], TRAINERS))
    return partial(main_of, stage=name)


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


def _list(words: list[str]) -> int:
    if words:
        raise ConfigError(f"ls takes nothing; {words[0]!r} is left over.")
    for name, module in _programs().items():
        print(f"{name:<19}{source(module)}")
    return 0


def _copy(words: list[str]) -> int:
    if len(words) != 2:
        raise ConfigError("cp wants a program and a file: sfumato cp lora mine.py (sfumato ls shows the programs).")
    if not words[1]:
        raise ConfigError(f"cp {words[0]}: the file is empty; wanted a path, such as mine.py.")
    name, target = words[0], Path(words[1])
    programs = _programs()
    if name not in programs:
        raise ConfigError(f"there is no program {name!r}; {did_you_mean(name, list(programs))}")
    if words[1].endswith(("/", os.sep)) and not target.is_dir():
        raise ConfigError(f"{words[1]} is not a folder; make it first, or name another place.")
    original = source(programs[name])
    if target.is_dir():
        target = target / original.name
    if target.stem in sys.stdlib_module_names:  # what it imports itself, or another program beside it
        raise ConfigError(f"{target}: would hide Python's own module {target.stem}; name another file.")
    if target.stem in {"sfumato", *importlib.metadata.packages_distributions()}:
        raise ConfigError(f"{target}: would hide the installed package {target.stem}; name another file.")
    if target.exists():
        raise ConfigError(f"{target} exists and is not overwritten; name another file.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target.parent} is not a folder; make it first, or name another place.")
    from sfumato.utils.atomic import write_text

    write_text(target, original.read_text(encoding="utf-8"))
    print(f"{target} is yours; run it with: python {quote_argument(str(target))} --help")
    return 0
