"""Adapters merged by a method, for as long as a block lasts: what `sfumato merge --method` would write, drawn at once.

with by_method(pipe, Adapter("line.safetensors", 0.7), Adapter("otter.safetensors"), method="ties"):
    pipe("an otter")
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import Tensor

from sfumato.adapters.weights import Adapter, check_adapters, is_zero_weight
from sfumato.compose.match import PipelineModules, pipeline_parts
from sfumato.compose.mix import Mix, current, print_words
from sfumato.errors import AdapterError
from sfumato.files.adapter_file import merge_embeddings
from sfumato.files.module_names import Target
from sfumato.files.writing.kohya import write_lora
from sfumato.merging.factors import KEEP_ALL, Budget
from sfumato.merging.merge import merge
from sfumato.merging.methods import MethodSettings, check_method
from sfumato.merging.sources import merged_metadata, read_sources
from sfumato.precision import quantization


@contextmanager
def by_method(
    pipe: Any,
    *adapters: Adapter,
    method: str,
    settings: MethodSettings = MethodSettings(),  # noqa: B008 - frozen
    budget: Budget = KEEP_ALL,
    seed: int = 0,
    partial: bool = False,
    words_known: bool = False,
) -> Iterator[Mix]:
    """Within the block the pipeline carries what these adapters are when merged by `method`; yields that mix.

    pipe: a diffusers pipeline (SD 1.x, 2.x, SDXL) or a Base without a mix. method, settings, budget, seed: as of
    `sfumato.merging.merge.merge`. words_known: as of `compose`. Adapters of weight 0 are as if they were not there;
    with none left it is the base. Raises AdapterError for a method that there is not, for blocks that the pipeline does
    not have, and for what cannot be merged.
    """
    earlier = current(pipe)
    if earlier is not None:
        raise AdapterError(
            f"this pipeline carries a mix already ({earlier.describe() or 'empty'}); undo() it before merging."
        )
    check_adapters(adapters)
    check_method(method)
    modules = PipelineModules(pipeline_parts(pipe))
    modules.check_blocks({adapter.label: adapter.weight for adapter in adapters})
    some = [adapter for adapter in adapters if not is_zero_weight(adapter.weight)]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder, Mix(pipe) as mix:
        both = zip(*read_sources(some, partial=partial, words=True), strict=True)
        # Weights of parts that no file changes leave nothing to merge, as weights of 0 do.
        if counted := [(source, parent) for source, parent in both if source.counts]:
            sources, parents = zip(*counted, strict=True)
            weight_of = functools.partial(_weight_of, modules)
            merged = merge(sources, method=method, settings=settings, budget=budget, seed=seed, base=weight_of)
            words = merge_embeddings({source.name: source.words for source in sources})
            title = f"{method} of {', '.join(each.label for each in some)}"
            about = merged_metadata(
                parents, title=title, family=modules.family
            )  # with the adapter guidance that all ask for
            file = write_lora(
                Path(folder) / "merged.safetensors", merged.modules, family=modules.family, metadata=about, words=words
            )
            mix.add(Adapter(file, 1.0, title), partial=partial)
            if not words_known:
                print_words(mix)
        yield mix


def _weight_of(modules: PipelineModules, target: Target) -> Tensor:
    """The pipeline's own weight there, fp32 on the CPU. Raises AdapterError where there is none that is plain."""
    found = modules.find(target)
    stored = None if found is None else quantization.stored_tensor(found[1], "weight")
    if stored is None or not quantization.is_plain_float(stored):
        raise AdapterError(
            f"{'.'.join(target)} is {'quantised' if found else 'not'} in this pipeline, so no adapter that depends on "
            "its weight can be merged. Load the base they were made for, unquantised."
        )
    return stored.detach().to("cpu").float()
