"""From what the nodes said to what is wrong with them. Pure: reports in, findings out."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from megatron.doctor.disks import FREE, HELD
from megatron.doctor.findings import (
    LIMITS,
    NOTE,
    PROBLEM,
    Expected,
    Finding,
    Limits,
    Reports,
    listed,
    odd_ones,
    slow_ones,
    values,
)  # fmt: skip
from megatron.doctor.frames import DONE, FAILED
from megatron.doctor.gpu_verdicts import drivers, gpu_states, products, slow_axes
from megatron.doctor.nodes import Report
from megatron.doctor.probe import TORCH_PROCESS


def judge(reports: Reports, expected: Expected, axes: Report | None = None, limits: Limits = LIMITS) -> list[Finding]:
    """Everything that is wrong, problems first.

    axes: what the processes of axes.run_axes said; None when they were not started.
    """
    found = [finding for rule in _RULES for finding in rule(reports, expected, limits)]
    found += slow_axes(axes, limits) if axes else []
    return sorted(found, key=lambda finding: finding.level != PROBLEM)


def _silence(reports: Reports, _: Expected, __: Limits) -> Iterator[Finding]:
    for node, report in reports.items():
        reason = f" ({report.error})" if report.error else ""
        if not report.answered and "start" not in report.checks:
            yield Finding(
                PROBLEM, "answer", (node,), f"did not answer{reason}; is the node up, and the launcher right?"
            )
        elif report.answered and not report.ended:
            yield Finding(PROBLEM, "answer", (node,), f"fell silent before its last check{reason}")


def _states(reports: Reports, _: Expected, __: Limits) -> Iterator[Finding]:
    for node, report in reports.items():
        said = report.checks.get("torch", {}).get("state") == FAILED  # then the others fail for the same reason
        for check, entry in report.checks.items():
            if entry["state"] != DONE and not (said and check in ("matmul", TORCH_PROCESS)):
                word = "failed" if entry["state"] == FAILED else "hangs"
                yield Finding(PROBLEM, check, (node,), f"{word}: {entry['value']}")


def _clocks(reports: Reports, _: Expected, limits: Limits) -> Iterator[Finding]:
    for node, report in reports.items():
        if report.delay is not None and abs(report.delay) > limits.clock_s:
            word = "behind" if report.delay > 0 else "ahead"
            yield Finding(PROBLEM, "clock", (node,), f"{abs(report.delay):.1f} s {word}; start its NTP service")


_SAME = (
    ("python", "version", "Python"),
    ("source", "digest", "the product's files"),
    ("torch", "version", "torch"),
    ("torch", "cuda", "torch's CUDA"),
    ("torch", "nccl", "NCCL"),
    ("gpus", "driver", "the driver"),
)


def _differences(reports: Reports, _: Expected, __: Limits) -> Iterator[Finding]:
    for check, part, what in _SAME:
        found = values(reports, check, part)
        odd = odd_ones(found)
        if odd:
            yield Finding(PROBLEM, check, tuple(odd), f"{what} is not the same everywhere: {listed(found)}")


def _packages(reports: Reports, expected: Expected, _: Limits) -> Iterator[Finding]:
    missing: dict[tuple[str, ...], list[str]] = {}
    for name, pinned in expected.packages.items():
        found = {node: versions.get(name) for node, versions in values(reports, "packages").items()}
        present = {node: version for node, version in found.items() if version is not None}
        if len(present) < len(found):
            missing.setdefault(tuple(node for node in found if node not in present), []).append(f"{name}=={pinned}")
        if odd := odd_ones(present):
            yield Finding(PROBLEM, "packages", tuple(odd), f"{name} is not the same everywhere: {listed(present)}")
        elif present and (version := next(iter(present.values()))).partition("+")[0] != pinned:
            yield Finding(NOTE, "packages", tuple(present), f"{name} {version}, the requirements say {pinned}")
    for nodes, pins in missing.items():
        names = ", ".join(pin.partition("==")[0] for pin in pins)
        text = f"{names} {'is' if len(pins) == 1 else 'are'} missing; pip install {' '.join(pins)}"
        yield Finding(PROBLEM, "packages", nodes, text)


def _variables(reports: Reports, _: Expected, __: Limits) -> Iterator[Finding]:
    found = values(reports, "environment")
    for name in sorted({name for variables in found.values() for name in variables} - {"CUDA_VISIBLE_DEVICES"}):
        here = {node: variables.get(name, "(not set)") for node, variables in found.items()}
        if odd := odd_ones(here):
            yield Finding(PROBLEM, "environment", tuple(odd), f"{name} is not the same everywhere: {listed(here)}")
        for value, effect in _EFFECTS.get(name, {}).items():
            nodes = tuple(node for node, set_to in here.items() if set_to == value)
            if nodes:
                yield Finding(NOTE, "environment", nodes, f"{name}={value}: {effect}")


_EFFECTS = {
    "NVIDIA_TF32_OVERRIDE": {"1": "fp32 products keep 10 bits of each factor"},
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE": {"1": "fp32 products keep 10 bits of each factor"},
    "NCCL_IB_DISABLE": {"1": "no InfiniBand: nodes talk through sockets"},
    "NCCL_P2P_DISABLE": {"1": "GPUs of a node do not reach each other directly"},
    "NCCL_SHM_DISABLE": {"1": "processes of a node talk through the network"},
    "CUDA_LAUNCH_BLOCKING": {"1": "every kernel is waited for: slow"},
}


def _folders(reports: Reports, expected: Expected, limits: Limits) -> Iterator[Finding]:
    least = {"save": limits.free_gb, "temporary": limits.free_temporary_gb}
    for check in sorted(
        {c for r in reports.values() for c in r.checks if c.endswith(" folder") and c != "shared folder"}
    ):
        label, found = check.removesuffix(" folder"), values(reports, check)
        rates = {node: folder["rate"] for node, folder in found.items() if folder["rate"] is not None}
        slow = slow_ones(rates, limits)
        slow |= {
            n: "too slow for any run" for n, rate in rates.items() if rate < limits.disk_mb_s * 1e6 and n not in slow
        }
        for node, how in slow.items():
            text = f"slow disk: {found[node]['path']} takes {rates[node] / 1e6:.0f} MB/s, {how}"
            yield Finding(PROBLEM, check, (node,), text)
        for node, folder in found.items():
            if folder["rate"] is None and label in expected.written:
                yield Finding(PROBLEM, check, (node,), f"{folder['path']} cannot be written to: {folder['reason']}")
            if folder["free"] < least.get(label, 0) * 1e9:
                yield Finding(PROBLEM, check, (node,), f"{folder['path']}: {folder['free'] / 1e9:.1f} GB free")


def _files(reports: Reports, _: Expected, __: Limits) -> Iterator[Finding]:
    found = values(reports, "data files")
    for path in next(iter(found.values()), {}):
        sizes = {node: files.get(path) for node, files in found.items()}
        missing = tuple(node for node, size in sizes.items() if size is None)
        present = {node: size for node, size in sizes.items() if size is not None}
        if missing:
            yield Finding(PROBLEM, "data files", missing, f"{path} is not there, or cannot be read")
        if odd := odd_ones(present):
            yield Finding(PROBLEM, "data files", tuple(odd), f"{path} differs in size: {listed(present)}")


def _shared(reports: Reports, _: Expected, __: Limits) -> Iterator[Finding]:
    for node, found in values(reports, "shared folder").items():
        if not found["seen"]:
            text = f"{found['folder']} is another folder here, or none; checkpoints need one that all nodes share"
            yield Finding(PROBLEM, "shared folder", (node,), text)
            continue
        for lock in ("flock", "fcntl"):
            if found[lock] != HELD:
                how = "a lock held on another node does not count" if found[lock] == FREE else found[lock]
                text = f"{lock} locks do not work in {found['folder']}: {how}; mount it with locks"
                yield Finding(PROBLEM, "shared folder", (node,), text)


def _limits(reports: Reports, _: Expected, limits: Limits) -> Iterator[Finding]:
    for node, found in values(reports, "limits").items():
        if 0 <= found["nofile"] < limits.nofile:
            yield Finding(
                PROBLEM, "limits", (node,), f"{found['nofile']} open files at most; ulimit -n {limits.nofile}"
            )
        if found["shm"] < limits.shm_gb * 1e9:
            text = f"/dev/shm has {found['shm'] / 1e9:.2f} GB; start the container with --ipc=host"
            yield Finding(PROBLEM, "limits", (node,), text)
        has_gpus = bool((reports[node].found("gpus") or {}).get("gpus"))
        if has_gpus and 0 <= found["memlock"] < limits.memlock_mb * 1e6:
            text = f"{found['memlock'] / 1e6:.1f} MB of locked memory at most; InfiniBand needs ulimit -l unlimited"
            yield Finding(NOTE, "limits", (node,), text)


_RULES: tuple[Callable[[Reports, Expected, Limits], Iterator[Finding]], ...] = (
    _silence, _states, _clocks, _differences, _packages, _variables, _folders, _files, _shared, _limits, drivers,
    gpu_states, products,
)  # fmt: skip
