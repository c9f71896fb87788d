"""Generate images with any base model and any mix of adapters. Each image file contains its settings."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import KW_ONLY, dataclass, replace
from os.path import isdir, isfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter

from sfumato.adapters.prompt_tags import TaggedPrompt, split_flags, split_tags
from sfumato.adapters.weights import Adapter, Span
from sfumato.cli import run
from sfumato.config import parse
from sfumato.errors import ConfigError
from sfumato.generation.arguments.adapters import (
    apply_block_weights,
    parse_adapter,
    parse_embedding,
    parse_strengths,
    parse_sweep,
    public_embedding,
    refuse_prompt_tags,
    resolve_tags,
)
from sfumato.generation.arguments.axes import CHECKS
from sfumato.generation.arguments.base import DrawingBaseOptions
from sfumato.generation.arguments.images import SUFFIXES, check_start, checked_flags, parse_size, picture_files
from sfumato.generation.arguments.schedules import Plan, parse_region, parse_steps, without_existing
from sfumato.generation.image_options import Hires, PictureRequest
from sfumato.generation.placement import AdapterPlacement, RegionSpec
from sfumato.models.prompts.files import read_prompts
from sfumato.models.prompts.syntax import Syntax, checked_syntax, negative_for
from sfumato.utils.formatting import pluralize, say
from sfumato.utils.limits import MAX_IMAGES_PER_SEED, checked_area

if TYPE_CHECKING:
    from sfumato.compose import Mix
    from sfumato.files.adapter_file import AdapterFile
    from sfumato.generation.draw import Start
    from sfumato.generation.session import DrawingSession, Drawn
    from sfumato.models import Base


@dataclass(frozen=True)
class Config(DrawingBaseOptions):
    """Generate images with any base model and any mix of adapters. Each image file contains its settings.

    Example: sfumato generate "a crab" --lora line.safetensors:0.8 --lora otter.safetensors:0.6 --seed 7 -o crab.png
    """

    prompts: tuple[str, ...] = ()
    """What to generate; several prompts give several images. `<lora:name:0.8>` in a prompt adds an adapter for that
    prompt alone. A prompt may end in settings of its own, written as in sd-scripts:
    `--n blurry --w 512 --h 768 --d 7 --s 20 --l 7`."""
    _: KW_ONLY
    lora: tuple[str, ...] = ()
    """Adapter and its weight: FILE:0.8, FILE:0.8:0.4 for U-Net and text encoders, or LABEL=FILE:0.8. Repeat the option
    to mix several. FILE may be on the hub: owner/name or owner/name/file.safetensors. FILE may also be a whole model;
    the weight is then the share of it that is mixed in."""
    blocks: tuple[str, ...] = ()
    """LABEL=down:0,up.1:1.2: multiply an adapter's weight by a factor for each block. A B-LoRA preset (b-lora-style,
    b-lora-content) or a block-weight list of the web interfaces works, too. Repeat the option for several adapters."""
    over_steps: tuple[str, ...] = ()
    """Change an adapter's weight over the sampling steps, from 0 (noise) to 1 (finished image). LABEL=0:0,0.4:1 gives
    points PROGRESS:WEIGHT with straight lines between them. LABEL=0-0.5 uses its own weight in those steps and 0 in the
    others. LABEL may be the name in a tag. Unset: the steps that the adapter's file asks for, else all. Repeat the
    option for several adapters."""
    switch: int | None = None
    """Let the adapters take turns of this many steps each (LoRA-Switch)."""
    region: tuple[str, ...] = ()
    """Where in the image an adapter counts: LABEL=left, right, top or bottom, a box left,top,right,bottom in shares of
    the side, or an image file that is white there. LABEL=left:an otter gives that region its own prompt.
    LABEL+LABEL=left puts two adapters into one region. Repeat the option for several regions."""
    lora_folder: Path = Path(".")
    """Folder with the adapters of `<lora:...>` tags, at any depth."""
    seed: tuple[int, ...] = (0,)
    """Seed of the noise; every prompt is generated with every seed. Repeat the option for several."""
    count: int = 1
    """Number of images from each seed on: --seed 7 --count 3 takes the seeds 7, 8 and 9."""
    output: Annotated[Path, Parameter(alias="-o")] = Path("pictures")
    """Where to save: a .png (or .jpg, .webp) file for one image or one sheet, a folder for several images."""
    overwrite: bool = False
    """Replace images that exist. Otherwise they are an error before anything is generated."""
    skip_existing: bool = False
    """Leave images that exist as they are, whatever their settings, and generate the others: with it the same command
    goes on after an interruption."""
    prompts_file: Path | None = None
    """Text file with one prompt on each line. Empty lines and lines that begin with # are skipped. Or a .toml or .json
    of prompts, as sd-scripts has them."""
    sweep: str | None = None
    """LABEL=0,0.5,1: generate a sheet with a row for each weight of that adapter and a column for each prompt and seed.
    If the adapter has two weights, the one of the text encoders changes in proportion. New words, and a negative prompt
    that an adapter's file asks for, are the same in all rows."""
    before_after: bool = False
    """Generate a sheet that compares images without and with the adapters, from the same noise: a row for each prompt
    and seed. New words, and a negative prompt that an adapter's file asks for, are the same in both."""
    embedding: tuple[str, ...] = ()
    """Load a textual inversion embedding, a new word for prompts: FILE or TOKEN=FILE, local or on the hub. Repeat the
    option for several."""
    image: Path | None = None
    """Image to start from instead of noise (img2img). Without --size the result has its proportions."""
    strength: float | None = None
    """How much of --image is redrawn (denoising strength), above 0 to 1. Unset: 0.6; with --mask and an inpainting base
    model 1."""
    mask: Path | None = None
    """Image that is white where --image is to be redrawn (inpainting). The rest stays the same to the pixel, at the
    size of the result. Any base model can; an inpainting one also sees the rest, and draws what fits to it."""
    hires: float | None = None
    """Enlarge each image by this factor and redraw it in part (hires fix): the composition is that of --size, the
    detail that of the larger size. 2 is usual."""
    hires_strength: float | None = None
    """How much of the enlarged image is redrawn (denoising strength), above 0 to 1. Unset: 0.4."""
    hires_steps: int | None = None
    """Number of sampling steps of the enlarged image. Unset: as many as --steps."""
    prompt_syntax: Syntax = "plain"
    """Syntax for weighted words and prompts of any length (pip install "sfumato[prompts]"). a1111 reads (words:1.3),
    and words that change between the steps: [crab:otter:0.4] and [crab|otter]. compel reads (words)1.3."""
    negative: str | None = None
    """Negative prompt: what the images should not show; "" gives none. Unset: what an adapter's file asks for, else
    none. A subject's file may ask for the subject's own words, if the prompt says more than these (train
    --own-negative)."""
    steps: int | None = None
    """Number of sampling steps. Unset: the base family's default."""
    guidance: float | None = None
    """Guidance scale (CFG scale): how strongly the prompt is followed. Unset: the base family's default."""
    adapter_guidance: tuple[str, ...] = ()
    """Adapter guidance: how often an adapter's change of the U-Net counts; 2, or LABEL=2 for one adapter. Above 0 the
    adapter is active only in the prediction for the prompt, where guidance multiplies it, so that a smaller weight
    gives more of a style with fewer mistakes. 0: the adapter is active in both predictions, as in other programs.
    Unset: what the file asks for (2 for styles made by sfumato), else 0."""
    size: str | None = None
    """Size in pixels: WIDTHxHEIGHT, or one number for a square. Unset: the size that the base model was trained on."""
    sampler: str | None = None
    """Sampler: ddim, euler, euler a, dpm++ 2m, dpm++ 2m karras, unipc, heun, lms, pndm, lcm, ... Unset: the base
    family's default."""
    verify: bool = False
    """Refuse adapters whose weights do not match the fingerprint in their file, or whose file has none."""
    partial: bool = False
    """Apply the part of an adapter that fits if the rest does not."""


