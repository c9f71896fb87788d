"""A frozen dataclass <-> a TOML file <-> the command line.

The text under a field is its `--help`. Options given on the command line win over the file, the file wins over the
defaults. Parsing is cyclopts'; this module adds the file, the one-line errors and the way back to TOML.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import itertools
import json
import os
import re
import sys
import typing
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Number
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

from sfumato.errors import ConfigError, did_you_mean
from sfumato.utils import option_groups
from sfumato.utils.formatting import option_flag, quote_argument, truncate_text
from sfumato.utils.option_names import suggest_option, suggest_value
from sfumato.utils.text_files import check_toml_path, read_toml

if TYPE_CHECKING:
    import cyclopts
    from _typeshed import DataclassInstance

Config = TypeVar("Config", bound="DataclassInstance")


EITHER = ("steps", "epochs")
"""Options that say the same: one on the command line is in place of either in a file."""


def parse(config_type: type[Config], argv: Sequence[str], *, program: str, first_may_be_config: bool = True) -> Config:
    """The config that `argv` asks for: options, or a TOML file as first argument or after `--config`, or both.

    program: the words after `sfumato`; or a module, told by the dot in its name, which is run by `python -m`.
    first_may_be_config: not where a first argument that ends in .toml is a data set.
    `--help` prints the fields that most need, `--help-all` all of them; both raise SystemExit(0). Raises ConfigError,
    one line, for anything that does not fit.
    """
    import cyclopts

    is_full = "--help-all" in argv
    argv = ["--help"] if is_full else argv
    file, rest = split_off_file(list(argv), first_may_be_config=first_may_be_config)
    file = _shipped_instead(file)
    called = f"python -m {program}" if "." in program else f"sfumato {program}"
    _refuse_config_of_others(config_type, str(file) if file else rest[0] if rest else "")
    in_file = {} if file is None else _read(config_type, file)
    for one, other in (EITHER, EITHER[::-1]):
        if any(word.partition("=")[0] == f"--{one}" for word in rest):
            in_file.pop(other, None)
    _refuse_fractions(config_type, rest, called)
    _refuse_empty_paths(config_type, rest, called)
    app = _app(config_type, called, in_file, first_may_be_config=first_may_be_config, is_full=is_full)
    try:
        config = app(rest, exit_on_error=False, print_error=False)
    except cyclopts.CycloptsError as error:
        known = [field.name for field in dataclasses.fields(config_type)]
        raise ConfigError(f"{_parse_error_message(error, file, known, rest)} See {called} --help.") from None
    if config is None:
        raise SystemExit(0)
    return _expand_paths(cast(Config, config))


def _refuse_config_of_others(config_type: type[DataclassInstance], first: str) -> None:
    is_trainer = "learning_rate" in {field.name for field in dataclasses.fields(config_type)}
    if is_trainer and not first.startswith("--") and first.lower().endswith((".yaml", ".yml", ".json")):
        raise ConfigError(
            f"{first}: a config is a .toml here; sfumato recipe {quote_argument(first)} -o mine.toml "
            f"converts a training "
            "of another tool."
        )


def _app(
    config_type: type[DataclassInstance],
    called: str,
    in_file: dict[str, Any],
    *,
    first_may_be_config: bool,
    is_full: bool = False,
) -> cyclopts.App:
    """What reads options into the config. in_file: the values that a TOML file gives. is_full: whether `--help` shows
    all options."""
    import cyclopts

    program = called.removeprefix("sfumato ")
    names = [field.name for field in dataclasses.fields(config_type)]
    panels = panels_of(config_type, program)
    places = {name: place for place, name in enumerate(panels)}
    titles = list(dict.fromkeys(panels.values()))
    shown = names if is_full else option_groups.shown(program, names)
    positional = [field.name for field in dataclasses.fields(config_type) if not field.kw_only]

    class App(cyclopts.App):
        """With `--help` in panels."""

        def assemble_argument_collection(self, **options: Any) -> cyclopts.ArgumentCollection:
            arguments = super().assemble_argument_collection(**options)
            for argument in arguments:
                name = argument.name.removeprefix("--").replace("-", "_")
                if name in positional:  # cyclopts takes those for such alone that come before all inherited options
                    argument.index = positional.index(name)
                more = cyclopts.Parameter(show_default=False) if argument.field_info.default == () else None
                if title := panels.get(name):
                    group = cyclopts.Group(title, sort_key=titles.index(title))
                    more = cyclopts.Parameter.combine(more, cyclopts.Parameter(group=group))
                if name in names and name not in shown:
                    more = cyclopts.Parameter.combine(more, cyclopts.Parameter(show=False))
                argument.parameter = cyclopts.Parameter.combine(argument.parameter, more)
                if _KINDS_OF_ADAPTER in (text := argument.parameter.help or ""):
                    filled = cyclopts.Parameter(help=text.replace(_KINDS_OF_ADAPTER, _about_kinds()))
                    argument.parameter = cyclopts.Parameter.combine(argument.parameter, filled)
            if options:  # for --help, in the order of the panels
                last = len(places)
                arguments.sort(key=lambda each: places.get(each.name.removeprefix("--").replace("-", "_"), last))
            return arguments

    app = App(
        name=called,
        help=config_type.__doc__,
        help_format="markdown",
        help_epilogue=_epilogue(program, is_short=len(shown) < len(names)),
        version_flags=[],
        default_parameter=cyclopts.Parameter(negative_iterable=()),
        result_action="return_value",
        usage=f"Usage: {called} {'[CONFIG.toml]' if first_may_be_config else '[--config CONFIG.toml]'} [OPTIONS]",
        config=[cyclopts.config.Dict(in_file, use_commands_as_keys=False)] if in_file else [],
    )

    app["--help"].show = False  # whoever reads it has found it

    def entry(config: Any) -> Any:
        return config

    # The type is a value here, which an annotation in the source could not name.
    entry.__annotations__ = {"config": Annotated[config_type, cyclopts.Parameter(name="*")]}
    if all(_has_default(field) for field in dataclasses.fields(config_type)):
        entry.__defaults__ = (config_type(),)  # cyclopts asks for it where no field is required
    app.default(entry)
    return app


_KINDS_OF_ADAPTER = "{kinds}"
"""In an option's text: what there is to say of each kind of adapter that is trained."""


