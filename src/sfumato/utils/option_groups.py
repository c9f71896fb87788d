"""Which options a program's `--help` shows, and the groups of `--help-all`, in the order in which a person meets them.

A program that is not in `SHORT`, or a copy of one with options of its own, shows all that are not known here, too.
"""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

DOCS = "docs/options"
"""Where the pages are that `docs/generate_options.py` writes."""
MOST = 16
"""Options in a short help."""
OTHERS = "Others"
"""The group of options that are in no table."""

PICTURES, LEARNED, HOW_LONG, COST, RESULTS = (
    "Pictures", "What is learned", "How long", "What it costs", "Results",
)  # fmt: skip

TRAINERS: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        PICTURES: (
            *("images", "data", "class_name", "identifier", "placeholder", "stands_for", "preferred", "rejected"),
            *("concept", "more", "less", "more_images", "less_images", "prompts", "caption", "trigger", "resolution"),
            *("flip", "crop", "mask", "instance_prompt", "class_prompt", "caption_lines", "wildcards"),
            *("caption_dropout", "shuffle_tags", "keep_tags", "tag_dropout", "templates", "inpaint_whole_share"),
            *("validation_split", "skip_bad", "drawn", "drawn_steps"),
            *("hands_share", "flip_share", "group_share", "plain_share", "plain_style", "empty_share", "others_share"),
            *("varied_share", "moved_share", "moved_below", "style_together"),
        ),
        LEARNED: (
            *("stage", "base", "init", "learn", "method", "targets", "rank", "alpha", "algo", "initial_words"),
            *("vectors", "train_words", "prior_prompts", "train_text_encoder", "strength", "guidance", "beta"),
            *("style_emphasis", "sharpness", "solver_steps", "adapter_guidance", "crossed_share", "own_negative"),
            *("over_steps", "prior", "prior_weight", "class_images", "class_count", "class_cache", "init_from", "conv"),
            *("conv_rank", "conv_alpha", "rank_stabilised", "rank_of", "rate_of", "dora", "factor", "word_vectors"),
            *("words_first", "start", "keep_scale", "inpainting", "dropout", "rank_dropout", "module_dropout"),
            *("max_norm", "decoder_only", "init_share", "vae", "clip_skip", "max_tokens", "prediction_type"),
            "zero_terminal_snr",
        ),
        HOW_LONG: (
            *("steps", "epochs", "batch", "learning_rate", "seed", "text_learning_rate", "word_learning_rate"),
            *("loraplus_ratio", "accumulate", "optimizer", "optimizer_args", "weight_decay", "schedule", "cycles"),
            *("warmup", "fall_at", "clip", "ema", "drift_limit", "min_snr", "snr_gamma", "debiased", "noise_offset"),
            *("pyramid_noise", "input_perturbation", "huber", "min_timestep", "max_timestep", "kl", "flat_weight"),
            *("gradient_difference", "crossed_from", "crossed_overlap"),
        ),
        COST: (
            *("dry_run", "quantize", "gradient_checkpointing", "precision", "device", "micro_batch", "cache"),
            *("attention", "fused", "ema_on_cpu", "compile"),
        ),
        RESULTS: (
            *("output", "name", "save", "sample_prompts", "sample_every", "measure_every", "save_every"),
            *("save_precision", "keep_energy", "bundle", "resume", "overwrite", "checkpoint_every", "keep", "finish"),
            *("force", "author", "license", "push_to_hub", "tensorboard", "wandb", "wandb_name"),
        ),
    }
)
"""Group -> options of all trainers."""

