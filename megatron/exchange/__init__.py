"""Checkpoints of every form: opened by one function, and written, one file a format."""

from megatron.exchange.checkpoint import Checkpoint
from megatron.exchange.opening import open_checkpoint

__all__ = ["Checkpoint", "open_checkpoint"]
