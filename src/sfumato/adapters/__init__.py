"""What is trained, where it attaches, and its delta on a weight: one file a kind of adapter."""

from sfumato.adapters.lora import TARGETS, Lora, LoraLayer, attach, rank_notes, select, target_layers

__all__ = ["TARGETS", "Lora", "LoraLayer", "attach", "rank_notes", "select", "target_layers"]
