from __future__ import annotations

import numpy as np
import pytest

from megatron.data import BlendedDataset
from megatron.data import blend as blend_module
from megatron.data.blend import blend_index, normalized, weights_by_documents
from megatron.errors import UserError
from tests.data.counting_corpora import FIXTURES

GOLDEN = np.load(FIXTURES / "data_golden.npz", allow_pickle=False)
CASES = sorted({name.split(".dataset")[0] for name in GOLDEN.files if name.startswith("blend_raw.")})


class Numbers:
    """Sample i is the number i."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> int:
        return index

    def origins(self, index: int) -> list[tuple[int, int]]:
        return [(self.size, index)]


def one_step_after_the_other(weights: list[float], size: int) -> list[int]:
    counts, result = [0] * len(weights), []
    for step in range(size):
        errors = [weight * max(step, 1) - count for weight, count in zip(weights, counts, strict=True)]
        result.append(errors.index(max(errors)))
        counts[result[-1]] += 1
    return result


@pytest.mark.parametrize("case", CASES)
def test_blend_equals_the_official_one(case: str) -> None:
    weights = [float(weight) for weight in case.removeprefix("blend_raw.").split("_")]
    size = len(GOLDEN[f"{case}.dataset_index"])
    blend = BlendedDataset([Numbers(size)] * len(weights), weights, size)
    assert np.array_equal(blend.dataset_index, GOLDEN[f"{case}.dataset_index"])
    assert np.array_equal(blend.dataset_sample_index, GOLDEN[f"{case}.dataset_sample_index"])


@pytest.mark.parametrize("parts", [2, 3, 9])
def test_stretches_side_by_side_equal_one_after_the_other(parts: int) -> None:
    weights = normalized(np.random.RandomState(parts).rand(parts) ** 4)
    assert blend_index(weights, 30_000).tolist() == one_step_after_the_other(weights.tolist(), 30_000)


def test_wrong_guesses_are_repaired(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blend_module, "_fair_counts", lambda weights, steps: np.stack([steps, 0 * steps]))
    weights = normalized([0.3, 0.7])
    assert blend_index(weights, 5_000).tolist() == one_step_after_the_other(weights.tolist(), 5_000)


def test_a_longer_blend_begins_with_the_shorter_one() -> None:
    weights = normalized([0.2, 0.5, 0.3])
    assert np.array_equal(blend_index(weights, 50_001)[:7_003], blend_index(weights, 7_003))


def test_items_come_from_the_located_data_set() -> None:
    blend = BlendedDataset([Numbers(9000), Numbers(9000)], [1, 2], 10_000)
    numbers = blend.dataset_sample_index
    for index in (0, 1, 4095, 4096, 4097, 9_999):
        assert blend[index] == numbers[index]
        assert blend.locate(index) == (blend.dataset_index[index], numbers[index])
    with pytest.raises(IndexError):
        blend[10_000]


def test_a_weight_of_zero_takes_nothing() -> None:
    assert set(blend_index(normalized([0, 1, 1]), 3_000).tolist()) == {1, 2}


def test_document_weights_follow_gpt_neox() -> None:
    shares = np.array([0.1, 0.3, 0.6])
    expected = shares**0.3 / (shares**0.3).sum() * (1 - shares)
    assert np.allclose(weights_by_documents([10, 30, 60], 0.3), expected / expected.sum())
    assert weights_by_documents([10], 0.3).tolist() == [1.0]


@pytest.mark.parametrize("weights", [[0, 0], [-1, 2], [float("nan"), 1]])
def test_impossible_weights_are_refused(weights: list[float]) -> None:
    with pytest.raises(UserError, match="data weights: .*at least 0"):
        normalized(weights)


def test_a_data_set_that_is_too_small_is_named() -> None:
    with pytest.raises(UserError, match="data set 1 must give 50 samples and has 10"):
        BlendedDataset([Numbers(99), Numbers(10)], [1, 1], 100)


def test_weights_must_match_the_data_sets() -> None:
    with pytest.raises(UserError, match="data weights: 2 for 1 data sets"):
        BlendedDataset([Numbers(99)], [1, 1], 10)


def test_origins_are_those_of_the_data_set() -> None:
    blend = BlendedDataset([Numbers(40), Numbers(30)], [0.6, 0.4], 40)
    for number in range(len(blend)):
        [(size, sample)] = blend.origins(number)
        assert (size, sample) == ([40, 30][blend.locate(number)[0]], blend[number])
