"""Verdicts on made-up reports: what is wrong is named with its node, and nothing else is."""

from __future__ import annotations

import json
import time
from copy import deepcopy
from typing import Any

import pytest

from megatron.doctor.findings import NOTE, PROBLEM, Expected, Finding
from megatron.doctor.frames import BYE, DONE, FAILED, HELLO, HUNG, STARTED
from megatron.doctor.nodes import Report
from megatron.doctor.report import as_json, table
from megatron.doctor.verdicts import judge

H100 = "NVIDIA H100 80GB HBM3"
GPU = {
    "index": 0, "name": H100, "temperature": 40, "uncorrected": 0, "remap": [], "slowdown": ["gpu_idle"], "mig": False,
    "processes": [],
}  # fmt: skip
FOLDER = {"path": "/scratch", "free": 10**13, "rate": 2e9, "reason": None}
GOOD: dict[str, Any] = {
    "python": {"version": "3.12.3", "executable": "python"},
    "packages": {"numpy": "2.4.6", "tqdm": "4.70.1"},
    "source": {"revision": "abc", "digest": "0123"},
    "environment": {"NCCL_SOCKET_IFNAME": "ib0", "CUDA_VISIBLE_DEVICES": "0,1"},
    "limits": {"nofile": 65536, "memlock": -1, "shm": 10**11},
    "gpus": {"driver": "580.65.06", "cuda": "13.0", "gpus": [GPU, {**GPU, "index": 1}]},
    "shared folder": {"folder": "/lustre", "seen": True, "flock": "held", "fcntl": "held"},
    "data files": {"/data/pile.bin": 10**12, "/data/pile.idx": 10**9},
    "save folder": FOLDER,
    "temporary folder": {**FOLDER, "path": "/tmp"},
    "torch": {"version": "2.13.0+cu130", "cuda": "13.0", "nccl": "2.28.9", "why": None, "gpus": [H100, H100]},
    "matmul": [6.5e14, 6.6e14],
    "torch process": None,
}
READ_ONLY = {**FOLDER, "rate": None, "reason": "Read-only file system"}
SICK = {**GPU, "uncorrected": 2}
NO_DATA = {"/data/pile.bin": None, "/data/pile.idx": 10**9}
EXPECTED = Expected({"numpy": "2.4.6", "tqdm": "4.70.1"}, "precision: fp16", {f"node{n}": 2 for n in range(1, 5)})


def report(delay: float = 0.01, **changes: Any) -> Report:
    """A good node but for `changes`: check_name=value, or check_name__part=value."""
    found = deepcopy(GOOD)
    for name, value in changes.items():
        check, _, part = name.partition("__")
        check = check.replace("_", " ")
        if part:
            found[check] = {**found[check], part: value}
        else:
            found[check] = value
    checks = {check: {"state": DONE, "value": value} for check, value in found.items()}
    return Report(checks, ended=True, delay=delay)


def verdict(**changes: Any) -> list[Finding]:
    """Findings on four nodes, of which node3 has `changes`."""
    return judge({f"node{n}": report(**(changes if n == 3 else {})) for n in range(1, 5)}, EXPECTED)


def test_good_nodes_are_fine() -> None:
    assert verdict() == []
    assert judge({"node1": report()}, EXPECTED) == []


