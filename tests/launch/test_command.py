"""The launcher's command of a configuration, and what is refused before a process starts."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megatron.config import resolve_config
from megatron.errors import UserError
from megatron.launch import command as command_module
from megatron.launch import launch
from megatron.launch import start as start_module
from megatron.launch.command import make_call
from megatron.launch.supervise import LauncherCall
from megatron.mpu import environment as process_environment
from tests.launch.calls import DEMO, call_of, option


def test_a_cpu_machine_gets_one_local_process() -> None:
    call = call_of([])
    assert call.command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert "--no_local_rank" in call.command
    assert option(call.command, "--num_gpus") == "1"
    assert call.command[-4:] == ["train.py", "a.yml", "--set", "x=1"]
    assert call.environment == {"DS_ACCELERATOR": "cpu"}


def test_a_gpu_machine_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_environment, "_DEVICE_FILES", ("/dev/null",))
    call = call_of([])
    assert "--num_gpus" not in call.command and call.environment == {}
    assert option(call_of(["num_gpus=4"]).command, "--num_gpus") == "4"
    assert option(call_of(["include='localhost:0,1'"]).command, "--include") == "localhost:0,1"


def test_slurm_launcher_of_published_configs_starts_locally() -> None:
    call = call_of(["launcher=slurm", "deepspeed_slurm=false"])
    assert "--launcher" not in call.command


def test_runs_on_one_machine_get_ports_of_their_own_unless_one_is_given() -> None:
    ports = {option(call_of([]).command, "--master_port") for _ in range(3)}
    assert len(ports) > 1 and "29500" not in ports
    assert option(call_of(["master_port=29501"]).command, "--master_port") == "29501"


@pytest.mark.usefixtures("all_launchers")
def test_several_hosts_use_the_launcher(hostfile: str) -> None:
    call = call_of([f"hostfile={hostfile}", "launcher=pdsh", "no_ssh_check=true"])
    assert option(call.command, "--launcher") == "pdsh"
    assert option(call.command, "--master_addr") == "node1"
    assert "--force_multi" in call.command and "--no_ssh_check" in call.command
    assert call_of([f"hostfile={hostfile}", "launcher=pdsh"], {"MASTER_ADDR": "10.0.0.1"}).environment == {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }


@pytest.mark.usefixtures("all_launchers")
def test_slurm_places_ranks_evenly(hostfile: str) -> None:
    call = call_of([f"hostfile={hostfile}", "deepspeed_slurm=true", "comment='two words'", "launcher_args=--exclusive"])
    extra = next(word for word in call.command if word.startswith("--launcher_args="))
    assert extra == (
        "--launcher_args=--nodes=2 --ntasks-per-node=2 --kill-on-bad-exit=1 '--comment=two words' --exclusive"
    )
    # srun kills its tasks on SIGTERM and passes SIGUSR1 on to them.
    assert call.signal_depth == 1 and call.stop_signal == signal.SIGUSR1


@pytest.mark.usefixtures("all_launchers")
def test_nodes_and_gpus_can_be_limited_together(hostfile: str) -> None:
    call = call_of([f"hostfile={hostfile}", "launcher=pdsh", "num_nodes=2", "num_gpus=1"])
    assert (option(call.command, "--num_nodes"), option(call.command, "--num_gpus")) == ("2", "1")
    one = call_of([f"hostfile={hostfile}", "num_nodes=1"])
    assert option(one.command, "--num_nodes") == "1" and "--launcher" not in one.command


@pytest.mark.usefixtures("all_launchers")
def test_pdsh_stops_the_workers_of_this_run_and_no_others(hostfile: str) -> None:
    call = call_of([f"hostfile={hostfile}", "launcher=pdsh"])
    assert call.stop_command is not None
    assert call.stop_command[:5] == ["pdsh", "-R", "ssh", "-w", "node1"], "one rank is enough"
    pattern = shlex.split(call.stop_command[-1])[-1]
    worker = f"{sys.executable} -u train.py a.yml --set x=1"
    assert re.search(pattern, worker)
    launcher = f"{sys.executable} -u -m deepspeed.launcher.launch --node_rank=0 train.py a.yml --set x=1"
    for other in (launcher, f"{worker}2", f"/bin/sh -c pkill {pattern}"):
        assert not re.search(pattern, other)


@pytest.mark.parametrize(
    "name", ["node1;id", "$(id)", "`id`", "^/etc/hosts", "-node1", "node[1-3]", "a&b", "x|y", "a,b"]
)
def test_what_is_no_host_name_does_not_reach_a_shell_or_pdsh(tmp_path: Path, name: str) -> None:
    (tmp_path / "hosts").write_text(f"node1 slots=2\n{name} slots=2\n")
    with pytest.raises(UserError, match=f":2: '{re.escape(name)}' is no host name"):
        call_of([f"hostfile={tmp_path / 'hosts'}", "launcher=pdsh"])


@pytest.mark.usefixtures("all_launchers")
def test_other_words_that_pdsh_gives_to_a_remote_shell_are_checked(
    hostfile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"hostfile={hostfile}", "launcher=pdsh"]
    assert call_of(keys, {"NCCL_IB_HCA": "^mlx5_2:1,=a", "OTHER": "a;b"}).stop_command
    for extra, env, name in (
        (["master_addr='n;id'"], {}, "MASTER_ADDR 'n;id'"), ([], {"NCCL_DEBUG": "$(id)"}, "NCCL_DEBUG"),
        ([], {"PYTHONPATH": "/a b"}, "PYTHONPATH"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(name)):
            call_of([*keys, *extra], env)
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(UserError, match="working folder"):
        call_of(keys)


@pytest.mark.launches
@pytest.mark.parametrize("word", ["{type:Adam}", "a;b&c*", "it's $HOME", 'a "b" \\ `c`', "(x y)", "runs/a_1.yml"])
def test_arguments_reach_the_workers_of_pdsh_as_they_are(word: str) -> None:
    given = command_module._remote_words([word])[0]
    by_deepspeed = '"{}"'.format(given.replace('"', '\\"')) if " " in given else given
    result = subprocess.run(["sh", "-c", f"printf %s {by_deepspeed}"], capture_output=True, text=True, check=True)
    assert result.stdout == word


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["hostfile=/"], "hostfile: / cannot be read: Is a directory"),
        (["deepspeed_slurm=true"], "this is not inside a Slurm allocation"),
        (["force_multi=true"], "force_multi: needs a hostfile"),
        (["num_nodes=2"], "num_nodes: 2 nodes need a hostfile"),
    ],
)
def test_impossible_launches_are_one_line(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call_of(overrides)


def test_a_layout_that_does_not_fit_the_processes_is_refused_before_any_starts(
    hostfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [f"hostfile={hostfile}", "launcher=pdsh"]
    monkeypatch.setattr(command_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert call_of([*nodes, "model_parallel_size=2", "pipe_parallel_size=2"]).stop_command
    for keys, processes in ((["num_nodes=1"], 2), (["include='node1@node2:1'"], 3), (["exclude='node2:0'"], 3)):
        with pytest.raises(UserError, match=f"{processes} processes cannot hold pipe_parallel_size 2 x model_parallel"):
            call_of([*nodes, *keys, "model_parallel_size=2", "pipe_parallel_size=2"])
    with pytest.raises(UserError, match="1 process cannot hold"):
        call_of(["model_parallel_size=2"])


def test_a_batch_that_does_not_fit_the_processes_is_refused_before_any_starts() -> None:
    keys = ["train_batch_size=12", "train_micro_batch_size_per_gpu=2"]
    call_of([*keys, "num_gpus=3"])
    call_of([*keys, "num_gpus=6", "pipe_parallel_size=2"])
    with pytest.raises(UserError, match="train_batch_size: 12 is not micro-batch 2 x accumulation 1 x 4 data-parallel"):
        call_of([*keys, "num_gpus=4"])


@pytest.mark.parametrize("script", ["eval.py", "tools/../generate.py"])
def test_evaluation_ignores_the_pipeline_and_the_batch(script: str) -> None:
    def call(*overrides: str) -> LauncherCall:
        return make_call(resolve_config(DEMO, list(overrides)), script, [], {})

    call("num_gpus=2", "pipe_parallel_size=2", "model_parallel_size=2", "train_batch_size=7")
    with pytest.raises(UserError, match="1 process cannot hold .* model_parallel_size 2"):
        call("num_gpus=1", "pipe_parallel_size=2", "model_parallel_size=2")
    if script == "eval.py":
        with pytest.raises(UserError, match="3 processes cannot hold .* model_parallel_size 2"):
            call("num_gpus=3", "model_parallel_size=2")
    else:  # generation needs one copy of the model
        call("num_gpus=3", "model_parallel_size=2")


def test_missing_launcher_program_is_named(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="launcher: pdsh needs the program `pdsh`"):
        call_of([f"hostfile={hostfile}", "launcher=pdsh"])


def test_errors_come_before_any_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(start_module, "run_call", lambda call: pytest.fail("a process was started"))
    script = tmp_path / "train.py"
    script.touch()
    with pytest.raises(UserError, match="sede: unknown key; did you mean seed"):
        launch([str(script), str(DEMO), "--set", "sede=1"])
    with pytest.raises(UserError, match="training needs train_iters"):
        launch([str(script), str(DEMO), "--set", "train_iters=null"])
    with pytest.raises(UserError, match="the first argument is the script to run"):
        launch([str(DEMO)])
    with pytest.raises(UserError, match="script 'nothing.py' not found"):
        launch(["nothing.py", str(DEMO)])
