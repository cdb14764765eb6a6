"""What new parameter tokens start as, so that a layer computes what it did, or as the official code has them.

m tokens more, where n share a row norm:

| row_norm, new_keys | activation | new keys | new values | tau^2 | first gradient |
|---|---|---|---|---|---|
| joint, zero | both GELUs | 0: no score, no weight, no share of the row norm | initialised | stays | keys |
| joint, rotated | l2_norm_gelu | c Q R, where the old keys are U R (QR), Q^T Q = 1, c^2 = m / tau^2 | 0 | + m | both |
| joint, zero | softmax, where zero keys count in the denominator | the old ones, repeated | 0 | + m | values |
| segment, random | all | normal, of the RMS of the old keys | 0 | their own, m | values |
| segment, rotated | l2_norm_gelu | c Q R, c^2 = m / n: of the same RMS | 0 | their own, m | values |
| joint, official | all | initialised | initialised | + m | both |

All but the last leave the layer's outputs as they are.

Q is random. The squared scores of rotated keys K' sum to c^2 times those of the old ones for every input, because
K'^T K' = c^2 K^T K. Each squared row norm becomes 1 + c^2 times what it was, and so does tau^2: the old weights
tau A / ||A|| stay, and the new ones are random features of the input from the start. That takes at least as many new
keys as the old ones have dimensions, min(n, d). Their first gradient comes through the norm.

With row_norm segment Theta is taken over the scores of the new tokens alone: the layer is the sum of two Pattentions,
the old one as it was and a new one, whose values of zero give zero whatever its keys. A later growth with joint joins
the last of them: the old keys and tau of the table are then its own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron.config.sections.model import ModelSection
from megatron.config.sections.scaling import NewKeys
from megatron.growth.plan import sharing_segments
from megatron.model.init import initial_value, parameter_generator
from megatron.mpu.collectives import sum_over_ranks
from megatron.mpu.layout import ALONE, Axis


@dataclass(frozen=True)
class Recipe:
    """How the last growth of the model `after` starts its tokens.

    Args:
        after: the model with them.
        new_keys: what their keys start as.
        seed: of what is drawn, each parameter from a generator of its own (megatron.model.init).
    """

    after: ModelSection
    new_keys: NewKeys
    seed: int

    @property
    def has_own_norm(self) -> bool:
        """Have the new tokens a row norm of their own?"""
        return self.after.segment_norms is not None and self.after.segment_norms[-1] == "segment"

    @property
    def is_repeated(self) -> bool:
        """Are the new keys the old ones again?"""
        return self.is_exact and self.after.norm_activation_type == "softmax" and not self.has_own_norm

    @property
    def is_drawn(self) -> bool:
        """Are the new keys drawn whole, the same on all ranks?"""
        return self.new_keys in ("random", "official")

    @property
    def is_exact(self) -> bool:
        """Do outputs stay?"""
        return self.new_keys != "official"

    @property
    def has_weights(self) -> bool:
        """Have the new tokens weights that are not zero? Then tau counts them, and to be exact takes values of zero."""
        return self.has_own_norm or self.is_repeated or self.new_keys in ("rotated", "official")

    def sources(self, sizes: Sequence[int]) -> list[int]:
        """Of which old segments, with tokens of these numbers, the new keys are made."""
        if self.has_own_norm:
            return [i for i, size in enumerate(sizes) if size]
        return sharing_segments(sizes, self.after.segment_norms, "joint")

    def keys(self, new: Tensor, old: Tensor, size: int, tau_tokens: Tensor, name: str, axis: Axis = ALONE) -> Tensor:
        """New keys [size, d], of a growth that `has_weights`.

        Args:
            new: the parameter that gets them.
            old: keys [n, d] of `sources`; on a tensor rank its share of them, and for rotated or repeated keys `size`
                is its share too.
            tau_tokens: of the layer before the growth.
            name: of the generator.
            axis: the tensor ranks.
        """
        if self.is_repeated:
            return old.repeat(size // len(old), 1)
        if self.new_keys == "official":
            return initial_value(name, new, self.after, self.seed)
        if self.new_keys == "random":
            return random_keys(old, size, name, self.seed, axis)
        count = len(old) if self.has_own_norm else int(tau_tokens.view(-1)[-1]) / axis.size
        return rotated_keys(old, size, size / count, name, self.seed)

    def values(self, name: str, new: Tensor) -> Tensor:
        """The whole values that the parameter `new` of this name starts with."""
        is_zero = self.has_weights and self.is_exact
        return torch.zeros(new.shape) if is_zero else initial_value(name, new, self.after, self.seed)

    def tau_tokens(self, before: Tensor, size: int) -> Tensor:
        """tau^2 of a layer after `size` tokens more, those of all ranks."""
        if not self.has_weights:
            return before
        counts = [*before.view(-1).tolist(), *([0] if self.has_own_norm else [])]
        counts[-1] += size
        return torch.tensor(counts if len(counts) > 1 else counts[0]).to(before)


def rotated_keys(old: Tensor, size: int, ratio: float, name: str, seed: int) -> Tensor:
    """Keys [size, d] whose scores have, for every input, `ratio` times the sum of squares of those of `old` [n, d].

    Args:
        size: at least min(n, d).
        name, seed: of the generator that the rotation is drawn from.
    """
    triangle = torch.linalg.qr(old.cpu().double(), mode="r").R  # [min(n, d), d]
    random = torch.empty(size, len(triangle), dtype=torch.float64)
    random.normal_(generator=parameter_generator(seed, name))
    return (math.sqrt(ratio) * torch.linalg.qr(random).Q @ triangle).to(old)


def random_keys(old: Tensor, size: int, name: str, seed: int, axis: Axis = ALONE) -> Tensor:
    """Keys [size, d] in all directions, fp32 on the CPU: normal, and of the same root mean square as `old` [n, d].

    Args:
        name, seed: of the generator.
        axis: the ranks that share `old`; each gets the same keys.
    """
    squares = torch.linalg.vector_norm(old, dtype=torch.float64).square()
    squares, count = sum_over_ranks(torch.stack([squares, squares.new_tensor(old.numel())]), axis).tolist()
    new = torch.empty(size, old.shape[1]).normal_(generator=parameter_generator(seed, name))
    # Drawn numbers miss the standard deviation by chance: a few keys by per cents.
    return new.mul_(
        math.sqrt(squares / count * new.numel()) / torch.linalg.vector_norm(new, dtype=torch.float64).item()
    )
