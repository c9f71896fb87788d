"""What a whole model is, a checkpoint or a diffusers folder, without loading it. A checkpoint needs no torch for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sfumato.errors import BaseModelError, FileError
from sfumato.files.header import Header, read_header
from sfumato.files.metadata import LABELS, data_sha256, joint_hash, short_hash
from sfumato.files.norms import nonfinite_in
from sfumato.models.family import UNET, VAE, family_from_keys, family_of_config, stated_prediction_type
from sfumato.utils.formatting import to_single_line

_PREFIXES: Mapping[str, str] = {
    UNET: "unet",
    "cond_stage_model.": "text_encoder",
    "conditioner.embedders.0.": "text_encoder",
    "conditioner.embedders.1.": "text_encoder_2",
    VAE: "vae",
}
"""Where a checkpoint keeps each part, whatever its family."""
OTHER_TENSORS = "others"


@dataclass(frozen=True)
class ModelInspection:
    """What `sfumato inspect` prints of a whole model.

    family: None where the names do not tell it. prediction_type: as the metadata or the scheduler say it, "" where
    they do not. channels: that the U-Net takes, None where it is not there. parts: how many tensors of each dtype each
    has. hash: by which our pictures name it as an adapter, of a folder without the VAE.
    """

    file: str
    bytes: int
    kind: str
    family: str | None
    prediction_type: str
    zero_terminal_snr: bool
    channels: int | None
    parts: dict[str, dict[str, int]]
    hash: str
    nonfinite: list[str]
    metadata: dict[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON knows it."""
        return asdict(self)


def inspect_model(path: Path) -> ModelInspection | None:
    """The whole model at `path`; None for anything else. Raises BaseModelError for a folder that is not whole."""
    if path.is_dir():
        return _folder(path) if (path / "model_index.json").is_file() else None
    try:
        header = read_header(path)
    except FileError:  # whose words are those of who looks for an adapter
        return None
    return _checkpoint(header) if any(name.startswith(UNET) for name in header.tensors) else None


def _checkpoint(header: Header) -> ModelInspection:
    family, first = None, header.tensors.get(f"{UNET}input_blocks.0.0.weight")
    with suppress(BaseModelError):  # without text encoders, or of another kind
        family = family_from_keys(header.tensors, header.path.name, needs_vae=False).name
    dtypes: dict[str, Counter[str]] = {part: Counter() for part in (*_PREFIXES.values(), OTHER_TENSORS)}
    for name, info in header.tensors.items():
        part = next((part for prefix, part in _PREFIXES.items() if name.startswith(prefix)), OTHER_TENSORS)
        dtypes[part][info.dtype] += 1
    return ModelInspection(
        file=header.path.name,
        bytes=header.size,
        kind="a whole model, a checkpoint",
        family=family,
        prediction_type=stated_prediction_type(header),
        zero_terminal_snr="ztsnr" in header.tensors,
        channels=first.shape[1] if first and len(first.shape) == 4 else None,
        parts={part: dict(counts.most_common()) for part, counts in dtypes.items() if counts},
        hash=short_hash(header),
        nonfinite=nonfinite_in(header),
        metadata=dict(sorted(header.metadata.items())),
    )


def _folder(path: Path) -> ModelInspection:
    from sfumato.models.family import read_config
    from sfumato.models.folder import weight_files

    unet = read_config(path, "unet/config.json")
    channels = unet.get("in_channels")
    scheduler = {}
    if (path / "scheduler/scheduler_config.json").is_file():
        scheduler = {"prediction_type": "epsilon"} | read_config(path, "scheduler/scheduler_config.json")
    parts = [part for part in dict.fromkeys(_PREFIXES.values()) if (path / part).is_dir()]
    headers = {part: [read_header(file) for file in weight_files(path / part)] for part in parts}
    of_hash = sorted(each.path for part in parts if part != "vae" for each in headers[part])
    return ModelInspection(
        file=path.resolve().name,
        bytes=sum(each.size for some in headers.values() for each in some),
        kind="a whole model, a diffusers folder",
        family=family_of_config(unet).name,
        prediction_type=str(scheduler.get("prediction_type", "")),
        zero_terminal_snr=bool(scheduler.get("rescale_betas_zero_snr")),
        channels=channels if type(channels) is int else None,
        parts={
            part: dict(Counter(info.dtype for each in some for info in each.tensors.values()).most_common())
            for part, some in headers.items()
        },
        hash=joint_hash(data_sha256(read_header(file)) for file in of_hash),
        nonfinite=[f"{part}/{name}" for part, some in headers.items() for each in some for name in nonfinite_in(each)],
        metadata={},
    )


def render(model: ModelInspection) -> str:
    """The same as lines of text."""
    predicts = model.prediction_type or (
        "not said; name it with --prediction-type" if model.family == "sd2" else "not said, so epsilon is taken"
    )
    what = {8: ", which edits images (8 channels)", 9: ", which inpaints (9 channels)"}
    rows = [
        ("file", f"{to_single_line(model.file)}, {model.bytes / 1e6:.2f} MB"),
        ("kind", model.kind + what.get(model.channels or 0, "")),
        ("family", LABELS[model.family].title if model.family else "unknown"),
        ("predicts", to_single_line(predicts) + ", zero terminal SNR" * model.zero_terminal_snr),
    ]
    if title := model.metadata.get("modelspec.title"):
        rows.append(("title", to_single_line(title)))
    for part, dtypes in model.parts.items():
        counts = ", ".join(f"{dtype} ({count:,})" for dtype, count in dtypes.items())
        rows.append(("" if part != next(iter(model.parts)) else "parts", f"{part}: {counts}"))
    rows.append(("hash", model.hash))
    if model.nonfinite:
        rows.append(
            ("NaN or Inf", f"{len(model.nonfinite)}, first {', '.join(map(to_single_line, model.nonfinite[:3]))}")
        )
    return "\n".join(f"{name:<11}{value}" for name, value in rows)
