"""What a model computes when nothing is learned: products with fixed matrices, and row weights without a graph."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron.ops.pattention import statistics_dtype, theta

Product = Callable[[Tensor], Tensor]

# Rows of input that a packed layout is made for: oneDNN picks blocks by it. Those for many rows serve one row best.
_ROWS = 256


def can_pack(matrix: Tensor) -> bool:
    """Is there a packed product for matrices of this kind here? In fp32 on CPUs, where torch has oneDNN."""
    is_known = matrix.device.type == "cpu" and matrix.dtype == torch.float32
    # An attribute that torch does not document: without it a plain product does.
    return is_known and torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


@torch.no_grad()
def product_with(matrix: Tensor, is_packed: bool = True) -> Product:
    """A function x [.., in] -> x @ matrix.T [.., out] for a matrix [out, in] that does not change; without gradients.

    Where it can, and unless `is_packed` is false, it works on a copy in the blocks that oneDNN reads from memory one
    after the other. With few rows a product takes the time that reading the matrix takes: on CPUs this layout is read
    1.5 (one row) to 3 times (8 rows) as fast as a matrix by rows is by torch's BLAS.
    """
    if not is_packed or not can_pack(matrix):
        return lambda x: F.linear(x, matrix)
    packed = torch.ops.mkldnn._reorder_linear_weight(matrix.detach().contiguous(), _ROWS)
    return lambda x: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")


@torch.no_grad()
def row_weights(scores: Tensor, tau: Tensor, activation: str, norm_columns: tuple[int, ...] = ()) -> Tensor:
    """`megatron.ops.pattention.theta` without gradients; may write into `scores`.

    Args:
        scores: [.., n]; for several layers of n tokens [.., layers, n].
        tau: tau^2 of the layer, or of each, int64 [] or [layers]; of several norm groups [groups] or [layers, groups].
        norm_columns: of how many columns each norm group is; () is one of all.
    """
    if norm_columns:
        parts = zip(scores.split(norm_columns, -1), tau.unbind(-1), strict=True)
        return torch.cat([row_weights(part, counts, activation) for part, counts in parts], -1)
    if activation != "l2_norm_gelu":
        rows, counts = scores.unbind(-2) if tau.dim() else [scores], tau.view(-1)
        weights = [theta(row, count, activation) for row, count in zip(rows, counts, strict=True)]
        return torch.stack(weights, dim=-2) if tau.dim() else weights[0]
    dtype = statistics_dtype(scores)
    norm = torch.linalg.vector_norm(scores, dim=-1, keepdim=True, dtype=dtype)
    # A norm is zero or at least this, the root of the smallest number: a row of zeros gives zeros.
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    scale = tau.to(dtype).sqrt()[..., None] / norm.clamp_min_(smallest**0.5)
    scaled = scores.mul_(scale) if scores.dtype == dtype else scores * scale
    return F.gelu(scaled).to(scores.dtype)
