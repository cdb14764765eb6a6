"""How long a run takes from its command to its first iteration, and what of that is imports of torch and DeepSpeed.

    python -m tools.bench.startup [--scripts train.py deepy.py] [--against PATH] [--rounds 5] [--json FILE]

Trains a toy model for one iteration on the CPU. `--against` runs the same in another checkout, in turns. `torch` and
`deepspeed` are their imports (without each other) in all processes of the command, of which deepy.py has four; `rest`
is the remainder, which is ours. Lines with `processor` give the processor time of the same, which other load on the
machine changes less; waiting is not in it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import yaml

from megatron.data import IndexedDatasetBuilder
from megatron.errors import UserError, run_command
from megatron.text import align
from megatron.tokenizer.training import train_tokenizer
from tools.bench.measure import Result, as_document, compare, parser, take_turns, write_json

ROOT = Path(__file__).parents[2]
_HOOK = Path(__file__).parent / "import_clock"
_SCRIPTS: Mapping[str, tuple[str, ...]] = {"train.py": ("train.py",), "deepy.py": ("deepy.py", "train.py")}
_FIRST = re.compile(r"\biteration 1\b")
_PARTS = ("torch", "deepspeed", "rest", "total")
# Without bytecode files, Python would compile this project anew at every start.
_LEFT_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "PYTHONDONTWRITEBYTECODE")


@dataclass(frozen=True)
class Start:
    """Seconds of one start, and those of the processor, by what they went to: {part: seconds}."""

    elapsed: Mapping[str, float]
    processor: Mapping[str, float]


@dataclass(frozen=True)
class _Import:
    process: str
    name: str
    begin: float
    end: float
    processor: float


def write_run(folder: Path) -> Path:
    """The YAML file of a run of one iteration, with data and a tokenizer of its own, all in `folder`."""
    text = "the parameters of a model are tokens that its inputs attend to. " * 50
    train_tokenizer([text], 300, folder / "tokenizer.json")
    with IndexedDatasetBuilder(str(folder / "corpus"), np.uint16) as builder:
        for number in range(100):
            builder.add_document(np.resize(np.arange(1, 200 + number % 7), 99))
        builder.finalize()
    keys: dict[str, Any] = {
        "num_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 32, "rotary_pct": 0.25,
        "qkv_slot_num": 32, "proj_slot_num": 32, "ffn_slot_num": 64, "norm": "layernorm_nonparam",
        "final_norm": "layernorm", "output_layer_init_method": "wang_init", "tokenizer_type": "HFTokenizer",
        "vocab_file": str(folder / "tokenizer.json"), "data_path": str(folder / "corpus"), "split": "90,10,0",
        "optimizer": {"type": "Adam", "params": {"lr": 1e-3, "betas": [0.9, 0.95]}}, "min_lr": 1e-4,
        "lr_decay_style": "cosine", "train_micro_batch_size_per_gpu": 2, "train_iters": 1, "eval_iters": 0,
        "log_interval": 1, "num_workers": 0, "distributed_backend": "gloo", "precision": "fp32",
    }  # fmt: skip
    file = folder / "run.yml"
    file.write_text(yaml.safe_dump(keys), encoding="utf-8")
    return file


def start(checkout: Path, words: tuple[str, ...], run: Path) -> Start:
    """Run the command `words` of a checkout to its end; UserError when it does not come to its first iteration."""
    clock = run.with_name("imports.txt")
    clock.unlink(missing_ok=True)
    environment = clock_environment(clock, ["torch", "deepspeed"])
    begin, reached, used, lines = time.monotonic(), 0.0, 0.0, list[str]()
    process = subprocess.Popen(
        [sys.executable, *words, str(run)], cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert process.stdout is not None
    for line in process.stdout:
        lines.append(line)
        if not reached and _FIRST.search(line):
            reached, used = time.monotonic(), _processor_seconds(process.pid)
    if process.wait() or not reached:
        raise UserError(f"{checkout}: `{' '.join(words)}` ended with {process.returncode}: {''.join(lines[-3:])}")
    imports = [found for found in _imports(clock) if found.end <= reached]
    elapsed = _parts(imports, reached - begin, lambda found: found.end - found.begin)
    return Start(elapsed, _parts(imports, used, lambda found: found.processor))


def clock_environment(file: Path, names: Sequence[str]) -> dict[str, str]:
    """This environment, on a CPU and without a rank, for processes that note in `file` what these imports take."""
    return {
        **{name: value for name, value in os.environ.items() if name not in _LEFT_OUT},
        "PYTHONPATH": str(_HOOK), "IMPORT_CLOCK_FILE": str(file), "IMPORT_CLOCK_NAMES": ",".join(names),
        "CUDA_VISIBLE_DEVICES": "", "PYTHONUNBUFFERED": "1",
    }  # fmt: skip


def _processor_seconds(pid: int) -> float:
    """Of a process, those that it has started, and those of them that have ended."""
    top = psutil.Process(pid)
    return sum(sum(process.cpu_times()[:4]) for process in [top, *top.children(recursive=True)])


def _imports(clock: Path) -> list[_Import]:
    lines = [line.split() for line in clock.read_text(encoding="ascii").splitlines()]
    return [_Import(words[0], words[1], *map(float, words[2:])) for words in lines]


def _parts(imports: Sequence[_Import], total: float, seconds: Callable[[_Import], float]) -> dict[str, float]:
    """What each import took, less what it spent in the other, and what that leaves of `total`."""
    sums = {"torch": 0.0, "deepspeed": 0.0}
    for found in imports:
        inner = [i for i in imports if i.process == found.process and found.begin < i.begin and i.end < found.end]
        sums[found.name] += seconds(found) - sum(map(seconds, inner))
    return {**sums, "rest": total - sum(sums.values()), "total": total}


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=5)
    flags.add_argument("--scripts", nargs="+", choices=list(_SCRIPTS), default=list(_SCRIPTS))
    flags.add_argument("--against", type=Path, metavar="PATH", help="another checkout of this repository")
    options = flags.parse_args()
    checkouts = {"here": ROOT}
    if options.against:
        if not (options.against / "train.py").is_file():
            raise UserError(f"--against: {options.against} has no train.py; give the folder of a checkout")
        checkouts["there"] = options.against.resolve()
    tables = dict[str, dict[str, Result]]()
    with tempfile.TemporaryDirectory(prefix="startup_") as folder:
        run = write_run(Path(folder))
        for script in options.scripts:
            tables |= _measure(script, checkouts, run, options.rounds)
    settings = {"rounds": options.rounds, **{name: str(path) for name, path in checkouts.items()}}
    write_json(options.json, as_document("startup", tables, settings, torch.device("cpu")))
    return 0


def _measure(script: str, checkouts: Mapping[str, Path], run: Path, rounds: int) -> dict[str, dict[str, Result]]:
    """A table for each part of the start, by checkout, printed as one."""
    starts: dict[str, list[Start]] = {name: [] for name in checkouts}

    def once(name: str) -> float:
        starts[name].append(start(checkouts[name], _SCRIPTS[script], run))
        return starts[name][-1].elapsed["total"]

    take_turns({name: lambda name=name: once(name) for name in checkouts}, rounds)  # type: ignore[misc]
    baseline = list(checkouts)[-1]
    found = {}
    for part in _PARTS:
        for kind in ("elapsed", "processor"):
            times = {name: [getattr(s, kind)[part] for s in measured[1:]] for name, measured in starts.items()}
            found[f"{script}, {part}, {kind}"] = compare(times, baseline)
    print(_table(script, found, list(checkouts)))
    return found


def _table(script: str, found: Mapping[str, Mapping[str, Result]], names: list[str]) -> str:
    head = [script, *(f"{name}, {kind}" for name in names for kind in ("median", "fastest"))]
    both = len(names) > 1
    rows = [[*head, *(["ratio", "of minima"] if both else [])]]
    for title, results in found.items():
        _, part, kind = title.split(", ")
        cells = [f"{value:.2f} s" for name in names for value in (results[name].median, results[name].minimum)]
        here = results[names[0]]
        ratios = [f"{here.ratio:.3f}", f"{here.ratio_of_minima:.3f}"] if both else []
        rows.append([part if kind == "elapsed" else f"  {kind}", *cells, *ratios])
    return "\n".join(align(rows, [0])) + "\n"


if __name__ == "__main__":
    sys.exit(run_command(main))
