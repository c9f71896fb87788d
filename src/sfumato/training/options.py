"""Options that the trainers share, each documented once; a trainer's `Config` inherits the groups and adds its own.

The text under a field is its `--help`. Each group also knows how to use itself: read the pictures, decide the
precision, load the base, so that a trainer says these in a line each.
"""

# No annotations as texts: a program that inherits the options reads them in its own module.
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.data.options import CropMode, MaskSource
from sfumato.errors import ConfigError
from sfumato.runs.options import FolderOptions

if TYPE_CHECKING:  # help loads no torch
    from sfumato.bases import Base
    from sfumato.data import Dataset, ExampleSet
    from sfumato.precision import Precision
    from sfumato.runs.processes import Processes
    from sfumato.training.noising import LossSettings, NoiseSettings

OptimizerName = Literal["adamw", "adamw8bit", "adafactor", "prodigy", "lion"]
AlgoName = Literal["lora", "loha", "lokr"]
ScheduleName = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """What is learned from."""

    images: Path
    """Folder of pictures, or a dataset.toml that names several folders (see datasets/README.md)."""
    trigger: str | None = None
    """The word that will call up what is learned; put it into the captions, or use --caption."""
    caption: str | None = None
    """Template for captions, such as "{caption}, {trigger} style"; {caption} stands for the picture's own caption, or
    for its file name."""
    caption_dropout: float = 0.0
    """Share of samples learned without a caption, 0 to 1; 1 drops every caption."""
    resolution: int | None = None
    """Side in pixels of a square picture; other shapes have about as many pixels. Samples are drawn at this size.
    Unset: the base's own."""
    flip: bool = False
    """Mirror half of the samples; not for faces, letters, or anything else with a left and a right."""
    crop: CropMode = "center"
    """Where a picture that does not fit is cropped: at its center, at a random place each time, or nowhere, with white
    padding around it."""
    shuffle_tags: bool = False
    """Captions are comma-separated tags; put them in another order for each sample."""
    keep_tags: int = 0
    """Tags at the front of a caption that are neither shuffled nor dropped."""
    tag_dropout: float = 0.0
    """Share of the other tags to drop from each sample, 0 to 1."""
    cache: Path | None = None
    """Folder that keeps latents and text embeddings, by content, for other runs. Unset: they stay in memory."""
    mask: MaskSource = "none"
    """Learn only part of each picture: where it is opaque (alpha), or where NAME.mask.png is white (files)."""
    validation_split: float = 0.0
    """Share of the pictures, 0 to 0.5, that is held out: not learned from, but for measuring the loss on what is new
    (`validation` in log and plot). A dataset.toml may name sources with `validation = true` instead. A few pictures are
    better all learned."""
    skip_bad: bool = False
    """Leave out pictures that cannot be read, instead of stopping."""

    def read_examples(self, words: Sequence[str] = (), *, of_class: bool = True) -> "ExampleSet":
        """The pictures and captions, listed but not decoded. words: that captions have to hold. of_class: whether
        sources of a class are read."""
        from sfumato import data

        examples = data.read_folder(
            self.images,
            caption_template=self.caption,
            trigger=self.trigger,
            mask=self.mask,
            skip_bad=self.skip_bad,
            words=" ".join(words),
            of_class=of_class,
        )
        return self.checked(examples)

    def checked(self, examples: "ExampleSet") -> "ExampleSet":
        """The examples with those held out that --validation-split asks for.

        Raises DataError where there are none to learn, ConfigError for --keep-tags where no caption varies, and for a
        run that would lie among its pictures.
        """
        from sfumato.data.folder import no_subject
        from sfumato.data.validation import hold_out

        if not examples.in_group("instance"):
            raise no_subject(self.images)
        self._check_folder(examples)
        return hold_out(examples, self.validation_split)

    def _check_folder(self, examples: "ExampleSet") -> None:
        if getattr(self, "resume", False):
            return
        varies = self.shuffle_tags or self.tag_dropout or any(each.options.varies_caption for each in examples)
        if self.keep_tags and not varies:
            raise ConfigError(
                f"--keep-tags {self.keep_tags} has no effect without --shuffle-tags or --tag-dropout; leave it out, or "
                "give one of them, too."
            )
        output: Path | None = getattr(self, "output", None)
        folders = {path.resolve() for path in (self.images, *(example.path.parent for example in examples))}
        if output is not None and output.resolve() in folders:
            raise ConfigError(
                f"--output {output} is a folder of the pictures; its samples and plot would be learned from, too. Give "
                f"a folder of its own, such as runs/{output.resolve().name}."
            )

    def prepare(
        self,
        examples: "ExampleSet",
        base: "Base",
        *,
        embed_text: bool = True,
        will_draw: tuple[int, int, int] | None = None,
        processes: "Processes | None" = None,
        **other: Any,
    ) -> "Dataset":
        """The pictures decoded, cropped and encoded, once. embed_text: the captions, too.

        will_draw: (seed, steps, global batch) of the draws from this very set, so that just the captions that come are
        embedded. processes: with a cache the main one of them prepares, and the others read what it has written.
        other: what differs from the options, as `data.prepare` takes it.
        """
        from sfumato import data
        from sfumato.runs.progress import Preparation

        assert self.resolution is not None, "resolve() fills it"
        chosen: dict[str, Any] = {
            "resolution": self.resolution,
            "flip": self.flip,
            "crop": self.crop,
            "caption_dropout": self.caption_dropout,
            "shuffle_tags": self.shuffle_tags,
            "keep_tags": self.keep_tags,
            "tag_dropout": self.tag_dropout,
            "cache": self.cache,
        }
        chosen |= other
        chosen |= {"embed_text": embed_text, "will_draw": will_draw}
        shown = Preparation(shown=processes is None or processes.is_main)
        with processes.main_first() if processes and chosen["cache"] else nullcontext(), shown:
            return data.prepare(examples, base, **chosen, progress=shown)


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The model that learns, and how it is computed."""

    base: str = "pocket"
    """The model to teach: pocket, a hub id, a diffusers folder, or a single .safetensors checkpoint."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base; what is trained is always fp32."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1, mps."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention of the U-Net; xformers is an extra."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass instead of keeping them all: less memory, more time."""
    clip_skip: int | None = None
    """Take the text encoder's output this many layers before its last: 1 is what A1111 and sd-scripts call 2.
    SDXL's own layer is 0 here."""
    max_tokens: Literal[75, 150, 225] | None = None
    """Tokens of a caption that are read. Those of a longer one than 75 are encoded 75 at a time and follow one another,
    as in web interfaces; draw long prompts with the same. Unset: 75, the text encoder's own; what is cut is told."""
    vae: str | None = None
    """Another VAE: a hub id, a folder, or a single file."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base predicts, where a single file does not say."""
    zero_terminal_snr: bool = False
    """The base ends in pure noise (zero terminal SNR), where its files do not say; for v-prediction."""

    def decide_precision(
        self, processes: "Processes", optimizer: str = "adamw", *, adapting: bool = True
    ) -> "Precision":
        """The one decision on devices and number formats, put into effect.

        adapting: the base's weights stay frozen.
        """
        from sfumato.precision import decide

        precision = decide(
            self.precision,
            device=self.device if processes.count == 1 else processes.device,
            attention=self.attention,
            gradient_checkpointing=self.gradient_checkpointing,
            optimizer=optimizer,
            adapting=adapting,
        )
        precision.apply()
        return precision

    def load_base(self, precision: "Precision") -> "Base":
        """The base, frozen; its U-Net's weights come when needed, or `lazy_weights.load_only` asks for them."""
        from sfumato.bases import load_base
        from sfumato.precision.lean import save_activation_memory

        base = load_base(
            self.base,
            precision=precision,
            clip_skip=self.clip_skip,
            max_tokens=self.max_tokens,
            vae=self.vae,
            prediction_type=self.prediction_type,
            zero_terminal_snr=self.zero_terminal_snr,
            unet=False,
        )
        # Not the text encoders: what else is in a batch may decide how their products are rounded.
        precision.prepare_for_training(base.unet)
        if precision.device.type == "cpu":  # its kernels were never run elsewhere
            save_activation_memory(base.unet)
        return base


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """How it is learned: steps, optimizer, loss."""

    steps: int | None = None
    """Optimizer steps. Unset: the base family's default."""
    epochs: int | None = None
    """Passes over the pictures, instead of --steps."""
    batch: int | None = None
    """Pictures per batch on each process. Unset: the base family's default."""
    accumulate: int = 1
    """Batches per step: their gradients are summed before the weights move."""
    seed: int = 0
    """Everything random follows from this number: start, order, noise, timesteps, caption dropout."""
    learning_rate: float | None = None
    """Peak learning rate. Unset: the default of the method, the base's family and the kind of adapter (for loha a
    tenth of lora's, for lokr three times), a quarter of it for lion, and 1 for prodigy."""
    optimizer: OptimizerName = "adamw"
    """adamw and adafactor, which keeps nearly no state, are built in; the others are the extras 8bit, prodigy and lion
    (pip install "sfumato[8bit]")."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the optimizer."""
    schedule: ScheduleName = "cosine"
    """How the learning rate changes after the warm-up."""
    warmup: int = 0
    """Steps over which the learning rate rises from 0."""
    clip: float = 1.0
    """Largest norm of the whole gradient; 0 turns clipping off."""
    min_snr: float | None = None
    """Gamma of min-SNR weighting (Hang et al. 2023); 0 weighs all timesteps alike. Unset: the base family's default."""
    noise_offset: float = 0.0
    """Strength of a constant added to each channel's noise, for very dark or bright pictures; 0.03 to 0.1 is usual."""
    pyramid_noise: float = 0.0
    """Discount of coarser noise that is added to the noise, level by level, for light and dark over large areas;
    0.1 to 0.4 is usual, 0 adds none."""
    input_perturbation: float = 0.0
    """Strength of further noise that the U-Net sees and is not asked for, against its own errors while drawing;
    0.1 is usual."""
    huber: float = 0.0
    """A pseudo-Huber loss in place of squared errors: from this size on (in pure noise, 1 without noise) errors count
    in proportion, so that odd pictures and captions teach less; 0.1 is usual, 0 takes squares."""
    min_timestep: int = 0
    """The first of the base's timesteps to learn; most bases have 0 to 999. The least noisy ones make a picture's
    strokes and colors, the noisiest its layout."""
    max_timestep: int | None = None
    """The timestep to stop before: those from --min-timestep up to it are learned. Unset: the number of the base's
    timesteps."""
    ema: float = 0.0
    """Decay of a running mean of what is trained, which is saved in place of the last weights; 0 saves the last
    weights. After n steps it is at most (1 + n) / (10 + n), so that the mean of a short run does not remember the
    untrained start."""

    def loss(self) -> "LossSettings":
        """How errors count."""
        from sfumato.training.noising import LossSettings

        return LossSettings(self.min_snr, self.huber)

    def noising(self, base: "Base") -> "NoiseSettings":
        """How pictures are noised. Raises ConfigError for timesteps that the base does not have."""
        from sfumato.training.noising import NoiseSettings

        count = len(base.alpha_bar)
        stop = count if self.max_timestep is None else self.max_timestep
        if not 0 <= self.min_timestep < stop <= count:
            raise ConfigError(
                f"--min-timestep {self.min_timestep}, --max-timestep {stop}: the base's timesteps are 0 to "
                f"{count - 1}; wanted a first one of these, and a larger end of at most {count}."
            )
        timesteps = range(self.min_timestep, stop)
        return NoiseSettings(timesteps, self.noise_offset, self.pyramid_noise, self.input_perturbation)