CASES = {
    "slow disk": ({"save_folder__rate": 0.9e9}, "save folder", "45.0% of the median"),
    "read-only folder": ({"save_folder": READ_ONLY}, "save folder", "/scratch cannot be written to: Read-only"),
    "full disk": ({"save_folder__free": 10**9}, "save folder", "1.0 GB free"),
    "missing package": ({"packages__tqdm": None}, "packages", "tqdm is missing; pip install tqdm==4.70.1"),
    "other package": ({"packages__numpy": "2.1.0"}, "packages", "2.4.6 on node1, node2, node4; 2.1.0 on node3"),
    "other driver": ({"gpus__driver": "580.95.05"}, "gpus", "580.65.06 on node1, node2, node4; 580.95.05 on node3"),
    "clock behind": ({"delay": 2.5}, "clock", "2.5 s behind"),
    "clock ahead": ({"delay": -90.0}, "clock", "90.0 s ahead"),
    "odd torch": ({"torch__version": "2.11.0+cu130"}, "torch", "2.11.0+cu130 on node3"),
    "odd NCCL": ({"torch__nccl": "2.26.2"}, "torch", "NCCL is not the same"),
    "odd Python": ({"python__version": "3.11.7"}, "python", "3.11.7 on node3"),
    "other files": ({"source__digest": "4567"}, "source", "0123 on node1, node2, node4; 4567 on node3"),
    "slow GPU": ({"matmul": [6.5e14, 3.1e14]}, "matmul", "GPU 1 is slow: 310 TFLOP/s"),
    "no lock": ({"shared_folder__flock": "free"}, "shared folder", "flock locks do not work in /lustre"),
    "locks refused": ({"shared_folder__fcntl": "No locks available"}, "shared folder", "No locks available"),
    "own folder": ({"shared_folder": {"folder": "/lustre", "seen": False}}, "shared folder", "is another folder here"),
    "no data": ({"data_files": NO_DATA}, "data files", "pile.bin is not there"),
    "cut data": ({"data_files": {"/data/pile.bin": 7, "/data/pile.idx": 10**9}}, "data files", "7 on node3"),
    "few files": ({"limits__nofile": 256}, "limits", "256 open files"),
    "small shm": ({"limits__shm": 64 << 20}, "limits", "0.07 GB; start the container with --ipc=host"),
    "variable": ({"environment__NCCL_SOCKET_IFNAME": "eth0"}, "environment", "node4; eth0 on node3"),
    "ECC": ({"gpus__gpus": [SICK]}, "gpus", "2 uncorrected ECC errors"),
    "row": ({"gpus__gpus": [{**GPU, "remap": ["remapped_row_failure"]}]}, "gpus", "has to be exchanged"),
    "row pending": ({"gpus__gpus": [{**GPU, "remap": ["remapped_row_pending"]}]}, "gpus", "reset it"),
    "hot": ({"gpus__gpus": [{**GPU, "temperature": 91}]}, "gpus", "91 degrees"),
    "brake": ({"gpus__gpus": [{**GPU, "slowdown": ["hw_thermal_slowdown"]}]}, "gpus", "slowed down"),
    "in use": ({"gpus__gpus": [{**GPU, "processes": ["python (pid 7, 3 MiB)"]}]}, "gpus", "in use by python (pid 7"),
    "few GPUs": ({"torch__gpus": [H100]}, "torch", "1 GPUs where the run needs 2"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "check", "text"), CASES.values(), ids=CASES)
def test_the_odd_node_is_named(changes: dict[str, Any], check: str, text: str) -> None:
    (finding,) = verdict(**changes)
    assert (finding.level, finding.check, finding.nodes) == (PROBLEM, check, ("node3",))
    assert text in finding.text


def test_of_two_nodes_the_slow_one_is_named_and_a_difference_names_both() -> None:
    reports = {"a": report(), "b": report(save_folder__rate=0.9e9, torch__version="2.12.0")}
    found = {finding.check: finding.nodes for finding in judge(reports, EXPECTED)}
    assert found == {"save folder": ("b",), "torch": ("a", "b")}


def test_one_node_is_measured_by_floors() -> None:
    disk, product = judge({"node1": report(matmul=[2e14, 2e14], save_folder__rate=1e7)}, EXPECTED)[:2]
    assert disk.check == "save folder" and disk.text.endswith("10 MB/s, too slow for any run")
    assert product.check == "matmul" and product.text.endswith("20% of its data sheet")


@pytest.mark.parametrize(
    ("driver", "cuda", "is_fine"),
    [("570.1", "13.0", False), ("580", "13.0", True), ("525.60.13", "12.6", True), ("525.60.2", "12.6", False)],
)
def test_the_driver_has_to_suit_the_cuda_of_torch(driver: str, cuda: str, is_fine: bool) -> None:
    found = judge({"node1": report(gpus__driver=driver, torch__cuda=cuda)}, EXPECTED)
    assert [finding.text for finding in found if "too old" in finding.text] == (
        [] if is_fine else [found[0].text]
    ) and all(f"driver {driver} is too old for torch's CUDA {cuda}" in finding.text for finding in found)


def test_a_gpu_that_torch_cannot_use_and_one_that_is_not_there() -> None:
    broken = {**GOOD["torch"], "gpus": [], "why": "CUDA unknown error"}
    (finding,) = verdict(torch=broken, matmul=[6e14])
    assert finding.nodes == ("node3",) and "torch cannot use it: CUDA unknown error" in finding.text
    chosen = {**broken, "why": "DS_ACCELERATOR=cpu in the environment"}
    assert judge({"node1": report(torch=chosen, matmul=[1e11])}, Expected(EXPECTED.packages)) == []
    bare = report(torch=broken, matmul=[1e11], gpus={"driver": None, "cuda": None, "gpus": []})
    (finding,) = judge({"node1": bare}, EXPECTED)
    assert "precision: fp16 needs a GPU, and there is none: CUDA unknown error" in finding.text
    assert judge({"node1": bare}, Expected(EXPECTED.packages)) == []


