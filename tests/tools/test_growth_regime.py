"""The growth experiment in the published regime: its plan, its queue and its arithmetic, and a run at toy size."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from megatron.config import load_config
from megatron.errors import UserError
from megatron.files import lock
from megatron.model import LanguageModel
from megatron.signals import StopRequest
from megatron.training import train
from tests.ranks import run_ranks
from tools.growth_experiment.regime import queue
from tools.growth_experiment.regime.data import prepare
from tools.growth_experiment.regime.publish import publish
from tools.growth_experiment.regime.recipes import BEST, REFINED, SCREENED, TOGETHER, chosen, options_of
from tools.growth_experiment.regime.report import checked, groups_of, read_results, recipes_table, tokens_table
from tools.growth_experiment.regime.runs import CHECK, Experiment, Stopped, run_keys, run_trial
from tools.growth_experiment.regime.saving import Curve, mean_and_error, saving_of, scratch_curves
from tools.growth_experiment.regime.sizes import SIZES, STAGES, base_updates
from tools.growth_experiment.regime.starts import stacked_model
from tools.growth_experiment.regime.together import Together
from tools.growth_experiment.regime.trials import Trial, all_trials, cost_before, first_iteration, rate_trials

UPDATES = 24
ALONE = "base-no-growth-tenth", "base-annealed", "grown/random-old-x-0.1-tenth", "grown/official-tenth"
TOGETHER_AGAIN = (
    ("base-annealed", "base-no-growth-tenth"),
    ("grown/random-old-x-0.1-tenth", "grown/random-new-tokens-warm-up-tenth"),
)


@pytest.fixture
def experiment(tmp_path: Path) -> Experiment:
    facts = {"updates": base_updates(), "documents": 100, "sequences": 4, "text": "a text"}
    (tmp_path / "data.json").write_text(json.dumps(facts))
    return Experiment(tmp_path, tmp_path / "results")


def note(experiment: Experiment, name: str, tuning: float = 1.0) -> None:
    """A result, as far as choices look at it."""
    trial = experiment.trials[name]
    experiment.results.mkdir(exist_ok=True)
    result = {"updates": trial.updates, "text": experiment.facts["text"], "loss": {"text": 1.0, "tuning": tuning}}
    (experiment.results / trial.file).write_text(json.dumps(result))


def hours_until(trials: dict[str, Trial], name: str) -> float:
    return sum(trial.core_hours for trial in list(trials.values())[: list(trials).index(name) + 1])


def test_the_plan_is_that_of_the_published_regime() -> None:
    updates = base_updates()
    trials = {trial.name: trial for trial in all_trials(updates)}
    names = list(trials)
    assert len({trial.file for trial in trials.values()}) == len(all_trials(updates)) == len(names)
    for number, trial in enumerate(trials.values()):
        assert all(name in names[:number] for name in (*trial.needs, *([trial.parent] if trial.parent else [])))
        assert trial.core_hours < 2 / 3, trial.name
        if trial.parent:
            parent = trials[trial.parent]
            assert trial.at in (*parent.saves, first_iteration(parent) + parent.updates), "its checkpoint is kept"
    assert 5 < sum(trial.core_hours for trial in trials.values()) < 7
    assert hours_until(trials, "seed3/grown/best-two-fifths") < 4, "three seeds of what matters most come early"
    assert names.index("seed1/grown-scratch-all") < names.index("seed1/grown/official-tenth")
    grown = trials["seed1/grown/random-tenth"]
    assert grown.updates > 10_000
    assert SIZES["base"].slots == 0.75 * 32 and round(SIZES["chain 4"].slots / 32) == 11
    for recipe, label in ((TOGETHER, "tenth"), *((BEST, label) for label in ("tenth", "fifth", "two fifths"))):
        found = [t.seed for t in trials.values() if (t.recipe, t.label, t.size.name) == (recipe, label, "grown")]
        assert found == [1, 2, 3], (recipe, label)
    flops = dict.fromkeys(SIZES, 2.0)
    tokens, spent = cost_before(trials["seed1/chain-4/zero-tenth"], trials, flops)
    assert tokens == (updates + 2 * grown.updates) * 256 and spent == 2 * tokens
    assert cost_before(trials["seed1/grown-scratch-tenth"], trials, flops)[0] == round(0.08 * updates) * 256


def test_every_run_has_a_valid_configuration(experiment: Experiment) -> None:
    for name in experiment.trials:
        if name.startswith(("rates/", "seed1/grown/")):
            note(experiment, name)
    for trial in experiment.trials.values():
        if trial.start != "branch" and trial.seed == 1:
            config = load_config([], run_keys(experiment, trial))
            assert bool(config.optimization.lr_wsd_decay_iters) != trial.is_trunk, trial.name


def test_what_is_chosen_is_what_helped() -> None:
    losses = dict.fromkeys((*SCREENED, *REFINED), 1.3)
    losses |= {"random": 1.25, "official": 1.1, "random, old x 0.1": 1.2, "random, old x 0.3": 1.22}
    losses |= {"random, new keys x 3": 1.24, "random, warm-up": 1.2495, "random, from the annealed base": 1.1}
    assert chosen(losses) == ["random", "old x 0.1", "new keys x 3"]
    assert options_of(TOGETHER, losses) == {"row_norm": "segment", "lr_scale": {"old": 0.1, "new_keys": 3.0}}
    assert options_of(BEST, losses) == SCREENED["random, old x 0.1"], "official is not exact"
    losses["random, old x 0.3, mean moments"] = 1.15
    assert options_of(BEST, losses) == {"row_norm": "segment", "lr_scale": {"old": 0.3}, "new_moments": "mean"}


def test_what_was_chosen_is_not_trained_again_under_its_new_name(experiment: Experiment) -> None:
    best = experiment.trials["seed1/grown/best-tenth"]
    for name in best.needs:
        note(experiment, name, tuning=0.5 if name == "seed1/grown/random-old-x-0.2-tenth" else 1.0)
    found = experiment.result(best.name)
    assert found and (found["recipe"], found["name"], found["loss"]["tuning"]) == ("best", best.name, 0.5)
    assert queue.state_of(experiment, best) == "done"
    assert experiment.result("seed2/grown/best-tenth") is None, "only the first seed tried it"
    note(experiment, "seed1/grown/random-old-x-0.5-tenth", tuning=0.4)
    (experiment.results / experiment.trials["seed1/grown/random-old-x-0.3-mean-moments-tenth"].file).unlink()
    assert experiment.result(best.name) is None, "nothing is chosen yet"


def test_a_trial_waits_for_what_it_needs_and_one_process_has_it(experiment: Experiment) -> None:
    base = experiment.trials["seed1/base"]
    assert queue.state_of(experiment, base) == "waiting"
    for name in base.needs:
        note(experiment, name, tuning=float(name.rpartition("-")[2]))
    assert queue.state_of(experiment, base) == "ready" and experiment.peak_rate("tokenformer") == 1e-3
    with (experiment.output / "claims" / "seed1_base").open("a") as file:
        lock(file)
        assert queue.state_of(experiment, base) == "running"
    note(experiment, "seed1/base")
    again = [trial.name for trial in queue.wanted(experiment)]
    assert again.index("seed1/base") < again.index("seed1/base-annealed"), "its checkpoints are gone"
    lines = {line.split()[0]: line.split() for line in queue.plan(experiment).splitlines() if "/" in line}
    assert "checkpoint" in lines["seed1/base"] and lines["seed1/base"][2:4] == ["0.18", "0.18"]
    assert lines["seed1/base-no-growth-tenth"][2:4] == ["0.02", "0.20"], "hours until it is done"
    note(experiment, base.needs[0])
    (experiment.results / base.file).write_text('{"updates": 3}')
    with pytest.raises(UserError, match="3 updates, not .*; give --results"):
        experiment.result("seed1/base")
    (experiment.results / base.file).write_text(json.dumps({"updates": base.updates, "text": "another"}))
    with pytest.raises(UserError, match="of another, not of a text; give --results"):
        experiment.result("seed1/base")


def test_a_check_tries_on_another_text_what_was_chosen_on_the_first(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tools.growth_experiment.regime.runs.RESULTS", experiment.results)
    for name in experiment.trials:
        if name.startswith(("rates/", "seed1/grown/")):
            note(experiment, name, tuning=0.5 if name in ("rates/tokenformer-0.004", "seed1/grown/zero-tenth") else 1.0)
    facts = {**experiment.facts, "text": "another", "plan": "check", "updates": 1000}
    (tmp_path / "other").mkdir()
    (tmp_path / "other/data.json").write_text(json.dumps(facts))
    check = Experiment(tmp_path / "other", tmp_path / "other/results")
    assert len(check.trials) < 12 and sum(trial.core_hours for trial in check.trials.values()) < 0.1
    assert queue.state_of(check, check.trials["seed1/base"]) == "ready", "nothing is left to choose"
    assert check.peak_rate("tokenformer") == 0.004 and check.trials["seed1/base"].updates == 1000
    assert check.options(check.trials["seed1/tripled/best-tenth"]) == {}
    assert not any(trial.size.name == "grown" for trial in check.trials.values()), "nor is the factor that of the first"
    assert Experiment(tmp_path / "other").results == CHECK
    with pytest.raises(UserError, match="--publish: this is a check on another text"):
        publish(check)
    trial = check.trials["seed1/tripled/zero-tenth"]
    found = {"name": trial.name, "size": "tripled", "recipe": "zero", "label": "tenth", "start": "grow", "seed": 1}
    found |= {"kind": "tokenformer", "loss": {"text": 1.5}, "text": "another", "updates": 10, "tokens_per_update": 256}
    found |= {"tokens_before": 100, "flops_before": 1e3, "flops_per_token": 10.0}
    assert not checked(check.results)
    check.results.mkdir()
    (check.results / trial.file).write_text(json.dumps(found))
    assert any("| tripled | zero | tenth | 1 | 1.500 |" in part for part in checked(check.results))
    mixed = check.results / check.trials["seed1/tripled/best-tenth"].file
    mixed.write_text(json.dumps(found | {"text": "a third"}))
    with pytest.raises(UserError, match="results of a third and of another; keep those of one text"):
        checked(check.results)
    (experiment.results / "seed1_grown_official-tenth.json").unlink()
    assert not check.is_decided("seed1/grown/official-tenth"), "then recipes wait"


def test_failed_trials_are_passed_over_and_a_pause_starts_none(
    experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[str] = []

    def fail(_: Experiment, trial: Any, __: Any) -> None:
        tried.append(trial.name)
        if len(tried) == 3:
            raise Stopped("stopped")
        raise UserError("the loss is not finite")

    def end_pause(_: float) -> None:
        assert not tried
        (experiment.output / queue.PAUSE).unlink()

    monkeypatch.setattr(queue, "run_trial", fail)
    monkeypatch.setattr(queue.time, "sleep", end_pause)
    (experiment.output / queue.PAUSE).touch()
    with pytest.raises(Stopped):
        queue.run_all(experiment, together=1)
    assert tried == list(experiment.trials)[:3]
    assert [queue.state_of(experiment, experiment.trials[name]) for name in tried] == ["failed", "failed", "ready"]
    assert "not finite" in (experiment.output / tried[0] / "failed.txt").read_text()


def test_savings_add_up() -> None:
    curve = Curve([100.0, 400.0], [2.0, 1.0], 20.0)
    assert curve.tokens_to(1.5) == (pytest.approx(200), "")
    assert curve.tokens_to(0.9) == (400, ">") and curve.tokens_to(2.1) == (100, "<")
    base = {"updates": 10, "tokens_per_update": 10, "tokens_before": 0, "flops_before": 0.0, "flops_per_token": 4.0}
    grown = {"updates": 5, "tokens_per_update": 10, "tokens_before": 100, "flops_before": 400.0,
             "flops_per_token": 20.0, "loss": {"text": 1.5}}  # fmt: skip
    saving = saving_of(grown, curve, base)
    assert saving.difference == 0.5 and saving.after == pytest.approx(4) and saving.in_all == pytest.approx(200 / 150)
    assert saving.flops_after == pytest.approx(4) and saving.flops_in_all == pytest.approx(4000 / 1400)
    scratch = [{**base, "start": "branch", "recipe": "", "label": label, "size": "grown", "seed": 1, "updates": number,
                "loss": {"text": 3.0 - number}} for number, label in enumerate(STAGES, 1)]  # fmt: skip
    found = scratch_curves(reversed(scratch))["grown", 1]
    assert list(found.tokens) == [10, 20, 30, 40] and list(found.losses) == [2, 1, 0, -1] and found.flops_per_token == 4
    assert not scratch_curves(scratch[1:]), "its last length may be missing"
    assert mean_and_error([1.0, 2.0, 3.0]) == "2.000 +- 0.577" and mean_and_error([1.0], sign="+") == "+1.000"


def test_stacked_blocks_are_those_of_the_smaller_model() -> None:
    base, deep = SIZES["transformer"].config(), SIZES["deep"].config()
    model = LanguageModel(base, seed=1)
    tensors = dict(stacked_model(model, deep).named_parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(tensors[name], parameter)
        if name.startswith("layers.1."):
            assert torch.equal(tensors[name.replace("layers.1.", "layers.3.")], parameter)


def run_some(output: Path) -> None:
    experiment = Experiment(output, output / "results")
    queue.run_all(experiment, limit=1, together=1, compiled=False)
    for name in ALONE:
        run_trial(experiment, experiment.trials[f"seed1/{name}"], train)
    again = Experiment(output, output / "together")
    shutil.copytree(experiment.results, again.results, ignore=shutil.ignore_patterns("seed1*"))
    with StopRequest() as stop:
        for names in TOGETHER_AGAIN:
            run_together(again, [again.trials[f"seed1/{name}"] for name in names], stop)


def run_together(experiment: Experiment, trials: list[Trial], stop: StopRequest) -> None:
    stack = Together(len(trials), stop, compiled=False)
    for trial in trials:
        shutil.rmtree(experiment.folder(trial), ignore_errors=True)
    workers = [Thread(target=run_trial, args=(experiment, trial, stack.train)) for trial in trials]
    for worker in workers:
        worker.start()
    stack.compute(workers)


@pytest.mark.processes
def test_a_toy_run_grows_and_reports(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"{i} and {i * i} make {i + i * i}. " for i in range(3000)))
    prepare(tmp_path, UPDATES, text, sequences=2)
    experiment = Experiment(tmp_path, tmp_path / "results")
    for name in [trial.name for trial in rate_trials("tokenformer", UPDATES)]:
        note(experiment, name)
    run_ranks(1, run_some, tmp_path)
    for name in experiment.trials["seed1/base"].needs:
        (experiment.results / experiment.trials[name].file).unlink()
    assert {path.name for path in experiment.results.iterdir()} == {
        "seed1_base.json", "seed1_base-annealed.json", "seed1_base-no-growth-tenth.json",
        "seed1_grown_random-old-x-0.1-tenth.json", "seed1_grown_official-tenth.json",
    }  # fmt: skip
    for file in ("seed1_base-annealed.json", "seed1_grown_random-old-x-0.1-tenth.json"):
        alone, beside = (json.loads((tmp_path / kind / file).read_text()) for kind in ("results", "together"))
        assert beside["curve"] == [[i, pytest.approx(loss, abs=1e-5)] for i, loss in alone["curve"]], file
    results = {result["recipe"] or result["name"]: result for result in read_results(experiment)}
    exact, official = results["random, old x 0.1"], results["official"]
    assert exact["logit_difference"] < 1e-5 * exact["largest_logit"] and exact["tokens_before"] == UPDATES * 256
    assert official["logit_difference"] > 1e-3 * official["largest_logit"]
    assert exact["new_keys_rms"]["ffn"] == pytest.approx(1, abs=0.1), "random keys are as large as the old ones"
    used = [result["new_tokens_in_use"]["ffn"] for result in (exact, official)]
    assert used[0] < 0.5 < used[1] <= 1, "values of zero have hardly left it after two updates"
    assert results["seed1/base-annealed"]["tokens_before"] == round(0.9 * UPDATES) * 256
    assert all(result["curve"][-1] == [result["updates"], result["loss"]["text"]] for result in results.values())
    groups = groups_of(list(results.values()))
    assert "| grown | official | tenth |" in recipes_table(list(results.values()), groups)
    assert "| grown | random, old x 0.1 | tenth | 1.0" in tokens_table(groups)
