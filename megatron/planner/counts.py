"""Parameters and FLOPs of blocks and stages from the configuration alone, for a share of the tensor axis.

Legend: d hidden size, n parameter tokens, t tensor ranks, T tokens of a sample. Where shares are uneven, the largest
one counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from megatron.config.sections.model import TOKENFORMER, BlocksSection, ModelConfig
from megatron.config.sections.vision import ImageConfig
from megatron.model.stages import partition

PlannedModel = ModelConfig | ImageConfig

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


def block_vectors(model: BlocksSection, kind: str, t: int = 1) -> int:
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


def patch_matrix(model: ImageConfig, t: int = 1) -> int:
    """Entries of the matrix that makes tokens of patches, on one rank."""
    return share(model.patch_values, t) * model.hidden_size


def class_matrix(model: ImageConfig, t: int = 1) -> int:
    """Entries of the head over the classes on one rank."""
    return share(model.num_classes, t) * model.hidden_size


def ends_parameters(model: PlannedModel, first: bool, last: bool, t: int = 1) -> int:
    """Parameters before (`first`) and after the blocks on one rank; a tied embedding counts once where both are."""
    norm = _NORM_VECTORS[model.final_norm_kind] * model.hidden_size if last else 0
    if isinstance(model, ImageConfig):
        rows = model.patch_bias + model.class_token + model.tokens_per_sample()  # and positions, one a token
        rows += _NORM_VECTORS[model.final_norm_kind] * model.pre_norm
        before = patch_matrix(model, t) + rows * model.hidden_size
        after = class_matrix(model, t) + share(model.num_classes, t)
        return norm + first * before + last * after
    matrices = 1 if first and last and not model.no_weight_tying else first + last
    return norm + matrices * vocabulary_matrix(model, t)


def num_parameters(model: PlannedModel) -> int:
    """Parameters of the whole model; a tied embedding counts once."""
    blocks = sum(block_matrices(model, kind) + block_vectors(model, kind) for kind in model.layer_kinds)
    return blocks + ends_parameters(model, first=True, last=True)


def attention_entries(model: PlannedModel) -> int:
    """What attention adds to the matrix entries that a token meets in a block: T d, and twice that if not causal."""
    return model.tokens_per_sample() * model.hidden_size * (2 if isinstance(model, ImageConfig) else 1)


def flops_per_token(model: PlannedModel) -> float:
    """Training FLOPs of a token as the model's own `flops_per_token` counts them."""
    entries: float = sum(block_matrices(model, kind) for kind in model.layer_kinds)
    entries += model.num_layers * attention_entries(model)
    if isinstance(model, ImageConfig):
        tokens = model.tokens_per_sample()
        return 6.0 * (entries + (patch_matrix(model) * (tokens - model.class_token) + class_matrix(model)) / tokens)
    return 6.0 * (entries + vocabulary_matrix(model))


@dataclass(frozen=True)
class Stage:
    """A pipeline stage: the kinds of its blocks, and whether it has what comes before and after them."""

    kinds: tuple[str, ...]
    first: bool
    last: bool

    def parameters(self, model: PlannedModel, t: int) -> int:
        """Parameters on one tensor rank; a tied embedding is held by the first and the last stage."""
        blocks = sum(block_matrices(model, kind, t) + block_vectors(model, kind, t) for kind in self.kinds)
        return blocks + ends_parameters(model, self.first, self.last, t)


def stages(model: BlocksSection, count: int) -> list[Stage]:
    """The blocks in `count` consecutive stages, cut as a pipeline cuts them."""
    kinds = model.layer_kinds
    bounds = _bounds(tuple(block_matrices(model, kind) for kind in kinds), count)
    return [Stage(kinds[start:end], start == 0, end == len(kinds)) for start, end in pairwise(bounds)]


@lru_cache
def _bounds(weights: tuple[int, ...], count: int) -> tuple[int, ...]:
    """A plan asks for the same cuts many times."""
    return tuple(partition(weights, count))
