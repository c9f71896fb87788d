"""FILE:0.8 and its like: how a command line names adapters, weights and where to write. Imports no torch.

The metadata that a command hands on from one file to another.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from os.path import exists, isdir, isfile
from pathlib import Path

from sfumato.adapters.blocks import Blocks
from sfumato.adapters.prompt_tags import TaggedPrompt, refuse_tags, without_flags
from sfumato.adapters.weights import Adapter, Weight, inherit_block_factors, scale_unet_weight
from sfumato.config import expand_home
from sfumato.errors import AdapterError, ConfigError, web_address_error
from sfumato.files.header import read_header
from sfumato.files.peft import folders_in
from sfumato.generation.adapter_files import find_adapter
from sfumato.utils.formatting import say
from sfumato.utils.limits import checked_adapter_guidance

_LONGEST_NAME = 255
"""Bytes, on the file systems in use."""


def is_hub_id(text: str) -> bool:
    """Whether `owner/name`, or `owner/name/file.safetensors`, can only be meant of the hub: no folder is the owner.

    The name of a file in a folder that is there is none, so that one that was mistyped is known at once.
    """
    owner, _, rest = text.partition("/")
    if not re.fullmatch(r"\w[\w.-]*", owner) or exists(owner) or exists(text):
        return False
    if re.fullmatch(r"[\w.-]+", rest):
        return not rest.endswith(".safetensors")
    return re.fullmatch(r"[\w.-]+(/[\w. ()+-]+)+\.safetensors", rest) is not None


def parse_adapter(spec: str, *, weight: Weight = 1.0) -> Adapter:
    """The adapter of FILE, FILE:WEIGHT or FILE:UNET:TEXT, each perhaps after LABEL=; the file's header is checked.
    weight: of one that has none of its own.

    The weights are what follows the last colons, so that a file's name may have some (C:\\line.safetensors:0.8). A file
    of the hub, owner/name or owner/name/file.safetensors, is fetched first.
    """
    _refuse_address(spec)
    splits: list[tuple[str, list[float]]] = [(expand_home(spec), [])]
    while len(splits) < 3 and (found := re.fullmatch(r"(.+):([^:]+)", splits[-1][0], re.DOTALL)):
        try:
            splits.append((found[1], [float(found[2]), *splits[-1][1]]))
        except ValueError:
            break
    named = [(path, None, numbers) for path, numbers in splits]
    labelled = [(path.partition("=")[2], path.partition("=")[0], numbers) for path, numbers in splits if "=" in path]
    # What is there is meant; if nothing is, the usual reading gives the error its words.
    readings = [*named, *labelled]
    path, label, numbers = next((reading for reading in readings if exists(reading[0])), readings[-1])
    if not exists(path) and (wrong := re.fullmatch(r"(.+\.safetensors):([^\\/]*)", path)):
        raise ConfigError(f"{spec}: {wrong[2]!r} is no weight; wanted a number, as in {wrong[1]}:0.8.")
    if not path:
        raise ConfigError(f"{spec!r} names no file; wanted FILE:0.8.")
    if len(os.fsencode(Path(path).name)) > _LONGEST_NAME:
        raise ConfigError(f"'{path[:40]}...': no file has so long a name; wanted FILE:0.8, an adapter (--lora).")
    if not exists(path) and (hub := next((each for each in readings if is_hub_id(each[0])), None)):
        from sfumato.models.folder import hub_file

        name, label, numbers = hub
        path = str(hub_file(name))
        label = label or (None if name.endswith(".safetensors") else name.partition("/")[2])
    if isdir(path):  # what is in a folder of peft's or of a whole model, its reader looks into
        if not (Path(path) / "model_index.json").is_file():
            folders_in(Path(path))
    else:
        read_header(path)
    own: Weight = weight if not numbers else numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
    return Adapter(path, own, label or None)


def parse_embedding(spec: str) -> tuple[str | None, Path]:
    """The token, if it is given, and the file of FILE or TOKEN=FILE, of a new word; the file's header is checked.

    One of the hub is fetched first.
    """
    _refuse_address(spec)
    token, path = _token_and_path(spec)
    if path == Path():
        raise ConfigError(f"{spec!r} names no file; wanted FILE or TOKEN=FILE, a new word (--embedding).")
    if is_hub_id(path.as_posix()):
        from sfumato.models.folder import WORD, hub_file

        path = hub_file(path.as_posix(), WORD)
    read_header(path)
    return token or None, path


def _refuse_address(spec: str) -> None:
    """Raises ConfigError for a web address, perhaps after NAME=."""
    if said := web_address_error(spec, of_hub="files") or web_address_error(spec.partition("=")[2], of_hub="files"):
        raise ConfigError(said)


def public_embedding(spec: str) -> str:
    """FILE or TOKEN=FILE without the folder, which is private, and with the token, which the prompts hold."""
    token, path = _token_and_path(spec)
    name = path.as_posix() if is_hub_id(path.as_posix()) else path.name
    return f"{token}={name}" if token else name


def _token_and_path(spec: str) -> tuple[str, Path]:
    spec = expand_home(spec)
    token, equals, path = spec.partition("=")
    return (token, Path(path)) if equals and not isfile(spec) else ("", Path(spec))


def parse_adapters(
    specs: Sequence[str], *, weight: Weight = 1.0, beside: Sequence[Adapter] = ()
) -> tuple[Adapter, ...]:
    """The adapters, each with a label of its own, none that one of `beside` has: of two files of one name the later
    ones are counted. weight: of those that have none of their own."""
    found: list[Adapter] = []
    for spec in specs:
        adapter = parse_adapter(spec, weight=weight)
        label, count = adapter.label, 2
        while label in {other.label for other in (*beside, *found)}:
            label, count = f"{adapter.label} {count}", count + 1
        found.append(Adapter(adapter.path, adapter.weight, label))
    return tuple(found)


def apply_block_weights(adapters: Sequence[Adapter], blocks: Sequence[str]) -> tuple[Adapter, ...]:
    """The adapters with the weights by block that `--blocks` gives them. Raises ConfigError also for a label twice."""
    labels = [each.label for each in adapters]
    if repeated := [label for label in labels if labels.count(label) > 1]:
        raise ConfigError(f"two adapters are called {repeated[0]!r}; tell them apart with --lora NAME=FILE:0.8.")
    found = {each.label: each for each in adapters}
    for text in blocks:
        label, equals, factors = text.rpartition("=")
        if not equals or label not in found:
            known = ", ".join(found) or "none are given"
            raise ConfigError(f"--blocks {text}: wanted LABEL=BLOCKS, with the label of a --lora ({known}).")
        weight = found[label].weight
        if isinstance(weight, Blocks):
            raise ConfigError(f"--blocks {text}: {label} has blocks already; name them in one.")
        found[label] = Adapter(found[label].path, Blocks.parse(weight, factors), found[label].name)
    return tuple(found.get(each.label, each) for each in adapters)


def resolve_tags(
    adapters: Sequence[Adapter], prompts: Sequence[TaggedPrompt], folder: Path
) -> tuple[tuple[Adapter, ...], list[dict[str, Weight] | None]]:
    """All adapters, those of the tags included, and each prompt's weights where it has tags.

    A tag's weight replaces that of the adapter of its label, whose factors by block stay where the tag has none.
    """
    named = {each.label: each for each in adapters}
    always = {each.label: each.weight for each in adapters}
    for tagged in prompts:
        for name, _ in tagged.adapters:
            if name not in named:
                named[name] = Adapter(find_adapter(name, folder), 0.0, name)
    said = [
        {name: inherit_block_factors(always.get(name, 0.0), weight) for name, weight in tagged.adapters}
        for tagged in prompts
    ]
    return tuple(named.values()), [
        {label: 0.0 for label in named} | always | weights if weights else None for weights in said
    ]


def refuse_prompt_tags(prompt: str, where: str) -> str:
    """The prompt. Raises ConfigError where it names an adapter or holds options, which are read elsewhere."""
    refuse_tags(prompt, where, "name the adapter with --lora")
    return without_flags(prompt, where)


def parse_strengths(texts: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """By label, of 2 for all and LABEL=2 for one, which goes before. Raises ConfigError, one line."""
    found: dict[str, float] = {}
    for text in sorted(texts, key=lambda text: "=" in text):
        label, equals, number = text.rpartition("=")
        if equals and label not in labels:
            known = ", ".join(labels) or "none are given"
            raise ConfigError(f"--adapter-guidance {text}: no --lora is called {label!r} ({known}).")
        if [each.rpartition("=")[0] for each in texts].count(label) > 1:
            of = f"for {label}" if equals else "for all adapters"
            raise ConfigError(f"--adapter-guidance {text}: is given twice {of}; leave one out.")
        try:
            strength = float(number)
        except ValueError:
            raise ConfigError(f"--adapter-guidance {text}: wanted a number, or LABEL=2.") from None
        found |= dict.fromkeys([label] if equals else labels, checked_adapter_guidance(strength))
    if texts and not labels:
        raise ConfigError(
            f"--adapter-guidance {texts[0]}: there is no adapter that it could count for; give --lora FILE:0.8."
        )
    return found


def parse_sweep(text: str, adapters: Sequence[Adapter]) -> tuple[str, tuple[float, ...]]:
    """(label, weights) of LABEL=0,0.5,1. Raises ConfigError, one line."""
    own = {each.label: each.weight for each in adapters}
    label, equals, weights = text.rpartition("=")
    if not equals or not label:
        raise ConfigError(f"--sweep {text}: wanted LABEL=WEIGHTS, such as line=0,0.5,1.")
    if label not in own:
        known = ", ".join(own) or "none are given"
        raise ConfigError(f"--sweep {text}: no --lora is called {label!r} ({known}).")
    try:
        numbers = tuple(float(number) for number in weights.split(","))
    except ValueError:
        raise ConfigError(f"--sweep {text}: wanted numbers, parted by commas, such as {label}=0,0.5,1.") from None
    try:
        for number in numbers:
            scale_unet_weight(label, own[label], number)
    except AdapterError as error:
        raise ConfigError(f"--sweep {text}: {error}") from None
    return label, numbers


def fitted_metadata(output: Path, metadata: Mapping[str, str], modules: int) -> dict[str, str]:
    """What a file of so many modules has room for; what is left out is told. Imports torch when it is called."""
    from sfumato.files.metadata import METADATA_LIMIT
    from sfumato.files.writing.kohya import metadata_within_limit

    kept, left_out = metadata_within_limit(metadata, modules)
    if left_out:
        say(
            f"{output.name}: {', '.join(left_out)} left out of its metadata, of which at most {METADATA_LIMIT:,} bytes "
            "are written"
        )
    return kept
