"""Options that the trainers share, each documented once. A trainer's `Config` inherits the groups and adds its own.

The text under a field is its `--help`. Each group also knows how to use itself: read the images, decide the precision,
load the base model. So a trainer does each of these in one line.
"""

# No annotations as texts: a program that inherits the options reads them in its own module.
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sfumato.data.options import CropMode, MaskSource
from sfumato.errors import ConfigError, PrecisionError
from sfumato.files.keys import trained_kinds
from sfumato.runs.options import FolderOptions
from sfumato.training.optim.settings import OptimizerName

if TYPE_CHECKING:  # help loads no torch
    from sfumato.data import Dataset, ExampleSet
    from sfumato.models import Base
    from sfumato.precision import Precision
    from sfumato.runs.processes import Processes
    from sfumato.training.loss.objective import LossSettings, NoiseSettings

if TYPE_CHECKING:
    AlgoName = str
else:
    AlgoName = Literal[tuple(trained_kinds())]
ScheduleName = Literal["constant", "cosine", "linear"]


@dataclass(frozen=True, kw_only=True)
class SizeOptions:
    """The size of images, and a cache of what they become."""

    resolution: int | None = None
    """Side in pixels of a square training image; other shapes have about as many pixels. Unset: the base model's own
    resolution."""
    cache: Path | None = None
    """Folder that keeps latents and text embeddings, by content, for other runs. Unset: they stay in memory."""

    def prepare_as(
        self, examples: "ExampleSet", base: "Base", *, processes: "Processes | None" = None, **settings: Any
    ) -> "Dataset":
        """Decode, crop and encode the images, once, with progress. settings: as `data.prepare` takes them, before the
        options. processes: with a cache the main process prepares, and the others read what it wrote."""
        from sfumato import data
        from sfumato.runs.progress import PreparationBars, say_on_main_process

        assert self.resolution is not None, "resolve() fills it"
        chosen = {"resolution": self.resolution, "cache": self.cache, **settings}
        is_main = processes is None or processes.is_main
        shown = PreparationBars(shown=is_main)
        with processes.main_first() if processes and chosen["cache"] else nullcontext(), shown:
            return data.prepare(examples, base, **chosen, progress=shown, say=say_on_main_process(is_main))


