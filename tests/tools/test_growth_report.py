"""The report of the growth experiment on results that are made up, and what the product and its pages have of it."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import UserError
from megatron.growth.advice import FILE, measurements
from tools.growth_experiment.figures import draw_figures
from tools.growth_experiment.regime.publish import PAGE, ROOT, as_json, measured, page, publish
from tools.growth_experiment.regime.report import checked, report_text
from tools.growth_experiment.regime.runs import RESULTS, Experiment
from tools.growth_experiment.regime.sizes import SIZES, TOKENS_PER_UPDATE, base_updates
from tools.growth_experiment.regime.trials import NONE, Trial, cost_before
from tools.growth_experiment.results import read_results

PARAMETERS = {name: size.parameters() for name, size in SIZES.items()}
FLOPS = {name: float(number) for number, name in enumerate(SIZES, 1)}
GROWN = {"logit_difference": 1e-5, "largest_logit": 10.0, "loss_before": 1.6, "loss_after": 1.6}
OF_TOKENS = {"new_keys_rms": {"qkv": 0.9, "proj": 1.0, "ffn": 1.1},
             "new_tokens_in_use": {"qkv": 0.5, "proj": 0.75, "ffn": 1.0}}  # fmt: skip


def experiment_at(folder: Path, results: Path, text: str = "a text") -> Experiment:
    facts = {"updates": base_updates(), "documents": 100, "sequences": 4, "text": text}
    folder.mkdir(exist_ok=True)
    (folder / "data.json").write_text(json.dumps(facts))
    return Experiment(folder, results)


def made_up(trial: Trial, trials: dict[str, Trial]) -> dict[str, Any]:
    """From scratch e-fold tokens lower the loss by 0.1. After a growth one is worth 2 + seed; without growth, one."""
    tokens, flops = cost_before(trial, trials, FLOPS)
    own = trial.updates * TOKENS_PER_UPDATE
    is_scratch = trial.start == "scratch" or (trial.start == "branch" and trial.recipe != NONE)
    worth = tokens + own if is_scratch else own * (1 if trial.recipe == NONE else 2 + trial.seed)
    loss = 3.0 - 0.1 * math.log(worth / TOKENS_PER_UPDATE) + 0.01 * trial.seed
    options = {"row_norm": "segment", "warmup": 0.05} if trial.recipe == "together" else {}
    return {
        "name": trial.name, "seed": trial.seed, "size": trial.size.name, "kind": trial.size.kind, "text": "a text",
        "start": trial.start, "recipe": trial.recipe, "label": trial.label, "options": options,
        "peak_lr": trial.rate or 0.002, "updates": trial.updates, "tokens_per_update": TOKENS_PER_UPDATE,
        "parameters": PARAMETERS[trial.size.name], "flops_per_token": FLOPS[trial.size.name], "tokens_before": tokens,
        "flops_before": flops, "loss": {"text": loss, "tuning": loss}, "curve": [[trial.updates, loss]],
        **({} if trial.start in ("scratch", "branch") else GROWN),
        **(OF_TOKENS if trial.start in ("grow", "official") else {}),
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    folder = tmp_path_factory.mktemp("experiment")
    experiment = experiment_at(folder, folder / "results")
    experiment.results.mkdir()
    for trial in experiment.trials.values():
        (experiment.results / trial.file).write_text(json.dumps(made_up(trial, experiment.trials)))
    return experiment


def rows_of(report: str) -> dict[tuple[str, ...], list[str]]:
    """Cells of all tables with a size, a recipe and a stage, by these; the second table's follow the first's."""
    found: dict[tuple[str, ...], list[str]] = {}
    for line in report.splitlines():
        cells = line.strip("| ").split(" | ")
        if len(cells) > 8:
            found.setdefault(tuple(cells[:3]), []).extend(cells[3:])
    return found


def test_every_recipe_has_its_losses_savings_costs_and_tokens(finished: Experiment) -> None:
    report = report_text(finished)
    row = rows_of(report)["grown", "together", "tenth"]
    grown, base = FLOPS["grown"], FLOPS["base"]
    stage = round(0.1 * base_updates()) * TOKENS_PER_UPDATE
    before = base_updates() * TOKENS_PER_UPDATE
    losses = [3.0 - 0.1 * math.log((2 + seed) * stage / TOKENS_PER_UPDATE) + 0.01 * seed for seed in (1, 2, 3)]
    assert row[:2] == ["3", f"{sum(losses) / 3:.3f} +- {(losses[0] - losses[2]) / 12**0.5:.3f}"]
    assert row[2].startswith(f"{sum(0.1 * math.log(10 / (2 + seed)) for seed in (1, 2, 3)) / 3:+.3f} +- 0.0")
    assert row[3].startswith(f"{sum(-0.1 * math.log(2 + seed) for seed in (1, 2, 3)) / 3:+.3f} +- 0.0")
    assert row[4] == "4.00 +- 0.58" and row[5] == f"{4 * stage / (before + stage):.2f} +- 0.05"
    assert row[6] == "4.00 +- 0.58"
    assert row[7].startswith(f"{4 * stage * grown / (before * base + stage * grown):.2f} +- ")
    assert row[8:12] == [f"{stage / 1e6:.2f}M", f"{(before + stage) / 1e6:.2f}M", f"{stage * grown:.2e}",
                         f"{before * base + stage * grown:.2e}"]  # fmt: skip
    assert row[12:18] == ["0.90", "1.00", "1.10", "0.50", "0.75", "1.00"] and row[18:] == ["+0.000", "1e-06"]
    assert "23 trials" not in report and f"{len(finished.trials)} of {len(finished.trials)} trials" in report


@pytest.mark.parametrize(
    ("size", "recipe"), [("wide", "Net2Net"), ("double", "HyperCloning"), ("deep", "G_stack"), ("tripled", "zero")]
)
def test_other_ways_to_grow_and_another_factor_stand_beside(finished: Experiment, size: str, recipe: str) -> None:
    row = rows_of(report_text(finished))[size, recipe, "tenth"]
    assert row[0] == "1" and row[4] == "3.00", "one seed has no error"


def test_all_of_a_chain_is_counted(finished: Experiment) -> None:
    row = rows_of(report_text(finished))["chain 4", "best", "tenth"]
    assert row[4] == "1.00", "the last stage is worth three, and there are three after the base"


def test_what_is_published_is_what_is_advised_from(finished: Experiment, tmp_path: Path) -> None:
    (tmp_path / "docs/figures").mkdir(parents=True)
    (tmp_path / "megatron/growth").mkdir(parents=True)
    report = publish(finished, tmp_path)
    assert (tmp_path / PAGE).read_text().endswith(report.partition("\n\n")[2] + "\n")
    drawn = sorted(path.name for path in (tmp_path / "docs/figures").iterdir())
    assert drawn == [f"regime_{name}.png" for name in ("loss_flops", "loss_tokens", "moment", "saving", "stage")]
    known = measurements(tmp_path / FILE.relative_to(ROOT))
    found = {(each.recipe, each.factor, each.part): each for each in known.measured}
    together = found["together", 1.996, 0.1]
    assert together.keys == {"row_norm": "segment"} and together.schedule == {"warmup": 0.05}
    assert together.savings == [3, 4, 5] and together.bound == ""
    assert together.minus_no_growth == pytest.approx([-0.1 * math.log(2 + seed) for seed in (1, 2, 3)], abs=1e-4)
    assert ("zero", 3.023, 0.1) in found and ("official", 1.996, 0.1) not in found, "nothing grows as that does"
    assert (known.finished, known.trials) == (len(finished.trials), len(finished.trials))


def test_a_damaged_file_is_named_with_what_to_do(tmp_path: Path) -> None:
    experiment = experiment_at(tmp_path / "new", tmp_path / "results")
    experiment.results.mkdir()
    kept = experiment.results / experiment.trials["seed1/base"].file
    for content in ('{"updates": 114', "[1]"):
        kept.write_text(content)
        with pytest.raises(UserError, match=f"^{kept}: not a .*JSON.*; restore it, or delete it: `run` trains what"):
            report_text(experiment)
        with pytest.raises(UserError, match=f"^{kept}: not a .*JSON"):
            checked(experiment.results)
    (tmp_path / "new/data.json").write_text('{"updates": 114')
    with pytest.raises(UserError, match="data.json: not a readable JSON file .*; delete it and give the command prep"):
        report_text(Experiment(tmp_path / "new", experiment.results))
    (tmp_path / "a/S1/1").mkdir(parents=True)
    (tmp_path / "a/S1/1/trial.json").write_text("{")
    with pytest.raises(UserError, match="trial.json: not a readable JSON file .*; delete it: the stage run trains"):
        read_results(tmp_path)


def test_without_matplotlib_nothing_is_published(
    finished: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match="^report: the figure needs matplotlib; pip install matplotlib$"):
        publish(finished, tmp_path)
    with pytest.raises(UserError, match="^--stage report: the figure needs matplotlib"):
        draw_figures({}, tmp_path)
    assert not list(tmp_path.iterdir())


def test_advice_and_page_are_those_of_the_results_that_are_kept(tmp_path: Path) -> None:
    """After new results: `python -m tools.growth_experiment.regime report --output DIR --publish`."""
    kept = experiment_at(tmp_path / "new", RESULTS, "State of the Union")
    assert FILE.read_text() == as_json(measured(kept))
    assert (ROOT / PAGE).read_text() == page(report_text(kept))
