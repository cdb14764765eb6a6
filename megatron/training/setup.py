"""Assembling a training run: what it learns, data, model, engine, metrics, and where it resumes."""

from __future__ import annotations

import errno
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

from megatron.checkpoint.store import FolderLock
from megatron.config.schema import RunConfig
from megatron.config.sections.training import TrainingConfig
from megatron.config.update_size import UpdateSize
from megatron.data import Datasets
from megatron.engine.build import build_engine
from megatron.engine.distributed import initialize_distributed
from megatron.engine.grid import reused_groups
from megatron.engine.settings import EngineSettings
from megatron.errors import UserError
from megatron.growth.schedule import Progress, learning_rate_settings
from megatron.log import get_logger, log_to_file
from megatron.metrics import MetricsLog, Throughput
from megatron.model.build import build_model
from megatron.model.init import InitialTensors
from megatron.mpu import Layout
from megatron.mpu.device import DTYPES, process_device
from megatron.mpu.processes import first_rank_does
from megatron.ops.pattention import select_backend
from megatron.tasks import Task, build_task
from megatron.training.checkpointing import restore, warn_of_other_data
from megatron.training.generators import seed_generators
from megatron.training.hardware import peak_flops
from megatron.training.run import Run
from megatron.training.schedule import LRSchedule
from megatron.training.start import find_start
from megatron.training.state import TrainState

_PROOF_SAMPLES = 4
"""Held-out samples on which a growth is proven to change nothing."""

_BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)

_MOST_SAMPLES = 2**60
"""Samples of a data set: more than any run reads, and not too many for the length of a sequence in Python."""


def start_run(config: RunConfig) -> Run:
    """Build everything, and load the checkpoint where there is one; raises UserError and leaves no trace."""
    layout = initialize_distributed(config)
    lock = first_rank_does(lambda: _claim_folders(config), layout)
    try:
        run = _assemble(config, layout)
    except BaseException:
        if lock is not None:
            lock.close()
        raise
    run.lock = lock
    return run


def _assemble(config: RunConfig, layout: Layout) -> Run:
    if config.training.train_iters is None:
        raise UserError("train_iters: missing; give the number of updates of the run")
    if config.logging.log_dir and layout.rank == 0:
        log_to_file(Path(config.logging.log_dir) / "train.log")
    seed = config.training.seed
    seed_generators(seed, layout)
    task = build_task(config)
    update = config.update_size(layout.data.size)
    start = find_start(task, layout, update)
    config, state = start.config, start.state
    datasets = _build_data(task, config.training, state, update.samples)
    start.prove(task.held_out(datasets, _PROOF_SAMPLES), layout)
    settings = EngineSettings.of(config, update)
    # Described without storage: ZeRO 3 leaves empty parameters behind in the model itself.
    described = build_model(config.model, device="meta")
    tensors = start.checkpoint.tensors if start.checkpoint else InitialTensors(described, config.model, seed)
    with reused_groups(timedelta(minutes=config.launch.distributed_timeout_minutes)):
        engine = build_engine(settings, task, layout, tensors)
    restore(config, engine, state, start.checkpoint)
    if start.resumed and start.checkpoint is not None:
        warn_of_other_data(task, start.checkpoint)
        get_logger().info("resumed from %s at iteration %d", start.checkpoint.folder, state.iteration)
    device, dtype = process_device(), DTYPES[config.precision.dtype]
    flops = described.flops_per_token(config.model.tokens_per_sample())
    peak, origin = peak_flops(device, dtype, config.logging.peak_tflops)
    measure = origin if peak is None else f"MFU against {peak / 1e12:.1f} TFLOP/s a device ({origin})"
    _report(config, layout, described.num_parameters(), update, measure)
    metrics = MetricsLog(config, layout.rank, state.iteration, task.console)
    return Run(
        config,
        task,
        layout,
        engine,
        state,
        _learning_rates(config, state, update),
        datasets,
        metrics,
        Throughput(),
        update,
        flops,
        peak,
        start.resumed,
    )


def _learning_rates(config: RunConfig, state: TrainState, update: UpdateSize) -> LRSchedule:
    now = Progress(state.iteration, state.consumed_tokens)
    run = config.optimization, config.scaling.growth, config.training.train_iters
    options, start = learning_rate_settings(*run, state.lineage, now, update.tokens)
    return LRSchedule(config.replaced(optimization=options), start)


def _claim_folders(config: RunConfig) -> FolderLock | None:
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


def _build_data(task: Task[Any], training: TrainingConfig, state: TrainState, global_batch: int) -> Datasets:
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


def _report(config: RunConfig, layout: Layout, parameters: int, update: UpdateSize, measure: str) -> None:
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
