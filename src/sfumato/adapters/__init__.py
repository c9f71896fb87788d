"""What is trained, where it attaches, and its delta on a weight: LoRA, LoHa, LoKr, and DoRA of each; one file a kind.

How an update is computed with its layer is in `folded` for LoRA, in `whole` for the others.
"""

from sfumato.adapters.attached import Attached, attach
from sfumato.adapters.by_layer import ByLayer
from sfumato.adapters.kinds import ALGOS, Kind
from sfumato.adapters.layer import UpdateLayer
from sfumato.adapters.lora import LoraLayer
from sfumato.adapters.targets import TARGETS, select, target_layers

__all__ = [
    "ALGOS",
    "TARGETS",
    "Attached",
    "ByLayer",
    "Kind",
    "LoraLayer",
    "UpdateLayer",
    "attach",
    "select",
    "target_layers",
]
