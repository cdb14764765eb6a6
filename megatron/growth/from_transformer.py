"""A TokenFormer that computes what a trained Transformer of equal depth and width does, as well as its tokens allow.

Pattention is Y = GELU(S) V with scores S = tau X K^T / ||X K^T||, row by row. Of what a Transformer has it represents

- **a linear map** of rank r with 2 r tokens: GELU(s) - GELU(-s) = s, so that keys k, -k with values v, -v are the map
  x -> tau / ||K x|| (k . x) v. Behind a LayerNorm, and with scores of equal variance, the factor hardly varies; with
  2 d tokens in orthogonal directions it is constant, and the map exact. With fewer tokens the best directions are those
  of the singular value decomposition of W C^(1/2), C the second moments of the inputs.
- **a bias**: GELU(s) + GELU(-s) is even, and its sum over many tokens nearly constant.
- **a feed-forward** of m inner channels with m tokens, keys the rows of W_in and values the columns of W_out, up to the
  factor tau / ||K x|| of each row, which W_in x has not, and the inner bias. tau^2 is the mean of ||K x||^2, so that
  scores have the scale they had, or the number of tokens where that is less: checkpoints hold no larger one.

Keys are made so, layer by layer; values are then fitted, by ridge regression, to what the Transformer's layer gives for
the inputs that the layer has now: errors of the layers before are seen, and what can be is made up for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from megatron.config.sections.model import TOKENFORMER, ModelConfig
from megatron.errors import UserError
from megatron.model import LanguageModel
from megatron.model.blocks import MLP, Block
from megatron.model.pattention import Pattention
from megatron.ops.pattention import theta

RIDGE = 1e-6
"""Of the regression, as a part of the mean square of a token's weights."""
_ROWS_A_TOKEN = 4
"""Fewer rows of inputs than this for each token would be learned by heart."""
_SAMPLES, _ROWS = 8, 4096
"""How many go through a layer, and how many rows have weights, at one time: those of a long text need much memory."""


@dataclass(frozen=True)
class Fit:
    """How well a layer of tokens does what the Transformer's did."""

    name: str
    error: float
    """Root mean square of the difference, as a part of that of the outputs around their mean; on the inputs fitted."""


def tokenformer_config(config: ModelConfig, qkv: int, proj: int, ffn: int) -> ModelConfig:
    """The section of a TokenFormer with everything but the projections and the feed-forward as in a Transformer's.

    Args:
        config: of the Transformer.
        qkv, proj, ffn: parameter tokens.

    Raises: UserError for a model that has tokens already.
    """
    if TOKENFORMER in config.layer_kinds:
        raise UserError("IN: the model has tokenformer blocks; give a Transformer")
    return config.replaced(
        attention_config=[[[TOKENFORMER], config.num_layers]], qkv_slot_num=qkv, proj_slot_num=proj, ffn_slot_num=ffn,
        norm_activation_type="l2_norm_gelu", intermediate_size=None,
    )  # fmt: skip


@torch.no_grad()
def fit_tokens(
    teacher: LanguageModel, config: ModelConfig, ids: Tensor, seed: int = 1234
) -> tuple[LanguageModel, list[Fit]]:
    """A TokenFormer of `config` that starts as near to a Transformer as it can, and how near each layer comes.

    Args:
        teacher: the Transformer, on a CPU or one GPU.
        config: of tokenformer_config.
        ids: text to fit on, int64 [b, s].
        seed: of what is drawn for tokens that are left over.

    Raises: UserError for too little text.
    """
    most = max(count for count in (config.qkv_slot_num, config.proj_slot_num, config.ffn_slot_num) if count)
    if ids.numel() < _ROWS_A_TOKEN * most:
        raise UserError(
            f"--text: {ids.numel():,} tokens of text are few to fit {most:,} parameter tokens; give "
            f"{_ROWS_A_TOKEN * most:,} at least"
        )
    like = next(teacher.parameters())
    student = LanguageModel(config, seed=seed).to(like.device, like.dtype).eval()
    known = dict(teacher.named_parameters())
    for name, parameter in student.named_parameters():
        if name in known and known[name].shape == parameter.shape:
            parameter.copy_(known[name])
    generator = torch.Generator().manual_seed(seed)
    x, found = _by_parts(teacher.embedding, ids), list[Fit]()
    for index, (old, new) in enumerate(zip(teacher.layers, student.layers, strict=True)):
        assert isinstance(old, Block) and isinstance(new, Block)
        found += (Fit(f"layers.{index}.{name}", error) for name, error in _fit_block(old, new, x, generator))
        x = _by_parts(new, x)
    return student, found


