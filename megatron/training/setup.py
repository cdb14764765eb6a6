"""What a run needs before it trains: its folders, its data, and a line about what it runs on."""

from __future__ import annotations

import errno
import tempfile
from pathlib import Path
from typing import Any

from megatron.checkpoint.lock import FolderLock
from megatron.config.schema import RunConfig
from megatron.config.sections.logging import LoggingConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.update_size import UpdateSize
from megatron.data import Datasets
from megatron.errors import UserError
from megatron.log import get_logger, log_to_file
from megatron.mpu import Layout
from megatron.mpu.device import process_device
from megatron.ops.pattention import select_backend
from megatron.tasks import Task
from megatron.training.state import TrainState

_BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)

_MOST_SAMPLES = 2**60
"""Samples of a data set: more than any run reads, and not too many for the length of a sequence in Python."""


def require_train_iters(config: RunConfig) -> int:
    """The number of updates of the run; raises UserError without one."""
    if config.training.train_iters is None:
        raise UserError("train_iters: missing; give the number of updates of the run")
    return config.training.train_iters


def claim_folders(config: RunConfig) -> FolderLock | None:
    """Find out now, not at the first checkpoint, that a folder cannot be written or another run is writing to it."""
    for key in ("log_dir", "tensorboard_dir"):
        folder = getattr(config.logging, key)
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            # A disk that breaks later costs a warning, and so it does on the run's next start.
            if error.errno not in _BROKEN_DISK:
                reason = error.strerror
                raise UserError(f"{key}: {folder} cannot be written: {reason}; choose another folder") from error
    return FolderLock(config.checkpoint.save) if config.checkpoint.save else None


def log_beside(options: LoggingConfig, layout: Layout) -> None:
    """Write what the first rank logs to log_dir too, where there is one."""
    if options.log_dir and layout.rank == 0:
        log_to_file(Path(options.log_dir) / "train.log")


def build_datasets(task: Task[Any], training: TrainingConfig, state: TrainState, global_batch: int) -> Datasets:
    """Datasets for the whole run; index caches are built by one process a node, under a file lock."""
    # Not train_iters * global_batch: a resumed run may have another batch size than the samples it consumed.
    remaining = max(0, (training.train_iters or 0) - state.iteration)
    one_evaluation = training.eval_iters * global_batch
    # GPT-NeoX sizes the set for all evaluations, which decides its order; each of ours reads the beginning of it.
    is_known = any(name.startswith("valid/") for name in state.epoch_blocks)
    evaluations = 1 if is_known else (training.train_iters or 0) // training.eval_interval + 1
    counts = state.consumed_samples + remaining * global_batch, evaluations * one_evaluation, one_evaluation
    datasets = task.datasets([min(count, _MOST_SAMPLES) for count in counts], state.epoch_blocks)
    state.epoch_blocks = datasets.epoch_blocks
    return datasets


def report(config: RunConfig, layout: Layout, parameters: int, update: UpdateSize, measure: str) -> None:
    """Log what is trained, on what, and how large an update is; `measure` says how MFU is counted."""
    log, device = get_logger(), process_device()
    backend, _ = select_backend(config.training.pattention_backend, device.type)
    log.info(
        "%s parameters in %s on %d x %s%s, ZeRO %d, pattention %s, attention %s",
        f"{parameters:,}", config.precision.dtype, layout.world_size, device.type, _grid(layout),
        config.parallel.zero_optimization.stage, backend, config.training.attention_backend,
    )  # fmt: skip
    log.info("%d samples x %d tokens an update; %s", update.samples, config.model.tokens_per_sample(), measure)


def _grid(layout: Layout) -> str:
    """` (2 data x 1 pipeline x 4 tensor, sequence parallel)`; nothing for one process."""
    if layout.world_size == 1:
        return ""
    axes = f"{layout.data.size} data x {layout.pipeline.size} pipeline x {layout.tensor.size} tensor"
    return f" ({axes}{', sequence parallel' if layout.sequence_parallel else ''})"
