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
from megatron.tokenizer import HFTokenizer
from tests.random_models import make_config, save_random_models
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "eval"
TEXTS = [("The ferry leaves " * n, " the harbor" * (1 + n % 3)) for n in range(11)]


def scores(tokenizer_file: str, batch_sizes: Sequence[Any], tensor_size: int = 1) -> list[dict[str, Any]]:
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
    return scores(str(tokenizer_file), [1, 8, "auto"])


def test_batch_size_does_not_change_scores(alone: list[dict[str, Any]]) -> None:
    for found in alone[1:]:
        assert_same_scores(found, alone[0])


@pytest.mark.processes
@pytest.mark.parametrize(
    ("ranks", "tensor_size", "batch_sizes"), [(2, 1, [1, 8, "auto"]), (2, 2, [8]), (4, 2, ["auto"])]
)
def test_all_ranks_see_the_scores_of_one(
    tokenizer_file: Path, ranks: int, tensor_size: int, batch_sizes: list[Any], alone: list[dict[str, Any]]
) -> None:
    first, *others = run_ranks(ranks, scores, str(tokenizer_file), batch_sizes, tensor_size)
    assert all(other == first for other in others)
    for found in first:
        assert_same_scores(found, alone[0])


def evaluate(file: str, *flags: str) -> int:
    """eval.py in a rank that has its imports already; how often it prints a perplexity."""
    from eval import main

    os.chdir(FIXTURES)
    sys.argv = ["eval.py", file, *flags]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main() == 0
    return printed.getvalue().count("token_perplexity")


def results_of(folder: Path, prefix: str) -> dict[str, dict[str, Any]]:
    (file,) = folder.glob(f"{prefix}_eval_results_*.json")
    found: dict[str, dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))["results"]
    return found


@pytest.mark.processes
def test_ranks_that_share_requests_or_tensors_write_the_results_of_one_process(
    tmp_path: Path, tokenizer_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.chdir(FIXTURES)
    config = make_config(padded_vocab_size=384, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    save_random_models(tmp_path / "run", config, (7,))
    file, text = tmp_path / "run.yml", tmp_path / "text.txt"
    file.write_text(yaml.safe_dump(config.flat()), encoding="utf-8")
    text.write_text("The ferry leaves the harbor at noon. " * 20, encoding="utf-8")
    flags = ["--load", str(tmp_path / "run"), "--include_path", str(FIXTURES), "--perplexity", str(text)]
    flags += ["--eval_tasks", "harbor_choice", "harbor_last", "--eval_results_prefix"]

    alone, _ = parse_run([str(file), *flags, str(tmp_path / "alone")], "eval.py")
    run_evaluation(alone)
    for name, axis in (("tensor", ["--set", "model_parallel_size=2"]), ("data", [])):
        assert run_ranks(2, evaluate, str(file), *axis, *flags, str(tmp_path / name)) == [1, 0], name

    expected, *others = (results_of(tmp_path, prefix) for prefix in ("alone", "tensor", "data"))
    for task, values in expected.items():
        for key, value in values.items():
            same = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert [other[task][key] for other in others] == [same] * 2, key
