"""Evaluation over processes and at any batch size equals that of one process, one request at a time."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from eval_tasks.run import run_evaluation
from megatron.config.cli import parse_run
from megatron.model import LanguageModel
from megatron.mpu import Axis
from megatron.mpu.processes import leave_world
from megatron.tokenizer import HFTokenizer
from tests.random_models import make_config, save_random_models
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "eval"
TEXTS = [("The ferry leaves " * n, " the harbor" * (1 + n % 3)) for n in range(11)]


def scores(tokenizer_file: str, tensor_size: int, batch_sizes: Sequence[Any]) -> list[dict[str, Any]]:
    """For each batch size, what a rank sees of each kind of request, in fp32."""
    from megatron.mpu.environment import ensure_process_environment
    from megatron.mpu.processes import join
    from tests.random_models import make_model

    ensure_process_environment()
    layout = join(tensor_size, "gloo")
    torch.set_num_threads(1)
    model = make_model(dtype=torch.float32, padded_vocab_size=384, layout=layout)
    return [_scores(model, HFTokenizer(tokenizer_file), batch_size, layout.data) for batch_size in batch_sizes]


def _scores(model: LanguageModel, tokenizer: HFTokenizer, batch_size: Any, axis: Axis) -> dict[str, Any]:
    from lm_eval.api.instance import Instance

    from eval_tasks.adapter import TokenFormerLM

    lm = TokenFormerLM(model, tokenizer, batch_size, progress=False, axis=axis)

    def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
        return [Instance(kind, {}, args, i) for i, args in enumerate(arguments)]  # type: ignore[arg-type]

    greedy = {"until": ["q"], "max_gen_toks": 6}
    sampled = {"do_sample": True, "max_gen_toks": 6}
    return {
        "likelihoods": lm.loglikelihood(requests("loglikelihood", TEXTS), disable_tqdm=True),
        "rolling": lm.loglikelihood_rolling(requests("", [(a + b,) for a, b in TEXTS]), disable_tqdm=True),
        "lengths": [len(lm.tok_encode(a + b)) for a, b in TEXTS],
        "texts": lm.generate_until(requests("", [(a, greedy if n % 3 else sampled) for n, (a, _) in enumerate(TEXTS)])),
    }


def assert_same_scores(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["texts"] == expected["texts"]
    for (a, greedy), (b, expected_greedy), n in zip(
        found["likelihoods"], expected["likelihoods"], expected["lengths"], strict=True
    ):
        assert greedy == expected_greedy and abs(a - b) <= 1e-5 * n
    for a, b, n in zip(found["rolling"], expected["rolling"], expected["lengths"], strict=True):
        assert abs(a - b) <= 1e-5 * n


@pytest.fixture(scope="module")
def alone(tokenizer_file: Path) -> list[dict[str, Any]]:
    """What one process finds: one request at a time, then more of them."""
    return scores(str(tokenizer_file), 1, [1, 8, "auto"])


def test_batch_size_does_not_change_scores(alone: list[dict[str, Any]]) -> None:
    for found in alone[1:]:
        assert_same_scores(found, alone[0])


def evaluate(*flags: str) -> int:
    """eval.py in a rank that has its imports already; how often it prints a perplexity."""
    from eval import main

    os.chdir(FIXTURES)
    sys.argv = ["eval.py", *flags]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main() == 0
    return printed.getvalue().count("token_perplexity")


def results_of(folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    (file,) = folder.glob(f"{prefix}_eval_results_*.json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


def in_turn(tokenizer_file: str, sizes: Sequence[tuple[int, list[Any]]], runs: Sequence[list[str]]) -> tuple[Any, Any]:
    """`scores` for each tensor size, then `evaluate` for each command line; what they import is imported once."""
    found = [scores(tokenizer_file, *size) for size in sizes]
    leave_world()
    return found, [evaluate(*run) for run in runs]


@pytest.fixture(scope="module")
def of_two(tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], Path]:
    """What two ranks return of `in_turn`, and the folder of results, with those of one process."""
    folder = tmp_path_factory.mktemp("of_two")
    config = make_config(padded_vocab_size=384, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    save_random_models(folder / "run", config, (7,))
    file, text = folder / "run.yml", folder / "text.txt"
    file.write_text(yaml.safe_dump(config.flat()), encoding="utf-8")
    text.write_text("The ferry leaves the harbor at noon. " * 20, encoding="utf-8")
    flags = [str(file), "--load", str(folder / "run"), "--include_path", str(FIXTURES), "--perplexity", str(text)]
    flags += ["--eval_tasks", "harbor_choice", "harbor_last", "--eval_results_prefix"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder / "cache")
        patch.chdir(FIXTURES)
        alone, _ = parse_run([*flags, str(folder / "alone")], "eval.py")
        run_evaluation(alone)
        runs = [[*flags, str(folder / "tensor"), "--set", "model_parallel_size=2"], [*flags, str(folder / "data")]]
        return run_ranks(2, in_turn, str(tokenizer_file), [(1, [1, 8, "auto"]), (2, [8])], runs), folder


@pytest.mark.processes
def test_all_ranks_see_the_scores_of_one(alone: list[dict[str, Any]], of_two: tuple[list[Any], Path]) -> None:
    (first, _), (other, _) = of_two[0]
    assert other == first and len(first) == 2
    for found in (*first[0], *first[1]):
        assert_same_scores(found, alone[0])


@pytest.mark.processes
def test_four_ranks_share_requests_and_tensors(tokenizer_file: Path, alone: list[dict[str, Any]]) -> None:
    first, *others = run_ranks(4, scores, str(tokenizer_file), 2, ["auto"])
    assert all(other == first for other in others)
    assert_same_scores(first[0], alone[0])


@pytest.mark.processes
def test_ranks_that_share_requests_or_tensors_write_the_results_of_one_process(of_two: tuple[list[Any], Path]) -> None:
    (_, first), (_, other) = of_two[0]
    assert (first, other) == ([1, 1], [0, 0]), "the first rank prints"
    expected, *others = (results_of(of_two[1], prefix) for prefix in ("alone", "tensor", "data"))
    for task, values in expected.items():
        for key, value in values.items():
            same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert [other[task][key] for other in others] == [same] * 2, key