@dataclass(frozen=True, kw_only=True)
class DataOptions(SizeOptions):
    """Images, captions and how they are varied."""

    images: Path
    """Folder of training images, or a dataset.toml that names several folders (see datasets/README.md)."""
    trigger: str | None = None
    """Trigger word: what a prompt says to call up what was learned. The captions must contain it; --caption can add
    it."""
    caption: str | None = None
    """Template for captions, such as "{caption}, {trigger} style". {caption} stands for the image's own caption, or for
    its file name."""
    caption_lines: bool = False
    """Each line of a caption is a caption of its own, such as tags and a sentence. Each sample has one of an image's
    captions, at random. Otherwise the lines are one caption."""
    wildcards: bool = False
    """{red|blue} in a caption is a wildcard: each sample has one of its alternatives, at random. {{ and }} are the
    letters { and }. Otherwise braces are letters."""
    caption_dropout: float = 0.0
    """Share of samples that are trained without a caption, 0 to 1; 1 drops every caption."""
    flip: bool = False
    """Mirror half of the samples. Not for faces, letters, or anything else with a left and a right."""
    crop: CropMode = "center"
    """How to crop an image that does not fit. center: at its center; random: at a random place each time; pad: no crop,
    but white padding around it."""
    shuffle_tags: bool = False
    """Shuffle the comma-separated tags of a caption anew for each sample."""
    keep_tags: int = 0
    """Number of tags at the start of a caption that are neither shuffled nor dropped."""
    tag_dropout: float = 0.0
    """Share of the other tags to drop from each sample, 0 to 1."""
    mask: MaskSource = "none"
    """Learn only a part of each image. alpha: where the image is opaque; files: where NAME.mask.png is white."""
    inpaint_whole_share: float | None = None
    """With an inpainting base model: share of samples whose whole image is hidden from it, as in generating from the
    prompt alone. Of the others a random rectangle, ellipse or brush stroke is hidden, or in half of those with a --mask
    what that shows. Unset: 0.25."""
    validation_split: float = 0.0
    """Hold out this share of the images, 0 to 0.5, to measure the loss on images that are not trained on (`validation`
    in log and plot). A dataset.toml may mark sources with `validation = true` instead. If there are only a few images,
    train on all of them."""
    skip_bad: bool = False
    """Leave out images that cannot be read, instead of stopping."""

    def read_examples(self, words: Sequence[str] = (), *, of_class: bool = True) -> "ExampleSet":
        """List the images and captions without decoding them. words: words that the captions must contain. of_class:
        whether to read class sources, too."""
        from sfumato import data

        examples = data.read_folder(
            self.images,
            caption_template=self.caption,
            trigger=self.trigger,
            mask=self.mask,
            caption_lines=self.caption_lines,
            wildcards=self.wildcards,
            skip_bad=self.skip_bad,
            words=" ".join(words),
            of_class=of_class,
        )
        return self.checked(examples)

    def checked(self, examples: "ExampleSet") -> "ExampleSet":
        """Check the examples, and hold out those that --validation-split asks for.

        Raises DataError if there is nothing to learn from. Raises ConfigError for --keep-tags without captions that
        vary, and for an --output folder that holds training images.
        """
        from sfumato.data.dataset_config import hold_out
        from sfumato.data.folder import no_subject_message

        if not examples.in_group("instance"):
            raise no_subject_message(self.images)
        self._check_folder(examples)
        return hold_out(examples, self.validation_split)

    def _check_folder(self, examples: "ExampleSet") -> None:
        from sfumato.runs.folder import refuse_output_among

        if getattr(self, "resume", False):
            return
        varies = self.shuffle_tags or self.tag_dropout or any(each.options.varies_caption for each in examples)
        if self.keep_tags and not varies:
            raise ConfigError(
                f"--keep-tags {self.keep_tags} has no effect without --shuffle-tags or --tag-dropout; leave it out, or "
                "give one of them, too."
            )
        if (output := getattr(self, "output", None)) is not None:
            refuse_output_among(output, (self.images, *(example.path.parent for example in examples)))

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
        """Decode, crop and encode the images, once. embed_text: encode the captions, too.

        will_draw: (seed, steps, global batch) of the samples that training takes from this set, so that only the
        captions in use are embedded. processes: as of `prepare_as`. other: settings that differ from the options.
        """
        chosen: dict[str, Any] = {
            "flip": self.flip,
            "crop": self.crop,
            "caption_dropout": self.caption_dropout,
            "shuffle_tags": self.shuffle_tags,
            "keep_tags": self.keep_tags,
            "tag_dropout": self.tag_dropout,
        }
        if self.inpaint_whole_share is not None:
            if not base.inpaints:
                raise ConfigError(
                    f"--inpaint-whole-share {self.inpaint_whole_share:g}: is for an inpainting base, and {base.name} "
                    "is none; leave it out, or name another --base."
                )
            chosen["inpaint_whole_share"] = self.inpaint_whole_share
        chosen |= other
        return self.prepare_as(
            examples, base, processes=processes, embed_text=embed_text, will_draw=will_draw, **chosen
        )


