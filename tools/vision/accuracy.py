"""What small models of images reach on real data: `python -m tools.vision.accuracy tools/vision/accuracy.json`.

Classifiers: a TokenFormer and a Vision Transformer of as many parameters learn each set with train.py and the files of
configs/vision, three seeds each (docs/vision.md). The test images are a fifth of a set and always the same. One seed
also tries learning rates on another fifth, held out of the training images.

Images and texts: the demos of configs/clip and configs/image_to_text, on digits with captions, three seeds each.

The file is written after every run, and a later call goes on from it. A run takes three to ten minutes of a core.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.config import load_config
from megatron.errors import run_command
from megatron.model.build import build_model
from tools.results import known_results, write_results
from tools.vision.data import prepare
from tools.vision.pairs import CaptionTrial, ClipTrial, PairTrial, pair_trials
from tools.vision.scripts import ROOT, ScriptFolder

BATCH = 64
RATES = (1e-3, 2e-3, 4e-3)
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Subject:
    """What is learned: training and test images, how often it sees the former, the top-1 in % that is asked for."""

    train: int
    test: int
    epochs: int
    bar: float


SUBJECTS = {"digits": Subject(1437, 360, 60, 95.0), "mnist5k": Subject(4000, 1000, 24, 93.0)}
MODELS = {"TokenFormer": "demo_{}.yml", "ViT": "demo_{}_vit.yml"}
"""Files of configs/vision; the bar is the TokenFormer's."""


@dataclass(frozen=True)
class Trial:
    """One run."""

    subject: str
    model: str
    seed: int
    rate: float | None = None
    """The learning rate that is tried on held-out training images. None: that of the file, on the test images."""

    @property
    def name(self) -> str:
        """By which its result is kept."""
        which = f"seed {self.seed}" if self.rate is None else f"rate {self.rate:g}"
        return f"{self.subject} {self.model} {which}"

    @property
    def config(self) -> Path:
        """Its YAML file."""
        return ROOT / "configs/vision" / MODELS[self.model].format(self.subject)

    def keys(self, folder: Path, data_path: Path) -> dict[str, Any]:
        """What it changes of that file.

        Args:
            folder: of its metrics.
            data_path: prefix of its images.
        """
        subject, tries = SUBJECTS[self.subject], self.rate is not None
        held_out = subject.train // 5
        train = subject.train - held_out if tries else subject.train
        split = f"{train},{held_out},{subject.test}" if tries else f"{train},{subject.test},0"
        updates = round(subject.epochs * train / BATCH)
        keys = {
            "data_path": data_path, "split": split, "seed": self.seed, "train_batch_size": BATCH,
            "train_iters": updates, "eval_interval": updates, "save": "null", "log_dir": folder,
        }  # fmt: skip
        return keys | ({"optimizer.params.lr": self.rate} if tries else {})

    def run(self, path: Path, data: Path) -> dict[str, Any]:
        """Train in a folder with the images of `data`, and what came of it. Raises UserError where train.py fails."""
        folder, begin = ScriptFolder(path, self.name), time.perf_counter()
        folder.call("train.py", self.config, keys=self.keys(path, prepare(self.subject, data)))
        return {
            "accuracy": round(100 * folder.last_metric("valid_acc1"), 2),
            "parameters": build_model(load_config(self.config).model, device="meta").num_parameters(),
            "seconds": round(time.perf_counter() - begin),
        }


def trials() -> Iterator[Trial | PairTrial]:
    """All runs: the seeds, then the rates."""
    for seed in SEEDS:
        yield from (Trial(subject, model, seed) for subject in SUBJECTS for model in MODELS)
    yield from pair_trials(SEEDS)
    for rate in RATES:
        yield from (Trial(subject, model, SEEDS[0], rate) for subject in SUBJECTS for model in MODELS)


@dataclass(frozen=True)
class Row:
    """A figure of several seeds: what it is, the runs that have it, and the mean that is asked for, if any."""

    title: str
    names: Sequence[str]
    bar: float | None
    figure: str = "accuracy"


def rows() -> Iterator[Row]:
    """Of the table."""
    for name, subject in SUBJECTS.items():
        for model in MODELS:
            names = [Trial(name, model, seed).name for seed in SEEDS]
            bar = subject.bar if model == "TokenFormer" else None
            yield Row(f"{name}, {subject.epochs} epochs, {model}", names, bar)
    clip, captions = ([kind(seed).name for seed in SEEDS] for kind in (ClipTrial, CaptionTrial))
    yield Row("digits, zero-shot, CLIP", clip, 90.0)
    yield Row("the same with templates that no caption has", clip, None, "unseen_templates")
    yield Row("digits, right captions of ten", captions, 90.0)


def report(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a line for each row whose seeds are all there."""
    seeds = " | ".join(f"seed {seed}" for seed in SEEDS)
    yield f"| | parameters | {seeds} | mean | bar |"
    yield f"|---|---|{'---|' * len(SEEDS)}---|---|"
    for row in rows():
        if not all(name in results for name in row.names):
            continue
        found = [results[name][row.figure] for name in row.names]
        mean, error = statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5
        cells = [row.title, f"{results[row.names[0]]['parameters']:,}", *(f"{value:.1f}" for value in found)]
        cells += [f"{mean:.1f} ± {error:.1f}", "" if row.bar is None else f"{row.bar:g}"]
        yield f"| {' | '.join(cells)} |"


def rates_report(results: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Markdown: a line a model and set that has tried all rates, the best one in bold."""
    yield f"| | {' | '.join(f'{rate:g}' for rate in RATES)} |"
    yield f"|---|{'---|' * len(RATES)}"
    for name in SUBJECTS:
        for model in MODELS:
            names = [Trial(name, model, SEEDS[0], rate).name for rate in RATES]
            if all(each in results for each in names):
                found = [results[each]["accuracy"] for each in names]
                cells = [f"**{value:.1f}**" if value == max(found) else f"{value:.1f}" for value in found]
                yield f"| {name}, {model} | {' | '.join(cells)} |"


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tools.vision.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, metavar="FILE", help="results as JSON, read first where it is there")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name contains this")
    parser.add_argument("-d", "--data-dir", type=Path, default=Path("data"), help="of the images; default data")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/vision_accuracy"), help="of logs and metrics")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Run what the file does not have yet, and print the tables."""
    options = parse(sys.argv[1:] if argv is None else argv)
    results = known_results(options.results)
    for trial in trials():
        if trial.name in results or options.only not in trial.name:
            continue
        results[trial.name] = trial.run(options.work_dir / trial.name.replace(" ", "-"), options.data_dir)
        print(f"{trial.name}: {results[trial.name]['accuracy']} ({results[trial.name]['seconds']} s)", flush=True)
        write_results(options.results, results)
    print("\n".join([*report(results), "", *rates_report(results)]))
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
