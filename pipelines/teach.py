"""Teach a base model a style, a subject or a word from pictures and a name; everything else is decided, and said."""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sfumato import cli
from sfumato.config import TypedConfig, parse
from sfumato.errors import BaseModelError, ConfigError, DataError, RunError
from sfumato.training.teach import lesson as lessons
from sfumato.training.teach import plan as plans
from sfumato.training.teach.lesson import Lesson, Named
from sfumato.utils.formatting import escape_control, format_list, join_command, pluralize, quote_argument

if TYPE_CHECKING:
    from sfumato.data.checks.report import Report

CAPTIONERS = (
    "florence-community/Florence-2-base",
    "florence-community/Florence-2-large",
    "Salesforce/blip-image-captioning-base",
    "Salesforce/blip-image-captioning-large",
)
"""Captioning models that are used unasked, for a style whose pictures are called by numbers, if one is on this
machine."""
_OF_CAPTIONS = ("caption missing", "caption says nothing")
"""What `check` finds and `teach` sees to."""
_MOST_FINDINGS = 6
"""Of `check` that are told."""


@dataclass(frozen=True)
class Config(TypedConfig):
    """Teach a base model a style, a subject or a word from a folder of pictures. Everything but the pictures, the name
    and the base model is decided, and said before it begins. The same command again goes on after an interruption.

    Example: sfumato teach datasets/line-style "line style"
    """

    photos: Path
    """Folder of pictures, or a dataset.toml."""
    name: str
    """What it is called: "line style" for a style, "dog" or "zwx dog" for a subject, `<dog>` for a new word."""
    _: KW_ONLY
    base: str = "pocket"
    """Base model: pocket, a hub id, a diffusers folder, or a single .safetensors checkpoint."""
    style: bool = False
    """The pictures show one style. Unset: told from the name, the captions and the files' names."""
    subject: bool = False
    """The pictures show one subject."""
    word: bool = False
    """Learn a new word (textual inversion) and no adapter: the smallest file, and the weakest likeness."""
    captioner: str | None = None
    """Model that writes captions for copies of the pictures that have none, a folder or hub id, as for sfumato caption.
    Unset: plain captions from names; for a style whose files are called by numbers, a model that is in the hub's
    cache."""
    output: Path | None = None
    """Folder for what is learned. Unset: runs/NAME."""
    overwrite: bool = False
    """Begin anew in a folder in which something else was taught."""
    seed: int = 7
    """Seed of everything random."""
    steps: int | None = None
    """Number of optimizer steps. Unset: the recipe's and the base family's."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base model."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts: noise (epsilon) or v. Set it where its file does not say."""
    zero_terminal_snr: bool = False
    """The base model's last timestep is pure noise (zero terminal SNR). Set it where its files do not say."""
    dry_run: bool = False
    """Say what is decided and what it takes, and train nothing."""
    measure: bool = True
    """Make a few steps first, of which nothing is kept, to say how long all will take."""
    sheet: bool = True
    """Draw the sheet at the end."""


@dataclass(frozen=True)
class Plan:
    """All that was decided. captions: what they are, for the person. captioner: the model that writes some, if one
    does. words: of the training. prompts: of the sheet."""

    config: Config
    lesson: Lesson
    recipe: plans.Recipe
    output: Path
    captions: str
    captioner: str | None
    words: tuple[str, ...]
    prompts: tuple[str, ...]
    record: plans.Record

    @property
    def copies(self) -> Path | None:
        """The folder of copies of the pictures, beside which captions are written; None where there are enough."""
        return self.output / "pictures" if self.captioner else None

    @property
    def again(self) -> str:
        """The command that goes on with it."""
        given = self.config
        words = ["teach", str(given.photos), given.name]
        words += [*base_words(given), *([] if given.output is None else ["--output", str(given.output)])]
        words += [f"--{self.lesson.kind}"] if given.style or given.subject or given.word else []
        words += [] if given.captioner is None else ["--captioner", given.captioner]
        words += [] if given.seed == Config.seed else ["--seed", str(given.seed)]
        words += [] if given.steps is None else ["--steps", str(given.steps)]
        words += [] if given.precision == "auto" else ["--precision", given.precision]
        return f"{plans.program_word()} {join_command(words)}"