def plan(config: Config) -> Plan:
    """The images, adapters and files that the config asks for. Raises ConfigError, one line, for what is impossible."""
    given_prompts = _prompts(config)
    _check_settings(config)
    is_sheet = config.sweep is not None or config.before_after
    prompts = [_read_prompt(config, text, is_sheet=is_sheet) for text in given_prompts]
    tagged_texts = [prompt.text for prompt in prompts]
    given = apply_block_weights([parse_adapter(spec) for spec in config.lora], config.blocks)
    regions = _regions(config, given, tagged_texts)
    regional = {each.label for region in regions for each in region.adapters}
    everywhere = [each for each in given if each.label not in regional]
    if not isdir(config.lora_folder):
        raise ConfigError(f"--lora-folder {config.lora_folder}: no such folder; name the one with the tags' adapters.")
    adapters, weights = resolve_tags(everywhere, tagged_texts, config.lora_folder)
    tagged = [each.label for each in adapters[len(everywhere) :]]
    placement = _placement(config, regions, [each.label for each in everywhere], sorted(regional), tagged)
    strengths = parse_strengths(config.adapter_guidance, [adapter.label for adapter in adapters])
    pictures = tuple(
        PictureRequest(prompt.text.prompt, seed, of_tags, prompt.overrides)
        for prompt, of_tags in zip(prompts, weights, strict=True)
        for seed in prompt.seeds
    )
    sweep = _sweep(config, adapters, placement, has_tags=any(weights))
    if config.before_after and not (adapters or regions):
        raise ConfigError("--before-after: there is no adapter to draw with; give --lora, or <lora:...> in a prompt.")
    check_start(config.image, config.mask, config.strength)
    hires = _hires(config)
    embeddings = tuple(parse_embedding(spec) for spec in config.embedding)
    if config.overwrite and config.skip_existing:
        raise ConfigError("--overwrite and --skip-existing: images that exist are replaced or left; give one of them.")
    may_exist = config.overwrite or config.skip_existing
    files = picture_files(config.output, pictures, is_sheet=is_sheet, may_exist=may_exist, given=config.prompts)
    size = None if config.size is None else parse_size(config.size)
    negative = config.negative or ""
    return Plan(pictures, negative, adapters, strengths, embeddings, size, hires, files, sweep, placement)