def _about_kinds() -> str:
    from sfumato.files.keys import trained_kinds

    return " ".join(f"{algo}: {kind.about}." for algo, kind in trained_kinds().items())


def panels_of(config_type: type[DataclassInstance], program: str) -> dict[str, str]:
    """Field -> the heading under which `--help` has it, in order: by the tables of `option_groups`; where these lack
    the program, what must be given, the program's own, and the groups of options that it inherits, each under its
    docstring. Empty where nothing is inherited."""
    fields = {field.name: field for field in dataclasses.fields(config_type)}
    if found := option_groups.grouped(program, list(fields)):
        return {name: title for title, names in found.items() for name in names}
    groups = [group for group in config_type.__mro__[:-1] if dataclasses.is_dataclass(group)]
    own: dict[type, list[str]] = {}
    for group in reversed(groups):  # an inherited field is that of the first that has it
        known = {name for names in own.values() for name in names}
        own[group] = [field.name for field in dataclasses.fields(group) if field.name not in known]
    if sum(map(bool, own.values())) < 2:
        return {}
    panels = {name: "Needed" for name, field in fields.items() if not _has_default(field)}
    for group in groups:
        names = own[group]
        title = f"Of {program.split()[-1]}" if group is config_type else (group.__doc__ or "").partition("\n")[0]
        panels |= {name: title.rstrip(".") for name in names if name not in panels}
    return panels


@dataclass(frozen=True)
class Described:
    """An option for its page. name: as it is typed. group: its heading. kind: what it takes."""

    name: str
    group: str
    kind: str
    default: Any
    text: str