def teach(config: Config) -> Path:
    """Look, decide, say, train, draw the sheet. Returns the file of what was learned."""
    report, pictures = look(config)
    say_findings(config, report)
    plan = plan_of(config, report, pictures)
    if (learned := taught_already(plan)) is not None:
        say(f"\n{config.name} is taught already; --overwrite begins anew.")
        return finish(plan, learned)
    goes_on = begun(plan.output) and not config.overwrite
    costs = plans.costs_of(plan.lesson, plan.recipe, config.base, config.prediction_type, copied_bytes(plan, report))
    explain(plan, costs, plans.require_room(plan.output, costs), goes_on=goes_on)
    if config.dry_run and plan.copies:
        say("time     not measured: the captions are not written yet")
        return plan.output
    if plan.copies:
        write_captions(plan, report, pictures)
    if not goes_on:
        plan.output.parent.mkdir(parents=True, exist_ok=True)
        if config.measure or config.dry_run:
            measure(plan)
        if config.dry_run:
            return plan.output
        plan.output.mkdir(exist_ok=True)
        plan.record.write(plan.output)
    options = ["--resume"] if goes_on else ["--overwrite"] if config.overwrite else []
    if code := run_to_its_end([*plan.words, *options]):  # which has said why
        if begun(plan.output):
            print(f"sfumato: what is learned so far is kept; this goes on: {plan.again}", file=sys.stderr)
        raise SystemExit(code)
    learned = learned_in(plan.output)
    if learned is None:
        raise RunError(f"{plan.output}: the training ended without a file; see its lines above.")
    return finish(plan, learned)


def run_to_its_end(words: Sequence[str]) -> int:
    """The exit code of a command of sfumato, also where it is a signal's, after which a training has saved."""
    try:
        return cli.main(words)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 0 if end.code is None else 2


def say(line: str) -> None:
    """One or more lines for the person."""
    if line:
        print(escape_lines(line), flush=True)


def escape_lines(text: str) -> str:
    """Names of files and captions in it as a terminal may show them."""
    return "\n".join(map(escape_control, text.split("\n")))


# --- looking and deciding --------------------------------------------------------------------------------------------


def look(config: Config) -> tuple[Report, list[Named]]:
    """What `check` finds, and the pictures in words. Raises DataError where pictures cannot be learned from."""
    from sfumato.data.checks.report import check
    from sfumato.models.family import read_requirements

    if sum((config.style, config.subject, config.word)) > 1:
        raise ConfigError("--style, --subject and --word: give one of them.")
    if config.steps is not None and config.steps < 1:
        raise ConfigError(f"--steps is {config.steps}; it must be at least 1.")
    lessons.slug_of(config.name)
    try:
        needs = read_requirements(config.base, config.prediction_type)
    except BaseModelError:
        from sfumato.models.loading import base_skeleton

        base_skeleton(config.base, prediction_type=config.prediction_type)  # fetches a hub id's configs, or says why
        needs = read_requirements(config.base, config.prediction_type)
    report = check(config.photos, needs)
    if stops := [line.text for line in report.lines if line.stops and line.kind not in _OF_CAPTIONS]:
        photos = quote_argument(str(config.photos))
        raise DataError(
            f"{stops[0]} ({len(stops)} such in all; sfumato check {photos} lists them, and sfumato check {photos} "
            "--fix NEW writes a copy without them)"
        )
    captions = zip(report.examples, report.captioned, strict=True)
    texts = ["\n".join(example.captions) if captioned else "" for example, captioned in captions]
    return report, lessons.named_pictures(texts, [example.path.stem for example in report.examples])


