"""The key-value cache computes what the whole text would."""

from __future__ import annotations

import pytest
import torch

from megatron.inference.cache import KVCache
from megatron.model import LanguageModel

LENGTHS = [9, 4, 7, 1]


def ragged_batch(cache_padding: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Left-padded ids [b, s] and the rows without padding."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 500, (len(cache_padding), max(LENGTHS)), generator=generator)
    return ids, [row[padding:] for row, padding in zip(ids, cache_padding, strict=True)]


@torch.no_grad()
@pytest.mark.parametrize("parts", [[9], [1] * 9, [2, 3, 4], [5, 1, 3]])
@pytest.mark.parametrize("capacity", [1, 4, 64])
def test_continuation_of_any_length_gives_the_logits_of_the_whole_text(
    model: LanguageModel, parts: list[int], capacity: int
) -> None:
    padding = [max(LENGTHS) - length for length in LENGTHS]
    ids, rows = ragged_batch(padding)
    cache = KVCache(len(model.layers), torch.tensor(padding), capacity)
    logits = torch.cat([model(part, cache=cache.step(part.shape[1])) for part in ids.split(parts, dim=1)], dim=1)
    assert logits.isfinite().all()
    for row, unpadded, pad in zip(logits, rows, padding, strict=True):
        torch.testing.assert_close(row[pad:], model(unpadded[None])[0], rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_selected_rows_go_on_as_if_alone(model: LanguageModel) -> None:
    padding = [max(LENGTHS) - length for length in LENGTHS]
    ids, rows = ragged_batch(padding)
    cache = KVCache(len(model.layers), torch.tensor(padding))
    model(ids, cache=cache.step(ids.shape[1]))
    cache.select(torch.tensor([3, 1]))
    more = torch.tensor([[7, 8], [9, 10]])
    logits = model(more, cache=cache.step(2))
    for got, old, new in zip(logits, (rows[3], rows[1]), more, strict=True):
        torch.testing.assert_close(got, model(torch.cat((old, new))[None])[0, -2:], rtol=1e-11, atol=1e-11)


def test_positions_count_from_the_first_token_and_padding_sees_only_itself() -> None:
    cache = KVCache(1, torch.tensor([0, 2]))
    layer = cache.step(3)[0]
    assert layer.positions.tolist() == [[0, 1, 2], [0, 0, 0]]
    assert layer.mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert layer.mask[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    cache.step(1)
    assert layer.positions.tolist() == [[3], [1]]
    assert layer.mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_slots_double_when_they_are_full() -> None:
    cache = KVCache(1, torch.zeros(1, dtype=torch.int64), capacity=2)
    keys, _ = cache.step(5)[0].extend(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2))
    assert cache.capacity == 8
    assert keys.shape == (1, 1, 5, 2)
