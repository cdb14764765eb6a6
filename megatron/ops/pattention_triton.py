"""The row functions of Pattention as Triton kernels, which read a score once and write a weight once.

A row of up to 8192 columns stays in registers, in up to three pieces whose lengths are powers of two: n = 768 is
512 + 256, not 1024. A longer row is read a second time, in chunks, from the cache. One program computes one row; with
l layers, rows i, i + l, i + 2l, .. belong to layer i. A row may be some columns of a longer one: rows lie a stride
apart. Bytes a score in 16 bits: forward 2 read + 2 written, backward 4 + 4. Arithmetic is in fp32.

Triton is looked for when this module is imported, and not before it is needed. TRITON_INTERPRET=1 runs the kernels on
a CPU.
"""

# Parameters of kernels have Triton's types.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron.ops.pattention_rows import Rows

RESIDENT_COLUMNS = 8192
"""Longest row that is kept in registers."""
_CHUNK = 2048
_CODES = {"l2_norm_gelu": 0, "gelu_l2_norm": 1, "softmax": 2}
WHOLE, FIRST, SECOND = 0, 1, 2
"""Phases: a whole row at once, or, where ranks share the columns, what comes before and after the sum over them."""


@triton.jit
def _normal(z, EXACT: tl.constexpr):
    """Distribution function and density of the standard normal: GELU(z) = z cdf, GELU'(z) = cdf + z pdf.

    Not EXACT: Abramowitz and Stegun 7.1.26, whose exponential the density shares; wrong by 1e-7 at most. libdevice's
    erf would take longer than the memory does.
    """
    bell = tl.exp(-0.5 * z * z)
    if EXACT:
        cdf = 0.5 + 0.5 * tl.math.erf(z * 0.7071067811865476)
    else:
        t = 1.0 / (1.0 + 0.23164189 * tl.abs(z))
        series = -0.142248368 + t * (0.7107068705 + t * (-0.7265760135 + t * 0.5307027145))
        tail = t * (0.127414796 + t * series) * bell
        cdf = tl.where(z < 0, tail, 1.0 - tail)
    return cdf, bell * 0.3989422804014327


@triton.jit
def _gelu(z, EXACT: tl.constexpr):
    cdf, _ = _normal(z, EXACT)
    return z * cdf


@triton.jit
def _load(row, start, n, SIZE: tl.constexpr, FILL: tl.constexpr):
    """Columns start, .. of a row in fp32; FILL beyond its end."""
    columns = start + tl.arange(0, SIZE)
    return tl.load(row + columns, mask=columns < n, other=FILL).to(tl.float32)


@triton.jit
def _store(row, start, n, values, SIZE: tl.constexpr):
    columns = start + tl.arange(0, SIZE)
    tl.store(row + columns, values.to(row.dtype.element_ty), mask=columns < n)


