"""Checkpoints: the canonical layout-free form, its store, and the official formats."""

from megatron.checkpoint.state import CanonicalState, ParameterSource, Piece, whole_pieces
from megatron.checkpoint.store import CheckpointReader, find_checkpoint, save_checkpoint

__all__ = [
    "CanonicalState",
    "CheckpointReader",
    "ParameterSource",
    "Piece",
    "find_checkpoint",
    "save_checkpoint",
    "whole_pieces",
]
