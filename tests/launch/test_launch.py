"""deepy.py: the launcher command, exit codes, signals, and the environment of a process."""

from __future__ import annotations

import functools
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from megatron.config import hostfile as hostfile_module
from megatron.config import resolve_config
from megatron.errors import UserError
from megatron.launch import command as command_module
from megatron.launch import launch, supervise
from megatron.launch import start as start_module
from megatron.launch.command import make_plan
from megatron.launch.hosts import count_processes, find_hosts, read_hostfile
from megatron.launch.supervise import LaunchPlan, run_plan
from megatron.mpu import environment as process_environment
from megatron.mpu.environment import ensure_process_environment, free_port, job_port
from tests.launched import deepy, environment, training_lines, wait_until, write_config

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "configs/demo.yml"


def plan_of(overrides: list[str], env: dict[str, str] | None = None) -> LaunchPlan:
    return make_plan(resolve_config(DEMO, overrides), "train.py", ["a.yml", "--set", "x=1"], env or {})


def option(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


@pytest.fixture(autouse=True)
def _machine_without_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_environment, "_DEVICE_FILES", ())
    monkeypatch.setattr(hostfile_module, "CLUSTER_HOSTFILE", "/nonexistent/hostfile")


@pytest.fixture
def hostfile(tmp_path: Path) -> str:
    path = tmp_path / "hosts"
    path.write_text("# nodes\nnode1 slots=2\nnode2 slots=2\n")
    return str(path)


@pytest.fixture
def all_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module.shutil, "which", lambda name: f"/usr/bin/{name}")


def test_a_cpu_machine_gets_one_local_process() -> None:
    plan = plan_of([])
    assert plan.command[:3] == [sys.executable, "-m", "deepspeed.launcher.runner"]
    assert "--no_local_rank" in plan.command
    assert option(plan.command, "--num_gpus") == "1"
    assert plan.command[-4:] == ["train.py", "a.yml", "--set", "x=1"]
    assert plan.environment == {"DS_ACCELERATOR": "cpu"}


def test_a_gpu_machine_is_left_to_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_environment, "_DEVICE_FILES", ("/dev/null",))
    plan = plan_of([])
    assert "--num_gpus" not in plan.command and plan.environment == {}
    assert option(plan_of(["num_gpus=4"]).command, "--num_gpus") == "4"
    assert option(plan_of(["include='localhost:0,1'"]).command, "--include") == "localhost:0,1"


def test_slurm_launcher_of_published_configs_starts_locally() -> None:
    plan = plan_of(["launcher=slurm", "deepspeed_slurm=false"])
    assert "--launcher" not in plan.command


def test_runs_on_one_machine_get_ports_of_their_own_unless_one_is_given() -> None:
    ports = {option(plan_of([]).command, "--master_port") for _ in range(3)}
    assert len(ports) > 1 and "29500" not in ports
    assert option(plan_of(["master_port=29501"]).command, "--master_port") == "29501"


def test_jobs_on_the_same_nodes_get_ports_of_their_own() -> None:
    ports = {job_port({"SLURM_JOB_ID": str(job)}) for job in range(20)}
    assert len(ports) == 20 and all(10000 <= port < 30000 for port in ports)
    assert job_port({}) == 29500


@pytest.mark.launches
def test_a_worker_stops_when_its_launcher_is_gone() -> None:
    code = (
        "import os, sys, time, socket; from megatron.mpu.environment import stop_with_launcher; "
        "stop_with_launcher({'DEEPY_LAUNCHER_PID': sys.argv[1], 'DEEPY_LAUNCHER_HOST': socket.gethostname()}, 0.05); "
        "print('ready', flush=True); time.sleep(60)"
    )
    launcher = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    worker = subprocess.Popen([sys.executable, "-c", code, str(launcher.pid)], stdout=subprocess.PIPE, cwd=ROOT)
    assert worker.stdout is not None and worker.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    assert worker.poll() is None
    launcher.kill()
    launcher.wait()
    assert worker.wait(10) == -signal.SIGTERM


