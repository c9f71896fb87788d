"""A trainer's `train`, as anybody may call it: a program, a notebook, a thread of a service. Imports no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import TypeVar

AnyConfig = TypeVar("AnyConfig")


def training_entry_point(train: Callable[[AnyConfig], Path]) -> Callable[[AnyConfig], Path]:
    """Gradients are computed whatever the caller has set, and what ends the training lets go of the run's folder.

    A notebook keeps the latest error, and with it the run: without that the folder would stay locked by it.
    """

    @wraps(train)
    def called(config: AnyConfig) -> Path:
        import torch

        from sfumato.errors import ConfigError
        from sfumato.precision.memory import give_back_dropped_models
        from sfumato.runs import unfinished

        if not dataclasses.is_dataclass(config) or isinstance(config, type):
            raise ConfigError(f"train wants a Config of its own module, as Config(images=...); got {config!r:.60}.")

        try:
            with torch.inference_mode(False), torch.enable_grad():
                return train(config)
        except Exception:
            unfinished.abandon_unbegun()
            raise
        except BaseException:
            unfinished.close_unbegun()
            raise
        finally:
            unfinished.unlock()
            if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # else the base stays beside the next
                give_back_dropped_models()

    return called
