"""Forward pass of several models of one shape at once, each with weights of its own.

At these sizes most of an update's time goes to calling small operations. Stacked along a first dimension, R models cost
few more calls than one, and the compiler fuses what is left. `tests/tools/test_growth_regime.py` holds losses and
updates against the product's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.model import LanguageModel
from megatron.model.pattention import Pattention, named_pattentions
from megatron.ops.pattention import theta
from megatron.ops.rotary import apply_rotary, rotary_tables

Groups = tuple[tuple[int, int], ...]
"""Norm groups of a Pattention: (tokens, tau squared) of each, in the order of its columns."""


@dataclass(frozen=True)
class Shape:
    """What models have to share to be stacked."""

    parameters: tuple[tuple[str, tuple[int, ...]], ...]
    """Name and shape of each."""
    groups: tuple[tuple[str, Groups], ...]
    """Norm groups of each Pattention; none in a Transformer."""
    width: int
    layers: int
    heads: int
    rotary: int
    """Dimensions of a head that are rotated."""
    rotary_base: float
    eps: float

    @classmethod
    def of(cls, model: LanguageModel) -> Shape:
        """That of a model as sizes.py describes them: untied norms without parameters, GELU, tied embedding."""
        config = model.config
        head_dim = config.hidden_size // config.num_attention_heads
        return cls(
            tuple((name, tuple(parameter.shape)) for name, parameter in model.named_parameters()),
            tuple((name, _groups(layer)) for name, layer in named_pattentions(model)),
            config.hidden_size, config.num_layers, config.num_attention_heads,
            int(head_dim * config.rotary_pct), config.rotary_emb_base, config.layernorm_epsilon,
        )  # fmt: skip


def _groups(layer: Pattention) -> Groups:
    taus = layer.tau_tokens.view(-1).tolist()
    columns = layer.norm_columns or (layer.num_tokens,)
    return tuple(zip(columns, taus, strict=True))


class StackedForward:
    """The losses of R models, each on a batch of its own.

    Args:
        shape: of every model.
        length: tokens of a sequence.
    """

    def __init__(self, shape: Shape, length: int) -> None:
        self._shape, self._length = shape, length
        self._groups = {
            name: [(columns, torch.tensor(tau_tokens)) for columns, tau_tokens in groups]
            for name, groups in shape.groups
        }
        self._segments = {
            name: [f"_tokens_{i}" for i in range(8) if f"{name}.key_tokens_{i}" in dict(shape.parameters)]
            for name in self._groups
        }
        self._cos, self._sin = rotary_tables(length, shape.rotary, shape.rotary_base, torch.device("cpu"))

    def __call__(self, weights: Mapping[str, Tensor], inputs: Tensor, labels: Tensor) -> Tensor:
        """Mean cross-entropy in nats a token of each model, [R].

        Args:
            weights: parameters by name, [R, *shape].
            inputs, labels: ids [R, b, s].
        """
        models, shape = inputs.shape[0], self._shape
        table = weights["embedding.word_embeddings.weight"]
        ids = inputs.reshape(models, -1, 1).expand(-1, -1, shape.width)
        x = torch.gather(table, 1, ids)  # [R, b s, d]
        for layer in range(shape.layers):
            name = f"layers.{layer}"
            x = x + self._attention(weights, f"{name}.attention", self._norm(x))
            x = x + self._feed_forward(weights, f"{name}.mlp", self._norm(x))
        x = self._norm(x) * weights["final_norm.weight"][:, None] + weights["final_norm.bias"][:, None]
        logits = torch.bmm(x, table.transpose(1, 2))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        return losses.view(models, -1).mean(1)

    def _norm(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (self._shape.width,), eps=self._shape.eps)

    def _attention(self, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        models, rows, width = x.shape
        heads = self._shape.heads
        projected = [self._projection(weights, f"{name}.{part}", x) for part in ("query", "key", "value")]
        q, k, v = (p.view(-1, self._length, heads, width // heads).transpose(1, 2) for p in projected)
        q, k = apply_rotary(q, self._cos, self._sin), apply_rotary(k, self._cos, self._sin)
        context = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self._projection(weights, f"{name}.proj", context.transpose(1, 2).reshape(models, rows, width))

    def _feed_forward(self, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        if name in self._groups:
            return self._projection(weights, name, x)
        return _linear(weights, f"{name}.fc_out", F.gelu(_linear(weights, f"{name}.fc_in", x)))

    def _projection(self, weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
        if name not in self._groups:
            return _linear(weights, name, x)
        keys, values = (
            torch.cat([weights[f"{name}.{kind}{segment}"] for segment in self._segments[name]], 1)
            for kind in ("key", "value")
        )
        return torch.bmm(_theta(torch.bmm(x, keys.transpose(1, 2)), self._groups[name]), values)


def _linear(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return torch.bmm(x, weights[f"{name}.weight"].transpose(1, 2)) + weights[f"{name}.bias"][:, None]


def _theta(scores: Tensor, groups: Sequence[tuple[int, Tensor]]) -> Tensor:
    """Weights of the tokens from scores [R, rows, n], over each norm group, (columns, tau_tokens), alone."""
    parts = scores.split([columns for columns, _ in groups], -1)
    weights = [theta(part, count, "l2_norm_gelu") for part, (_, count) in zip(parts, groups, strict=True)]
    return weights[0] if len(weights) == 1 else torch.cat(weights, -1)


class StackedAdamW:
    """AdamW of R models, each with its own rates, decays, counts and gradient norm (Loshchilov and Hutter, 2019).

    Args:
        shapes: of one model's parameters, in order.
        models: R.
        betas, eps: of all.
        clip: largest gradient norm of a model.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], models: int, betas: tuple[float, float], eps: float, clip: float
    ) -> None:
        self._betas, self._eps, self._clip = betas, eps, clip
        self.first, self.second = ([torch.zeros(models, *shape) for shape in shapes] for _ in range(2))
        self.counts = torch.zeros(len(shapes), models)
        """Updates that each parameter of each model has had."""

    @torch.no_grad()
    def __call__(
        self, weights: Sequence[Tensor], grads: Sequence[Tensor], rates: Tensor, decays: Tensor, active: Tensor
    ) -> Tensor:
        """Update `weights` in place; gradient norms before clipping, [R].

        Args:
            weights, grads: [R, *shape] of each parameter.
            rates, decays: learning rate and weight decay of each parameter of each model, [parameters, R].
            active: 1 for models that take this update and 0 for others, [R].
        """
        self.counts += active
        corrections = 1.0 - self._betas[0] ** self.counts, (1.0 - self._betas[1] ** self.counts).sqrt()
        steps = torch.where(active > 0, rates / corrections[0], 0.0)
        kept = torch.where(active > 0, 1.0 - rates * decays, 1.0)
        roots = torch.where(active > 0, 1.0 / corrections[1], 1.0)
        return self._fused(list(weights), list(grads), steps, kept, roots)

    def compile(self) -> None:
        """Fuse the arithmetic."""
        self._fused = torch.compile(self._fused, dynamic=False)  # type: ignore[method-assign]

    def _fused(self, weights: list[Tensor], grads: list[Tensor], steps: Tensor, kept: Tensor, roots: Tensor) -> Tensor:
        norms = torch.stack([grad.flatten(1).square().sum(1) for grad in grads]).sum(0).sqrt()
        factors = (self._clip / (norms + 1e-6)).clamp(max=1.0)
        beta1, beta2 = self._betas
        for i, (weight, grad) in enumerate(zip(weights, grads, strict=True)):
            shape = (-1, *[1] * (weight.dim() - 1))
            grad = grad * factors.view(shape)
            self.first[i].lerp_(grad, 1.0 - beta1)
            self.second[i].mul_(beta2).add_((1.0 - beta2) * grad.square())
            denominator = self.second[i].sqrt() * roots[i].view(shape) + self._eps
            weight.mul_(kept[i].view(shape)).sub_(steps[i].view(shape) * self.first[i] / denominator)
        return norms
