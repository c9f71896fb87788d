"""Models that say what is in a picture: BLIP and Florence-2 through transformers, WD taggers through onnxruntime.

Each is a folder: safetensors with a processor's configs, or model.onnx with selected_tags.csv. Nothing in a folder is
run as a program.
"""

from __future__ import annotations

import csv
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from sfumato.errors import ConfigError, FileError
from sfumato.utils.formatting import option_flag, pluralize

if TYPE_CHECKING:
    from sfumato.precision import Precision

Detail = Literal["short", "detailed", "paragraph"]
Captioner = Callable[[Sequence[Image.Image]], list[str]]
"""RGB pictures -> a caption for each, on one line."""

TASKS: Mapping[Detail, str] = MappingProxyType(
    {"short": "<CAPTION>", "detailed": "<DETAILED_CAPTION>", "paragraph": "<MORE_DETAILED_CAPTION>"}
)
"""Florence-2's tasks, table 11 of Xiao et al. 2023."""
_RATING, _GENERAL, _CHARACTER = "9", "0", "4"
_FACES = frozenset(
    [
        "0_0",
        "(o)_(o)",
        "+_+",
        "+_-",
        "._.",
        "<o>_<o>",
        "<|>_<|>",
        "=_=",
        ">_<",
        "3_3",
        "6_9",
        ">_o",
        "@_@",
        "^_^",
        "o_o",
        "u_u",
        "x_x",
        "|_|",
        "||_||",
    ]
)
"""Danbooru's tags that are drawn with an underscore."""
_PROVIDERS: Mapping[str, str] = MappingProxyType(
    {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "mps": "CoreMLExecutionProvider"}
)
"""onnxruntime's names of our devices."""
_FLORENCE = "The Florence-2 that transformers knows is florence-community/Florence-2-base."
"""Microsoft's own folders are for a program that they bring, with a config and weights of other names."""
_WANTED = ("*.json", "*.txt", "*.safetensors", "model.onnx", "selected_tags.csv")


@dataclass(frozen=True)
class CaptionSettings:
    """Options of the captioning models. detail: of Florence-2's captions. longest: largest number of tokens in a
    caption. threshold, character_threshold: lowest probability of a tagger's tag. without: tags to leave out.
    precision, device: as they were asked for."""

    detail: Detail = "detailed"
    longest: int = 75
    threshold: float = 0.35
    character_threshold: float = 0.85
    without: tuple[str, ...] = ()
    precision: str = "auto"
    device: str = "auto"


_KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "detail": ("florence2",),
        "longest": ("blip", "florence2"),
        "threshold": ("a tagger",),
        "character_threshold": ("a tagger",),
        "without": ("a tagger",),
        "precision": ("blip", "florence2"),
        "device": ("blip", "florence2", "a tagger"),
    }
)
"""Which models each of the wishes is for."""


def load_captioner(model: str, precision: Precision, wishes: CaptionSettings) -> Captioner:
    """A captioner from a folder, or from a hub id in the cache or on the hub. Raises FileError and ConfigError."""
    if not model:
        raise ConfigError("--model is empty; name the model's folder or a hub id.")
    folder = found if (found := Path(model).expanduser()).is_dir() else _from_hub(model)
    if (folder / "model.onnx").is_file():
        _refuse_unused(wishes, "a tagger")
        return _Tagger(folder, wishes)
    kind = _config(folder).get("model_type")
    if kind not in ("blip", "florence2"):
        hint = f" {_FLORENCE}" if kind else ""
        raise FileError(
            f"{model}: its config says {kind!r}; blip, florence2 and WD taggers (model.onnx) are known.{hint}"
        )
    _refuse_unused(wishes, str(kind))
    return _Describer(folder, str(kind), precision, wishes)


def _refuse_unused(wishes: CaptionSettings, kind: str) -> None:
    """Raises ConfigError for a wish that models of this kind have no use for."""
    for name, wish in asdict(wishes).items():
        if kind not in _KINDS[name] and wish != getattr(CaptionSettings(), name):
            raise ConfigError(
                f"{option_flag(name)} has no effect on {kind}; it is for {' and '.join(_KINDS[name])}. Leave it out."
            )


