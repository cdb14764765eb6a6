"""A model that is used and not trained: what evaluation and generation have in common."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from megatron.errors import RankError, UserError


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards the model is in the mode it was in before."""
    was_training = model.training
    model.eval()
    try:
        # Not inference_mode: rotary tables made in it could not be used in training afterwards.
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def overflow(dtype: torch.dtype) -> UserError:
    """The error that says that a model's logits in `dtype` are not finite."""
    name = str(dtype).removeprefix("torch.")
    return RankError(
        f"precision: the model's logits are not finite in {name}: its weights are too large for it or of no use; "
        "choose bf16 or fp32, or another checkpoint"
    )
