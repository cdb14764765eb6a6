"""Sparse inference: each row of a Pattention's input uses the tokens of the largest weights and no others.

A sparse model shares all tensors with the one it was made of. megatron.ops.pattention_sparse says what is kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from megatron.config.sections.evaluation import EvaluationConfig
from megatron.errors import UserError
from megatron.inference.twins import is_plain, twin
from megatron.model import LanguageModel
from megatron.model.joint import JointLayer
from megatron.model.pattention import Pattention, named_pattentions
from megatron.mpu.collectives import gather_objects
from megatron.mpu.layout import Layout
from megatron.ops.pattention import ParameterTokens
from megatron.ops.pattention_backends import select_backend, weights_function
from megatron.ops.pattention_sparse import Selection, kept, product_of_kept

Select = Callable[[Pattention], Selection | None]
"""What a layer keeps; None leaves it as it is."""


class SparsePattention(JointLayer):
    """A Pattention of which each row of the input uses its heaviest tokens alone; without gradients.

    Args:
        dense: the layer.
        selection: which weights it keeps.
    """

    def __init__(self, dense: Pattention, selection: Selection) -> None:
        super().__init__()
        self.dense, self.selection = dense, selection
        self.num_kept, self.num_weights = torch.tensor(0), 0
        """Weights of this rank so far: those that were kept, and all."""

    def read_parameters(self) -> ParameterTokens:
        """Those of the layer."""
        return self.dense.read_parameters()

    @staticmethod
    @torch.no_grad()
    def compute(layers: Sequence[SparsePattention], parameters: Sequence[ParameterTokens], x: Tensor) -> list[Tensor]:
        """x [.., in_features] -> [.., out_features] of each layer, in the forms of the dense layers."""
        first = layers[0].dense
        backend, _ = select_backend(first.backend, x.device.type)
        weights = weights_function(backend)(first.taken(x), parameters, first.activation, first.axis)
        keep = kept(weights, [layer.selection for layer in layers], first.axis)
        outputs = []
        for layer, tokens, own, chosen in zip(layers, parameters, weights, keep, strict=True):
            layer._count(chosen)
            outputs.append(product_of_kept(own, chosen, tokens.value))
        return first.given(outputs)

    def _count(self, keep: Tensor) -> None:
        self.num_kept, self.num_weights = keep.sum() + self.num_kept.to(keep.device), self.num_weights + keep.numel()


def sparse(model: LanguageModel, select: Select) -> LanguageModel:
    """A model with the same tensors whose Pattentions keep what `select` says; one that keeps all stays as it is.

    Layers that someone has hooked, or given another forward, stay as they are.
    """

    def replaced(layer: Any) -> Any:
        if not is_plain(layer, Pattention):
            return twin(layer, replaced)
        selection = select(layer)
        return layer if selection is None else SparsePattention(layer, selection)

    made: LanguageModel = twin(model, replaced)
    return made


def heaviest(layer: Pattention, share: float | None) -> Selection | None:
    """Of each row the share of all tokens with the largest weights, rounded to a number of tokens, at least one."""
    count = layer.num_tokens if share is None else max(1, round(share * layer.num_tokens))
    ranks = layer.axis.size
    widest = sum(-(-size // ranks) for size in layer.segment_sizes)
    return None if count == layer.num_tokens else Selection(count=count, widest=widest)


def selected(options: EvaluationConfig) -> Select | None:
    """What pattention_top_k or pattention_threshold says; None where neither is given."""
    if options.pattention_top_k is not None:
        return partial(_by_share, options.pattention_top_k)
    return None if options.pattention_threshold is None else partial(_by_size, options.pattention_threshold)


def _by_share(shares: Any, layer: Pattention) -> Selection | None:
    return heaviest(layer, getattr(shares, layer.projection or ""))


def _by_size(thresholds: Any, layer: Pattention) -> Selection | None:
    threshold = getattr(thresholds, layer.projection or "")
    return Selection(threshold=threshold) if threshold else None


def as_configured(model: LanguageModel, options: EvaluationConfig) -> LanguageModel:
    """The model with the tokens that the configuration says. Raises UserError where it has none to leave out."""
    select = selected(options)
    if select is None:
        return model
    key = "pattention_threshold" if options.pattention_top_k is None else "pattention_top_k"
    require_tokens(model, key, "remove it")
    return sparse(model, select)


def require_tokens(model: LanguageModel, key: str, advice: str) -> None:
    """Raise a UserError, which begins with `key`, for a model without a Pattention."""
    if not any(True for _ in named_pattentions(model)):
        raise UserError(f"{key}: the model has no Pattention whose tokens could be left out; {advice}")


def sparse_layers(model: nn.Module) -> Iterator[tuple[str, SparsePattention]]:
    """(name, layer) of every layer that keeps a part of its tokens."""
    yield from ((name, layer) for name, layer in model.named_modules() if isinstance(layer, SparsePattention))


def shares_used(model: LanguageModel, layout: Layout) -> dict[str, float]:
    """Part of their weights that sparse layers have kept so far, by projection, over all ranks. Collective."""
    counts: dict[str, list[int]] = {}
    for _, layer in sparse_layers(model):
        total = counts.setdefault(layer.dense.projection or "", [0, 0])
        total[0], total[1] = total[0] + int(layer.num_kept), total[1] + layer.num_weights
    everyone = [counts]
    for axis in (layout.tensor, layout.data):
        everyone = [found for part in gather_objects(everyone, axis) for found in part]
    sums = {kind: [sum(found[kind][i] for found in everyone) for i in (0, 1)] for kind in counts}
    return {kind: number / whole for kind, (number, whole) in sums.items() if whole}
