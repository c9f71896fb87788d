"""The sheets of docs/mixing.md: two styles and two subjects, learned by the shipped recipes and mixed in every way.

One sheet for each style and subject, a row for each way to mix. Prints JSON: what was drawn, with which settings.

    python -m bench.mixing_sheets

The second style is the first's pictures as white lines on blue, so that both are there without a download; --styles and
--subjects name other folders. Adapters stay in --work and are learned once for each base; a few minutes on two cores.
"""

from __future__ import annotations

import io
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageOps

from bench.real import print_report
from bench.style_runs import Workshop
from sfumato import Adapter, cli, compose, load_base
from sfumato.adapters.blocks import Blocks
from sfumato.compose.by_method import by_method
from sfumato.compose.guidance import adapter_guidance
from sfumato.compose.per_image import composite
from sfumato.compose.regions import Region, regions
from sfumato.compose.schedules import Ramp, Switch, over_steps
from sfumato.data import open_image
from sfumato.errors import ConfigError
from sfumato.generation.draw import draw
from sfumato.merging.methods import METHODS, MethodSettings
from sfumato.models import Base
from sfumato.precision import decide
from sfumato.utils.atomic import atomic_path
from sfumato.utils.image_grid import contact_sheet

DATASETS = Path(__file__).parents[1] / "datasets"
COLOURS = (256, 192, 128, 96, 64, 48, 32)
"""Sizes of the palette that are tried until a sheet is small enough."""
ELSE = "crab"
"""A thing that neither adapter was taught: the style should reach it, the subject should not."""
STRENGTH = 2.0
"""Of the adapter guidance in the rows that have one, the style recipe's."""


@dataclass(frozen=True, kw_only=True)
class Config:
    """Learn styles and subjects on the pocket base and draw a sheet of every way to mix for each pair."""

    styles: tuple[Path, ...] = (DATASETS / "line-style",)
    """Folders of a style's pictures, each named after what it shows."""
    blueprint: bool = True
    """Learn one more style: the first one's pictures as white lines on blue."""
    subjects: tuple[Path, ...] = (DATASETS / "flamingo", DATASETS / "teddy-bear")
    """Folders of a subject's pictures, with captions that begin with its name and a comma."""
    weights: tuple[float, float] = (0.7, 1.0)
    """Weights of style and subject in every row that does not say others."""
    density: float = 0.5
    """Share of the entries that the methods which thin out keep."""
    base: str = "pocket"
    """The base that learns and draws."""
    train_steps: int | None = None
    """Optimizer steps of each adapter; the family's default if unset."""
    steps: int | None = None
    """Steps of the sampler; the family's default if unset."""
    seed: int = 7
    """Of the training and of the pictures."""
    work: Path = Path(".cache/mixing_sheets")
    """Folder that keeps the adapters; what it holds is not learned again, and refused if other code learned it."""
    sheets: Path = Path("docs")
    """Folder for mixing-STYLE-SUBJECT.png."""
    jobs: int = 2
    """Processes that learn and draw side by side, each with one thread."""
    limit_kib: int = 390
    """A sheet's largest size; its palette is reduced until it fits."""


@dataclass(frozen=True)
class Pair:
    """A style (A) and a subject (B) on a base. name: what the subject is called in prompts."""

    base: Base
    style: Path
    subject: Path
    name: str
    weights: tuple[float, float]
    density: float

    def adapters(self, a: Any = None, b: Any = None) -> tuple[Adapter, Adapter]:
        """Both with these weights, or the usual ones."""
        weights = (self.weights[0] if a is None else a, self.weights[1] if b is None else b)
        return Adapter(self.style, weights[0], "A"), Adapter(self.subject, weights[1], "B")


@dataclass(frozen=True)
class Row:
    """One way to mix. settings: what the JSON says of it. applied: the context to draw in."""

    label: str
    settings: Mapping[str, Any]
    applied: Callable[[], AbstractContextManager[Any]]