def _hires(config: Config) -> Hires | None:
    """The second pass. Raises ConfigError, also for what does not go with it."""
    if config.hires is None:
        if config.hires_strength is not None or config.hires_steps is not None:
            name = "steps" if config.hires_strength is None else "strength"
            raise ConfigError(f"--hires-{name}: there is no second pass; give --hires 2, too.")
        return None
    if config.image is not None:
        raise ConfigError("--hires and --image do not go together: --image is enlarged by a larger --size.")
    strength = Hires.strength if config.hires_strength is None else config.hires_strength
    try:
        return Hires(config.hires, strength, config.hires_steps)
    except ConfigError as error:  # which names scale, strength or steps
        raise ConfigError(f"--hires-{error}".replace("--hires-scale", "--hires")) from None


def _prompts(config: Config) -> list[str]:
    """All prompts as they are written. Raises ConfigError if there are none, or if one is the name of an image or text
    file."""
    prompts = [*config.prompts, *(read_prompts(config.prompts_file, "--prompts-file") if config.prompts_file else ())]
    if not prompts:
        raise ConfigError('there is no prompt; say what to draw: sfumato generate "a crab" -o crab.png')
    if mistaken := [text for text in prompts if text.lower().endswith(SUFFIXES) and isfile(text)]:
        raise ConfigError(
            f"{mistaken[0]}: an image, and no prompt. sfumato inspect {mistaken[0]} tells the command that draws it "
            "again; --image begins from it."
        )
    if config.lora and (mistaken := [text for text in config.prompts if re.fullmatch(r"-?\d*[.,]\d+", text)]):
        raise ConfigError(
            f"{mistaken[0]}: a number, and no prompt. A weight follows its file: --lora FILE:{mistaken[0]}"
        )
    if mistaken := [text for text in prompts if text.lower().endswith(".txt") and isfile(text)]:
        raise ConfigError(f"{mistaken[0]}: a file, and no prompt. --prompts-file {mistaken[0]} draws its lines.")
    return prompts


class _ReadPrompt(NamedTuple):
    """text: with the tags taken out of it. overrides: the settings in it, without its seed. seeds: of its images."""

    text: TaggedPrompt
    overrides: dict[str, Any]
    seeds: list[int]


def _read_prompt(config: Config, text: str, *, is_sheet: bool) -> _ReadPrompt:
    words, flags = split_flags(text)
    found, own = split_tags(words), checked_flags(flags, sheet=is_sheet)
    checked_syntax(found.prompt, config.prompt_syntax)
    checked_syntax(own.get("negative", ""), config.prompt_syntax, is_negative=True)
    overrides = {name: value for name, value in own.items() if name != "seed"}
    return _ReadPrompt(found, overrides, _seeds(config, own))


