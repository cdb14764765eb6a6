"""One metrics dictionary, one log call, several sinks: console, metrics.jsonl, TensorBoard, Weights & Biases."""

from __future__ import annotations

import errno
import itertools
import json
import math
import os
import shutil
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.errors import UserError
from megatron.files import replaced_file
from megatron.log import get_logger, open_log

METRICS_FILE = "metrics.jsonl"
_boards = itertools.count()
Metrics = dict[str, float | int | None]


class Unreachable(UserError):
    """A service does not answer: no mistake, and no reason not to train."""


class Sink(Protocol):
    """A place metrics go to; `name` is what a user knows it by."""

    name: str

    def write(self, metrics: Metrics) -> None:
        """Record one dictionary; `iteration` is always in it."""

    def close(self) -> None:
        """Flush and release."""


class Records:
    """A file that is appended to: each piece whole or not at all."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "ab", buffering=0, opener=open_log)  # noqa: SIM115  (closed by close)

    def write(self, content: bytes) -> None:
        """Append; raises OSError where the disk has no room for all of it, and takes back a part of it."""
        written = self._file.write(content) or 0
        if written != len(content):
            if written:
                os.ftruncate(self._file.fileno(), self._file.tell() - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def flush(self) -> None:
        """Nothing is kept back."""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class JsonLines:
    """metrics.jsonl: one JSON object a line. A resumed run drops the lines past its start, a new one the file.

    A value that is not finite is null, for JSON has no other word for it. A line that cannot be read, but for a last
    one that a killed run left unfinished, is left out, and the file it was in kept under another name.
    """

    name = METRICS_FILE

    def __init__(self, folder: Path, resumed_iteration: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = Path(os.path.realpath(folder / METRICS_FILE))
        self._resumed_iteration, self._resumed_with = resumed_iteration, set[str]()
        if path.is_file():
            if resumed_iteration:
                self._keep_until(path, resumed_iteration)
            else:
                os.replace(path, _free_name(path))
        self._file = Records(path)

    def _keep_until(self, path: Path, iteration: int) -> None:
        lines = [line for line in path.read_bytes().split(b"\n") if line.strip()]
        entries = [_parse_line(line) for line in lines]
        unreadable = entries[:-1].count(None)
        if unreadable:
            aside = _free_name(path)
            shutil.copyfile(path, aside)
            get_logger().warning(
                "%s: %d of %d lines cannot be read and are left out; %s has them all",
                path, unreadable, len(lines), aside.name,
            )  # fmt: skip
        with replaced_file(path) as file:
            for line, entry in zip(lines, entries, strict=True):
                if entry is not None and entry["iteration"] <= iteration:
                    file.write(line + b"\n")
                    self._resumed_with |= entry.keys() if entry["iteration"] == iteration else set()

    def holds(self, key: str, iteration: int) -> bool:
        """Had the iteration that the run was resumed from a value of this name?"""
        return iteration == self._resumed_iteration and key in self._resumed_with

    def write(self, metrics: Metrics) -> None:
        """Append one line, or nothing."""
        finite = {key: value if value is None or math.isfinite(value) else None for key, value in metrics.items()}
        self._file.write(json.dumps(finite, allow_nan=False).encode() + b"\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _free_name(path: Path) -> Path:
    """metrics.jsonl.1, or the next number that is free, for a file that is kept."""
    return next(p for n in itertools.count(1) if not os.path.lexists(p := path.with_name(f"{path.name}.{n}")))


def _parse_line(line: bytes) -> dict[str, Any] | None:
    """A line's entries, `iteration` among them; None for one that cannot be read."""
    try:
        entry = json.loads(line)
        return entry if math.isfinite(entry["iteration"]) else None
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None


class Console:
    """A readable line through the logger."""

    name = "the console log"
    _formats = {
        "learning_rate": "lr {:.3e}", "grad_norm": "grad norm {:.3f}", "tokens_per_second": "{:,.0f} tokens/s",
        "mfu": "MFU {:.1%}", "memory_gib": "{:.2f} GiB", "loss_scale": "scale {:g}",
    }  # fmt: skip

    def __init__(self, last_iteration: int, formats: Mapping[str, str] | None = None) -> None:
        self.last_iteration = last_iteration
        self._formats = {**(formats or {}), **self._formats}

    def write(self, metrics: Metrics) -> None:
        """Log the known entries in a fixed order."""
        parts = [text.format(metrics[key]) for key, text in self._formats.items() if metrics.get(key) is not None]
        get_logger().info("iteration %s/%s | %s", metrics["iteration"], self.last_iteration, " | ".join(parts))

    def close(self) -> None:
        """Nothing to release."""


