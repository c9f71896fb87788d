"""A trainer's `train`, as anybody may call it: a program, a notebook, a thread of a service. Imports no torch."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

AnyConfig = TypeVar("AnyConfig")


def training_entry_point(train: Callable[[AnyConfig], Path]) -> Callable[[AnyConfig], Path]:
    """Gradients are computed whatever the caller has set, what ends the training lets go of the run's folder, and TF32
    is then what the caller had. A training whose step does not fit into memory goes on in less (`less_memory.py`). Of a
    dry run the path of its sheet is returned, or the output folder that it was asked for.

    A notebook keeps the latest error, and with it all that its frames hold: the folder would stay locked, and the base
    would lie beside that of the next attempt, which has less memory already. The frames of an error that nobody
    expected are left to its debugger.
    """

    @wraps(train)
    def called(config: AnyConfig) -> Path:
        import torch

        from sfumato.errors import ConfigError, SfumatoError, is_out_of_memory
        from sfumato.precision.memory import release_dropped_models
        from sfumato.runs import progress
        from sfumato.runs.dry_run import DryRunOver
        from sfumato.training.optim.fused_backward import reduce_memory

        if not dataclasses.is_dataclass(config) or isinstance(config, type):
            raise ConfigError(f"train wants a Config of its own module, as Config(images=...); got {config!r:.60}.")
        # Not asked for its type: a trainer's file has two names as a module.
        own = getattr(train, "__globals__", {}).get("Config", config)
        if missing := [field.name for field in dataclasses.fields(own) if not hasattr(config, field.name)]:
            raise ConfigError(
                f"train of {train.__module__} wants a Config of its own module; got one of {type(config).__module__}, "
                f"which has no {missing[0]}."
            )

        backends: Any = torch.backends  # whose functions have no types
        tf32 = backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32
        while True:
            try:
                with torch.inference_mode(False), torch.enable_grad():
                    return train(config)
            except DryRunOver as over:
                return over.path
            except Exception as error:
                smaller = reduce_memory(error)
                progress.abandon_unbegun()
                if isinstance(error, SfumatoError) or is_out_of_memory(error):
                    _clear_frames(error)
                if smaller is None:
                    raise
                config = smaller
                release_dropped_models()
            except BaseException as error:
                progress.close_unbegun()
                _clear_frames(error)
                raise
            finally:
                backends.cuda.matmul.allow_tf32, backends.cudnn.allow_tf32 = tf32
                progress.unlock()
                if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else the base stays beside the next
                    release_dropped_models()

    return called


def _clear_frames(error: BaseException) -> None:
    """Let go of what stands in the error's frames, unless there is a run that wrote its results: the program's last
    line tells of that."""
    from sfumato.runs import progress

    if not progress.is_writing():
        traceback.clear_frames(error.__traceback__)
