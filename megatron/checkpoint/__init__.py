"""Checkpoints: the canonical layout-free form, its store, and the official formats."""

from megatron.checkpoint.state import CanonicalState, ParameterSource
from megatron.checkpoint.store import CheckpointReader, find_checkpoint, save_checkpoint

__all__ = ["CanonicalState", "CheckpointReader", "ParameterSource", "find_checkpoint", "save_checkpoint"]
