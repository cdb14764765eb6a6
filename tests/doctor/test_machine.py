"""What the probe finds on a real machine: this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

from megatron.doctor import disks, machine
from megatron.doctor.findings import Limits
from megatron.doctor.frames import DONE, FAILED, HUNG, Check, heard, pack, run_checks, unpack
from megatron.doctor.nodes import Report, gather, on_node
from megatron.doctor.target import find_target, requirement_files
from tests.conftest import TINY
from tests.launched import ROOT, environment, wait_until, write_config
from tests.ranks import run_ranks

SMI = """\
<?xml version="1.0" ?><!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">
<nvidia_smi_log><driver_version>580.65.06</driver_version><cuda_version>13.0</cuda_version>
<gpu id="00000000:01:00.0"><product_name>NVIDIA H100 80GB HBM3</product_name><uuid>GPU-aa</uuid>
 <mig_mode><current_mig>Disabled</current_mig></mig_mode>
 <ecc_errors><volatile><sram_correctable>4</sram_correctable><sram_uncorrectable_parity>1</sram_uncorrectable_parity>
 <dram_uncorrectable>2</dram_uncorrectable></volatile>
 <aggregate><dram_uncorrectable>9</dram_uncorrectable></aggregate></ecc_errors>
 <remapped_rows><remapped_row_pending>Yes</remapped_row_pending><remapped_row_failure>No</remapped_row_failure>
 </remapped_rows><temperature><gpu_temp>61 C</gpu_temp></temperature>
 <clocks_event_reasons><clocks_event_reason_gpu_idle>Not Active</clocks_event_reason_gpu_idle>
 <clocks_event_reason_hw_slowdown>Active</clocks_event_reason_hw_slowdown></clocks_event_reasons>
 <processes><process_info><pid>7</pid><type>C</type><process_name>/usr/bin/python train.py</process_name>
 <used_memory>900 MiB</used_memory></process_info><process_info><pid>8</pid><type>G</type>
 <process_name>Xorg</process_name><used_memory>4 MiB</used_memory></process_info></processes></gpu>
<gpu id="00000000:02:00.0"><product_name>Tesla V100-SXM2-16GB</product_name><uuid>GPU-bb</uuid>
 <mig_mode><current_mig>N/A</current_mig></mig_mode>
 <ecc_errors><volatile><double_bit><total>3</total></double_bit></volatile></ecc_errors>
 <temperature><gpu_temp>N/A</gpu_temp></temperature>
 <clocks_throttle_reasons><clocks_throttle_reason_sw_thermal_slowdown>Active</clocks_throttle_reason_sw_thermal_slowdown>
 </clocks_throttle_reasons><processes></processes></gpu></nvidia_smi_log>
