"""What a trained Transformer is worth as the start of a TokenFormer: `python -m tools.paper.head_start FILE`.

On the demo's data: a Transformer of the demo's width and depth is trained with the keys of configs/demo.yml, made into
a TokenFormer by `convert.py from-transformer`, and trained on for a short time; so is the same TokenFormer from a
random start. Each start takes the learning rate that is better for it on one seed; three seeds then tell them apart.
Losses are nats a token of the first held-out addresses (docs/exchange.md).

FILE is written after every run, and a later call goes on from it. With OMP_NUM_THREADS=1 all take some ten minutes of
a core. Needs the demo's data: `make demo`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.config import load_config
from megatron.data import IndexedDataset
from megatron.errors import UserError, run_command
from megatron.evaluation.perplexity import perplexity
from megatron.inference import load_model
from megatron.model import LanguageModel
from megatron.mpu.environment import ensure_process_environment
from megatron.training import train
from tools.ckpts.convert import main as convert
from tools.results import Results, known_results, write_results

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs/demo.yml"
SIZES = ((256, 256, 512), (64, 64, 512))
"""Tokens of qkv, proj and ffn: two for each dimension, which makes queries, keys and values exact; and what has as many
parameters as the Transformer. Both have one for each of its inner channels."""
STARTS = ("converted", "random")
RATES = (7.8125e-3, 2e-3, 5e-4)
"""That of configs/demo.yml, about a quarter of it, and a sixteenth."""
SEEDS = (0, 1, 2)
TRANSFORMER_UPDATES, UPDATES = 900, (30, 60)
"""When losses are measured; the last is the end of a run."""
SAMPLES, HELD_OUT_TOKENS = 128, 32_768
TRANSFORMER = "Transformer"


@dataclass(frozen=True)
class Demo:
    """The demo's files, and where runs are kept."""

    data: Path
    work: Path

    @property
    def keys(self) -> dict[str, Any]:
        """What every run changes of configs/demo.yml."""
        corpus = {kind: str(self.data / f"data/sotu_{kind}/sotu_{kind}_text_document") for kind in ("train", "heldout")}
        return {
            "train_data_paths": [corpus["train"]], "valid_data_paths": [corpus["heldout"]], "log_dir": None,
            "vocab_file": str(self.data / "tokenizer.json"), "eval_interval": TRANSFORMER_UPDATES, "eval_iters": 1,
            "keep_last_n_checkpoints": None,
        }  # fmt: skip

    def train(self, folder: Path, updates: int, **keys: Any) -> None:
        """One run, from its last checkpoint where it has any. Raises UserError where it was told to stop."""
        places = {"save": str(folder), "load": str(folder), "train_iters": updates}
        if train(load_config([CONFIG], {**self.keys, **places, **keys})).iteration < updates:
            raise UserError(f"stopped in {folder}; the same command goes on from there")

    def loss(self, model: LanguageModel) -> float:
        """Nats a held-out token."""
        dataset, ids = IndexedDataset(self.keys["valid_data_paths"][0]), list[int]()
        for document in range(len(dataset)):
            ids += dataset[document].tolist() if len(ids) < HELD_OUT_TOKENS else []
        found = perplexity(model, np.array(ids[:HELD_OUT_TOKENS]), model.config.seq_length, batch_size=32)
        return round(found["loss"], 4)


@dataclass(frozen=True)
class Trial:
    """A TokenFormer that is trained for a short time."""

    size: tuple[int, int, int]
    start: str
    seed: int
    rate: float

    @property
    def name(self) -> str:
        """By which its result is kept."""
        return f"{'/'.join(map(str, self.size))} {self.start} rate {self.rate:g} seed {self.seed}"

    def run(self, demo: Demo) -> dict[str, Any]:
        """Train, and the losses on the way."""
        folder = demo.work / self.name.replace(" ", "-").replace("/", "-")
        begin = converted(demo, self.size) if self.start == "converted" else None
        slots = dict(zip(("qkv_slot_num", "proj_slot_num", "ffn_slot_num"), self.size, strict=True))
        keys: dict[str, Any] = {
            **slots, "seed": self.seed, "optimizer.params.lr": self.rate, "checkpoint_factor": UPDATES[0],
            "min_lr": self.rate / 10,
        }  # fmt: skip
        if begin and not (folder / "latest").is_file():
            keys |= {"load": str(begin), "finetune": True}
        demo.train(folder, UPDATES[-1], **keys)
        model = load_model(begin) if begin else LanguageModel(load_model(folder).config, seed=self.seed)
        losses = {0: demo.loss(model)}
        return {"losses": losses | {count: demo.loss(load_model(folder / f"global_step{count}")) for count in UPDATES}}