def described(config_type: type[DataclassInstance], program: str) -> list[Described]:
    """The options of a program with the texts of `--help-all`, in its order."""
    app = _app(config_type, f"sfumato {program}", {}, first_may_be_config=True, is_full=True)
    panels = panels_of(config_type, program)
    hints, fields = _hints(config_type), {field.name: field for field in dataclasses.fields(config_type)}
    found = []
    for argument in app.assemble_argument_collection(parse_docstring=True):
        name = argument.name.removeprefix("--").replace("-", "_")
        if (field := fields.get(name)) is None:  # the config itself
            continue
        default = None if field.default is dataclasses.MISSING else _plain(field.default)
        kind = ("" if _has_default(field) else "required, ") + _named(hints[name])
        found.append(
            Described(argument.name, panels.get(name, "Options"), kind, default, argument.parameter.help or "")
        )
    return found


def _named(hint: Any) -> str:
    """What a field takes, for people."""
    inner = [each for each in typing.get_args(hint) if each not in (type(None), ...)]
    origin = typing.get_origin(hint)
    if origin is Literal:
        return " or ".join(map(str, inner))
    if origin is tuple:
        return f"{_named(inner[0])}, several"
    if inner:
        return _named(inner[0])
    return {bool: "flag", int: "whole number", float: "number", str: "text", Path: "path"}.get(hint, str(hint))


def _epilogue(program: str, *, is_short: bool) -> str | None:
    """What a help ends with; nothing for a program of another's."""
    if program.startswith("python "):
        return None
    page = f"{option_groups.DOCS}/{option_groups.page(program)}"
    return f"All options: sfumato {program} --help-all, or {page}" if is_short else f"As a page: {page}"


_WANTED: Mapping[type | None, str] = {int: "a whole number", float: "a number", bool: "true or false"}
"""What an option of this type takes, for a value that is none."""


def _parse_error_message(
    error: cyclopts.CycloptsError, file: Path | None, known: Collection[str], words: Sequence[str]
) -> str:
    """What cyclopts found wrong in the words, as sentences. file: the TOML file that was read, if one was. known: the
    options."""
    import cyclopts

    if file is None and words and "learning_rate" in known and _shipped(f"{words[0]}.toml"):
        return f"{words[0]}: the config's name ends in .toml; write {words[0]}.toml."
    if isinstance(error, cyclopts.UnknownOptionError) and error.token is not None:
        option = (error.token.keyword or error.token.value).partition("=")[0]
        if here := suggest_option(option.lstrip("-"), known):
            return f"Unknown option: {option}. {here}"
    if isinstance(error, cyclopts.CoercionError) and error.token and error.argument:
        option, value = error.argument.name, error.token.value
        if here := suggest_value(option.lstrip("-"), value):
            return f"{option} {value}: {here}"
        if error.token.source == "cli" and (wanted := _WANTED.get(error.target_type)):
            return f"{option} {quote_argument(' '.join(value.split()))}: wanted {wanted}."
    for flag, after in itertools.pairwise(words):
        if flag == "--resume" and not after.startswith("-") and after in (error.unused_tokens or ()):
            return f"--resume {after}: it is the run in --output that goes on; sfumato resume {after} needs no option."
    if isinstance(error, cyclopts.UnusedCliTokensError):
        left = " ".join(map(repr, error.unused_tokens or ()))
        if any(Path(word).exists() for word in error.unused_tokens or ()):
            return f"{left}: more files than are taken at once. Name fewer, and run it again for the others."
        prompt = "A prompt is given by --prompt. " if "prompt" in known else ""
        return f"{left}: belongs to no option. {prompt}Put a name with spaces into quotes."
    if isinstance(error, cyclopts.MissingArgumentError):
        return _missing(error, known)
    return " ".join(str(error).split()).replace(" from dict:", f" from {file}:")


def _missing(error: cyclopts.MissingArgumentError, known: Collection[str]) -> str:
    """The complaint of an option that has no value or is not there, perhaps because it is misspelt."""
    name = error.argument.name if error.argument is not None else "an option"
    if error.keyword is not None:
        return f"{name} wants a value."
    unused = error.unused_tokens or ()
    options = [word.partition("=")[0] for word in unused if word.startswith("--")]
    unknown = [f"{option} is no option" for option in options] or [f"{word!r} belongs to no option" for word in unused]
    here = suggest_option(options[0].lstrip("-"), known) if options else None
    return f"{name} is needed{f', and {unknown[0]}' if unknown else ''}.{f' {here}' if here else ''}"


