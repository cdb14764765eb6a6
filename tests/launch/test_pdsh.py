"""deepy.py with a hostfile and pdsh: an sshd on two loopback addresses stands for two nodes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron.mpu.environment import free_port
from tests.launched import ROOT, deepy, environment, training_lines, wait_until, write_config

SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin"])
MISSING = [name for name in ("pdsh", "sshd", "ssh", "ssh-keygen", "pkill") if not shutil.which(name, path=SEARCH_PATH)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
NODES = ("127.0.0.1", "127.0.0.2")
SSHD = """\
Port {port}
ListenAddress 127.0.0.1
ListenAddress 127.0.0.2
HostKey {folder}/host
AuthorizedKeysFile {folder}/user.pub
PidFile {folder}/pid
StrictModes no
UsePAM no
PasswordAuthentication no
PermitRootLogin prohibit-password
"""


@pytest.fixture
def ssh_options(tmp_path: Path) -> Iterator[str]:
    """Options with which ssh reaches an sshd of this test on both addresses, by keys of its own."""
    folder, port = tmp_path / "ssh", free_port()
    folder.mkdir(mode=0o700)
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / name)], check=True)
    (folder / "config").write_text(SSHD.format(port=port, folder=folder))
    if os.getuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    words = [f"-p {port} -i {folder / 'user'}", "StrictHostKeyChecking=no", "UserKnownHostsFile=/dev/null"]
    options = " -o ".join([*words, "LogLevel=ERROR", "BatchMode=yes"])
    program = str(shutil.which("sshd", path=SEARCH_PATH))  # it insists on an absolute path
    with (folder / "log").open("w") as log:
        daemon = subprocess.Popen([program, "-D", "-e", "-f", str(folder / "config")], stdout=log, stderr=log)
    try:
        for node in NODES:
            if not wait_until(lambda node=node: _answers(options, node), 10):
                pytest.skip(f"ssh does not get to {node} here: {(folder / 'log').read_text()[-500:]}")
        yield options
    finally:
        daemon.terminate()
        daemon.wait()


def _answers(options: str, node: str) -> bool:
    result = subprocess.run(["ssh", *options.split(), node, "true"], capture_output=True, check=False)
    return result.returncode == 0


@pytest.mark.launches
def test_a_run_on_two_hosts_saves_when_deepy_is_stopped(
    tmp_path: Path, tokenizer_file: Path, corpus_prefix: str, ssh_options: str
) -> None:
    (tmp_path / "hosts").write_text("".join(f"{node} slots=1\n" for node in NODES))
    options = {"launcher": "pdsh", "hostfile": str(tmp_path / "hosts"), "no_ssh_check": True, "train_iters": 1000000}
    save = tmp_path / "out"
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, **options, master_port=free_port())
    # A shell on the other side reads the arguments.
    command = deepy(config, "--save", save, "--set", "optimizer={type: Adam, params: {lr: 5.0e-4}}")
    env = environment(PDSH_SSH_ARGS_APPEND=ssh_options)
    with subprocess.Popen(
        command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        started = wait_until(lambda: training_lines(save) or process.poll() is not None, 90)
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=60)[0]
    assert started and process.returncode == 0, output
    last = training_lines(save)[-1]
    assert all(f"{node}: " in output for node in NODES)
    assert (save / "latest").read_text().strip() == f"global_step{last['iteration']}"
    assert last["consumed_samples"] == 8 * last["iteration"], "one process on each of two hosts"
    assert 0 < last["learning_rate"] <= 5e-4
