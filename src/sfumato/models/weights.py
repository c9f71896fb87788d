"""Models from a config and files, with every weight accounted for before any is read.

Parts of a base that give their memory back while nothing needs them, and are read from their files again.

A training computes latents and embeddings before its loop, where U-Net and optimizer need the memory, and draws and
measures now and then. So VAE and text encoders need not stay: SD 1.5's take 0.8 GiB in fp32, SDXL's 3.4.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import diffusers
import torch
from diffusers.models.modeling_utils import no_init_weights
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from sfumato.errors import BaseModelError, FileError, package_error
from sfumato.files.header import DTYPE_BYTES, Header
from sfumato.files.read import DTYPES, Stamp, check_stamp, read_copies, stamp
from sfumato.precision.memory import release_freed_memory
from sfumato.precision.quantization import drop_weights, set_weight, stored_weights

if TYPE_CHECKING:
    from sfumato.precision import Part


_PAGE = 4096
"""Bytes of a weight that a fingerprint sees, in the dtype that it is taken in: 2,048 values in half precision."""

_LAYERS = (
    "layers_per_block",
    "transformer_layers_per_block",
    "reverse_transformer_layers_per_block",
    "num_hidden_layers",
)
_BLOCKS = ("block_out_channels", "down_block_types", "up_block_types")
_MOST = 100
"""Of layers in a text encoder or a block, and of blocks; the largest number in SDXL is 32."""
_NOT_OF_SHAPES = (
    "dtype",
    "torch_dtype",
    "attn_implementation",
    "experts_implementation",
    "quantization_config",
    "auto_map",
    "num_labels",
)
"""What a text encoder's config may say beside its shapes, as do names that begin with _: some would have transformers
get a program from the hub, and of labels, which it has none of, make a name each."""

TEXT_CLASSES = {"CLIPTextModel": CLIPTextModel, "CLIPTextModelWithProjection": CLIPTextModelWithProjection}


def unet_skeleton(config: Mapping[str, Any]) -> Any:
    """The U-Net of a config on the device `meta`: shapes without memory."""
    with _on_meta("U-Net", config):
        return diffusers.UNet2DConditionModel.from_config(dict(config))


def vae_skeleton(config: Mapping[str, Any]) -> Any:
    """The VAE of a config on the device `meta`."""
    with _on_meta("VAE", config):
        return diffusers.AutoencoderKL.from_config(dict(config))


def text_skeleton(class_name: str, config: Mapping[str, Any]) -> Any:
    """The text encoder of a config on the device `meta`; class_name is one of `TEXT_CLASSES`."""
    settings = {key: value for key, value in config.items() if not (key in _NOT_OF_SHAPES or key.startswith("_"))}
    with _on_meta("text encoder", config):
        return TEXT_CLASSES[class_name](CLIPTextConfig(**settings))


@contextmanager
def _on_meta(what: str, config: Mapping[str, Any]) -> Iterator[None]:
    """What is made within has shapes and no memory. Raises BaseModelError where a config does not describe it."""
    try:
        _check_layers(config)
        with torch.device("meta"), no_init_weights():  # drawing them takes as long as all else, and leaves nothing
            yield
    except Exception as error:  # the libraries check each value in a way of its own, or not at all
        if package_error(error):
            raise
        reason = " ".join(str(error).split())[:160]
        raise BaseModelError(
            f"the {what}'s config.json describes none ({type(error).__name__}: {reason}). Download it again."
        ) from None


def _check_layers(config: Mapping[str, Any]) -> None:
    """Raises ValueError for more layers than any model has, which would be made for hours."""
    lists = {key: len(config[key]) for key in _BLOCKS if isinstance(config.get(key), list | tuple)}
    layers = {key: _largest(config.get(key)) for key in _LAYERS}
    for key, count in (lists | layers).items():
        if count > _MOST:
            raise ValueError(f"{count:,} for {key}, wanted at most {_MOST}")
    if (count := prod(max(1, each) for each in (*layers.values(), max(lists.values(), default=1)))) > 10 * _MOST:
        raise ValueError(f"{count:,} layers in all, wanted at most {10 * _MOST:,}")


def _largest(value: Any) -> float:
    """Of the numbers in a setting, which may have one a block, and in it one a layer, and of how many these are."""
    if isinstance(value, list | tuple):
        return max(len(value), *map(_largest, value))
    return value if isinstance(value, int | float) else 0


@dataclass(frozen=True)
class StoredWeight:
    """Where a weight lies: a tensor of a file, a third of its rows (in thirds), or its transpose."""

    header: Header
    name: str
    third: slice | None = None
    transposed: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        shape = self.header.tensors[self.name].shape
        if self.third is not None:
            shape = (shape[0] // 3, *shape[1:])
        return shape[::-1] if self.transposed else shape

    def view(self, tensor: Tensor) -> Tensor:
        """The weight within the file's tensor, a view."""
        if self.third is not None:
            rows = tensor.shape[0] // 3
            tensor = tensor[self.third.start * rows : self.third.stop * rows]
        return tensor.T if self.transposed else tensor


