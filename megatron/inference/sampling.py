"""From logits to the next token: repetition penalty, temperature, top-k, top-p, min-p, in this order."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the texts of one prompt are chosen. Raises ValueError for a value outside its range."""

    maximum_tokens: int = 64
    """Most tokens generated."""
    temperature: float = 0.0
    """Logits are divided by it; 0 takes the most probable token, whatever the filters below say."""
    top_k: int = 0
    """See filter_top_k; 0 is off."""
    top_p: float = 0.0
    """See filter_top_p; 0 and 1 are off."""
    min_p: float = 0.0
    """See filter_min_p; 0 is off."""
    repetition_penalty: float = 1.0
    """See penalize_repetition; 1 is off. It changes greedy texts too."""
    stop: tuple[str, ...] = ()
    """Strings that end a text."""
    num_samples: int = 1
    """Texts of this prompt."""
    seed: int | None = None
    """Seed of this prompt; None: the run's, with the place of the text among all texts of the run."""

    def __post_init__(self) -> None:
        if min(self.maximum_tokens, self.num_samples) < 1:
            raise ValueError("maximum_tokens, num_samples: must be at least 1")
        if min(self.temperature, self.top_k) < 0:
            raise ValueError("temperature, top_k: must not be negative")
        if not (0 <= self.top_p <= 1 and 0 <= self.min_p <= 1):
            raise ValueError("top_p, min_p: must be between 0 and 1")
        if not self.repetition_penalty > 0:
            raise ValueError("repetition_penalty: must be above 0")
        if "" in self.stop:
            raise ValueError("stop: an empty string would end every text")


def penalize_repetition(logits: Tensor, seen: Sequence[Sequence[int]], penalties: Sequence[float]) -> Tensor:
    """Logits [b, V] with those of tokens that row i has `seen` made less likely by penalties[i].

    A positive logit is divided by the penalty and a negative one multiplied by it (CTRL, Keskar et al. 2019,
    section 4.1), once for each token, however often it occurs.
    """
    if all(penalty == 1 for penalty in penalties):
        return logits
    logits = logits.clone()
    for row, ids, penalty in zip(logits, seen, penalties, strict=True):
        index = torch.tensor(sorted(set(ids)), device=logits.device)
        scores = row[index]
        row[index] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits


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


def filter_min_p(logits: Tensor, min_p: float) -> Tensor:
    """Logits [.., V] with -inf where a token is less probable than `min_p` times the most probable one; 0 is off."""
    if min_p <= 0:
        return logits
    return logits.masked_fill(logits < logits.amax(dim=-1, keepdim=True) + math.log(min_p), -torch.inf)


def sample(
    logits: Tensor,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 0.0,
    min_p: float = 0.0,
    generators: Sequence[torch.Generator | None] | None = None,
) -> Tensor:
    """One token id for each row.

    Args:
        logits: [b, V], of real tokens only, in fp32 or fp64.
        temperature, top_k, top_p, min_p: see Sampling; a filter sees the probabilities that the one before it leaves.
        generators: one CPU generator a row, so that a row's draws do not depend on its neighbours in the batch.

    Returns: int64 [b], on the logits' device. Raises ValueError for a missing generator.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    if generators is None or len(generators) != len(logits):
        raise ValueError(f"generators: sampling needs one for each of the {len(logits)} rows")
    # The largest logit becomes 0, so that a tiny temperature gives no inf - inf.
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    logits = filter_min_p(filter_top_p(filter_top_k(scaled, top_k), top_p), min_p)
    rows = logits.softmax(dim=-1).cpu()
    drawn = [torch.multinomial(row, 1, generator=g) for row, g in zip(rows, generators, strict=True)]
    return torch.cat(drawn).to(logits.device)


def sample_rows(
    logits: Tensor,
    settings: Sequence[Sampling],
    seen: Sequence[Sequence[int]],
    generators: Sequence[torch.Generator | None],
) -> Tensor:
    """One token id for each row of logits [b, V], chosen by the row's own settings.

    Args:
        seen: tokens of the prompt and of the text so far, for the repetition penalty.
        generators: one a row; None for a greedy one.

    Returns: int64 [b], on the logits' device.
    """
    logits = penalize_repetition(logits, seen, [setting.repetition_penalty for setting in settings])
    groups: dict[tuple[float, int, float, float], list[int]] = {}
    for i, s in enumerate(settings):
        groups.setdefault((s.temperature, s.top_k, s.top_p, s.min_p), []).append(i)
    tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
    for (temperature, top_k, top_p, min_p), rows in groups.items():
        chosen = sample(logits[rows], temperature, top_k, top_p, min_p, [generators[i] for i in rows])
        tokens[torch.tensor(rows, device=logits.device)] = chosen
    return tokens
