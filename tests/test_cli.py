"""Commands are found, helped and copied without torch; wrong use is one line and exit code 2."""

import importlib
import io
import logging
import os
import shlex
import signal
import subprocess
import sys
import warnings

import pytest

from sfumato import cli
from sfumato.errors import ConfigError
from sfumato.utils.formatting import say
from sfumato.utils.text_files import read_toml

COMMANDS = [
    ["--help"],
    *([name, "--help"] for name in cli.PIPELINES),
    *(["train", name, "--help"] for name in cli.TRAINERS),
]


def test_no_help_loads_torch():
    """One process for all of them: whichever loads torch, the line at the end tells."""
    script = (
        "import sys\nfrom sfumato.cli import main\n"
        f"for argv in {COMMANDS!r}:\n"
        "    try:\n        main(argv)\n    except SystemExit as stop:\n        assert not stop.code, argv\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)\n"
        "    assert not heavy, (argv, heavy)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_without_a_base_an_adapter_s_commands_load_no_diffusers(tmp_path):
    """Which takes most of their time."""
    script = (
        "import sys, torch\nfrom sfumato.cli import main\nfrom sfumato.files import write_lora\n"
        "from sfumato.files.kinds import LoraModule\n"
        "path = 'mid_block.attentions.0.transformer_blocks.0.attn2.to_k'\n"
        "module = LoraModule(torch.ones(2, 768), torch.ones(1280, 2), 2.0)\n"
        "write_lora('a.safetensors', {('unet', path): module}, family='sd1')\n"
        "for argv in (['verify', 'a.safetensors'], ['convert', 'a.safetensors', '-o', 'b.safetensors'],\n"
        "             ['merge', 'a.safetensors', 'b.safetensors', '-o', 'c.safetensors'],\n"
        "             ['resize', 'c.safetensors', '--rank', '1', '-o', 'd.safetensors']):\n"
        "    assert main(argv) == 0, argv\n"
        "    assert 'diffusers' not in sys.modules, argv\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["genrate"], "did you mean generate?"),
        (["train", "lroa"], "did you mean lora?"),
        (["train", "lora", "--images", "d", "--output", "o", "--stps", "3"], "did you mean --steps?"),
        (["check", "d", "--resolution", "9" * 20], "it must be at least 1 and below 2,147,483,648."),
        (["cp", "lora"], "a program and a file"),
        (["cp", "nothing", "mine.py"], "there is no program 'nothing'"),
    ],
)
def test_wrong_use_is_one_line_and_exit_code_2(argv, said, capsys):
    assert cli.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert said.lower() in shown.err.lower()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of 8 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] err == 0. DefaultCPUAllocator: can't allocate memory: ..."),
        MemoryError(),
    ],
)
def test_full_memory_is_one_line_that_says_what_to_do(error, capsys):
    def program(argv):
        raise error

    assert cli.guarded(program, []) == 2
    shown = capsys.readouterr().err
    assert shown.count("\n") == 1
    assert "not enough memory" in shown


@pytest.mark.parametrize(("trains", "advice"), [(True, "--gradient-checkpointing"), (False, "a smaller --size")])
def test_full_memory_has_the_advice_of_what_was_under_way(trains, advice, monkeypatch, capsys):
    from sfumato.runs import run

    def program(argv):
        raise MemoryError

    monkeypatch.setitem(sys.modules, "sfumato.runs.run", run)
    if not trains:
        monkeypatch.delitem(sys.modules, "sfumato.runs.run")
    assert cli.guarded(program, []) == 2
    assert ("--gradient-checkpointing" in (said := capsys.readouterr().err), advice in said) == (trains, True)


def test_a_console_without_a_letter_shows_its_number(monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), encoding="cp1252")
    monkeypatch.setattr(sys, "stdout", console)
    assert cli.guarded(lambda argv: print("é, 赤, █"), []) == 0
    console.flush()
    assert console.buffer.getvalue().decode("cp1252").strip() == "é, \\u8d64, \\u2588"