_DRAWN_WITH = ("base", "vae", "clip_skip", "max_tokens", "prediction_type", "zero_terminal_snr", "partial", "verify")
_DRAWING_COST = ("precision", "device", "quantize", "attention", "offload")
GROUPS: Mapping[str, Mapping[str, Sequence[str]]] = MappingProxyType(
    {
        "generate": {
            "What to draw": (
                *("prompts", "seed", "count", "size", "negative", "prompts_file", "prompt_syntax"),
                *("image", "strength", "mask"),
            ),
            "Adapters": (
                *("lora", "embedding", "blocks", "over_steps", "region", "switch", "lora_folder", "adapter_guidance"),
            ),
            "How it is drawn": (
                *("steps", "guidance", "sampler", "hires", "hires_strength", "hires_steps", *_DRAWN_WITH),
            ),
            COST: _DRAWING_COST,
            RESULTS: ("output", "before_after", "sweep", "overwrite", "skip_existing"),
        },
        "grid": {
            "What varies": ("x", "y"),
            "What is drawn": ("prompt", "seed", "size", "negative", "prompt_syntax"),
            "Adapters": ("lora", "method", "density", "rank", "embedding", "adapter_weight", "adapter_guidance"),
            "How it is drawn": ("steps", "guidance", "sampler", *_DRAWN_WITH),
            COST: _DRAWING_COST,
            RESULTS: ("output",),
        },
        "teach": {
            PICTURES: ("photos", "name", "captioner"),
            LEARNED: ("style", "subject", "word", "base", "prediction_type", "zero_terminal_snr"),
            HOW_LONG: ("steps", "seed"),
            COST: ("dry_run", "measure", "precision"),
            RESULTS: ("output", "sheet", "overwrite"),
        },
        "merge": {
            "Adapters": ("adapters", "blocks", "base", "into", "family", "partial"),
            "How they are merged": (
                *("method", "rank", "density", "keep_energy", "inside", "null_energy", "null_strength", "seed"),
            ),
            RESULTS: ("output", "dtype", "title", "overwrite"),
        },
    }
)
"""Program -> group -> options, of the other programs that have more options than a short help."""

_ALWAYS = ("images", "base", "resolution", "steps", "batch", "learning_rate", "seed", "dry_run", "output")
SHORT: Mapping[str, Sequence[str]] = MappingProxyType(
    {
        "train lora": (
            *(*_ALWAYS, "caption", "trigger", "learn", "targets", "rank", "prior_prompts", "sample_prompts"),
        ),
        "train dreambooth": (
            *(*_ALWAYS, "class_name", "identifier", "method", "rank", "prior_prompts", "sample_prompts"),
        ),
        "train finetune": (
            *(*_ALWAYS, "caption", "flip", "train_text_encoder", "gradient_checkpointing", "save", "sample_prompts"),
        ),
        "train textual_inversion": (
            *(*_ALWAYS, "placeholder", "stands_for", "initial_words", "vectors", "templates", "sample_prompts"),
        ),
        "train slider": (
            *(*_ALWAYS, "concept", "more", "less", "more_images", "less_images", "strength", "rank"),
        ),
        "train lcm": (*_ALWAYS, "prompts", "rank", "guidance", "quantize", "sample_prompts"),
        "train dpo": (*_ALWAYS, "preferred", "rejected", "caption", "targets", "rank", "beta", "sample_prompts"),
        "train pretrain": (
            *(*_ALWAYS, "data", "stage", "init", "vae", "optimizer", "fall_at", "sample_every", "compile"),
            "others_share",
        ),
        "teach": ("photos", "name", "base", "style", "subject", "word", "captioner", "output", "steps", "dry_run"),
        "generate": (
            *("prompts", "seed", "count", "size", "negative", "image", "lora", "embedding", "region"),
            *("steps", "guidance", "sampler", "base", "output", "before_after", "overwrite"),
        ),
        "grid": (
            *("x", "y", "prompt", "seed", "size", "negative", "lora", "method", "embedding"),
            *("steps", "guidance", "sampler", "base", "precision", "output"),
        ),
        "merge": (
            *("adapters", "blocks", "base", "into", "method", "rank", "density", "keep_energy"),
            *("output", "dtype", "overwrite"),
        ),
    }
)  # fmt: skip
"""Program -> options that its `--help` shows. The others are under `--help-all`."""


def groups_of(program: str) -> Mapping[str, Sequence[str]]:
    """Group -> options of a program, such as "train lora" or "grid"; empty where no table has it."""
    return GROUPS.get(program) or (TRAINERS if program in SHORT else {})


def grouped(program: str, names: Sequence[str]) -> dict[str, list[str]]:
    """Group -> the options among `names`, both in the tables' order; those of no table last. Empty for a program
    without tables."""
    groups = groups_of(program)
    if not groups:
        return {}
    known = {name for group in groups.values() for name in group}
    found = {title: [name for name in group if name in names] for title, group in groups.items()}
    found[OTHERS] = [name for name in names if name not in known]
    return {title: group for title, group in found.items() if group}


def shown(program: str, names: Sequence[str]) -> list[str]:
    """The options among `names` that a short help shows: those of `SHORT`, and what no table knows."""
    if program not in SHORT:
        return list(names)
    known = {name for group in groups_of(program).values() for name in group}
    return [name for name in names if name in SHORT[program] or name not in known]


def page(program: str) -> str:
    """The name of the page with a program's options, "train-lora.md"."""
    return f"{program.replace(' ', '-')}.md"
