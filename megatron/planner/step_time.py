"""Time of one update: matrix products, memory traffic, communication, pipeline bubble; in seconds.

docs/parallelism.md has the same terms under the same names. Legend: as in memory.py; m micro-batches of an update.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.config.sections.model import TOKENFORMER
from megatron.planner.choice import Choice
from megatron.planner.counts import block_matrices, block_tokens, inner_size, share
from megatron.planner.machine import Machine
from megatron.planner.memory import overlaps
from megatron.planner.networks import Stage, stages
from megatron.planner.workload import Workload

# Bytes that the element-wise operations around the scores move through memory for one score, (forward, backward),
# counted from the operations of megatron/ops/pattention*.py, by (backend, e). triton reads and writes everything once;
# what torch.compile makes of rows that do not fit its persistent reduction reads them twice.
_SCORE_TRAFFIC = {
    ("reference", 2): (32, 68), ("reference", 4): (20, 56),
    ("fused", 2): (22, 88), ("fused", 4): (20, 72),
    ("compiled", 2): (6, 12), ("compiled", 4): (12, 24),
    ("triton", 2): (4, 8), ("triton", 4): (8, 16),
}  # fmt: skip
_OPERATIONS = {TOKENFORMER: (70, 110), "global": (25, 45)}
"""Operations of a block, (forward, backward)."""
_STREAM_TRAFFIC = (14, 26)
"""Entries of [T, d] that norms, rotary embedding and residual sums of a block read and write, (forward, backward)."""
_UPDATE_TRAFFIC = 32
"""Bytes a parameter that the optimizer moves: fp32 gradient, master and moments read and written, 16-bit copy."""
FP32_SLOWDOWN = 16
"""fp32 products do not run on the tensor cores: 1/15 (H100) and 1/16 (A100) of the 16-bit rate in the data sheets."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one update, by what the slowest stage does."""

    compute: float
    """Matrix products and memory traffic of all micro-batches."""
    tensor: float
    """Collectives of the tensor axis."""
    pipeline: float
    """Activations and gradients sent to the neighbouring stages."""
    bubble: float
    """Waiting for the pipeline to fill and to drain."""
    data: float
    """Reduction of gradients and gathering of parameters that nothing hides."""
    update: float
    """The optimizer."""

    @property
    def total(self) -> float:
        """Seconds of the update."""
        return self.compute + self.communication + self.bubble + self.update

    @property
    def communication(self) -> float:
        """Seconds in which a GPU only communicates."""
        return self.tensor + self.pipeline + self.data


def step_time(work: Workload, choice: Choice, machine: Machine) -> StepTime:
    """The time of one update."""
    parts = work.parts()
    stages_of_parts = [stages(part.model, choice.pipeline) for part in parts]
    cuts = [list(zip(parts, cut, strict=True)) for cut in zip(*stages_of_parts, strict=True)]
    # A joint loss of several micro-batches takes their forward passes twice, and a backward pass is two of these.
    again = 4 / 3 if work.is_joint and choice.accumulation > 1 else 1.0
    compute = [again * sum(compute_seconds(part, choice, machine, stage) for part, stage in cut) for cut in cuts]
    tensor = [again * sum(_tensor_seconds(part, choice, machine, stage) for part, stage in cut) for cut in cuts]
    slowest = max(range(len(cuts)), key=lambda i: compute[i] + tensor[i])
    send = _send_seconds(parts[0], choice, machine)
    m, slot = choice.accumulation, compute[slowest] + tensor[slowest] + send
    blocks = [sum(len(stage.kinds) for _, stage in cut) for cut in cuts]
    sizes = [sum(stage.parameters(part.network, choice.tensor) for part, stage in cut) for cut in cuts]
    data = max(_data_seconds(work, choice, machine, *each) for each in zip(sizes, blocks, compute, strict=True))
    w = max(sizes)
    updated = w / choice.data if choice.zero_stage else w
    return StepTime(
        compute=m * compute[slowest],
        tensor=m * tensor[slowest],
        pipeline=m * send,
        bubble=(choice.pipeline - 1) * slot,
        data=data + sum(_tied_embedding_seconds(part, choice, machine) for part in parts),
        update=_UPDATE_TRAFFIC * updated / (machine.memory_bandwidth * machine.bandwidth_fraction),
    )


