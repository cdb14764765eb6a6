"""One metrics dictionary, one log call, several sinks: console, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import itertools
import json
import os
import time
from pathlib import Path
from typing import Protocol

from megatron.config.schema import RunConfig
from megatron.errors import UserError
from megatron.log import get_logger

METRICS_FILE = "metrics.jsonl"
Metrics = dict[str, float | int | None]


class Sink(Protocol):
    """A place metrics go to."""

    def write(self, metrics: Metrics) -> None:
        """Record one dictionary; `iteration` is always in it."""

    def close(self) -> None:
        """Flush and release."""


class JsonLines:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines past its start, a new one the file."""

    def __init__(self, folder: Path, resumed_iteration: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if resumed_iteration:
            self._keep_until(path, resumed_iteration)
        elif path.is_file():
            self._set_aside(path)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    @staticmethod
    def _set_aside(path: Path) -> None:
        """An earlier run's file becomes metrics.jsonl.1 (or the next free number)."""
        number = next(n for n in itertools.count(1) if not path.with_name(f"{METRICS_FILE}.{n}").exists())
        os.replace(path, path.with_name(f"{METRICS_FILE}.{number}"))

    @staticmethod
    def _keep_until(path: Path, iteration: int) -> None:
        if not path.is_file():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _line_iteration(line) <= iteration]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
        os.replace(temporary, path)

    def write(self, metrics: Metrics) -> None:
        """Append one line."""
        self._file.write(json.dumps(metrics) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _line_iteration(line: str) -> float:
    try:
        return float(json.loads(line)["iteration"])
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a half-written last line of a killed run


class Console:
    """A readable line through the logger."""

    _formats = {
        "lm_loss": "loss {:.4f}", "learning_rate": "lr {:.3e}", "grad_norm": "grad norm {:.3f}",
        "tokens_per_second": "{:,.0f} tokens/s", "mfu": "MFU {:.1%}", "memory_gib": "{:.2f} GiB",
        "loss_scale": "scale {:g}", "valid_lm_loss": "validation loss {:.4f}", "valid_perplexity": "perplexity {:.2f}",
        "test_lm_loss": "test loss {:.4f}", "test_perplexity": "perplexity {:.2f}",
    }  # fmt: skip

    def __init__(self, last_iteration: int) -> None:
        self.last_iteration = last_iteration

    def write(self, metrics: Metrics) -> None:
        """Log the known entries in a fixed order."""
        parts = [text.format(metrics[key]) for key, text in self._formats.items() if metrics.get(key) is not None]
        get_logger().info("iteration %s/%s | %s", metrics["iteration"], self.last_iteration, " | ".join(parts))

    def close(self) -> None:
        """Nothing to release."""


class TensorBoard:
    """TensorBoard event files under `folder`."""

    def __init__(self, folder: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(folder)

    def write(self, metrics: Metrics) -> None:
        """One scalar an entry."""
        for key, value in metrics.items():
            if key != "iteration" and value is not None:
                self._writer.add_scalar(key, value, metrics["iteration"])

    def close(self) -> None:
        """Flush the event file."""
        self._writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline writes to the local folder only."""

    def __init__(self, config: RunConfig) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "use_wandb: wandb is not installed; "
                "pip install -r requirements/requirements-wandb.txt, or set use_wandb: false"
            ) from error
        options = config.logging
        os.environ.setdefault("WANDB_BASE_URL", options.wandb_host)
        try:
            self._run = wandb.init(
                project=options.wandb_project, group=options.wandb_group, entity=options.wandb_team,
                dir=options.log_dir or config.checkpoint.save, config=config.flat(),
            )  # fmt: skip
        except wandb.Error as error:
            raise UserError(
                f"use_wandb: {str(error).splitlines()[0]}; run `wandb login`, or set WANDB_MODE=offline"
            ) from error

    def write(self, metrics: Metrics) -> None:
        """Log under the iteration as step."""
        step = int(metrics["iteration"] or 0)
        self._run.log({key: value for key, value in metrics.items() if value is not None}, step=step)

    def close(self) -> None:
        """Finish the run."""
        self._run.finish()


class MetricsLog:
    """All sinks of a run; ranks other than 0 have none."""

    def __init__(self, config: RunConfig, rank: int, resumed_iteration: int) -> None:
        self.sinks: list[Sink] = []
        if rank != 0:
            return
        options = config.logging
        self.sinks.append(Console(config.training.train_iters or 0))
        folder = options.log_dir or config.checkpoint.save
        if folder:
            self.sinks.append(JsonLines(Path(folder), resumed_iteration))
        if options.tensorboard_dir:
            self._add_tensorboard(options.tensorboard_dir)
        if options.use_wandb:
            self.sinks.append(WandB(config))

    def _add_tensorboard(self, folder: str) -> None:
        # Every official YAML sets tensorboard_dir, so a missing package is worth a line, not the end of the run.
        try:
            self.sinks.append(TensorBoard(folder))
        except ImportError:
            get_logger().warning(
                "tensorboard_dir: no event files, TensorBoard is not installed; "
                "pip install -r requirements/requirements-tensorboard.txt"
            )

    def log(self, metrics: Metrics) -> None:
        """Send one dictionary to every sink."""
        for sink in self.sinks:
            sink.write(metrics)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            sink.close()


class Throughput:
    """Tokens per second of training alone: time in validation and saving is left out."""

    def __init__(self) -> None:
        self._tokens = 0
        self._elapsed = 0.0
        self._start = time.perf_counter()

    def add(self, tokens: int) -> None:
        """Count the tokens of a finished iteration and the time since the last event."""
        now = time.perf_counter()
        self._tokens, self._elapsed, self._start = self._tokens + tokens, self._elapsed + now - self._start, now

    def skip(self) -> None:
        """Leave out the time since the last event."""
        self._start = time.perf_counter()

    def take(self) -> float:
        """Tokens per second since the last call."""
        rate = self._tokens / self._elapsed if self._elapsed else 0.0
        self._tokens, self._elapsed = 0, 0.0
        return rate
