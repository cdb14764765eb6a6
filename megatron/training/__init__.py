"""Training: the loop, the DeepSpeed engine, schedules, metrics."""

from megatron.training.loop import train
from megatron.training.schedule import LRSchedule
from megatron.training.state import TrainState

__all__ = ["LRSchedule", "TrainState", "train"]