@dataclass(frozen=True, kw_only=True)
class BaseOptions:
    """The base model, and how it is computed."""

    base: str = "pocket"
    """Base model to train on: pocket, a hub id, a diffusers folder, or a single .safetensors checkpoint."""
    precision: Literal["auto", "fp32", "fp16", "bf16"] = "auto"
    """Number format of the frozen base model. The weights that are trained are always fp32."""
    device: str = "auto"
    """Device to train on: auto, cpu, cuda, cuda:1 or mps. auto takes CUDA, then MPS, then the CPU."""
    quantize: Literal["int8", "nf4"] | None = None
    """Keep the large weights of the frozen U-Net in fewer bits, for a little more time: int8 takes half the memory of
    bf16 or fp16, for a small error; nf4 (QLoRA) little more than a quarter, for a larger one. For adapters and new
    words; what is learned fits the unquantized base model. Unset: neither."""
    attention: Literal["sdpa", "xformers"] = "sdpa"
    """Attention of the U-Net: torch's own (sdpa) or xformers (pip install "sfumato[xformers]")."""
    gradient_checkpointing: bool | None = None
    """Recompute activations in the backward pass instead of keeping them all: less memory, more time, the same result.
    Unset: if a step does not fit into memory without."""
    clip_skip: int | None = None
    """Take the text encoder's output this many layers before its last, counted as in diffusers: 1 is clip skip 2 of
    A1111 and sd-scripts. On SDXL 0 is the base model's own layer."""
    max_tokens: Literal[75, 150, 225] | None = None
    """Tokens of a caption that are read. A caption of more than 75 tokens is encoded in chunks of 75, one after
    another, as in web interfaces; generate long prompts with the same setting. Unset: 75, the text encoder's own limit;
    a message says what is cut off."""
    vae: str | None = None
    """Use another VAE: a hub id, a folder, or a single file."""
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    """What the base model predicts: noise (epsilon) or v. Set it where a single file does not say."""
    zero_terminal_snr: bool = False
    """The base model's last timestep is pure noise (zero terminal SNR). Set it where its files do not say; for
    v-prediction."""

    def decide_precision(
        self, processes: "Processes", optimizer: str = "adamw", *, adapting: bool = True
    ) -> "Precision":
        """Decide on device and number formats, once, and put the decision into effect.

        adapting: the base model's weights stay frozen.
        """
        from sfumato.precision import DTYPES, decide

        precision = decide(
            self.precision,
            device=self.device if processes.count == 1 else processes.device,
            attention=self.attention,
            gradient_checkpointing=bool(self.gradient_checkpointing),
            optimizer=optimizer,
            adapting=adapting,
            quantized=self.quantize,
        )
        names = {dtype: name for name, dtype in DTYPES.items()}
        # Of fp16 the gradients are scaled, and summed with bf16's they would be 65,536 times theirs.
        if processes.count > 1 and not processes.is_everywhere(list(names).index(precision.compute)):
            raise PrecisionError(
                f"--precision {self.precision}: the processes' devices take different ones, this one "
                f"{names[precision.compute]}. Give all the same: --precision fp16, or fp32."
            )
        precision.apply()
        return precision

    def load_base(self, precision: "Precision") -> "Base":
        """Load the base model, frozen. Its U-Net's weights are read when needed, or when `lazy_weights.load_only` asks
        for them."""
        from sfumato.models import load_base
        from sfumato.precision.layers import save_activation_memory

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
        if base.denoiser.config.get("time_cond_proj_dim"):
            raise ConfigError(
                f"--base {self.base}: distilled for few steps (LCM), its U-Net takes the guidance as an input. Train "
                "on the base that it was made from; its adapters fit this one."
            )
        # Not the text encoders: what else is in a batch may decide how their products are rounded.
        precision.prepare_for_training(base.denoiser)
        if precision.device.type == "cpu":  # its kernels were never run elsewhere
            save_activation_memory(base.denoiser)
        return base