def test_notes_are_no_problems() -> None:
    four = {f"node{n}": report(packages__numpy="2.3.0", environment__NCCL_IB_DISABLE="1") for n in range(1, 5)}
    found = judge(four, EXPECTED)
    assert [(finding.level, finding.check) for finding in found] == [(NOTE, "packages"), (NOTE, "environment")]
    assert table(four, None, "not measured", found).endswith("verdict: fine")
    assert '"verdict": "fine"' in as_json(four, None, found, 1.0)


def test_a_silent_node_a_hanging_and_a_failing_check_do_not_hide_the_others() -> None:
    silent, hanging, failing = Report(error="ssh: no route to host"), report(), report(packages__tqdm=None)
    hanging.checks["save folder"] = {"state": HUNG, "value": "no answer within 30 s"}
    failing.checks["torch"] = {"state": FAILED, "value": "ModuleNotFoundError: No module named 'torch'"}
    failing.checks["matmul"] = {"state": FAILED, "value": "ModuleNotFoundError: No module named 'torch'"}
    reports = {"node1": silent, "node2": hanging, "node3": failing, "node4": report()}
    found = judge(reports, EXPECTED)
    assert [(finding.nodes, finding.check) for finding in found] == [
        (("node1",), "answer"), (("node2",), "save folder"), (("node3",), "torch"), (("node3",), "packages"),
    ]  # fmt: skip
    assert "no route to host" in found[0].text and "no answer within 30 s" in found[1].text
    lines = table(reports, None, "not measured: no torch on node1, node3", found)
    assert lines.endswith("verdict: 4 problems on node1, node2, node3")
    assert "save folder       PROBLEM node2" in lines and "no torch on node1, node3" in lines


def test_a_slow_group_of_an_axis_is_named_by_its_nodes() -> None:
    axes = Report(ended=True)
    for rank in range(8):
        pair, host = rank // 2, f"node{rank // 2 + 1}"
        found = {"axis": "tensor", "ranks": [2 * pair, 2 * pair + 1], "rank": rank, "host": host}
        axes.checks[f"tensor {rank}"] = {"state": DONE, "value": {**found, "rate": 9e9 if rank == 5 else 3e11}}
    (finding,) = judge({}, EXPECTED, axes)
    assert finding.nodes == ("node3",) and finding.text.startswith("tensor axis, ranks [4, 5]: 9 GB/s, 3.0%")
    assert "tensor [4, 5] on node3: 9 GB/s" in table({}, axes, "", [finding])
    axes.ended, axes.error = False, "Timeout"
    assert "not measured to the end: Timeout" in judge({}, EXPECTED, axes)[0].text


def test_a_large_table_shows_the_odd_ones_and_one_of_the_others() -> None:
    reports = {f"n{n}": report(save_folder__rate=1e8 if n == 70 else 2e9 + n) for n in range(128)}
    lines = table(reports, None, "not measured", judge(reports, EXPECTED)).splitlines()
    (line,) = [line for line in lines if line.startswith("save folder")]
    assert "PROBLEM n70" in line and "n70: /scratch: 100 MB/s" in line and "126 more" in line and len(line) < 200


def test_the_first_answer_of_a_check_counts_and_the_clock_is_the_best_of_all_lines() -> None:
    def line(check: str, state: str, value: Any, delay: float) -> str:
        return "node3: @doctor " + json.dumps(
            {"check": check, "state": state, "value": value, "time": time.time() - delay}
        )

    heard = Report()
    for words in (
        line(HELLO, DONE, None, 5.0), "some other output", "@doctor {not json", line("python", STARTED, 10, 3.0),
        line("python", HUNG, "late", 3.1), line("python", DONE, GOOD["python"], 9.0), line("gpus", STARTED, 10, 4.0),
    ):  # fmt: skip
        heard.hear(words)
    heard.close()
    assert heard.delay == pytest.approx(3.0, abs=0.5) and heard.answered and not heard.ended
    assert [entry["state"] for entry in heard.checks.values()] == [HUNG, HUNG]
    heard.hear(line(BYE, DONE, None, 0.0))
    assert heard.ended
