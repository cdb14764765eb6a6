"""Random numbers on the tensor axis.

Tensor ranks that hold the same activations must drop the same elements; where heads or tokens are split between them,
they must drop different ones. All tensor ranks of one place start torch's default generator from the same seed: it is
the stream they agree on. `own_stream` derives a rank's own stream from it, so that there is no second generator whose
state has to be saved in a checkpoint or replayed when activations are recomputed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.layout import Axis, Layout


@contextmanager
def own_stream(axis: Axis, device: torch.device) -> Iterator[None]:
    """Inside, torch's default generators of the CPU and of `device` differ from rank to rank of an axis.

    Afterwards they continue where the ranks agree, one draw further. On an axis of one nothing changes.
    """
    if axis.size == 1:
        yield
        return
    seed = int(torch.randint(2**62, ()))
    on_gpu = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        seed += axis.rank
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield


def drop_path(x: Tensor, probability: float, training: bool) -> Tensor:
    """A residual branch [b, ..] without some of its samples; those that stay are scaled by 1 / (1 - probability).

    The same samples on all tensor ranks, whatever part of the branch each of them holds.
    """
    if not probability or not training:
        return x
    stays = torch.rand(x.shape[0], *[1] * (x.dim() - 1), device=x.device) >= probability
    return x * (stays / (1.0 - probability)).to(x.dtype)


def dropout(x: Tensor, probability: float, training: bool, layout: Layout) -> Tensor:
    """F.dropout on activations of the residual stream: whole, or sharded by tokens with sequence parallelism."""
    if not probability or not training:
        return x
    if not layout.sequence_parallel:
        return F.dropout(x, probability)
    with own_stream(layout.tensor, x.device):
        return F.dropout(x, probability)
