"""Evaluation over processes and at any batch size equals that of one process, one request at a time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.inference.helpers import make_config, save_random_models
from tests.ranks import run_ranks

ROOT = Path(__file__).parents[2]
FIXTURES = ROOT / "tests" / "fixtures" / "eval"
TEXTS = [("The ferry leaves " * n, " the harbor" * (1 + n % 3)) for n in range(11)]


def scores(tokenizer_file: str, batch_size: Any, tensor_size: int = 1) -> dict[str, Any]:
    """What a rank sees of each kind of request, in fp32."""
    from lm_eval.api.instance import Instance

    from eval_tasks.adapter import TokenFormerLM
    from megatron.inference.ranks import DataRanks
    from megatron.launch import ensure_process_environment
    from megatron.mpu.processes import join
    from megatron.tokenizer import HFTokenizer
    from tests.inference.helpers import make_model

    ensure_process_environment()
    layout = join(tensor_size, "gloo")
    torch.set_num_threads(1)
    model = make_model(dtype=torch.float32, padded_vocab_size=384, layout=layout)
    ranks = DataRanks.of_layout(layout)
    lm = TokenFormerLM(model, HFTokenizer(tokenizer_file), batch_size, progress=False, ranks=ranks)

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


@pytest.mark.parametrize("batch_size", [8, "auto"])
def test_batch_size_does_not_change_scores(tokenizer_file: Path, batch_size: Any) -> None:
    assert_same_scores(scores(str(tokenizer_file), batch_size), scores(str(tokenizer_file), 1))


@pytest.mark.parametrize("batch_size", [1, 8, "auto"])
@pytest.mark.parametrize(("ranks", "tensor_size"), [(2, 1), (2, 2), (4, 2)])
def test_all_ranks_see_the_scores_of_one(tokenizer_file: Path, ranks: int, tensor_size: int, batch_size: Any) -> None:
    first, *others = run_ranks(ranks, scores, str(tokenizer_file), batch_size, tensor_size)
    assert all(other == first for other in others)
    assert_same_scores(first, scores(str(tokenizer_file), 1))


def test_the_launcher_starts_two_ranks_that_write_one_results_file(tmp_path: Path, tokenizer_file: Path) -> None:
    config = make_config(padded_vocab_size=384, tokenizer_type="HFTokenizer", vocab_file=str(tokenizer_file))
    save_random_models(tmp_path / "run", config, (7,))
    (tmp_path / "run.yml").write_text(yaml.safe_dump(config.flat()), encoding="utf-8")
    (tmp_path / "text.txt").write_text("The ferry leaves the harbor at noon. " * 20, encoding="utf-8")
    found = []
    for ranks, tensor_ranks in (("1", 1), ("2", 1), ("2", 2)):
        command = [sys.executable, str(ROOT / "deepy.py"), str(ROOT / "eval.py"), str(tmp_path / "run.yml")]
        command += ["--num_gpus", ranks, "--load", str(tmp_path / "run"), "--include_path", str(FIXTURES)]
        command += ["--eval_tasks", "harbor_choice", "harbor_last", "--perplexity", str(tmp_path / "text.txt")]
        prefix = f"{ranks}_{tensor_ranks}"
        command += ["--eval_results_prefix", str(tmp_path / prefix), "--set", f"model_parallel_size={tensor_ranks}"]
        cache = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "DS_ACCELERATOR": "cpu"}
        done = subprocess.run(command, cwd=FIXTURES, env={**os.environ, **cache}, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        (file,) = tmp_path.glob(f"{prefix}_eval_results_*.json")
        assert done.stdout.count("token_perplexity") == 1
        found.append(yaml.safe_load(file.read_text(encoding="utf-8"))["results"])
    for task, values in found[0].items():
        for key, value in values.items():
            expected = pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
            assert [other[task][key] for other in found[1:]] == [expected] * 2, key