def test_one_host_in_a_hostfile_is_this_machine(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("node1 slots=2\n")
    plan = plan_of([], {"DLTS_HOSTFILE": str(tmp_path / "one")})
    assert option(plan.command, "--hostfile") == str(tmp_path / "one")
    assert option(plan.command, "--master_addr") == "127.0.0.1"
    assert "--no_ssh_check" in plan.command and "--force_multi" not in plan.command


@pytest.mark.usefixtures("all_launchers")
def test_several_hosts_use_the_launcher(hostfile: str) -> None:
    plan = plan_of([f"hostfile={hostfile}", "launcher=pdsh", "no_ssh_check=true"])
    assert option(plan.command, "--launcher") == "pdsh"
    assert option(plan.command, "--master_addr") == "node1"
    assert "--force_multi" in plan.command and "--no_ssh_check" in plan.command
    assert plan_of([f"hostfile={hostfile}", "launcher=pdsh"], {"MASTER_ADDR": "10.0.0.1"}).environment == {
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": "29500",
    }


@pytest.mark.usefixtures("all_launchers")
def test_slurm_places_ranks_evenly(hostfile: str) -> None:
    plan = plan_of([f"hostfile={hostfile}", "deepspeed_slurm=true", "comment='two words'", "launcher_args=--exclusive"])
    extra = next(word for word in plan.command if word.startswith("--launcher_args="))
    assert extra == (
        "--launcher_args=--nodes=2 --ntasks-per-node=2 --kill-on-bad-exit=1 '--comment=two words' --exclusive"
    )
    # srun kills its tasks on SIGTERM and passes SIGUSR1 on to them.
    assert plan.signal_depth == 1 and plan.stop_signal == signal.SIGUSR1


@pytest.mark.usefixtures("all_launchers")
def test_nodes_and_gpus_can_be_limited_together(hostfile: str) -> None:
    plan = plan_of([f"hostfile={hostfile}", "launcher=pdsh", "num_nodes=2", "num_gpus=1"])
    assert (option(plan.command, "--num_nodes"), option(plan.command, "--num_gpus")) == ("2", "1")
    one = plan_of([f"hostfile={hostfile}", "num_nodes=1"])
    assert option(one.command, "--num_nodes") == "1" and "--launcher" not in one.command


@pytest.mark.usefixtures("all_launchers")
def test_pdsh_stops_the_workers_of_this_run_and_no_others(hostfile: str) -> None:
    plan = plan_of([f"hostfile={hostfile}", "launcher=pdsh"])
    assert plan.stop_command is not None
    assert plan.stop_command[:5] == ["pdsh", "-R", "ssh", "-w", "node1"], "one rank is enough"
    pattern = shlex.split(plan.stop_command[-1])[-1]
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
        plan_of([f"hostfile={tmp_path / 'hosts'}", "launcher=pdsh"])


@pytest.mark.usefixtures("all_launchers")
def test_other_words_that_pdsh_gives_to_a_remote_shell_are_checked(
    hostfile: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"hostfile={hostfile}", "launcher=pdsh"]
    assert plan_of(keys, {"NCCL_IB_HCA": "^mlx5_2:1,=a", "OTHER": "a;b"}).stop_command
    for extra, env, name in (
        (["master_addr='n;id'"], {}, "MASTER_ADDR 'n;id'"), ([], {"NCCL_DEBUG": "$(id)"}, "NCCL_DEBUG"),
        ([], {"PYTHONPATH": "/a b"}, "PYTHONPATH"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=re.escape(name)):
            plan_of([*keys, *extra], env)
    (tmp_path / "a b").mkdir()
    monkeypatch.chdir(tmp_path / "a b")
    with pytest.raises(UserError, match="working folder"):
        plan_of(keys)


@pytest.mark.launches
@pytest.mark.parametrize("word", ["{type:Adam}", "a;b&c*", "it's $HOME", 'a "b" \\ `c`', "(x y)", "runs/a_1.yml"])
def test_arguments_reach_the_workers_of_pdsh_as_they_are(word: str) -> None:
    given = command_module._remote_words([word])[0]
    by_deepspeed = '"{}"'.format(given.replace('"', '\\"')) if " " in given else given
    result = subprocess.run(["sh", "-c", f"printf %s {by_deepspeed}"], capture_output=True, text=True, check=True)
    assert result.stdout == word


@pytest.mark.usefixtures("all_launchers")
def test_slurm_hosts_come_from_the_allocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "scontrol"
    program.write_text("#!/bin/sh\necho node1\necho node2\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    plan = plan_of(["deepspeed_slurm=true"], {"SLURM_JOB_NODELIST": "node[1-2]", "SLURM_NTASKS_PER_NODE": "4"})
    written = option(plan.command, "--hostfile")
    assert read_hostfile(written) == {"node1": 4, "node2": 4}
    finished = LaunchPlan([sys.executable, "-c", ""], {}, written=plan.written)
    assert run_plan(finished) == 0 and not Path(written).exists()


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
        plan_of([f"hostfile={hostfile}", *overrides])


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
        plan_of(overrides)


@pytest.mark.parametrize("given", ["key", "environment"])
def test_a_hostfile_that_is_not_there_means_this_machine(
    given: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    overrides = ["hostfile=/mock_path"] if given == "key" else []
    if given == "environment":
        monkeypatch.setenv("DLTS_HOSTFILE", "/mock_path")
    plan = plan_of(overrides, dict(os.environ))
    assert option(plan.command, "--hostfile") == "/mock_path" and "--launcher" not in plan.command
    started: list[object] = []
    monkeypatch.setattr(start_module, "run_plan", lambda plan: started.append(plan) or 0)
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
        plan_of(["hostfile=/mock_path", override])
    assert str(error.value).startswith(message)


def test_a_layout_that_does_not_fit_the_processes_is_refused_before_any_starts(
    hostfile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = [f"hostfile={hostfile}", "launcher=pdsh"]
    monkeypatch.setattr(command_module.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert plan_of([*nodes, "model_parallel_size=2", "pipe_parallel_size=2"]).stop_command
    for keys, processes in ((["num_nodes=1"], 2), (["include='node1@node2:1'"], 3), (["exclude='node2:0'"], 3)):
        with pytest.raises(UserError, match=f"{processes} processes cannot hold pipe_parallel_size 2 x model_parallel"):
            plan_of([*nodes, *keys, "model_parallel_size=2", "pipe_parallel_size=2"])
    with pytest.raises(UserError, match="1 process cannot hold"):
        plan_of(["model_parallel_size=2"])


def test_a_batch_that_does_not_fit_the_processes_is_refused_before_any_starts() -> None:
    keys = ["train_batch_size=12", "train_micro_batch_size_per_gpu=2"]
    plan_of([*keys, "num_gpus=3"])
    plan_of([*keys, "num_gpus=6", "pipe_parallel_size=2"])
    with pytest.raises(UserError, match="train_batch_size: 12 is not micro-batch 2 x accumulation 1 x 4 data-parallel"):
        plan_of([*keys, "num_gpus=4"])


@pytest.mark.parametrize("script", ["eval.py", "tools/../generate.py"])
def test_evaluation_ignores_the_pipeline_and_the_batch(script: str) -> None:
    def plan(*overrides: str) -> LaunchPlan:
        return make_plan(resolve_config(DEMO, list(overrides)), script, [], {})

    plan("num_gpus=2", "pipe_parallel_size=2", "model_parallel_size=2", "train_batch_size=7")
    with pytest.raises(UserError, match="1 process cannot hold .* model_parallel_size 2"):
        plan("num_gpus=1", "pipe_parallel_size=2", "model_parallel_size=2")
    if script == "eval.py":
        with pytest.raises(UserError, match="3 processes cannot hold .* model_parallel_size 2"):
            plan("num_gpus=3", "model_parallel_size=2")
    else:  # generation needs one copy of the model
        plan("num_gpus=3", "model_parallel_size=2")


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


def test_missing_launcher_program_is_named(hostfile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command_module.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="launcher: pdsh needs the program `pdsh`"):
        plan_of([f"hostfile={hostfile}", "launcher=pdsh"])


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


def test_errors_come_before_any_process(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(start_module, "run_plan", lambda plan: pytest.fail("a process was started"))
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


# ---- real processes ----

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


# ---- inside a worker ----


def test_a_plain_process_becomes_a_world_of_one() -> None:
    env: dict[str, str] = {}
    ensure_process_environment(env)
    assert 0 < int(env.pop("MASTER_PORT")) < 65536
    env.pop("OMP_WAIT_POLICY", None)  # set where there is no accelerator
    assert env == {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}


def test_a_launchers_variables_stay() -> None:
    env = {
        "RANK": "3",
        "LOCAL_RANK": "1",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
        "SLURM_PROCID": "0",
        "OMP_WAIT_POLICY": "active",
    }
    before = dict(env)
    ensure_process_environment(env)
    assert env == before


def test_srun_and_mpirun_variables_are_mapped() -> None:
    env = {"SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "node[1-2]"}
    ensure_process_environment(env)
    found = [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")]
    assert found == ["3", "1", "4", "node1", "29500"]
    env = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_LOCAL_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2"}
    ensure_process_environment(env)
    assert [env[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")] == ["1", "1", "2"]


def test_mpirun_over_several_nodes_has_to_be_told_the_first_one() -> None:
    env = {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_SIZE": "2"}
    with pytest.raises(UserError, match="mpirun -x MASTER_ADDR=NODE"):
        ensure_process_environment(dict(env))
    env["MASTER_ADDR"] = "node1"
    ensure_process_environment(env)
    assert env["MASTER_ADDR"] == "node1"


def test_a_slurm_batch_script_is_a_plain_process() -> None:
    env = {"SLURM_JOB_ID": "7", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "8"}
    ensure_process_environment(env)
    assert env["WORLD_SIZE"] == "1"


@pytest.mark.parametrize(("code", "shell"), [(0, 0), (2, 2), (247, 137), (-15, 143)])
def test_killed_workers_have_the_shells_exit_code(code: int, shell: int) -> None:
    assert supervise._shell_code(code) == shell
