"""Parameters and FLOPs of blocks and stages from the configuration alone, for a share of the tensor axis.

Legend: d hidden size, n parameter tokens, t tensor ranks. Where shares are uneven, the largest one counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megatron.config.sections.model import TOKENFORMER, ModelConfig
from megatron.model.stages import partition

_NORM_VECTORS = {"layernorm_nonparam": 0, "layernorm": 2, "rmsnorm": 1}


def share(size: int, ranks: int) -> int:
    """The largest share of `size` items over `ranks`."""
    return -(-size // ranks)


def token_counts(model: ModelConfig) -> tuple[int, int, int]:
    """Parameter tokens of (each of query, key, value; proj; feed-forward)."""
    qkv, proj, ffn = model.qkv_slot_num, model.proj_slot_num, model.ffn_slot_num
    assert qkv is not None and proj is not None and ffn is not None, "ModelConfig checks the token counts"
    return qkv, proj, ffn


def block_tokens(model: ModelConfig, t: int) -> int:
    """Parameter tokens of all five Pattentions of a block, on one rank."""
    qkv, proj, ffn = token_counts(model)
    return 3 * share(qkv, t) + share(proj, t) + share(ffn, t)


def inner_size(model: ModelConfig) -> int:
    """Inner width of a Transformer block's feed-forward."""
    return model.intermediate_size or 4 * model.hidden_size


def block_matrices(model: ModelConfig, kind: str, t: int = 1) -> int:
    """Entries of a block's matrices on one rank."""
    d = model.hidden_size
    if kind == TOKENFORMER:
        return 2 * d * block_tokens(model, t)
    return 4 * d * share(d, t) + 2 * d * share(inner_size(model), t)


def block_vectors(model: ModelConfig, kind: str, t: int = 1) -> int:
    """Entries of a block's norm weights and biases on one rank."""
    d = model.hidden_size
    norms = 2 * _NORM_VECTORS[model.norm] * d
    if kind == TOKENFORMER:
        return norms
    attention = 3 * share(d, t) + d if model.use_bias_in_attn_linear else 0
    return norms + attention + share(inner_size(model), t) + d


def vocabulary_matrix(model: ModelConfig, t: int = 1) -> int:
    """Entries of the embedding (or of an untied head) on one rank."""
    assert model.padded_vocab_size is not None, "the vocabulary is known before a plan is made"
    return share(model.padded_vocab_size, t) * model.hidden_size


def num_parameters(model: ModelConfig) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    blocks = sum(block_matrices(model, kind) + block_vectors(model, kind) for kind in model.layer_kinds)
    ends = (2 if model.no_weight_tying else 1) * vocabulary_matrix(model)
    return blocks + ends + _NORM_VECTORS[model.final_norm_kind] * model.hidden_size


def flops_per_token(model: ModelConfig) -> float:
    """Training FLOPs of a token as `LanguageModel.flops_per_token(seq_length)` counts them, attention causal."""
    matrices = sum(block_matrices(model, kind) for kind in model.layer_kinds) + vocabulary_matrix(model)
    return 6.0 * matrices + 6 * model.num_layers * model.seq_length * model.hidden_size


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: the kinds of its blocks, and whether it has the embedding and the head."""

    kinds: tuple[str, ...]
    first: bool
    last: bool

    def parameters(self, model: ModelConfig, t: int) -> int:
        """Parameters on one tensor rank; a tied embedding is held by the first and the last stage."""
        blocks = sum(block_matrices(model, kind, t) + block_vectors(model, kind, t) for kind in self.kinds)
        both_ends_here = self.first and self.last
        matrices = 1 if both_ends_here and not model.no_weight_tying else self.first + self.last
        final_norm = _NORM_VECTORS[model.final_norm_kind] * model.hidden_size if self.last else 0
        return blocks + matrices * vocabulary_matrix(model, t) + final_norm


def stages(model: ModelConfig, count: int) -> list[Stage]:
    """The blocks in `count` consecutive stages, cut as a pipeline cuts them."""
    kinds = model.layer_kinds
    bounds = _bounds(tuple(block_matrices(model, kind) for kind in kinds), count)
    return [Stage(kinds[start:end], start == 0, end == len(kinds)) for start, end in pairwise(bounds)]


@lru_cache
def _bounds(weights: tuple[int, ...], count: int) -> tuple[int, ...]:
    """A plan asks for the same cuts many times."""
    return tuple(partition(weights, count))