@dataclass(frozen=True, kw_only=True)
class StepOptions:
    """Steps, optimizer, learning rate, noise and loss."""

    steps: int | None = None
    """Number of optimizer steps. Unset: the default of the method and the base family, which is printed."""
    epochs: int | None = None
    """Number of passes over the images, instead of --steps."""
    batch: int | None = None
    """Images per batch on each process. Unset: the default of the method and the base family."""
    accumulate: int = 1
    """Batches per optimizer step; their gradients are summed before the weights change."""
    micro_batch: int | None = None
    """Most images of a batch that are computed at once: less memory, more time, the same result. Unset: all, or fewer
    if a step does not fit into memory."""
    seed: int = 0
    """Seed of everything random. The same seed gives the same result."""
    learning_rate: float | None = None
    """Peak learning rate. Unset: the default of the method and the base family, changed for other kinds of adapter
    (loha: a tenth, oft: a fifth, lokr: three times) and optimizers (muon: three times, lion: a quarter, prodigy: 1)."""
    optimizer: OptimizerName = "adamw"
    """Optimizer. adamw, muon and adafactor are built in. muon learns more in as many steps, and forgets more; it is
    for matrices, such as those of adapters. adafactor keeps almost no state. adamw8bit, prodigy and lion are the extras
    8bit, prodigy and lion (pip install "sfumato[8bit]")."""
    optimizer_args: tuple[str, ...] = ()
    """Further settings of the optimizer, each as NAME=VALUE, such as betas=0.9,0.999, eps=1e-6, or d_coef=2 for
    prodigy. Repeat the option for several."""
    weight_decay: float = 0.01
    """Decoupled weight decay of the optimizer."""
    schedule: ScheduleName = "cosine"
    """How the learning rate changes after the warm-up: constant, or a fall to 0 along half a cosine or a straight
    line."""
    cycles: int = 1
    """How often the learning rate falls in a run. Each fall begins at the peak again (cosine with restarts)."""
    warmup: float = 0
    """Steps over which the learning rate rises from 0 to its peak; below 1, a share of the run's steps."""
    clip: float = 1.0
    """Largest norm of the gradient over all trained weights; a longer gradient is scaled down to it. 0 turns clipping
    off."""
    min_snr: float | None = None
    """Gamma of min-SNR loss weighting (Hang et al. 2023); 0 weights all timesteps alike. Unset: the base family's
    default."""
    debiased: bool = False
    """Debiased estimation loss weighting (Yu et al. 2023) instead of min-SNR: one over the root of the signal-to-noise
    ratio. The noisiest timesteps, which make the layout, count most."""
    noise_offset: float = 0.0
    """Noise offset: strength of a random constant added to each channel of the noise, for very dark or bright images;
    0.03 to 0.1 is usual."""
    pyramid_noise: float = 0.0
    """Pyramid noise (multires noise): add coarser noise, level by level, for light and dark over large areas. This is
    the discount per level; 0.1 to 0.4 is usual, 0 adds none."""
    input_perturbation: float = 0.0
    """Strength of extra noise that the U-Net sees but is not asked to predict. It prepares the U-Net for its own errors
    while sampling; 0.1 is usual."""
    huber: float = 0.0
    """Use a pseudo-Huber loss instead of squared errors, so that odd images and captions teach less. Errors above a
    threshold count in proportion, not by their squares. The threshold is this value in pure noise and rises to 1
    without noise. 0.1 is usual; 0 uses squared errors."""
    min_timestep: int = 0
    """First timestep to train on; most base models have 0 to 999. The least noisy timesteps make an image's strokes and
    colors, the noisiest its layout."""
    max_timestep: int | None = None
    """Train on timesteps from --min-timestep up to, but not including, this one. Unset: the number of the base model's
    timesteps."""
    ema: float = 0.0
    """Save a running mean (EMA) of the trained weights instead of the last weights; this is its decay, 0 saves the last
    weights. After n steps the decay is at most (1 + n) / (10 + n), so that the mean of a short run forgets the
    untrained start."""

    def loss(self) -> "LossSettings":
        """How errors are weighted and counted."""
        from sfumato.training.loss.objective import LossSettings

        return LossSettings(self.min_snr, self.huber, self.debiased)

    def noising(self, base: "Base") -> "NoiseSettings":
        """How noise is added to the images. Raises ConfigError for timesteps that the base model does not have."""
        from sfumato.training.loss.objective import NoiseSettings

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
    """Name, sample images, measurements and upload."""

    name: str | None = None
    """Name of what is learned, and of its file. Unset: the name of the output folder."""
    sample_prompts: tuple[str, ...] = ()
    """Prompts for sample images during training, or a file of them (.txt, or .toml or .json as in sd-scripts); repeat
    the option for several. A prompt may end in its own settings, as in sd-scripts:
    `--n blurry --w 512 --h 768 --d 7 --s 20 --l 7`. Unset: some captions, and some prompts that are not trained on."""
    sample_every: int | None = None
    """Steps between sample images, besides those at the start and the end; 0 generates none. Unset: a quarter of the
    run."""
    measure_every: int | None = None
    """Steps between measurements of fit, validation and drift; 0 makes none. Unset: a quarter of the run; a tenth where
    images are held out and there is no --drift-limit."""
    author: str | None = None
    """Who made it, for the file's metadata."""
    license: str | None = None
    """License of what is learned, for the file's metadata and the model card, such as cc-by-4.0."""
    push_to_hub: str | None = None
    """Upload what is learned, with its model card, to this repository on the Hugging Face hub."""

    def __post_init__(self) -> None:
        """Read the prompts out of their files, so that a run keeps them, and not where they were."""
        from sfumato.models.prompts.files import expand_prompt_files

        super().__post_init__()
        object.__setattr__(self, "sample_prompts", expand_prompt_files(self.sample_prompts, "--sample-prompts"))

    def asked_samples(self) -> tuple[list[str], list[dict[str, Any]]]:
        """The prompts of --sample-prompts without their settings, and the settings of each."""
        from sfumato.adapters.prompt_tags import split_flags

        found = [split_flags(prompt) for prompt in self.sample_prompts]
        return [text for text, _ in found], [own for _, own in found]