def _by_parts(layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What a layer gives for x [b, ..], a few samples at a time."""
    return torch.cat([layer(part) for part in x.split(_SAMPLES)])


def _fit_block(old: Block, new: Block, x: Tensor, generator: torch.Generator) -> Iterator[tuple[str, float]]:
    normed = _by_parts(new.input_layernorm, x)
    for name in ("query", "key", "value"):
        yield (
            f"attention.{name}",
            _fit_linear(getattr(old.attention, name), getattr(new.attention, name), normed, generator),
        )
    context = _input_of(new.attention.proj, lambda: _by_parts(new.attention, normed))
    yield "attention.proj", _fit_linear(old.attention.proj, new.attention.proj, context, generator)
    behind = x if new.parallel_residual else x + _by_parts(new.attention, normed)
    normed = _by_parts(new.post_attention_layernorm, behind)
    yield "mlp", _fit_mlp(old.mlp, new.mlp, normed, generator)


def _input_of(module: nn.Module, run: Callable[[], object]) -> Tensor:
    """What `module` is given while `run` runs."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    try:
        run()
    finally:
        handle.remove()
    return torch.cat(seen)


def _fit_linear(linear: nn.Module, tokens: Pattention, x: Tensor, generator: torch.Generator) -> float:
    rows, target = x.flatten(0, -2).double(), _by_parts(linear, x).flatten(0, -2).double()
    weight = linear.get_parameter("weight").double()  # [out, in]
    keys = _pairs(_directions(weight, rows, tokens.num_tokens // 2), tokens.num_tokens, rows, generator)
    return _set(tokens, keys, tokens.num_tokens, rows, target)


def _fit_mlp(mlp: nn.Module, tokens: nn.Module, x: Tensor, generator: torch.Generator) -> float:
    assert isinstance(mlp, MLP) and isinstance(tokens, Pattention)
    rows, target = x.flatten(0, -2).double(), _by_parts(mlp, x).flatten(0, -2).double()
    first, last = mlp.fc_in.get_parameter("weight").double(), mlp.fc_out.get_parameter("weight").double()
    weight = _spread(mlp, x) * last.norm(dim=0)  # what a channel adds to the outputs
    keys = first[weight.argsort(descending=True)[: tokens.num_tokens]]
    if rest := tokens.num_tokens - len(keys):
        # The linear part of the whole, by regression, has directions for what is left.
        linear = torch.linalg.lstsq(rows, target).solution.T
        more = _pairs(_directions(linear, rows, rest // 2), rest, rows, generator)
        keys = torch.cat([keys, more * _size(rows, keys) / _size(rows, more)])
    tau_tokens = round(len(keys) * _size(rows, keys).square().item())
    return _set(tokens, keys, min(max(1, tau_tokens), tokens.num_tokens), rows, target)


def _spread(mlp: MLP, x: Tensor) -> Tensor:
    """Standard deviation of each inner channel in the first samples, [m]."""
    inner = [mlp.activation(mlp.fc_in(part)).flatten(0, -2).double() for part in x[:_SAMPLES].split(1)]
    return torch.cat(inner).std(0)


def _size(rows: Tensor, keys: Tensor) -> Tensor:
    """Root mean square of scores."""
    return ((keys @ _moments(rows)) * keys).sum(1).mean().sqrt()


def _moments(rows: Tensor) -> Tensor:
    """Second moments of rows [n, d], [d, d]."""
    return rows.T @ rows / len(rows)


def _directions(weight: Tensor, rows: Tensor, most: int) -> Tensor:
    """At most `most` directions in the space of inputs, the most important for the outputs of `weight` [out, in] first.

    Their scores have variance 1 and do not correlate. Where there may be as many as dimensions, they are the axes: the
    norm of all scores is then that of the input.
    """
    if most >= weight.shape[1]:
        return torch.eye(weight.shape[1], dtype=rows.dtype, device=rows.device)
    moments = _moments(rows)
    values, vectors = torch.linalg.eigh(moments)
    keep = values > 1e-9 * values[-1]
    root = vectors[:, keep] * values[keep].sqrt()  # C = root root^T
    right = torch.linalg.svd(weight @ root, full_matrices=False).Vh
    return right[:most] @ (vectors[:, keep] / values[keep].sqrt()).T


def _pairs(directions: Tensor, count: int, rows: Tensor, generator: torch.Generator) -> Tensor:
    """`count` keys: the first directions, each with its negative; random ones where there are no more."""
    half = directions[: count // 2]
    keys = torch.cat([half, -half])
    rest = count - len(keys)
    if not rest:
        return keys
    drawn = torch.empty(rest, rows.shape[1], dtype=rows.dtype).normal_(generator=generator).to(rows.device)
    return torch.cat([keys, drawn / ((drawn @ _moments(rows)) * drawn).sum(1).sqrt()[:, None]])


def _set(tokens: Pattention, keys: Tensor, tau_tokens: int, rows: Tensor, target: Tensor) -> float:
    """Give a layer these keys, and values fitted to the target [rows, out]; returns Fit.error of its outputs."""
    tau = torch.tensor(tau_tokens, device=rows.device)

    def weights_of(part: Tensor) -> Tensor:
        return theta(part @ keys.T, tau, tokens.activation)

    moments, products = rows.new_zeros(len(keys), len(keys)), rows.new_zeros(len(keys), target.shape[1])
    for part, wanted in zip(rows.split(_ROWS), target.split(_ROWS), strict=True):
        weights = weights_of(part)
        moments += weights.T @ weights
        products += weights.T @ wanted
    ridge = RIDGE * moments.diagonal().mean() * torch.eye(len(moments), dtype=rows.dtype, device=rows.device)
    values = torch.linalg.solve(moments + ridge, products)
    tokens.get_parameter("key_tokens_0").copy_(keys)
    tokens.get_parameter("value_tokens_0").copy_(values)
    tokens.tau_tokens.fill_(tau_tokens)
    parts = zip(rows.split(_ROWS), target.split(_ROWS), strict=True)
    errors = torch.stack([(weights_of(part) @ values - wanted).square().sum() for part, wanted in parts]).sum()
    spread = (target - target.mean(0)).square().sum()
    return (errors / spread).sqrt().item() if spread else math.nan