def converted(demo: Demo, size: tuple[int, int, int]) -> Path:
    """A run's folder with what the Transformer was made into; made where it is not there."""
    folder = demo.work / f"converted-{'-'.join(map(str, size))}"
    if not folder.exists():  # it is written whole or not at all
        source = str(demo.work / "transformer" / f"global_step{TRANSFORMER_UPDATES}")
        named = zip(("qkv", "proj", "ffn"), size, strict=True)
        flags = [word for kind, count in named for word in (f"--{kind}", f"{count}")]
        text = demo.keys["train_data_paths"][0]
        convert(["from-transformer", source, str(folder), *flags, "--text", text, "--samples", str(SAMPLES)])
    return folder


def run_transformer(demo: Demo) -> dict[str, Any]:
    """Train the Transformer, and its loss."""
    slots = dict.fromkeys(("qkv_slot_num", "proj_slot_num", "ffn_slot_num"))
    keys = {"attention_config": [[["global"], 2]], "checkpoint_factor": TRANSFORMER_UPDATES // 3}
    demo.train(demo.work / "transformer", TRANSFORMER_UPDATES, **slots, **keys)
    return {"losses": {TRANSFORMER_UPDATES: demo.loss(load_model(demo.work / "transformer"))}}


def best_rate(results: Results, size: tuple[int, int, int], start: str) -> float:
    """The rate with the lower loss at the end, on the first seed."""
    tried = {rate: results[Trial(size, start, SEEDS[0], rate).name] for rate in RATES}
    return min(tried, key=lambda rate: tried[rate]["losses"][str(UPDATES[-1])])


def missing(results: Results) -> Iterator[Trial]:
    """Runs of TokenFormers that have no result yet, in their order; looks at `results` again before each."""
    for size in SIZES:
        for start in STARTS:
            wanted = [Trial(size, start, SEEDS[0], rate) for rate in RATES]
            yield from (trial for trial in wanted if trial.name not in results)
            rate = best_rate(results, size, start)
            wanted = [Trial(size, start, seed, rate) for seed in SEEDS]
            yield from (trial for trial in wanted if trial.name not in results)


def report(results: Results) -> Iterator[str]:
    """Markdown: a line a size and start whose seeds are all there."""
    yield f"The Transformer: {results[TRANSFORMER]['losses'][str(TRANSFORMER_UPDATES)]:.3f} nats a token"
    yield ""
    yield f"| tokens | start | rate | 0 updates | {' | '.join(map(str, UPDATES))} |"
    yield f"|---|---|---|---|{'---|' * len(UPDATES)}"
    for size in SIZES:
        for start in STARTS:
            if any(Trial(size, start, SEEDS[0], rate).name not in results for rate in RATES):
                continue
            rate = best_rate(results, size, start)
            found = [results[name] for seed in SEEDS if (name := Trial(size, start, seed, rate).name) in results]
            cells = [_mean([run["losses"][str(count)] for run in found]) for count in (0, *UPDATES)]
            yield f"| {'/'.join(map(str, size))} | {start} | {rate:g} | {' | '.join(cells)} |"


def _mean(losses: Sequence[float]) -> str:
    """Mean and standard error."""
    error = statistics.stdev(losses) / len(losses) ** 0.5 if len(losses) > 1 else 0.0
    return f"{statistics.mean(losses):.3f} ± {error:.3f}"


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the file does not have yet, and print the table."""
    parser = argparse.ArgumentParser(
        "python -m tools.paper.head_start", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="FILE", help="results as JSON, read first where it is there")
    parser.add_argument("--demo", type=Path, default=Path("demo_output"), help="the demo's folder")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/head_start"), help="of the runs")
    options = parser.parse_args(argv)
    ensure_process_environment()
    demo, results = Demo(options.demo, options.work_dir), known_results(options.results)
    if not (options.demo / "tokenizer.json").is_file():
        raise UserError(f"--demo: {options.demo} has no tokenizer.json; run `make demo` first, or name its folder")

    def keep(name: str, result: Mapping[str, Any]) -> None:
        results[name] = json.loads(json.dumps(result))
        print(f"{name}: {results[name]['losses']}", flush=True)
        write_results(options.results, results)

    if TRANSFORMER not in results:
        keep(TRANSFORMER, run_transformer(demo))
    for trial in missing(results):
        keep(trial.name, trial.run(demo))
    print("\n".join(report(results)))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
