"""The continuation task: what is asked, and that lm-eval can read it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from eval_tasks.adapter import TokenFormerLM
from eval_tasks.local import long_sentences, write_continuation_task
from megatron.errors import UserError

ROOT = Path(__file__).parents[2]


def make_texts(count: int = 40) -> list[str]:
    """Sentences of 24 words, every word telling its sentence and place."""
    return [" ".join(f"S{i}w{j}" for j in range(24)) + ". Too short. " for i in range(count)]


def documents_of(task_file: Path) -> list[dict]:
    return [json.loads(line) for line in task_file.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()]


def test_the_true_continuation_is_among_four_of_equal_length(tmp_path: Path) -> None:
    documents = documents_of(write_continuation_task(make_texts(), tmp_path, num_documents=30))
    assert len(documents) == len({document["context"] for document in documents}) == 30
    for document in documents:
        sentence = document["context"].split("w")[0]
        assert document["context"].split() == [f"{sentence}w{j}" for j in range(12)]
        assert len(set(document["choices"])) == 4
        assert document["choices"][document["label"]].split() == [f"{sentence}w{j}" for j in range(12, 20)]
        for choice in document["choices"]:
            assert [word.split("w")[1] for word in choice.split()] == [str(j) for j in range(12, 20)]
    assert {document["label"] for document in documents} == {0, 1, 2, 3}


def test_word_order_distractors_are_the_true_words_in_other_orders(tmp_path: Path) -> None:
    task = write_continuation_task(make_texts(), tmp_path, num_documents=30, distractors="word_order")
    for document in documents_of(task):
        truth = document["choices"][document["label"]]
        assert [word.split("w")[1] for word in truth.split()] == [str(j) for j in range(12, 20)]
        assert len(set(document["choices"])) == 4
        assert len({tuple(sorted(choice.split())) for choice in document["choices"]}) == 1


def test_seed_decides_the_files(tmp_path: Path) -> None:
    files = [
        write_continuation_task(make_texts(), tmp_path / name, num_documents=9, seed=seed).with_suffix(".jsonl")
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    contents = [file.read_bytes() for file in files]
    assert contents[0] == contents[1] != contents[2]


def test_sentences_do_not_cross_lines_and_are_distinct() -> None:
    long = " ".join(f"Word{i}" for i in range(25))
    assert long_sentences([f"{long}. Short one.\n{long}.", "half a\n" * 30]) == [f"{long}.".split()]


def test_too_little_text_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="200 documents need as many sentences of 20 words, the texts hold 40"):
        write_continuation_task(make_texts(), tmp_path)


def test_lm_eval_runs_the_task_by_its_yaml(tmp_path: Path, lm: TokenFormerLM, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    lm.max_length = 400
    write_continuation_task(make_texts(), tmp_path, "held_out", num_documents=6)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    results = simple_evaluate(lm, tasks=["held_out"], task_manager=manager, bootstrap_iters=0)
    assert results is not None
    assert results["n-samples"]["held_out"]["original"] == 6
    assert {"acc,none", "acc_norm,none"} <= set(results["results"]["held_out"])


@pytest.mark.launches
def test_command_line_writes_the_task(tmp_path: Path) -> None:
    text, jsonl = tmp_path / "a.txt", tmp_path / "b.jsonl"
    text.write_text("\n".join(make_texts(10)), encoding="utf-8")
    # A line separator inside a JSON string does not end the line.
    jsonl.write_text(
        "".join(json.dumps({"body": t + "\u2028x"}, ensure_ascii=False) + "\n" for t in make_texts(12)[10:])
    )
    command = [sys.executable, str(ROOT / "tools/datasets/make_demo_task.py"), "--input", str(text), str(jsonl)]
    options = ["--jsonl-key", "body", "--output", str(tmp_path / "task"), "--name", "own", "--num-documents", "12"]
    done = subprocess.run(command + options, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "task" / "own.yaml").read_text())["task"] == "own"
    assert len(documents_of(tmp_path / "task" / "own.yaml")) == 12
    command[command.index(str(jsonl))] = str(tmp_path / "absent")
    done = subprocess.run(command + options, capture_output=True, text=True, cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "absent cannot be read" in done.stderr
