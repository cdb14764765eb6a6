"""What became of the new tokens of a growth."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from megatron.model import LanguageModel
from megatron.model.pattention import Pattention, named_pattentions
from megatron.ops.pattention import theta

IN_USE = 0.1
"""A new token is in use when it adds at least this part of what the median old token of its layer does."""


@torch.no_grad()
def of_new_tokens(model: LanguageModel, before: LanguageModel, ids: Tensor) -> dict[str, Any]:
    """By kind of layer: root mean square of the new keys over that of the old ones, and the part of new tokens in use.

    What a token adds to its layer's output is the mean of |weight| over all positions, times the norm of its value.

    Args:
        model: after the growth and its training.
        before: the model that grew; its tokens are the first of each layer, its widths are the same.
        ids: held-out sequences [b, s].
    """
    old = {name: layer.num_tokens for name, layer in named_pattentions(before)}
    squares: dict[str, list[Tensor]] = defaultdict(list)
    used: dict[str, list[Tensor]] = defaultdict(list)
    for name, (layer, added) in _added(model, ids).items():
        kind, count = str(layer.projection), old[name]
        keys = layer.key_param_tokens.square().mean(1)
        squares[kind].append(torch.stack([keys[count:].mean(), keys[:count].mean()]))
        used[kind].append(added[count:] >= IN_USE * added[:count].median())
    ratios = {kind: torch.stack(parts).mean(0) for kind, parts in squares.items()}
    return {
        "new_keys_rms": {kind: math.sqrt(new / old) for kind, (new, old) in ratios.items()},
        "new_tokens_in_use": {kind: torch.cat(parts).float().mean().item() for kind, parts in used.items()},
    }


def _added(model: LanguageModel, ids: Tensor) -> dict[str, tuple[Pattention, Tensor]]:
    """By layer: what each of its tokens adds to its output, [n]."""
    found: dict[str, tuple[Pattention, Tensor]] = {}
    hooks = []
    for name, layer in named_pattentions(model):

        def look(layer: Any, inputs: tuple[Tensor, ...], name: str = name) -> None:
            found[name] = layer, _contributions(layer, inputs[0])

        hooks.append(layer.register_forward_pre_hook(look))
    model.eval()(ids)
    for hook in hooks:
        hook.remove()
    return found


def _contributions(layer: Pattention, x: Tensor) -> Tensor:
    tokens = layer.read_parameters()
    scores = (x @ tokens.key.T).split(tokens.norm_columns or [len(tokens.key)], -1)
    counts = tokens.tau_tokens.view(-1).unbind()
    parts = [theta(part, count, layer.activation) for part, count in zip(scores, counts, strict=True)]
    return torch.cat(parts, -1).abs().flatten(0, -2).mean(0) * tokens.value.norm(dim=1)
