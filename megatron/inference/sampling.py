"""From logits to the next token: temperature, top-k, top-p, in this order."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def filter_top_k(logits: Tensor, top_k: int) -> Tensor:
    """Logits [.., V] with -inf outside the `top_k` largest; ties with the k-th stay. 0 is off."""
    if top_k <= 0 or top_k >= logits.shape[-1]:
        return logits
    smallest_kept = logits.topk(top_k, dim=-1).values[..., -1:]
    return logits.masked_fill(logits < smallest_kept, -torch.inf)


def filter_top_p(logits: Tensor, top_p: float) -> Tensor:
    """Logits [.., V] with -inf outside the nucleus; 0 and 1 are off.

    The nucleus is the smallest set of most probable tokens whose total probability reaches `top_p`: the token that
    crosses the threshold is in it, so it is never empty. Equal logits are ranked by token id.
    """
    if not 0.0 < top_p < 1.0:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True, stable=True)
    probability = ordered.softmax(dim=-1)
    before = probability.cumsum(dim=-1) - probability
    outside = (before >= top_p).scatter(-1, index, before >= top_p)
    # The most probable token stays, however rounding fell.
    outside.scatter_(-1, index[..., :1], False)
    return logits.masked_fill(outside, -torch.inf)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    generators: Sequence[torch.Generator] | None = None,
) -> Tensor:
    """One token id for each row.

    Args:
        logits: [b, V], of real tokens only, in fp32 or fp64.
        temperature: logits are divided by it; 0 takes the most probable token, whatever top_k and top_p say.
        top_k: see filter_top_k.
        top_p: see filter_top_p; applied to the probabilities that top_k leaves.
        generators: one CPU generator a row, so that a row's draws do not depend on its neighbours in the batch.

    Returns: int64 [b], on the logits' device. Raises ValueError for a missing generator.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if generators is None or len(generators) != len(logits):
        raise ValueError(f"generators: sampling needs one for each of the {len(logits)} rows")
    # The largest logit becomes 0, so that a tiny temperature gives no inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    logits = filter_top_p(filter_top_k(scaled, top_k), top_p)
    rows = logits.softmax(dim=-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(rows, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)