def _check_settings(config: Config) -> None:
    if config.count < 1:
        raise ConfigError(f"--count {config.count}: wanted at least 1.")
    if config.count > MAX_IMAGES_PER_SEED:
        raise ConfigError(f"--count {config.count}: wanted at most {MAX_IMAGES_PER_SEED:,} from each seed.")
    for name in ("steps", "guidance", "sampler"):
        if (value := getattr(config, name)) is not None:
            CHECKS[name](value)
    refuse_prompt_tags(config.negative or "", "--negative")
    checked_syntax(config.negative or "", config.prompt_syntax, is_negative=True)


def _seeds(config: Config, own: Mapping[str, Any]) -> list[int]:
    """The seeds of one prompt's images. own: the settings in the prompt."""
    firsts = (own["seed"],) if "seed" in own else config.seed
    seeds = [first + number for first in firsts for number in range(config.count)]
    for seed in seeds:
        CHECKS["seed"](seed)
    return seeds


def _sweep(
    config: Config, adapters: Sequence[Adapter], placement: AdapterPlacement, *, has_tags: bool
) -> tuple[str, tuple[float, ...]] | None:
    """(label, weights) of --sweep. Raises ConfigError, also for what does not go with it."""
    if config.sweep is None:
        return None
    label = config.sweep.rpartition("=")[0]
    if label in {each.label for each in placement.regional}:
        raise ConfigError(f"--sweep {config.sweep}: {label} has a --region, and one weight there; leave one of them.")
    sweep = parse_sweep(config.sweep, adapters)
    if has_tags:
        raise ConfigError("--sweep and <lora:...> in a prompt do not go together; name the adapter with --lora.")
    if label in placement.ramps:
        raise ConfigError(f"--sweep {config.sweep}: --over-steps sets {label}'s weight at every step; leave one out.")
    if config.before_after:
        raise ConfigError("--before-after and --sweep are two sheets; ask for one of them.")
    return sweep


def _regions(config: Config, given: Sequence[Adapter], prompts: Sequence[TaggedPrompt]) -> tuple[RegionSpec, ...]:
    """The regions of --region. Raises ConfigError, also for what does not go with them."""
    regions = tuple(parse_region(text, given) for text in config.region)
    for region in regions:
        checked_syntax(region.prompt or "", config.prompt_syntax)
    if regions and config.adapter_guidance:
        raise ConfigError(
            "--adapter-guidance and --region do not go together: regions are in both predictions. Leave one out."
        )
    regional = {each.label for region in regions for each in region.adapters}
    if twice := [name for found in prompts for name, _ in found.adapters if name in regional]:
        raise ConfigError(f"<lora:{twice[0]}:...>: this adapter has a --region; name it with --lora alone.")
    return regions


def _placement(
    config: Config,
    regions: tuple[RegionSpec, ...],
    labels: Sequence[str],
    regional: Sequence[str],
    tagged: Sequence[str],
) -> AdapterPlacement:
    """What --region, --over-steps and --switch say. labels: adapters that count everywhere. regional: adapters in
    regions. tagged: adapters that are named in tags alone."""
    by_step = [parse_steps(text, [*labels, *tagged, *regional]) for text in config.over_steps]
    if going := [label for label, way in by_step if label in regional and not isinstance(way, Span)]:
        raise ConfigError(f"--over-steps {going[0]}: in a region an adapter has a span, such as {going[0]}=0-0.5.")
    names = [label for label, _ in by_step]
    if repeated := [label for label in names if names.count(label) > 1]:
        raise ConfigError(f"--over-steps names {repeated[0]} twice; give all its points in one.")
    turns = tuple(label for label in labels if label not in names) if config.switch is not None else ()
    if config.switch is not None and (config.switch < 1 or len(turns) < 2):
        raise ConfigError(
            f"--switch {config.switch}: wanted steps, 1 or more, and two --lora or more that take turns; {len(turns)} "
            "are without --region and --over-steps."
        )
    return AdapterPlacement(regions, dict(by_step), turns, config.switch, frozenset(tagged))