def say_findings(config: Config, report: Report) -> None:
    """Say what there is to look at."""
    lines = [line.text for line in report.lines if line.kind not in _OF_CAPTIONS]
    found = pluralize(len(report.looks), "picture")
    say(f"pictures {found} in {config.photos}, learned at {report.resolution} px for {report.needs.name}")
    for line in lines[:_MOST_FINDINGS]:
        say(f"         {line}")
    if (more := len(lines) - _MOST_FINDINGS) > 0:
        say(f"         and {more} more; sfumato check {quote_argument(str(config.photos))} lists them")


def decide(config: Config, pictures: Sequence[Named]) -> Lesson:
    """The lesson; on a terminal the person is asked where it cannot be told. Raises ConfigError elsewhere."""
    said = next((kind for kind in ("style", "subject", "word") if getattr(config, kind)), None)
    found = lessons.lesson_of(config.name, pictures, said)  # type: ignore[arg-type]
    if found is None and sys.stdin is not None and sys.stdin.isatty() and sys.stderr.isatty():
        say(lessons.unsure(config.name, pictures))
        answer = input("style, subject or word? ").strip().lower()
        said = next((kind for kind in ("style", "subject", "word") if answer and kind.startswith(answer)), None)
        found = lessons.lesson_of(config.name, pictures, said)  # type: ignore[arg-type]
    if found is None:
        raise ConfigError(lessons.unsure(config.name, pictures))
    return found


def plan_of(config: Config, report: Report, pictures: Sequence[Named]) -> Plan:
    """Everything that is decided. Raises ConfigError and DataError where something cannot be."""
    lesson = decide(config, pictures)
    from sfumato.utils.text_files import read_toml

    output = config.output or Path("runs") / lesson.slug
    captions = [each.caption for each in pictures]
    own = lessons.own_identifier(lesson, pictures) if lesson.kind == "subject" else ""
    if own:
        lesson = Lesson(lesson.kind, lesson.name, lesson.reason, f"{own} {lesson.of_class}", lesson.of_class)
    captioner = captioner_of(config, lesson, pictures)
    images, by = config.photos, ""
    if captioner:
        images, by = output / "pictures", f"by {captioner}, in copies of the pictures in {output / 'pictures'}; "
        form = "{caption}" if lesson.kind == "style" else f"{lesson.trigger}, {{caption}}"
        captions = [caption or form.format(caption="...") for caption in captions]
    recipe = plans.recipe_of(lesson, captions)
    file = cli.source(f"sfumato.trainers.{recipe[0]}").parent / "configs" / recipe[1]
    words, told = plans.training_words(lesson, shown(file), images, output, captions, options_of(config))
    kept = [str(each) for each in read_toml(file).get("prior_prompts", [])]  # which training sees, too
    trained = [each.text if lesson.kind == "style" else each.caption or lesson.trigger for each in pictures]
    prompts = lessons.unseen_prompts(lesson, trained, config.base, kept)
    if lesson.kind == "word":  # which changes no other prompt
        prompts = [prompt for prompt in prompts if lesson.trigger in prompt]
    record = plans.Record.of(config.name, words, report)
    return Plan(config, lesson, recipe, output, by + told, captioner, tuple(words), tuple(prompts), record)


def shown(file: Path) -> str:
    """The path of the file as a person would type it here."""
    here = Path.cwd()
    return str(file.relative_to(here) if file.is_relative_to(here) else file)


def base_words(config: Config) -> list[str]:
    """The options that name the base model."""
    kind = config.prediction_type
    ends = ["--zero-terminal-snr"] if config.zero_terminal_snr else []
    return ["--base", config.base, *(["--prediction-type", kind] if kind else []), *ends]


def options_of(config: Config) -> list[str]:
    """The options that every training has."""
    words = [*base_words(config), "--seed", str(config.seed)]
    words += [] if config.precision == "auto" else ["--precision", config.precision]
    return words if config.steps is None else [*words, "--steps", str(config.steps)]


# --- captions --------------------------------------------------------------------------------------------------------


