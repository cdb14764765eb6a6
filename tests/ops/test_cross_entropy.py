"""The chunked cross entropy is torch's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megatron.ops import cross_entropy as module
from megatron.ops.cross_entropy import cross_entropy


@pytest.mark.parametrize("chunk", [3, 2048])
def test_loss_and_gradient_equal_torch(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", chunk)
    logits = torch.randn(2, 5, 11, dtype=torch.float64, requires_grad=True)
    labels, mask = torch.randint(0, 11, (2, 5)), torch.tensor([[1, 1, 0, 1, 0], [1, 0, 1, 1, 1]])
    cross_entropy(logits, labels, mask).backward()
    grad, logits.grad = logits.grad, None
    losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
    expected = (losses * mask.flatten()).sum() / mask.sum()
    expected.backward()
    assert torch.allclose(cross_entropy(logits, labels, mask), expected, rtol=0, atol=1e-12)
    assert grad is not None and logits.grad is not None
    assert torch.allclose(grad, logits.grad, rtol=0, atol=1e-12)


def test_logits_are_left_as_they_are() -> None:
    logits = torch.randn(4, 7, requires_grad=True)
    before = logits.detach().clone()
    cross_entropy(logits, torch.tensor([0, 1, 2, 3])).backward()
    assert torch.equal(logits, before)


def test_an_all_masked_batch_is_zero_not_nan() -> None:
    assert cross_entropy(torch.randn(1, 3, 5), torch.zeros(1, 3, dtype=torch.long), torch.zeros(1, 3)).item() == 0.0
