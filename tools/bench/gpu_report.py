"""All benchmarks on one GPU in ten minutes: `python tools/bench/gpu_report.py`; see docs/performance.md.

Writes to --output: report.md with the table of model FLOPs utilisation and what each benchmark printed; report.json;
machine.yml, which the planner reads (--machine); and a JSON file for each benchmark. Without a GPU everything runs at
toy size. A benchmark that fails is a row of the table, and the others go on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # run by its path
    sys.path[0] = str(ROOT)  # not this folder, whose files are named like their subjects

from tools.gpu.report import summary, table, write_json  # noqa: E402
from tools.gpu.running import Part, Row, Settings, choose_device, run_part  # noqa: E402
from tools.gpu.wheels import bring, missing  # noqa: E402


@dataclass(frozen=True)
class Bench:
    """`python -m tools.bench.NAME` with these words on a GPU, or those at toy size."""

    name: str
    words: str
    toy: str
    seconds: float
    """After which it is stopped."""
    writes_json: bool = True


_TOY = "--layers 1 --width 32 --heads 2 --vocabulary 256 --length 16 --rounds 1"
BENCHES = (
    Bench("machine", "FOLDER/machine.yml", "FOLDER/machine.yml --quick", 60, writes_json=False),
    Bench(
        "pattention",
        "--rounds 15 --dtype bf16 --backends reference fused compiled triton",
        "--tokens 32 --width 16 --slots 32 --rounds 1 --backends reference fused",
        90,
    ),
    Bench("head", "--tokens 8192 --dtype bf16", "--tokens 64 --width 16 --vocabulary 256 --rounds 1", 60),
    Bench("step", "--samples 8 --length 2048 --rounds 5", _TOY, 120),
    Bench(
        "planner",
        "--machine FOLDER/machine.yml --sizes 150M 900M --samples 4",
        "--machine FOLDER/machine.yml --sizes toy --samples 1 --rounds 1",
        90,
    ),
    Bench(
        "generation",
        "--rounds 4",
        "--config FOLDER/toy.yml --context 8 --batch 1 --steps 1 --rounds 1",
        120,
    ),
    Bench("preprocess", "--megabytes 16 --rounds 2", "--megabytes 0.1 --rounds 1 --without-datasets", 60),
    Bench("startup", "--scripts train.py --rounds 3", "--scripts train.py --rounds 1", 60),
)
MFU = tuple(Part(f"mfu_{name}", "tools.gpu.mfu_parts", 150) for name in ("150m", "450m", "900m", "1_5b"))
_TOY_MODEL = """\
{"num_layers": 1, "hidden_size": 32, "num_attention_heads": 2, "seq_length": 64, "rotary_pct": 0.25,
 "qkv_slot_num": 32, "proj_slot_num": 32, "ffn_slot_num": 64, "norm": "layernorm_nonparam"}
