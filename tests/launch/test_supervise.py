"""Real launches: exit codes, signals, and nobody left behind."""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron.launch import supervise
from megatron.launch.culprit import Culprit, shell_code
from megatron.launch.supervise import LauncherCall, Outcome
from megatron.mpu.environment import free_port
from tests.launch.calls import DEMO, ROOT
from tests.launched import deepy, environment, training_lines, wait_until, write_config

SCRIPT = """
import os, signal, sys, time
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR")
print("worker", sys.argv[1:], [os.environ[name] for name in names], flush=True)
if "--limit" in sys.argv:
    signal.signal(signal.SIGTERM, lambda *args: (time.sleep(0.5), print("saved", flush=True), sys.exit(0)))
    print("ready", flush=True)
    time.sleep(60)
sys.exit(2)
"""


def start(script: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, str(ROOT / "deepy.py"), str(script), str(DEMO), *flags]
    # A background shell starts its commands with SIGINT ignored.
    heard = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    return subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heard
    )


@pytest.mark.launches
def test_exit_code_of_a_worker_comes_back_without_noise(tmp_path: Path) -> None:
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    process = start(script, "--iteration", "3")
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 2
    expected = f"worker {[str(DEMO), '--iteration', '3']} {['0', '0', '1', '127.0.0.1']}"
    assert output.splitlines() == [expected]


@pytest.mark.launches
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_reach_the_worker_which_saves(tmp_path: Path, number: signal.Signals) -> None:
    script = tmp_path / "generate.py"
    script.write_text(SCRIPT)
    process = start(script, "--limit", "1")
    assert process.stdout is not None
    for line in process.stdout:
        if line == "ready\n":
            break
    time.sleep(0.1)
    process.send_signal(number)
    output = process.communicate(timeout=60)[0]
    assert process.returncode == 0, output
    assert "saved" in output and "Traceback" not in output


def processes_below(pid: int) -> list[psutil.Process]:
    return [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]


@pytest.mark.launches
@pytest.mark.parametrize("killed", [False, True], ids=["SIGTERM to all", "SIGKILL to the launchers"])
def test_nothing_is_lost_and_nobody_is_left_when_all_or_the_launchers_are_struck(
    killed: bool, tmp_path: Path, tokenizer_file: Path, corpus_prefix: str
) -> None:
    save = tmp_path / "out"
    keys = {"train_iters": 1000000, "num_workers": 2, "save": str(save), "num_gpus": 1 if killed else 2}
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, **keys)
    with subprocess.Popen(
        deepy(config), cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert wait_until(lambda: training_lines(save) or process.poll() is not None, 90)
        everyone = processes_below(process.pid)
        assert len(everyone) == 6 if killed else 9, "deepy.py, two launchers, ranks with two loader workers each"
        for member in everyone[:3] if killed else everyone:
            with suppress(psutil.NoSuchProcess):
                member.send_signal(signal.SIGKILL if killed else signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert process.returncode == (-signal.SIGKILL if killed else 0), output
    assert "Traceback" not in output
    _, left = psutil.wait_procs(everyone, timeout=30)
    assert not left
    assert (save / "latest").read_text().strip() == f"global_step{training_lines(save)[-1]['iteration']}"


@pytest.mark.launches
def test_torchrun_trains_on_two_processes(tmp_path: Path, tokenizer_file: Path, corpus_prefix: str) -> None:
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, train_iters=2, log_dir=str(tmp_path))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port"]
    command += [str(free_port()), "train.py", str(config)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line["consumed_samples"] for line in training_lines(tmp_path)] == [8, 16], "4 samples a process"


def test_a_node_that_goes_on_after_another_has_failed_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package_log: pytest.LogCaptureFixture
) -> None:
    """As pdsh waits for ever for a worker that is stopped, or for a node that is lost."""
    monkeypatch.setattr(supervise, "_GRACE_SECONDS", 0.3)
    said = "import sys, time; print('pdsh@a: b: ssh exited with exit code 75', file=sys.stderr, flush=True); "
    for seconds, code in (("60", 137), ("0", 0)):
        marker = tmp_path / seconds
        call = LauncherCall(
            [sys.executable, "-c", f"{said} time.sleep({seconds})"], environment(), kill_command=["touch", str(marker)]
        )
        assert supervise.run_call(call) == Outcome(code, culprit=Culprit("b", None, 75))
        assert marker.exists() is ("killing them" in package_log.text) is (code == 137)
        package_log.clear()


@pytest.mark.parametrize(("code", "shell"), [(0, 0), (2, 2), (247, 137), (-15, 143)])
def test_killed_workers_have_the_shells_exit_code(code: int, shell: int) -> None:
    assert shell_code(code) == shell
