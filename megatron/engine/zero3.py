"""ZeRO 3: each process keeps its part of a model that comes filled."""

from __future__ import annotations

from torch import nn

from megatron.config.schema import RunConfig
from megatron.engine.grid import DeepSpeedGrid
from megatron.engine.settings import deepspeed_config
from megatron.mpu import Layout
from megatron.mpu.device import DTYPES


def partition_parameters(module: nn.Module, config: RunConfig, layout: Layout, grid: DeepSpeedGrid | None) -> None:
    """ZeRO 3: leave this process its part of each parameter of `module`, in the training dtype; they come filled.

    Called part by part of a model, so that a model that is larger than a device's memory fits it at no time as a whole.
    """
    import deepspeed

    module.to(DTYPES[config.precision.dtype])
    group = grid.get_data_parallel_group() if grid is not None else layout.data.group
    settings = deepspeed_config(config, layout)
    deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=settings, mpu=grid)