def _from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    from sfumato.models.folder import disk_error

    if Path(hub_id).exists():
        raise ConfigError(f"--model {hub_id}: is a file; name the model's folder or a hub id.")
    try:
        return Path(snapshot_download(hub_id, local_files_only=True, allow_patterns=list(_WANTED)))
    except HFValidationError:
        raise ConfigError(f"--model {hub_id}: neither a folder here nor a hub id. Check the spelling.") from None
    except Exception:  # not in the cache, for one of many reasons
        pass
    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED)))
    except Exception as error:  # the hub's library has changed its network library twice
        if reason := disk_error(error):
            raise ConfigError(f"--model {hub_id}: {reason}") from None
        raise ConfigError(
            f"--model {hub_id}: no folder here, not in the hub's cache, and the hub does not give it "
            f"({type(error).__name__}). Run `hf download {hub_id}` where there is a network, or name a folder."
        ) from None


def _config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise FileError(f"{folder.name}/config.json: missing or no JSON; name the folder of a whole model.") from None
    return config if isinstance(config, dict) else {}


class _Describer:
    """BLIP or Florence-2: a sentence or more."""

    def __init__(self, folder: Path, kind: str, precision: Precision, wishes: CaptionSettings):
        from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor
        from transformers.utils import logging

        from sfumato.files.header import read_header

        weights = sorted(folder.glob("[!.]*.safetensors"))  # none of a Mac's ._ files
        if not weights:
            raise FileError(f"{folder.name}: no .safetensors in it, and pickled weights are never opened. Get another.")
        for path in weights:
            read_header(path)
        if (folder / "adapter_config.json").exists():  # of which transformers would load adapter_model.bin, too
            raise FileError(f"{folder.name}: holds a peft adapter (adapter_config.json); name a folder without one.")
        logging.disable_progress_bar()
        self.kind, self.wishes, self.precision = kind, wishes, precision
        other = f"Download it again.{f' {_FLORENCE}' if kind == 'florence2' else ''}"
        try:
            here = {"local_files_only": True, "trust_remote_code": False}
            self.processor = AutoProcessor.from_pretrained(str(folder), **here)
            config = AutoConfig.from_pretrained(str(folder), **here)
            config._attn_implementation = None  # what the file names may be a program on the hub
            self.model, loaded = AutoModelForImageTextToText.from_pretrained(
                str(folder),
                config=config,
                **here,
                use_safetensors=True,
                dtype=precision.storage,
                ignore_mismatched_sizes=True,  # an exception of its own otherwise
                output_loading_info=True,
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError, ImportError) as error:
            reason = " ".join(str(error).split())[:160]
            raise FileError(f"{folder.name}: the model cannot be loaded ({reason}). {other}") from None
        # transformers fills what it does not find with random numbers.
        lacking = sorted([*loaded["missing_keys"], *(name for name, *_ in loaded["mismatched_keys"])])
        if lacking:
            raise FileError(
                f"{folder.name}: {pluralize(len(lacking), 'weight')} of {kind} missing or of another shape, first "
                f"{lacking[0]}. {other}"
            )
        self.longest = min(wishes.longest, config.text_config.max_position_embeddings)
        self.model.eval().to(precision.device)

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        import torch

        texts = {"text": [TASKS[self.wishes.detail]] * len(pictures)} if self.kind == "florence2" else {}
        inputs = self.processor(images=list(pictures), return_tensors="pt", padding=bool(texts), **texts)
        inputs = {name: self._placed(value) for name, value in inputs.items()}
        with torch.no_grad(), self.precision.autocast():
            ids = self.model.generate(**inputs, max_new_tokens=self.longest, num_beams=3, do_sample=False)
        return [clean(text) for text in self.processor.batch_decode(ids, skip_special_tokens=True)]

    def _placed(self, value: Any) -> Any:
        value = value.to(self.precision.device)
        return value.to(self.precision.storage) if value.is_floating_point() else value


