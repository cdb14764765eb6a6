"""Training FLOPs per token, counted from the model's own matrices."""

from __future__ import annotations

from torch import nn

from megatron.config.sections.model import ModelConfig
from megatron.mpu.roles import role_of
from megatron.mpu.shard import whole_shape


def matmul_parameters(model: nn.Module, embedding_is_head: bool = False) -> int:
    """Entries of all matrices that every token is multiplied with: Pattention keys and values, linear layers, head.

    The embedding's look-up is free; an embedding that is the head as well counts once.
    """
    return sum(
        whole_shape(parameter).numel()
        for parameter in model.parameters()
        if not role_of(parameter).is_vector and (embedding_is_head or role_of(parameter).what != "embedding")
    )


def flops_per_token(model: nn.Module, config: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs of one token: 6 per matmul parameter and 6 L s d of causal attention."""
    attention = 6 * config.num_layers * seq_length * config.hidden_size
    return 6.0 * matmul_parameters(model, embedding_is_head=not config.no_weight_tying) + attention
