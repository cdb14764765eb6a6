"""Adding parameter tokens: in a model in memory, and in the tensors of a checkpoint. How: megatron.growth.recipes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from megatron.checkpoint.state import EMA
from megatron.checkpoint.tensors import Tensors, TensorView
from megatron.config.sections.model import ModelSection, RowNorm
from megatron.config.sections.scaling import NewKeys, NewMoments, Tower
from megatron.errors import UserError
from megatron.exchange import Checkpoint
from megatron.growth.moments import MeanMoments
from megatron.growth.plan import KINDS, TokenCounts, describe, grown_config, segments_of
from megatron.growth.recipes import Recipe
from megatron.model.build import build_model
from megatron.model.layered import LayeredModel
from megatron.model.pattention import Pattention, named_pattentions
from megatron.mpu.roles import role_of


class GrownTensors(TensorView):
    """The tensors of a checkpoint after one growth: the old ones as they are, and those of the new tokens.

    An average of the weights (EMA) grows as a model of its own, whose new keys are made of its own old ones. Optimizer
    state is that of the old tokens; new ones start without.

    Args:
        source: tensors before.
        recipe: of the growth.
    """

    def __init__(self, source: Tensors, recipe: Recipe) -> None:
        super().__init__(source)
        self._recipe = recipe
        self._new, added = _new_parameters(recipe.after)
        self._taus = {name: count for name, count in added.items() if count and recipe.has_weights}
        self._grows = ("model", EMA) if source.names(EMA) else ("model",)

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""
        return [*self.source.names(kind), *(self._new if kind in self._grows else ())]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        if kind == "model" and name in self._taus:
            return tuple(self.tensor(kind, name).shape)
        return tuple(self._new[name].shape) if self._is_new(kind, name) else self.source.shape(kind, name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor, on the CPU."""
        if kind == "model" and name in self._taus:
            return self._recipe.tau_tokens(self.source.tensor(kind, name), self._taus[name])
        if not self._is_new(kind, name):
            return self.source.tensor(kind, name)
        new = self._new[name]
        if role_of(new).what != "key_tokens":
            return self._recipe.values(name, new)
        return self._new_keys(kind, name, new) if self._recipe.has_weights else torch.zeros(new.shape)

    def part(self, kind: str, name: str, *ranges: slice) -> Tensor:
        """A range of the first dimensions of a tensor; of one that was there, it is read alone."""
        if self._is_new(kind, name) or (kind == "model" and name in self._taus):
            return self.tensor(kind, name)[ranges]
        return self.source.part(kind, name, *ranges)

    def _is_new(self, kind: str, name: str) -> bool:
        return kind in self._grows and name in self._new

    def _new_keys(self, kind: str, name: str, new: Tensor) -> Tensor:
        prefix, known = name.rpartition("_")[0], set(self.source.names("model"))
        segments = [f"{prefix}_{i}" for i in range(role_of(new).segment)]
        sizes = [self.source.shape("model", segment)[0] if segment in known else 0 for segment in segments]
        old = torch.cat([self.source.tensor(kind, segments[i]).float() for i in self._recipe.sources(sizes)])
        tau_tokens = self.source.tensor("model", f"{name.rpartition('.')[0]}.tau_tokens")
        return self._recipe.keys(new, old, len(new), tau_tokens, name)