class LazyModel:
    """A model on the device `meta`, and how its weights are read.

    stored: where each weight of the model lies, by its name in the model's `state_dict()`. A 1x1 convolution may be
    stored as a matrix, and the other way round. Raises BaseModelError that counts what is missing, unknown or of
    another shape.
    """

    def __init__(self, model: Any, stored: Mapping[str, StoredWeight], dtype: torch.dtype, where: str):
        self.model, self.stored, self._dtype, self._where = model, stored, dtype, where
        _compare(model, stored, where)
        # Kept from now on: a part that rests may be read again hours later.
        self._stamps = {path: _stamp(path) for path in self.files}
        model.eval().requires_grad_(False)

    def __deepcopy__(self, memo: dict[int, Any]) -> LazyModel:
        """Another model, of the same files."""
        copied = copy.copy(self)
        copied.model = copy.deepcopy(self.model, memo)
        return copied

    @property
    def files(self) -> list[Path]:
        """All that are read, each once."""
        return list(dict.fromkeys(stored.header.path for stored in self.stored.values()))

    def check_files(self) -> None:
        """Raises FileError for a file that changed since this was made."""
        for path, wanted in self._stamps.items():
            check_stamp(path, _stamp(path), wanted)

    def first_pages(self, *, as_stored: bool = False) -> Iterator[bytes]:
        """Of each weight its name, and the first values that its file has of it: a model's share of a file, quickly.

        In half precision where that holds those of all weights, so that a model saved anew in fp32 has the same.
        as_stored: the first 4 KiB, in the file's dtype.
        """
        pages = self._pages()
        narrow = None if as_stored else next((dtype for dtype in _NARROW if _fits_dtype(dtype, pages.values())), None)
        for name, page in pages.items():
            yield name.encode()
            if narrow is not None:
                page = page.to(narrow)
            yield page.view(torch.uint8).numpy().tobytes()[:_PAGE]

    def _pages(self) -> dict[str, Tensor]:
        """By the weight's name, in order, its first values as the file has them: a page in half precision, or more."""
        # transformers 5.6 dropped the level `text_model` of CLIPTextModel.
        named = sorted((name.removeprefix("text_model."), stored) for name, stored in self.stored.items())
        found = {}
        with ExitStack() as stack:
            files = {path: stack.enter_context(path.open("rb")) for path in self.files}
            for name, stored in named:
                place, file = stored.header.tensors[stored.name], files[stored.header.path]
                file.seek(place.start)
                size = _PAGE * max(2, DTYPE_BYTES[place.dtype]) // 2
                size = min(size, place.end - place.start)
                if len(page := file.read(size)) < size:
                    self.check_files()  # raises: it was cut since
                found[name] = torch.frombuffer(bytearray(page), dtype=DTYPES[place.dtype])
        return found

    def read(self) -> None:
        """Give the model its weights: copied from their files in `dtype`, frozen.

        Raises FileError for a file that changed since this was made, and for weights that are not finite.
        """
        headers = {stored.header.path: stored.header for stored in self.stored.values()}
        tensors = {
            (path, name): tensor
            for path, header in headers.items()
            for name, tensor in read_copies(
                header,
                {s.name for s in self.stored.values() if s.header is header},
                self._dtype,
                wanted_stamp=self._stamps[path],
            ).items()
        }
        # In one pass: `load_state_dict` looks for each name among all of them, at each module.
        for path, module in self.model.named_modules():
            for name, shape in stored_weights(module).items():
                stored = self.stored[f"{path}.{name}" if path else name]
                tensor = stored.view(tensors[stored.header.path, stored.name])
                tensor = tensor.clone() if stored.third else tensor  # three weights of one tensor are none of another's
                set_weight(module, name, tensor.to(self._dtype).contiguous().reshape(shape))
        _restore_buffers(self.model, self._where)


