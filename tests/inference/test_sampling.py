"""Exact meaning of the sampling settings."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from megatron.inference.sampling import (
    Chooser,
    Sampling,
    filter_min_p,
    filter_top_k,
    filter_top_p,
    penalize_repetition,
    sample,
)

PROBABILITIES = torch.tensor([[0.05, 0.5, 0.15, 0.3]])
LOGITS = PROBABILITIES.log()


def chooser(settings: list[Sampling], seen: list[list[int]], generators: list[Any], vocabulary: int) -> Chooser:
    return Chooser(settings, seen, generators, vocabulary, torch.device("cpu"))


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


@pytest.mark.parametrize(
    ("min_p", "expected"), [(0.0, [0, 1, 2, 3]), (0.09, [0, 1, 2, 3]), (0.25, [1, 2, 3]), (0.59, [1, 3]), (1.0, [1])]
)
def test_min_p_keeps_tokens_that_are_probable_beside_the_best(min_p: float, expected: list[int]) -> None:
    assert kept(filter_min_p(LOGITS, min_p)) == [expected]
    assert kept(filter_min_p(filter_top_k(LOGITS, 2), min_p)) == [[i for i in expected if i in (1, 3)]]


def test_min_p_sees_tempered_probabilities() -> None:
    generators = [torch.Generator().manual_seed(i) for i in range(300)]
    # 0.3 / 0.5 = 0.6, and 0.36 after squaring.
    hot, cold = (sample(LOGITS.expand(300, -1), t, min_p=0.5, generators=generators) for t in (1.0, 0.5))
    assert (set(hot.tolist()), set(cold.tolist())) == ({1, 3}, {1})


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_once() -> None:
    logits = torch.tensor([[2.0, -1.0, 3.0, 0.0], [2.0, -1.0, 3.0, 0.0]])
    seen = torch.tensor([[True, True, False, False], [False, False, True, False]])
    found = penalize_repetition(logits, seen, torch.tensor([[2.0], [1.0]]))
    assert found.tolist() == [[1.0, -2.0, 3.0, 0.0], [2.0, -1.0, 3.0, 0.0]]
    assert logits[0, 0] == 2.0


def test_repetition_penalty_changes_greedy_choices() -> None:
    logits = torch.tensor([[2.0, 1.5], [2.0, 1.5]])
    settings = [Sampling(repetition_penalty=2.0), Sampling()]
    choose = chooser(settings, [[0], [0]], [None, None], 2)
    assert choose(logits).tolist() == [1, 0]
    assert choose(logits).tolist() == [0, 0], "what was chosen counts as seen"


def test_every_row_is_chosen_as_if_it_were_alone() -> None:
    settings = [
        Sampling(),
        Sampling(temperature=1.0),
        Sampling(temperature=1.0, top_k=3),
        Sampling(temperature=2.0, min_p=0.2, repetition_penalty=1.3),
        Sampling(temperature=1.0),
        Sampling(temperature=0.7, top_p=0.8),
    ]
    logits = torch.randn(len(settings), 50, generator=torch.Generator().manual_seed(0))
    seen = [[i, i + 1] for i in range(len(settings))]

    def generators() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(i) for i in range(len(settings))]

    def drawn(rows: list[int], own: list[torch.Generator]) -> list[list[int]]:
        """Three tokens for each of the rows, the last two after all but they have left the batch."""
        picked = [own[i] for i in rows]
        choose = chooser([settings[i] for i in rows], [seen[i] for i in rows], picked, 50)
        return [choose(logits[rows]).tolist() for _ in range(3)]

    everyone = list(range(len(settings)))
    together = drawn(everyone, generators())
    assert [drawn([i], generators()) for i in everyone] == [[[row[i]] for row in together] for i in everyone]


def test_rows_that_stay_go_on_as_before() -> None:
    settings = [Sampling(temperature=1.0, repetition_penalty=1.5), Sampling(), Sampling(temperature=0.5, top_k=9)]
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(2))

    def drawn(leaving: bool) -> list[list[int]]:
        generators = [torch.Generator().manual_seed(i) for i in range(3)]
        choose = chooser(settings, [[1], [2], [3]], generators, 50)
        choose(logits)
        if not leaving:
            return [[found[2], found[0]] for found in (choose(logits).tolist() for _ in range(3))]
        choose.select([2, 0])
        return [choose(logits[[2, 0]]).tolist() for _ in range(3)]

    assert drawn(True) == drawn(False)


def test_draws_are_those_of_multinomial() -> None:
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(1))
    seeded = [[torch.Generator().manual_seed(i) for i in range(5)] for _ in range(2)]
    expected = [torch.multinomial(row.softmax(-1), 1, generator=g) for row, g in zip(logits, seeded[0], strict=True)]
    assert sample(logits, 1.0, generators=seeded[1]).tolist() == torch.cat(expected).tolist()


def test_choosing_asks_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """On fake tensors, which have no values, a number brought to the host is an error."""
    # Drawn on the host, with a generator, for which there are no fakes.
    monkeypatch.setattr("megatron.inference.sampling._noise", lambda like, generators: torch.ones_like(like))
    settings = [
        Sampling(repetition_penalty=1.5),
        Sampling(temperature=1.0, top_k=5, top_p=0.9, min_p=0.1),
        Sampling(temperature=0.5),
    ]
    generators = [None, torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)]
    with FakeTensorMode():
        choose = chooser(settings, [[1], [2], [3]], generators, 40)
        logits = torch.randn(3, 48)
        assert [choose(logits).shape for _ in range(3)] == [(3,)] * 3
        with pytest.raises(DataDependentOutputException):
            choose(logits)[0].item()


@pytest.mark.parametrize(
    "settings",
    [
        {"temperature": -1.0}, {"top_k": -1}, {"top_p": 1.1}, {"min_p": -0.1}, {"repetition_penalty": 0.0},
        {"stop": ("",)}, {"num_samples": 0},
    ],
)  # fmt: skip
def test_settings_outside_their_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        Sampling(**settings)
