"""What is trained, where it attaches, and its delta on a weight: LoRA, and how it is computed with its layer."""

from sfumato.adapters.lora import TARGETS, Lora, LoraLayer, attach, rank_notes, select, target_layers

__all__ = ["TARGETS", "Lora", "LoraLayer", "attach", "rank_notes", "select", "target_layers"]
