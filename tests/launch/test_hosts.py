"""Which nodes and processes a launch gets: hostfile, Slurm allocation, this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from megatron.config import resolve_config
from megatron.errors import UserError
from megatron.launch import launch
from megatron.launch import start as start_module
from megatron.launch.hosts import count_processes, find_hosts, read_hostfile
from megatron.launch.supervise import LauncherCall, Outcome, run_call
from megatron.mpu import environment as process_environment
from tests.launch.calls import DEMO, ROOT, call_of, option


def test_one_host_in_a_hostfile_is_this_machine(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("node1 slots=2\n")
    call = call_of([], {"DLTS_HOSTFILE": str(tmp_path / "one")})
    assert option(call.command, "--hostfile") == str(tmp_path / "one")
    assert option(call.command, "--master_addr") == "127.0.0.1"
    assert "--no_ssh_check" in call.command and "--force_multi" not in call.command


@pytest.mark.usefixtures("all_launchers")
def test_slurm_hosts_come_from_the_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho node1\necho node2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    call = call_of(["deepspeed_slurm=true"], {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "4"})
    written = option(call.command, "--hostfile")
    assert read_hostfile(written) == {"node1": 4, "node2": 4}
    finished = LauncherCall([sys.executable, "-c", ""], {}, written=call.written)
    assert run_call(finished).code == 0 and not Path(written).exists()


@pytest.mark.usefixtures("all_launchers")
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["launcher=local"], "launcher: local cannot start 2 nodes"),
        (["launcher=openmpi", "num_gpus=1"], "num_gpus: launcher openmpi cannot do this"),
        (["include=node3"], "include: host 'node3' is not in"),
        (["exclude=node1@node2"], "exclude: it leaves no host to run on"),
        (["exclude='node1:0,1@node2'"], "exclude: it leaves no host to run on"),
        (["include='node1:2'"], "include: host 'node1' has the slots 0 to 1, not 2"),
        (["include='node1:a'"], "include: expected `name` or `name:0,1`, joined by @, got 'node1:a'"),
        (["include=node1", "exclude=node2"], "include, exclude: give one of them"),
        (["include=node1", "num_nodes=1"], "include: cannot be combined with num_nodes"),
        (["launcher=openmpi", "num_nodes=1", "force_multi=true"], "num_nodes: launcher openmpi cannot do this"),
        (["launcher=slurm", "exclude='node1:0'"], "exclude: launcher slurm cannot pick slots"),
    ],
)
def test_mistakes_with_hosts_are_one_line(hostfile: str, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        call_of([f"hostfile={hostfile}", *overrides])


@pytest.mark.parametrize("given", ["key", "environment"])
def test_a_hostfile_that_is_not_there_means_this_machine(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = ["hostfile=/mock_path"] if given == "key" else []
    if given == "environment":
        monkeypatch.setenv("DLTS_HOSTFILE", "/mock_path")
    call = call_of(overrides, dict(os.environ))
    assert option(call.command, "--hostfile") == "/mock_path" and "--launcher" not in call.command
    started: list[object] = []
    monkeypatch.setattr(start_module, "run_call", lambda call: started.append(call) or Outcome(0))
    flags = [f"--set={override}" for override in overrides]
    assert launch(["train.py", "configs/demo.yml", *flags]) == 0 and len(started) == 1
    assert launch(["train.py", "configs/demo.yml", *flags, "--dry-run"]) == 0
    assert launch(["train.py", "configs/demo.yml", *flags, "--explain"]) == 0 and len(started) == 1
    printed, line = capsys.readouterr(), "/mock_path does not exist: the run is on this machine alone"
    assert (printed.err + printed.out).count(f"hostfile: {line}") == 2, "the launch and the plan say it"
    assert f": {line}\n" in printed.out.partition("launch:")[2] or given == "environment", "--explain says it"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("num_nodes=2", "hostfile: /mock_path does not exist, and num_nodes: 2 needs one; give an existing file"),
        ("deepspeed_slurm=true", "hostfile: /mock_path does not exist, and deepspeed_slurm: true starts what it names"),
        ("force_multi=true", "hostfile: /mock_path does not exist, and force_multi: true needs one"),
        ("include=worker-0", "include: 'worker-0' is neither a YAML file nor a host, for there is no hostfile"),
    ],
)
def test_a_hostfile_that_is_not_there_is_refused_where_other_keys_need_it(override: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        call_of(["hostfile=/mock_path", override])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("overrides", "files", "env", "expected"),
    [
        ([], 4, {}, 4),
        ([], 4, {"CUDA_VISIBLE_DEVICES": "1,3"}, 2),
        (["num_gpus=3"], 4, {}, 3),
        (["include='localhost:0,2'"], 4, {}, 2),
        (["exclude='localhost:3'"], 4, {}, 3),
        ([], 0, {}, None),
    ],
)
def test_processes_of_a_gpu_machine_are_its_device_files(
    overrides: list[str], files: int, env: dict[str, str], expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron.launch.hosts.has_accelerator", lambda env: True)
    monkeypatch.setattr(process_environment.glob, "glob", lambda pattern: [f"/dev/nvidia{n}" for n in range(files)])
    config = resolve_config(DEMO, overrides).config.launch
    assert count_processes(config, {}, env) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("node1\n", ":1: expected `name slots=8`, got 'node1'"),
        ("a slots=1\na slots=2\n", ":2: host 'a' is given twice"),
        ("# nothing\n", "no hosts in it"),
    ],
)
def test_hostfile_mistakes_have_a_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "hosts").write_text(text)
    with pytest.raises(UserError, match=message):
        read_hostfile(str(tmp_path / "hosts"))


def test_include_filters_hosts(hostfile: str) -> None:
    config = resolve_config(DEMO, [f"hostfile={hostfile}", "include='node2:0'"]).config.launch
    assert find_hosts(config, {}) == {"node2": 2}
    config = resolve_config(DEMO, [f"hostfile={hostfile}", "exclude='node2:0'"]).config.launch
    assert list(find_hosts(config, {})) == ["node1", "node2"]