def grown_checkpoint(
    checkpoint: Checkpoint, after: ModelSection, seed: int, new_keys: NewKeys, new_moments: NewMoments = "zero"
) -> Checkpoint:
    """The checkpoint after one growth, made as it is read: nothing is written.

    Args:
        checkpoint: before.
        after, new_keys, seed: those of Recipe.
        new_moments: the optimizer state of the new tokens.
    """
    tensors: Tensors = GrownTensors(checkpoint.tensors, Recipe(after, new_keys, seed))
    if new_moments == "mean":
        beta2 = float(checkpoint.resolved()["optimizer"]["params"]["betas"][1])
        tensors = MeanMoments(tensors, checkpoint.tensors, beta2)
    return replace(checkpoint, model_config=after, tensors=tensors)


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
    new_keys: NewKeys | None = None,
    row_norm: RowNorm = "joint",
    tower: Tower | None = None,
    seed: int = 1234,
) -> None:
    """Add parameter tokens to a model, in place, without changing its logits (beyond rounding, but for `official`).

    Args:
        model: on any device and layout.
        qkv, proj, ffn: tokens afterwards of each query, key and value, of proj and of the feed-forward; default: as
            many as there are.
        layers: blocks that grow; default all TokenFormer blocks.
        new_keys: what the new keys start as; default zero, or with row_norm segment random.
        row_norm: whether the new tokens share the row norm of those before them, or have their own (segment).
        tower: which network of a model with an image tower and a text tower; default both.
        seed: of what is drawn.

    Raises: UserError for fewer tokens than there are, or a count or kind of keys that cannot leave the logits as they
        are; the model is unchanged.
    """
    counts = TokenCounts(qkv, proj, ffn, layers, new_keys, row_norm, tower)
    after = grown_config(model.config, counts)
    recipe, (new, added) = Recipe(after, counts.keys, seed), _new_parameters(after)
    layers_by_name = dict(named_pattentions(model))
    sizes = {name: added[f"{name}.tau_tokens"] for name in layers_by_name}
    for name, module in layers_by_name.items():
        _check_shares(name, module, sizes[name], recipe)
    for name, module in layers_by_name.items():
        _append(name, module, sizes[name], recipe, new)
    model.config = after


def _check_shares(name: str, module: Pattention, size: int, recipe: Recipe) -> None:
    """Can each rank make its new keys from its old ones alone?"""
    ranks = module.axis.size
    if ranks == 1 or not size or not recipe.has_weights:
        return
    if recipe.is_drawn:
        if recipe.has_own_norm and size < ranks:
            raise UserError(f"{name}: {size} new tokens with a row norm of their own for {ranks} ranks; each needs one")
        return
    old = [module.segment_sizes[i] for i in recipe.sources(module.segment_sizes)]
    is_uneven = any(count % ranks for count in (*old, size))
    is_small = size // ranks < min(sum(old) // ranks, module.in_features)
    if is_uneven or (is_small and not recipe.is_repeated):
        raise UserError(
            f"{name}: {sum(old)} tokens shared unevenly by {ranks} ranks cannot "
            "be repeated or rotated in place; grow the checkpoint instead"
        )


def _append(layer: str, module: Pattention, size: int, recipe: Recipe, new: Mapping[str, Tensor]) -> None:
    row_norm: RowNorm = "segment" if recipe.has_own_norm else "joint"
    if not size:
        module.append(0, row_norm=row_norm)
        return
    key, value = (f"{layer}.{kind}_tokens_{len(module.segment_sizes)}" for kind in ("key", "value"))
    values, keys = recipe.values(value, new[value]), None
    tau_tokens = recipe.tau_tokens(module.tau_tokens, size)
    old = torch.cat([getattr(module, f"key_tokens_{i}") for i in recipe.sources(module.segment_sizes)])
    if recipe.is_drawn:
        keys = recipe.keys(new[key], old, size, module.tau_tokens, key, module.axis)
    module.append(size, values, keys, row_norm)
    if recipe.has_weights and keys is None:
        # Each rank repeats or rotates its own keys: tokens have no order, and sums of squares are sums over the ranks.
        own = module.get_parameter(key.rpartition(".")[2])
        own.copy_(recipe.keys(own, old, len(own), module.tau_tokens, f"{key}/{module.axis.rank}", module.axis))
    module.tau_tokens = tau_tokens


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
        **({"row_norm": "segment"} if model.segment_norms and model.segment_norms[-1] == "segment" else {}),
        "parameters": after.num_parameters,
        **{
            tower.spelled(f"{kind}_slot_num"): getattr(tower, f"{kind}_slot_num")
            for tower in model.towers().values()
            for kind in KINDS
        },
    }
