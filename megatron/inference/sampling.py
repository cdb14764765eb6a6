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


_GREEDY = (0.0, 0, 0.0, 0.0)


def penalize_repetition(logits: Tensor, seen: Tensor, penalties: Tensor) -> Tensor:
    """Logits [b, V] with those of tokens that a row has `seen`, bool [b, V], made less likely by its penalty, [b, 1].

    A positive logit is divided by the penalty and a negative one multiplied by it (CTRL, Keskar et al. 2019,
    section 4.1), once for each token, however often it occurs.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalties, logits / penalties), logits)


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
    probability = logits.softmax(dim=-1)
    # What torch.multinomial does with a generator, in two steps, so that the probabilities need not come to the host.
    return (probability / _noise(probability, generators)).argmax(dim=-1)


def _noise(like: Tensor, generators: Sequence[torch.Generator | None]) -> Tensor:
    """Exponential draws of the shape [b, V] and on the device of `like`, each row from its own generator."""
    pinned = like.device.type == "cuda"
    noise = torch.empty(like.shape, dtype=like.dtype, pin_memory=pinned)
    for row, generator in zip(noise, generators, strict=True):
        row.exponential_(generator=generator)
    return noise.to(like.device, non_blocking=True)


class Chooser:
    """Chooses the next token of every row of a batch, each by its own settings, without waiting for the device.

    Args:
        settings: one a row.
        seen: tokens of each row so far, for the repetition penalty; it goes on with the chosen ones.
        generators: one a row; None for a greedy one.
        vocabulary: tokens to choose from; later columns of the logits are those of no token.
        device: where the logits are.
    """

    def __init__(
        self,
        settings: Sequence[Sampling],
        seen: Sequence[Sequence[int]],
        generators: Sequence[torch.Generator | None],
        vocabulary: int,
        device: torch.device,
    ) -> None:
        self._settings, self._generators = list(settings), list(generators)
        self._vocabulary, self._device = vocabulary, device
        self._seen: Tensor | None = None
        if any(setting.repetition_penalty != 1 for setting in settings):
            self._seen = torch.zeros(len(settings), vocabulary, dtype=torch.bool, device=device)
            for row, ids in zip(self._seen, seen, strict=True):
                row[torch.tensor(ids, dtype=torch.int64, device=device)] = True
        self._group()

    def _group(self) -> None:
        """Put what the rows have in common on the device, once for all tokens."""
        penalties = [setting.repetition_penalty for setting in self._settings]
        self._penalties = torch.tensor(penalties, device=self._device)[:, None]
        groups: dict[tuple[float, int, float, float], list[int]] = {}
        for i, s in enumerate(self._settings):
            groups.setdefault((s.temperature, s.top_k, s.top_p, s.min_p) if s.temperature else _GREEDY, []).append(i)
        self._groups = [(key, rows, torch.tensor(rows, device=self._device)) for key, rows in groups.items()]

    def select(self, rows: Sequence[int]) -> None:
        """Go on with these rows only."""
        self._settings = [self._settings[i] for i in rows]
        self._generators = [self._generators[i] for i in rows]
        if self._seen is not None:
            self._seen = self._seen[torch.tensor(rows, device=self._device)]
        self._group()

    def __call__(self, logits: Tensor) -> Tensor:
        """The next tokens, int64 [b] on the device, from logits [b, V_pad] in fp32 or fp64."""
        logits = logits[:, : self._vocabulary]
        if self._seen is not None:
            logits = penalize_repetition(logits, self._seen, self._penalties.to(logits.dtype))
        tokens = self._chosen(logits)
        if self._seen is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens

    def _chosen(self, logits: Tensor) -> Tensor:
        if len(self._groups) == 1:
            return sample(logits, *self._groups[0][0], self._generators)
        tokens = torch.empty(len(logits), dtype=torch.int64, device=logits.device)
        for key, rows, index in self._groups:
            tokens[index] = sample(logits[index], *key, [self._generators[i] for i in rows])
        return tokens
