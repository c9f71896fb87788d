"""Pipelines whose prompts name adapters: `pipe("a crab <lora:line:0.8>")`.

`TaggedPrompts` goes in front of a diffusers pipeline's class; pipelines/custom/ has it in front of Stable
Diffusion's and SDXL's, in the form that `DiffusionPipeline.from_pretrained(..., custom_pipeline=FILE)` takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from sfumato.compose.adapter import Adapter, Weight
from sfumato.errors import AdapterError
from sfumato.prompts import Tagged, split_tags
from sfumato.specs import find_adapter


class TaggedPrompts:
    """What a pipeline class gains: tags in `prompt`, `adapters=` in a call, and the folder that their files are in.

    lora_folder: where the files of tags are, at any depth; the working folder by default. A call's adapters are applied
    for that call and leave the weights as they were; a mix that `compose` made stays, and they are added to it.
    """

    lora_folder: str | Path = "."

    def __call__(
        self, prompt: Any = None, *arguments: Any, adapters: Mapping[str, Weight] | None = None, **options: Any
    ) -> Any:
        """As the pipeline's own call. adapters: weight by file, or by name in `lora_folder`."""
        plain, tagged = self._without_tags(prompt)
        wanted = {**(adapters or {}), **tagged}
        with self._mixed(wanted):
            return super().__call__(plain, *arguments, **options)  # type: ignore[misc]

    def _without_tags(self, prompt: Any) -> tuple[Any, dict[str, Weight]]:
        """The prompt or prompts without tags, and the adapters that all of them name."""
        if isinstance(prompt, str):
            found = split_tags(prompt)
            return found.prompt, dict(found.adapters)
        if not isinstance(prompt, list | tuple):
            return prompt, {}
        each = [split_tags(text) if isinstance(text, str) else Tagged(text, ()) for text in prompt]
        if any(set(found.adapters) != set(each[0].adapters) for found in each):
            raise AdapterError(
                "the prompts of one call name different adapters; call the pipeline once for each set, or give "
                "sfumato.compose weights per picture."
            )
        return [found.prompt for found in each], dict(each[0].adapters) if each else {}

    def _mixed(self, wanted: Mapping[str, Weight]) -> Any:
        """A context in which the adapters are applied."""
        if not wanted:
            return nullcontext()
        from contextlib import ExitStack

        from sfumato.compose import compose, current

        files = {
            name: Path(name) if Path(name).is_file() else find_adapter(name, Path(self.lora_folder)) for name in wanted
        }
        added = [Adapter(files[name], weight, name) for name, weight in wanted.items()]
        mix = current(self)
        if mix is None:
            return compose(self, *added)
        stack = ExitStack()
        mix.add(*added)
        stack.callback(mix.remove, *wanted)
        return stack
