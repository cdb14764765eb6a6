"""Row kernels of the cross entropy: each logit is read twice and its gradient written once, in place of the logit.

That is 6 bytes a 16-bit logit; torch's own operations move about 56, since each of them reads and writes fp32 copies.
Statistics are in fp32. Between the two kernels tensor ranks exchange what they found of each row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Columns that a program holds at a time: 16 a thread.
_BLOCK, _WARPS = 4096, 8


@triton.jit
def statistics_kernel(logits, columns, mine, log_sums, label_logits, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """log_sums[r] = log-sum-exp of row r, label_logits[r] = its entry at columns[r], or 0 where mine[r] is false."""
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    highest = float("-inf")
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(0, width, BLOCK):
        offsets = first + tl.arange(0, BLOCK)
        x = tl.load(logits + offsets, mask=offsets < width, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(x, axis=0))
        total = total * tl.exp(highest - higher) + tl.exp(x - higher)
        highest = higher
    tl.store(log_sums + row, highest + tl.log(tl.sum(total, axis=0)))
    is_here = tl.load(mine + row)
    label = tl.load(logits + tl.load(columns + row)).to(tl.float32)
    tl.store(label_logits + row, tl.where(is_here, label, 0.0))


@triton.jit
def gradient_kernel(logits, columns, corrections, shifts, stride, width, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Each logit x of row r becomes exp(x - shifts[r]), less corrections[r] at columns[r]."""
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    entries = logits + row * stride + offsets
    x = tl.load(entries, mask=offsets < width, other=0.0).to(tl.float32)
    grad = tl.exp(x - tl.load(shifts + row))
    grad = tl.where(offsets == tl.load(columns + row), grad - tl.load(corrections + row), grad)
    tl.store(entries, grad.to(logits.dtype.element_ty), mask=offsets < width)


def row_statistics(logits: Tensor, columns: Tensor, mine: Tensor) -> tuple[Tensor, Tensor]:
    """(log-sum-exp, logit at its column or 0) of each row of logits [r, V]; fp32 [r] each.

    columns: int64 [r]; mine: bool [r], whether the column counts.
    """
    rows, width = logits.shape
    log_sums, label_logits = torch.empty(2, rows, dtype=torch.float32, device=logits.device)
    statistics_kernel[(rows,)](
        logits, columns, mine, log_sums, label_logits, logits.stride(0), width, BLOCK=_BLOCK, num_warps=_WARPS
    )  # fmt: skip
    return log_sums, label_logits


def logits_to_gradient(logits: Tensor, columns: Tensor, corrections: Tensor, shifts: Tensor) -> None:
    """exp(logits - shifts), less the correction at each row's column, in place; rows [r] as above."""
    rows, width = logits.shape
    gradient_kernel[(rows, triton.cdiv(width, _BLOCK))](
        logits, columns, corrections, shifts, logits.stride(0), width, BLOCK=_BLOCK, num_warps=_WARPS
    )  # fmt: skip
