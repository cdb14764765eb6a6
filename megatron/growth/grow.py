"""Adding parameter tokens: in a model in memory, and in the tensors of a checkpoint.

Recipes that change nothing, m tokens more:

| new_keys | activation | new keys | new values | tau_tokens | first gradient |
|---|---|---|---|---|---|
| zero | both GELUs | 0: no score, no weight, no share of the row norm | initialised | stays | keys |
| rotated | l2_norm_gelu | c Q R, where the old keys are U R (QR), Q^T Q = 1, c^2 = m / tau_tokens | 0 | + m | both |
| zero | softmax, where zero keys count in the denominator | the old ones, repeated | 0 | + m | values |

Q is random. The squared scores of rotated keys K' sum to c^2 times those of the old ones for every input, because
K'^T K' = c^2 K^T K. Each squared row norm becomes 1 + c^2 times what it was, and so does tau_tokens: the old weights
tau A / ||A|| stay, and the new ones are random features of the input from the start. That takes at least as many new
keys as the old ones have dimensions, min(n, d). Their first gradient comes through the norm.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.tensors import Tensors, TensorView
from megatron.config.sections.model import ModelSection
from megatron.config.sections.scaling import NewKeys
from megatron.errors import UserError
from megatron.exchange import Checkpoint
from megatron.growth.plan import KINDS, TokenCounts, describe, grown_config, segments_of
from megatron.model.build import build_model
from megatron.model.init import initial_value, parameter_generator
from megatron.model.layered import LayeredModel
from megatron.model.pattention import Pattention, named_pattentions
from megatron.mpu.roles import role_of


class GrownTensors(TensorView):
    """The tensors of a checkpoint after one growth: the old ones as they are, and those of the new tokens.

    Optimizer state is that of the old tokens; new ones start without.

    Args:
        source: tensors before.
        after: the model after (`grown_config`).
        seed: of the new values or rotations, each from a generator of its own (megatron.model.init).
        new_keys: what the new keys start as.
    """

    def __init__(self, source: Tensors, after: ModelSection, seed: int, new_keys: NewKeys = "zero") -> None:
        super().__init__(source)
        self.after, self.seed = after, seed
        self._is_softmax = after.norm_activation_type == "softmax"
        self._has_scores = self._is_softmax or new_keys == "rotated"
        self._new, added = _new_parameters(after)
        self._taus = added if self._has_scores else {}

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""
        return [*self.source.names(kind), *(self._new if kind == "model" else ())]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._new[name].shape) if kind == "model" and name in self._new else self.source.shape(kind, name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor, on the CPU."""
        if kind != "model" or name not in self._new:
            found = self.source.tensor(kind, name)
            return found + self._taus[name] if kind == "model" and name in self._taus else found
        new = self._new[name]
        shape, role = new.shape, role_of(new)
        if role.what != "key_tokens":
            return torch.zeros(shape) if self._has_scores else initial_value(name, new, self.after, self.seed)
        if not self._has_scores:
            return torch.zeros(shape)
        keys = self._old_keys(name, role.segment)
        if self._is_softmax:
            return keys.repeat(shape[0] // len(keys), 1)
        tau_tokens = self.source.tensor("model", f"{name.rpartition('.')[0]}.tau_tokens")
        return rotated_keys(keys, shape[0], shape[0] / tau_tokens.item(), name, self.seed)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor; of one that was there, it is read alone."""
        if kind == "model" and (name in self._new or name in self._taus):
            return self.tensor(kind, name)[ranges]
        return self.source.part(kind, name, *ranges)

    def _old_keys(self, name: str, segment: int) -> Tensor:
        prefix = name.rpartition("_")[0]
        parts = [f"{prefix}_{i}" for i in range(segment)]
        known = set(self.source.names("model"))
        return torch.cat([self.source.tensor("model", part).float() for part in parts if part in known])


def grown_checkpoint(checkpoint: Checkpoint, after: ModelSection, seed: int, new_keys: NewKeys = "zero") -> Checkpoint:
    """The checkpoint after one growth, made as it is read: nothing is written. Arguments are those of GrownTensors."""
    return replace(checkpoint, model_config=after, tensors=GrownTensors(checkpoint.tensors, after, seed, new_keys))


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


def _new_parameters(after: ModelSection) -> tuple[dict[str, Tensor], dict[str, int]]:
    """What the last growth of a model added: parameters, without storage, and tokens by the name of tau_tokens."""
    model = build_model(after, device="meta")
    growth = len(segments_of(after, "qkv")[0]) - 1
    new: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if role_of(p).segment == growth}
    return new, {f"{name}.tau_tokens": layer.segment_sizes[growth] for name, layer in named_pattentions(model)}


@torch.no_grad()
def grow(
    model: LayeredModel,
    qkv: int | None = None,
    proj: int | None = None,
    ffn: int | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    new_keys: NewKeys = "zero",
    seed: int = 1234,
) -> None:
    """Add parameter tokens to a model, in place, without changing its logits (beyond rounding).

    Args:
        model: on any device and layout.
        qkv, proj, ffn: tokens afterwards of each query, key and value, of proj and of the feed-forward; default: as
            many as there are.
        layers: blocks that grow; default all TokenFormer blocks.
        new_keys: what the new keys start as.
        seed: of the new values or rotations.

    Raises: UserError for fewer tokens than there are, or a count that softmax or rotated keys cannot grow to; the
        model is unchanged.
    """
    after = grown_config(model.config, TokenCounts(qkv, proj, ffn, layers, new_keys))
    new, _ = _new_parameters(after)
    layers_by_name = dict(named_pattentions(model))
    value_names = {name: f"{name}.value_tokens_{len(module.segment_sizes)}" for name, module in layers_by_name.items()}
    sizes = {name: len(new[value]) if value in new else 0 for name, value in value_names.items()}
    has_scores = after.norm_activation_type == "softmax" or new_keys == "rotated"
    if has_scores:
        _check_shares(layers_by_name, sizes)
    for name, module in layers_by_name.items():
        size, value_name = sizes[name], value_names[name]
        if size and has_scores:
            _append_with_scores(module, size, value_name, seed)
        else:
            module.append(size, initial_value(value_name, new[value_name], after, seed) if size else None)
    model.config = after


def _check_shares(layers: dict[str, Pattention], sizes: dict[str, int]) -> None:
    """Can each rank make its new keys from its old ones alone?"""
    for name, module in layers.items():
        ranks, size = module.axis.size, sizes[name]
        is_uneven = any(count % ranks for count in (*module.segment_sizes, size))
        is_small = 0 < size // ranks < min(module.num_tokens // ranks, module.in_features)
        if ranks > 1 and (is_uneven or (is_small and module.activation != "softmax")):
            raise UserError(
                f"{name}: {module.num_tokens} tokens shared unevenly by {ranks} ranks cannot "
                "be repeated or rotated in place; grow the checkpoint instead"
            )


def _append_with_scores(module: Pattention, size: int, name: str, seed: int) -> None:
    # Each rank repeats or rotates its own keys: tokens have no order, and sums of squares are sums over the ranks.
    keys, ratio = module.key_param_tokens.clone(), size / module.tau_tokens.item()
    module.append(size, torch.zeros(size, module.out_features))
    new = module.get_parameter(f"key_tokens_{len(module.segment_sizes) - 1}")
    if module.activation == "softmax":
        new.copy_(keys.repeat(len(new) // len(keys), 1))
    else:
        new.copy_(rotated_keys(keys, len(new), ratio, f"{name}/{module.axis.rank}", seed))
    module.tau_tokens += size


def lineage_entry(
    before: Checkpoint, after: Checkpoint, train_state: Mapping[str, Any], new_keys: NewKeys, *, scheduled: bool
) -> dict[str, Any]:
    """What TrainState.lineage says about a growth.

    Args:
        before, after: what grew, and what it became.
        train_state: progress at the growth, as TrainState.state_dict gives it.
        new_keys: what the new keys started as.
        scheduled: it is one of the run's own schedule.
    """
    iteration, model = train_state.get("iteration", 0), after.model_config
    return {
        "scheduled": scheduled,
        "iteration": iteration,
        "updates": iteration - train_state.get("skipped_iterations", 0),
        "consumed_tokens": train_state.get("consumed_tokens", 0),
        "added": describe(before.model_config, model),
        "new_keys": new_keys,
        "parameters": after.num_parameters,
        **{f"{kind}_slot_num": getattr(model, f"{kind}_slot_num") for kind in KINDS},
    }
