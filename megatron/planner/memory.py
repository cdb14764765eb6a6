"""Memory of one GPU, term by term; docs/parallelism.md has the same terms under the same names.

Legend: T tokens of a micro-batch on one data rank, d hidden size, h heads, V padded vocabulary, t tensor ranks, W
parameters of a stage on one tensor rank, D data ranks, e bytes of an entry (2, or 4 in fp32). All results are bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron.config.sections.model import TOKENFORMER, BlocksSection, ModelConfig
from megatron.config.sections.optimization import OptimizerSpec
from megatron.config.sections.parallel import ZeroConfig
from megatron.planner.choice import Choice
from megatron.planner.counts import block_tokens, inner_size, share, token_counts
from megatron.planner.ends import stream_bytes
from megatron.planner.networks import Stage, stages
from megatron.planner.workload import Workload

# Bytes that autograd keeps for one score of the reference backend, by (activation, e): the scores in fp32, the weights
# before they are rounded in fp32, the weights.
_REFERENCE_SCORE_BYTES = {
    ("l2_norm_gelu", 2): 10, ("l2_norm_gelu", 4): 12, ("gelu_l2_norm", 2): 10, ("gelu_l2_norm", 4): 12,
    ("softmax", 2): 6, ("softmax", 4): 8,
}  # fmt: skip
_REFERENCE_ROW_BYTES, _ROW_BYTES = 13, 4
"""Row statistics of a norm group of a Pattention, for one token."""
_SCORE_WORKSPACE = 16
"""Bytes for one score that a Pattention's backward pass has in flight at most: four fp32 matrices. With one kernel for
the row functions it is the gradient and the weights, and the scores where they are recomputed."""
_BUCKET, _LIVE, _SUB_GROUP = 500_000_000, 1_000_000_000, 1_000_000_000  # DeepSpeed's defaults, in elements


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU of the fullest pipeline stage."""

    weights: float
    """Parameters in the training dtype."""
    master: float
    """fp32 copies of 16-bit (or ZeRO) parameters."""
    moments: float
    """Optimizer moments."""
    average: float
    """The average of the weights (ema_decay)."""
    gradients: float
    """Accumulated gradients."""
    buckets: float
    """ZeRO's communication buffers and gathered parameters."""
    kept: float
    """Activations that wait for their backward pass."""
    head: float
    """Final norm, head and loss of one micro-batch (last stage)."""
    block: float
    """Recomputed blocks, and what the backward pass of a block has in flight."""
    update: float
    """fp32 gradients of the optimizer's partition."""

    @property
    def states(self) -> float:
        """What is held all the time."""
        return self.weights + self.master + self.moments + self.average + self.gradients + self.buckets

    @property
    def total(self) -> float:
        """The peak: the head, the backward pass of a block and the update come after one another."""
        return self.states + max(self.kept + max(self.head, self.block), self.update)


def memory_of(work: Workload, choice: Choice) -> Memory:
    """The memory of the fullest stage."""
    parts = work.parts()
    cuts = zip(*(stages(part.model, choice.pipeline) for part in parts), strict=True)
    found = (_stage_memory(work, parts, choice, index, cut) for index, cut in enumerate(cuts))
    return max(found, key=lambda memory: memory.total)


def _stage_memory(
    work: Workload, parts: Sequence[Workload], choice: Choice, index: int, cut: Sequence[Stage]
) -> Memory:
    """Of the stages of all networks that a GPU has: their activations all wait for the backward passes."""
    own = list(zip(parts, cut, strict=True))
    states = state_bytes(work, choice, sum(stage.parameters(part.network, choice.tensor) for part, stage in own))
    in_flight = min(choice.accumulation, choice.pipeline - index)  # 1F1B
    return Memory(
        **states,
        kept=in_flight * sum(kept_bytes(part, choice, stage) for part, stage in own),
        head=sum(part.network.ends.head_bytes(part, choice) for part, stage in own if stage.last),
        block=max(_backward_bytes(part, choice, stage) for part, stage in own),
    )


def state_bytes(work: Workload, choice: Choice, w: int) -> dict[str, float]:
    """What `w` parameters (W) take all the time, and their update, as DeepSpeed 0.19 holds them; keys as in Memory."""
    e, stage = work.element_bytes, choice.zero_stage
    partition = w / choice.data if stage else float(w)
    offloaded = stage > 0 and _offloads(work.parallel.zero_optimization)
    return {
        "weights": e * (partition if stage == 3 else w),
        "master": 0.0 if stage == 0 or offloaded else 4 * partition,
        "moments": 0.0 if offloaded else 4 * _moments(work.optimizer) * partition,
        "average": 0.0 if offloaded or work.training.ema_decay is None else 4 * partition,
        # Stage 1 holds all gradients and a copy of the rank's partition; stage 2 the sum so far and the newest one.
        "gradients": e * {0: w, 1: w + partition, 2: 2 * partition, 3: partition}[stage],
        "buckets": _bucket_bytes(work, choice, w),
        "update": 0.0 if stage == 0 or offloaded else 4 * min(partition, _SUB_GROUP if stage == 3 else partition),
    }


def _moments(optimizer: OptimizerSpec) -> int:
    """fp32 numbers a parameter that the optimizer keeps."""
    if optimizer.type == "SGD":
        return 1 if optimizer.params.momentum else 0
    return 1 if optimizer.type == "Lion" else 2


