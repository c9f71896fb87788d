"""Pipelines whose prompts name adapters: `pipe("a crab <lora:line:0.8>")`.

`TaggedPrompts` goes in front of a diffusers pipeline's class; pipelines/custom/ has it in front of Stable
Diffusion's and SDXL's, in the form that `DiffusionPipeline.from_pretrained(..., custom_pipeline=FILE)` takes.

How the mix of a drawing is applied: in the weights, or beside the layers.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sfumato.adapters.prompt_tags import TaggedPrompt, split_tags
from sfumato.adapters.weights import Adapter, Weight, is_zero_weight
from sfumato.errors import AdapterError, ConfigError
from sfumato.files.peft import is_adapter_folder
from sfumato.generation.adapter_files import find_adapter
from sfumato.merging.whole_model import is_whole_model

if TYPE_CHECKING:
    from sfumato.compose.match import ApplyMode
    from sfumato.models import Base


class TaggedPrompts:
    """What a pipeline class gains: tags in `prompt`, `adapters=` in a call, and the folder that their files are in.

    Prompts of one call may name different adapters: each picture has its own, in one batch.

    lora_folder: where the files of tags are, at any depth; the working folder by default. A call's adapters are applied
    for that call and leave the weights as they were; a mix that `compose` made stays, and they are added to it. New
    words in their files are known for that call, too. Calls of several threads wait for one another, those of other
    pipelines with these tags and this U-Net as well.
    """

    lora_folder: str | Path = "."

    def __init_subclass__(cls, **options: Any) -> None:
        """The class goes by the name of diffusers' own, by which diffusers finds the pipelines for other tasks, and
        which it writes into a saved folder for whoever loads that without this package."""
        super().__init_subclass__(**options)
        cls.__name__ = cls.__bases__[-1].__name__

    def __call__(
        self, prompt: Any = None, *arguments: Any, adapters: Mapping[str, Weight] | None = None, **options: Any
    ) -> Any:
        """As the pipeline's own call. adapters: weight by file, or by name in `lora_folder`.

        Raises ConfigError for a tag in another text, such as the negative prompt, and for adapters without weights.
        """
        if adapters is not None and not isinstance(adapters, Mapping):
            raise ConfigError(f"adapters={adapters!r:.60}: wanted weights by file or name, such as {{'line': 0.8}}.")
        for text in _texts([*arguments, *options.values()]):
            if found := split_tags(text).adapters:
                raise ConfigError(
                    f"<lora:{found[0][0]}:...> is read in `prompt` alone, not in {text[:60]!r}; move it there."
                )
        plain, tagged = self._without_tags(prompt)
        wanted = [{**(adapters or {}), **each} for each in tagged]
        differ = any(each != wanted[0] for each in wanted)
        if differ and options.get("num_images_per_prompt", 1) != 1:
            raise AdapterError("prompts with different adapters give one image each; repeat a prompt for several.")
        from sfumato.compose.hooks import unet_lock

        with unet_lock(self), self._words(wanted), self._by_picture(wanted) if differ else self._mixed(wanted[0]):
            return super().__call__(plain, *arguments, **options)  # type: ignore[misc]

    def _without_tags(self, prompt: Any) -> tuple[Any, list[dict[str, Weight]]]:
        """The prompt or prompts without tags, and the adapters that each of them names."""
        if isinstance(prompt, str):
            found = split_tags(prompt)
            return found.prompt, [dict(found.adapters)]
        if not isinstance(prompt, list | tuple) or not prompt:
            return prompt, [{}]
        each = [split_tags(text) if isinstance(text, str) else TaggedPrompt(text, ()) for text in prompt]
        return [found.prompt for found in each], [dict(found.adapters) for found in each]

    def _adapters(self, wanted: Mapping[str, Weight]) -> list[Adapter]:
        def place(name: str) -> Path:
            there = os.path.isfile(name) or is_adapter_folder(Path(name)) or is_whole_model(name)
            return Path(name) if there else find_adapter(name, Path(self.lora_folder))

        return [Adapter(place(name), weight, name) for name, weight in wanted.items()]

    def _words(self, wanted: Sequence[Mapping[str, Weight]]) -> Any:
        """A context in which the words are known that the adapters bring with them; those at 0 bring none."""
        from sfumato.adapters.embeddings.embedding import bundled
        from sfumato.files.adapter_file import read_adapter
        from sfumato.files.header import read_header
        from sfumato.files.keys import embedding_key

        counted = {
            each.label: each for one in wanted for each in self._adapters(one) if not is_zero_weight(each.weight)
        }
        holding = {
            label: each  # asked of the header, since a file is read as a whole once more
            for label, each in counted.items()
            if Path(each.path).is_file()
            and any(embedding_key(name, bundled=True) for name in read_header(each.path).tensors)
        }
        return bundled(self, {label: read_adapter(each.path).embeddings for label, each in holding.items()})

    def _by_picture(self, wanted: Sequence[Mapping[str, Weight]]) -> Any:
        """A context in which each picture has its own adapters."""
        from sfumato.compose.per_image import per_picture

        return per_picture(self, [self._adapters(each) for each in wanted])

    def _mixed(self, wanted: Mapping[str, Weight]) -> Any:
        """A context in which the adapters are applied to all pictures."""
        if not wanted:
            return nullcontext()
        from sfumato.compose import compose, current

        added = self._adapters(wanted)
        mix = current(self)
        if mix is None:
            return compose(self, *added, words_known=True)
        stack = ExitStack()
        mix.add(*added)
        stack.callback(mix.remove, *wanted)
        return stack


def with_prompt_tags(variant: Any, pipe: TaggedPrompts) -> Any:
    """A pipeline made of `pipe` for another task, which now reads tags as that does."""
    kind = type(variant)
    variant.__class__ = type(kind.__name__, (TaggedPrompts, kind), {"lora_folder": pipe.lora_folder})
    return variant


def _texts(values: Iterable[Any]) -> Iterator[str]:
    """The texts among a call's arguments, those in lists included."""
    for value in values:
        yield from (each for each in (value if isinstance(value, list | tuple) else [value]) if isinstance(each, str))


def choose_apply_mode(base: Base, adapters: Iterable[Adapter], *, follows_steps: bool = False) -> ApplyMode:
    """The way to mix: "live" where that is the better one for these adapters on this base, else "auto".

    A new weight at every step costs least in a path beside the layers, and adapter guidance holds a second set of the
    weights that it changes, for which there is no room where parts are offloaded. Not of a whole model, whose path is
    as large as the U-Net and would be computed at each call.
    """
    is_beside = follows_steps or base.precision.offload is not None
    return "live" if is_beside and not any(is_whole_model(each.path) for each in adapters) else "auto"
