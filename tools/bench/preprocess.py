"""prepare_data.py beside `datasets.map` and bare `encode_batch`, with the same tokenizer on all cores.

    python -m tools.bench.preprocess [--input FILE.jsonl] [--vocab-file tokenizer.json] [--megabytes 24]
                                     [--workers N ..] [--rounds 3] [--json FILE]

Every contestant is a process of its own. Of prepare_data.py the whole command counts, from its start to files that are
in place; so it does of `datasets.map`, which writes its Arrow file; of `encode_batch` only the calls themselves, with
the texts in memory and no result kept. Without --input the corpus is the source of Python's standard library; without
--vocab-file a byte-level BPE of 8192 entries is trained on a part of it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from megatron.data import IndexedDataset
from megatron.data.text import read_documents, texts
from megatron.errors import UserError, run_command
from megatron.tokenizer.training import train_tokenizer
from tools.bench.measure import Timed, as_document, compare, parser, table, take_turns, write_json

ROOT = Path(__file__).parents[2]
_BATCH = 1000
_MAP = """
import sys
from datasets import disable_progress_bars, load_dataset
from tokenizers import Tokenizer
disable_progress_bars()
source, vocabulary, folder, workers = sys.argv[1:]
tokenizer = Tokenizer.from_file(vocabulary)
def encode(batch):
    return {"ids": [found.ids for found in tokenizer.encode_batch(batch["text"], add_special_tokens=False)]}
data = load_dataset("json", data_files=source, split="train", cache_dir=folder)
data = data.map(encode, batched=True, num_proc=int(workers), remove_columns=data.column_names)
print(len(data))
"""
_BARE = """
import json, sys, time
from tokenizers import Tokenizer
tokenizer = Tokenizer.from_file(sys.argv[2])
with open(sys.argv[1], encoding="utf-8") as file:
    texts = [json.loads(line)["text"] for line in file]
tokenizer.encode_batch(texts[:10], add_special_tokens=False)
seconds = tokens = 0
for start in range(0, len(texts), int(sys.argv[3])):
    batch = texts[start : start + int(sys.argv[3])]
    begin = time.perf_counter()
    found = tokenizer.encode_batch(batch, add_special_tokens=False)
    seconds += time.perf_counter() - begin
    tokens += sum(len(encoding.ids) for encoding in found)
print(seconds, tokens)
"""


@dataclass
class Job:
    """What all contestants encode, and what they say of it."""

    source: Path
    vocabulary: Path
    folder: Path
    tokens: dict[str, int] = field(default_factory=dict)
    """Tokens that a contestant counted, those that end documents left out."""
    peaks: dict[str, int] = field(default_factory=dict)
    """Bytes that the largest process of a contestant had resident."""

    def run(self, name: str, command: Sequence[str]) -> tuple[float, str]:
        """(seconds of the whole command, what it printed). UserError when it fails."""
        file, environment = self.folder / "output.txt", {**os.environ, "HF_HOME": str(self.folder / "hub")}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # else this project alone would be compiled every time
        with file.open("w", encoding="utf-8") as output:
            begin = time.perf_counter()
            process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, env=environment)
            _, status, usage = os.wait4(process.pid, 0)
            elapsed = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        text = file.read_text(encoding="utf-8")
        if process.returncode:
            raise UserError(f"{name}: ended with {process.returncode}: {text[-300:]}")
        self.peaks[name] = max(self.peaks.get(name, 0), usage.ru_maxrss * 1024)
        return elapsed, text


def prepare_data(job: Job, name: str, workers: int | None) -> Timed:
    """The whole command, with its own number of workers unless one is given."""

    def run() -> float:
        command = [sys.executable, "prepare_data.py", "-t", "HFTokenizer", "-v", str(job.vocabulary), "--name", "ours"]
        command += ["-d", str(job.folder), "--input", str(job.source)]
        elapsed, _ = job.run(name, [*command, *(["--num-workers", str(workers)] if workers is not None else [])])
        corpus = IndexedDataset(str(job.folder / "ours" / "ours_text_document"))
        job.tokens[name] = corpus.num_tokens - len(corpus)
        return elapsed

    return run


def datasets_map(job: Job, name: str) -> Timed:
    """The whole command, into a cache that is empty each time."""

    def run() -> float:
        with tempfile.TemporaryDirectory(dir=job.folder) as cache:
            words = [str(job.source), str(job.vocabulary), cache, str(_cores())]
            return job.run(name, [sys.executable, "-c", _MAP, *words])[0]

    return run


def bare(job: Job, name: str) -> Timed:
    """The calls of encode_batch alone."""

    def run() -> float:
        words = [str(job.source), str(job.vocabulary), str(_BATCH)]
        seconds, tokens = job.run(name, [sys.executable, "-c", _BARE, *words])[1].split()
        job.tokens[name] = int(tokens)
        return float(seconds)

    return run


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def write_corpus(path: Path, size: int) -> None:
    """About `size` bytes of the standard library's source as .jsonl, a document a file, repeated where it is short."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py"))
    written = 0
    with path.open("w", encoding="utf-8") as output:
        while written < size:
            before = written
            for file in files:
                if "site-packages" in file.parts or written >= size:
                    continue
                text = file.read_text(encoding="utf-8", errors="ignore")
                if text.strip():
                    written += output.write(json.dumps({"text": text}) + "\n")
            if written == before:
                raise UserError(f"--input: there is no source in {sysconfig.get_paths()['stdlib']}; give a .jsonl file")


