"""How files spell the model families, and how a family is told from a file. Imports no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class FamilyLabels:
    """The names that files of this field use for one family.

    title: for people. architecture: ModelSpec's, without "/lora"; predicting v has another where v_architecture is
    set. base_model_version: kohya's; readers test it for the prefix "sdxl_". text_width: the width of the text
    embedding that cross-attention reads, None where it is no mark of the family.
    """

    title: str
    architecture: str
    base_model_version: str
    text_width: int | None
    v_architecture: str | None = None
    v_base_model_version: str | None = None


LABELS: Mapping[str, FamilyLabels] = MappingProxyType(
    {
        "pocket": FamilyLabels("pocket", "sfumato-pocket-v1", "sfumato_pocket", None),
        "sd1": FamilyLabels("SD 1.x", "stable-diffusion-v1", "sd_v1", 768),
        "sd2": FamilyLabels("SD 2.x", "stable-diffusion-v2-512", "sd_v2", 1024, "stable-diffusion-v2-768-v", "sd_v2_v"),
        "sdxl": FamilyLabels("SDXL", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", 2048),
    }
)


def of_another_family(theirs: tuple[str | None, int | None], ours: tuple[str, int | None], what: str) -> str:
    """What is said of an adapter of another family than the base's, "trained for SDXL (text width 2048), this base is
    SD 1.x (768)"; empty where they agree as far as is known.

    theirs, ours: family and text width. what: what the base is called.
    """
    (family, width), (own, own_width) = theirs, ours
    other_width = width is not None and own_width is not None and width != own_width
    if not other_width and family in (None, own):
        return ""
    wanted = LABELS[family].title if family else "another base"
    widths = (f" (text width {width})", f" ({own_width})") if other_width else ("", "")
    return f"trained for {wanted}{widths[0]}, this {what} is {LABELS[own].title}{widths[1]}"


def family_from_metadata(metadata: Mapping[str, str]) -> str | None:
    """The family that the file says it was trained on; None where it says nothing or something unknown."""
    version = metadata.get("ss_base_model_version", "")
    architecture = metadata.get("modelspec.architecture", "").split("/")[0]
    for name, labels in LABELS.items():
        if version and version in (labels.base_model_version, labels.v_base_model_version):
            return name
        if architecture and architecture in (labels.architecture, labels.v_architecture):
            return name
    for prefix, name in (("sdxl", "sdxl"), ("sd_v2", "sd2"), ("sd_v1", "sd1"), ("sd_2", "sd2"), ("sd_1", "sd1")):
        if version.startswith(prefix):  # ai-toolkit has sd_1.5 and sd_2.1
            return name
    if metadata.get("ss_v2", "").lower() == "true":
        return "sd2"
    return None


def family_from_widths(widths: Iterable[int], *, second_encoder: bool = False) -> str | None:
    """The family that the shapes tell, None where they tell none.

    widths: the input widths of the cross-attention's keys and values in the file. second_encoder: whether the file
    changes a second text encoder, which only SDXL has.
    """
    found = set(widths)
    for name, labels in LABELS.items():
        if found == {labels.text_width}:
            return name
    return "sdxl" if second_encoder and not found else None
