"""The pictures that the pocket base is trained on: four emoji sets, 64 px on white, as STYLE/CONCEPT.png.

The drawings come from four npm packages, fetched by the ordinary npm client, and are rendered with resvg. Needs `npm`
and the PyPI package `resvg-py`.

    python -m bench.pocket_data --out pocket-data
"""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from bench.real import BASE_CONCEPTS, check_least
from sfumato import cli
from sfumato.config import parse
from sfumato.errors import DataError


@dataclass(frozen=True)
class Source:
    """One emoji set: its npm package, the version that was drawn from, and its licence."""

    package: str
    version: str
    licence: str


SOURCES: Mapping[str, Source] = {
    "noto": Source("@iconify-json/noto", "1.2.9", "Apache-2.0"),
    "twemoji": Source("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0"),
    "flat": Source("@iconify-json/fluent-emoji-flat", "1.2.6", "MIT"),
    "blob": Source("@iconify-json/noto-v1", "1.2.5", "Apache-2.0"),
}
"""Style name -> where its drawings come from. The shipped base has seen these and no other."""

KEPT_FOR_SUBJECTS = frozenset(
    [
        *("accordion", "badger", "broccoli", "bubble-tea", "cupcake", "dodo", "donkey", "flamingo", "garlic"),
        *("giraffe", "hedgehog", "kangaroo", "kite", "llama", "magnet", "mango", "moose", "otter", "teddy-bear"),
    ]
)
"""Concepts that no base may see, in any style, so that teaching them stays an honest question."""

_SUBJECT_WORDS = frozenset(word for name in KEPT_FOR_SUBJECTS for word in name.split("-")) - {"bear", "tea", "bubble"}
_NOT_PLAIN = ("skin-tone", "flag-", "keycap", "button", "-oclock", "-thirty", "japanese-", "input-")


COMMON_WORDS = (
    "a an the of in on at by to for from with without and or not no is are as like into over under near behind "
    "above below beside between around through up down left right front back inside outside this that these those "
    "one two three four five six seven eight nine ten many few some all red orange yellow green blue purple pink "
    "brown black white gray grey gold silver golden bright dark light pale deep warm cold hot small big large "
    "little tiny huge tall short long thin thick wide narrow round square flat curved straight old new young fresh "
    "wet dry soft hard smooth rough shiny glossy matte clean dirty happy sad angry sleepy funny cute beautiful "
    "pretty lovely strange simple plain photo picture image drawing painting sketch icon illustration portrait "
    "closeup view background style made drawn painted colour color colourful colorful outline shadow line shape "
    "pattern paper wood wooden metal glass stone plastic cloth wool leather ice water snow rain sand grass sky sea "
    "ocean river lake forest mountain hill field garden park beach city street road room kitchen table chair bed "
    "floor wall window door house home box bag bowl cup plate bottle basket person people man woman boy girl child "
    "baby friend animal bird fish insect flower tree plant fruit vegetable food drink toy tool thing object vehicle "
    "building wearing holding eating drinking sitting standing running walking flying swimming sleeping playing "
    "looking smiling my your his her its our their day night morning evening summer winter spring autumn sun moon "
    "star good best great nice quality high low very"
)
"""Words that prompts use and icon names lack; they teach the tokenizer, not the U-Net."""


@dataclass(frozen=True)
class Config:
    """Build the pictures and their manifest for the pocket base."""

    out: Path = Path("pocket-data")
    """Folder that receives STYLE/CONCEPT.png, other/STYLE/NAME.png and manifest.json."""
    packages: Path | None = None
    """Folder with the packages' .tgz files; fetched there where one is missing. Default: OUT/npm."""
    size_px: int = 64
    """Side of a picture; drawn at twice this size and halved."""
    seed: int = 0
    """Decides which cells are withheld."""
    others: bool = True
    """Also draw the sets' other pictures, from which the VAE and, by --others-share, the U-Net learn the styles."""


def withheld_cells(concepts: Sequence[str], styles: Sequence[str], seed: int) -> set[tuple[str, str]]:
    """The (concept, style) cells that training must not see: one in ten, never two of one concept.

    A pure function of the seed and of the names: concepts are ranked by a hash, and each of the first
    len(concepts) * len(styles) / 10 withholds the style that its hash picks.
    """

    def digest(concept: str) -> bytes:
        return hashlib.sha256(f"{seed}:{concept}".encode()).digest()

    count = round(len(concepts) * len(styles) / 10)
    ranked = sorted(concepts, key=digest)
    return {(concept, styles[digest(concept)[-1] % len(styles)]) for concept in ranked[:count]}


def is_kept_for_subjects(name: str) -> bool:
    """Whether an icon's name is one of the subjects that no base may see, or an obvious variant of one."""
    return name in KEPT_FOR_SUBJECTS or bool(_SUBJECT_WORDS & set(name.split("-"))) or "bubble-tea" in name