"""


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(prog="gpu_report.py", description=(__doc__ or "").split("\n\n")[0])
    names = ", ".join([*(bench.name for bench in BENCHES), *(part.name for part in MFU)])
    parser.add_argument("--output", type=Path, default=Path("gpu_report"), metavar="FOLDER")
    parser.add_argument("--only", metavar="NAMES", help=f"these and `machine`, joined by commas: {names}")
    parser.add_argument("--toy", action="store_true", help="toy size, on the CPU, whatever the machine has")
    parser.add_argument("--minutes", type=float, default=10, help="what has not begun by then is left out (default 10)")
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install what is missing from these wheels")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run everything and write the report; 0 all ran, 1 something failed, 2 it cannot run."""
    options = parse(argv)
    begin, rows = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="gpu_report_") as scratch:
        try:
            chosen = _select(options.only)
            lacking = bring(options.wheels, Path(scratch) / "site") if options.wheels else missing()
            if lacking:
                raise ValueError(f"missing: {', '.join(lacking)}; pip install them, or give --wheels FOLDER")
            options.output.mkdir(parents=True, exist_ok=True)
        except (ValueError, RuntimeError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        device = "cpu" if options.toy else choose_device("auto")
        settings = Settings(device, scratch, toy=device == "cpu")
        (Path(scratch) / "toy.yml").write_text(_TOY_MODEL, encoding="utf-8")
        for row in _run(chosen, settings, begin + 60 * options.minutes):
            print(f"{row.status:8} {row.part}: {row.check} {row.figure}", flush=True)
            rows.append(row)
        _write(options.output, Path(scratch), rows, time.monotonic() - begin, device)
    print(f"\n{(options.output / 'report.md').read_text(encoding='utf-8')}")
    return int(any(row.status == "failed" for row in rows))


def _select(names: str | None) -> list[Bench | Part]:
    """Benchmarks and parts by name, the machine first: others read its file."""
    entries: list[Bench | Part] = [BENCHES[0], *MFU, *BENCHES[1:]]
    known = {entry.name: entry for entry in entries}
    wanted = names.split(",") if names else list(known)
    if unknown := [name for name in wanted if name not in known]:
        raise ValueError(f"--only: unknown '{unknown[0]}'; choose from {', '.join(known)}")
    return [entry for name, entry in known.items() if name in wanted or name == "machine"]


def _run(chosen: list[Bench | Part], settings: Settings, end: float) -> Iterator[Row]:
    for entry in chosen:
        if time.monotonic() >= end:
            yield Row(entry.name, "", "skipped", "no time is left; raise --minutes")
        elif isinstance(entry, Part):
            yield from run_part(entry, settings)
        else:
            yield run_bench(entry, settings, end - time.monotonic())


def run_bench(bench: Bench, settings: Settings, left: float) -> Row:
    """Run one benchmark to its end or its time limit; what it prints goes to NAME.txt, its figures to NAME.json."""
    folder = Path(settings.folder)
    words = (bench.toy if settings.toy else bench.words).replace("FOLDER", settings.folder).split()
    words += ["--json", str(folder / f"{bench.name}.json")] if bench.writes_json else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    if settings.device == "cpu":
        environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    output, begin = folder / f"{bench.name}.txt", time.monotonic()
    with output.open("w", encoding="utf-8") as file, (folder / f"{bench.name}.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", f"tools.bench.{bench.name}", *words], cwd=ROOT, env=environment, stdout=file,
            stderr=log, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = process.wait(left if settings.toy else min(left, bench.seconds))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it, or what it has left behind
            process.wait()
    seconds = f"{time.monotonic() - begin:.0f} s"
    if code == 0:
        return Row(bench.name, "ran", "ok", seconds)
    last = (folder / f"{bench.name}.log").read_text(errors="replace").strip().splitlines()[-1:] or ["no word"]
    reason = f"no end within {seconds}" if code is None else f"ended with {code}: {last[0][:200]}"
    return Row(bench.name, "ran", "failed", reason)


def _write(output: Path, scratch: Path, rows: list[Row], seconds: float, device: str) -> None:
    for name in ("machine.yml", *(f"{bench.name}.json" for bench in BENCHES)):
        if (scratch / name).is_file():
            shutil.copyfile(scratch / name, output / name)
    lines = _lines_of(scratch / "mfu.jsonl")
    write_json(output / "report.json", rows, {"device": device, "seconds": round(seconds), "mfu": lines})
    parts = [f"# {_device_name(device)}", mfu_table(lines), f"```\n{table(rows)}\n{summary(rows, seconds)}\n```"]
    for bench in BENCHES:
        if (scratch / f"{bench.name}.txt").is_file():
            text = (scratch / f"{bench.name}.txt").read_text(encoding="utf-8", errors="replace").strip()
            parts.append(f"## {bench.name}\n\n```\n{text}\n```")
    (output / "report.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _lines_of(file: Path) -> list[dict[str, float | str]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def _device_name(device: str) -> str:
    import torch

    if device == "cuda":
        return f"{torch.cuda.get_device_name(0)}, torch {torch.__version__}"
    return f"CPU at toy size, {torch.get_num_threads()} threads, torch {torch.__version__}"


def mfu_table(lines: list[dict[str, float | str]]) -> str:
    """Markdown: a line a model, measured and planned."""
    if not lines:
        return "No model was trained."
    rows = ["| model | samples | tokens/s | MFU | planned MFU |", "|---|---|---|---|---|"]
    for line in lines:
        figures = f"{line['tokens_per_second']:,.0f} | {line['mfu']:.1%} | {line['predicted_mfu']:.1%}"
        rows.append(f"| {line['size']} {line['model']} | {line['samples']} | {figures} |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