# ---- compute ----


def compute_seconds(work: Workload, choice: Choice, machine: Machine, stage: Stage) -> float:
    """One micro-batch forward and backward through a stage: what the GPU needs, or the host where it is slower."""
    peak = machine.peak_flops / (FP32_SLOWDOWN if work.dtype == "fp32" else 1)
    products = stage_flops(work, choice, stage) / (peak * machine.compute_fraction)
    traffic = stage_traffic(work, choice, stage) / (machine.memory_bandwidth * machine.bandwidth_fraction)
    counts = [_OPERATIONS[kind] for kind in stage.kinds]
    operations = sum((2 if choice.recompute else 1) * forward + backward for forward, backward in counts)
    return max(products + traffic + operations * machine.kernel_seconds, operations * machine.launch_seconds)


def stage_flops(work: Workload, choice: Choice, stage: Stage) -> float:
    """FLOPs of one micro-batch on one GPU: 2 forward and 4 backward per matrix entry, 2 more where recomputed."""
    model, count, t = work.model, work.tokens(choice), choice.tensor
    attention = work.network.attention_entries / t
    blocks = sum(block_matrices(model, kind, t) + attention for kind in stage.kinds)
    ends = work.network.ends.flops(model, choice.micro_batch, stage.first, stage.last, t)
    keys = sum(block_matrices(model, kind, t) / 2 for kind in stage.kinds if kind == TOKENFORMER)
    scores = 2 * keys if work.training.recompute_scores else 0
    return count * ((8 if choice.recompute else 6) * blocks + scores) + ends


def stage_traffic(work: Workload, choice: Choice, stage: Stage) -> float:
    """Bytes of one micro-batch that one GPU's element-wise operations move through memory."""
    model, e, count, t = work.model, work.element_bytes, work.tokens(choice), choice.tensor
    passes = 2 if choice.recompute else 1  # forward passes
    stream = count * model.hidden_size * e / (t if choice.sequence_parallel else 1)
    total = len(stage.kinds) * stream * (passes * _STREAM_TRAFFIC[0] + _STREAM_TRAFFIC[1])
    for kind in stage.kinds:
        if kind == TOKENFORMER:
            forward, backward = _SCORE_TRAFFIC[work.backend, e]
            total += count * block_tokens(model, t) * (passes * forward + backward)
        else:
            total += count * share(inner_size(model), t) * e * (passes * 2 + 3)  # activation: x, y; x, dy, dx
    return total + work.network.ends.traffic(work, choice, stage.first, stage.last)


# ---- communication ----


def tensor_elements(work: Workload, choice: Choice, kind: str) -> tuple[float, float]:
    """What a rank sends for one block and micro-batch: (entries of activations, fp32 statistics).

    Ring volumes. TokenFormer: 16 T d (t-1)/t forward and backward and 20 statistics a token and norm group
    (softmax: 30); Transformer: 8 T d (t-1)/t. Half of it, the forward pass, once more where blocks are recomputed.
    """
    count, part = work.tokens(choice), (choice.tensor - 1) / choice.tensor
    if kind != TOKENFORMER:
        return (8 + 4 * choice.recompute) * count * work.model.hidden_size * part, 0.0
    softmax = work.model.norm_activation_type == "softmax"
    forward, backward = (20, 10) if softmax else (10, 10)  # softmax: the row maximum, forward only, and the row sum
    statistics = (forward * (1 + choice.recompute) + backward) * work.model.norm_groups
    return (16 + 8 * choice.recompute) * count * work.model.hidden_size * part, statistics * count * part


