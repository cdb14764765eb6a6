"""What the product and its pages have of the results: megatron/growth/measured.json, and a page with figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.errors import UserError
from megatron.files import replaced_file
from megatron.growth.advice import FILE, Measured
from tools.growth_experiment.regime.report import groups_of, read_results, write_report
from tools.growth_experiment.regime.runs import Experiment
from tools.growth_experiment.regime.saving import Comparison, Result
from tools.growth_experiment.regime.sizes import SIZES, STAGES, TOKENS_PER_PARAMETER
from tools.growth_experiment.regime.trials import NONE

ROOT = Path(__file__).parents[3]
PAGE = "docs/growth_regime.md"
_KEYS = ("new_keys", "row_norm", "lr_scale", "new_keys_decay", "new_moments")
"""Options of a recipe that an entry of `growth` has as they are."""
FIGURES = {
    "saving": "Tokens from scratch to the same loss, over those after the growth, by the length of the stage",
    "stage": "Loss against tokens, those of the base not counted",
    "loss_tokens": "Loss against all tokens",
    "loss_flops": "Loss against all FLOPs",
    "moment": "Loss since the growth, minus that before it",
}


def publish(experiment: Experiment, root: Path = ROOT) -> str:
    """Write the report, the page and the figures that advice is given from; returns the report.

    Raises: UserError for a check, whose results do not take the place of those that it checks.
    """
    if experiment.is_check:
        raise UserError("--publish: this is a check on another text; give it for the full plan")
    text = write_report(experiment)
    for name in FIGURES:
        drawn, kept = experiment.output / f"regime_{name}.png", _kept(name, root)
        kept.unlink(missing_ok=True)
        if drawn.is_file():
            shutil.copyfile(drawn, kept)
    with replaced_file(root / PAGE) as file:
        file.write(page(text, root).encode())
    with replaced_file(root / FILE.relative_to(ROOT)) as file:
        file.write(as_json(measured(experiment)).encode())
    return text


def _kept(figure: str, root: Path) -> Path:
    return root / f"docs/figures/regime_{figure}.png"


def page(report: str, root: Path = ROOT) -> str:
    """The report as a page of the documentation, with the figures that are kept."""
    title, _, rest = report.partition("\n\n")
    source = (
        "Written by `python -m tools.growth_experiment.regime report --publish` from the results in\n"
        "`tools/growth_experiment/regime/results`, as is what `--dry-run` says of growth. "
        "[The experiment](growth_experiment.md)\nsays what was trained, and how."
    )
    figures = [
        f"![{caption}](figures/regime_{name}.png)" for name, caption in FIGURES.items() if _kept(name, root).is_file()
    ]
    return "\n\n".join([title, source, *figures, rest]) + "\n"


def measured(experiment: Experiment) -> dict[str, Any]:
    """What megatron.growth.advice.Measurements is made of."""
    results = read_results(experiment)
    return {
        "page": PAGE,
        "text": results[0]["text"],
        "base_parameters": SIZES["base"].parameters(),
        "tokens_per_parameter": TOKENS_PER_PARAMETER,
        "finished": len(results),
        "trials": len(experiment.trials),
        "measured": [asdict(each) for each in _measured(experiment, results)],
    }


def as_json(content: dict[str, Any]) -> str:
    """The file, a line for each way to grow, so that a change of one is a change of one line."""
    rows = ",\n".join(f"  {json.dumps(each)}" for each in content["measured"])
    facts = [f" {json.dumps(key)}: {json.dumps(value)},\n" for key, value in content.items() if key != "measured"]
    return f'{{\n{"".join(facts)} "measured": [\n{rows}\n ]\n}}\n'


def _measured(experiment: Experiment, results: Sequence[Result]) -> Iterator[Measured]:
    comparison = Comparison(results)
    plain = {
        (each["seed"], each["label"]): each for each in results if (each["size"], each["recipe"]) == ("base", NONE)
    }
    for (size, recipe, label), group in groups_of(results).items():
        first = group[0]
        if size not in ("grown", "tripled") or first["start"] != "grow":
            continue
        options, savings = first["options"], comparison.savings(group)
        pairs = [(each, plain[each["seed"], label]) for each in group if (each["seed"], label) in plain]
        yield Measured(
            recipe,
            {key: value for key, value in options.items() if key in _KEYS},
            {key: value for key, value in options.items() if key not in _KEYS},
            round(first["parameters"] / SIZES["base"].parameters(), 3),
            STAGES[label],
            _rounded(each["loss"]["text"] for each in group),
            _rounded(each["loss"]["text"] - other["loss"]["text"] for each, other in pairs),
            _rounded(saving.same_difference for saving in savings),
            _rounded(saving.after for saving in savings),
            _rounded(saving.in_all for saving in savings),
            "".join(sorted({saving.bound for saving in savings} - {""})),
        )


def _rounded(values: Iterator[float]) -> list[float]:
    return [round(value, 4) for value in values]
