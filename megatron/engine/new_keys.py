"""The keys of the latest growth: how large they are beside the older ones, and the weight decay that waits for it."""

from __future__ import annotations

import typing
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron.config.sections.scaling import Part
from megatron.engine.settings import EngineSettings
from megatron.engine.state import EngineState
from megatron.mpu.device import process_device
from megatron.mpu.roles import BlockProjection, Role, role_of

_KINDS: tuple[BlockProjection, ...] = typing.get_args(BlockProjection)


def part_of(role: Role, newest: int) -> Part:
    """The part of the parameters that a role and the number of growths so far make one of."""
    if role.what not in ("key_tokens", "value_tokens") or role.projection == "connector":
        return "other"
    if newest and role.segment == newest:
        return "new_keys" if role.what == "key_tokens" else "new_values"
    return "old_keys" if role.what == "key_tokens" else "old_values"


class NewKeys:
    """Weight decay that new keys are spared until they are as large as the old ones, by kind of layer.

    Args:
        state: access to the fp32 values.
        groups: the optimizer's parameter groups, as `parameter_groups` made them.
    """

    def __init__(self, state: EngineState, groups: Sequence[dict[str, Any]], settings: EngineSettings) -> None:
        self._state, self._groups = state, groups
        self.wait = settings.scaling.new_keys_decay == "at_old_rms"
        roles = {name: role_of(parameter) for name, parameter in state.model.named_parameters()}
        self._parts = {name: (role.projection, part_of(role, settings.growths)) for name, role in roles.items()}

    def decay(self, kinds: Collection[str]) -> None:
        """Let the new keys of these kinds of layers decay from now on."""
        for group in self._groups:
            if group.get("waits") in kinds:
                group["weight_decay"] = group["decay"]

    @torch.no_grad()
    def root_mean_squares(self) -> Mapping[BlockProjection, tuple[float, float]]:
        """By kind of layer, of all new and of all old keys; kinds that have not grown are left out. Collective.

        Waits for the device.
        """
        sums = torch.zeros(len(_KINDS), 2, 2, dtype=torch.float64, device=process_device())
        for piece in self._state.pieces(with_optimizer=False):  # those of all processes are every value once
            kind, part = self._parts.get(piece.name, ("", "")) if piece.kind == "model" else ("", "")
            if kind and part in ("new_keys", "old_keys"):
                sums[_KINDS.index(kind), int(part == "old_keys")] += _squares(piece.tensor, sums)
        if self._state.layout.world_size > 1:
            dist.all_reduce(sums)
        found = zip(_KINDS, sums.tolist(), strict=True)
        return {
            kind: ((new[0] / new[1]) ** 0.5, (old[0] / old[1]) ** 0.5)
            for kind, (new, old) in found
            if new[1] and old[1]
        }


def _squares(values: Tensor, like: Tensor) -> Tensor:
    """[sum of squares, number of values]."""
    norm = torch.linalg.vector_norm(values, dtype=like.dtype).to(like.device)
    return torch.stack([norm.square(), torch.full_like(norm, values.numel())])
