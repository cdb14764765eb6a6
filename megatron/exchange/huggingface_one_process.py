"""What an export has in the place of what is shared between processes, and of kernels.

A function defined here replaces the package's function of the same name in the code of an export (see
megatron.exchange.huggingface_source): it has one implementation of Pattention and of attention, free of kernels, and
runs in one process.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from megatron.model.norms import RMSNorm
from megatron.model.pattention import Pattention
from megatron.mpu.roles import Role
from megatron.ops.attention import AttentionFunction, sdpa_attention
from megatron.ops.pattention import PattentionFunction, joint_reference


class Axis:
    """One process."""

    size, rank = 1, 0

    def share(self, size: int) -> tuple[int, int]:
        """[start, stop): everything."""
        return 0, size


ALONE = Axis()


class Layout:
    """One process."""

    tensor, sequence_parallel = ALONE, False


SINGLE = Layout()


def enter(x: Tensor, form: str, axis: Axis) -> Tensor:
    """Inputs are whole."""
    return x


def leave(x: Tensor, form: str, axis: Axis) -> Tensor:
    """Outputs are whole."""
    return x


def sum_scatter(parts: Sequence[Tensor], dim: int, axis: Axis) -> list[Tensor]:
    """Outputs are whole."""
    return list(parts)


def sum_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Sums are whole."""
    return x


def copy_to_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Nothing is shared."""
    return x


def sum_statistics(x: Tensor, axis: Axis) -> Tensor:
    """Statistics are whole."""
    return x


def norm_over_ranks(norms: Tensor, axis: Axis) -> Tensor:
    """Norms are whole."""
    return norms


def max_over_ranks(x: Tensor, axis: Axis) -> Tensor:
    """Maxima are whole."""
    return x.detach()


def gather_shares(x: Tensor, size: int, axis: Axis) -> Tensor:
    """Logits are whole."""
    return x


def mark_sharded(parameter: nn.Parameter, dim: int, shape: tuple[int, ...], axis: Axis) -> None:
    """Parameters are whole."""


def mark_role(parameter: Tensor | None, role: Role) -> None:
    """Rules that go by roles are for training."""


def take_share(whole: Tensor, parameter: Tensor, axis: Axis) -> Tensor:
    """Parameters are whole."""
    return whole


def whole_shape(parameter: Tensor) -> torch.Size:
    """Parameters are whole."""
    return parameter.shape


def dropout(x: Tensor, probability: float, training: bool, layout: Layout) -> Tensor:
    """F.dropout."""
    return F.dropout(x, probability, training) if probability else x


def own_stream(axis: Axis, device: torch.device) -> AbstractContextManager[None]:
    """The default generator."""
    return nullcontext()


def select_backend(name: str, device_type: str, recompute_scores: bool = False) -> tuple[str, PattentionFunction]:
    """Pattention by its formula, on every device."""
    return "reference", joint_reference


def select_attention(name: str, causal: bool = True) -> AttentionFunction:
    """torch's scaled_dot_product_attention, on every device."""
    return sdpa_attention if causal else partial(sdpa_attention, causal=False)


class JointLayer(nn.Module):
    """A layer that is computed alone."""

    compute: Any
    read_parameters: Any

    def forward(self, x: Tensor) -> Tensor:
        """x [.., in] -> [.., out]."""
        return self.compute([self], [self.read_parameters()], x)[0]


def project(layers: Sequence[nn.Module], x: Tensor) -> list[Tensor]:
    """Each layer's output."""
    return [layer(x) for layer in layers]


def initialise(module: nn.Module, config: Any) -> bool:
    """New values for the parameters of a module that transformers does not know; false for any other."""
    if isinstance(module, Pattention):
        value_std = 2 / config.num_layers / config.hidden_size**0.5
        for i in module.segments:
            init.normal_(module.get_parameter(f"key_tokens_{i}"), std=config.init_method_std)
            init.normal_(module.get_parameter(f"value_tokens_{i}"), std=value_std)
        init.copy_(module.tau_tokens, module.initial_tau)
    elif isinstance(module, RMSNorm):
        init.ones_(module.scale)
    else:
        return False
    return True