class _Tagger:
    """A WD tagger: general and character tags above their thresholds, the most certain first, characters before all."""

    def __init__(self, folder: Path, wishes: CaptionSettings):
        try:
            import onnxruntime
        except ImportError:
            raise ConfigError('WD taggers need an extra: pip install "sfumato[tagger]".') from None
        self.wishes = wishes
        self.tags = _read_tags(folder / "selected_tags.csv")
        self.without = {_tag_text(tag) for tag in wishes.without}
        names = {name for name, _ in self.tags}
        for tag in sorted(self.without - names):
            near = difflib.get_close_matches(tag, names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "; selected_tags.csv lists them."
            raise ConfigError(f"--without {tag!r}: the tagger knows no such tag{hint}")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        providers = _providers(wishes.device, onnxruntime.get_available_providers())
        try:
            self.session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=providers)
        except Exception as error:  # onnxruntime's exceptions have no common base
            reason = " ".join(str(error).split())[:160]
            raise FileError(f"{folder.name}/model.onnx: cannot be loaded ({reason}). Download it again.") from None
        self.input = self.session.get_inputs()[0]
        shape = self.input.shape
        if len(shape) != 4 or shape[3] != 3 or not isinstance(shape[1], int):
            raise FileError(
                f"{folder.name}/model.onnx: takes {shape}, wanted (batch, side, side, 3) as WD taggers have."
            )
        self.side = shape[1]

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        # One at a time: some of these models are exported for a single picture.
        rows = [self.session.run(None, {self.input.name: self._pixels(picture)})[0][0] for picture in pictures]
        return [self._caption(row) for row in rows]

    def _pixels(self, picture: Image.Image) -> np.ndarray[Any, np.dtype[np.float32]]:
        """(1, side, side, 3) of 0 to 255 in BGR; the picture in the middle of a white square."""
        side = max(picture.size)
        square = Image.new("RGB", (side, side), "white")
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        square = square.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return np.ascontiguousarray(np.asarray(square, dtype=np.float32)[None, :, :, ::-1])

    def _caption(self, probabilities: np.ndarray[Any, np.dtype[np.float32]]) -> str:
        if len(probabilities) != len(self.tags):
            raise FileError(
                f"selected_tags.csv has {len(self.tags)} tags, model.onnx gives {len(probabilities)}; fetch both anew."
            )
        order = sorted(range(len(self.tags)), key=lambda i: -float(probabilities[i]))
        chosen: dict[str, list[str]] = {_CHARACTER: [], _GENERAL: []}
        least = {_CHARACTER: self.wishes.character_threshold, _GENERAL: self.wishes.threshold}
        for place in order:
            name, category = self.tags[place]
            if category in chosen and probabilities[place] >= least[category] and name not in self.without:
                chosen[category].append(name)
        return ", ".join([*chosen[_CHARACTER], *chosen[_GENERAL]])


def _providers(device: str, there: Sequence[str]) -> list[Any]:
    """Those of onnxruntime's providers `there` that compute on a device, best first. Raises ConfigError for none."""
    kind, _, number = device.partition(":")
    if kind == "auto":
        return list(there)
    wanted = _PROVIDERS[kind]
    if wanted not in there:
        raise ConfigError(
            f"--device {device}: this onnxruntime has no {wanted}, which the tagger wants there. Install one that has "
            "it, such as onnxruntime-gpu for CUDA, or leave --device out."
        )
    return [(wanted, {"device_id": number}) if number else wanted, *([] if kind == "cpu" else [_PROVIDERS["cpu"]])]


def _read_tags(path: Path) -> list[tuple[str, str]]:
    """(tag as it is written in captions, category) of each row of selected_tags.csv."""
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        return [(_tag_text(row["name"]), row["category"]) for row in rows]
    except (OSError, UnicodeDecodeError, KeyError, AttributeError, csv.Error):  # a row that ends before its name
        raise FileError(f"{path.name}: missing, or without the columns name and category. Download it again.") from None


def _tag_text(tag: str) -> str:
    """A tag as captions have it: danbooru's "long_hair" is "long hair"."""
    return tag if tag in _FACES else tag.replace("_", " ")


def clean(text: str) -> str:
    """A model's sentence as a caption: one line of printable text, no special tokens, no full stop of its own."""
    text = re.sub(r"<[^<>\s]{1,20}>", " ", text)
    text = "".join(letter if letter.isprintable() else " " for letter in text)
    text = " ".join(text.split())
    return text[:-1].rstrip() if text.endswith(".") and text.count(".") == 1 else text