def expand_home(text: str) -> str:
    """The text with the home folder for the ~ that a path in it begins with, also after LABEL=.

    A shell leaves it in `--images=~/dogs`, in quotes and after LABEL=, and nothing else reads it in a TOML file.
    """
    return re.sub(r"(^|(?<==))~(?=[\\/]|$)", lambda _: os.path.expanduser("~"), text)


def _expand_paths(config: Config) -> Config:
    def expanded(value: Any) -> Any:
        return tuple(map(expanded, value)) if isinstance(value, tuple) else Path(expand_home(str(value)))

    paths = {name: getattr(config, name) for name in _fields_of(type(config), Path)}
    return dataclasses.replace(config, **{name: expanded(value) for name, value in paths.items() if value})


def _refuse_fractions(config_type: type[DataclassInstance], words: Sequence[str], called: str) -> None:
    """Whole numbers with a fraction are an error: the parser would round `--steps 1.5` and say nothing."""
    whole = {option_flag(name) for name in _fields_of(config_type, int)}
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") in whole:
            value = value if equals else (words[place + 1] if place + 1 < len(words) else "")
            if re.fullmatch(r"[+-]?\d*\.\d*(e[+-]?\d+)?", value, re.IGNORECASE):
                raise ConfigError(f"{option} {value}: wanted a whole number. See {called} --help.")


def _refuse_empty_paths(config_type: type[DataclassInstance], words: Sequence[str], called: str) -> None:
    """A path of no letters is an error, such as `--images "$UNSET"`: it would be the present folder."""
    names = _fields_of(config_type, Path)
    paths = {option_flag(name) for name in names} | ({"-o"} if "output" in names else set())
    first = option_flag(dataclasses.fields(config_type)[0].name)  # also given without its name
    words = [first, *words] if words[:1] == [""] else words
    for place, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option.replace("_", "-") in paths and not value and (equals or words[place + 1 : place + 2] == [""]):
            raise ConfigError(f"{option} is empty; wanted a path, where . is the present folder. See {called} --help.")


@dataclass(frozen=True)
class TypedConfig:
    """A config that has the types of its fields, however it was made: see `settle`."""

    def __post_init__(self) -> None:
        coerce_fields(self)


def coerce_fields(config: DataclassInstance) -> None:
    """Give a config that was made in Python the types that its fields declare: a text for a path is one, a path for a
    text is its text, and one text or number for several is one of these. Raises ConfigError for what is of another
    type."""
    paths, texts = _fields_of(type(config), Path), _fields_of(type(config), str)
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        kind = Path if field.name in paths else str if field.name in texts else None
        hint = _hints(type(config))[field.name]
        several = any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))
        if several and isinstance(value, str | Path | Number):
            value = (value,)
        if several and isinstance(value, list | tuple | range):
            value = tuple(_coerce(each, kind) for each in value)
        else:
            value = _coerce(value, kind)
        object.__setattr__(config, field.name, value)
        _check_type(config, field.name, value)


def _coerce(value: Any, kind: type[Path] | type[str] | None) -> Any:
    if kind and isinstance(value, str | Path):
        return kind(value)
    is_other_number = hasattr(value, "dtype") and getattr(value, "ndim", 1) == 0  # numpy's or torch's
    return value.item() if is_other_number else value


def _check_type(config: DataclassInstance, name: str, value: Any) -> None:
    """Raises ConfigError for a value of another type than its field's, as a TOML file with it would be refused."""
    hint = _hints(type(config))[name]
    if value is None and type(None) in typing.get_args(hint):
        return
    several = isinstance(value, tuple)
    plain = [_plain(each) for each in value] if several else _plain(value)
    wanted = _wanted(hint, plain)
    if not wanted and _is_of(hint, str) and not all(isinstance(each, str) for each in (value if several else [value])):
        wanted = "a text"
    if wanted:
        raise ConfigError(f"{name} is {value!r:.60}; wanted {wanted.removesuffix(', without quotes')}.")


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


