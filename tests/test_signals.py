"""Signals to a process that holds unsaved work, and processes that end with their parent."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron.errors import EXIT_LOST_RANK
from megatron.signals import STOP_SIGNALS, StopRequest, has_launcher
from tests.launched import environment, wait_until

pytestmark = pytest.mark.launches

ROOT = Path(__file__).parents[1]
# The main thread waits where no Python handler is run; `requested` is printed by a thread.
HOLDING = """
import signal, sys, threading, time
from megatron.signals import STOP_SIGNALS, StopRequest
signal.pthread_sigmask(signal.SIG_SETMASK, [])
for number in STOP_SIGNALS:  # whatever the tests' own process was started with
    signal.signal(number, signal.SIG_IGN if "nohup" in sys.argv and number == signal.SIGHUP else signal.SIG_DFL)
stop = StopRequest(ends_at_once="starting" in sys.argv)
stop.listen()
def report():
    while not stop.requested:
        time.sleep(0.01)
    print("requested", stop.name, flush=True)
threading.Thread(target=report, daemon=True).start()
print("ready", flush=True)
import ctypes
libc = ctypes.CDLL(None)
while True:
    libc.sleep(60)
"""


def start(*words: str, **variables: str) -> subprocess.Popen[str]:
    env = {
        key: value for key, value in environment(**variables).items() if key in variables or not key.startswith("DEEPY")
    }
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDING, *words], cwd=ROOT, env=env, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def heard(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return next(line for line in process.stdout if line.startswith("requested")).split()[1]


def test_every_stop_signal_is_a_request_and_sigterm_again_ends_in_words() -> None:
    running = {number: start() for number in STOP_SIGNALS}
    for number, process in running.items():
        process.send_signal(number)
        assert heard(process) == number.name
        process.send_signal(signal.SIGXCPU)  # the kernel repeats it
        assert process.poll() is None
    for number, process in running.items():
        insisting = signal.SIGINT if number == signal.SIGTERM else signal.SIGTERM
        if number not in (signal.SIGTERM, signal.SIGINT):
            process.send_signal(insisting)
            time.sleep(0.2)
            assert process.poll() is None, "it has insisted once"
        process.send_signal(insisting)
        output = process.communicate(timeout=10)[0]
        assert process.returncode == 128 + insisting, output
        assert f"{insisting.name}: again: stopped at once" in output and "Traceback" not in output


def test_a_signal_during_the_start_ends_the_process_in_words() -> None:
    running = {number: start("starting") for number in STOP_SIGNALS}
    for number, process in running.items():
        process.send_signal(number)
        output = process.communicate(timeout=10)[0]
        assert (process.returncode, output) == (
            128 + number, f"{number.name}: stopped during the start, nothing to save\n",
        )  # fmt: skip


def test_copies_of_a_signal_from_the_launchers_are_no_insisting() -> None:
    process = start(TORCHELASTIC_RUN_ID="1")
    for _ in range(3):  # its own, and those of deepy.py and DeepSpeed's launcher
        process.send_signal(signal.SIGTERM)
        time.sleep(0.05)
    assert heard(process) == "SIGTERM" and process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(10) == 143
    assert has_launcher({"CROSS_RANK": "0"}) and not has_launcher({"RANK": "0"})


def test_nohup_is_heeded() -> None:
    process = start("nohup")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.2)
    assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    assert heard(process) == "SIGUSR1"
    process.kill()
    process.wait()


def test_a_limit_of_time_is_a_request_that_counts_from_the_beginning() -> None:
    stop = StopRequest()
    stop.end_after(None, "limit")
    stop.end_after(60, "another limit")
    time.sleep(0.05)
    assert not stop.requested
    stop.end_after(0.04 / 60, "limit")
    assert stop.requested and stop.name == "limit", "it is over already"
    with StopRequest() as waiting:
        waiting.end_after(0.3 / 60, "limit")
        assert not waiting.requested
        assert wait_until(lambda: waiting.requested, 20)


LOSING = """
import sys
from megatron.signals import StopRequest
stop = StopRequest()
stop.end_after(1e-9, "limit")
with stop.other_ranks_may_be_gone():
    raise RuntimeError(sys.argv[1])
"""


@pytest.mark.parametrize(
    ("text", "world", "is_lost"),
    [
        ("[pair.cc:537] Connection closed by peer [10.0.0.2]:41\nThis is typically", "2", True),
        ("[pair.cc:537] Read error [10.0.0.2]:41: Connection reset by peer", "2", True),
        ("NCCL error: remote process exited or there was a network error", "2", True),
        ("Connection reset by peer", "1", False),
        ("shapes (2, 3) and (4, 5) cannot be multiplied", "2", False),
    ],
)
def test_a_lost_rank_is_one_line_on_the_others_and_a_fault_of_ours_stays_a_traceback(
    text: str, world: str, is_lost: bool
) -> None:
    variables = environment(WORLD_SIZE=world, RANK="0")
    result = subprocess.run(
        [sys.executable, "-c", LOSING, text], cwd=ROOT, env=variables, capture_output=True, text=True
    )
    assert result.returncode == (EXIT_LOST_RANK if is_lost else 1) and ("Traceback" in result.stderr) is not is_lost
    assert not is_lost or result.stderr.startswith("error: another process of this run is gone")
    assert not is_lost or result.stderr.count("\n") == 1


CHILD = """
import os, signal, sys, time
from megatron.signals import blocked, follow_parent
parent = os.getpid()
with blocked():
    child = os.fork()
if child == 0:
    follow_parent(parent)
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(3)
time.sleep(0.5 if "ends" in sys.argv else 60)
"""


@pytest.mark.parametrize("words", [["ends"], []])
def test_a_child_ignores_signals_of_others_and_ends_with_its_parent(words: list[str]) -> None:
    process = subprocess.Popen([sys.executable, "-c", CHILD, *words], cwd=ROOT, text=True, stdout=subprocess.PIPE)
    assert process.stdout is not None
    child = int(process.stdout.readline())
    for number in STOP_SIGNALS:
        os.kill(child, number)
    time.sleep(0.1)
    assert Path(f"/proc/{child}").exists()
    if not words:
        process.kill()
    process.wait(10)
    assert wait_until(lambda: not Path(f"/proc/{child}").exists(), 3)
