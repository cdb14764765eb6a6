"""The process grid, collectives and random streams that parallel layers are built on."""

from megatron.mpu.layout import Layout

__all__ = ["Layout"]
