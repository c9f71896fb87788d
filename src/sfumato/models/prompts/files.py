"""Files of prompts: a text with one on each line, or what sd-scripts (.toml, .json) and SimpleTuner (.json) keep theirs
in. Imports no torch."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfumato.config import expand_home
from sfumato.errors import ConfigError
from sfumato.utils.text_files import decode_text

_ENDS = (".txt", ".toml", ".json")
_LETTERS = {"negative_prompt": "n", "width": "w", "height": "h", "seed": "d", "sample_steps": "s", "scale": "l"}
"""What sd-scripts calls a prompt's settings in its .toml and .json (train_util.py, load_prompts) -> in a line."""


def expand_prompt_files(prompts: Sequence[str], option: str) -> tuple[str, ...]:
    """The prompts, those of a file in the place of its name: a text that ends as such files do.

    Raises ConfigError for a file that is not there or holds no prompts, and for one that names another.
    """
    found: list[str] = []
    for prompt in prompts:
        if not prompt.lower().endswith(_ENDS):
            found.append(prompt)
            continue
        within = read_prompts(Path(expand_home(prompt)), option)
        # Prompts are kept as they are read, and would be taken for files where a run goes on.
        if names := [each for each in within if each.lower().endswith(_ENDS)]:
            raise ConfigError(f"{option} {prompt}: {names[0]!r:.60} in it names a file; wanted a prompt.")
        found += within
    return tuple(found)


def read_prompts(file: Path, option: str) -> list[str]:
    """The prompts of a file, each with its settings as sd-scripts writes them in a line: `a crab --n blurry --w 512`.

    A .toml has its prompts in [[prompt.subset]], with what they share in [prompt]; a .json is a list of texts or of
    objects, or an object of these by name. Any other file has one on each line, and comments that begin with #.
    option: what names the file. Raises ConfigError, one line, where it cannot be read or holds no prompt.
    """
    where = f"{option} {file}"
    try:
        text = decode_text(file.read_bytes())
    except FileNotFoundError:
        raise ConfigError(f"{where}: there is no such file; name one with prompts, or give a prompt.") from None
    except (OSError, ValueError) as error:  # UnicodeDecodeError, and of a name that no file can have
        reason = getattr(error, "strerror", None) or "not UTF-8"
        raise ConfigError(f"{where}: not readable as text ({reason}); wanted UTF-8, a prompt a line.") from None
    ending = file.suffix.lower()
    if ending == ".toml":
        found = [_line(each, where) for each in _subsets(text, where)]
    elif ending == ".json":
        found = [_line(each, where) for each in _values(text, where)]
    else:
        lines = (line.strip() for line in text.split("\n"))
        found = [line for line in lines if line and not line.startswith("#")]
    if not found:
        raise ConfigError(f"{where}: there is no prompt in it; write one on each line, or leave it out.")
    return found


def _subsets(text: str, where: str) -> list[Any]:
    """The prompts of a .toml, each with what [prompt] says of all."""
    try:
        prompt = tomllib.loads(text).get("prompt")
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as TOML ({' '.join(str(error).split())}); mend it.") from None
    shared: dict[str, Any] = prompt if isinstance(prompt, dict) else {}
    subsets = shared.get("subset")
    if not isinstance(subsets, list):
        raise ConfigError(
            f"{where}: no [[prompt.subset]] in it, each with its prompt, as sd-scripts has them; add some."
        )
    of_all = {key: value for key, value in shared.items() if key != "subset"}
    return [{**of_all, **each} if isinstance(each, dict) else each for each in subsets]


def _values(text: str, where: str) -> list[Any]:
    """The prompts of a .json."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not readable as JSON ({' '.join(str(error).split())}); mend it.") from None
    if not isinstance(found, dict | list):
        raise ConfigError(f"{where}: neither a list of prompts nor prompts by name; write one of these.")
    return list(found.values()) if isinstance(found, dict) else found


def _line(value: Any, where: str) -> str:
    """A prompt and its settings in one line."""
    settings: Mapping[str, Any] = value if isinstance(value, dict) else {"prompt": value}
    prompt = settings.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ConfigError(f"{where}: {value!r:.60} has no prompt; write one, or leave it out.")
    told = [prompt.strip()]
    for key, setting in settings.items():
        if key == "prompt" or setting in (None, ""):
            continue
        if key not in _LETTERS:
            raise ConfigError(f"{where}: {key} of {prompt!r:.60} is not read there; {', '.join(_LETTERS)} are.")
        told.append(f"--{_LETTERS[key]} {setting}")
    return " ".join(told)
