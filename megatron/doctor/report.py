"""The doctor's table and its JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from megatron.doctor.findings import NOTE, PROBLEM, Finding, odd_ones, some_of
from megatron.doctor.frames import DONE
from megatron.doctor.gpu_verdicts import axis_groups
from megatron.doctor.nodes import Report
from megatron.doctor.probe import TORCH_PROCESS

_SHOWN = 4


def _python(value: Any) -> str:
    return str(value["version"])


def _packages(value: Any) -> str:
    present = sum(version is not None for version in value.values())
    return f"{present} of {len(value)} installed"


def _source(value: Any) -> str:
    return f"{value['revision']}, files {value['digest']}"


def _environment(value: Any) -> str:
    return " ".join(f"{name}={text}" for name, text in value.items()) or "nothing set"


def _limits(value: Any) -> str:
    locked = "no limit" if value["memlock"] < 0 else f"{value['memlock'] / 1e6:.0f} MB"
    return f"{value['nofile']} open files, locked memory {locked}, /dev/shm {value['shm'] / 1e9:.1f} GB"


def _gpus(value: Any) -> str:
    if not value["driver"]:
        return "no nvidia-smi"
    hottest = max((gpu["temperature"] or 0 for gpu in value["gpus"]), default=0)
    names = sorted({gpu["name"] for gpu in value["gpus"]})
    return f"{len(value['gpus'])} x {', '.join(names)}, driver {value['driver']} (CUDA {value['cuda']}), {hottest} C"


def _folder(value: Any) -> str:
    rate = "not writable" if value["rate"] is None else f"{value['rate'] / 1e6:.0f} MB/s"
    return f"{value['path']}: {rate}, {value['free'] / 1e9:.0f} GB free"


def _shared(value: Any) -> str:
    if not value["seen"]:
        return f"{value['folder']}: not the same folder"
    return f"{value['folder']}: seen, flock {value['flock']}, fcntl {value['fcntl']}"


def _files(value: Any) -> str:
    return f"{sum(size is not None for size in value.values())} of {len(value)} readable"


def _torch(value: Any) -> str:
    parts = [value["version"], f"CUDA {value['cuda']}" if value["cuda"] else "CPU build"]
    parts += [f"NCCL {value['nccl']}"] if value["nccl"] else []
    return ", ".join([*parts, f"{len(value['gpus'])} GPUs"])


def _matmul(value: Any) -> str:
    return f"{' '.join(f'{rate / 1e12:.3g}' for rate in value)} TFLOP/s"


_WORDS: dict[str, Callable[[Any], str]] = {
    "python": _python, "packages": _packages, "source": _source, "environment": _environment, "limits": _limits,
    "gpus": _gpus, "shared folder": _shared, "data files": _files, "torch": _torch, "matmul": _matmul,
}  # fmt: skip


def table(reports: Mapping[str, Report], axes: Report | None, why_no_axes: str, findings: Sequence[Finding]) -> str:
    """A line a check with the value on each node, then a line for everything that is wrong, then the verdict."""
    rows = _rows(reports, axes, why_no_axes)
    width = max(len(name) for name, _ in rows)
    failed = {name for report in reports.values() for name, entry in report.checks.items() if entry["state"] != DONE}
    failed |= {"all-reduce"} if axes is None else set()
    lines = [f"nodes: {some_of(list(reports))}"]
    for name, texts in rows:
        marks = [finding for finding in findings if finding.check == name]
        odd = list(dict.fromkeys(node for finding in marks if finding.level == PROBLEM for node in finding.nodes))
        word = _verdict(marks, is_known=name not in failed)
        lines.append(f"{name:{width}}  {word + (f' {some_of(odd)}' if odd else ''):20}  {_values(texts, odd)}")
    lines += [""] if findings else []
    lines += [f"{f.level:8} {f.check}: {f'{some_of(list(f.nodes))}: ' if f.nodes else ''}{f.text}" for f in findings]
    return "\n".join([*lines, "", verdict_line(findings)])


def _verdict(marks: Sequence[Finding], is_known: bool) -> str:
    if any(finding.level == PROBLEM for finding in marks):
        return PROBLEM.upper()
    return NOTE if marks else "ok" if is_known else "-"


def _rows(reports: Mapping[str, Report], axes: Report | None, why_no_axes: str) -> list[tuple[str, dict[str, str]]]:
    answers = {node: "yes" if report.ended else "no" for node, report in reports.items()}
    clocks = {n: f"{-report.delay:+.2f} s" for n, report in reports.items() if report.delay is not None}
    rows = [("answer", answers), ("clock", clocks)]
    names = dict.fromkeys(name for report in reports.values() for name in report.checks)
    for name in names:
        texts = {node: _text(name, report.checks[name]) for node, report in reports.items() if name in report.checks}
        if name != TORCH_PROCESS or set(texts.values()) != {DONE}:
            rows.append((name, texts))
    groups = axis_groups(axes) if axes else []
    rates = {f"{g['axis']} {g['ranks']} on {', '.join(g['hosts'])}": f"{g['rate'] / 1e9:.3g} GB/s" for g in groups}
    return [*rows, ("all-reduce", rates or {"": why_no_axes or "nothing was heard"})]


def _text(name: str, entry: Mapping[str, Any]) -> str:
    if entry["state"] != DONE or entry["value"] is None:
        return str(entry["state"])
    return _WORDS.get(name, _folder if name.endswith(" folder") else str)(entry["value"])


def _values(texts: Mapping[str, str], odd: Sequence[str]) -> str:
    """Once where all agree, by node where they are few, else those that are odd and one of the others."""
    if len(set(texts.values())) == 1:
        where = next(iter(texts)) if len(texts) == 1 else "all"
        return f"{where}: {next(iter(texts.values()))}" if where else next(iter(texts.values()))
    shown = dict(texts)
    if len(texts) > _SHOWN:
        different = {node for node in odd if node in texts} or set(odd_ones(texts))
        others = [node for node in texts if node not in different]
        shown = {node: texts[node] for node in [*different][:_SHOWN] + others[:1]}
    more = f"; {len(texts) - len(shown)} more" if len(shown) < len(texts) else ""
    return "; ".join(f"{node}: {text}" for node, text in shown.items()) + more


def verdict_line(findings: Sequence[Finding]) -> str:
    """How many problems there are, and on which nodes; or that there is none."""
    problems = [finding for finding in findings if finding.level == PROBLEM]
    nodes = list(dict.fromkeys(node for finding in problems for node in finding.nodes))
    count = f"{len(problems)} problem{'s' if len(problems) > 1 else ''}"
    return f"verdict: {count}{f' on {some_of(nodes)}' if nodes else ''}" if problems else "verdict: fine"


def as_json(reports: Mapping[str, Report], axes: Report | None, findings: Sequence[Finding], seconds: float) -> str:
    """Everything that was found: nodes, axes, findings, verdict, seconds."""
    is_fine = not any(finding.level == PROBLEM for finding in findings)
    content = {
        "verdict": "fine" if is_fine else "problems",
        "seconds": round(seconds, 1),
        "findings": [asdict(finding) for finding in findings],
        "nodes": {node: asdict(report) for node, report in reports.items()},
        "axes": axis_groups(axes) if axes else [],
    }
    return json.dumps(content, indent=1) + "\n"