def rows_of(pair: Pair) -> list[Row]:
    """Every way, from the base to the merging methods."""
    (a, b), base = pair.weights, pair.base
    rows = [
        Row("base", {}, nullcontext),
        _summed(pair, "A alone", 1.0, 0.0),
        _summed(pair, "B alone", 0.0, 1.0),
        _summed(pair, f"sum {a:g} A + {b:g} B", a, b),
        _summed(pair, "sum 1 A + 1 B", 1.0, 1.0),
        _summed(pair, "sum 0.5 A + 0.5 B", 0.5, 0.5),
        _guided(pair, "A alone, guided", 1.0, 0.0),
        _guided(pair, f"{a:g} A guided + {b:g} B", a, b),
    ]
    early, late = {"down": 0.2, "mid": 0.2}, {"up": 0.5}
    told = {"A": {"weight": 1.0, "blocks": early}, "B": {"weight": b, "blocks": late}}
    mixed = pair.adapters(Blocks(1.0, early), Blocks(b, late))
    rows.append(Row("blocks: A in up, B in down", told, lambda: compose(base, *mixed)))

    ramp = ((0.0, 0.0), (0.4, 1.0))
    rows += [
        Row("steps: A from 0 to 1", {"A": {"over_steps": ramp}, "B": b}, lambda: _stepped(pair, None, A=Ramp(*ramp))),
        Row(
            "switch every 2 steps",
            {"A": 1.0, "B": 1.0, "switch": 2},
            lambda: _stepped(pair, Switch(("A", "B"), every=2)),
        ),
    ]
    box = (0.0, 0.0, 0.5, 1.0)
    style, subject = pair.adapters()
    rows += [
        Row(
            "region: B left",
            {"A": a, "B": {"weight": b, "region": box, "prompt": pair.name}},
            lambda: _both(compose(base, style), regions(base, Region(box, subject, prompt=pair.name))),
        ),
        Row("composite", {"A": 1.0, "B": 1.0, "composite": True}, lambda: composite(base, *pair.adapters(1.0, 1.0))),
    ]
    return rows + [_merged(pair, method) for method in METHODS if method != "linear"]  # linear is the sum


def _summed(pair: Pair, label: str, a: float, b: float) -> Row:
    return Row(label, {"A": a, "B": b}, lambda: compose(pair.base, *pair.adapters(a, b)))


def _guided(pair: Pair, label: str, a: float, b: float) -> Row:
    """The style under adapter guidance, the subject in both predictions, as `sfumato generate` draws their files."""

    @contextmanager
    def applied() -> Iterator[None]:
        guidance = pair.base.defaults.guidance
        with (
            compose(pair.base, *pair.adapters(a, b)) as mix,
            adapter_guidance(mix, {"A": STRENGTH}, guidance=guidance),
        ):
            yield

    return Row(label, {"A": {"weight": a, "adapter_guidance": STRENGTH}, "B": b}, applied)


def _merged(pair: Pair, method: str) -> Row:
    told = {"A": pair.weights[0], "B": pair.weights[1], "method": method}
    if method != "np-lora":
        told["density"] = pair.density
    to = MethodSettings(density=pair.density)
    return Row(method, told, lambda: by_method(pair.base, *pair.adapters(), method=method, settings=to))


def _stepped(pair: Pair, switch: Switch | None, **ways: Ramp) -> AbstractContextManager[Any]:
    mix = compose(pair.base, *pair.adapters(1.0, pair.weights[1] if ways else 1.0), way="live")
    return _both(mix, over_steps(mix, switch, **ways))


def _both(first: AbstractContextManager[Any], second: AbstractContextManager[Any]) -> AbstractContextManager[Any]:
    stack = ExitStack()
    stack.enter_context(first)
    try:
        stack.enter_context(second)
    except BaseException:
        stack.close()
        raise
    return stack


@cache
def _base(name: str) -> Base:
    return load_base(name, precision=decide("fp32"))


def make_sheets(config: Config) -> dict[str, Any]:
    """Learn what is not there, draw all sheets; returns the report."""
    began = time.perf_counter()
    styles = {folder.name: folder for folder in config.styles}
    if config.blueprint:
        styles["blueprint"] = _blueprint(config)
    subjects = {folder.name: folder for folder in config.subjects}
    folders = styles | subjects
    adapters = dict(zip(folders, _shared(config, _learn, list(folders.items())), strict=True))
    drawing = time.perf_counter()
    sheets = _shared(config, _draw_sheet, [(a, adapters[a], b, adapters[b]) for a in styles for b in subjects])
    defaults = _base(config.base).defaults
    return {
        "base": _base(config.base).name,
        "sampler_steps": config.steps or defaults.sampling_steps,
        "guidance": defaults.guidance,
        "train_steps": config.train_steps or defaults.steps,
        "seconds_learning": round(drawing - began, 1),
        "seconds_drawing": round(time.perf_counter() - drawing, 1),
        "sheets": sheets,
    }