def _offloads(zero: ZeroConfig) -> bool:
    table = (zero.model_extra or {}).get("offload_optimizer")
    return bool(zero.cpu_offload) or (isinstance(table, dict) and table.get("device", "cpu") != "none")


def overlaps(work: Workload, choice: Choice) -> bool:
    """Does the reduction of gradients run beside the backward pass? DeepSpeed's pipeline does not allow it."""
    asked = work.zero_keys.get("overlap_comm")
    return choice.pipeline == 1 and choice.zero_stage > 0 and (choice.zero_stage == 3 if asked is None else bool(asked))


def _bucket_bytes(work: Workload, choice: Choice, w: int) -> float:
    e, keys = work.element_bytes, work.zero_keys
    if choice.zero_stage == 0:
        return e * min(w, _BUCKET) if choice.data > 1 else 0.0
    bucket = int(float(keys.get("reduce_bucket_size", _BUCKET)))
    contiguous = choice.zero_stage == 3 or keys.get("contiguous_gradients", True)
    reduction = e * bucket * (1 + overlaps(work, choice)) if contiguous else 0.0
    if choice.zero_stage < 3:
        return reduction
    live = keys.get("stage3_max_live_parameters", keys.get("max_live_parameters", _LIVE))
    return reduction + e * min(w, int(float(live)))


# ---- activations ----


def kept_bytes(work: Workload, choice: Choice, stage: Stage) -> float:
    """What a stage keeps of one micro-batch until its backward pass (the head apart)."""
    stream = stream_bytes(work, choice)
    kept = (0.0 if stage.last else stream) + (work.network.ends.kept_bytes(work, choice) if stage.first else 0.0)
    if choice.recompute:
        return kept + share(len(stage.kinds), work.training.checkpoint_num_layers) * stream
    return kept + sum(block_bytes(work, choice, kind) for kind in stage.kinds)


def block_bytes(work: Workload, choice: Choice, kind: str) -> float:
    """What autograd keeps of one block and micro-batch when nothing is recomputed."""
    model, e = work.model, work.element_bytes
    t, count = choice.tensor, work.tokens(choice)
    whole, stream = count * model.hidden_size * e, stream_bytes(work, choice)
    heads = 4 * whole / t + 4 * count * model.num_attention_heads / t  # q, k, v, context; log-sum-exp of each row
    inputs = 2 * whole  # of q, k, v and of the feed-forward: whole on each rank
    dropout = 2 * stream / e if model.hidden_dropout else 0.0
    # Rotated queries are laid out head by head, and so is the context, of which proj then reads a copy.
    copied = isinstance(model, ModelConfig) and model.rotary_dim > 0
    if kind == TOKENFORMER:
        a_score, a_row = _pattention_bytes(work)
        scores = count * block_tokens(model, t) * a_score
        inner = (whole if copied or t > 1 else 0.0) + scores + 5 * count * a_row  # gathered from the tensor ranks
    else:
        matrices = 1 if model.activation == "relu" else 2
        inner = (whole / t if copied else 0.0) + matrices * count * share(inner_size(model), t) * e
    return _norm_bytes(model, e, stream) + heads + inputs + inner + dropout


def _pattention_bytes(work: Workload) -> tuple[int, int]:
    """What autograd keeps of a Pattention for each score and for each row."""
    norms = work.model.norm_groups
    if work.backend == "reference":
        return _REFERENCE_SCORE_BYTES[work.model.norm_activation_type, work.element_bytes], norms * _REFERENCE_ROW_BYTES
    return 0 if work.training.recompute_scores else work.element_bytes, norms * _ROW_BYTES


def _norm_bytes(model: BlocksSection, e: int, stream: float) -> float:
    """Inputs and statistics of both norms; RMSNorm keeps an fp32 input and its normalised rows."""
    statistics = 2 * 8 * stream / (model.hidden_size * e)
    inputs = 1 if model.gpt_j_residual else 2
    if model.norm != "rmsnorm":
        return inputs * stream + statistics
    return (inputs if e == 4 else 2 * 4 / e) * stream + 2 * stream + statistics


def _backward_bytes(work: Workload, choice: Choice, stage: Stage) -> float:
    """The recomputed group of blocks, and what the backward pass of the widest projection has in flight."""
    workspace = max(_workspace_bytes(work, choice, kind) for kind in set(stage.kinds))
    if not choice.recompute:
        return workspace
    group = min(work.training.checkpoint_num_layers, len(stage.kinds))
    return group * max(block_bytes(work, choice, kind) for kind in set(stage.kinds)) + workspace


def _workspace_bytes(work: Workload, choice: Choice, kind: str) -> float:
    count, t = work.tokens(choice), choice.tensor
    if kind != TOKENFORMER:
        return 2 * work.element_bytes * count * share(inner_size(work.model), t)
    qkv, proj, ffn = (share(n, t) for n in token_counts(work.model))
    has_kernel = work.backend in ("compiled", "triton")
    a_score = (2 + work.training.recompute_scores) * work.element_bytes if has_kernel else _SCORE_WORKSPACE
    return a_score * count * max(3 * qkv, proj, ffn)  # query, key and value run together
