"""What Pattention does row by row between its matrix products: scores -> weights, and back.

Per row of scores A [n], with the statistic c that `combined` takes over the ranks' shares of the row:

| activation   | c                | scale s              | weights W   | dot p      | dA                             |
|--------------|------------------|----------------------|-------------|------------|--------------------------------|
| l2_norm_gelu | norm of A        | tau / c, 0 for c = 0 | GELU(s A)   | sum dZ Z   | s (dZ - Z p / tau^2), Z = s A  |
| gelu_l2_norm | norm of GELU(A)  | tau / c, 0 for c = 0 | s GELU(A)   | sum dW W   | s (dW - W p / tau^2) GELU'(A)  |
| softmax      | m = max A, and   | m, and tau^2 / the   | exp(A - m)  | sum dW W   | W (dW - p / tau^2)             |
|              | sum exp(A - m)   | sum                  | tau^2 / sum |            |                                |

A backward pass therefore needs A and one number a row, or two. Shapes: scores, weights and their gradients [T, l, n]
for T tokens and l layers that are computed together; statistics and scales [T, l, 1], of softmax [T, l, 2]; dots
[T, l, 1]; tau^2 [l, 1]; all of these in the statistics dtype (fp32, or fp64 for fp64 scores). All arithmetic is in
that dtype.

Where the tokens of a layer are in several norm groups, all of this holds for the columns of each group alone, and
statistics, scales, dots and tau^2 have the group as one more dimension before the others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.mpu.collectives import max_over_ranks, norm_over_ranks, sum_over_ranks
from megatron.mpu.layout import Axis
from megatron.ops.pattention import statistics_dtype

_CPU_CHUNK = 2**19
"""Scores that a CPU takes through all steps before the next ones: they stay in its cache."""

_gelu_backward = torch.ops.aten.gelu_backward


class Rows(ABC):
    """The row functions of one activation. What they are given to read is not changed, but for `grad`.

    `out` is where weights are written, if given: like the other matrices, columns of a larger one, row under row.
    """

    works_in_place = False
    """May `out` be the scores?"""

    def __init__(self, activation: str) -> None:
        self.activation = activation
        self.columns = 2 if activation == "softmax" else 1
        """Numbers in the statistic of a row, and in its scale."""

    @abstractmethod
    def forward(self, scores: Tensor, tau2: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(weights, scale) of rows that are whole."""

    @abstractmethod
    def backward(
        self, scores: Tensor, scale: Tensor, grad: Tensor, tau2: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(gradient of the scores, weights) of rows that are whole; `grad`, that of the weights, may be overwritten."""

    @abstractmethod
    def statistics(self, scores: Tensor) -> Tensor:
        """c over the columns that are there."""

    @abstractmethod
    def weights(self, scores: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """W of rows whose scale is known."""

    @abstractmethod
    def dots(self, scores: Tensor, scale: Tensor, grad: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(p over the columns that are there, weights)."""

    @abstractmethod
    def grad_scores(self, scores: Tensor, scale: Tensor, grad: Tensor, means: Tensor) -> Tensor:
        """dA from p / tau^2 over all columns; `grad` may be overwritten."""

    def combined(self, statistics: Tensor, axis: Axis) -> Tensor:
        """c of whole rows from those of the ranks' shares."""
        if axis.size == 1:
            return statistics
        if self.activation != "softmax":
            return norm_over_ranks(statistics, axis)
        peak, total = statistics.split(1, -1)
        highest = max_over_ranks(peak, axis)
        return torch.cat([highest, sum_over_ranks(total * torch.exp(peak - highest), axis)], -1)

    def scale(self, statistics: Tensor, tau2: Tensor) -> Tensor:
        """s from c."""
        return row_scale(statistics, tau2, self.activation)


def row_statistics(scores: Tensor, activation: str) -> Tensor:
    """c of the table."""
    wide = statistics_dtype(scores)
    if activation == "l2_norm_gelu":
        return torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=wide)
    if activation == "softmax":
        peak = scores.amax(-1, keepdim=True).to(wide)
        return torch.cat([peak, torch.exp(scores.to(wide) - peak).sum(-1, keepdim=True)], -1)
    return torch.linalg.vector_norm(F.gelu(scores.to(wide)), dim=-1, keepdim=True)


def row_scale(statistics: Tensor, tau2: Tensor, activation: str) -> Tensor:
    """s of the table."""
    if activation == "softmax":
        peak, total = statistics.split(1, -1)
        return torch.cat([peak, tau2 / total], -1)
    nonzero = statistics > 0
    return torch.where(nonzero, tau2.sqrt() / torch.where(nonzero, statistics, 1.0), 0.0)


def row_weights(scores: Tensor, scale: Tensor, activation: str) -> Tensor:
    """W of the table, in the dtype of the scores."""
    return _wide_weights(scores.to(scale.dtype), scale, activation).to(scores.dtype)


