"""The demo's result: `python -m tools.demo.report demo_output` prints one table and draws loss_curves.png."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from megatron.config import load_config
from megatron.data import IndexedDataset
from megatron.errors import UserError, run_command
from megatron.evaluation.perplexity import perplexity
from megatron.exchange import open_checkpoint
from megatron.inference import load_model
from megatron.tokenizer import build_tokenizer
from tools.demo.ngrams import bigram_loss, unigram_loss

CONFIG = "configs/demo.yml"


def all_tokens(prefix: str) -> np.ndarray:
    """Every token of a data set, documents one after the other."""
    dataset = IndexedDataset(prefix)
    return np.concatenate([np.asarray(dataset[i]) for i in range(len(dataset))])


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file."""
    if not path.is_file():
        raise UserError(f"{path} is missing; run `make demo` from its start")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def held_out_losses(folder: Path) -> tuple[dict[str, float], int, int]:
    """Nats per held-out token of the n-gram models and the trained model; how many tokens and bytes that text has."""
    config = load_config([CONFIG])
    data = config.data
    assert data.train_data_paths and data.valid_data_paths
    train, held_out = all_tokens(data.train_data_paths[0]), all_tokens(data.valid_data_paths[0])
    vocabulary = build_tokenizer(config.tokenizer).vocab_size
    model = load_model(folder / "checkpoints")
    losses = {
        "unigram model": unigram_loss(train, held_out, vocabulary),
        "bigram model, smoothed": bigram_loss(train, held_out, vocabulary),
        f"TokenFormer, {model.num_parameters():,} parameters": perplexity(
            model, held_out, config.language.seq_length, batch_size=32
        )["loss"],
    }
    num_bytes = sum(len(line["text"].encode()) for line in read_jsonl(folder / "sotu_heldout.jsonl"))
    return losses, len(held_out) - 1, num_bytes


def zero_shot(folder: Path) -> dict[str, float]:
    """The metrics of the newest results file, `task metric` -> value."""
    files = sorted(folder.glob("eval_results_*.json"), key=lambda path: path.stat().st_mtime)
    if not files:
        raise UserError(f"{folder}: no eval_results file; run `make demo` from its start")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    return {
        f"{task} {metric.split(',')[0]}": value
        for task, metrics in results.items()
        for metric, value in metrics.items()
        if isinstance(value, float) and metric.startswith("acc") and "stderr" not in metric
    }


def draw_curves(metrics: list[dict[str, Any]], baselines: dict[str, float], path: Path) -> None:
    """Training and validation loss against tokens, with the n-gram models as lines."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for key, label, style in (("lm_loss", "training", "-"), ("valid_lm_loss", "held out", "o-")):
        lines = [line for line in metrics if key in line]
        millions = [line["consumed_tokens"] / 1e6 for line in lines]
        axes.plot(millions, [line[key] for line in lines], style, label=label, markersize=3, linewidth=1.2)
    for (name, loss), style in zip(baselines.items(), ("--", ":"), strict=True):
        axes.axhline(loss, color="grey", linestyle=style, linewidth=1, label=name)
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)")
    axes.set_title("TokenFormer on State of the Union addresses, CPU")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def report(folder: Path) -> None:
    """Print the table and write the figure."""
    losses, num_tokens, num_bytes = held_out_losses(folder)
    table = Table(title="Held-out text", title_justify="left")
    for column in ("model", "nats/token", "perplexity", "bits/byte"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for name, loss in losses.items():
        bits_per_byte = loss * num_tokens / math.log(2) / num_bytes
        table.add_row(name, f"{loss:.3f}", f"{math.exp(loss):.1f}", f"{bits_per_byte:.3f}")
    unigram, bigram, model = losses.values()
    table.add_section()
    table.add_row("gain over the unigram model", f"{unigram - model:.3f}", "", "")
    for name, value in zero_shot(folder).items():
        table.add_row(f"{name} (chance 0.25)", f"{value:.3f}", "", "")
    metrics = read_jsonl(folder / "logs" / "metrics.jsonl")
    rates = [line["tokens_per_second"] for line in metrics if "tokens_per_second" in line]
    table.add_row("training tokens/s (median)", f"{np.median(rates):,.0f}", "", "")
    console = Console(width=100)
    console.print(table)
    for sample in read_jsonl(folder / "samples.jsonl")[:3]:
        console.print(f"[bold]{sample['context']}[/bold]{sample['text']}", highlight=False)
    figure = folder / "loss_curves.png"
    draw_curves(metrics, {"unigram model": unigram, "bigram model": bigram}, figure)
    latest = open_checkpoint(folder / "checkpoints")
    console.print(f"checkpoint: {latest.folder} (iteration {latest.iteration})\nloss curves: {figure}")


if __name__ == "__main__":
    sys.exit(run_command(lambda: report(Path(sys.argv[1] if len(sys.argv) > 1 else "demo_output"))))