def test_a_warning_is_a_line_without_its_place_in_the_code(monkeypatch):
    said = io.StringIO()
    monkeypatch.setattr(sys, "stderr", said)
    before = warnings.formatwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *what, **_: said.write(warnings.formatwarning(*what))
        assert cli.guarded(lambda argv: warnings.warn("cut.", stacklevel=1), []) == 0
    assert said.getvalue() == "sfumato: cut.\n"
    assert warnings.formatwarning is before


def test_bitsandbytes_does_not_warn_of_what_nobody_asked_for(caplog):
    def program(_):
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
        logging.getLogger("bitsandbytes.cextension").warning("no library")

    assert cli.guarded(program, []) == 0
    assert caplog.messages == ["no library"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_one_line_and_another_while_the_process_closes_leaves_no_trace(number):
    """What torch does then takes a second, in which who is impatient types it once more."""
    script = (
        "import atexit, signal, sys, time\nfrom sfumato import cli\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell in the background leaves it ignored
        "def close():\n    print('closing', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "def main(argv):\n    print('open', file=sys.stderr, flush=True)\n    time.sleep(60)\n"
        "atexit.register(close)\ncli.run(main)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    assert process.stderr.readline() == "open\n"
    process.send_signal(number)
    said = [process.stderr.readline() for _ in range(2)]
    process.send_signal(number)
    assert said == ["sfumato: interrupted.\n", "closing\n"]
    assert process.communicate(timeout=30)[1] == ""
    assert process.returncode == -number


def test_another_error_of_the_program_stays_one():
    def program(argv):
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        cli.guarded(program, [])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("raise OSError('libcudart.so.13: cannot open shared object file')", "libcudart.so.13: cannot open"),
        ("raise RuntimeError('operator torchvision::nms does not exist')", "operator torchvision::nms does not exist"),
        ("from json import no_such_name_of_it", "no_such_name_of_it"),
    ],
)
@pytest.mark.parametrize("hidden", [False, True])
def test_a_package_that_is_broken_is_named_with_its_reason(text, said, hidden, tmp_path, monkeypatch, capsys):
    """Hidden: behind an error of another library, as diffusers and transformers do it."""
    (tmp_path / "brokenpackage.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)

    def program(argv):
        try:
            importlib.import_module("brokenpackage")
        except Exception as error:
            if hidden:
                raise RuntimeError("Failed to import diffusers.models") from error
            raise

    assert cli.guarded(program, []) == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    package = "Python's own module json" if "json" in text else "the package brokenpackage is installed, but"
    assert line.startswith(f"sfumato: {package} ")
    assert said in line
    assert "Make room" not in line


def test_a_package_that_is_missing_is_named(capsys):
    assert cli.guarded(lambda argv: importlib.import_module("no_such_package_here"), []) == 2
    assert capsys.readouterr().err == (
        "sfumato: the package no_such_package_here is missing. Install sfumato again with all that it needs, or "
        "no_such_package_here alone.\n"
    )


def test_what_a_program_imports_wrongly_of_sfumato_stays_an_error():
    with pytest.raises(ImportError, match="no_such_name"):
        cli.guarded(lambda argv: exec("from sfumato.cli import no_such_name"), [])


def test_a_python_that_drops_docstrings_is_refused_and_no_package_is_blamed():
    command = [sys.executable, "-OO", "-m", "sfumato", "generate", "crab"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "sfumato: Python drops docstrings (-OO, PYTHONOPTIMIZE=2), which transformers needs; use -O, or neither.\n"
    )


@pytest.mark.skipif(os.name == "nt", reason="words come as Unicode there")
def test_words_that_python_reads_as_ascii_are_not_called_broken():
    usual = {name: value for name, value in os.environ.items() if not name.startswith("LC_")}
    ascii_only = usual | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    code = (
        "import sys; from sfumato import cli; print(sys.getfilesystemencoding()); "
        "sys.exit(cli.main(['ls', sys.argv[1]]))"
    )
    done = subprocess.run([sys.executable, "-c", code, "é"], capture_output=True, text=True, env=ascii_only)
    if (read_as := done.stdout.strip()) == "utf-8":
        pytest.skip("this system reads words as UTF-8 in every locale")
    assert done.returncode == 2
    assert done.stderr == f"sfumato: '\\udcc3\\udca9': Python reads words as {read_as} here; set PYTHONUTF8=1.\n"


def test_cp_copies_a_program_and_never_over_a_file(tmp_path, capsys):
    target = tmp_path / "mine.py"
    assert cli.main(["cp", "lora", str(target)]) == 0
    assert target.read_bytes() == cli.source("sfumato.trainers.lora").read_bytes()
    target.write_text("mine")
    assert cli.main(["cp", "lora", str(target)]) == 2
    assert target.read_text() == "mine"
    assert "not overwritten" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["torch", "sfumato", "cyclopts"])
