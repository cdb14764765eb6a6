"""A grown model as one that never grew: each layer's segments of tokens joined, in the order of their growths."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from megatron.checkpoint.tensors import Tensors, TensorView
from megatron.config.sections.model import ModelSection
from megatron.errors import UserError
from megatron.exchange.names import SEGMENT, in_model_order, projection_of

Config = TypeVar("Config", bound=ModelSection)


class JoinedTensors(TensorView):
    """A model's tensors as if no layer had grown: the segments of each are one, `key_tokens_0` and `value_tokens_0`."""

    def __init__(self, source: Tensors) -> None:
        super().__init__(source)
        self._segments: dict[str, list[str]] = {}
        for name in in_model_order(source.names("model")):
            match = SEGMENT.fullmatch(name)
            self._segments.setdefault(f"{match[1]}{match[2]}_tokens_0" if match else name, []).append(name)

    def names(self, kind: str) -> list[str]:
        """Names of the model's tensors, those that were joined last."""
        return sorted(self._segments, key=lambda name: len(self._segments[name]) > 1) if kind == "model" else []

    def shape(self, kind: str, name: str) -> tuple[int, ...]:
        """Shape of a tensor; segments are joined along the first dimension."""
        shapes = [self.source.shape(kind, part) for part in self._segments[name]]
        return (sum(shape[0] for shape in shapes), *shapes[0][1:]) if len(shapes) > 1 else shapes[0]

    def tensor(self, kind: str, name: str) -> Tensor:
        """A tensor; segments in the order of their growths."""
        parts = [self.source.tensor(kind, part) for part in self._segments[name]]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def token_counts(self) -> dict[str, int]:
        """How many tokens each layer has, by its name."""
        keys = [name for name in self._segments if name.endswith(".key_tokens_0")]
        return {name.removesuffix(".key_tokens_0"): self.shape("model", name)[0] for name in keys}


def joined_config(config: Config, tensors: JoinedTensors) -> Config:
    """The configuration of such a model; UserError where layers of a kind have different numbers of tokens."""
    counts: dict[str, set[int]] = {"qkv_slot_num": set(), "proj_slot_num": set(), "ffn_slot_num": set()}
    for layer, count in tensors.token_counts().items():
        counts[f"{projection_of(layer)}_slot_num"].add(count)
    for key, found in counts.items():
        if len(found) > 1:
            raise UserError(f"{key}: layers differ ({sorted(found)} tokens); a configuration has one number for all")
    return config.replaced(token_segments=None, **{key: found.pop() for key, found in counts.items() if found})
