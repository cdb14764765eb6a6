"""Linear layers split over the tensor ranks (Shoeybi et al., Megatron-LM, 2019, section 3), for Transformer blocks.

On an axis of one they are nn.Linear, parameter names included.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from megatron.model.joint import JointLayer
from megatron.mpu.collectives import Form, copy_to_ranks, enter, leave
from megatron.mpu.layout import Axis
from megatron.mpu.roles import Feeds, Projection, Role, mark_role
from megatron.mpu.shard import mark_sharded


class ColumnParallelLinear(JointLayer, nn.Linear):
    """Each rank computes its share of the outputs: weight [out share, in], bias [out share].

    Args:
        in_features, out_features: widths of the whole layer.
        bias: has a bias.
        axis: the tensor ranks.
        inputs: form of the input, `whole` or `tokens`.
        projection: which of a block's projections this is.
        device: as in nn.Linear.
        feeds: where the outputs go, for the roles of its parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        axis: Axis,
        inputs: Form,
        projection: Projection | None,
        device: torch.device | str | None = None,
        feeds: Feeds | None = None,
    ) -> None:
        start, stop = axis.share(out_features)
        super().__init__(in_features, stop - start, bias=bias, device=device)
        self.axis, self.inputs = axis, inputs
        mark_sharded(self.weight, 0, (out_features, in_features), axis)
        mark_role(self.weight, Role("matrix", projection, feeds=feeds))
        mark_role(self.bias, Role("bias", projection, feeds=feeds))
        if bias:
            mark_sharded(self.bias, 0, (out_features,), axis)

    def read_parameters(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias; this rank's share."""
        return self.weight, self.bias

    @staticmethod
    def compute(
        layers: Sequence[ColumnParallelLinear], parameters: Sequence[tuple[Tensor, Tensor | None]], x: Tensor
    ) -> list[Tensor]:
        """[b, s, in] in the form `inputs` -> [b, s, out share] of each; x is gathered, its gradient reduced, once."""
        x = enter(x, layers[0].inputs, layers[0].axis)
        return [F.linear(x, weight, bias) for weight, bias in parameters]


class RowParallelLinear(nn.Linear):
    """Each rank reads its share of the inputs, and the ranks' outputs are summed: weight [out, in share], bias [out].

    Args:
        in_features, out_features: widths of the whole layer.
        bias: has a bias, the same on all ranks.
        axis: the tensor ranks.
        outputs: form of the output, `whole` or `tokens`.
        projection: which of a block's projections this is.
        device: as in nn.Linear.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        axis: Axis,
        outputs: Form,
        projection: Projection | None,
        device: torch.device | str | None = None,
    ) -> None:
        start, stop = axis.share(in_features)
        super().__init__(stop - start, out_features, bias=bias, device=device)
        self.axis, self.outputs = axis, outputs
        mark_sharded(self.weight, 1, (out_features, in_features), axis)
        mark_role(self.weight, Role("output_matrix", projection, feeds="residual"))
        mark_role(self.bias, Role("bias", projection, feeds="residual"))

    def forward(self, x: Tensor) -> Tensor:
        """[b, s, in share] -> [b, s, out] in the form `outputs`."""
        if self.axis.size == 1:
            return super().forward(x)  # one fused call
        out = leave(F.linear(x, self.weight), self.outputs, self.axis)
        if self.bias is None:
            return out
        # Added to a share of the tokens, the bias gets a share of its gradient.
        return out + (copy_to_ranks(self.bias, self.axis) if self.outputs == "tokens" else self.bias)
