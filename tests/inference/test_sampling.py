"""Exact meaning of temperature, top-k and top-p."""

from __future__ import annotations

import pytest
import torch

from megatron.inference.sampling import filter_top_k, filter_top_p, sample

PROBABILITIES = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
LOGITS = PROBABILITIES.log()


def kept(logits: torch.Tensor) -> list[list[int]]:
    return [row.isfinite().nonzero().flatten().tolist() for row in logits]


@pytest.mark.parametrize(
    ("top_k", "expected"), [(0, [0, 1, 2, 3]), (1, [1]), (2, [1, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_the_largest(top_k: int, expected: list[int]) -> None:
    assert kept(filter_top_k(LOGITS, top_k)) == [expected]


def test_top_k_keeps_ties_with_the_last_one() -> None:
    assert kept(filter_top_k(torch.tensor([[1.0, 2.0, 1.0, 0.0]]), 2)) == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("top_p", "expected"),
    [
        (0.0, [0, 1, 2, 3]),
        (0.01, [1]),
        (0.49, [1]),
        (0.51, [1, 3]),
        (0.79, [1, 3]),
        (0.81, [1, 2, 3]),
        (1.0, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, expected: list[int]) -> None:
    assert kept(filter_top_p(LOGITS, top_p)) == [expected]


def test_top_p_works_row_by_row_on_what_top_k_left() -> None:
    logits = torch.cat((LOGITS, LOGITS.flip(-1)))
    # Of 0.5 and 0.3 alone, the first has a share of 0.625.
    assert kept(filter_top_p(filter_top_k(logits, 2), 0.6)) == [[1], [2]]
    assert kept(filter_top_p(filter_top_k(logits, 2), 0.7)) == [[1, 3], [0, 2]]


def test_temperature_zero_is_greedy_whatever_the_filters_say() -> None:
    assert sample(LOGITS, 0.0, top_k=3, top_p=0.9).tolist() == [1]


def test_draws_follow_the_tempered_probabilities() -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(4000)]
    drawn = sample(LOGITS.expand(4000, -1), 0.5, generators=generators)
    expected = PROBABILITIES[0].square() / PROBABILITIES.square().sum()
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, expected, atol=0.03, rtol=0)


def test_filtered_tokens_are_never_drawn() -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(500)]
    drawn = sample(LOGITS.expand(500, -1), 5.0, top_k=3, top_p=0.99, generators=generators)
    assert set(drawn.tolist()) == {1, 2, 3}


def test_tiny_temperature_is_finite() -> None:
    assert sample(LOGITS, 1e-38, generators=[torch.Generator().manual_seed(0)]).tolist() == [1]


def test_missing_generators_are_an_error() -> None:
    with pytest.raises(ValueError, match="generators: sampling needs one for each of the 1 rows"):
        sample(LOGITS, 1.0)
