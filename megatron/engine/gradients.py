"""The norm of all gradients of a model that several processes hold parts of.

Each number counts once: a sharded parameter on every tensor rank, a whole one on the first, and a parameter that two
pipeline stages hold (the tied embedding) on the first of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from megatron.mpu import Layout
from megatron.mpu.shard import shard_spec


def counts_here(parameter: Tensor, layout: Layout) -> bool:
    """Does this process add the parameter's gradient to the norm of its copy of the model?"""
    is_later_copy = getattr(parameter, "ds_pipe_replicated", False)  # set by DeepSpeed's PipelineModule
    return not is_later_copy and (layout.tensor.rank == 0 or shard_spec(parameter) is not None)


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float, layout: Layout) -> Tensor:
    """Scale all gradients so that their norm is at most `max_norm` (0: leave them); returns the norm before.

    For gradients that the data ranks have averaged already. Collective over one copy of the model.
    """
    with_grad = [p for p in parameters if p.grad is not None]
    norm = gradient_norm(with_grad, layout)
    if max_norm:
        torch.nn.utils.clip_grads_with_norm_(with_grad, max_norm, norm)
    return norm


def gradient_norm(parameters: Sequence[nn.Parameter], layout: Layout) -> Tensor:
    """Norm of the gradients of one copy of the model, the same scalar on each of its processes. Collective."""
    counted = [p.grad for p in parameters if counts_here(p, layout) and p.grad is not None]
    # torch would make the norm of none on the CPU, and the copy from there waits.
    norm = torch.nn.utils.get_total_norm(counted) if counted else torch.zeros((), device=parameters[0].device)
    return norm if layout.replica.group is None else _combined(norm, layout)


def _combined(norm: Tensor, layout: Layout) -> Tensor:
    """Norm over the pipeline and the tensor axis from each process's own."""
    squared = norm.square()
    dist.all_reduce(squared, group=layout.replica.group)
    return squared.sqrt()


def combine_norm_of_stages(optimizer: Any, layout: Layout) -> None:
    """Make DeepSpeed's ZeRO 1 take the gradient norm over pipeline stages once, not once a parameter group.

    Its `scaled_global_norm` all-reduces every parameter group over all stages, but stages may differ in their groups:
    with layernorm_nonparam only the last one has vectors (final_norm), and it would wait for the others for ever.
    """
    norm_of_stage = optimizer.scaled_global_norm

    def scaled_global_norm(norm_type: int = 2) -> Tensor:
        group, optimizer.model_parallel_group = optimizer.model_parallel_group, None
        try:
            norm = norm_of_stage(norm_type)
        finally:
            optimizer.model_parallel_group = group
        return _combined(norm, layout)

    optimizer.scaled_global_norm = scaled_global_norm