"""


def test_the_state_of_gpus_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n[ \"$*\" = '-q -x' ] && cat << 'E'\n{SMI}E\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    found = machine.gpus()
    assert (found["driver"], found["cuda"]) == ("580.65.06", "13.0")
    assert found["gpus"] == [
        {
            "index": 0, "name": "NVIDIA H100 80GB HBM3", "temperature": 61, "uncorrected": 3,
            "remap": ["remapped_row_pending"], "slowdown": ["hw_slowdown"], "mig": False,
            "processes": ["python (pid 7, 900 MiB)"],
        },
        {
            "index": 1, "name": "Tesla V100-SXM2-16GB", "temperature": None, "uncorrected": 3, "remap": [],
            "slowdown": ["sw_thermal_slowdown"], "mig": False, "processes": [],
        },
    ]  # fmt: skip
    for visible in ("1", "GPU-bb"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert [gpu["index"] for gpu in machine.gpus()["gpus"]] == [1], "others may be another job's"
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\necho 'Failed to initialize NVML: Driver/library mismatch'; exit 18\n"
    )
    with pytest.raises(RuntimeError, match="Driver/library mismatch"):
        machine.gpus()


@pytest.mark.launches
def test_locks_of_the_shared_folder_are_seen_only_while_they_are_held(tmp_path: Path) -> None:
    look = "import json, sys; from megatron.doctor import disks; print(json.dumps(disks.look_at_shared(*sys.argv[1:])))"

    def from_another_process(folder: str, token: str) -> dict[str, Any]:
        command = [sys.executable, "-c", look, folder, token]
        return json.loads(subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout)

    with disks.held_folder(tmp_path) as shared:
        held = from_another_process(**shared)
        assert held == {"folder": str(tmp_path), "seen": True, "flock": "held", "fcntl": "held"}
        assert not disks.look_at_shared(shared["folder"], "another word")["seen"]
    assert list(tmp_path.iterdir()) == [] and not disks.look_at_shared(**shared)["seen"]
    (tmp_path / "token").write_text("word")
    for name in ("flock", "fcntl"):
        (tmp_path / name).touch()
    assert from_another_process(str(tmp_path), "word")["fcntl"] == disks.FREE, "nobody holds it"


def test_a_write_leaves_nothing_behind_and_an_absent_folder_is_an_error(tmp_path: Path) -> None:
    found = disks.look_at_folder(str(tmp_path))
    assert found["rate"] > 0 and found["free"] > 0 and list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        disks.look_at_folder(str(tmp_path / "absent"))
    assert disks.existing_folder(tmp_path / "a" / "b") == tmp_path and not (tmp_path / "a").exists()


def test_checks_that_hang_or_fail_are_left_behind(capfd: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        raise OSError("no such\nthing")

    run_checks([Check("hangs", 0.1, lambda: time.sleep(5)), Check("fails", 5, fail), Check("works", 5, lambda: 7)])
    frames = [frame for line in capfd.readouterr().out.splitlines() if (frame := heard(line))]
    ends = {frame["check"]: (frame["state"], frame["value"]) for frame in frames if frame["state"] != "started"}
    assert ends == {
        "hangs": (HUNG, "no answer within 0.1 s"), "fails": (FAILED, "OSError: no such thing"), "works": (DONE, 7),
    }  # fmt: skip


def test_silent_broken_and_absent_commands_hold_up_nobody() -> None:
    line = f"@doctor {json.dumps({'check': 'python', 'state': 'started', 'value': 9, 'time': time.time()})}"
    commands = {
        "silent": ["sleep", "60"], "stuck": ["sh", "-c", f"echo '{line}'; exec sleep 60"],
        "broken": ["sh", "-c", "echo Permission denied >&2; exit 255"], "absent": ["no-such-launcher"],
    }  # fmt: skip
    start = time.monotonic()
    reports = gather(commands, os.environ, first_word=0.3, whole=0.6)
    assert time.monotonic() - start < 10
    assert {name: report.answered for name, report in reports.items()} == {
        "silent": False, "stuck": True, "broken": False, "absent": False,
    }  # fmt: skip
    assert reports["stuck"].checks["python"]["state"] == HUNG and reports["broken"].error == "Permission denied"
    assert reports["absent"].checks["start"]["value"] == "no-such-launcher: No such file or directory"


@pytest.mark.launches
def test_commands_of_the_launchers_survive_a_shell() -> None:
    words = ["/a b/python", "deepy.py", pack({"folder": "/x $(y) 'z'"})]
    assert unpack(words[2]) == {"folder": "/x $(y) 'z'"}
    env = {"NCCL_DEBUG": "A B", "SECRET": "s"}
    assert on_node("slurm", "n1", "--account=x", words, env)[-4:] == ["--cpu-bind=none", *words]
    assert on_node("openmpi", "n1", "", words, env) == ["mpirun", "-n", "1", "--host", "n1", *words]
    remote = on_node("pdsh", "n1", "", ["printenv", "NCCL_DEBUG"], env)[-1]
    assert subprocess.run(["sh", "-c", remote], capture_output=True, text=True).stdout == "A B\n"
    assert "SECRET" not in remote and on_node("mvapich", "n1", "", words, env)[0] == "ssh"


# ---- the command ----


def doctor(
    *words: str | Path, python: str | Path = sys.executable, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    command = [str(python), str(ROOT / "deepy.py"), "doctor", *map(str, words)]
    return subprocess.run(command, cwd=cwd, env=environment(), capture_output=True, text=True, timeout=120)


@pytest.mark.launches
def test_a_real_run_on_this_machine(tmp_path: Path, tokenizer_file: Path, corpus_prefix: str) -> None:
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, save=str(tmp_path / "out"))
    result = doctor(config, "--json", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    (node,) = report["nodes"].values()
    assert node["ended"] and all(check["state"] == DONE for check in node["checks"].values()), result.stdout
    import torch

    assert node["checks"]["torch"]["value"]["version"] == torch.__version__
    assert node["checks"]["shared folder"]["value"] == {
        "folder": str(tmp_path), "seen": True, "flock": "held", "fcntl": "held",
    }  # fmt: skip
    assert [check for check in node["checks"] if check.endswith("folder")] == [
        "shared folder", "save folder", "data folder", "temporary folder",
    ]  # fmt: skip
    problems = [finding for finding in report["findings"] if finding["level"] == "problem"]
    assert result.returncode == bool(problems) and result.stdout.endswith(f"{result.stdout.splitlines()[-1]}\n")
    machine_dependent = {"limits", "gpus", "save folder", "temporary folder", "data folder"}
    assert [finding for finding in problems if finding["check"] not in machine_dependent] == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "run.yml"], "nothing is left"


@pytest.mark.launches
def test_a_doctor_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "deepy.py"), "doctor"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        assert wait_until(lambda: list(tmp_path.glob(".doctor-*/flock")), 30)
        (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split() or ("0",)
        process.terminate()
        assert process.wait(30) == 130
    assert list(tmp_path.iterdir()) == [] and not Path(f"/proc/{child}").exists()


@pytest.mark.launches
def test_a_machine_without_any_package_is_still_checked(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True, with_pip=False)
    python = tmp_path / "bare" / "bin" / "python"
    result = doctor(python=python, cwd=tmp_path)
    assert result.returncode == 1, result.stderr
    assert "torch: " in result.stdout and "No module named 'torch'" in result.stdout
    assert "are missing; pip install torch==" in result.stdout
    result = doctor("configs/demo.yml", python=python)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "cannot be read without" in result.stderr and "Traceback" not in result.stderr


MISTAKES = [
    (["absent.yml"], "absent.yml"), (["run.yml", "--jsn", "x"], "--jsn"), (["run.yml", "--json"], "--json"),
    (["run.yml", "--json", "."], "--json"), (["run.yml", "--set", "model_parallel_size=2"], "model_parallel_size"),
    (["run.yml", "--explain"], "--explain"),
    (["run.yml", "--set", "deepspeed_slurm=true"], "inside a Slurm allocation"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "part"), MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_one_line_before_anything_starts(
    words: list[str], part: str, tmp_path: Path, tokenizer_file: Path, corpus_prefix: str, capsys: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    from megatron.doctor import command
    from megatron.errors import run_command

    write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SLURM_JOB_NODELIST", raising=False)
    monkeypatch.setattr(command, "gather", lambda *_: pytest.fail("started"))
    code = run_command(lambda: command.doctor(words))
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and part in error, error


@pytest.mark.launches
def test_the_nodes_of_a_hostfile_are_reached_through_the_launcher(
    tmp_path: Path, tokenizer_file: Path, corpus_prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.config.cli import parse_arguments

    (tmp_path / "pdsh").touch(mode=0o755)
    (tmp_path / "hosts").write_text("n1 slots=2\nn2 slots=2\n")
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    config = write_config(tmp_path / "run.yml", tokenizer_file, corpus_prefix, use_wandb=True, model_parallel_size=2)
    words = [str(config), "--hostfile", str(tmp_path / "hosts"), "--set", "launcher_args=-u 5"]
    target = find_target(parse_arguments(words, "doctor"), "doctor")
    assert target.nodes == ("n1", "n2") and target.expected.gpus == {"n1": 2, "n2": 2}
    assert "wandb" in target.expected.packages and "torch" in target.expected.packages
    command = target.commands(None, {})["n2"]
    assert command[:8] == ["pdsh", "-S", "-R", "ssh", "-w", "n2", "-u", "5"]
    request = unpack(command[-1].split()[-1])
    assert request["folders"] == {
        "working": str(Path.cwd()),
        "data": str(Path(corpus_prefix).parent),
        "temporary": None,
    }
    assert target.axes and target.axes.command[-3:-1] == ["doctor", "--axes"]
    assert unpack(target.axes.command[-1])["tensor"] == 2


def test_requirement_files_exist_and_follow_the_configuration() -> None:
    from megatron.config import load_config

    keys = {**TINY, "tensorboard_dir": "t", "use_wandb": True, "attention_backend": "flash_attn", "eval_tasks": ["x"]}
    files = requirement_files(load_config([], keys))
    for package in ("liger", "quack"):
        files += requirement_files(load_config([], {**TINY, "cross_entropy": package}))[1:]
    assert len(files) == 7 and all((ROOT / "requirements" / file).is_file() for file in files)
    assert requirement_files(load_config([], TINY)) == ["requirements.txt"]


def _measure(request: dict[str, Any]) -> list[dict[str, Any]]:
    from megatron.doctor.axes import measure

    return measure(request)


@pytest.mark.processes
def test_every_axis_of_a_layout_is_measured() -> None:
    request = {"pipeline": 2, "tensor": 2, "backend": "gloo", "ranks_per_gpu": 1, "seconds": 60}
    answers = run_ranks(4, _measure, request)
    assert [[(found["axis"], found["ranks"]) for found in answer] for answer in answers] == [
        [("tensor", [0, 1]), ("pipeline", [0, 2])], [("tensor", [0, 1]), ("pipeline", [1, 3])],
        [("tensor", [2, 3]), ("pipeline", [0, 2])], [("tensor", [2, 3]), ("pipeline", [1, 3])],
    ]  # fmt: skip
    assert all(found["rate"] > 0 and found["rank"] == rank for rank, a in enumerate(answers) for found in a)


def test_a_report_of_axes_comes_from_lines_of_all_ranks() -> None:
    report = Report()
    for rank in range(2):
        found = {"axis": "data", "ranks": [0, 1], "rank": rank, "host": f"n{rank}", "rate": 1e9 + rank}
        frame = {"check": f"data axis, rank {rank}", "state": DONE, "value": found, "time": time.time()}
        report.hear(f"n{rank}: @doctor {json.dumps(frame)}\n")
    from megatron.doctor.gpu_verdicts import axis_groups

    assert axis_groups(report) == [{"axis": "data", "ranks": [0, 1], "hosts": ["n0", "n1"], "rate": 1e9}]


def test_the_page_states_the_limits_of_the_code() -> None:
    page = (ROOT / "docs/doctor.md").read_text(encoding="utf-8")
    for name, value in vars(Limits()).items():
        assert f"| `{name}` | {value:g} |" in page, name