@cache
def _hints(config_type: type[DataclassInstance]) -> Mapping[str, Any]:
    """The type of each field; once, since the annotations are texts that are compiled one by one."""
    return typing.get_type_hints(config_type)


def _fields_of(config_type: type[DataclassInstance], kind: type) -> set[str]:
    """The fields that are of this kind, set or unset, one or several."""
    hints = _hints(config_type)
    return {field.name for field in dataclasses.fields(config_type) if _is_of(hints[field.name], kind)}


def _is_of(hint: Any, kind: type) -> bool:
    inner = [each for each in typing.get_args(hint) if each not in (type(None), ...)]
    return hint is kind or (bool(inner) and all(_is_of(each, kind) for each in inner))


def _has_default(field: dataclasses.Field[Any]) -> bool:
    return field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING


def split_off_file(argv: list[str], *, first_may_be_config: bool) -> tuple[Path | None, list[str]]:
    """The TOML file among the arguments, if there is one, and the other arguments."""
    first = first_may_be_config and argv and argv[0].lower().endswith(".toml") and not argv[0].startswith("--")
    file, left = (argv[0], argv[1:]) if first else (None, argv)
    others: list[str] = []
    words = iter(left)
    for word in words:
        option, equals, value = word.partition("=")
        if option != "--config":
            others.append(word)
            continue
        given = value if equals else next(words, "")
        if not given:
            raise ConfigError("--config is empty; wanted a TOML file with options.")
        if file is not None:
            raise ConfigError(f"--config {given}: {file} is the config already; give one.")
        file = given
    return None if file is None else Path(expand_home(file)), others


def _read(config_type: type[DataclassInstance], path: Path) -> dict[str, Any]:
    try:
        values = read_toml(path)
    except FileNotFoundError:
        shipped = _shipped(path.name)
        near = difflib.get_close_matches(path.stem, [each.stem for each in _shipped_configs()], n=1)
        advice = f"did you mean {near[0]}.toml?" if near else "name an existing one, or give options alone."
        advice = f"sfumato's own is {shipped}." if shipped else advice
        raise ConfigError(f"{path}: there is no such config file; {advice}") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}). See to its permissions.") from None
    known = [field.name for field in dataclasses.fields(config_type)]
    if "source" in values and "source" not in known and "images" in known:
        raise ConfigError(f"{path}: this is a dataset.toml; pass it with --images.")
    in_sections = {key for value in values.values() if isinstance(value, dict) for key in value}
    base = "pretrained_model_name_or_path"
    if "learning_rate" in known and (base in in_sections or {base, "output_dir"} <= in_sections | values.keys()):
        raise ConfigError(
            f"{path}: a training of sd-scripts; sfumato recipe {quote_argument(str(path))} -o mine.toml converts it."
        )
    hints, paths = _hints(config_type), _fields_of(config_type, Path)
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = key.replace("-", "_")
        if name not in known:
            raise ConfigError(f"{path}: {_unknown(key, value, known)}")
        if name.replace("_", "-") in found:
            raise ConfigError(f"{path}: {name} is there twice, with - and with _; keep one.")
        if wanted := _wanted(hints[name], value):
            is_date = not isinstance(value, str | float | int | list | dict)
            shown = str(value) if is_date else json.dumps(value, default=str, ensure_ascii=False)
            here = suggest_value(name, value) if isinstance(value, str) else None
            raise ConfigError(f"{path}: {key} is {truncate_text(shown)}; {here or f'wanted {wanted}.'}")
        for text in (value if isinstance(value, list) else [value]) if name in paths or name == "base" else []:
            if text == "" and name in paths:
                raise ConfigError(f"{path}: {key} is empty; wanted a path, where . is the present folder.")
            check_toml_path(str(text), f"{path}: {key} ")
        found[name.replace("_", "-")] = value
    return found


def _unknown(key: str, value: Any, known: Sequence[str]) -> str:
    """The complaint of a key of a TOML file that is no option."""
    if isinstance(value, dict):
        return f"[{key}] is a table; wanted the options by themselves, such as {known[0]} = ..."
    name = key.replace("-", "_")
    here = suggest_option(name, known)
    return f"unknown key {key!r}; {here[0].lower() + here[1:] if here else did_you_mean(name, known)}"