def test_a_copy_hides_no_package_that_it_imports(name, tmp_path, capsys):
    assert cli.main(["cp", "lora", str(tmp_path / f"{name}.py")]) == 2
    assert f"would hide the installed package {name}; name another file." in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_copy_hides_no_module_of_pythons(tmp_path, capsys):
    """A program beside one called inspect.py would import it for Python's own."""
    assert cli.main(["cp", "inspect", str(tmp_path / "inspect.py")]) == 2
    assert "would hide Python's own module inspect" in capsys.readouterr().err
    assert cli.main(["cp", "inspect", str(tmp_path)]) == 0
    assert [file.name for file in tmp_path.iterdir()] == ["inspect_file.py"]
    done = subprocess.run([sys.executable, str(tmp_path / "inspect_file.py"), "--help"], capture_output=True)
    assert done.returncode == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["generate", "crab", "--config"], "--config is empty; wanted a TOML file"),
        (["generate", "crab", "--config", ""], "--config is empty; wanted a TOML file"),
        (["generate", "crab", "--config="], "--config is empty; wanted a TOML file"),
        (["train", "lora", "a.toml", "--config", "b.toml"], "--config b.toml: a.toml is the config already; give one"),
        (["grid", "--config=a.toml", "--config=b.toml"], "--config b.toml: a.toml is the config already; give one"),
        (["cp", "lora", ""], "cp lora: the file is empty; wanted a path"),
        (["quickstart", "--output", "/"], "--output /: wanted a new folder for what is made"),
        (["quickstart", "--output", "."], "--output .: wanted a new folder for what is made"),
        (["quickstart", "--output", ".."], "--output ..: wanted a new folder for what is made"),
        (
            ["memory", "--base", "sd3"],
            "Wanted pocket, a diffusers folder, a hub id (owner/name), a .safetensors file, or sd1",
        ),
        (["memory", "--within", "nan"], "--within nan: must be a number above 0"),
        (["memory", "--resolution", "7"], "--resolution 7: this base takes multiples of"),
        (
            ["grid", "--x", "seed=1,2", "--y", "prompt=a", "--seed", "5"],
            "--x varies seed, so that --seed has no effect",
        ),
        (["grid", "--x", "seed=1,2", "--y", "prompt=a", "--prompt", "b"], "--y varies prompt, so that --prompt has no"),
    ],
)
def test_what_would_be_taken_for_something_else_is_named(words, said, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("line-style", "teddy-bear", "flamingo"):
        (tmp_path / "datasets" / folder).mkdir(parents=True)
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


def test_options_of_a_resumed_run_are_not_taken_for_its_folder(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"program": "lora"}')
    (tmp_path / "config.toml").write_text('images = "pictures"')
    assert cli.main(["resume", str(tmp_path), "--output", "elsewhere"]) == 2
    assert "--resume --output" not in capsys.readouterr().err


def test_the_command_of_a_copy_holds_its_name_whole(tmp_path, capsys):
    assert cli.main(["cp", "check", str(tmp_path / "my own.py")]) == 0
    command = capsys.readouterr().out.partition("run it with: ")[2]
    assert shlex.split(command) == ["python", str(tmp_path / "my own.py"), "--help"]


@pytest.mark.parametrize("command", ["resume", "ls", "cp"])
def test_the_short_commands_answer_help_too(command, capsys):
    assert cli.main([command, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"Usage: sfumato {command} ")


def test_ls_names_files_that_exist(capsys):
    from pathlib import Path

    assert cli.main(["ls"]) == 0
    rows = [line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines()]
    assert {name for name, _ in rows} == {*cli.TRAINERS, *cli.PIPELINES}
    assert all(Path(path).is_file() for _, path in rows)


def test_the_commands_that_quickstart_names_hold_folders_with_spaces():
    from pathlib import Path

    from sfumato.pipelines.quickstart import Config, next_commands

    a, b = Path("my runs/style.safetensors"), Path("my runs/subject.safetensors")
    first, second, third = map(shlex.split, next_commands(a, b, Config()))
    assert first[3:7] == ["--lora", str(a), "--lora", str(b)]
    assert str(a) in second
    assert third == ["sfumato", "inspect", str(a)]
    other = Config(base="my base", prediction_type="epsilon")  # without which they would draw with pocket
    for words in map(shlex.split, next_commands(a, b, other)[:2]):
        assert words[words.index("--base") + 1 :][:3] == ["my base", "--prediction-type", "epsilon"]


def test_the_commands_that_quickstart_names_run_where_no_environment_is_active(monkeypatch):
    from pathlib import Path

    from sfumato.pipelines.quickstart import Config, next_commands

    monkeypatch.setattr("sys.argv", ["my clone/.venv/bin/sfumato", "quickstart"])
    for where, called in (("/nowhere", "my clone/.venv/bin/sfumato"), (None, "sfumato")):
        monkeypatch.setattr("shutil.which", lambda name, where=where: None if where else "/bin/sfumato")
        assert {shlex.split(line)[0] for line in next_commands(Path("a"), Path("b"), Config())} == {called}


def test_the_commands_that_quickstart_names_begin_without_quotes_in_a_folder_with_a_space(monkeypatch, tmp_path):
    """PowerShell runs no program that stands in quotes."""
    from pathlib import Path

    from sfumato.pipelines.quickstart import Config, next_commands

    clone = tmp_path / "my clone"
    clone.mkdir()
    monkeypatch.chdir(clone)
    monkeypatch.setattr("sys.argv", [str(clone / ".venv/bin/sfumato"), "quickstart"])
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert all(line.startswith(".venv/bin/sfumato ") for line in next_commands(Path("a"), Path("b"), Config()))


def test_a_torch_that_windows_cannot_load_is_said(capsys):
    said = 'initialization routine failed. Error loading "C:\\c10.dll" or one of its dependencies.'

    def program(_):
        raise OSError(1114, said)

    assert cli.guarded(program, []) == 2
    assert "torch cannot be loaded (" in (line := capsys.readouterr().err)
    assert line.endswith("Redistributable (https://aka.ms/vs/17/release/vc_redist.x64.exe), or torch again.\n")


@pytest.mark.parametrize(
    ("words", "said"), [(["train"], "train wants a trainer: "), (["ls", "foo"], "ls takes nothing")]
)
def test_a_word_too_few_or_too_many_is_one_line(words, said, capsys):
    assert cli.main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="limits are POSIX's")
@pytest.mark.parametrize(("columns", "shown_in"), [("0", 80), ("2", 80), ("40", 40), ("wide", 80)])
def test_help_ends_in_a_terminal_without_a_width(columns, shown_in):
    """A limit of its memory, which it filled."""
    program = (
        "import resource, sys\nfrom sfumato import cli\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 * 2**30,) * 2)\n"
        "sys.argv = ['sfumato', 'generate', '--help']\nsys.exit(cli.main())"
    )
    environment = {**os.environ, "COLUMNS": columns, "PYTHONUTF8": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, env=environment, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stderr[-300:]
    assert max(map(len, done.stdout.decode().splitlines())) == shown_in


def test_help_shows_new_words_as_they_are_spelt(capsys):
    for program, wanted in (("lora", "such as <otter>"), ("textual_inversion", "such as <otter>")):
        with pytest.raises(SystemExit):
            cli.main(["train", program, "--help-all"])
        assert wanted in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_nothing_that_is_told_commands_the_terminal(capsys):
    def program(_):
        warnings.warn("a\x1b[2J\x07 b", stacklevel=1)
        raise ConfigError("赤\u3000é \x1b]0;x\x9b\n\r")

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda *what, **_: sys.stderr.write(warnings.formatwarning(*what))
        assert cli.guarded(program, []) == 2
    said = "sfumato: a\\x1b[2J\\x07 b\nsfumato: 赤\u3000é \\x1b]0;x\\x9b\\n\\r\n"
    assert capsys.readouterr().err == said
    say("a\nb\x1b")
    assert capsys.readouterr().err == "a\nb\\x1b\n"


def test_a_run_whose_file_is_nested_without_end_is_none(tmp_path, capsys):
    (tmp_path / "run.json").write_text("[" * 5000)
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "holds no run to resume" in capsys.readouterr().err


def test_who_resumes_what_is_no_run_is_told_the_runs_near_it(tmp_path, capsys):
    for name in ("b", "a"):
        (tmp_path / "my runs" / name / "checkpoints").mkdir(parents=True)
        (tmp_path / "my runs" / name / "run.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    for named, said in {
        "my runs": "there are a, b in it; name one.",
        "my runs/a/checkpoints": f'{tmp_path}/my runs/a does: sfumato resume "{tmp_path}/my runs/a"',
        "empty": "holds no run to resume; name the folder that --output named.",
        "gone": "there is no such folder; name the one that --output named.",
    }.items():
        assert cli.main(["resume", str(tmp_path / named)]) == 2
        assert capsys.readouterr().err.endswith(f"{said}\n")


@pytest.mark.parametrize("copy", ["3", "[1]", "true"])
def test_a_run_whose_copy_is_no_text_is_one_line(copy, tmp_path, capsys):
    (tmp_path / "run.json").write_text(f'{{"program": "lora", "copy": {copy}}}')
    assert cli.main(["resume", str(tmp_path)]) == 2
    assert "config.toml is gone" in capsys.readouterr().err


def test_who_resumes_a_run_without_its_config_is_told_to_give_its_options(tmp_path, capsys):
    (tmp_path / "run.json").write_text('{"program": "slider"}')
    assert cli.main(["resume", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"sfumato: {tmp_path}/config.toml is gone, and with it the options of the run.")
    assert said.endswith(f"sfumato train slider [OPTIONS] --output {tmp_path} --resume --force\n")


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "a = " + "9" * 5000])
def test_toml_that_cannot_be_held_is_one_line(tmp_path, text):
    (tmp_path / "a.toml").write_text(text)
    with pytest.raises(ConfigError, match="not readable as TOML"):
        read_toml(tmp_path / "a.toml")


@pytest.mark.parametrize("interactive", [True, False])
def test_a_session_that_goes_on_keeps_its_ctrl_c(interactive, monkeypatch):
    """IPython's %run of a trainer ends the program and not the process."""
    import gc

    monkeypatch.setattr(sys, "argv", ["lora.py"])
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)
    if not interactive:
        monkeypatch.delattr(sys, "ps1")
    thresholds = gc.get_threshold()
    numbers = [signal.SIGINT, *cli._TERMINATIONS]
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert cli._as_process(lambda _: 0) == 0
        assert (signal.getsignal(signal.SIGINT) == signal.default_int_handler) is interactive
        assert (gc.get_threshold() == thresholds) is interactive
    finally:
        gc.set_threshold(*thresholds)
        for number, handler in before.items():
            signal.signal(number, handler)
