"""deepy.py --dry-run: the command, the processes and the plan, of a cluster that need not be here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from megatron.errors import UserError, run_command
from megatron.launch import launch
from tests.planner.workloads import ROOT


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("megatron.mpu.environment._DEVICE_FILES", ())
    monkeypatch.setattr("megatron.config.hostfile.CLUSTER_HOSTFILE", "/nonexistent/hostfile")
    monkeypatch.setattr("megatron.launch.start.run_call", lambda call: pytest.fail("a process was started"))
    monkeypatch.delenv("DLTS_HOSTFILE", raising=False)


@pytest.mark.usefixtures("_here")
def test_dry_run_prints_command_world_and_plan(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.py", "-d", "configs", "tokenformer/150M_train_pile.yml", "--dry-run", "--machine", "A100-40GB"]
    assert launch([*arguments, "--gpus=8"]) == 0
    command, world, machine, *_ = capsys.readouterr().out.splitlines()
    assert command.endswith("train.py -d configs tokenformer/150M_train_pile.yml")
    assert world == "world: nodes x processes 1 x 1 -> data 1 x pipeline 1 x tensor 1"
    assert machine.startswith("machine: A100-40GB")
    assert "WORLD_SIZE" not in os.environ or os.environ["WORLD_SIZE"] == "1"


@pytest.mark.usefixtures("_here")
def test_dry_run_plans_for_a_cluster_that_is_not_here(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.py", "configs/tokenformer/150M_train_pile.yml", "--set", "model_parallel_size=4", "--dry-run"]
    assert launch([*arguments, "--gpus", "8"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("command: none here: ")
    assert "\nconfigured" in output
    assert run_command(lambda: launch(arguments)) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpus", "8"], "--gpus and --machine are for --dry-run"),
        (["--dry-run", "--gpus", "0"], "expected a positive whole number, got '0'"),
        (["--dry-run", "--machine", "B300"], "'B300' is neither a file nor one of H200-141GB"),
    ],
)
def test_mistakes_in_plan_flags_are_one_line(flags: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        launch(["train.py", "configs/demo.yml", *flags])
    assert message in str(error.value)


@pytest.mark.usefixtures("_here")
def test_a_model_alone_is_planned(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.yml").write_text("num_layers: 2\nhidden_size: 64\nnum_attention_heads: 4\nseq_length: 32\n")
    assert launch(["train.py", str(tmp_path / "model.yml"), "--dry-run", "--gpus", "8"]) == 0
    output = capsys.readouterr().out
    assert "batch: unknown, train_micro_batch_size_per_gpu 1 assumed" in output and "\nconfigured " in output
    assert run_command(lambda: launch(["train.py", str(tmp_path / "model.yml")])) == 2
    assert "training needs train_iters, train_micro_batch_size_per_gpu, data_path" in capsys.readouterr().err


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("override", "gpus"),
    [("launcher=pdsh", 4), ("launcher=openmpi", 4), ("deepspeed_slurm=true", 8), ("num_gpus=2", 4)],
)
def test_launchers_need_not_be_installed_to_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], override: str, gpus: int
) -> None:
    monkeypatch.setattr("megatron.launch.command.shutil.which", lambda name: None)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    (tmp_path / "hosts").write_text("node1 slots=2\nnode2 slots=2\n")
    hostfile = [] if "slurm" in override else ["--set", f"hostfile={tmp_path / 'hosts'}"]
    arguments = ["train.py", "configs/tokenformer/150M_train_pile.yml", *hostfile, "--set", override]
    assert launch([*arguments, "--dry-run"]) == 0
    output = capsys.readouterr().out
    assert output.startswith("command: ") and f"number of GPUs: {gpus}" in output and "\nconfigured" in output
    assert run_command(lambda: launch(arguments)) == 2


@pytest.mark.usefixtures("_here")
def test_more_gpus_keep_the_update_or_say_that_they_do_not(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["train.py", "configs/tokenformer/150M_train_pile.yml", "--dry-run", "--gpus", "64"]

    def update(*flags: str) -> str:
        assert launch([*arguments, *flags]) == 0
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith("update: "))

    assert update() == (
        "update: 8192 samples x 2048 tokens, number of GPUs: 64 (128 samples a data rank: it grows with the GPUs; "
        "give train_batch_size to keep it)"
    )
    kept = ["--set", "train_batch_size=1024", "--set", "gradient_accumulation_steps=null"]
    assert update(*kept) == "update: 1024 samples x 2048 tokens, number of GPUs: 64"