class TensorBoard:
    """TensorBoard event files under `folder`.

    Written here and now: TensorBoard's own writer does so in a thread, which a full disk ends with a traceback.
    """

    name = "tensorboard_dir"

    def __init__(self, folder: str) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event, self._summary = Event, Summary
        Path(folder).mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{next(_boards)}"
        self._writer = RecordWriter(Records(Path(folder) / name))
        self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())

    def write(self, metrics: Metrics) -> None:
        """One scalar an entry."""
        values = [
            self._summary.Value(tag=key, simple_value=value)
            for key, value in metrics.items()
            if key != "iteration" and value is not None
        ]
        step, summary = int(metrics["iteration"] or 0), self._summary(value=values)
        self._writer.write(self._event(wall_time=time.time(), step=step, summary=summary).SerializeToString())

    def close(self) -> None:
        """Close the event file."""
        self._writer.close()


class WandB:
    """Weights & Biases; WANDB_MODE=offline writes to the local folder only."""

    name = "use_wandb"

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
            if type(error).__name__ == "CommError":
                raise Unreachable(f"use_wandb: {' '.join(str(error).split())[:200]}; try again later") from error
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
    """All sinks of a run; ranks other than 0 have none. One that fails costs a warning, never the run.

    formats: of a task's own metrics in a line of the log, by name.
    """

    def __init__(
        self, config: RunConfig, rank: int, resumed_iteration: int, formats: Mapping[str, str] | None = None
    ) -> None:
        self.sinks: list[Sink] = []
        self._failed: set[str] = set()
        self._lines: JsonLines | None = None
        if rank != 0:
            return
        options = config.logging
        self.sinks.append(Console(config.training.train_iters or 0, formats))
        folder = options.log_dir or config.checkpoint.save
        if folder:
            with self._guarded(JsonLines.name):
                self._lines = JsonLines(Path(folder), resumed_iteration)
                self.sinks.append(self._lines)
        if options.tensorboard_dir:
            self._add_tensorboard(options.tensorboard_dir)
        if options.use_wandb:
            with self._guarded(WandB.name):
                self.sinks.append(WandB(config))

    def _add_tensorboard(self, folder: str) -> None:
        # Every official YAML sets tensorboard_dir, so a missing package is worth a line, not the end of the run.
        try:
            with self._guarded(TensorBoard.name):
                self.sinks.append(TensorBoard(folder))
        except ImportError:
            get_logger().warning(
                "tensorboard_dir: no event files, TensorBoard is not installed; "
                "pip install -r requirements/requirements-tensorboard.txt"
            )

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """Turns any error into a warning, the first one of a sink only. A user's mistake stays an error."""
        try:
            yield
        except Exception as error:  # whatever a library of others comes to
            if isinstance(error, (UserError, ImportError)) and not isinstance(error, Unreachable):
                raise
            if name not in self._failed:
                self._failed.add(name)
                reason = " ".join(str(error).split())[:200] or type(error).__name__
                get_logger().warning("%s: metrics cannot be written: %s; the run goes on without", name, reason)

    def log(self, metrics: Metrics) -> None:
        """Send one dictionary to every sink."""
        for sink in self.sinks:
            with self._guarded(sink.name):
                sink.write(metrics)

    def holds(self, key: str, iteration: int) -> bool:
        """Does metrics.jsonl have a value of this name at an iteration, from before the run was resumed?"""
        return self._lines is not None and self._lines.holds(key, iteration)

    def close(self) -> None:
        """Close every sink."""
        for sink in self.sinks:
            with self._guarded(sink.name):
                sink.close()


class RunningMean:
    """Mean of a scalar over the steps since it was last asked for; adding does not wait for the device."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._count = 0

    def add(self, value: Tensor) -> None:
        """Count one step's value, a scalar."""
        self._sum = value if self._sum is None else self._sum + value
        self._count += 1

    def take(self) -> Tensor:
        """The mean, on the values' device, at least one of which was added; then it starts anew."""
        assert self._sum is not None, "called after at least one step"
        mean = self._sum / self._count
        self._sum, self._count = None, 0
        return mean


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
