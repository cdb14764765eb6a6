"""A TokenFormer that a Transformer was made into: which runs measure its head start, and what the page says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron.errors import UserError
from tools.paper import head_start
from tools.paper.head_start import RATES, SEEDS, SIZES, STARTS, TRANSFORMER, UPDATES, Demo, Trial, main, report

ROOT = Path(__file__).parents[3]


def test_each_start_takes_its_better_rate_to_all_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs are made once, and kept one by one: what is there already is not made again."""
    better, made = {"converted": RATES[1], "random": RATES[0]}, []

    def run(trial: Trial, demo: Demo) -> dict[str, Any]:
        made.append(trial)
        loss = 3.0 + trial.seed + (trial.rate != better[trial.start])
        return {"losses": dict.fromkeys((0, *UPDATES), loss)}

    monkeypatch.setattr(Trial, "run", run)
    monkeypatch.setattr(head_start, "ensure_process_environment", lambda: None)
    monkeypatch.setattr(head_start, "run_transformer", lambda demo: {"losses": {head_start.TRANSFORMER_UPDATES: 3.0}})
    (tmp_path / "tokenizer.json").touch()
    arguments = [str(tmp_path / "results.json"), "--demo", str(tmp_path)]
    assert main(arguments) == 0
    for size in SIZES:
        for start in STARTS:
            own = [(trial.seed, trial.rate) for trial in made if (trial.size, trial.start) == (size, start)]
            assert own == [*((SEEDS[0], rate) for rate in RATES), *((seed, better[start]) for seed in SEEDS[1:])]
    count = len(made)
    results = json.loads((tmp_path / "results.json").read_text())["results"]
    del results[made[-1].name]
    (tmp_path / "results.json").write_text(json.dumps({"results": results}))
    assert main(arguments) == 0 and made[count:] == made[count - 1 : count]


def test_the_page_has_the_figures_of_the_file() -> None:
    results = json.loads((ROOT / "tools/paper/head_start.json").read_text())["results"]
    page = (ROOT / "docs/exchange.md").read_text()
    assert {TRANSFORMER} < set(results) and all(line in page for line in report(results) if line.startswith("|"))


def test_without_the_demos_data_it_says_what_to_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_start, "ensure_process_environment", lambda: None)
    with pytest.raises(UserError, match=r"^--demo: .* has no tokenizer\.json; run `make demo` first"):
        main([str(tmp_path / "results.json"), "--demo", str(tmp_path)])