_NARROW = (torch.bfloat16, torch.float16)
"""bf16 first: of small values fp16 holds all that it has, and it next to none of fp16's."""


def _fits_dtype(dtype: torch.dtype, pages: Iterable[Tensor]) -> bool:
    """Whether all of these values are exact in this dtype."""
    return all(page.is_floating_point() and torch.equal(page.to(dtype).double(), page.double()) for page in pages)


def _stamp(path: Path) -> Stamp:
    try:
        return stamp(path.stat())
    except OSError as error:
        raise FileError(f"{path.name}: the file cannot be read ({error.strerror}). Check it and try again.") from None


def _compare(model: nn.Module, stored: Mapping[str, StoredWeight], where: str) -> None:
    wanted = model.state_dict()
    missing = [name for name in wanted if name not in stored]
    unknown = [name for name in stored if name not in wanted]
    if missing or unknown:
        first = (missing or unknown)[0]
        raise BaseModelError(
            f"{where}: {len(missing)} of {len(wanted)} weights are missing, {len(unknown)} are unknown, first {first}. "
            "The file is incomplete or of another architecture; download it again or name another base."
        )
    for name, place in wanted.items():
        shape = stored[name].shape
        if [side for side in shape if side != 1] != [side for side in place.shape if side != 1]:
            raise BaseModelError(
                f"{where}: {name} has the shape {list(shape)}, its config wants {list(place.shape)}. "
                "Config and weights belong to different models; name another base."
            )


def _restore_buffers(model: nn.Module, where: str) -> None:
    """Give the buffers that no file holds their values: CLIP's position ids are the only ones."""
    for path, module in model.named_modules():
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not buffer.is_meta:
                continue
            if name != "position_ids":
                raise BaseModelError(f"{where}: nothing is known about the buffer {path}.{name}. Report it.")
            setattr(module, name, torch.arange(buffer.shape[-1]).expand((1, -1)))


class LazyWeights:
    """Which parts rest: their modules stay what they are, hooks and all, and their weights are on the device `meta`.

    shells: by part; all of them rest at first. place: puts a module that was read where it belongs. A part that is
    trained must not rest: it would come back as it was.
    """

    def __init__(self, shells: Mapping[Part, Sequence[LazyModel]], place: Callable[[nn.Module, Part], object]):
        self._shells, self._place = shells, place
        self._at_rest = set(shells)

    def load(self, *parts: Part) -> None:
        """Read and place the weights of those of the parts that rest."""
        for part in self._at_rest.intersection(parts):
            for shell in self._shells[part]:
                shell.read()
                self._place(shell.model, part)
            self._at_rest.discard(part)

    def check_files(self) -> None:
        """Raises FileError for a file of any part that changed since the base was loaded."""
        for shells in self._shells.values():
            for shell in shells:
                shell.check_files()

    def first_pages(self, *parts: Part, as_stored: bool = False) -> Iterator[bytes]:
        """As of each part's `LazyModel`, awake or not."""
        for shell in (shell for part in parts for shell in self._shells.get(part, ())):
            yield from shell.first_pages(as_stored=as_stored)

    def load_only(self, *parts: Part) -> None:
        """Wake these parts, and let the others rest until something wakes them."""
        self._rest(self._shells.keys() - set(parts))
        self.load(*parts)

    @contextmanager
    def restored_after(self) -> Iterator[None]:
        """What rests before the block rests after it, whatever the block wakes."""
        before = set(self._at_rest)
        try:
            yield
        finally:
            self._rest(before)

    def _rest(self, parts: Set[Part]) -> None:
        awake = parts - self._at_rest
        for part in awake:
            for shell in self._shells[part]:
                for module in shell.model.modules():
                    drop_weights(module)
            self._at_rest.add(part)
        if awake:
            release_freed_memory()
