"""What is wrong with drivers, GPUs and what connects them. Pure: reports in, findings out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from megatron.doctor.findings import NOTE, PROBLEM, Expected, Finding, Limits, Reports, slow_ones, values
from megatron.doctor.frames import DONE
from megatron.doctor.nodes import Report
from megatron.mpu.gpus import peak_tflops

DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580"}
"""Oldest driver for a major version of CUDA, from NVIDIA's CUDA release notes."""


def _is_older(version: str, least: str) -> bool:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in re.findall(r"\d+", text)]

    return numbers(version) < numbers(least)


def drivers(reports: Reports, expected: Expected, _: Limits) -> Iterator[Finding]:
    for node, torch in values(reports, "torch").items():
        driver = (reports[node].found("gpus") or {}).get("driver")
        least = DRIVERS.get(int(torch["cuda"].partition(".")[0])) if torch["cuda"] else None
        if driver and least and _is_older(driver, least):
            text = f"driver {driver} is too old for torch's CUDA {torch['cuda']}, which needs {least}"
            yield Finding(PROBLEM, "gpus", (node,), f"{text}; update it, or install a build for an older CUDA")
        elif driver and not torch["gpus"] and not torch["why"].startswith("DS_ACCELERATOR"):
            yield Finding(PROBLEM, "torch", (node,), f"there is a GPU, but torch cannot use it: {torch['why']}")
        elif expected.gpu_request and not torch["gpus"]:
            text = f"{expected.gpu_request} needs a GPU, and there is none: {torch['why']}"
            yield Finding(PROBLEM, "torch", (node,), text)
        wanted = expected.gpus.get(node, 0)
        if torch["gpus"] and len(torch["gpus"]) < wanted:
            yield Finding(PROBLEM, "torch", (node,), f"{len(torch['gpus'])} GPUs where the run needs {wanted}")


def gpu_states(reports: Reports, _: Expected, limits: Limits) -> Iterator[Finding]:
    for node, found in values(reports, "gpus").items():
        for gpu in found["gpus"]:
            for level, text in _gpu(gpu, limits):
                yield Finding(level, "gpus", (node,), f"GPU {gpu['index']} ({gpu['name']}): {text}")


_BRAKES = {"hw_slowdown", "hw_thermal_slowdown", "sw_thermal_slowdown", "hw_power_brake_slowdown"}


def _gpu(gpu: Mapping[str, Any], limits: Limits) -> Iterator[tuple[str, str]]:
    if gpu["uncorrected"]:
        yield PROBLEM, f"{gpu['uncorrected']} uncorrected ECC errors; reset it, or leave the node out"
    if "remapped_row_failure" in gpu["remap"]:
        yield PROBLEM, "a row of its memory could not be replaced; it has to be exchanged"
    elif "remapped_row_pending" in gpu["remap"]:
        yield PROBLEM, "a row of its memory waits to be replaced; reset it"
    if (gpu["temperature"] or 0) > limits.gpu_celsius:
        yield PROBLEM, f"{gpu['temperature']} degrees Celsius"
    if brakes := [reason for reason in gpu["slowdown"] if reason in _BRAKES]:
        yield PROBLEM, f"slowed down: {', '.join(brakes)}"
    if gpu["processes"]:
        yield PROBLEM, f"in use by {', '.join(gpu['processes'])}"
    if gpu["mig"]:
        yield NOTE, "MIG is on: a process gets a part of it, and NCCL cannot join parts"


def products(reports: Reports, _: Expected, limits: Limits) -> Iterator[Finding]:
    rates = {(node, gpu): rate for node, found in values(reports, "matmul").items() for gpu, rate in enumerate(found)}
    names = {f"{node}/{gpu}": (node, gpu) for node, gpu in rates}
    slow = slow_ones({name: rates[place] for name, place in names.items()}, limits)
    for name, (node, gpu) in names.items():
        devices = (reports[node].found("torch") or {}).get("gpus") or []
        peak = peak_tflops(devices[gpu]) if gpu < len(devices) else None
        if name not in slow and peak and rates[node, gpu] < limits.gpu_peak_share * peak[0] * 1e12:
            slow[name] = f"{rates[node, gpu] / peak[0] / 1e12:.0%} of its data sheet"
        if name in slow:
            what = f"GPU {gpu}" if devices else "the CPU"
            text = f"{what} is slow: {rates[node, gpu] / 1e12:.3g} TFLOP/s in matrix products, {slow[name]}"
            yield Finding(PROBLEM, "matmul", (node,), text)


def axis_groups(axes: Report) -> list[dict[str, Any]]:
    """One entry a group of an axis: axis, ranks, hosts, rate (of its slowest rank, bytes/s)."""
    groups: dict[tuple[str, tuple[int, ...]], dict[str, Any]] = {}
    for entry in axes.checks.values():
        if entry["state"] == DONE and isinstance(found := entry["value"], dict):
            key = found["axis"], tuple(found["ranks"])
            group = groups.setdefault(
                key, {"axis": key[0], "ranks": found["ranks"], "hosts": [], "rate": found["rate"]}
            )
            group["rate"] = min(group["rate"], found["rate"])
            group["hosts"] = sorted({*group["hosts"], found["host"]})
    return list(groups.values())


def slow_axes(axes: Report, limits: Limits) -> Iterator[Finding]:
    if not axes.ended:
        reason = axes.error or "the processes did not find each other in time"
        yield Finding(PROBLEM, "all-reduce", (), f"not measured to the end: {reason}")
    groups = axis_groups(axes)
    for axis in dict.fromkeys(group["axis"] for group in groups):
        mine = {str(group["ranks"]): group for group in groups if group["axis"] == axis}
        for ranks, how in slow_ones({ranks: group["rate"] for ranks, group in mine.items()}, limits).items():
            group = mine[ranks]
            text = f"{axis} axis, ranks {ranks}: {group['rate'] / 1e9:.3g} GB/s, {how}"
            yield Finding(PROBLEM, "all-reduce", tuple(group["hosts"]), text)
