"""What a mix refuses before it changes anything: layers that are compiled, offloaded, or in another's mix."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from sfumato.compose.baked import Baked
from sfumato.compose.live import Live
from sfumato.compose.match import compiled_parts
from sfumato.compose.sites import Site
from sfumato.errors import AdapterError
from sfumato.precision import tensors
from sfumato.weighting.adapter import Adapter, check_adapters


def refuse_new_paths_in_compiled(pipe: Any, sites: Iterable[Live]) -> None:
    """Of layers that are to get a path beside them, or another: refuse those that are compiled already."""
    changed = list(sites)
    compiled = compiled_parts(pipe) if changed else set()
    for site in changed:
        if site.part in compiled:
            raise AdapterError(
                f"the {site.part} is compiled already, and a compiled layer does not notice a new path beside it. "
                "Compose the live way before torch.compile, or say way='baked'."
            )


def refuse_offloaded(parts: Mapping[str, nn.Module], sites: Iterable[Site]) -> None:
    """Refuse weights that are to be written to and lie on a disk."""
    for name in sorted({site.part for site in sites if isinstance(site, Baked)}):
        if "disk" in tensors.group_offloading(parts[name]):
            raise AdapterError(
                f"the {name} is offloaded to disk in groups, where its weights cannot be written to. Offload it "
                "without offload_to_disk_path, or say way='live' to compose."
            )


def refuse_replaced(parts: Mapping[str, nn.Module], sites: Iterable[Site]) -> None:
    """Refuse weights of layers that their part does not hold any more, where neither a mix nor undoing it shows."""
    baked = [site for site in sites if isinstance(site, Baked)]
    held = {id(module) for name in {site.part for site in baked} for module in parts[name].modules()}
    for site in baked:
        if id(site.module) not in held:
            raise AdapterError(
                f"the {site.part} has another {site.path} than the one that this mix is in, perhaps quantised since. "
                "Put the layer back, or load the base again and compose after that."
            )


def refuse_taken(labels: Iterable[str], adapters: Sequence[Adapter]) -> None:
    """Refuse new adapters whose labels are taken, by these or by one another."""
    taken = list(labels)
    check_adapters(adapters)
    for adapter in adapters:
        if adapter.label in taken:
            raise AdapterError(
                f"two adapters are called {adapter.label!r}. Tell them apart with Adapter(file, weight, name=...)."
            )
        taken.append(adapter.label)
