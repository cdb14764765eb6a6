"""The paper's table: which metrics, which average, and the published figures beside it."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval_tasks.published import ZERO_SHOT
from eval_tasks.tables import format_summary, format_table, paper_row, paper_summary, published_figures
from megatron.config import load_config
from tests.random_models import make_config

CONFIGS = Path(__file__).parents[2] / "configs" / "tokenformer"
RESULTS = {
    "lambada_openai": {"perplexity,none": 16.123, "acc,none": 0.45, "acc_norm,none": 0.9},
    "hellaswag": {"acc,none": 0.1, "acc_norm,none": 0.35},
    "piqa": {"acc,none": 0.65, "acc_norm,none": 0.9},
    "arc_easy": {"acc,none": 0.47, "acc_norm,none": 0.9},
    "arc_challenge": {"acc,none": 0.1, "acc_norm,none": 0.25},
    "winogrande": {"acc,none": 0.50},
}


def test_the_paper_takes_acc_norm_for_hellaswag_and_arc_challenge_only() -> None:
    summary = paper_summary(RESULTS, make_config().model)
    assert summary is not None and list(summary) == ["this model"]
    own = summary["this model"]
    assert own == pytest.approx(
        {
            "LAMBADA ppl": 16.123, "LAMBADA": 45, "HellaSwag": 35, "PIQA": 65, "ARC-E": 47, "ARC-C": 25,
            "WinoGrande": 50, "average": 267 / 6,
        }
    )  # fmt: skip


def test_one_missing_task_and_there_is_no_summary() -> None:
    assert paper_summary({task: RESULTS[task] for task in list(RESULTS)[1:]}, make_config().model) is None


@pytest.mark.parametrize("size", ["150M", "450M", "900M", "1-5B"])
def test_configs_of_the_published_models_have_published_figures(size: str) -> None:
    figures = published_figures(load_config(CONFIGS / f"{size}_eval.yml").model)
    assert list(figures) == [f"published TokenFormer-{size.replace('-', '.')}"]


def test_published_averages_are_those_of_the_published_accuracies() -> None:
    """But for three rows whose averages are others in the sources, too."""
    other = {"Pythia-160M": 41.1, "GPT-Neo 2.7B": 56.3, "Mamba-370M": 51.7}
    for row in ZERO_SHOT:
        _, _, *accuracies, average = row.figures
        assert sum(filter(None, accuracies)) / 6 == pytest.approx(other.get(row.name, average), abs=0.051), row.name


def test_a_perplexity_is_one_of_the_pile_where_its_data_say_so() -> None:
    for alias, expected in (("data/pile_valid.jsonl", {"Pile ppl": 9.5}), ("data/other.jsonl", {})):
        assert paper_row({"perplexity": {"alias": alias, "token_perplexity,none": 9.5}}) == expected


def test_summary_is_printed_in_percent_with_dashes_for_what_is_not_known() -> None:
    summary = paper_summary(RESULTS, load_config(CONFIGS / "150M_eval.yml").model)
    assert summary is not None
    assert [line.split() for line in format_summary(summary).splitlines()[2:]] == [
        ["this", "model", "-", "16.12", "45.0", "35.0", "65.0", "47.0", "25.0", "50.0", "44.5"],
        ["published", "TokenFormer-150M", "10.45", "16.38", "45.0", "35.5", "64.9", "47.3", "24.9", "50.4", "44.7"],
    ]


def test_table_shows_values_and_errors() -> None:
    table = format_table({"t": {"alias": "t", "acc,none": 0.25, "acc_stderr,none": "N/A", "em,strict": 1}})
    assert table.splitlines()[2:] == ["t     acc          0.2500       -", "t     em (strict)  1.0000       -"]
