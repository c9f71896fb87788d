"""Verify that a file is complete, is what it says it is, or is the same adapter as another."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from sfumato.cli import run
from sfumato.config import TypedConfig, parse
from sfumato.errors import AdapterError, ConfigError, FileError
from sfumato.utils.formatting import escape_control, to_single_line

if TYPE_CHECKING:
    from sfumato.files.adapter_file import Vectors
    from sfumato.files.fingerprint import Row


@dataclass(frozen=True)
class Config(TypedConfig):
    """Verify an adapter: every key and value, the hashes that it states, and that its weights are those that were
    trained.

    With --against, new words that are bundled in either file are compared, too. Exits with 0 if everything matches, 1
    if something differs, 2 if a file cannot be read.

    Example: sfumato verify line-fp16.safetensors --against line.safetensors
    """

    file: Path
    """Adapter to verify: a .safetensors file of any tool, or a folder of peft."""
    against: Path | None = None
    """Another adapter that must be the same, in any format and dtype. Unset: the file is compared with its own
    fingerprint."""
    _: KW_ONLY
    base: str | None = None
    """Base model for the comparison of kinds without a low-rank form."""
    tolerance: float = 0.01
    """Relative error that still counts as rounding, over all modules and for each new word. bf16 makes 0.0025, fp16
    0.0003."""
    json: bool = False
    """Print JSON."""


def verify(config: Config) -> tuple[bool, dict[str, object]]:
    """(whether everything matches, figures and a `reason` of one line). Raises FileError or AdapterError for unreadable
    files."""
    if not 0 < config.tolerance < 1:
        raise ConfigError(f"--tolerance {config.tolerance:g}: wanted above 0 and below 1; 0.01 is usual.")

    from sfumato.files.adapter_file import read_adapter
    from sfumato.files.fingerprint import FINGERPRINT_KEY, check_rows, compare

    file = read_adapter(config.file)  # which checks header, keys, halves and finiteness
    found: dict[str, object] = {"file": config.file.name, "modules": len(file.changes), "kinds": file.kinds}
    broken = _broken_hash(config.file)
    if broken:
        return False, found | {"reason": broken}
    if config.against is not None:
        ours, theirs = (_rows(path, config.base, vectors=True) for path in (config.file, config.against))
        comparison = compare(theirs, ours)
        where = f"against {config.against.name}"
    elif FINGERPRINT_KEY in file.metadata:
        try:
            comparison = check_rows(file.metadata[FINGERPRINT_KEY], _rows(config.file, config.base), config.file.name)
        except FileError as error:
            return False, found | {"reason": str(error)}
        where = "against its own fingerprint"
    else:
        return True, found | {"reason": "whole and finite; it states no fingerprint, so nothing more can be told"}
    same, reason = comparison.same(config.tolerance), comparison.reason(config.tolerance)
    # JSON has no inf
    figures = {key: None if value == math.inf else value for key, value in asdict(comparison).items()}
    if config.against is not None:
        other = read_adapter(config.against, partial=True)
        others = other.embeddings
        if same and other.skipped:
            same, reason = (
                False,
                f"{len(other.skipped)} keys there cannot be read, first {to_single_line(other.skipped[0])}",
            )
        figures["words"] = errors = _word_errors(file.embeddings, others)
        apart = [token for token, error in errors.items() if error is None or error > config.tolerance]
        if same and apart:
            same, reason = False, _on_word(apart[0], file.embeddings, others, errors[apart[0]], config.against.name)
        elif same and errors:
            reason += f"; the new words {', '.join(errors)} are alike"
    return same, found | figures | {"reason": f"{'the same' if same else 'differs'} {where}: {reason}"}


def _word_errors(ours: Vectors, theirs: Vectors) -> dict[str, float | None]:
    """The relative error of each word's vectors; None if one file lacks the word, or if their number or width
    differs."""
    found: dict[str, float | None] = {}
    for token in sorted({*ours, *theirs}):
        ones, others = ours.get(token, {}), theirs.get(token, {})
        found[token] = None
        if {part: rows.shape for part, rows in ones.items()} == {part: rows.shape for part, rows in others.items()}:
            pairs = [(ones[part].double(), others[part].double()) for part in ones]
            errors = [float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in pairs]
            found[token] = max(errors)
    return found


def _on_word(token: str, ours: Vectors, theirs: Vectors, error: float | None, against: str) -> str:
    """How a word differs, in one line."""
    if error is not None:
        return f"its word {token} has a relative error of {error:.2g}"
    if token not in ours:
        return f"the word {token} of {against} is missing"
    if token not in theirs:
        return f"its word {token} is not in {against}"
    shapes = (
        " and ".join(f"{len(rows)} of width {rows.shape[1]}" for rows in words[token].values())
        for words in (ours, theirs)
    )
    return "its word {} has the vectors {}, there it has {}".format(token, *shapes)


def _broken_hash(path: Path) -> str | None:
    """What is wrong with the sha256 that the file states; None for a folder, and for a file that states none."""
    from sfumato.files.header import read_header
    from sfumato.files.metadata import data_sha256

    if path.is_dir():
        return None
    header = read_header(path)
    stated = header.metadata.get("sshs_model_hash") or header.metadata.get("modelspec.hash_sha256", "")
    stated = stated.removeprefix("0x")
    if stated and stated != (real := data_sha256(header)):
        return f"its bytes have the sha256 {real[:12]}, it states {stated[:12]}: they were changed after it was written"
    return None


def _rows(path: Path, base: str | None, *, vectors: bool = False) -> dict[str, Row]:
    """The fingerprint rows of an adapter. vectors: include changes of norms and biases, which no fingerprint
    contains."""
    from sfumato.adapters.weights import Adapter
    from sfumato.files.fingerprint import known_delta, probe_rows, probed_delta, rows_of_tensors
    from sfumato.files.kinds import ModuleAdapter
    from sfumato.files.kinds.ia3 import bias_change, may_have_bias
    from sfumato.merging.sources import optional_stored_base, read_source

    source, _ = read_source(Adapter(path), partial=True, modules=True)
    stored = optional_stored_base(base)
    read = known_delta if vectors else probed_delta
    rows: dict[str, Row] = {}
    for (part, name), change in source.changes.items():
        if isinstance(change, ModuleAdapter):
            rows |= rows_of_tensors((part, name), change)
            continue
        module = read(change, stored.weight((part, name)) if stored and change.low_rank() is None else None)
        if module is not None:
            rows |= probe_rows({(part, name): module})
        elif change.needs_weight and stored is None:
            raise AdapterError(
                f"{source.name}: the delta of {change.kind} in {part}.{name} depends on the weight that it changes. "
                "Name the base it was made for with --base."
            )
        has_bias = may_have_bias((part, name)) if stored is None else stored.parameter((part, name), "bias") is not None
        bias = bias_change(change, has_bias=has_bias) if vectors else None
        if bias is None:
            continue
        added = bias.value if bias.gain is None or stored is None else bias.delta(stored.weight((part, name), "bias"))
        # Zeros are left out: diffusers gives every module a bias where one has it.
        if added is not None and bool(added.float().any()):
            rows |= probe_rows({(part, f"{name}.bias"): added})
    return rows


def main(argv: Sequence[str]) -> int:
    """Verify as the arguments say. Returns 0 if everything matches, 1 if something differs."""
    config = parse(Config, argv, program="verify")
    holds, found = verify(config)
    if config.json:
        print(json.dumps(found, indent=2))
    else:
        print(escape_control(f"{config.file.name}: {found['reason']}"), file=sys.stdout if holds else sys.stderr)
    return 0 if holds else 1


if __name__ == "__main__":
    run(main)
