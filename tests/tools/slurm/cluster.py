"""A Slurm of two nodes on this machine: munged, slurmctld and two slurmd, with all their files in one folder."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import time
from pathlib import Path
from types import TracebackType

from tests.launched import environment

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scontrol", "squeue", "sinfo")
# Daemons are in sbin, which a user's PATH may lack.
SEARCH_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/usr/local/sbin"])

CONFIGURATION = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# A requeued job waits until the credential of its first start has expired: two minutes by default.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldPort={ports[0]}
# A job's number chooses the port of its processes, and other clusters run on this machine.
FirstJobId={ports[0]}
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_interval=5
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
KillWait=5
SlurmdParameters=config_overrides
PartitionName=main Nodes=ALL Default=YES MaxTime=INFINITE State=UP
"""


def missing_programs() -> list[str]:
    """Those of PROGRAMS that are not installed."""
    return [name for name in PROGRAMS if shutil.which(name, path=SEARCH_PATH) is None]


class Cluster:
    """Context in which the cluster of node1, node2 and so on runs; its daemons are killed at the end.

    Args:
        folder: where their files go; its path has to be short, it holds a socket.
        settings: further lines of slurm.conf.
        nodes: how many.
    """

    def __init__(self, folder: Path, settings: str = "", nodes: int = 2) -> None:
        self.folder, self._settings, self._nodes = folder, settings, [f"node{n}" for n in range(1, nodes + 1)]
        self.environment = environment(SLURM_CONF=str(folder / "slurm.conf"), PATH=SEARCH_PATH)
        for name in [name for name in self.environment if name.startswith("SLURM_") and name != "SLURM_CONF"]:
            del self.environment[name]
        self._daemons: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Cluster:
        try:
            self._start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def run(self, *command: str, check: bool = True, cwd: Path | None = None) -> str:
        """Standard output of a Slurm command; AssertionError with its messages when it fails."""
        result = subprocess.run(command, env=self.environment, capture_output=True, text=True, timeout=60, cwd=cwd)
        assert not check or result.returncode == 0, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout.strip()

    def logs(self) -> str:
        """The last lines of every daemon's log."""
        files = [path for path in sorted(self.folder.iterdir()) if path.suffix in (".log", ".out")]
        parts = [[f"== {path.name}", *path.read_text().splitlines()[-30:]] for path in files]
        return "\n".join(line for part in parts for line in part)

    def close(self) -> None:
        """End the jobs, then the daemons."""
        if len(self._daemons) > 1:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.run("scancel", "--user", str(os.getuid()), check=False)
                self._all_idle(15)
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(10)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        self._daemons.clear()

    def _start(self) -> None:
        (self.folder / "state").mkdir(mode=0o700, parents=True)
        (self.folder / "munge").mkdir(mode=0o700)
        self.folder.chmod(0o755)
        key = self.folder / "munge" / "key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        user, host = pwd.getpwuid(os.getuid()).pw_name, socket.gethostname().partition(".")[0]
        ports = _free_ports(1 + len(self._nodes))
        text = CONFIGURATION.format(folder=self.folder, user=user, host=host, ports=ports)
        nodes = "".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=4000\n"
            for node, port in zip(self._nodes, ports[1:], strict=True)
        )
        (self.folder / "slurm.conf").write_text(nodes + text + self._settings)
        own = {"socket": "munge.socket", "pid-file": "munge/pid", "log-file": "munge/log", "seed-file": "munge/seed"}
        files = [f"--{option}={self.folder / name}" for option, name in own.items()]
        self._daemon("munged", "--foreground", "--force", f"--key-file={key}", *files)
        self._wait_until((self.folder / "munge.socket").exists)
        self._daemon("slurmctld", "-D", "-i")
        for node in self._nodes:
            self._daemon("slurmd", "-D", "-N", node)
        assert self._all_idle(), self.logs()

    def _daemon(self, program: str, *arguments: str) -> None:
        command = [str(shutil.which(program, path=SEARCH_PATH)), *arguments]
        with (self.folder / f"{program}{len(self._daemons)}.out").open("w") as output:
            daemon = subprocess.Popen(command, env=self.environment, stdout=output, stderr=output)
        self._daemons.append(daemon)

    def _all_idle(self, seconds: float = 20.0) -> bool:
        idle = "sinfo", "-h", "-t", "idle", "-o", "%D"
        return self._wait_until(lambda: self.run(*idle, check=False) == str(len(self._nodes)), seconds)

    def _wait_until(self, condition: object, seconds: float = 20.0) -> bool:
        assert callable(condition)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if condition():
                return True
            time.sleep(0.2)
        return False


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