def _some_texts(source: Path) -> Iterator[str]:
    for document in islice(read_documents([str(source)]), 400):
        yield from texts(document, ["text"])


def main() -> int:
    """Measure and print."""
    flags = parser(__doc__, rounds=3)
    flags.add_argument("--input", type=Path, help="a .jsonl file with `text`")
    flags.add_argument("--vocab-file", type=Path, help="a tokenizer.json")
    flags.add_argument("--megabytes", type=float, default=24, help="size of the corpus that is made without --input")
    flags.add_argument("--workers", type=int, nargs="*", default=[], help="prepare_data.py with so many workers too")
    flags.add_argument("--without-datasets", action="store_true", help="leave datasets.map out")
    options = flags.parse_args()
    with tempfile.TemporaryDirectory(prefix="preprocess_") as folder:
        job = _make_job(Path(folder), options)
        contestants = _contestants(job, options)
        results = compare(take_turns(contestants, options.rounds), baseline="bare encode_batch")
    size = (options.input or job.source, job.tokens["bare encode_batch"])
    if len(found := set(job.tokens.values())) > 1:
        raise UserError(f"the contestants do not agree on the number of tokens: {sorted(found)}")
    for name, result in results.items():
        result.facts = {
            "of bare": f"{1 / result.ratio:.2f}", "tokens/s": f"{size[1] / result.median:,.0f}",
            "resident": f"{job.peaks[name] / 2**20:,.0f} MiB",
        }  # fmt: skip
    print(f"{size[1]:,} tokens, {_cores()} cores; ratios are of seconds, `of bare` of speeds")
    print(table(results, ["of bare", "tokens/s", "resident"]))
    settings = {"rounds": options.rounds, "tokens": size[1], "cores": _cores(), "input": str(options.input)}
    write_json(options.json, as_document("preprocess", {"preprocess": results}, settings, torch.device("cpu")))
    return 0


def _make_job(folder: Path, options: Any) -> Job:
    source, vocabulary = options.input, options.vocab_file
    if source is None:
        source = folder / "corpus.jsonl"
        write_corpus(source, int(options.megabytes * 1e6))
    if vocabulary is None:
        vocabulary = folder / "tokenizer.json"
        train_tokenizer(_some_texts(source), 8192, vocabulary)
    return Job(source.resolve(), vocabulary.resolve(), folder)


def _contestants(job: Job, options: Any) -> dict[str, Timed]:
    found = {"prepare_data.py": prepare_data(job, "prepare_data.py", None)}
    for workers in options.workers:
        name = f"prepare_data.py, {workers} worker{'s' * (workers != 1)}"
        found[name] = prepare_data(job, name, workers)
    found["bare encode_batch"] = bare(job, "bare encode_batch")
    if find_spec("datasets") is None:
        print("datasets is not installed: datasets.map is left out")
    elif not options.without_datasets:
        found["datasets.map"] = datasets_map(job, "datasets.map")
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
