"""Parameters of blocks from the configuration alone, for a share of the tensor axis.

Legend: d hidden size, n parameter tokens, t tensor ranks. Where shares are uneven, the largest
one counts.
"""

from __future__ import annotations

from megatron.config.sections.model import TOKENFORMER, BlocksSection, Norm

_NORM_VECTORS = {"layernorm_nonparam": 0, "layernorm": 2, "rmsnorm": 1}


def share(size: int, ranks: int) -> int:
    """The largest share of `size` items over `ranks`."""
    return -(-size // ranks)


def token_counts(model: BlocksSection) -> tuple[int, int, int]:
    """Parameter tokens of (each of query, key, value; proj; feed-forward)."""
    qkv, proj, ffn = model.qkv_slot_num, model.proj_slot_num, model.ffn_slot_num
    assert qkv is not None and proj is not None and ffn is not None, "ModelConfig checks the token counts"
    return qkv, proj, ffn


def block_tokens(model: BlocksSection, t: int) -> int:
    """Parameter tokens of all five Pattentions of a block, on one rank."""
    qkv, proj, ffn = token_counts(model)
    return 3 * share(qkv, t) + share(proj, t) + share(ffn, t)


def inner_size(model: BlocksSection) -> int:
    """Inner width of a Transformer block's feed-forward."""
    return model.intermediate_size or 4 * model.hidden_size


def block_matrices(model: BlocksSection, kind: str, t: int = 1) -> int:
    """Entries of a block's matrices on one rank."""
    d = model.hidden_size
    if kind == TOKENFORMER:
        return 2 * d * block_tokens(model, t)
    return 4 * d * share(d, t) + 2 * d * share(inner_size(model), t)


def norm_entries(model: BlocksSection, kind: Norm) -> int:
    """Weights and biases of a norm."""
    return _NORM_VECTORS[kind] * model.hidden_size


def block_vectors(model: BlocksSection, kind: str, t: int = 1) -> int:
    """Entries of a block's norm weights and biases on one rank."""
    d = model.hidden_size
    norms = 2 * norm_entries(model, model.norm)
    if kind == TOKENFORMER:
        return norms
    attention = 3 * share(d, t) + d if model.use_bias_in_attn_linear else 0
    return norms + attention + share(inner_size(model), t) + d
