"""A file with another tool's training -> its settings: a config of one of them, or a command in a script."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

from sfumato.data.foreign.settings import read_whole, without_empty
from sfumato.errors import ConfigError
from sfumato.recipes import ai_toolkit, kohya_ss
from sfumato.recipes.asked import Asked
from sfumato.recipes.scripts import UNSET, commands
from sfumato.text_files import decode

SD_SCRIPTS = (
    "train_network.py", "sdxl_train_network.py", "train_db.py", "fine_tune.py", "sdxl_train.py",
    "train_textual_inversion.py", "sdxl_train_textual_inversion.py",
)  # fmt: skip
DIFFUSERS = (
    "train_text_to_image.py", "train_text_to_image_sdxl.py", "train_text_to_image_lora.py",
    "train_text_to_image_lora_sdxl.py", "train_dreambooth.py", "train_dreambooth_lora.py",
    "train_dreambooth_lora_sdxl.py", "textual_inversion.py", "textual_inversion_sdxl.py",
)  # fmt: skip
SCRIPTS = (*SD_SCRIPTS, *DIFFUSERS)
ONETRAINER = "OneTrainer"
AI_TOOLKIT = "ai-toolkit"
SIMPLETUNER = "SimpleTuner"
_ENDS = (".toml", ".sh", ".bat", ".ps1", ".txt", ".command", "")


def read(path: Path) -> Asked:
    """The training that a file asks for. Raises ConfigError for a file that asks for none that is known."""
    ending = path.suffix.lower()
    if ending in (".json", ".yaml", ".yml"):
        return _of_values(path, read_whole(path))
    if ending not in _ENDS:
        raise ConfigError(
            f"{path.name}: wanted a .toml of sd-scripts, a .yaml of ai-toolkit, a .json of OneTrainer or SimpleTuner, "
            "or a .sh, .bat or .txt with a command."
        )
    text = text_of(path)
    return _of_config(path, text) if ending == ".toml" else _of_command(path, text)


def text_of(path: Path) -> str:
    """The text of a file. Raises ConfigError for one that is not readable as text."""
    try:
        return decode(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). Name another file.") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not readable as text (not UTF-8). Save it as UTF-8.") from None


def _of_values(path: Path, values: Any) -> Asked:
    """A config of OneTrainer, ai-toolkit, SimpleTuner or kohya_ss, by what is in it."""
    config = values.get("config") if isinstance(values, dict) else None
    if isinstance(config, dict) and isinstance(config.get("process"), list):
        return _of_ai_toolkit(path, without_empty(config))
    plain = _plain(values) if isinstance(values, dict) else {}
    if "model_family" in plain:
        return Asked(path.name, SIMPLETUNER, plain, path.resolve().parent)
    if kohya_ss.is_saved(plain):
        return _of_kohya_ss(path, plain)
    if not {"training_method", "base_model_name"} & plain.keys():
        raise ConfigError(
            f"{path.name}: neither config.process of ai-toolkit, model_family of SimpleTuner, training_method of "
            "OneTrainer nor what kohya_ss saves is in it. Name the config of a training."
        )
    return Asked(path.name, ONETRAINER, values, path.resolve().parent)


def _of_kohya_ss(path: Path, values: dict[str, Any]) -> Asked:
    """What one of its windows saves, with the options that it adds to the command."""
    script, settings = kohya_ss.settings(values, path.name)
    more = str(values.get("additional_parameters") or "")
    try:
        settings |= _options(shlex.split(more))
    except ValueError as error:
        raise ConfigError(f"{path.name}: additional_parameters {more!r:.60}: {error}.") from None
    return Asked(path.name, script, settings, path.resolve().parent)


def _plain(values: dict[str, Any]) -> dict[str, Any]:
    """The settings without the dashes of a command, with which older configs of SimpleTuner name them."""
    return {str(key).lstrip("-").replace("-", "_"): value for key, value in values.items()}


def _of_ai_toolkit(path: Path, config: dict[str, Any]) -> Asked:
    """The first of its processes that trains, with the name of the whole, which [name] stands for."""
    processes = [each for each in config["process"] if isinstance(each, dict)]
    trainings = [each for each in processes if each.get("type") in ai_toolkit.KINDS]
    if not trainings:
        kinds = ", ".join(str(each.get("type")) for each in processes)
        raise ConfigError(
            f"{path.name}: its process is {kinds or 'none'}, which has no counterpart; wanted one of "
            f"{', '.join(sorted(ai_toolkit.KINDS))}."
        )
    name = str(config.get("name", ""))
    values = _with_name({"name": name, **trainings[0]}, name)
    asked = Asked(path.name, AI_TOOLKIT, values, path.resolve().parent)
    if len(processes) > 1:
        asked.notes.append(f"{path.name}: the first training of its {len(processes)} processes")
    return asked


def _with_name(values: Any, name: str) -> Any:
    if isinstance(values, dict):
        return {key: _with_name(value, name) for key, value in values.items()}
    if isinstance(values, list):
        return [_with_name(value, name) for value in values]
    return values.replace("[name]", name) if isinstance(values, str) else values


def _of_config(path: Path, text: str) -> Asked:
    """sd-scripts' --config_file: its sections mean nothing."""
    try:
        values: dict[str, Any] = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path.name}: not readable as TOML ({' '.join(str(error).split())}); mend it.") from None
    if "model_family" in _plain(values):
        return Asked(path.name, SIMPLETUNER, _plain(values), path.resolve().parent)
    if "datasets" in values:
        raise ConfigError(
            f"{path.name}: a config of data sets; `sfumato dataset` converts it. Name that of the training."
        )
    flat = {key: value for key, value in values.items() if not isinstance(value, dict)}
    for section in values.values():
        flat |= section if isinstance(section, dict) else {}
    if "pretrained_model_name_or_path" not in flat:
        raise ConfigError(
            f"{path.name}: no pretrained_model_name_or_path in it, so it is no training of sd-scripts. Name its "
            "--config_file, or a script with its command."
        )
    return Asked(path.name, _script_of(flat), flat, path.resolve().parent)