def captioner_of(config: Config, lesson: Lesson, pictures: Sequence[Named]) -> str | None:
    """The model that writes captions; None where they are there, or plain ones do."""
    if config.captioner and lesson.kind == "word":
        raise ConfigError("--captioner: a new word is learned from captions that you wrote, or alone; leave it out.")
    if all(each.caption for each in pictures):
        return None
    silent = [each for each in pictures if not each.text]
    if config.captioner or lesson.kind != "style" or not silent:
        return config.captioner
    if found := next(filter(cached, CAPTIONERS), None):
        return found
    raise DataError(
        f"{config.photos}: {pluralize(len(silent), 'picture has', 'pictures have')} no caption and a number for a "
        f"name; a style wants to know what each shows. Pass --captioner {CAPTIONERS[0]}, or name the files."
    )


def cached(model: str) -> bool:
    """Whether the hub's cache on this machine has the model."""
    from huggingface_hub import try_to_load_from_cache

    return isinstance(try_to_load_from_cache(model, "config.json"), str)


def write_captions(plan: Plan, report: Report, pictures: Sequence[Named]) -> None:
    """Copy the pictures beside what is learned, each with its caption; the person's own folder stays as it is."""
    from sfumato.data.captioners import CaptionSettings, load_captioner
    from sfumato.data.images import open_image
    from sfumato.precision import decide
    from sfumato.utils.atomic import write_text

    folder, captioner = plan.copies, plan.captioner
    assert folder is not None
    assert captioner is not None
    folder.mkdir(parents=True, exist_ok=True)
    describe = None
    for place, (example, named) in enumerate(zip(report.examples, pictures, strict=True)):
        stem = f"{place:03d}-{example.path.stem}"
        caption_file = folder / f"{stem}.txt"
        if caption_file.exists():  # of an interrupted one; the caption is written last
            continue
        caption = named.caption
        if not caption:
            describe = describe or load_captioner(captioner, decide(plan.config.precision), CaptionSettings())
            (caption,) = describe([open_image(example.path)])
            caption = caption if plan.lesson.kind == "style" else f"{plan.lesson.trigger}, {caption}"
        shutil.copyfile(example.path, folder / f"{stem}{example.path.suffix}")
        write_text(caption_file, f"{caption}\n")
        say(f"caption  {example.path.name}: {caption}")


def copied_bytes(plan: Plan, report: Report) -> int:
    """Of the pictures, where they are copied."""
    return sum(example.path.stat().st_size for example in report.examples) if plan.copies else 0


# --- saying, measuring, ending ---------------------------------------------------------------------------------------


def explain(plan: Plan, costs: plans.Costs, free: int, *, goes_on: bool) -> None:
    """Say what was decided, and what it takes."""
    lesson = plan.lesson
    there = plans.memory_here(costs.device)
    of = f" of {plans.size(there)}" if there else ""
    tight = " A step that does not fit is computed in smaller parts." if there and costs.memory > there else ""
    where = "the GPU" if costs.device == "gpu" else "main memory"
    say(f"kind     a {lesson.kind}: {lesson.reason}")
    if lesson.trigger:
        say(f'prompt   "{lesson.trigger}" in a prompt calls it up')
    say(f"captions {plan.captions}; your folder stays as it is")
    say(f"recipe   {plan.recipe[0]} with {plan.recipe[1]}")
    say(f"memory   about {plans.size(costs.memory)}{of} of {where} at the peak.{tight}")
    say(f"disk     about {plans.size(costs.disk)} in {plan.output}; {plans.size(free)} are free")
    if goes_on:
        say(f"again    goes on with what was stopped in {plan.output}")
    say(f"\n$ {plans.program_word()} {join_command(plan.words)}\n")


def measure(plan: Plan) -> None:
    """Make the training's first steps, keep nothing of them but what they saw, and say how long all will take."""
    said = io.StringIO()
    words = [*plan.words, "--dry-run", *(["--overwrite"] if plan.config.overwrite else [])]
    if plan.config.base == "pocket":  # seconds; of larger bases one wants to see that it goes on
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = cli.main(words)
    else:
        code = cli.main(words)
    if code:
        say(next((line for line in reversed(said.getvalue().splitlines()) if line.startswith("sfumato: ")), ""))
        raise SystemExit(code)
    for line in measured_lines(said.getvalue()):
        say(line)
    if (seen := plan.output.parent / f"{plan.output.name}.dry-run.png").is_file():
        if not plan.config.dry_run:
            plan.output.mkdir(exist_ok=True)
            seen = seen.replace(plan.output / "seen.png")
        say(f"seen     {seen}: pictures as training sees them, with their captions")


