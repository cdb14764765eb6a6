"""A model made ready to decode: the same layers, their matrices in the form that products with few rows like best.

Query, key and value of a block become one product with their stacked keys. On a CPU every matrix is also packed
(megatron.ops.inference). The copies take the memory of the matrices once more, for as long as the prepared model lives.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.inference.sparse import SparsePattention
from megatron.inference.twins import is_plain, twin
from megatron.log import get_logger
from megatron.model import LanguageModel
from megatron.model.attention import RotaryEmbedding, SelfAttention
from megatron.model.embedding import HeadMatrix, Product, TokenTable
from megatron.model.joint import JointLayer
from megatron.model.linear import ColumnParallelLinear, RowParallelLinear
from megatron.model.pattention import Pattention
from megatron.ops.inference import can_pack, product_with, row_weights
from megatron.ops.pattention_sparse import kept, product_of_kept


def prepared(model: LanguageModel) -> LanguageModel:
    """What `model` computes now, without gradients; later changes of its matrices do not show.

    Layers that someone has wrapped or hooked stay as they are. What is not a matrix is used by both models. The model
    itself comes back where tensor ranks share it, and where there is no memory for the copies.
    """
    if model.layout.tensor.size > 1 or not _has_room(model):
        return model
    made: LanguageModel = _twin(model).eval()
    if model.config.rotary_dim:
        # One for all layers, so that positions are looked up once, and long enough for every batch: tables that were
        # made anew would not be those of a recorded step.
        rotary = RotaryEmbedding(model.config.rotary_dim, model.config.rotary_emb_base, 2 * model.config.seq_length)
        for attention in (module for module in made.modules() if isinstance(module, SelfAttention)):
            attention.rotary = rotary
    return made


def _has_room(model: LanguageModel) -> bool:
    """Is there memory for copies of all parameters? They are packed on CPUs; where Linux does not say, there is."""
    needed = sum(p.numel() * p.element_size() for p in model.parameters() if can_pack(p))
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return True
    available = [1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    if not available or needed < available[0]:
        return True
    get_logger().info(
        "fast_decoding: %.1f GiB for copies of the matrices are not free; decoding is slower without", needed / 2**30
    )
    return False


def _twin(module: Any) -> Any:
    """A copy of a module and of all that is in it, with the same tensors, and with prepared layers where they fit."""
    made = twin(module, _prepared_layer)
    if isinstance(module, SelfAttention):
        layers = [module.query, module.key, module.value]
        if all(_is_pattention(layer) for layer in layers) and _are_alike([_dense(layer) for layer in layers]):
            tokens = _Tokens(layers)
            for name in ("query", "key", "value"):
                made._modules[name] = PreparedPattention(tokens)
    return made


def _are_alike(layers: Sequence[Pattention]) -> bool:
    """Have their tokens equal numbers and norms, so that their scores are one matrix?"""
    return len({(layer.num_tokens, layer.norm_columns) for layer in layers}) == 1


def _prepared_layer(layer: Any) -> Any:
    if _is_pattention(layer):
        return PreparedPattention(_Tokens([layer]))
    if any(is_plain(layer, kind) for kind in (ColumnParallelLinear, RowParallelLinear, nn.Linear)):
        return PreparedLinear(layer)
    if is_plain(layer, TokenTable) or is_plain(layer, HeadMatrix):
        return PreparedHead(layer)
    return _twin(layer)


def _is_pattention(layer: Any) -> bool:
    return is_plain(layer, Pattention) or is_plain(layer, SparsePattention)


def _dense(layer: Pattention | SparsePattention) -> Pattention:
    return layer.dense if isinstance(layer, SparsePattention) else layer


def _product_of(layer: Pattention | SparsePattention) -> Callable[[Tensor], Tensor]:
    """Weights [.., n] of a layer -> its outputs [.., out]."""
    values = _dense(layer).value_param_tokens.detach()
    product = product_with(values.T)
    if not isinstance(layer, SparsePattention):
        return product
    selections = [layer.selection]

    def of_kept(weights: Tensor) -> Tensor:
        return product_of_kept(weights, kept([weights], selections)[0], values, product)

    return of_kept


class _Tokens:
    """Stacked keys of one or more Pattentions with the same input and number of tokens, and their values."""

    def __init__(self, chosen: Sequence[Pattention | SparsePattention]) -> None:
        layers = [_dense(layer) for layer in chosen]
        self.count, self.activation, self.norm_columns = len(layers), layers[0].activation, layers[0].norm_columns
        taus = [layer.tau_tokens for layer in layers]
        self.tau_tokens = taus[0] if self.count == 1 else torch.stack(taus)
        keys = [layer.key_param_tokens.detach() for layer in layers]
        self.scores = product_with(keys[0] if self.count == 1 else torch.cat(keys))
        self.outputs = [_product_of(layer) for layer in chosen]

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x [.., in] -> [.., out] of each layer."""
        scores = self.scores(x)
        if self.count == 1:
            return [self.outputs[0](self._weights(scores))]
        scores = scores.unflatten(-1, (self.count, -1))  # [.., layers, n]
        weights = self._weights(scores).unbind(-2)
        return [product(weight) for product, weight in zip(self.outputs, weights, strict=True)]

    def _weights(self, scores: Tensor) -> Tensor:
        return row_weights(scores, self.tau_tokens, self.activation, self.norm_columns)


class PreparedPattention(JointLayer):
    """A Pattention, or one of those whose keys were stacked together."""

    def __init__(self, tokens: _Tokens) -> None:
        super().__init__()
        self.tokens = tokens

    def read_parameters(self) -> _Tokens:
        """Keys and values of all layers that are computed together."""
        return self.tokens

    @staticmethod
    def compute(layers: Sequence[PreparedPattention], parameters: Sequence[_Tokens], x: Tensor) -> list[Tensor]:
        """x [.., in] -> [.., out] of each layer."""
        return parameters[0](x)


class PreparedLinear(nn.Module):
    """A linear layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.product = product_with(layer.weight)
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        return self.product(x) if self.bias is None else self.product(x) + self.bias


class PreparedHead(nn.Module):
    """The head's matrix; of the embedding also the rows, which are looked up as they are."""

    def __init__(self, layer: TokenTable | HeadMatrix) -> None:
        super().__init__()
        self.weight, self.logits = layer.weight, product_with(layer.weight)
        self.default = None if isinstance(layer, TokenTable) else F.linear

    def forward(self, input: Tensor, product: Product | None = None) -> Tensor:
        """As TokenTable and HeadMatrix; F.linear, the product of decoding, is the one that is prepared."""
        product = product or self.default
        if product is None:
            return F.embedding(input, self.weight)
        return self.logits(input) if product is F.linear else product(input, self.weight)