def _script_of(settings: dict[str, Any]) -> str:
    """The script of sd-scripts whose settings these are."""
    is_sdxl = bool(settings.get("sdxl") or {"learning_rate_te1", "learning_rate_te2", "block_lr"} & settings.keys())
    if "token_string" in settings:
        script = "train_textual_inversion.py"
    elif {"network_module", "network_dim"} & settings.keys():
        script = "train_network.py"
    elif is_sdxl:
        return "sdxl_train.py"
    else:
        return "fine_tune.py" if "in_json" in settings else "train_db.py"
    return f"sdxl_{script}" if settings.get("sdxl") else script


def _of_command(path: Path, text: str) -> Asked:
    """The first command that runs one of the scripts."""
    runs = [words for words in commands(text, path.suffix.lower()) if _place(words) is not None]
    if not runs:
        raise ConfigError(f"{path.name}: no command in it that is known; wanted one that runs {', '.join(SCRIPTS)}.")
    words, called = runs[0], _place(runs[0]) or 0
    if unset := re.search(f"{UNSET}(.+?){UNSET}", " ".join(words)):
        raise ConfigError(
            f"{path.name}: {unset[1]} of its command has no value that can be read without running the file; write the "
            "value in its place."
        )
    asked = Asked(path.name, _script(words[called]), _options(words[called + 1 :]), path.resolve().parent)
    if given := asked.text("config_file"):
        whole = _in_config(asked, given)
        asked = Asked(path.name, asked.script, {**whole.values, **asked.values, "config_file": None}, whole.folder)
    elif "mixed_precision" not in asked.values:  # which may be told to accelerate
        asked.values.update({k: v for k, v in _options(words[:called]).items() if k == "mixed_precision"})
    if len(runs) > 1:
        asked.notes.append(f"{path.name}: the first of its {len(runs)} trainings; the others need files of their own")
    return asked


def _in_config(asked: Asked, given: str) -> Asked:
    config = asked.find(f"{given.removesuffix('.toml')}.toml")
    if config is None:
        raise ConfigError(f"{asked.name}: its --config_file {given} is neither beside it nor in this folder.")
    return _of_config(config, text_of(config))


def _script(word: str) -> str:
    return re.split(r"[\\/]", word)[-1]


def _place(words: list[str]) -> int | None:
    """Where the script stands in a command that runs one; None of another, such as one that downloads it."""
    place = next((place for place, word in enumerate(words) if _script(word) in SCRIPTS), None)
    return place if place is not None and _options(words[place + 1 :]) else None


def _options(words: list[str]) -> dict[str, Any]:
    """--name value, --name=value, --name value value, and --name alone, which is True."""
    found: dict[str, Any] = {}
    name = ""
    for word in words:
        if re.match(r"--?[a-zA-Z]", word):
            name, equals, value = word.lstrip("-").partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif name:
            before = found[name]
            found[name] = word if before is True else [*(before if isinstance(before, list) else [before]), word]
    return found