def measured_lines(said: str) -> Iterator[str]:
    """What a dry run says of the whole run's time."""
    for line in said.splitlines():
        if line.startswith("all "):
            yield f"time     {line.removeprefix('all').strip()}"
        if line.startswith("images ") and "passes" in line:
            yield f"         {line.removeprefix('images').strip()}"


def begun(output: Path) -> bool:
    """Whether a training in the folder has made steps."""
    from sfumato.runs.folder import has_progress, is_run

    return is_run(output) and has_progress(output)


def taught_already(plan: Plan) -> Path | None:
    """The file of what was learned in the folder, if the same was taught there to the end.

    Raises RunError where something else was taught there, or the pictures or settings have changed since.
    """
    if plan.config.overwrite or not begun(plan.output):
        return None
    before = plans.Record.read(plan.output)
    if before is None:
        raise RunError(f"{plan.output} holds a training that `sfumato teach` did not begin; give another --output.")
    if changed := before.changes(plan.record):
        raise RunError(
            f'{plan.output}: "{before.name}" was taught there otherwise ({changed}); --overwrite begins anew, or give '
            "another --output."
        )
    return learned_in(plan.output)


def learned_in(output: Path) -> Path | None:
    """The file that the training in the folder ended with; None if it has not ended. Raises RunError while another
    program trains there."""
    from sfumato.runs.reporting.overview import read_overview

    found = read_overview(output)
    if found.state == "running":
        raise RunError(f"{output}: another program is teaching it right now; wait for it, or give another --output.")
    return found.learned


def finish(plan: Plan, learned: Path) -> Path:
    """Draw the sheet, and say what there is and what to do with it."""
    lesson, base = plan.lesson, [] if plan.config.base == "pocket" else base_words(plan.config)
    sheet = plans.sheet_file(lesson, plan.output)
    if plan.config.sheet and not sheet.is_file():
        words = plans.sheet_words(lesson, learned, plan.prompts, base, plan.output / "sheet.png")
        say(f"\n$ {plans.program_word()} {join_command(words)}\n")
        if code := cli.main(words):
            raise SystemExit(code)
    say(f"\n{lesson.kind:<9}{learned}")
    if sheet.is_file():
        columns = format_list(list(plan.prompts), 6)
        rows = "three seeds" if lesson.kind == "word" else "the base (weight 0), then weights 0.5, 0.75 and 1"
        say(f"sheet    {sheet}: rows are {rows}; columns are prompts it did not train: {columns}")
    others = [
        path
        for path in sorted(plan.output.parent.glob("*/*.safetensors"))
        if path.parent != plan.output and path.stem == path.parent.name and same_base(path.parent, plan.config.base)
    ]
    say("\nTry next:\n")
    for command in plans.next_commands(lesson, learned, plan.prompts, base, others):
        say(f"  {command}")
    load = "load_textual_inversion" if lesson.kind == "word" else "load_lora_weights"
    say(f'\nIn diffusers: pipeline.{load}("{learned.as_posix()}")')
    return learned


def same_base(folder: Path, base: str) -> bool:
    """Whether an adapter was taught in this folder, on the base of this name."""
    record = plans.Record.read(folder)
    if record is None or record.words[1:2] == ("textual_inversion",):
        return False
    words = record.words
    return "--base" in words and words[words.index("--base") + 1 :][:1] == (base,)


def main(argv: Sequence[str]) -> int:
    """Run the program with these arguments."""
    teach(parse(Config, argv, program="teach", first_may_be_config=False))
    return 0


if __name__ == "__main__":
    cli.run(main)