def generate(config: Config) -> tuple[Path, ...]:
    """Generate what the config asks for. Returns the files; each is complete and contains its settings."""
    wanted = plan(config)
    files = wanted.files
    if config.skip_existing:
        wanted = without_existing(wanted)
        if left := len(files) - len(wanted.files):
            say(f"left as found: {left} of {pluralize(len(files), 'image')}.")
        if not wanted.files:
            return files

    from sfumato.generation.draw import check_steps, check_strength
    from sfumato.generation.image_options import img2img_steps
    from sfumato.generation.metadata.png_info import check_size
    from sfumato.generation.notes import unguided_notes
    from sfumato.generation.session import DrawingSession
    from sfumato.generation.settings import sampler_label, save_with_settings
    from sfumato.utils import schedulers

    config = _with_asked_sampling(config, wanted)
    start = _start(config)
    base = config.load_base()
    if start is not None and start.mask is not None and base.inpaints and config.strength is None:
        start = replace(start, strength=1.0)
    settings = _settings(config, wanted, start, base)
    in_full = [{**settings, **picture.overrides} for picture in wanted.pictures]
    scheduler = schedulers.make_scheduler(config.sampler or base.defaults.sampler, base.scheduler.config)
    for to in (settings, *in_full):  # all, before the first is drawn
        checked_area(to["width"], to["height"])
        check_steps(to["steps"], scheduler)
        if wanted.hires is not None:
            checked_area(*wanted.hires.size(to["width"], to["height"]))
            check_steps(wanted.hires.scheduled_steps(to["steps"]), scheduler)
        if start is not None:
            check_strength(to["steps"], start)
    for to in in_full:
        wanted.placement.check_turns(img2img_steps(to["steps"], start))
    sampler = sampler_label(config.sampler, base)
    say(_summary(in_full, wanted.hires, sampler, base))
    asked = any(wanted.strengths.values())
    say(*unguided_notes((to["guidance"], to["negative"], asked) for to in in_full))
    with _mixed(base, wanted, config) as (mix, regional, words):
        settings, pictures, placement = _with_asked(config, wanted, mix, regional, settings)
        say(*_out_of_steps(config, placement, base, start, {to["steps"] for to in in_full}))
        allowed = {"partial": config.partial, "verify": config.verify}
        session = DrawingSession(base, mix, pictures, settings, start, wanted.hires, placement, allowed)
        for file, size in zip(wanted.files, session.sizes(wanted.sweep, before_after=config.before_after), strict=True):
            check_size(file, size)
        drawn = _drawn(session, wanted.sweep, before_after=config.before_after)
        for (picture, used, about), file in zip(drawn, wanted.files, strict=True):
            save_with_settings(picture, used, about, file, sampler, words)
            print(file)
    return files


def _with_asked_sampling(config: Config, wanted: Plan) -> Config:
    """The config with the sampling that an adapter's file asks for, if the adapter is in every image. Options win. Says
    which adapters ask for one, and which do not get it."""
    from sfumato.generation.adapter_files import apply_sampling, overridden_notes, requested_samplings

    given = {name: getattr(config, name) for name in ("sampler", "steps", "guidance")}
    if None not in given.values():
        return config
    asked = requested_samplings(each for each in wanted.adapters if each.label in wanted.counted)
    everywhere = {label: sampling for label, sampling in asked.items() if label in wanted.counted_in_all}
    for label in (each for each in asked if each not in everywhere):
        say(
            f"{label}: asks for {asked[label]}, but is not in every image. Generate the images with it apart, or give "
            "--sampler, --steps and --guidance."
        )
    if not everywhere:
        return config
    label, sampling = next(iter(everywhere.items()))
    say(
        f"{label}: asks for {sampling}; --sampler, --steps and --guidance come before that.",
        *overridden_notes(everywhere),
    )
    return replace(config, **apply_sampling(given, sampling))


def _out_of_steps(
    config: Config, placement: AdapterPlacement, base: Base, start: Start | None, steps: Iterable[int]
) -> list[str]:
    """What there is to say of adapters whose span holds no step. steps: how many each image has."""
    from sfumato.generation.image_options import img2img_steps
    from sfumato.generation.notes import empty_span_notes
    from sfumato.utils import schedulers

    spans = {label: way for label, way in placement.by_step.items() if isinstance(way, Span)}
    if not spans:
        return []
    scheduler = schedulers.make_scheduler(config.sampler or base.defaults.sampler, base.scheduler.config)
    timesteps = {}
    for count in sorted(steps):
        scheduler.set_timesteps(count)
        timesteps[count] = scheduler.timesteps.tolist()[(count - img2img_steps(count, start)) * scheduler.order :]
    return empty_span_notes(spans, timesteps, scheduler)


