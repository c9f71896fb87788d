"""The end of a run: what its file says of itself, plot, card, upload. What every trainer does after its loop.

What was learned onto the Hugging Face hub.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.config import to_dict
from sfumato.errors import ConfigError
from sfumato.runs.folder import card_pictures
from sfumato.runs.options import persistent_config
from sfumato.utils.formatting import join_command

if TYPE_CHECKING:
    from sfumato.data import Dataset
    from sfumato.files import Description
    from sfumato.models import Base
    from sfumato.runs.reporting.samples import Samples
    from sfumato.runs.run import Run
    from sfumato.training.adapter import TrainedAdapter
    from sfumato.training.options import TrainingOptions


Kind = Literal["lora", "difference", "folder"]


def describe_run(config: TrainingOptions, base: Base, dataset: Dataset, samples: Samples, **more: Any) -> Description:
    """What the run's file tells of how it came to be. config: resolved. more: further fields of the Description, or
    others, such as the `steps` of a file that is not from the run's end."""
    from sfumato.data.preparation.planning import square_side
    from sfumato.files import Description
    from sfumato.training.cards.adapter import most_telling_prompt

    assert config.name is not None
    assert config.resolution is not None
    assert config.batch is not None
    side, rows = square_side(base, config.resolution), samples.ends
    learned, own = config.noising(base).timesteps, getattr(config, "trigger", None)
    triggers: Sequence[str] = more.pop("trigger", [own] if own else [])
    description = Description(
        title=config.name,
        family=base.family.name,
        base=base.name,
        base_fingerprint=base.adapted_fingerprint(),
        prediction_type=base.prediction_type,
        resolution=(config.resolution, config.resolution),
        drawn_at=None if side == base.resolution else (side, side),
        images=len(dataset),
        steps=config.steps,
        batch=config.batch * config.accumulate * samples.processes,
        seed=config.seed,
        learning_rate=config.learning_rate,
        optimizer=config.optimizer + (f"({', '.join(config.optimizer_args)})" if config.optimizer_args else ""),
        trigger=triggers,
        captions=dataset.captions,
        author=config.author or "",
        license=config.license or "",
        thumbnail=rows[-1][most_telling_prompt(triggers, samples.prompts)] if rows else None,
        config=to_dict(dataclasses.replace(persistent_config(config), wandb=None, wandb_name=None), public=True),
        clip_skip=config.clip_skip,
        timesteps=None if learned == range(len(base.alpha_bar)) else (learned.start, learned.stop),
        dataset_sha256=dataset.fingerprint,
        inpaints=base.inpaints,
    )
    return dataclasses.replace(description, **more)


def finish_adapter(run: Run, config: TrainingOptions, path: Path, learned: TrainedAdapter, samples: Samples) -> None:
    """Write the adapter and its new words, the card and the plot; upload them if asked."""
    description, beside = learned.write(path, run.step)
    finish(run, config, path, description, samples, kind="lora")
    learned.report_words(path, beside, description, run)
    upload(run, [path, *beside.values()], config.push_to_hub)


def finish(run: Run, config: TrainingOptions, path: Path, about: Description, samples: Samples, *, kind: Kind) -> None:
    """The plot and the card beside what was learned, a line for each, and the command that draws with it."""
    from sfumato.training.cards.adapter import example_of, most_telling_prompt, word_files, write_card

    rows = samples.ends
    prompts: Sequence[str] = samples.prompts if rows else []
    if about.sampling is not None:
        from sfumato.training.cards.methods import write_fast_card

        card = write_fast_card(run.folder, path, about, prompts, rows)
    elif kind == "lora":
        card = write_card(run.folder, path, about, prompts, rows)
    else:
        from sfumato.training.cards.methods import write_model_card

        card = write_model_card(run.folder, path, about, prompts, rows)
    shown = prompts[most_telling_prompt(about.trigger, prompts)] if prompts else example_of(about)
    prompt = shown or next(iter(about.captions), "a dog")
    if kind == "folder":
        command = drawing_command(config, about, prompt, base=path)
    else:
        words = [path.with_name(name) for name in word_files(about, path)]
        command = drawing_command(config, about, prompt, lora=path, words=words)
    plot_and_tell(run, f"{_WHAT[kind]:<9}{path}", card, command, has_samples=bool(rows))


_WHAT = {"lora": "adapter", "difference": "change", "folder": "model"}


def drawing_command(
    config: TrainingOptions,
    about: Description,
    prompt: str,
    *,
    base: Path | None = None,
    lora: Path | None = None,
    words: Sequence[Path] = (),
) -> str:
    """The command that draws with what was learned, from the folder where the training was started: the card's own
    has the names of files alone, because it travels with them.

    base: the whole model that was learned, if one was. lora: an adapter, or a difference. words: files of new words.
    """
    from sfumato.training.cards.adapter import generate_line

    here = dataclasses.replace(about, config=to_dict(config))
    options = ("clip_skip", "max_tokens") if base else ()
    files = [str(each) for each in words]
    return generate_line(prompt, str(base or config.base), here, *options, lora=str(lora or ""), words=files)


def plot_and_tell(run: Run, made: str, card: Path, command: str, *, has_samples: bool) -> None:
    """Draw the log, and say what there is now. made: lines on what was learned. command: what draws with it."""
    import torch

    from sfumato.runs.reporting.plot import plot_log

    run.log_file.flush()
    plot_log(run.folder / "log.jsonl", run.folder / "plot.png")
    run.say(f"\n{made}\ncard     {card}\nplot     {run.folder / 'plot.png'}")
    if has_samples:
        run.say(f"samples  {run.folder / 'samples.png'}")
    run.say(f"try      {command}")
    cuda: Any = torch.cuda  # whose functions have no types
    if cuda.is_initialized() and (peak := cuda.max_memory_reserved()):
        run.say(f"memory   {peak / 2**30:.1f} GiB of the GPU at the peak")


def upload(run: Run, paths: Sequence[Path], repository: str | None) -> None:
    """Upload each file with its card, and say where it is; nothing where no repository is named. The last of all."""
    pass

    run.mark_finished()
    if not repository:
        return
    try:
        for path in paths:
            run.say(f"uploaded to {push(run.folder, path, repository)}")
    except BaseException:
        run.close()  # a notebook that keeps the error would keep the folder locked
        raise


def push(folder: Path, learned: Path, repository: str) -> str:
    """Upload what was learned, a file or a model's folder, its card and the card's pictures to the hub; returns the
    address. Nothing else of the run's folder leaves the machine. Raises ConfigError."""
    from huggingface_hub import HfApi

    api = HfApi()
    name = learned.name.replace("[", "[[]")  # "[v2]" is one of two letters to the hub
    patterns = [f"{name}/*" if learned.is_dir() else name, "README.md", *card_pictures(folder)]
    try:
        api.create_repo(repository, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            allow_patterns=patterns,
            commit_message=f"Upload {learned.name if learned.is_dir() else learned.stem}",
        )
    except Exception as error:  # the hub's library has changed its network library twice; there is no common error
        reason = " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__
        words = ["hf", "upload", repository, str(folder), ".", *(w for each in patterns for w in ("--include", each))]
        raise ConfigError(
            f"--push-to-hub {repository}: {reason}. What was learned is safe in {learned}; log in with `hf auth login` "
            f"and upload it with `{join_command(words)}`."
        ) from None
    return str(commit.commit_url)
