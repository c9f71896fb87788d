"""The trained pipeline as the package ships it: fp16, files under 16 MB, with manifest, concepts and attribution.

python -m bench.pocket_export --model runs/pocket-unet/model [--vae runs/pocket-vae/model] --data pocket-data
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline

from sfumato import cli
from sfumato.config import parse
from sfumato.errors import DataError
from sfumato.training.pretrain.dataset import read_manifest
from sfumato.utils.atomic import write_text


@dataclass(frozen=True)
class Config:
    """Write the pocket base's folder from a trained pipeline."""

    model: Path = Path("runs/pocket-unet/model")
    """Folder of the trained pipeline, fp32."""
    vae: Path | None = None
    """Folder of a VAE to ship in place of the pipeline's own, such as one whose decoder has learned on."""
    data: Path = Path("pocket-data")
    """The folder that bench/pocket_data.py built, for its manifest."""
    out: Path = Path("src/sfumato/models/pocket")
    """Folder that receives the base. Files of ours that it holds besides stay."""
    shard: str = "15MB"
    """Largest weight file."""


def export(config: Config) -> Path:
    """Write the base; returns its folder. The parts are written whole beside it and moved in."""
    vae = {} if config.vae is None else {"vae": AutoencoderKL.from_pretrained(config.vae, local_files_only=True)}
    pipeline = StableDiffusionPipeline.from_pretrained(config.model, safety_checker=None, local_files_only=True, **vae)
    manifest = read_manifest(config.data)  # and what it tells, before anything is replaced
    if unknown := [style for style in manifest["styles"] if style not in manifest.get("sources", {})]:
        raise DataError(
            f'{config.data / "manifest.json"}: no "sources" of {unknown[0]}, whose drawings the attribution names; the '
            "package takes what bench/pocket_data.py built. Another base is used from its run's folder, by --base."
        )
    told = {
        "concepts.json": json.dumps(manifest["concepts"], indent=1) + "\n",
        "manifest.json": json.dumps(seen(manifest), indent=1) + "\n",
        "others.txt": others(manifest),
        "ATTRIBUTION.md": attribution(manifest["sources"]),
    }
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out.parent, prefix=".pocket-") as temporary:
        made = Path(temporary)
        pipeline.to(torch.float16).save_pretrained(made, max_shard_size=config.shard)
        for path in made.rglob("*.json"):
            _settle(path)
        for entry in sorted(made.iterdir()):
            _replace(entry, config.out / entry.name)
    for name, text in told.items():
        write_text(config.out / name, text)
    return config.out


def _settle(path: Path) -> None:
    """Take out of a config where on this machine the trained pipeline lay, and that its weights are fp16.

    transformers loads a model in the dtype its config names, diffusers in fp32: the parts would not fit together.
    """
    settings = json.loads(path.read_text(encoding="utf-8"))
    settled = {name: value for name, value in settings.items() if name != "_name_or_path"}
    if "dtype" in settled:
        settled["dtype"] = "float32"
    if settled != settings:
        path.write_text(json.dumps(settled, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _replace(made: Path, place: Path) -> None:
    """Move a new file or folder onto an old one."""
    if place.is_dir():
        shutil.rmtree(place)
    os.replace(made, place)


def seen(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The data's manifest without the concepts and the other drawings, which have files of their own; with the hash
    of the latter's."""
    hashes: dict[str, str] = manifest["sha256"]
    extras = others(manifest)
    return {key: value for key, value in manifest.items() if key not in ("concepts", "sha256")} | {
        "sha256": {name: value for name, value in hashes.items() if not name.startswith("other/")},
        "others": {"pictures": extras.count("\n"), "sha256": hashlib.sha256(extras.encode()).hexdigest()},
    }


def others(manifest: Mapping[str, Any]) -> str:
    """The other drawings, thousands, one "NAME HASH" a line in order."""
    hashes: dict[str, str] = manifest["sha256"]
    return "".join(f"{name} {value}\n" for name, value in sorted(hashes.items()) if name.startswith("other/"))


def attribution(sources: Mapping[str, Mapping[str, str]]) -> str:
    """ATTRIBUTION.md: whose drawings the weights were learned from, and under which licences."""
    owners = {
        "noto": "Noto Emoji, Google Inc., https://github.com/googlefonts/noto-emoji",
        "twemoji": "Twemoji, Twitter Inc. and other contributors, https://github.com/jdecked/twemoji",
        "flat": "Fluent Emoji (flat), Microsoft Corporation, https://github.com/microsoft/fluentui-emoji",
        "blob": "Noto Emoji as of its first version, Google Inc., https://github.com/googlefonts/noto-emoji",
    }
    rows = [
        f"| `{style}` | {owners[style]} | `{source['package']}` {source['version']} | {source['licence']} |"
        for style, source in sources.items()
    ]
    return "\n".join(
        [
            "# What the pocket base was learned from",
            "",
            "The weights in this folder were trained from nothing on drawings of four emoji sets, rendered at 64 x 64",
            "on white. No other picture was seen, and no weights of another model were used.",
            "",
            "| style | drawings | npm package | licence |",
            "|---|---|---|---|",
            *rows,
            "",
            "Licence texts: Apache-2.0 https://www.apache.org/licenses/LICENSE-2.0,",
            "MIT https://opensource.org/license/mit, CC-BY-4.0 https://creativecommons.org/licenses/by/4.0/.",
            "The drawings were resized; the weights are not endorsed by their authors. `manifest.json` lists the",
            "pictures of the concepts by their SHA-256, and the cells withheld; `others.txt` the other drawings.",
            "",
        ]
    )


def main(argv: Sequence[str]) -> None:
    """Run the program; prints the folder and its size."""
    folder = export(parse(Config, argv, program="bench.pocket_export"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    cli.run(main)