@triton.jit
def _squares(a, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """A piece's share of the squared norm."""
    if ACTIVATION == 1:
        a = _gelu(a, EXACT)
    return tl.sum(a * a, 0)


@triton.jit
def _finish(scales, row, peak, total, tau2s, layers, ACTIVATION: tl.constexpr, PHASE: tl.constexpr):
    """Write the statistic of a row or its scale; returns (m, scale). Of the norms `total` is the squared one."""
    scale = total
    if ACTIVATION == 2:
        if PHASE == 0:
            scale = tl.load(tau2s + row % layers) / total
        tl.store(scales + 2 * row, peak)
        tl.store(scales + 2 * row + 1, scale)
    else:
        scale = tl.sqrt(total)
        if PHASE == 0:
            tau = tl.sqrt(tl.load(tau2s + row % layers))
            scale = tl.where(scale > 0, tau / tl.where(scale > 0, scale, 1.0), 0.0)
        tl.store(scales + row, scale)
    return peak, scale


@triton.jit
def _load_scale(scales, row, ACTIVATION: tl.constexpr):
    """(m, scale) of a row; m is 0 but for softmax."""
    if ACTIVATION == 2:
        peak, scale = tl.load(scales + 2 * row), tl.load(scales + 2 * row + 1)
    else:
        peak, scale = 0.0, tl.load(scales + row)
    return peak, scale


@triton.jit
def _weights(a, peak, scale, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == 0:
        weights = _gelu(a * scale, EXACT)
    elif ACTIVATION == 1:
        weights = _gelu(a, EXACT) * scale
    else:
        weights = tl.exp(a - peak) * scale
    return weights


@triton.jit
def _dots(a, grad, peak, scale, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    """(dZ or dW, W, a piece's share of p)."""
    if ACTIVATION == 0:
        z = a * scale
        cdf, pdf = _normal(z, EXACT)
        weights = z * cdf
        grad = grad * (cdf + z * pdf)
        dot = tl.sum(grad * z, 0)
    else:
        weights = _weights(a, peak, scale, ACTIVATION, EXACT)
        dot = tl.sum(grad * weights, 0)
    return grad, weights, dot


@triton.jit
def _grad_scores(a, grad, weights, scale, mean, ACTIVATION: tl.constexpr, EXACT: tl.constexpr):
    if ACTIVATION == 0:
        found = scale * (grad - a * scale * mean)
    elif ACTIVATION == 1:
        cdf, pdf = _normal(a, EXACT)
        found = scale * (grad - weights * mean) * (cdf + a * pdf)
    else:
        found = weights * (grad - mean)
    return found


@triton.jit
def forward_resident(
    scores, weights, scales, tau2s, n, stride, layers,
    ACTIVATION: tl.constexpr, PHASE: tl.constexpr, EXACT: tl.constexpr,
    SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr,
):  # fmt: skip
    """A row in registers: FIRST writes its statistic to `scales`, SECOND its weights by that, WHOLE both."""
    row = tl.program_id(0).to(tl.int64)
    FILL: tl.constexpr = float("-inf") if ACTIVATION == 2 else 0.0
    source, target = scores + row * stride, weights + row * stride
    a0 = _load(source, 0, n, SIZE0, FILL)
    if SIZE1 > 0:
        a1 = _load(source, SIZE0, n, SIZE1, FILL)
    if SIZE2 > 0:
        a2 = _load(source, SIZE0 + SIZE1, n, SIZE2, FILL)
    if PHASE == 2:
        peak, scale = _load_scale(scales, row, ACTIVATION)
    else:
        peak = 0.0
        if ACTIVATION == 2:
            peak = tl.max(a0, 0)
            if SIZE1 > 0:
                peak = tl.maximum(peak, tl.max(a1, 0))
            if SIZE2 > 0:
                peak = tl.maximum(peak, tl.max(a2, 0))
            total = tl.sum(tl.exp(a0 - peak), 0)
            if SIZE1 > 0:
                total += tl.sum(tl.exp(a1 - peak), 0)
            if SIZE2 > 0:
                total += tl.sum(tl.exp(a2 - peak), 0)
        else:
            total = _squares(a0, ACTIVATION, EXACT)
            if SIZE1 > 0:
                total += _squares(a1, ACTIVATION, EXACT)
            if SIZE2 > 0:
                total += _squares(a2, ACTIVATION, EXACT)
        peak, scale = _finish(scales, row, peak, total, tau2s, layers, ACTIVATION, PHASE)
    if PHASE != 1:
        _store(target, 0, n, _weights(a0, peak, scale, ACTIVATION, EXACT), SIZE0)
        if SIZE1 > 0:
            _store(target, SIZE0, n, _weights(a1, peak, scale, ACTIVATION, EXACT), SIZE1)
        if SIZE2 > 0:
            _store(target, SIZE0 + SIZE1, n, _weights(a2, peak, scale, ACTIVATION, EXACT), SIZE2)


@triton.jit
def forward_chunked(
    scores, weights, scales, tau2s, n, stride, layers,
    ACTIVATION: tl.constexpr, PHASE: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`forward_resident` for rows of any length."""
    row = tl.program_id(0).to(tl.int64)
    FILL: tl.constexpr = float("-inf") if ACTIVATION == 2 else 0.0
    source, target = scores + row * stride, weights + row * stride
    if PHASE == 2:
        peak, scale = _load_scale(scales, row, ACTIVATION)
    else:
        peak, total = 0.0, 0.0
        if ACTIVATION == 2:
            peak = float("-inf")
            for start in range(0, n, SIZE):
                a = _load(source, start, n, SIZE, FILL)
                higher = tl.maximum(peak, tl.max(a, 0))
                total = total * tl.exp(peak - higher) + tl.sum(tl.exp(a - higher), 0)
                peak = higher
        else:
            for start in range(0, n, SIZE):
                total += _squares(_load(source, start, n, SIZE, FILL), ACTIVATION, EXACT)
        peak, scale = _finish(scales, row, peak, total, tau2s, layers, ACTIVATION, PHASE)
    if PHASE != 1:
        for start in range(0, n, SIZE):
            a = _load(source, start, n, SIZE, FILL)
            _store(target, start, n, _weights(a, peak, scale, ACTIVATION, EXACT), SIZE)


@triton.jit
def backward_resident(
    scores, grads, weights, scales, dots, tau2s, n, stride, layers,
    ACTIVATION: tl.constexpr, PHASE: tl.constexpr, EXACT: tl.constexpr,
    SIZE0: tl.constexpr, SIZE1: tl.constexpr, SIZE2: tl.constexpr,
):  # fmt: skip
    """A row in registers: dA in the place of `grads`.

    FIRST writes p and W, SECOND dA, for which `dots` holds p / tau^2; WHOLE writes W and dA.
    """
    row = tl.program_id(0).to(tl.int64)
    FILL: tl.constexpr = float("-inf") if ACTIVATION == 2 else 0.0
    source, grad, target = scores + row * stride, grads + row * stride, weights + row * stride
    peak, scale = _load_scale(scales, row, ACTIVATION)
    a0 = _load(source, 0, n, SIZE0, FILL)
    g0, w0, dot = _dots(a0, _load(grad, 0, n, SIZE0, 0.0), peak, scale, ACTIVATION, EXACT)
    if SIZE1 > 0:
        a1 = _load(source, SIZE0, n, SIZE1, FILL)
        g1, w1, dot1 = _dots(a1, _load(grad, SIZE0, n, SIZE1, 0.0), peak, scale, ACTIVATION, EXACT)
        dot += dot1
    if SIZE2 > 0:
        a2 = _load(source, SIZE0 + SIZE1, n, SIZE2, FILL)
        g2, w2, dot2 = _dots(a2, _load(grad, SIZE0 + SIZE1, n, SIZE2, 0.0), peak, scale, ACTIVATION, EXACT)
        dot += dot2
    if PHASE != 2:
        _store(target, 0, n, w0, SIZE0)
        if SIZE1 > 0:
            _store(target, SIZE0, n, w1, SIZE1)
        if SIZE2 > 0:
            _store(target, SIZE0 + SIZE1, n, w2, SIZE2)
    if PHASE == 1:
        tl.store(dots + row, dot)
    else:
        mean = tl.load(dots + row) if PHASE == 2 else dot / tl.load(tau2s + row % layers)
        _store(grad, 0, n, _grad_scores(a0, g0, w0, scale, mean, ACTIVATION, EXACT), SIZE0)
        if SIZE1 > 0:
            _store(grad, SIZE0, n, _grad_scores(a1, g1, w1, scale, mean, ACTIVATION, EXACT), SIZE1)
        if SIZE2 > 0:
            _store(grad, SIZE0 + SIZE1, n, _grad_scores(a2, g2, w2, scale, mean, ACTIVATION, EXACT), SIZE2)


@triton.jit
def backward_chunked(
    scores, grads, weights, scales, dots, tau2s, n, stride, layers,
    ACTIVATION: tl.constexpr, PHASE: tl.constexpr, EXACT: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """`backward_resident` for rows of any length."""
    row = tl.program_id(0).to(tl.int64)
    FILL: tl.constexpr = float("-inf") if ACTIVATION == 2 else 0.0
    source, grad, target = scores + row * stride, grads + row * stride, weights + row * stride
    peak, scale = _load_scale(scales, row, ACTIVATION)
    if PHASE == 2:
        mean = tl.load(dots + row)
    else:
        dot = 0.0
        for start in range(0, n, SIZE):
            a, g = _load(source, start, n, SIZE, FILL), _load(grad, start, n, SIZE, 0.0)
            _, w, more = _dots(a, g, peak, scale, ACTIVATION, EXACT)
            _store(target, start, n, w, SIZE)
            dot += more
        if PHASE == 1:
            tl.store(dots + row, dot)
        else:
            mean = dot / tl.load(tau2s + row % layers)
    if PHASE != 1:
        for start in range(0, n, SIZE):
            a, g = _load(source, start, n, SIZE, FILL), _load(grad, start, n, SIZE, 0.0)
            g, w, _ = _dots(a, g, peak, scale, ACTIVATION, EXACT)
            _store(grad, start, n, _grad_scores(a, g, w, scale, mean, ACTIVATION, EXACT), SIZE)


class Launch(NamedTuple):
    """How the kernels run on rows of one length.

    sizes: names and lengths of the pieces, or of a chunk.
    """

    resident: bool
    sizes: dict[str, int]
    num_warps: int

    @classmethod
    def of(cls, n: int) -> Launch:
        """For rows of n columns: 16 of them or so a thread."""
        if n > RESIDENT_COLUMNS:
            return cls(False, {"SIZE": _CHUNK}, 8)
        warps = min(16, triton.next_power_of_2(max(1, n // 384)))
        return cls(True, dict(zip(("SIZE0", "SIZE1", "SIZE2"), _pieces(n), strict=True)), warps)


def _pieces(n: int) -> tuple[int, int, int]:
    """Up to three powers of two that hold n columns: as long as fits, and again, and the rest rounded up."""
    sizes: list[int] = []
    while n > 0 and len(sizes) < 2:
        sizes.append(max(16, triton.next_power_of_2(n + 1) // 2))
        n -= sizes[-1]
    if n > 0:
        sizes.append(max(16, triton.next_power_of_2(n)))
    return (*sizes, 0, 0)[:3]  # type: ignore[return-value]


class TritonRows(Rows):
    """The row functions by the kernels of this module; scores in fp32, fp16 or bf16."""

    def forward(self, scores: Tensor, tau2: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        weights, scale = torch.empty_like(scores) if out is None else out, self._row_numbers(scores)
        self._forward(WHOLE, scores, weights, scale, tau2)
        return weights, scale

    def backward(
        self, scores: Tensor, scale: Tensor, grad: Tensor, tau2: Tensor, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """See Rows; `grad` becomes the gradient of the scores."""
        weights = torch.empty_like(scores) if out is None else out
        self._backward(WHOLE, scores, grad, weights, scale, scale, tau2)
        return grad, weights

    def statistics(self, scores: Tensor) -> Tensor:
        """See Rows."""
        statistics = self._row_numbers(scores)
        self._forward(FIRST, scores, scores, statistics, statistics)
        return statistics

    def weights(self, scores: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
        """See Rows."""
        weights = torch.empty_like(scores) if out is None else out
        self._forward(SECOND, scores, weights, scale, scale)
        return weights

    def dots(self, scores: Tensor, scale: Tensor, grad: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """See Rows."""
        weights, dots = torch.empty_like(scores) if out is None else out, torch.empty_like(scale[..., :1])
        self._backward(FIRST, scores, grad, weights, scale, dots, scale)
        return dots, weights

    def grad_scores(self, scores: Tensor, scale: Tensor, grad: Tensor, means: Tensor) -> Tensor:
        """See Rows; `grad` becomes the gradient of the scores."""
        self._backward(SECOND, scores, grad, grad, scale, means, scale)
        return grad

    def _forward(self, phase: int, scores: Tensor, *others: Tensor) -> None:
        launch = Launch.of(scores.shape[-1])
        self._launch(forward_resident if launch.resident else forward_chunked, launch, phase, scores, *others)

    def _backward(self, phase: int, scores: Tensor, *others: Tensor) -> None:
        launch = Launch.of(scores.shape[-1])
        self._launch(backward_resident if launch.resident else backward_chunked, launch, phase, scores, *others)

    def _launch(self, kernel: Any, launch: Launch, phase: int, scores: Tensor, *others: Tensor) -> None:
        rows, n, layers = scores.shape[:-1].numel(), scores.shape[-1], scores.shape[-2]
        if rows == 0:
            return
        stride = scores.stride(0) // layers  # of all the matrices
        kernel[(rows,)](
            scores, *others, n, stride, layers, ACTIVATION=_CODES[self.activation], PHASE=phase,
            EXACT=scores.dtype == torch.float32, **launch.sizes, num_warps=launch.num_warps,
        )  # fmt: skip

    def _row_numbers(self, scores: Tensor) -> Tensor:
        return scores.new_empty((*scores.shape[:-1], self.columns), dtype=torch.float32)