@dataclass(frozen=True, kw_only=True)
class KindOptions:
    """The kind of adapter."""

    algo: AlgoName = "lora"
    """Kind of adapter, by LyCORIS's names. {kinds} diffusers and sd-scripts read only lora, and oft is for ComfyUI
    and AUTOMATIC1111."""
    dora: bool = False
    """DoRA (weight decomposition): also learn the length of each column of a weight, separate from its direction. For
    lora, loha and lokr. diffusers and sd-scripts do not read it."""
    factor: int | None = None
    """With --algo lokr: size of the small factor. The smaller it is, the larger are the other factor and the file.
    Unset: both factors are as square as possible."""
    rank_of: tuple[str, ...] = ()
    """PATTERN=RANK: another rank for some of the layers that --targets chooses; 0 leaves them out of the adapter.
    PATTERN is a block as in mixing (down, mid, up.1, IN04, te), another part of module names (attn2, to_k), several of
    these between commas, a set of --targets, or a regular expression over module names. Repeat the option for several;
    the first that fits a layer counts. A layer keeps its scale; PATTERN=RANK:ALPHA gives it another."""
    rate_of: tuple[str, ...] = ()
    """PATTERN=FACTOR: multiply the learning rate of some of the adapted layers; 0 leaves them out of the adapter.
    PATTERN is as for --rank-of. Repeat the option for several; the first that fits a layer counts."""
    dropout: float = 0.0
    """Share of each update's inputs to drop during training."""
    rank_dropout: float = 0.0
    """Share of each update's ranks to drop during training, anew for each sample. The other ranks are scaled up by as
    much. Of LoHa, LoKr and DoRA rows are dropped instead: the update of that share of the layer's outputs."""
    module_dropout: float = 0.0
    """Share of the adapted layers whose update is left out of a training step, anew for each step. One layer of the
    U-Net always learns."""
    max_norm: float = 0.0
    """Largest norm of each layer's update. After every step, larger updates are shrunk to it (max norm regularization,
    scale_weight_norms of sd-scripts). It slows overtraining and keeps an adapter mixable. 1 is usual, a smaller value
    holds more back; 0: no limit."""


@dataclass(frozen=True, kw_only=True)
class AdapterOptions(KindOptions):
    """The size and the kind of an adapter of the U-Net, and how it is kept."""

    rank: int | None = None
    """LoRA rank: the inner dimension of each update B A. Unset: the base family's default."""
    alpha: float | None = None
    """LoRA alpha: the update is scaled by alpha / rank. Unset: the rank, for a scale of 1."""
    conv_rank: int | None = None
    """Rank for convolutions larger than 1x1, where --targets adapts them; sd-scripts calls it conv_dim. Unset:
    --rank."""
    conv_alpha: float | None = None
    """Alpha for convolutions larger than 1x1. Unset: the value that gives them the scale of the other layers."""
    save_every: int = 0
    """Steps between adapters that are kept to choose from, as OUTPUT/adapters/NAME-step00000500.safetensors; 0 keeps
    only the last."""
    save_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of the adapter's file. Unset: fp32 on pocket, fp16 elsewhere."""


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(SizeOptions, BaseOptions, StepOptions, RunOptions):
    """Every option that the trainers share, whatever they learn from."""


@dataclass(frozen=True, kw_only=True)
class TrainerOptions(DataOptions, TrainingOptions):
    """Every option that the trainers share that learn from a folder of images."""


@dataclass(frozen=True, kw_only=True)
class FullOptions(TrainerOptions):
    """What of the base model is trained, and how it is saved."""

    train_text_encoder: bool = False
    """Also train the text encoders. Captions are then encoded at each step."""
    text_learning_rate: float | None = None
    """Peak learning rate of the text encoders. Unset: 0.4 of the U-Net's, or a tenth where a LoRA is trained; with
    prodigy, the U-Net's."""
    fused: bool = False
    """Update each weight during the backward pass, so that the gradients are never all in memory at once. Clipping
    needs a second backward pass, before that one; --clip 0 avoids it. Also turned on if a step does not fit into memory
    without."""
    ema_on_cpu: bool = False
    """Keep the running mean of --ema in CPU memory, which saves GPU memory."""
    drift_limit: float | None = None
    """Stop and save once the base model's prediction for class prompts or unrelated prompts has moved by more than this
    share."""
    save: Literal["folder", "difference", "lora"] | None = None
    """What to write. folder: the whole model, for diffusers. difference: only what changed, to mix like an adapter.
    lora: a LoRA, nearly the closest to the change. Unset: folder, or lora where a LoRA is trained."""
    rank: int | None = None
    """LoRA rank: the inner dimension of each update, also of those that --save lora extracts. Unset: the base family's
    default."""
    keep_energy: float | None = None
    """With --save lora, where whole weights are trained: give each layer the smallest rank that keeps this share of its
    change's energy (squared norm), at most --rank if that is given."""
    save_precision: Literal["fp32", "fp16", "bf16"] | None = None
    """Number format of what is written. Unset: fp32 on pocket, fp16 elsewhere."""

    def result_path(self) -> Path:
        """The folder or file of what is learned. Of a resolved config."""
        return self.output / f"{self.name}{'' if self.save == 'folder' else '.safetensors'}"
