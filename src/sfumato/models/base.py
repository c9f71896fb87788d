"""A loaded base model: its parts, frozen, and the operations that training and generating need.

By what a base is known again: digests over its configs, tokenizers and weights.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
from torch import Tensor, nn

from sfumato.errors import BaseModelError, ConfigError
from sfumato.files.save import raw_bytes
from sfumato.models.calls import is_inpainting
from sfumato.models.diffusion import PredictionType
from sfumato.models.family import Defaults, Family, plain_tokenizer
from sfumato.models.text import TextEmbedding, chunk_token_ids, convert_multi_vector_prompt
from sfumato.models.weights import LazyWeights
from sfumato.precision import NAMES, Precision
from sfumato.utils.formatting import truncate_text
from sfumato.utils.limits import truncation_hint
from sfumato.utils.schedulers import make_scheduler


def settings_digest(base: Base, vocabularies: Iterable[str]) -> hashlib._Hash:
    """A sha256 over all of the base that is no weight, to go on with. vocabularies: `vocabulary` of each tokenizer."""
    digest = hashlib.sha256()
    for module in (base.denoiser, base.vae, *base.text_encoders, base.scheduler):
        digest.update(public_config(module).encode())
    digest.update(json.dumps([list(vocabularies), base.zeros_for_empty_prompt]).encode())
    return digest


def update_with_weights(digest: hashlib._Hash, base: Base) -> None:
    """Let a digest go on over the base's weight files, or over the weights in memory where there are no files."""
    for path in base.files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    for module in () if base.files else (base.denoiser, base.vae, *base.text_encoders):
        for name, tensor in module.state_dict().items():
            digest.update(name.encode())
            digest.update(raw_bytes(tensor))


def pages_digest(pages: Iterable[bytes], digest: hashlib._Hash | None = None) -> str:
    """sha256, in hex, over a page of each weight, and before them over what `digest` has seen."""
    digest = hashlib.sha256() if digest is None else digest
    for page in pages:
        digest.update(page)
    return digest.hexdigest()


def vocabulary_digest(tokenizer: Any) -> str:
    """sha256 over all that decides what a tokenizer makes of a text; without new words, which come from elsewhere."""
    plain = plain_tokenizer(tokenizer)
    found = json.loads(plain.backend_tokenizer.to_str())
    for name in ("padding", "truncation"):  # of the latest call
        found.pop(name, None)
    described = json.dumps([found, plain.special_tokens_map, plain.padding_side], sort_keys=True, default=str)
    return hashlib.sha256(described.encode()).hexdigest()


def public_config(module: Any) -> str:
    """A module's config as JSON, without what only says where it came from."""
    config = getattr(module, "config", {})
    items = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    kept = {key: value for key, value in items.items() if not key.startswith("_") and "version" not in key}
    return json.dumps(kept, sort_keys=True, default=str)


Pairs = Tensor | Sequence[Sequence[int]]


def latent_scale(vae: Any, device: torch.device) -> tuple[Tensor, Tensor]:
    """(shift, scale), fp32, each (1, channels or 1, 1, 1): latents = (encoded - shift) * scale."""
    config = vae.config
    shift, scale = getattr(config, "shift_factor", None) or 0.0, config.scaling_factor
    if getattr(config, "latents_mean", None) is not None and getattr(config, "latents_std", None) is not None:
        shift, scale = config.latents_mean, [scale / deviation for deviation in config.latents_std]
    as_tensor = [torch.tensor(value, device=device).view(1, -1, 1, 1) for value in (shift, scale)]
    return as_tensor[0], as_tensor[1]


