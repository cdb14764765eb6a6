"""The process grid, collectives and random streams that parallel layers are built on."""

from megatron.mpu.layout import ALONE, SINGLE, Axis, Layout

__all__ = ["ALONE", "SINGLE", "Axis", "Layout"]
