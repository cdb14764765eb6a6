"""The engine of a run, around a model that holds its first or loaded values."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from megatron.checkpoint.tensors import Tensors
from megatron.engine.base import Engine
from megatron.engine.grid import DeepSpeedGrid, reused_groups
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.read_together import ReadTogether
from megatron.engine.settings import EngineSettings
from megatron.engine.single_stage import SingleStageEngine
from megatron.model.blocks import BuildOptions
from megatron.model.build import build_model
from megatron.model.fill import fill
from megatron.model.init import InitialTensors
from megatron.mpu import Layout
from megatron.mpu.device import DTYPES, process_device
from megatron.mpu.shard import allocate
from megatron.tasks import Task


def build_engine(settings: EngineSettings, task: Task[Any], layout: Layout, tensors: Tensors) -> Engine:
    """The engine of this process, with the model or its part of it on the training device. Collective.

    Args:
        tensors: fp32 values of parameters, and buffers, to start with.
    """
    with reused_groups(layout.timeout):
        return _build(settings, task, layout, tensors)


def _build(settings: EngineSettings, task: Task[Any], layout: Layout, tensors: Tensors) -> Engine:
    options = BuildOptions(
        settings.pattention_backend, settings.attention_backend, layout=layout, gather_logits=False,
        recompute_scores=settings.recompute_scores,
        defer_logits=settings.defer_logits,
    )  # fmt: skip
    device = process_device()
    together = tensors if isinstance(tensors, InitialTensors) else ReadTogether(tensors, layout.data, device)
    if layout.pipeline.size > 1:
        # Imports DeepSpeed, which looks at the environment that initialize_distributed has set up.
        from megatron.engine.pipeline_model import PipelineModel

        stage = PipelineModel(settings.model, layout, options, device, settings.checkpoint_layers)
        fill(stage, together, layout)
        return PipelineEngine(settings, task, layout, stage, tensors)
    grid, in_parts = DeepSpeedGrid.of(layout), settings.zero_stage == 3
    place = torch.device("meta") if in_parts else device
    model = build_model(settings.model, options, device=place, checkpoint_layers=settings.checkpoint_layers)
    if not in_parts:
        fill(model, together, layout)
    for name, part in model.parts() if in_parts else ():
        allocate(part, device)
        fill(part, together, layout, f"{name}.")
        partition_parameters(part, settings, layout, grid)
    return SingleStageEngine(settings, task, layout, model, tensors, grid)


def partition_parameters(
    module: nn.Module, settings: EngineSettings, layout: Layout, grid: DeepSpeedGrid | None
) -> None:
    """ZeRO 3: leave this process its part of each parameter of `module`, in the training dtype; they come filled.

    Called part by part of a model, so that a model that is larger than a device's memory fits it at no time as a whole.
    """
    import deepspeed

    module.to(DTYPES[settings.dtype])
    group = grid.get_data_parallel_group() if grid is not None else layout.data.group
    deepspeed.zero.Init(module=module, data_parallel_group=group, config_dict_or_path=settings.deepspeed, mpu=grid)
