"""The process grid, collectives and random streams that parallel layers are built on."""

from megatron.mpu.layout import SINGLE, Layout

__all__ = ["SINGLE", "Layout"]