@dataclass(frozen=True, kw_only=True)
class RunOptions(FolderOptions):
    """Its name, what is shown of it, where it is published."""

    name: str | None = None
    """Name of what is learned and of its file. Unset: the name of the output folder."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts to draw while training; repeat it for several. One may end in settings of its own, spelt as sd-scripts'
    `--n blurry --w 512 --h 768 --d 7 --s 20 --l 7`. Unset: some captions, and some prompts that are not trained."""
    sample_every: int | None = None
    """Steps between sample pictures, besides those at both ends; 0 draws none. Unset: a quarter of the run."""
    measure_every: int | None = None
    """Steps between measurements of fit, validation and drift; 0 makes none. Unset: a quarter of the run; with pictures
    held out, and no --drift-limit, a tenth."""
    push_to_hub: str | None = None
    """Upload what is learned, with its card, to this repository on the Hugging Face hub."""

    def asked_samples(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The texts of --sample-prompts, and what each says of its own picture beside its text."""
        from sfumato.prompts.tags import split_flags

        found = [split_flags(prompt) for prompt in self.sample_prompts]
        return [text for text, _ in found], [own for _, own in found]


@dataclass(frozen=True, kw_only=True)
class KindOptions:
    """The kind of an adapter."""

    algo: AlgoName = "lora"
    """What an update is: lora, a product of two factors; loha, two of these multiplied number by number, which has the
    square of its directions; lokr, a Kronecker product of a small and a large factor, the smallest file. The names are
    LyCORIS's. diffusers and sd-scripts read lora alone."""
    dora: bool = False
    """Also learn the length of each column of a weight beside its direction (weight decomposition); for lora, loha and
    lokr. diffusers and sd-scripts do not read it."""
    factor: int | None = None
    """With --algo lokr, the size of the small factor: the smaller, the larger are the other and the file. Unset: both
    as square as they can be."""
    max_norm: float = 0.0
    """Largest norm of each layer's update; after every step larger ones are shrunk to it (sd-scripts'
    scale_weight_norms). It keeps an adapter mixable and slows overtraining; 1 is usual, smaller holds more back. 0: no
    limit."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(DataOptions, BaseOptions, StepOptions, RunOptions):
    """All of them."""
