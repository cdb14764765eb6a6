"""Adding parameter tokens: in a model in memory, and in the tensors of a checkpoint.

The recipe that changes nothing (GELU activations): new keys are zero, so that their scores, weights and share of the
row norm are zero; new values have their usual initialisation, so that keys get a gradient in the first step and values
in the second; tau_tokens keeps its value. A softmax counts zero keys in its denominator. There each old key is
repeated with a value of zero, a whole number of times, and tau_tokens grows with the tokens: exact too.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from megatron.config.schema import ModelConfig
from megatron.errors import UserError
from megatron.growth.plan import TokenCounts, grown_config
from megatron.model import LanguageModel
from megatron.model.init import initial_value
from megatron.model.pattention import Pattention


class TensorSource(Protocol):
    """Whole tensors by kind (`model`, `optimizer`) and canonical name: a CheckpointReader, or one that has grown."""

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor, on the CPU."""


class GrownTensors:
    """The tensors of a checkpoint after one growth: the old ones as they are, and those of the new tokens.

    Optimizer state is that of the old tokens; new ones start without.

    Args:
        source: tensors before.
        before, after: model before and after (`grown_config`).
        seed: of the new values, each from a generator of its own (megatron.model.init).
    """

    def __init__(self, source: TensorSource, before: ModelConfig, after: ModelConfig, seed: int) -> None:
        self.source, self.after, self.seed = source, after, seed
        self.is_softmax = after.norm_activation_type == "softmax"
        self._new = _new_parameters(before, after)
        self._taus = _new_taus(before, after) if self.is_softmax else {}

    def names(self, kind: str) -> list[str]:
        """Names of a kind."""
        return [*self.source.names(kind), *(self._new if kind == "model" else ())]

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor."""
        return tuple(self._new[name]) if kind == "model" and name in self._new else self.source.shape(kind, name)

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor, on the CPU."""
        if kind != "model" or name not in self._new:
            found = self.source.tensor(kind, name)
            return found + self._taus[name] if kind == "model" and name in self._taus else found
        shape = self._new[name]
        if "key_tokens_" in name:
            return self._repeated_keys(name, shape) if self.is_softmax else torch.zeros(shape)
        return torch.zeros(shape) if self.is_softmax else initial_value(name, shape, self.after, self.seed)

    def _repeated_keys(self, name: str, shape: torch.Size) -> Tensor:
        prefix, _, stage = name.rpartition("_")
        parts = [f"{prefix}_{i}" for i in range(int(stage))]
        known = set(self.source.names("model"))
        keys = torch.cat([self.source.tensor("model", part) for part in parts if part in known])
        return keys.repeat(shape[0] // len(keys), 1)


def _new_parameters(before: ModelConfig, after: ModelConfig) -> dict[str, torch.Size]:
    old = {name for name, _ in LanguageModel(before, device="meta").named_parameters()}
    return {n: p.shape for n, p in LanguageModel(after, device="meta").named_parameters() if n not in old}


def _new_taus(before: ModelConfig, after: ModelConfig) -> dict[str, int]:
    """Tokens added, by the name of the layer's tau_tokens."""
    counts = []
    for config in (before, after):
        modules = LanguageModel(config, device="meta").named_modules()
        counts.append({f"{name}.tau_tokens": m.num_tokens for name, m in modules if isinstance(m, Pattention)})
    return {name: counts[1][name] - counts[0][name] for name in counts[1]}


@torch.no_grad()
def grow(
    model: LanguageModel,
    qkv: int | None = None,
    proj: int | None = None,
    ffn: int | None = None,
    *,
    layers: tuple[int, ...] | None = None,
    seed: int = 1234,
) -> None:
    """Add parameter tokens to a model, in place, without changing its logits (beyond rounding).

    Args:
        model: on any device and layout.
        qkv, proj, ffn: tokens afterwards of each query, key and value, of proj and of the feed-forward; default: as
            many as there are.
        layers: blocks that grow; default all TokenFormer blocks.
        seed: of the new values.

    Raises: UserError for fewer tokens than there are, or a count that softmax cannot grow to; the model is unchanged.
    """
    before, after = model.config, grown_config(model.config, TokenCounts(qkv, proj, ffn, layers))
    new = _new_parameters(before, after)
    layers_by_name = {name: module for name, module in model.named_modules() if isinstance(module, Pattention)}
    if after.norm_activation_type == "softmax":
        _check_repeatable(layers_by_name)
    for name, module in layers_by_name.items():
        value_name = f"{name}.value_tokens_{len(module.segment_sizes)}"
        size = new[value_name][0] if value_name in new else 0
        if module.activation == "softmax" and size:
            _repeat(module, size)
        else:
            module.append(size, initial_value(value_name, new[value_name], after, seed) if size else None)
    model.config = after


def _check_repeatable(layers: dict[str, Pattention]) -> None:
    for name, module in layers.items():
        if any(size % module.layout.tensor_size for size in module.segment_sizes):
            raise UserError(
                f"{name}: {module.num_tokens} tokens shared unevenly by {module.layout.tensor_size} ranks cannot "
                "be repeated in place; grow the checkpoint instead"
            )


def _repeat(module: Pattention, size: int) -> None:
    # Each rank repeats its own keys: tokens have no order, so which rank holds which copy does not matter.
    keys, stage = module.key_param_tokens.clone(), len(module.segment_sizes)
    copies = size // module.num_tokens
    module.append(size, torch.zeros(size, module.out_features))
    module.get_parameter(f"key_tokens_{stage}").copy_(keys.repeat(copies, 1))
    module.tau_tokens += size
