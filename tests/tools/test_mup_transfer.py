"""The transfer check: what it measured is what the page says, and a run of it is real."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megatron.errors import UserError
from megatron.training.coord_check import AXES
from tools.mup.transfer import FACTORS, RATES, best_rate, configuration, known_losses, means, report, runs, trained

ROOT = Path(__file__).parents[2]
LOSSES: dict[str, float] = json.loads((ROOT / "tools/mup/transfer.json").read_text())["losses"]


def steps(kind: str) -> int:
    """Steps of the grid by which the best rate is below that of the base model."""
    return RATES.index(best_rate(LOSSES, "base")) - RATES.index(best_rate(LOSSES, kind))


@pytest.mark.parametrize(("axis", "factor"), [(axis, factor) for axis in AXES for factor in FACTORS[axis]])
def test_the_best_rate_moved_by_one_step_at_most(axis: str, factor: int) -> None:
    assert abs(steps(f"mup {axis} {factor}")) <= 1


@pytest.mark.parametrize(("kind", "moved"), [("width 4", 2), ("tokens 16", 3)])
def test_without_mup_it_moved_further(kind: str, moved: int) -> None:
    assert steps(f"plain {kind}") == moved


def test_the_mean_is_over_the_seeds_that_have_every_rate() -> None:
    losses = {run.name: float(run.seed) for run in runs(2)}
    assert set(means(losses, "mup depth 4")) == {1.5} and set(means(losses, "mup tokens 16")) == {1.0}
    del losses["mup depth 4 0.0625 seed 2"]
    assert set(means(losses, "mup depth 4")) == {1.0} and means({}, "base") == [] and not list(report({}))[2:]


def test_the_page_has_what_was_measured() -> None:
    page = (ROOT / "docs/mup.md").read_text()
    assert all(line in page for line in report(LOSSES))


def patterns(number: int) -> Tensor:
    """[4, 17] token ids: three patterns, repeated from another place in each row."""
    rows = []
    for row in range(4):
        pattern = torch.arange((5, 7, 11)[(number + row) % 3]) * 9 + 3
        rows.append(pattern.repeat(5)[(number * 7 + row) % 5 :][:17])
    return torch.stack(rows)


def test_the_best_of_three_rates_is_that_of_the_small_model() -> None:
    """Rates that are 8 times as large each, and 16 times as many tokens, so that few updates tell them apart."""
    sizes = {"num_layers": 1, "hidden_size": 16, "qkv_slot_num": 8, "proj_slot_num": 8, "ffn_slot_num": 16}

    def best(use_mup: bool, factor: int) -> int:
        losses = [
            trained(configuration(use_mup, "tokens", factor, rate, **sizes), patterns, updates=40, last=10)
            for rate in (1e-3, 8e-3, 6.4e-2, 5.12e-1)
        ]
        return losses.index(min(losses))

    assert best(True, 1) == best(True, 16) == 2
    assert best(False, 16) < 2


def test_another_file_is_one_line(tmp_path: Path) -> None:
    assert known_losses(tmp_path / "none.json") == {}
    (tmp_path / "other.json").write_text("[1]")
    with pytest.raises(UserError, match="FILE: .*other.json is no file of results; name another one"):
        known_losses(tmp_path / "other.json")


def test_a_run_is_the_same_again() -> None:
    call: Callable[[], float] = lambda: trained(configuration(True, "width", 2, 4e-3), patterns, updates=3, last=1)  # noqa: E731
    assert call() == call()