def row_dots(scores: Tensor, scale: Tensor, grad: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(p, W) of the table."""
    a, grad = scores.to(scale.dtype), grad.to(scale.dtype)
    weights = _wide_weights(a, scale, activation)
    if activation == "l2_norm_gelu":
        z = a * scale
        return (_gelu_backward(grad, z) * z).sum(-1, keepdim=True), weights.to(scores.dtype)
    return (grad * weights).sum(-1, keepdim=True), weights.to(scores.dtype)


def row_grad_scores(scores: Tensor, scale: Tensor, grad: Tensor, means: Tensor, activation: str) -> Tensor:
    """dA of the table, in the dtype of the scores; means are p / tau^2."""
    a, grad = scores.to(scale.dtype), grad.to(scale.dtype)
    if activation == "l2_norm_gelu":
        z = a * scale
        return ((_gelu_backward(grad, z) - z * means) * scale).to(scores.dtype)
    weights = _wide_weights(a, scale, activation)
    if activation == "softmax":
        return (weights * (grad - means)).to(scores.dtype)
    return _gelu_backward((grad - weights * means) * scale, a).to(scores.dtype)


def row_forward(scores: Tensor, tau2: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(W, s) of rows that are whole."""
    scale = row_scale(row_statistics(scores, activation), tau2, activation)
    return row_weights(scores, scale, activation), scale


def row_backward(scores: Tensor, scale: Tensor, grad: Tensor, tau2: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """(dA, W) of rows that are whole."""
    dots, weights = row_dots(scores, scale, grad, activation)
    return row_grad_scores(scores, scale, grad, dots / tau2, activation), weights


def _wide_weights(a: Tensor, scale: Tensor, activation: str) -> Tensor:
    if activation == "l2_norm_gelu":
        return F.gelu(a * scale)
    if activation == "gelu_l2_norm":
        return F.gelu(a) * scale
    peak, factor = scale.split(1, -1)
    return torch.exp(a - peak) * factor


class TorchRows(Rows):
    """The row functions in torch's own operations, on a CPU as many rows at a time as its cache holds."""

    works_in_place = True

    def forward(self, scores: Tensor, tau2: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        scale, weights = self._row_numbers(scores), torch.empty_like(scores) if out is None else out
        for a, s, w in _chunks(scores, scale, weights):
            s.copy_(self.scale(row_statistics(a, self.activation), tau2))
            self._store_weights(a, s, w)
        return weights, scale

    def backward(
        self, scores: Tensor, scale: Tensor, grad: Tensor, tau2: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Rows; `grad` becomes the gradient of the scores."""
        weights = torch.empty_like(scores) if out is None else out
        products = torch.empty_like(next(_chunks(scores))[0]) if self._in_place(scores, scale) else None
        for a, s, g, w in _chunks(scores, scale, grad, weights):
            if products is not None:
                _l2_norm_gelu_backward(a, s, g, tau2, w, products[: len(a)])
            else:
                _store(row_backward(a, s, g, tau2, self.activation), g, w)
        return grad, weights

    def statistics(self, scores: Tensor) -> Tensor:
        """See Rows."""
        statistics = self._row_numbers(scores)
        for a, c in _chunks(scores, statistics):
            c.copy_(row_statistics(a, self.activation))
        return statistics

    def weights(self, scores: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """See Rows."""
        weights = torch.empty_like(scores) if out is None else out
        for a, s, w in _chunks(scores, scale, weights):
            self._store_weights(a, s, w)
        return weights

    def dots(self, scores: Tensor, scale: Tensor, grad: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        dots, weights = torch.empty_like(scale[..., :1]), torch.empty_like(scores) if out is None else out
        for a, s, g, p, w in _chunks(scores, scale, grad, dots, weights):
            _store(row_dots(a, s, g, self.activation), p, w)
        return dots, weights

    def grad_scores(self, scores: Tensor, scale: Tensor, grad: Tensor, means: Tensor) -> Tensor:
        """See Rows; `grad` becomes the gradient of the scores."""
        for a, s, g, m in _chunks(scores, scale, grad, means):
            g.copy_(row_grad_scores(a, s, g, m, self.activation))
        return grad

    def _row_numbers(self, scores: Tensor) -> Tensor:
        return scores.new_empty((*scores.shape[:-1], self.columns), dtype=statistics_dtype(scores))

    def _store_weights(self, scores: Tensor, scale: Tensor, weights: Tensor) -> None:
        if self._in_place(scores, scale):
            torch.ops.aten.gelu.out(torch.mul(scores, scale, out=weights), out=weights)
        else:
            weights.copy_(row_weights(scores, scale, self.activation))

    def _in_place(self, scores: Tensor, scale: Tensor) -> bool:
        return scores.dtype == scale.dtype and self.activation == "l2_norm_gelu"


def _chunks(*tensors: Tensor) -> Iterator[tuple[Any, ...]]:
    """The same rows of all tensors: as many as a CPU's cache holds at a time, on other devices all."""
    first = tensors[0]
    size = max(1, len(first))
    if first.device.type == "cpu" and first.numel() > _CPU_CHUNK:
        size = max(1, _CPU_CHUNK * len(first) // first.numel())
    yield from zip(*(tensor.split(size) for tensor in tensors), strict=True)


def _store(found: tuple[Tensor, Tensor], *places: Tensor) -> None:
    for tensor, place in zip(found, places, strict=True):
        place.copy_(tensor)


def _l2_norm_gelu_backward(a: Tensor, s: Tensor, grad: Tensor, tau2: Tensor, weights: Tensor, products: Tensor) -> None:
    """`row_backward` without a buffer of its own: grad becomes dA, weights W; products is overwritten."""
    z = torch.mul(a, s, out=weights)
    _gelu_backward.grad_input(grad, z, grad_input=grad)
    mean = torch.mul(grad, z, out=products).sum(-1, keepdim=True) / tau2
    grad.addcmul_(z, mean, value=-1).mul_(s)
    torch.ops.aten.gelu.out(z, out=z)


class CompiledRows(Rows):
    """The row functions as torch.compile fuses them."""

    def forward(self, scores: Tensor, tau2: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        weights, scale = _compiled(row_forward)(scores, tau2, self.activation)
        return _placed(weights, out), scale

    def backward(
        self, scores: Tensor, scale: Tensor, grad: Tensor, tau2: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Rows."""
        grad_scores, weights = _compiled(row_backward)(scores, scale, grad, tau2, self.activation)
        return grad_scores, _placed(weights, out)

    def statistics(self, scores: Tensor) -> Tensor:
        """See Rows."""
        return _compiled(row_statistics)(scores, self.activation)

    def weights(self, scores: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """See Rows."""
        return _placed(_compiled(row_weights)(scores, scale, self.activation), out)

    def dots(self, scores: Tensor, scale: Tensor, grad: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        dots, weights = _compiled(row_dots)(scores, scale, grad, self.activation)
        return dots, _placed(weights, out)

    def grad_scores(self, scores: Tensor, scale: Tensor, grad: Tensor, means: Tensor) -> Tensor:
        """See Rows."""
        return _compiled(row_grad_scores)(scores, scale, grad, means, self.activation)


@cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compiled once for each width of rows; the number of rows may vary, as it does between training and evaluation."""
    return torch.compile(function, fullgraph=True)


def _placed(found: Tensor, place: Tensor | None) -> Tensor:
    """`found`, or the place that it was copied to, if it is not there already."""
    return found if place is None or found is place else place.copy_(found)


class GroupedRows(Rows):
    """The row functions of layers whose tokens are in several norm groups: those of each group, on its columns.

    Args:
        rows: the row functions of one group.
        norm_columns: columns of each group, in order.
    """

    def __init__(self, rows: Rows, norm_columns: Sequence[int]) -> None:
        super().__init__(rows.activation)
        self.works_in_place = rows.works_in_place
        self._rows, self._norm_columns = rows, list(norm_columns)

    def forward(self, scores: Tensor, tau2: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        weights = torch.empty_like(scores) if out is None else out
        parts = self._parts([tau2], [scores, weights])
        return weights, torch.stack([self._rows.forward(a, t, w)[1] for t, a, w in parts])

    def backward(
        self, scores: Tensor, scale: Tensor, grad: Tensor, tau2: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Rows; `grad` becomes the gradient of the scores."""
        weights = torch.empty_like(scores) if out is None else out
        for s, t, a, g, w in self._parts([scale, tau2], [scores, grad, weights]):
            _placed(self._rows.backward(a, s, g, t, w)[0], g)
        return grad, weights

    def statistics(self, scores: Tensor) -> Tensor:
        """See Rows."""
        return torch.stack([self._rows.statistics(a) for (a,) in self._parts([], [scores])])

    def weights(self, scores: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """See Rows."""
        weights = torch.empty_like(scores) if out is None else out
        for s, a, w in self._parts([scale], [scores, weights]):
            self._rows.weights(a, s, w)
        return weights

    def dots(self, scores: Tensor, scale: Tensor, grad: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        weights = torch.empty_like(scores) if out is None else out
        parts = self._parts([scale], [scores, grad, weights])
        return torch.stack([self._rows.dots(a, s, g, w)[0] for s, a, g, w in parts]), weights

    def grad_scores(self, scores: Tensor, scale: Tensor, grad: Tensor, means: Tensor) -> Tensor:
        """See Rows; `grad` becomes the gradient of the scores."""
        for s, m, a, g in self._parts([scale, means], [scores, grad]):
            _placed(self._rows.grad_scores(a, s, g, m), g)
        return grad

    def _parts(self, numbers: Sequence[Tensor], matrices: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
        """For each group its rows' numbers and its columns of the matrices."""
        by_group = [*(number.unbind() for number in numbers), *(m.split(self._norm_columns, -1) for m in matrices)]
        yield from zip(*by_group, strict=True)
