"""Training FLOPs per token, counted from the model's own matrices."""

from __future__ import annotations

from torch import nn

from megatron.config.schema import ModelConfig
from megatron.mpu.shard import whole_shape


def matmul_parameters(model: nn.Module, config: ModelConfig) -> int:
    """Entries of all matrices that every token is multiplied with: Pattention keys and values, linear layers, head.

    The embedding look-up is free; a tied embedding counts once, as the head.
    """
    matrices = sum(whole_shape(p).numel() for p in model.parameters() if p.dim() == 2)
    embedding = (config.padded_vocab_size or 0) * config.hidden_size
    return matrices - embedding if config.no_weight_tying else matrices


def flops_per_token(model: nn.Module, config: ModelConfig, seq_length: int) -> float:
    """Forward and backward FLOPs of one token: 6 per matmul parameter and 6 L s d of causal attention."""
    attention = 6 * config.num_layers * seq_length * config.hidden_size
    return 6.0 * matmul_parameters(model, config) + attention