def _with_asked(
    config: Config, wanted: Plan, mix: Mix, regional: Mapping[str, AdapterFile], settings: Mapping[str, Any]
) -> tuple[dict[str, Any], Sequence[PictureRequest], AdapterPlacement]:
    """Settings, images and placement of the adapters, completed by what the adapters' files ask for. Options win. Says
    what regions leave out.

    regional: the files of adapters in regions, by label. settings: what all images share.
    """
    from sfumato.compose.guidance import strengths_of
    from sfumato.files.metadata import over_steps_of

    has_regions = bool(wanted.placement.regions)
    strengths = {} if has_regions else {**mix.strengths, **wanted.strengths}

    def with_strengths(to: Mapping[str, Any]) -> dict[str, Any]:
        return {**to, "adapter_guidance": strengths_of(mix, strengths, guidance=to["guidance"])}

    settings = with_strengths(settings)
    pictures = [
        replace(each, overrides=with_strengths(each.overrides)) if "guidance" in each.overrides else each
        for each in wanted.pictures
    ]
    if has_regions:
        _say_unheard(_told(wanted, mix, regional))
    if config.negative is None:
        pictures = _against(pictures, mix, wanted, settings)
    in_regions = {label: over_steps_of(file.metadata) for label, file in regional.items()}
    spans = {**mix.spans, **{label: span for label, span in in_regions.items() if span}}
    placement = wanted.placement.with_requested(spans)
    return {**settings, **placement.told()}, pictures, placement


def _drawn(
    session: DrawingSession, sweep: tuple[str, tuple[float, ...]] | None, *, before_after: bool
) -> Iterator[Drawn]:
    """Yield the sheet that is asked for, else image by image."""
    if sweep:
        yield session.sweep(*sweep)
    elif before_after:
        yield session.before_after()
    else:
        yield from session.with_adapters()


def _told(wanted: Plan, mix: Mix, regional: Mapping[str, AdapterFile]) -> dict[str, Mapping[str, str]]:
    """The metadata of the adapters that count, by label. regional: the files of adapters in regions."""
    told = {**mix.metadata, **{label: file.metadata for label, file in regional.items()}}
    return {label: metadata for label, metadata in told.items() if label in wanted.counted}


def _say_unheard(told: Mapping[str, Mapping[str, str]]) -> None:
    """Say which adapters ask for adapter guidance, but do not get it because of regions. told: the files' metadata, by
    label."""
    from sfumato.files.metadata import adapter_guidance_of

    for label, metadata in told.items():
        if strength := adapter_guidance_of(metadata):
            say(
                f"{label}: asks for adapter guidance {strength:g}, which does not go with --region; it is in both "
                "predictions, and more weight draws more of it."
            )


@contextmanager
def _mixed(
    base: Base, wanted: Plan, config: Config
) -> Iterator[tuple[Mix, dict[str, AdapterFile], list[tuple[Path, Iterable[str]]]]]:
    """In the block the base model has the new words and the mix. Yields the mix, the files of adapters in regions by
    label, and the files of new words with their tokens.

    Says what has no effect, was left out, or was trained on another base model.
    """
    from sfumato.adapters.embeddings import embedding
    from sfumato.compose import compose
    from sfumato.files.header import read_header
    from sfumato.generation.notes import (
        base_mismatch_notes,
        misread_word_notes,
        no_effect_notes,
        skipped_module_notes,
        unknown_word_notes,
        unread_syntax_notes,
        unused_word_notes,
    )
    from sfumato.generation.prompt_adapters import choose_apply_mode
    from sfumato.merging.whole_model import read_adapter_or_model

    texts, counted = wanted.texts, wanted.counted
    with ExitStack() as stack:
        words = [stack.enter_context(embedding.load(base, file, token)) for token, file in wanted.embeddings]
        named: list[tuple[Path, Iterable[str]]] = [
            (file, list(each.tokens)) for each, (_, file) in zip(words, wanted.embeddings, strict=True)
        ]
        say(*unread_syntax_notes(texts, config.prompt_syntax), *unused_word_notes(named, texts, config.prompt_syntax))
        allowed = {"partial": config.partial, "verify": config.verify}
        way = choose_apply_mode(base, wanted.adapters, follows_steps=wanted.placement.follows_steps)
        mix = stack.enter_context(compose(base, *wanted.adapters, way=way, words_known=True, **allowed))
        # The weight of a bundle is the LoRA's; its words are there.
        regional = {
            each.label: read_adapter_or_model(each.path, partial=config.partial) for each in wanted.placement.regional
        }
        bundled = {**mix.embeddings, **{label: file.embeddings for label, file in regional.items()}}
        bundled = {label: found for label, found in bundled.items() if label in counted}
        if brought := stack.enter_context(embedding.bundled(base, bundled, partial=config.partial)):
            words.append(brought)
        if config.prompt_syntax == "plain":  # the others take prompts of any length
            for each in words:
                each.check(texts)
        known = [token for each in words for token in each.tokens]
        say(*unknown_word_notes(texts, known, base), *misread_word_notes(known, texts, config.prompt_syntax))
        say(*no_effect_notes(mix.without_effect))
        say(*skipped_module_notes(mix.skipped))
        of_words = {token or file.name: read_header(file).metadata for token, file in wanted.embeddings}
        say(*base_mismatch_notes(_told(wanted, mix, regional), base), *base_mismatch_notes(of_words, base))
        yield mix, regional, named