def fetch(source: Source, folder: Path) -> dict[str, Any]:
    """The package's `icons.json`; the package is fetched with `npm pack` unless `folder` holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{source.package.lstrip('@').replace('/', '-')}-{source.version}.tgz"
    if not (folder / name).exists():
        command = ["npm", "pack", "--silent", f"{source.package}@{source.version}"]
        try:
            subprocess.run(command, cwd=folder, check=True, stdout=subprocess.DEVNULL)
        except (OSError, subprocess.CalledProcessError) as error:
            what = f"{' '.join(command)} failed ({error})"
            raise DataError(f"{what}; install npm, or put {name} into {folder}.") from None
    try:
        with tarfile.open(folder / name) as archive:
            member = archive.extractfile("package/icons.json")
            icons: dict[str, Any] = json.loads(member.read() if member else b"")
            return icons
    except (tarfile.TarError, EOFError, KeyError, ValueError, zlib.error):
        raise DataError(
            f"{folder / name}: no whole package with package/icons.json in it, as a fetch that was cut off leaves it. "
            "Remove it; the next call fetches it again."
        ) from None


def render(icons: Mapping[str, Any], name: str, size_px: int, halved: Image.Resampling = Image.Resampling.BOX) -> bytes:
    """One icon as PNG bytes: RGB on white, size_px wide and high, drawn at twice the size and halved by this filter."""
    import resvg_py

    icon = icons["icons"][name]
    left, top = icon.get("left", icons.get("left", 0)), icon.get("top", icons.get("top", 0))
    width, height = icon.get("width", icons.get("width", 16)), icon.get("height", icons.get("height", 16))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'viewBox="{left} {top} {width} {height}" width="{2 * size_px}" height="{2 * size_px}">{icon["body"]}</svg>'
    )
    drawn = resvg_py.svg_to_bytes(svg_string=svg, width=2 * size_px, height=2 * size_px, skip_system_fonts=True)
    picture = Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")
    on_white = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    out = io.BytesIO()
    on_white.resize((size_px, size_px), halved).save(out, "PNG")
    return out.getvalue()


def resolve(icons: Mapping[str, Any], name: str) -> str | None:
    """The icon that a name or an alias stands for; None where the set has no such drawing."""
    seen = name
    while seen in icons.get("aliases", {}):
        alias = icons["aliases"][seen]
        if alias.keys() - {"parent", "hidden"}:  # a turned or mirrored drawing is another picture
            return None
        seen = alias["parent"]
    return seen if seen in icons["icons"] else None


def build(config: Config) -> Path:
    """Draw everything, write the pictures, `words.txt` and `manifest.json`, and return the folder.

    The manifest lists styles, concepts with their groups, withheld cells, sources, and one sha256 a picture. The words,
    from the icons' names, are what the tokenizer is learned from besides captions.
    Pictures that the folder's manifest listed before and that are none of these any more are removed.
    Raises DataError for a concept that a set lacks, ConfigError for a size of nothing.
    """
    check_least(config, "size_px")
    groups: dict[str, str] = json.loads(BASE_CONCEPTS.read_text(encoding="utf-8"))
    names = {concept: concept.replace(" ", "-") for concept in groups}
    withheld = withheld_cells(list(groups), list(SOURCES), config.seed)
    sets = {style: fetch(source, config.packages or config.out / "npm") for style, source in SOURCES.items()}
    old = _listed(config.out)
    hashes: dict[str, str] = {}
    hidden: set[str] = set()
    for style, icons in sets.items():
        for concept, name in names.items():
            icon = resolve(icons, name)
            if icon is None:
                package = SOURCES[style].package
                raise DataError(f"{package} has no drawing named {name}; take {concept!r} off {BASE_CONCEPTS.name}.")
            picture = render(icons, icon, config.size_px)
            hashes[f"{style}/{name}.png"] = _write(config.out / style / f"{name}.png", picture)
            if (concept, style) in withheld:
                hidden.add(hashes[f"{style}/{name}.png"])
    if config.others:
        hashes |= _others(config, sets, names, hidden)
    for name in old - hashes.keys():  # the trainer reads the folder
        (config.out / name).unlink(missing_ok=True)
    (config.out / "words.txt").write_text("\n".join(words(sets)) + "\n", encoding="utf-8")
    manifest = {
        "styles": list(SOURCES),
        "concepts": groups,
        "seed": config.seed,
        "withheld": sorted([concept, style] for concept, style in withheld),
        "kept_for_subjects": sorted(KEPT_FOR_SUBJECTS),
        "sources": {style: vars(source) for style, source in SOURCES.items()},
        "sha256": dict(sorted(hashes.items())),
    }
    (config.out / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return config.out


def _listed(folder: Path) -> set[str]:
    """The pictures of a folder that was built before."""
    path = folder / "manifest.json"
    if not path.exists():
        return set()
    found = json.loads(path.read_text(encoding="utf-8"))["sha256"]
    return {name for name in found if Path(name).suffix == ".png" and ".." not in Path(name).parts}


def words(sets: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The words of the icons' names and the common ones, sorted; none of a subject that is kept apart."""
    names = {name for icons in sets.values() for name in icons["icons"] if not is_kept_for_subjects(name)}
    found = {word for name in names for word in name.split("-") if len(word) > 1 and word.isalpha()}
    return sorted(found | set(COMMON_WORDS.split()))


def _others(
    config: Config, sets: Mapping[str, Mapping[str, Any]], names: Mapping[str, str], hidden: set[str]
) -> dict[str, str]:
    """Every other plain drawing: no subject, no withheld picture under a second name, no skin tones."""
    written: dict[str, str] = {}
    for style, icons in sets.items():
        for name in sorted(icons["icons"]):
            shared = sum(name in other["icons"] for other in sets.values()) > 1
            plain = shared and not any(word in name for word in _NOT_PLAIN)
            if not plain or name in names.values() or is_kept_for_subjects(name):
                continue
            picture = render(icons, name, config.size_px)
            if hashlib.sha256(picture).hexdigest() in hidden:
                continue
            written[f"other/{style}/{name}.png"] = _write(config.out / "other" / style / f"{name}.png", picture)
    return written


def _write(path: Path, data: bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return hashlib.sha256(data).hexdigest()


def main(argv: Sequence[str]) -> None:
    """Run the program; prints the folder and how many pictures it holds."""
    folder = build(parse(Config, argv, program="bench.pocket_data"))
    print(f"{folder}: {sum(1 for _ in folder.rglob('*.png'))} pictures")


if __name__ == "__main__":
    cli.run(main)
