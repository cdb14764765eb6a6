"""Log-probabilities of given texts under a model."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from megatron.model import LanguageModel
from megatron.model.forward_only import overflow
from megatron.ops.cross_entropy import token_losses

# Positions that are taken through the head at a time: 1024 x 50304 x 4 bytes = 206 MB of logits.
HEAD_ROWS = 1024


class Window(NamedTuple):
    """Token ids of which the last `scored` are predicted; at least one token stands before them."""

    ids: list[int]
    scored: int

    @property
    def num_inputs(self) -> int:
        """Tokens the model reads: all but the last."""
        return len(self.ids) - 1


class Score(NamedTuple):
    """What a model thinks of a window."""

    log_likelihood: float
    """Sum of the log-probabilities of the scored tokens, in nats."""
    greedy: bool
    """Whether each scored token is the most probable one at its place."""


def score_windows(model: LanguageModel, windows: list[Window]) -> list[Score]:
    """The score of every window, computed as one batch; the caller sees to evaluation mode.

    Padding goes to the right, where causal attention never sees it. Logits are computed where they are needed only.
    The softmax runs over all rows of the vocabulary, the padded ones included, as in training, in fp32 at least.

    Raises: UserError where a log-probability is not finite.
    """
    assert all(0 < window.scored < len(window.ids) for window in windows), "each has a context and something to score"
    device = next(model.parameters()).device
    longest = max(window.num_inputs for window in windows)
    rows = [window.ids[:-1] + [0] * (longest - window.num_inputs) for window in windows]
    positions = [i * longest + j for i, w in enumerate(windows) for j in range(w.num_inputs - w.scored, w.num_inputs)]
    targets = [token for window in windows for token in window.ids[len(window.ids) - window.scored :]]
    hidden = model.hidden(torch.tensor(rows, device=device)).flatten(0, 1)[torch.tensor(positions, device=device)]
    losses, greedy = _through_head(model, hidden, torch.tensor(targets, device=device))
    counts = [window.scored for window in windows]
    return [
        Score(-part.sum().item(), bool(hits.all()))
        for part, hits in zip(losses.split(counts), greedy.split(counts), strict=True)
    ]


def _through_head(model: LanguageModel, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses fp64 [n] and whether the target has the largest logit, bool [n], on the CPU; hidden is [n, d]."""
    losses, greedy = [], []
    for part, labels in zip(hidden.split(HEAD_ROWS), targets.split(HEAD_ROWS), strict=True):
        logits = model.logits(part)
        losses.append(token_losses(logits, labels).double())
        if not losses[-1].isfinite().all():
            raise overflow(logits.dtype)
        greedy.append(logits.argmax(dim=-1) == labels)
    return torch.cat(losses).cpu(), torch.cat(greedy).cpu()
