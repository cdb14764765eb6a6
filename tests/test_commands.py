"""A user's mistake ends every command with one line and exit code 2, and leaves nothing behind."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron.errors import run_command
from tests.conftest import TINY

pytestmark = pytest.mark.usefixtures("single_process")
Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(
    tmp_path: Path, tokenizer_file: Path, corpus_prefix: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> Command:
    """Runs a script's main with a small configuration; returns exit code and stderr."""

    def run(script: str, *flags: str, **keys: Any) -> tuple[int, str]:
        paths = {"vocab_file": str(tokenizer_file), "data_path": corpus_prefix, "save": str(tmp_path / "out")}
        file = tmp_path / "run.yml"
        file.write_text(yaml.safe_dump({**TINY, **paths, **keys}), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [f"{script}.py", str(file), *flags])
        monkeypatch.setattr("megatron.training.loop.shut_down", lambda: None)  # other tests share the process group
        capsys.readouterr()
        code = run_command(importlib.import_module(script).main)
        return code, capsys.readouterr().err

    return run


def half(source: str, target: Path, damaged: str) -> str:
    """A copy of a .bin/.idx pair, one of them cut in half."""
    for ending in (".bin", ".idx"):
        content = Path(source + ending).read_bytes()
        Path(str(target) + ending).write_bytes(content[: len(content) // 2] if ending == damaged else content)
    return str(target)


MISTAKES = [
    pytest.param({"seq_lenght": 16}, ["seq_lenght", "run.yml", "seq_length"], id="unknown key"),
    pytest.param({"num_layers": "two"}, ["num_layers", "run.yml", "two"], id="wrong type"),
    pytest.param({"hidden_size": 33}, ["num_attention_heads", "33"], id="heads do not divide hidden size"),
    pytest.param({"precision": "fp16"}, ["fp16", "GPU", "precision=bf16"], id="fp16 on a CPU"),
    pytest.param({"padded_vocab_size": 64}, ["padded_vocab_size: 64", "290 token ids"], id="tokenizer too large"),
    pytest.param({"vocab_size": 289}, ["vocab_size: 289 is below the 290 token ids", "run.yml:"], id="vocab_size"),
    pytest.param({"vocab_file": "nowhere/tokenizer.json"}, ["vocab_file", "nowhere"], id="missing tokenizer"),
    pytest.param({"data_path": "nowhere/corpus"}, ["nowhere/corpus"], id="missing data"),
    pytest.param({"train_batch_size": 7}, ["train_batch_size", "7"], id="batch sizes that do not fit"),
    pytest.param({"optimizer": {"type": "OneBitAdam"}}, ["OneBitAdam", "AdamW"], id="unknown optimizer"),
    pytest.param({"optimizer": {"type": "FusedAdam"}}, ["FusedAdam", "GPU"], id="GPU optimizer on a CPU"),
    pytest.param(
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": "abc"}}, ["reduce_bucket_size", "abc"], id="ZeRO value"
    ),
    pytest.param(
        {"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "nvme"}}},
        ["offload_optimizer.device: nvme"],
        id="offload to a disk",
    ),
    pytest.param(
        {"optimizer": {"type": "Muon"}, "zero_optimization": {"stage": 1}},
        ["gradient_clipping: 1.0", "Muon"],
        id="Muon",
    ),
    pytest.param({"load": __file__}, ["load: ", "is a file"], id="load names a file"),
    pytest.param({"save": f"{__file__}/out"}, ["save: ", "cannot be written"], id="save cannot be written"),
    pytest.param({"log_dir": f"{__file__}/logs"}, ["log_dir: ", "cannot be written"], id="log_dir cannot be written"),
    pytest.param({"model_parallel_size": 2}, ["model_parallel_size"], id="tensor parallelism"),
    pytest.param({"cross_entropy": "quack"}, ["cross_entropy: quack needs a GPU", "cross_entropy=auto"], id="quack"),
    pytest.param(
        {"cross_entropy": "liger", "model_parallel_size": 2}, ["cross_entropy: liger needs", "whole"], id="liger tp"
    ),
    pytest.param({"attention_backend": "flash_attn"}, ["flash_attn", "pip install"], id="flash-attn not installed"),
]


@pytest.mark.parametrize(("keys", "words"), MISTAKES)
def test_mistakes_in_a_training_configuration(
    command: Command, tmp_path: Path, keys: dict[str, Any], words: list[str]
) -> None:
    code, error = command("train", **keys)
    assert code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
    assert all(word in error for word in words), error
    assert not (tmp_path / "out").exists()
    assert "run.yml:" in error or keys["optimizer"]["type"] == "Muon", "file and line of what was given are named"


@pytest.mark.parametrize("damaged", [".bin", ".idx"])
def test_data_files_cut_in_half(command: Command, tmp_path: Path, corpus_prefix: str, damaged: str) -> None:
    code, error = command("train", data_path=half(corpus_prefix, tmp_path / "cut", damaged))
    assert code == 2 and error.count("\n") == 1 and "cut" in error


@pytest.mark.parametrize("script", ["eval", "generate"])
def test_evaluation_and_generation_need_a_checkpoint(command: Command, tmp_path: Path, script: str) -> None:
    (tmp_path / "empty").mkdir()
    output = tmp_path / "samples.jsonl"
    output.write_text("earlier samples\n")
    keys = {"eval_tasks": ["anything"], "text_gen_type": "unconditional", "sample_output_file": str(output)}
    for load in (str(tmp_path / "empty"), str(tmp_path / "absent")):
        code, error = command(script, load=load, include_path=str(tmp_path), **keys)
        assert code == 2 and error.count("\n") == 1, error
        assert output.read_text() == "earlier samples\n"


def test_a_damaged_checkpoint_ends_training_with_one_line(command: Command, tmp_path: Path) -> None:
    assert command("train", train_iters=1)[0] == 0
    file = tmp_path / "out" / "global_step1" / "optimizer-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, error = command("train", train_iters=2, load=str(tmp_path / "out"))
    assert code == 2 and error.count("\n") == 1 and "optimizer-00000.safetensors" in error


def test_a_loss_that_is_not_finite_stops_before_the_update(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.tasks.language import LanguageTask

    real, calls = LanguageTask.loss, []

    def broken(*arguments: Any, **keywords: Any) -> Any:
        calls.append(1)
        return real(*arguments, **keywords) * (float("nan") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(LanguageTask, "loss", broken)
    code, error = command("train", checkpoint_factor=1)
    assert code == 2 and "lm_loss: nan is not finite" in error
    assert sorted(p.name for p in (tmp_path / "out").glob("global_step*")) == ["global_step1", "global_step2"]


def test_a_gradient_that_is_not_finite_stops_the_run(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.tasks.language import LanguageTask

    real, calls = LanguageTask.loss, []

    def steep(*arguments: Any, **keywords: Any) -> Any:
        loss = real(*arguments, **keywords)
        calls.append(1)
        if len(calls) == 3:
            loss.register_hook(lambda grad: grad * float("inf"))
        return loss

    monkeypatch.setattr(LanguageTask, "loss", steep)
    for stage in (0, 1):
        calls.clear()
        save = str(tmp_path / f"zero{stage}")
        code, error = command("train", checkpoint_factor=1, save=save, zero_optimization={"stage": stage})
        assert code == 2 and "grad_norm" in error and "not finite" in error, error
        assert (Path(save) / "latest").read_text().strip() == "global_step2"


def test_data_of_another_tokenizer_is_named(command: Command, tmp_path: Path) -> None:
    from megatron.data import IndexedDatasetBuilder

    with IndexedDatasetBuilder(tmp_path / "large", "int32") as builder:
        for _ in range(20):
            builder.add_document([5000] * 50)
        builder.finalize()
    code, error = command("train", data_path=str(tmp_path / "large"))
    assert code == 2 and "token id 5000" in error and "tokenizer" in error


def test_the_console_log_is_copied_to_log_dir(command: Command, tmp_path: Path) -> None:
    assert command("train", train_iters=2, log_dir=str(tmp_path / "logs"))[0] == 0
    log = (tmp_path / "logs" / "train.log").read_text()
    assert "iteration 2/2" in log
    assert (tmp_path / "logs" / "metrics.jsonl").is_file()
    assert command("train", train_iters=3, log_dir=str(tmp_path / "others"), save=str(tmp_path / "own"))[0] == 0
    assert "iteration 3/3" in (tmp_path / "others" / "train.log").read_text()
    assert (tmp_path / "logs" / "train.log").read_text() == log, "a second run in one process has a log of its own"


def test_tensorboard_events_are_written(command: Command, tmp_path: Path) -> None:
    assert command("train", train_iters=2, tensorboard_dir=str(tmp_path / "board"))[0] == 0
    assert list((tmp_path / "board").glob("events.out.tfevents.*"))


@pytest.mark.parametrize(
    "keys",
    [{"finetune": True}, {"no_load_optim": True}, {"no_load_rng": True}, {"iteration": 3}],
    ids=lambda keys: next(iter(keys)),
)
def test_what_promises_a_checkpoint_does_not_start_without_one(
    command: Command, tmp_path: Path, keys: dict[str, Any]
) -> None:
    (key,) = keys
    (tmp_path / "empty").mkdir()
    for load, where in ((None, "load is not given"), ("absent", "has none"), ("empty", "has none")):
        code, error = command("train", load=load and str(tmp_path / load), **keys)
        assert code == 2 and error.count("\n") == 1 and f"{key}: " in error, error
        assert load is None or f"run.yml:{line_of(tmp_path, key)}: {key}: " in error, error
        assert where in error
        assert not (tmp_path / "out").exists()


def line_of(folder: Path, key: str) -> int:
    """The line of run.yml that gives a key."""
    lines = (folder / "run.yml").read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if line.startswith(f"{key}:"))


def test_growth_that_goes_on_needs_a_smaller_model(command: Command, tmp_path: Path) -> None:
    code, error = command("train", partial_init_policy="continue")
    assert code == 2 and "partial_init_policy: continue" in error and "pretrain_partial_init is not given" in error
    code, error = command("train", pretrain_partial_init=str(tmp_path / "absent"))
    assert code == 2 and error.startswith("error: pretrain_partial_init: ")
    assert error.endswith(f"run.yml:{line_of(tmp_path, 'pretrain_partial_init')})\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("keys", [{"train_iters": 2**62}, {"eval_iters": 2**62, "train_iters": 10**9}])
def test_a_length_beyond_any_run_starts(command: Command, tmp_path: Path, keys: dict[str, Any]) -> None:
    code, error = command("train", **{"exit_interval": 1, **keys})
    assert code == 0, error
    assert (tmp_path / "out" / "latest").read_text().strip() == "global_step1"
