"""What sfumato finds on this machine: versions, extras, processor, GPUs, and the precision that follows from them."""

from __future__ import annotations

import importlib
import json
import os
import platform
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass
from importlib import metadata
from io import StringIO
from typing import Any

import sfumato
from sfumato.cli import run
from sfumato.config import parse

LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "huggingface_hub", "pillow")
FOR_DEVELOPERS = ("test", "mutation", "pocket")
"""Extras that no user's program needs."""


@dataclass(frozen=True)
class Config:
    """Show versions, extras, devices, and the precision for training and generating on this machine.

    Put the output into a bug report: it contains no path and no name of yours.
    """

    json: bool = False
    """Print JSON."""


def extras() -> dict[str, str]:
    """Each extra, with its packages, their versions and whether they work, or the command that installs it."""
    packages: dict[str, list[str]] = defaultdict(list)
    for requirement in metadata.requires("sfumato") or ():
        found = re.fullmatch(r"([\w.-]+).*; extra == ['\"](.+)['\"]", requirement)
        if found and found[2] not in FOR_DEVELOPERS:
            packages[found[2]].append(found[1])
    return {
        extra: ", ".join(f"{name} {version_of(name)}{problem_of(name)}" for name in names)
        if all(map(version_of, names))
        else f'not installed: pip install "sfumato[{extra}]"'
        for extra, names in sorted(packages.items())
    }


def version_of(package: str) -> str:
    """The version of a package; empty if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def problem_of(package: str) -> str:
    """Why an installed package cannot be loaded, without paths; empty if it can. One that was built for another torch
    raises whatever its libraries do."""
    try:
        with redirect_stderr(StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            importlib.import_module(package.replace("-", "_"))
    except Exception as error:
        reason = re.sub(r"\S*[/\\]", "", " ".join(str(error).split())) or type(error).__name__
        return f", which cannot be loaded ({reason:.120})"
    return ""


def devices() -> Iterator[str]:
    """A line about the processor and one about each GPU."""
    import torch

    from sfumato.precision.choices import cpu_has_bf16

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    capability = torch.backends.cpu.get_cpu_capability()
    yield (
        f"CPU: {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, {capability}, "
        f"{'bf16' if cpu_has_bf16() else 'no bf16'}" + (f", {memory / 2**30:.1f} GiB" if memory else "")
    )
    for number in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(number)
        yield f"cuda:{number}: {gpu.name}, capability {gpu.major}.{gpu.minor}, {gpu.total_memory / 2**30:.1f} GiB"
    if torch.backends.mps.is_available():
        yield "mps: an Apple GPU"


def survey() -> dict[str, Any]:
    """All that is shown, as JSON; `lines` turns it into text."""
    from sfumato.precision import decide

    return {
        "sfumato": sfumato.__version__,
        "python": f"{platform.python_version()}, {platform.system()} {platform.release()}",
        "libraries": {name: version_of(name) for name in LIBRARIES},
        "extras": extras(),
        "devices": list(devices()),
        "precision": {
            title: {what: [value, reason] for what, value, reason in decide("auto", adapting=adapting).rows()}
            for title, adapting in (("training an adapter", True), ("drawing, and training a whole model", False))
        },
    }


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """What `survey` found, line by line."""
    yield f"sfumato {found['sfumato']}, Python {found['python']}"
    yield ", ".join(f"{name} {version or 'not installed'}" for name, version in found["libraries"].items())
    yield from found["devices"]
    yield "\nextras"
    yield from (f"  {extra:<12}{state}" for extra, state in found["extras"].items())
    told: dict[str, list[str]] = {}
    for title, rows in found["precision"].items():
        new = {what: row for what, row in rows.items() if row != told.get(what)}
        yield f"\n{title}, --precision auto{'' if new else ': the same'}"
        yield from (f"  {what:<17}{value:<8}{reason}" for what, (value, reason) in new.items())
        told |= new


def main(argv: Sequence[str]) -> int:
    """Print what was found. Returns 0."""
    config = parse(Config, argv, program="env", first_may_be_config=False)
    found = survey()
    print(json.dumps(found, indent=2) if config.json else "\n".join(lines(found)))
    return 0


if __name__ == "__main__":
    run(main)