_KINDS: Mapping[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str, int, float), "a text"),  # of some options the text may be a number, such as size = 512
    Path: ((str,), "a path"),
}
"""By the type of a field, what of TOML it takes, and how that is called."""


def _wanted(hint: Any, value: Any) -> str | None:
    """What a value of a TOML file is to be for a field of this type; None where it is that, or cyclopts' to judge.

    Nothing is read as what it may have meant, as the words of a command line are: "1e-4" in quotes is no number.
    """
    origin, inner = typing.get_origin(hint), [each for each in typing.get_args(hint) if each is not type(None)]
    if origin is Literal:
        return None if value in inner else f"one of {', '.join(map(json.dumps, inner))}"
    if origin in (typing.Union, UnionType):
        each = [_wanted(one, value) for one in inner]
        return None if None in each else " or ".join(filter(None, each))
    if origin is tuple and inner[1:] == [...]:  # one alone stands for a list of one
        wrong = [_wanted(inner[0], one) for one in (value if isinstance(value, list) else [value])]
        return next((f"a list of which each is {what}" for what in wrong if what), None)
    kinds, name = _KINDS.get(hint, ((object,), ""))
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    return None if fits else f"{name}, without quotes" if isinstance(value, str) else name


def _shipped_instead(file: Path | None) -> Path | None:
    """The file, or sfumato's own config where the README's path to it, or its bare name, leads nowhere; that is said,
    because what counts is then in another folder."""
    if file is None or file.exists() or str(file.parent.as_posix()) not in (".", "trainers/configs"):
        return file
    if not (shipped := _shipped(file.name)):
        return file
    print(f"config  {shipped}", file=sys.stderr)
    return shipped


def _shipped(name: str) -> Path | None:
    """The config of this name that comes with the trainers, which another folder than the clone's has no path to."""
    return next((path for path in _shipped_configs() if path.name == name), None)


def _shipped_configs() -> list[Path]:
    """Those that come with the trainers."""
    trainers = importlib.util.find_spec("sfumato.trainers")
    places = (trainers and trainers.submodule_search_locations) or ()
    return sorted(path for place in places for path in Path(place).glob("configs/*.toml"))


def to_dict(config: DataclassInstance, *, public: bool = False) -> dict[str, Any]:
    """The fields that are set, as TOML and JSON know them.

    public: paths are cut to their last part, because a config that travels inside a file must not tell where its
    maker keeps things.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, Path):
            return value.name if public else value.as_posix()
        if isinstance(value, str) and public:
            return _without_folders(value)
        if isinstance(value, tuple | list):
            return [plain(item) for item in value]
        return value

    values = {field.name: plain(getattr(config, field.name)) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if value is not None}


def _without_folders(text: str) -> str:
    """Of a path, such as LABEL=FILE:0.8, the last part; what may be a hub id, and other texts, as they are."""
    label, equals, path = text.partition("=")
    if not equals or re.search(r"[\\/]", label):  # a folder's name may hold a sign, too
        label, equals, path = "", "", text
    is_path = Path(path).is_absolute() or re.match(r"(~|\.\.?)[\\/]", path) or ".safetensors" in path
    here = (each for each in (path, path.rpartition(":")[0]) if re.search(r"[\\/]", each))
    is_path = is_path or any(map(os.path.exists, here))
    return label + equals + re.split(r"[\\/]", path.rstrip("\\/"))[-1] if is_path else text


def to_toml(config: DataclassInstance) -> str:
    """The config as a TOML file that `parse` reads back to an equal one."""
    import tomlkit

    return tomlkit.dumps(to_dict(config))


def fill_unset(config: Config, defaults: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The config with its unset fields taken from `defaults` where that has an entry of the name.

    Returns the filled config and the names that were filled, to be printed: a default that depends on the base is
    not known before the base is.
    """
    filled = {
        field.name: defaults[field.name]
        for field in dataclasses.fields(config)
        if getattr(config, field.name) is None and defaults.get(field.name) is not None
    }
    return dataclasses.replace(config, **filled), list(filled)