def _against(
    pictures: Sequence[PictureRequest], mix: Mix, wanted: Plan, settings: Mapping[str, Any]
) -> list[PictureRequest]:
    """The images with the negative prompts that their adapters' files ask for, where guidance is used; says which.

    settings: what all images share.
    """
    from sfumato.generation.notes import requested_negative_notes

    found, changed = [], []
    for picture in pictures:
        counted = wanted.counted_in(picture)
        asked = [text for label, texts in mix.negatives.items() if label in counted for text in texts]
        is_free = "negative" not in picture.overrides and {**settings, **picture.overrides}["guidance"] > 1
        negative = negative_for(picture.prompt, asked, settings["prompt_syntax"]) if is_free else ""
        changed += [negative] if negative else []
        found.append(replace(picture, overrides={**picture.overrides, "negative": negative}) if negative else picture)
    say(*requested_negative_notes(changed))
    return found


def _settings(config: Config, wanted: Plan, start: Start | None, base: Base) -> dict[str, Any]:
    """What all images of this call share, with defaults filled in."""
    from sfumato.generation.image_options import size_like
    from sfumato.generation.settings import base_settings

    defaults = base.defaults
    width, height = wanted.size or size_like(start.picture.size if start else (1, 1), defaults.resolution)
    return {
        "negative": wanted.negative,
        "steps": config.steps or defaults.sampling_steps,
        "guidance": defaults.guidance if config.guidance is None else config.guidance,
        "width": width,
        "height": height,
        "sampler": config.sampler,
        "prompt_syntax": config.prompt_syntax,
        "embeddings": [public_embedding(spec) for spec in config.embedding],
        "image": config.image and config.image.name,
        "mask": config.mask and config.mask.name,
        "strength": start and start.strength,
        **base_settings(base, config.vae),
        "options": config.drawn_with(partial=config.partial),
    }


def _summary(
    pictures: Sequence[Mapping[str, Any]], hires: Hires | None, sampler: tuple[str, str | None], base: Base
) -> str:
    """How the images with these settings are generated, without what differs between them."""
    said = (
        {f"{pluralize(each['steps'], 'step')} of {' '.join(filter(None, sampler))}" for each in pictures},
        {f"guidance {each['guidance']:g}" for each in pictures},
        {f"{each['width']}x{each['height']}" for each in pictures},
        {f"then {_second(hires, each)}" for each in pictures if hires is not None},
        {f"on {base.precision.device}"},
    )
    same = ", ".join(next(iter(words)) for words in said if len(words) == 1)
    return f"{base.name} ({base.family.title}): {same}"


def _second(hires: Hires, first: Mapping[str, Any]) -> str:
    """The second pass after a first of these settings."""
    wide, high = hires.size(first["width"], first["height"])
    return f"{wide}x{high} in {pluralize(hires.taken_steps(first['steps']), 'step')} of strength {hires.strength:g}"


def _start(config: Config) -> Start | None:
    """The image to start from, read as training would read it, whatever its aspect ratio."""
    if config.image is None:
        return None
    from sfumato.data import open_image
    from sfumato.data.images import open_mask
    from sfumato.generation.draw import Start

    strength = Start.strength if config.strength is None else config.strength
    mask = None if config.mask is None else open_mask(config.mask, any_ratio=True)
    return Start(open_image(config.image, any_ratio=True), strength, mask)


def main(argv: Sequence[str]) -> int:
    """Generate, print the files, return 0."""
    generate(parse(Config, argv, program="generate"))
    return 0


if __name__ == "__main__":
    run(main)