@dataclass(eq=False, repr=False)
class Base:
    """A base model, frozen. Made by `sfumato.load_base`.

    name: what may be shown to others: `pocket`, a hub id, or the last part of a path.
    alpha_bar: (T,) fp32, the cumulative product of 1 - beta; the last is 0 at zero terminal SNR.
    clip_skip: layers skipped at the end of the text encoder, counted as in diffusers: A1111's "Clip skip: 2" is 1 here,
        and 0 on SDXL.
    max_tokens: tokens of a prompt that are read, a multiple of the text encoder's positions without start and end.
        Unset: as many as these.
    lazy_weights: which parts have released their memory. The methods below load again what they use.
    """

    family: Family
    name: str
    denoiser: Any
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler: Any
    precision: Precision
    alpha_bar: Tensor
    clip_skip: int | None = None
    max_tokens: int | None = None
    zeros_for_empty_prompt: bool = False
    files: tuple[Path, ...] = ()
    lazy_weights: LazyWeights = field(default_factory=lambda: LazyWeights({}, lambda *_: None))
    _hidden: dict[tuple[int, int], Tensor] = field(default_factory=dict, init=False)

    def __repr__(self) -> str:
        """One line: a model's own repr has a line for each of its layers."""
        kind, dtype = self.prediction_type, NAMES.get(self.precision.compute, self.precision.compute)
        return f"<Base {self.name}: {self.family.name}, {kind}, {dtype} on {self.precision.device}>"

    @property
    def prediction_type(self) -> PredictionType:
        """What the denoiser predicts."""
        if self.family.noise == "flow":
            return "flow_prediction"
        return cast(PredictionType, self.scheduler.config.prediction_type)

    @property
    def unet(self) -> Any:
        """The denoiser of a family where that is a U-Net, by the name that it has in diffusers."""
        if self.family.denoiser != "unet":
            raise AttributeError(f"{self.name} has no U-Net; its denoiser is a {type(self.denoiser).__name__}.")
        return self.denoiser

    @unet.setter
    def unet(self, denoiser: Any) -> None:
        self.denoiser = denoiser

    @property
    def latent_channels(self) -> int:
        """Channels of the latents."""
        return int(self.denoiser.config.out_channels)

    @property
    def levels(self) -> int:
        """Sizes of picture within the denoiser, each half of the one before; latents must be so often divisible."""
        return len(getattr(self.denoiser.config, "block_out_channels", (1,)))

    @property
    def vae_factor(self) -> int:
        """Pixels per latent value, on a side."""
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def inpaints(self) -> bool:
        """Whether this is an inpainting model: one whose U-Net also takes what `known` gives."""
        return is_inpainting(self.denoiser, self.vae)

    @property
    def resolution(self) -> int:
        """Side in pixels of the images that this base model was trained on."""
        size = self.denoiser.config.sample_size
        return int(size) * self.vae_factor if isinstance(size, int) else self.family.defaults.resolution

    @property
    def defaults(self) -> Defaults:
        """The family's defaults, with this base model's own resolution."""
        return replace(self.family.defaults, resolution=self.resolution)

    # Text

    def parts(self, *, text: bool) -> dict[str, nn.Module]:
        """The parts that can be trained, by their names in files: "unet" or "transformer", and with `text` also
        "text_encoder" and "text_encoder_2"."""
        encoders = zip(self.family.encoders, self.text_encoders, strict=True) if text else ()
        return {self.family.denoiser: self.denoiser, **{encoder.folder: model for encoder, model in encoders}}

    @property
    def chunk_size(self) -> int:
        """Tokens of a prompt that the text encoder takes at once, without the start and end tokens."""
        return int(self.text_encoders[0].config.max_position_embeddings) - 2

    @property
    def token_limit(self) -> int:
        """Tokens of a prompt that are read, without the start and end tokens."""
        return self.max_tokens or self.chunk_size

    def token_count(self, prompt: str) -> int:
        """Number of tokens of a prompt, of any length, without the start and end tokens."""
        return max(len(self._ids(tokenizer, prompt)) for tokenizer in self.tokenizers)

    def chunk_count(self, prompt: str) -> int:
        """Number of chunks of `chunk_size` tokens that the text encoder takes of a prompt, one after another."""
        return self._chunks_of(self.token_count(prompt))

    def _chunks_of(self, tokens: int) -> int:
        return max(1, math.ceil(min(tokens, self.token_limit) / self.chunk_size))

    def cut_off(self, prompt: str) -> str:
        """The end of the prompt that is not read; empty if all is read."""
        ids = self._ids(self.tokenizers[0], prompt)
        return str(self.tokenizers[0].decode(ids[self.token_limit :])).strip()

    @staticmethod
    def _ids(tokenizer: Any, prompt: str) -> list[int]:
        text = convert_multi_vector_prompt(tokenizer, prompt)
        return list(tokenizer(text, add_special_tokens=False, truncation=False, verbose=False).input_ids)

    def encode_text(self, prompts: Sequence[str], *, grad: bool = False) -> TextEmbedding:
        """Encode the prompts as the U-Net takes them, in the dtype of the text encoder's weights.

        SD: the last hidden state after the final norm. SDXL: the last but one hidden state of both encoders, side by
        side, and the second encoder's projected pooled embedding. A prompt of more than `chunk_size` tokens is encoded
        in chunks of that size, each with its own start and end token, one after another, as in web interfaces; the
        pooled embedding is the first chunk's. Warns about a prompt longer than `token_limit`, whose end is cut off.
        grad: whether gradients flow into the trained parts of the text encoders. Raises ConfigError for one text in
        place of a list, and for none.
        """
        return TextEmbedding.cat(self.encode_apart(prompts, grad=grad))

    def encode_apart(self, prompts: Sequence[str], *, grad: bool = False) -> list[TextEmbedding]:
        """As `encode_text`, but each prompt's embedding by itself, with only the tokens of its own chunks."""
        if isinstance(prompts, str) or not len(prompts):  # each letter of a text is a text
            raise ConfigError(f"the prompts {prompts!r:.40}: wanted a list of one or more, such as ['a crab'].")
        ids = [[self._ids(tokenizer, prompt) for prompt in prompts] for tokenizer in self.tokenizers]
        lengths = [max(map(len, each)) for each in zip(*ids, strict=True)]
        for prompt, length in zip(prompts, lengths, strict=True):
            if length > self.token_limit:
                cut, more = truncate_text(self.cut_off(prompt)), truncation_hint(self.token_limit)
                warnings.warn(
                    f"prompt of {length} tokens, {self.token_limit} are seen; cut: {cut!r}{more}", stacklevel=3
                )
        self.lazy_weights.load("text")
        counts = list(map(self._chunks_of, lengths))
        with torch.set_grad_enabled(grad):
            chunks = self._encode_chunks(ids, counts)
        return [chunks[first:end].joined() for first, end in pairwise(accumulate(counts, initial=0))]

    def _encode_chunks(self, ids: Sequence[Sequence[list[int]]], counts: Sequence[int]) -> TextEmbedding:
        """The embedding of each chunk by itself, in order. ids: for each tokenizer, those of each prompt, one list per
        chunk."""
        outputs = []
        for tokenizer, encoder, told in zip(self.tokenizers, self.text_encoders, ids, strict=True):
            each = zip(told, counts, strict=True)
            rows = [row for one, count in each for row in self._rows(tokenizer, one, count)]
            # Padding is not masked: no Stable Diffusion was trained with a mask.
            outputs.append(encoder(torch.tensor(rows, device=self.precision.device), output_hidden_states=True))
        if len(self.text_encoders) == 1:
            return TextEmbedding(self._last_state(self.text_encoders[0], outputs[0]))
        skip = self.clip_skip or 0
        hidden = torch.cat([output.hidden_states[-(skip + 2)] for output in outputs], dim=-1)
        return TextEmbedding(hidden, outputs[-1].text_embeds)

    def chunk_ids(self, tokenizer: Any, prompt: str) -> list[list[int]]:
        """The token ids that a text encoder gets for a prompt: for each chunk `chunk_size` + 2 ids, including start,
        end and padding."""
        return self._rows(tokenizer, self._ids(tokenizer, prompt), self.chunk_count(prompt))

    def _rows(self, tokenizer: Any, ids: Sequence[int], count: int) -> list[list[int]]:
        return chunk_token_ids(tokenizer, ids[: self.token_limit], self.chunk_size, count)

    def _last_state(self, encoder: Any, output: Any) -> Tensor:
        if not self.clip_skip:
            return cast(Tensor, output.last_hidden_state)
        # transformers 5.6 dropped the level `text_model` of CLIPTextModel.
        norm = getattr(encoder, "text_model", encoder).final_layer_norm
        return cast(Tensor, norm(output.hidden_states[-(self.clip_skip + 1)]))

    def unconditional(self, count: int) -> TextEmbedding:
        """The embedding of "no prompt" for guidance, as the pipeline has it: SDXL's base model uses zeros."""
        text = self.encode_text([""] * count)
        return text.zeros() if self.zeros_for_empty_prompt else text

    # Pixels

    @torch.no_grad()
    def encode_pixels(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(mean, deviation) of the scaled latents, fp32, each (batch, channels, height/f, width/f).

        f is `vae_factor`. pixels: (batch, 3, height, width) in [-1, 1], height and width multiples of f.
        """
        self.lazy_weights.load("vae")
        with self._outside_autocast():
            encoded = self.vae.encode(pixels.to(self.precision.device, self.vae.dtype)).latent_dist
        shift, scale = latent_scale(self.vae, self.precision.device)
        return (encoded.mean.float() - shift) * scale, encoded.std.float() * scale

    def known(self, pixels: Tensor, hidden: Tensor) -> Tensor:
        """What an inpainting U-Net takes beside noised latents, fp32, (batch, 1 + channels, height/f, width/f): the
        mask, and the latents of the images with grey where it hides them, as diffusers' inpainting pipelines have it.

        pixels: as of `encode_pixels`. hidden: (batch, 1, height, width), 1 where an image is hidden, else 0.
        """
        f = self.vae_factor
        latents, _ = self.encode_pixels(pixels * (1 - hidden.to(pixels)))
        return torch.cat([hidden[..., ::f, ::f].to(latents), latents], dim=1)

    def _nothing_known(self, latents: Tensor) -> Tensor:
        """`known` of images that are hidden as a whole, for latents of this shape: then the prompt alone counts."""
        height, width = (side * self.vae_factor for side in latents.shape[2:])
        if (height, width) not in self._hidden:
            with self.lazy_weights.restored_after():
                grey = torch.zeros(1, 3, height, width)
                self._hidden[height, width] = self.known(grey, torch.ones_like(grey[:, :1]))
        return self._hidden[height, width].expand(len(latents), -1, -1, -1)

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to pixels, fp32, (batch, 3, height, width) in [-1, 1].

        If the result is not finite, it is decoded once more in fp32. Raises BaseModelError if that is not finite
        either.
        """
        shift, scale = latent_scale(self.vae, self.precision.device)
        encoded = latents.to(self.precision.device).float() / scale + shift
        self.lazy_weights.load("vae")
        dtype = self.vae.dtype
        with self._outside_autocast():
            pixels = self.vae.decode(encoded.to(dtype)).sample.float()
            if not torch.isfinite(pixels).all() and dtype != torch.float32:
                warnings.warn(f"the VAE overflowed in {dtype}; decoding in fp32", stacklevel=2)
                try:
                    pixels = self.vae.float().decode(encoded).sample
                finally:
                    self.vae.to(dtype)
        if not torch.isfinite(pixels).all():
            raise BaseModelError(
                f"{self.name}: the image is not finite, even in fp32. Latents or VAE are broken; try another --vae."
            )
        return cast(Tensor, pixels.clamp(-1, 1))

    def _outside_autocast(self) -> Any:
        return torch.autocast(self.precision.device.type, enabled=False)

    # Noise

    def added_conditions(
        self, text: TextEmbedding, original_sizes: Pairs, crops: Pairs, target_sizes: Pairs
    ) -> dict[str, Tensor] | None:
        """SDXL's additional conditions for `predict`; None for the other families.

        original_sizes, target_sizes: (height, width) in pixels for each image; crops: (top, left). Returns time_ids
        (batch, 6), fp32, and text_embeds (batch, width).
        """
        if getattr(self.denoiser.config, "addition_embed_type", None) != "text_time":
            return None
        if text.pooled is None:
            raise BaseModelError(
                f"{self.name}: SDXL wants a pooled text embedding, this text has none. Encode it with SDXL."
            )
        device = self.precision.device
        pairs = [torch.as_tensor(pair, dtype=torch.float32) for pair in (original_sizes, crops, target_sizes)]
        return {"time_ids": torch.cat(pairs, dim=1).to(device), "text_embeds": text.pooled.to(device)}

    def predict(
        self,
        latents: Tensor,
        timesteps: Tensor,
        text: TextEmbedding,
        added: Mapping[str, Tensor] | None = None,
        known: Tensor | None = None,
    ) -> Tensor:
        """The denoiser's raw output, in the dtype of the latents: noise, v or a velocity, see `prediction_type`.

        latents: (batch, channels, height/f, width/f), noised. timesteps: (batch,) integers below T. known: for an
        inpainting model, what `known` gives of the images; None hides them as a whole.
        """
        self.lazy_weights.load("unet")
        seen = latents
        if self.inpaints:
            known = self._nothing_known(latents) if known is None else known
            seen = torch.cat([latents, known.to(latents)], dim=1)
        with self.precision.autocast():
            output = self.denoise(seen, timesteps, text, added)
        return output.to(latents.dtype)

    def denoise(
        self, seen: Tensor, timesteps: Tensor, text: TextEmbedding, added: Mapping[str, Tensor] | None
    ) -> Tensor:
        """The call of the denoiser itself; a family whose denoiser is called in another way has its own.

        seen: (batch, channels, height/f, width/f), all that it takes in this shape. The rest as of `predict`.
        """
        output: Tensor = self.denoiser(
            seen, timesteps, encoder_hidden_states=text.hidden, added_cond_kwargs=added, return_dict=False
        )[0]
        return output

    # Whole

    def pipeline(self, sampler: str | None = None) -> Any:
        """A diffusers pipeline that shares these modules; no safety checker, no network access. For an inpainting
        model it is one that inpaints.

        sampler: a name from `sfumato.utils.schedulers`. Unset: the family's; `base.scheduler` is the folder's own. With
        clip_skip, give the pipeline prompts from `encode_text`, or `clip_skip=` as well. If VAE and U-Net have
        different dtypes (fp16), ask it for latents and use `decode`.
        """
        self.lazy_weights.load("unet", "vae", "text")
        parts: dict[str, Any] = {
            "vae": self.vae,
            "unet": self.denoiser,
            "scheduler": make_scheduler(sampler or self.family.defaults.sampler, self.scheduler.config),
            "feature_extractor": None,
        }
        for encoder, text_encoder, tokenizer in zip(
            self.family.encoders, self.text_encoders, self.tokenizers, strict=True
        ):
            parts |= {encoder.folder: text_encoder, encoder.tokenizer: tokenizer}
        if self.family.name == "sdxl":
            zeros = self.zeros_for_empty_prompt
            kind = _pipeline_class(f"StableDiffusionXL{'Inpaint' * self.inpaints}Pipeline")
            return kind(**parts, force_zeros_for_empty_prompt=zeros, add_watermarker=False)
        kind = _pipeline_class(f"StableDiffusion{'Inpaint' * self.inpaints}Pipeline")
        return kind(**parts, safety_checker=None, requires_safety_checker=False)

    # By what it is known again

    def quick_fingerprint(self) -> str:
        """As `fingerprint`, over configs, tokenizers and one page of each weight; it takes milliseconds.

        For files that can be made again, such as the cells of a grid. Further training changes every page of a weight,
        so it is noticed.
        """
        if not self.files:
            return self.fingerprint()
        pages = self.lazy_weights.first_pages("unet", "vae", "text", as_stored=True)
        return pages_digest(pages, settings_digest(self, self._vocabularies))

    def fingerprint(self) -> str:
        """sha256, in hex, over configs, tokenizers and weight files (over the weights in memory if there are no files).

        The same for every precision and device, and with any new words in use. Read once, then remembered. Raises
        FileError if the files are no longer those that the base model is read from.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        digest = settings_digest(self, self._vocabularies)
        update_with_weights(digest, self)
        self.adapted_fingerprint()  # now, while the files are those that the base is read from
        self.lazy_weights.check_files()
        return digest.hexdigest()

    def adapted_fingerprint(self) -> str:
        """sha256, in hex, over what adapters change: one page of each weight of U-Net and text encoders, with any VAE.

        For the file of an adapter, to tell releases of a base model apart; it takes milliseconds. The same if the
        weights were saved again in a dtype that holds them exactly. Empty if there are no files. Read once, then
        remembered.
        """
        return self._adapted_fingerprints[0]

    @cached_property
    def _adapted_fingerprints(self) -> tuple[str, str]:
        """`adapted_fingerprint`, and the fingerprint of the weights as they are stored, which sfumato before 0.5
        wrote."""
        now, before = (
            self.lazy_weights.first_pages("unet", "text", as_stored=as_stored) for as_stored in (False, True)
        )
        return (pages_digest(now), pages_digest(before)) if self.files else ("", "")

    @cached_property
    def _vocabularies(self) -> list[str]:
        return [vocabulary_digest(tokenizer) for tokenizer in self.tokenizers]

    def is_another_release(self, metadata: Mapping[str, str]) -> bool:
        """Whether an adapter was trained on another release of pocket than this one, by its file's metadata.

        False if the metadata does not say, and for other base models: adapters of SD 1.5 are meant for its fine-tunes,
        too.
        """
        stated = metadata.get("sfumato.base_fingerprint", "")
        if not stated or not self.name == metadata.get("ss_sd_model_name") == "pocket":
            return False
        return bool(self.adapted_fingerprint()) and stated not in self._adapted_fingerprints


def _pipeline_class(name: str) -> Any:
    """diffusers' pipeline of this name, loaded without transformers' warnings of image processors that want
    torchvision: they are of parts that are not used here, and of nothing that one could do."""
    logger = logging.getLogger("transformers.utils.import_utils")
    logger.addFilter(_tells_of_more_than_torchvision)
    try:
        return getattr(diffusers, name)
    finally:
        logger.removeFilter(_tells_of_more_than_torchvision)


def _tells_of_more_than_torchvision(record: logging.LogRecord) -> bool:
    return "requires torchvision" not in record.getMessage()
