"""The metadata that a command hands on from one file to another."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sfumato.command_line.terminal import say


def fitted_metadata(output: Path, metadata: Mapping[str, str], modules: int) -> dict[str, str]:
    """What a file of so many modules has room for; what is left out is told. Imports torch when it is called."""
    from sfumato.files.metadata import METADATA_LIMIT
    from sfumato.files.write_kohya import metadata_within_limit

    kept, left_out = metadata_within_limit(metadata, modules)
    if left_out:
        say(
            f"{output.name}: {', '.join(left_out)} left out of its metadata, of which at most {METADATA_LIMIT:,} bytes "
            "are written"
        )
    return kept