def _shared(config: Config, work: Callable[..., Any], items: Sequence[tuple[Any, ...]]) -> list[Any]:
    """What `work` makes of each item, in as many processes as the config says."""
    if config.jobs == 1:
        return [work(config, *item) for item in items]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(config.jobs, context, torch.set_num_threads, (1,)) as pool:
        return [future.result() for future in [pool.submit(work, config, *item) for item in items]]


def _blueprint(config: Config) -> Path:
    """The first style's pictures as white lines on blue, in the work folder."""
    folder = config.work / "blueprint-pictures"
    for file in _pictures(config.styles[0]).values():
        drawn = ImageOps.autocontrast(ImageOps.grayscale(open_image(file)))
        with atomic_path(folder / file.name) as temporary:
            ImageOps.colorize(drawn, black="white", white=(20, 60, 130)).save(temporary, format="PNG")
    return folder


def _pictures(folder: Path) -> dict[str, Path]:
    found = {path.name: path for path in sorted(folder.glob("*.png"))}
    if not found:
        raise ConfigError(f"{folder}: no .png is in this folder; name one with --styles or --subjects.")
    return found


def _options(config: Config) -> list[str]:
    return ["--seed", str(config.seed), *(["--steps", str(config.train_steps)] if config.train_steps else [])]


def _learn(config: Config, name: str, folder: Path) -> Path:
    """The adapter of a style, or of a subject, whose captions name it."""
    workshop = Workshop(config.work, config.base, _base(config.base))
    recipe, captions, options = "lora-style.toml", {}, _options(config)
    if folder in config.subjects:
        recipe, captions = "lora-subject.toml", _captions(folder)
        options += ["--trigger", _called(captions, folder)]
    return workshop.learn(name, "lora", recipe, _pictures(folder), captions, options).files[0]


def _captions(folder: Path) -> dict[str, str]:
    found = {}
    for file, path in _pictures(folder).items():
        try:
            found[file] = path.with_suffix(".txt").read_text("utf-8").strip()
        except OSError:
            raise ConfigError(f"{path}: there is no caption {path.stem}.txt beside it; write SUBJECT, ....") from None
    return found


def _called(captions: Mapping[str, str], folder: Path) -> str:
    """What the subject is called: what its captions say before the first comma."""
    names = {caption.partition(",")[0].strip() for caption in captions.values()}
    if len(names) != 1:
        raise ConfigError(f"{folder}: captions call the subject {', '.join(sorted(names))}; give it one name.")
    return names.pop()


def _draw_sheet(config: Config, style: str, style_file: Path, subject: str, subject_file: Path) -> dict[str, Any]:
    """All rows from the same seeds; the sheet's part of the report."""
    folder = next(folder for folder in config.subjects if folder.name == subject)
    name = _called(_captions(folder), folder)
    pair = Pair(_base(config.base), style_file, subject_file, name, config.weights, config.density)
    prompts = [name, name, ELSE]
    seeds = [config.seed + place for place in range(len(prompts))]
    rows = rows_of(pair)
    pictures = []
    for row in rows:
        with row.applied():
            pictures.append(draw(pair.base, prompts, seeds, steps=config.steps))
    sheet = contact_sheet(
        pictures,
        row_labels=[row.label for row in rows],
        column_labels=prompts,
        title=f"A: {style}. B: {subject}.",
    )
    path = config.sheets / f"mixing-{style}-{subject}.png"
    colours = save_small(sheet, path, config.limit_kib * 1024)
    print(json.dumps({"drawn": path.name}), file=sys.stderr, flush=True)
    return {
        "file": path.name,
        "kib": round(path.stat().st_size / 1024, 1),
        "colours": colours,
        "style": style,
        "subject": subject,
        "columns": [{"prompt": prompt, "seed": seed} for prompt, seed in zip(prompts, seeds, strict=True)],
        "rows": [{"label": row.label, **row.settings} for row in rows],
    }


def save_small(sheet: Image.Image, path: Path, limit: int) -> int:
    """Write the sheet as a PNG of at most `limit` bytes, with the largest palette that fits; returns its colours."""
    for colours in COLOURS:
        held = io.BytesIO()
        sheet.quantize(colours, dither=Image.Dither.NONE).save(held, format="PNG", optimize=True)
        if held.tell() <= limit:
            with atomic_path(path) as temporary:
                temporary.write_bytes(held.getvalue())
            return colours
    raise ConfigError(f"{path.name}: {held.tell()} bytes in {COLOURS[-1]} colours; give a --limit-kib above that.")


def main(argv: Sequence[str]) -> None:
    """Run the program; prints JSON."""
    print_report(Config, make_sheets, argv, "bench.mixing_sheets")


if __name__ == "__main__":
    cli.run(main)
