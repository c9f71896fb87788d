"""The exceptions of the package. Each message is one line: what was found, what was wanted, what to do.

SfumatoError
├── ConfigError       an option, a config file, a prompt
├── DataError         a folder, an image, a caption
├── PrecisionError    a device, a dtype, an optimizer that this machine cannot serve
├── BaseModelError    a base model
├── FileError         a weight file that is not what its name says
├── AdapterError      an adapter that does not fit, or fits in part
└── RunError          a run folder, a training that went wrong
"""

import difflib
import importlib.metadata
import re
import sys
import traceback
from collections.abc import Collection
from typing import Literal


def did_you_mean(name: str, known: Collection[str]) -> str:
    """The end of an error message about an unknown name: the most similar name of `known`, or all of them."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}."


def web_address_error(text: str, *, of_hub: Literal["nothing", "repositories", "files"] = "nothing") -> str:
    """The error message about a web address where a file or folder is wanted; empty for any other text.

    of_hub: what can be named there as the hub calls it: owner/name, or owner/name/file.safetensors, too.
    """
    found = re.match(r"(https?):[\\/]+(.+)", text, re.DOTALL)  # a Path has one slash of two
    if found is None:
        return ""
    said = f"{found[1]}://{found[2]:.100}: this is a web address."
    repository, file = r"[\w.-]+/[\w.-]+", r"[\w./ ()+-]+\.safetensors"
    hub = re.match(rf"(?:huggingface|hf)\.co/(?!datasets/|spaces/)({repository})(?:/\w+/[^/]+/({file}))?", found[2])
    if hub is None or of_hub == "nothing" or (hub[2] and of_hub == "repositories"):
        return f"{said} Download the file first, and give its name on this machine."
    return f"{said} Give {'/'.join(filter(None, hub.groups()))} instead; the hub's files are fetched by such names."


_MEMORY_IS_FULL = (
    "out of memory", "can't allocate memory", "not enough memory", "ALLOC_FAILED",
    "unable to find an engine to execute", "valid cuDNN algorithm", "could not create a primitive",
)  # fmt: skip
"""What torch says for GPUs, for CPUs, on Windows, and for cuBLAS, cuDNN and oneDNN without room to compute in, each as
a RuntimeError."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a GPU or of the CPU was too small."""
    said = isinstance(error, RuntimeError) and any(words in str(error) for words in _MEMORY_IS_FULL)
    return said or isinstance(error, MemoryError)


def package_error(error: BaseException) -> str:
    """One line on the package of others that is missing, or whose import raised `error`; empty where none did.

    Packages are loaded that nobody asked for: diffusers and transformers load xformers, bitsandbytes and torchvision
    wherever they are installed, and each of them breaks where torch is of another build than theirs.
    """
    if "or one of its dependencies" in str(error):  # so torch says of its own libraries on Windows
        return (
            f"torch cannot be loaded ({_in_one_line(error)}). Install Microsoft's Visual C++ Redistributable "
            "(https://aka.ms/vs/17/release/vc_redist.x64.exe), or torch again."
        )
    while error.__cause__ is not None:  # diffusers and transformers hide the reason behind an error of their own
        error = error.__cause__
    importing = [
        str(frame.f_globals.get("__name__"))
        for frame, _ in traceback.walk_tb(error.__traceback__)
        if frame.f_code.co_name == "<module>"
    ]
    if isinstance(error, ImportError) and error.name:
        importing.append(error.name)
    package = importing[-1].partition(".")[0] if importing else ""
    if package in ("", "sfumato", "__main__"):
        return ""
    if package in sys.stdlib_module_names:  # a Python that was built without it, or a file of the user's that hides it
        return (
            f"Python's own module {package} cannot be loaded ({_in_one_line(error)}). Rename your file of that name, "
            "or install another build of Python."
        )
    if isinstance(error, ModuleNotFoundError) and error.name == package:
        return f"the package {package} is missing. Install sfumato again with all that it needs, or {package} alone."
    name = (importlib.metadata.packages_distributions().get(package) or [package])[0]
    return (
        f"the package {name} is installed, but cannot be loaded ({_in_one_line(error)}). Install it again, in a build "
        "that fits this machine and the installed torch; if only other programs use it, this helps, too: "
        f"pip uninstall {name}"
    )


def _in_one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


class SfumatoError(Exception):
    """Any error that a user can fix. The command line prints it as one line and exits with 2."""


class ConfigError(SfumatoError):
    """An option or a config file that makes no sense."""


class DataError(SfumatoError):
    """A folder, an image or a caption that cannot be trained on."""


class PrecisionError(SfumatoError):
    """A device, a dtype or an optimizer that does not work on this machine."""


class BaseModelError(SfumatoError):
    """A base model that is missing, incomplete or of an unsupported kind."""


class FileError(SfumatoError):
    """A weight file that is broken or is not what its name says."""


class AdapterError(SfumatoError):
    """An adapter that does not fit its base model, or fits only in part."""


class RunError(SfumatoError):
    """A run folder that is in use or broken, or a training that diverged."""
