"""eval.py's run: results, table, results file, and what it says when something is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from eval_tasks.adapter import TokenFormerLM
from eval_tasks.results import results_path
from eval_tasks.run import find_tasks, run_evaluation
from megatron.config import EvaluationConfig, RunConfig
from megatron.errors import UserError
from megatron.inference import load_model
from megatron.log import get_logger
from megatron.tokenizer import HFTokenizer
from tests.random_models import make_config, save_random_models

FIXTURES = Path(__file__).parents[1] / "fixtures" / "eval"


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The task's data lies in the current folder; nothing is cached outside of the test."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.chdir(FIXTURES)


@pytest.fixture
def config(tmp_path: Path, tokenizer_file: Path) -> RunConfig:
    keys: dict[str, Any] = {
        "padded_vocab_size": 384,
        "tokenizer_type": "HFTokenizer",
        "vocab_file": str(tokenizer_file),
        "load": str(tmp_path / "run"),
        "include_path": str(FIXTURES),
        "eval_tasks": ["harbor_choice"],
        "eval_results_prefix": str(tmp_path / "results" / "tiny"),
    }
    config = make_config(**keys)
    save_random_models(tmp_path / "run", config, (7,))
    return config


def with_evaluation(config: RunConfig, **keys: Any) -> RunConfig:
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=keys)})


def test_accuracy_is_that_of_the_most_likely_choice(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = run_evaluation(config)
    lm = TokenFormerLM(load_model(tmp_path / "run"), HFTokenizer(str(config.tokenizer.vocab_file)), progress=False)
    correct = correct_norm = 0
    for line in (FIXTURES / "harbor_choice.jsonl").read_text(encoding="utf-8").splitlines():
        document = json.loads(line)
        pairs = [lm._encode_pair(document["context"], " " + choice) for choice in document["choices"]]
        scores = [score for score, _ in lm._loglikelihood_tokens([(("", ""), *pair) for pair in pairs])]
        per_character = [score / len(choice) for score, choice in zip(scores, document["choices"], strict=True)]
        correct += scores.index(max(scores)) == document["label"]
        correct_norm += per_character.index(max(per_character)) == document["label"]
    found = results["results"]["harbor_choice"]
    assert (found["acc,none"], found["acc_norm,none"]) == (correct / 5, correct_norm / 5)
    printed = capsys.readouterr().out
    assert f"harbor_choice  acc       {correct / 5:.4f}" in printed
    (written,) = (tmp_path / "results").glob("tiny_eval_results_*.json")
    assert json.loads(written.read_text(encoding="utf-8"))["results"]["harbor_choice"] == found
    assert results["checkpoint"].endswith("global_step7")


def test_patterns_limits_and_resampled_errors_work(config: RunConfig) -> None:
    results = run_evaluation(with_evaluation(config, eval_tasks=["harbor_*"], eval_limit=3, num_fewshot=0))
    assert set(results["results"]) == {"harbor_choice", "harbor_last", "harbor_text"}
    assert results["n-samples"]["harbor_choice"]["effective"] == 3
    assert results["results"]["harbor_text"]["word_perplexity,none"] > 1
    assert results["results"]["harbor_last"]["perplexity_stderr,none"] > 0


def test_perplexity_stands_beside_the_tasks_and_needs_no_lm_eval(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("The ferry leaves the harbor at noon. " * 9, encoding="utf-8")
    both = run_evaluation(with_evaluation(config, perplexity_data=str(text)))["results"]
    assert set(both) == {"harbor_choice", "perplexity"}
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    found = run_evaluation(with_evaluation(config, perplexity_data=str(text), eval_tasks=None, eval_limit=1))
    assert found["configs"]["perplexity"] == {"limit": 1}, "a figure of a part of the text has to say so"
    alone = found["results"]
    assert alone == {"perplexity": both["perplexity"]}
    assert (alone["perplexity"]["num_words"], alone["perplexity"]["stride"]) == (63, 24)
    assert alone["perplexity"]["word_perplexity,none"] > alone["perplexity"]["token_perplexity,none"] > 1
    rows = [line.split()[1:3] for line in capsys.readouterr().out.splitlines()]
    assert ["token_perplexity", f"{alone['perplexity']['token_perplexity,none']:.4f}"] in rows


def test_sparse_inference_says_what_it_used(
    config: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "held_out.txt"
    text.write_text("The ferry leaves the harbor at noon. " * 9, encoding="utf-8")
    dense = with_evaluation(config, perplexity_data=str(text), eval_tasks=None)
    whole, part = (run_evaluation(one) for one in (dense, dense.replaced(**{"evaluation.pattention_top_k": 0.25})))
    assert part["tokens_used"] == {"qkv": 0.25, "proj": 0.25, "ffn": 0.25} and "tokens_used" not in whole
    assert part["results"]["perplexity"]["loss,none"] != whole["results"]["perplexity"]["loss,none"]
    assert "parameter tokens used: qkv 25.00%, proj 25.00%, ffn 25.00%" in capsys.readouterr().out
    (written,) = (
        json.loads(path.read_text()) for path in tmp_path.glob("results/*.json") if "tokens_used" in path.read_text()
    )
    assert written["tokens_used"] == part["tokens_used"]


def test_results_go_to_tensorboard_and_wandb(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[dict[str, float]] = []

    class Sink:
        def __init__(self, place: Any) -> None: ...

        def write(self, metrics: dict[str, float]) -> None:
            written.append(metrics)

        def close(self) -> None: ...

    for name in ("TensorBoard", "WandB"):
        monkeypatch.setattr(f"eval_tasks.results.{name}", Sink)
    boards = config.logging.model_copy(update={"tensorboard_dir": str(tmp_path / "board"), "use_wandb": True})
    results = run_evaluation(config.model_copy(update={"logging": boards}))["results"]["harbor_choice"]
    assert len(written) == 2 and written[0] == written[1]
    assert written[0]["iteration"] == 7
    assert written[0]["eval/harbor_choice/acc"] == results["acc,none"]


def test_missing_tasks_and_folders_are_named_before_the_model_is_loaded(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr("eval_tasks.run.load_for_inference", lambda *_: pytest.fail("a model takes minutes"))

    # lm-eval's thousands of own tasks take seconds to read and would add nothing.
    monkeypatch.setattr(
        "lm_eval.tasks.TaskManager",
        lambda include_path, include_defaults=False: TaskManager(include_path=include_path, include_defaults=False),
    )
    for keys, message in [
        ({"eval_tasks": None}, "eval_tasks: missing"),
        ({"eval_tasks": ["harbour_choice"]}, "unknown task 'harbour_choice'; did you mean harbor_choice"),
        ({"eval_tasks": ["zzz"]}, "unknown task 'zzz'; `lm_eval ls tasks` lists all names"),
        ({"include_path": "/nowhere"}, "include_path: /nowhere is not a folder"),
        ({"perplexity_data": "absent.txt"}, "perplexity_data: absent.txt is neither the prefix of"),
        ({"perplexity_data": "harbor_choice.jsonl", "perplexity_stride": 49}, "perplexity_stride: 49 skips tokens"),
    ]:
        with pytest.raises(UserError, match=message):
            run_evaluation(with_evaluation(config, **keys))


def test_missing_checkpoint_is_named_before_tasks_are_looked_up(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval_tasks.run.find_tasks", lambda options: pytest.fail("lm-eval's index takes seconds"))
    (tmp_path / "empty").mkdir()
    for keys, message in [
        ({"load": None}, "load: no checkpoint configured"),
        ({"load": str(tmp_path / "empty")}, "load: no checkpoint in .*empty; train first"),
        ({"load": str(tmp_path / "absent")}, "load: .*absent does not exist"),
        ({"eval_ckpt": str(tmp_path / "empty")}, "eval_ckpt: no checkpoint in"),
        ({"iteration": 8}, "load: .*global_step8 is not a complete checkpoint"),
    ]:
        checkpoint = config.checkpoint.model_copy(update=keys)
        with pytest.raises(UserError, match=message):
            run_evaluation(config.model_copy(update={"checkpoint": checkpoint}))


def test_a_board_that_fails_costs_a_warning(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(get_logger(), "propagate", True)
    monkeypatch.setitem(sys.modules, "wandb", None)
    (tmp_path / "file").write_text("")
    boards = config.logging.model_copy(update={"tensorboard_dir": str(tmp_path / "file"), "use_wandb": True})
    run_evaluation(config.model_copy(update={"logging": boards}))
    for name in ("tensorboard_dir", "use_wandb"):
        assert any(line.startswith(f"{name}: the results are not logged there: ") for line in caplog.messages)
    assert list((tmp_path / "results").glob("tiny_eval_results_*.json"))


def test_missing_data_is_reported_with_the_task(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="the data of harbor_choice cannot be loaded"):
        run_evaluation(config)


OWN_TASK = """
task: own
dataset_path: json
dataset_kwargs: {data_files: {test: own.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
target_delimiter: ""
"""
DOCUMENT = {"question": "The ferry", "choices": [" leaves", " stays"], "label": 0}


@pytest.mark.parametrize(
    ("change", "document", "message"),
    [
        ({}, {"choices": ["", "b"]}, r"IndexError.*\(document .*'choices': \['', 'b'\]"),
        ({}, {"choices": []}, r"IndexError.*\(document .*'choices': \[\]"),
        ({}, {"label": 7}, r"IndexError.*\(document .*'label': 7"),
        ({"doc_to_text": "{{missing}}"}, {}, "UndefinedError: 'missing' is undefined"),
        ({"doc_to_text": "{{question"}, {}, "TemplateSyntaxError"),
        ({"test_split": "train"}, {}, "KeyError: 'train'"),
        ({"output_type": "none"}, {}, "invalid output_type 'none'"),
        ({"no_such_key": 1}, {}, "unexpected keyword argument 'no_such_key'"),
        ({}, "{", "JSON parse error"),
        ({}, "", "StopIteration"),
    ],
)
def test_mistakes_in_a_task_are_one_line_with_its_name(
    config: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any, document: Any, message: str
) -> None:
    (tmp_path / "own.yaml").write_text(yaml.safe_dump({**yaml.safe_load(OWN_TASK), **change}))
    text = document if isinstance(document, str) else json.dumps({**DOCUMENT, **document}) + "\n"
    (tmp_path / "own.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=f"eval_tasks: own cannot be evaluated: .*{message}") as error:
        run_evaluation(with_evaluation(config, eval_tasks=["own"], include_path=str(tmp_path)))
    assert "\n" not in str(error.value)


def test_a_fault_of_our_own_is_not_taken_for_one_of_a_task(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron.evaluation.scoring.token_losses", lambda logits, labels: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_evaluation(config)


def test_missing_package_names_its_requirements(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UserError, match="pip install -r requirements/requirements-eval.txt"):
        run_evaluation(config)


def test_own_tasks_are_found_without_reading_lm_evals() -> None:
    names, manager = find_tasks(EvaluationConfig(eval_tasks=["harbor_text"], include_path=str(FIXTURES)))
    assert names == ["harbor_text"]
    assert manager.all_tasks == ["harbor_choice", "harbor_last", "harbor_text"]


@pytest.mark.parametrize(
    ("prefix", "start"), [("", "eval_results_"), ("a", "a_eval_results_"), ("b/", "b/eval_results_"), ("c_", "c_eval")]
)
def test_results_file_begins_with_the_prefix(prefix: str, start: str) -> None:
    assert str(results_path(prefix)).startswith(start)
