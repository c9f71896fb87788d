"""What is drawn in each region: its prompt as its adapters' text encoders read it, at the current step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sfumato.adapters.weights import Adapter, replace_unet_weight
from sfumato.compose.hooks import calling_pipeline, unconditional_rows
from sfumato.compose.regions.region import Region
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import AdapterFile
from sfumato.files.module_names import DENOISERS
from sfumato.models import calls
from sfumato.models.calls import CURRENT_STEPS
from sfumato.models.prompts.editing import has_edits
from sfumato.models.prompts.encoding import encode_prompts, encode_stages
from sfumato.models.prompts.syntax import Syntax

EncodedStages = list[tuple[int, Tensor]]
"""(last step, counted from 1, the text until then, (1, tokens, width)), in order."""


class RegionPrompts:
    """The regions' texts at the current step, encoded anew where a call's `clip_skip` or number of steps is another.

    now: of each region, None for one without a prompt. guided: as of `regions`.
    """

    def __init__(
        self,
        pipe: Any,
        parts: Sequence[Region],
        files: Mapping[Adapter, AdapterFile],
        syntax: Syntax,
        *,
        guided: bool,
        partial: bool,
    ) -> None:
        self._pipe, self._parts, self._syntax, self._guided, self._partial = pipe, parts, syntax, guided, partial
        # The others are not read again, nor refused beside what diffusers loaded into the U-Net.
        self._in_text = {each for each, file in files.items() if any(part not in DENOISERS for part, _ in file.changes)}
        self._called = pipe
        self._clock = calls.StepClock()
        # Otherwise all pictures are of one step.
        self._follows = syntax == "a1111" and any(has_edits(region.prompt or "") for region in parts)
        self._asked = self._ask(steps=1)
        self._told = self._encode(*self._asked)
        self.now = self._at(1)

    def _ask(self, steps: int) -> tuple[int | None, int]:
        """`clip_skip` that a Base has, or the pipeline's call under way or last made, and the steps."""
        is_base = hasattr(self._pipe, "encode_text")
        return getattr(self._pipe if is_base else self._called, "clip_skip", None), steps

    def _encode(self, clip_skip: int | None, steps: int) -> list[EncodedStages | None]:
        return [
            None if region.prompt is None else self._encode_one(region, region.prompt, clip_skip, steps)
            for region in self._parts
        ]

    @torch.no_grad()
    def _encode_one(self, region: Region, prompt: str, clip_skip: int | None, steps: int) -> EncodedStages:
        """The prompt as the region's adapters' text encoders read it, in pictures of so many steps.

        clip_skip: of a pipeline; a Base has its own.
        """
        pipe, adapters = self._pipe, [each for each in region.adapters if each in self._in_text]
        with _added(pipe, adapters, partial=self._partial) if adapters else nullcontext():
            if self._syntax == "a1111":
                return [(each.last, each.text.hidden) for each in encode_stages(pipe, [prompt], "", steps)]
            if self._syntax == "compel":
                hidden: Tensor = encode_prompts(pipe, [prompt], "", self._syntax)[0].hidden
            elif hasattr(pipe, "encode_text"):
                hidden = pipe.encode_text([prompt]).hidden
            else:
                encoded = pipe.encode_prompt(
                    prompt,
                    device=pipe._execution_device,  # an offloaded pipeline's own is none to compute on
                    num_images_per_prompt=1,
                    do_classifier_free_guidance=False,
                    clip_skip=clip_skip,
                )
                hidden = encoded[0]
        return [(steps, hidden.clone())]

    def _at(self, step: int) -> list[Tensor | None]:
        return [
            None if told is None else next((text for last, text in told if step <= last), told[-1][1])
            for told in self._told
        ]

    def on_unet_call(self, _: nn.Module, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        """Note who calls, with which `clip_skip`, and at which step."""
        self._called = calling_pipeline(self._pipe)
        steps = CURRENT_STEPS.get()
        if self._follows and steps is None:
            raise AdapterError(
                "words of a region's prompt that change between the steps are counted by sfumato.draw, and this "
                "pipeline is called by itself. Draw with sfumato.draw, or leave one of the words."
            )
        asked = self._ask(steps if self._follows and steps else 1)
        if asked != self._asked:
            self._asked, self._told = asked, self._encode(*asked)
        if self._follows:
            now = calls.timestep_of(args, options)
            self.now = self._at(self._clock.step(now, self._called.scheduler) + 1)
        else:
            self.now = self._at(1)

    def without(self, rows: int) -> int:
        """How many of a call's rows, the first, are without the prompt, and so without the regions' own."""
        return unconditional_rows(self._called, rows, guided=self._guided)


@contextmanager
def _added(pipe: Any, adapters: Sequence[Adapter], *, partial: bool) -> Iterator[None]:
    """Within the block the text encoders have these too, beside the mix that the pipeline carries."""
    from sfumato.compose.mix import Mix, current

    adapters = [
        Adapter(each.path, replace_unet_weight(each.weight, 0.0), f"{each.label} in its region") for each in adapters
    ]
    mix = current(pipe)
    if mix is None:
        with Mix(pipe).add(*adapters, partial=partial):
            yield
        return
    mix.add(*adapters, partial=partial)
    try:
        yield
    finally:
        mix.remove(*(each.label for each in adapters))