def _tensor_messages(choice: Choice, kind: str) -> int:
    """Collectives of one block and micro-batch."""
    forward = (7 if kind == TOKENFORMER else 2) + 2 * choice.sequence_parallel
    return forward * (3 if choice.recompute else 2)


def _tensor_seconds(work: Workload, choice: Choice, machine: Machine, stage: Stage) -> float:
    """Collectives of the tensor axis for one micro-batch."""
    if choice.tensor == 1:
        return 0.0
    bandwidth, latency = machine.link(choice.tensor, 1)
    sent, messages = work.network.ends.sent(work, choice, stage.first, stage.last)
    for kind in stage.kinds:
        entries, statistics = tensor_elements(work, choice, kind)
        sent += entries * work.element_bytes + statistics * 4
        messages += _tensor_messages(choice, kind)
    return sent / bandwidth + messages * latency * math.log2(choice.tensor)


def _send_seconds(work: Workload, choice: Choice, machine: Machine) -> float:
    """Sending a micro-batch's activations to the next stage and its gradients back: T d each."""
    if choice.pipeline == 1:
        return 0.0
    bandwidth, latency = machine.link(choice.pipeline, choice.tensor * choice.data)
    ranks = choice.tensor if choice.sequence_parallel else 1
    size = work.tokens(choice) * work.model.hidden_size * work.element_bytes / ranks
    return 2 * (size / bandwidth + latency)


def data_volumes(work: Workload, choice: Choice, w: int) -> tuple[float, float]:
    """(bytes of one reduction, bytes gathered an update) that a rank sends over the data axis for `w` parameters.

    Stage 0: one all-reduce an update. Stages 1 and 2: gradients are reduced by all-reduce (by reduce to each owner with
    use_multi_rank_bucket_allreduce: false), at stage 2 after every micro-batch, and updated parameters gathered.
    Stage 3: parameters are gathered for the forward and for the backward pass, gradients reduce-scattered, in every
    micro-batch.
    """
    unit = work.element_bytes * w * (choice.data - 1) / choice.data
    if choice.zero_stage == 3:
        return unit, 2 * unit * choice.accumulation
    keys = work.zero_keys
    scatters = keys.get("reduce_scatter", True) and not keys.get("use_multi_rank_bucket_allreduce", True)
    reduction = unit if choice.zero_stage and scatters else 2 * unit
    return reduction, unit if choice.zero_stage else 0.0


def reductions(choice: Choice) -> int:
    """How often gradients are reduced over the data axis in an update."""
    return choice.accumulation if choice.zero_stage >= 2 else 1


def _data_seconds(work: Workload, choice: Choice, machine: Machine, w: int, blocks: int, compute: float) -> float:
    """Seconds of the data axis that do not hide behind a backward pass (two thirds of `compute`).

    Of `w` parameters in so many blocks.
    """
    if choice.data == 1:
        return 0.0
    bandwidth, latency = machine.link(choice.data, choice.tensor)
    reduced, gathered = data_volumes(work, choice, w)
    hidden = 2 / 3 * compute if overlaps(work, choice) else 0.0
    exposed = reductions(choice) * max(0.0, reduced / bandwidth - hidden)
    gather = gathered / bandwidth
    if choice.zero_stage == 3 and overlaps(work, choice):
        gather = max(0.0, gather - choice.accumulation * compute)  # prefetched beside both passes
    # Stage 3 gathers each block twice and reduces it once, in messages whose latency adds up.
    messages = 3 * blocks * choice.accumulation if choice.zero_stage == 3 else 2 * reductions(choice)
    return exposed + gather + messages * latency * math.log2(choice.data)


def _tied_embedding_seconds(work: Workload, choice: Choice, machine: Machine) -> float:
    """All-reduce of a tied embedding's gradient between the first and the last stage."""
    shared = work.network.ends.shared_matrix(work, choice)
    if choice.pipeline == 1 or not shared:
        return 0.0
    bandwidth, latency = machine.link(choice.pipeline, choice.tensor * choice.data)
    return shared * work.element_bytes / bandwidth + latency
