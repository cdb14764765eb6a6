"""Assembling a training run: tokenizer, model, engine, data, metrics, and where it resumes."""

from __future__ import annotations

import errno
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from megatron.checkpoint.state import ParameterSource
from megatron.checkpoint.store import FolderLock
from megatron.config.schema import RunConfig
from megatron.config.update_size import UpdateSize
from megatron.data import batches, build_datasets
from megatron.engine.base import Engine
from megatron.engine.distributed import initialize_distributed
from megatron.engine.grid import DeepSpeedGrid, reused_groups
from megatron.engine.pipeline import PipelineEngine
from megatron.engine.single_stage import SingleStageEngine
from megatron.engine.zero3 import partition_parameters
from megatron.errors import RankError, UserError
from megatron.growth.grow import TensorSource
from megatron.growth.schedule import Progress, is_due, learning_rate_schedule, next_stage
from megatron.log import get_logger, log_to_file
from megatron.model import LanguageModel
from megatron.model.blocks import BuildOptions
from megatron.model.init import initial_value
from megatron.model.pattention import Pattention
from megatron.mpu import Layout
from megatron.mpu.device import DTYPES, process_device
from megatron.mpu.processes import first_rank_does
from megatron.mpu.shard import allocate, take_share
from megatron.ops.pattention import select_backend
from megatron.tokenizer import build_tokenizer
from megatron.training.checkpointing import restore, warn_of_other_data
from megatron.training.generators import seed_generators
from megatron.training.hardware import peak_flops
from megatron.training.metrics import MetricsLog, Throughput
from megatron.training.schedule import LRSchedule
from megatron.training.start import Start, find_start
from megatron.training.state import TrainState

# Sequences of a held-out set on which a growth is proven to change nothing.
_PROOF_SEQUENCES = 4
_BROKEN_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.ESTALE)


_MOST_SAMPLES = 2**60
"""Samples of a data set: more than any run reads, and not too many for the length of a sequence in Python."""


@dataclass
class Run:
    """Everything the loop works with."""

    config: RunConfig
    layout: Layout
    engine: Engine
    state: TrainState
    schedule: LRSchedule
    datasets: Any
    metrics: MetricsLog
    throughput: Throughput
    update: UpdateSize
    flops_per_token: float
    peak_flops: float | None
    resumed: bool = False
    lock: FolderLock | None = None
    saved: int | None = None
    loss_sum: Tensor | None = None
    losses_summed: int = 0

    @property
    def last_iteration(self) -> int:
        """Iteration after which the run is done."""
        assert self.config.training.train_iters is not None, "start_run checks it"
        return self.config.training.train_iters

    def training_batches(self) -> Iterator[list[Tensor]]:
        """For each update its micro-batches, from the first sample that was not consumed yet."""
        stream = self._batches(self.datasets.train, self.state.consumed_samples, self.config.data.num_workers)
        while True:
            yield [next(stream) for _ in range(self.update.steps)]

    def evaluation_batches(self, dataset: Any) -> Iterator[Tensor]:
        """The same eval_iters global batches every time, this rank's share of them."""
        stream = self._batches(dataset, 0, 0)
        for _ in range(self.config.training.eval_iters * self.update.steps):
            batch = next(stream, None)
            if batch is None:
                return
            yield batch

    def _batches(self, dataset: Any, start: int, workers: int) -> Iterator[Tensor]:
        data, update = self.layout.data, self.update
        for batch in batches(dataset, update.micro, update.steps, data.rank, data.size, start, workers):
            _check_ids(batch["tokens"], self.config, RankError)
            yield batch["tokens"]

    def add_loss(self, loss: Tensor) -> None:
        """Collect a step's loss for the mean of the next log line, without waiting for the device."""
        self.loss_sum = loss if self.loss_sum is None else self.loss_sum + loss
        self.losses_summed += 1

    def take_mean_loss(self) -> float:
        """Mean loss over all ranks and the iterations since the last call. Collective."""
        assert self.loss_sum is not None, "called after at least one step"
        mean = self.engine.mean_over_ranks(self.loss_sum / self.losses_summed)
        self.loss_sum, self.losses_summed = None, 0
        return mean

    def growth_is_due(self) -> bool:
        """Has the time of the next scheduled growth come, with training to follow it?"""
        stage, state = next_stage(self.config, self.state.lineage), self.state
        return (
            stage is not None
            and is_due(stage, state.iteration, state.consumed_tokens)
            and state.iteration < self.last_iteration
        )

    def close(self) -> None:
        """Flush the metrics, let go of the model and give the save folder free."""
        self.metrics.close()
        self.engine.close()
        if self.lock is not None:
            self.lock.close()


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
    seed_generators(config.training.seed, layout)
    tokenizer = build_tokenizer(config.tokenizer)
    config = config.with_vocabulary(tokenizer.vocab_size)
    update = config.update_size(layout.data.size)
    start = find_start(config, layout, update)
    config, state = start.config, start.state
    datasets = _build_data(config, state, update.samples)
    start.prove(_held_out_ids(datasets, config), layout)
    with reused_groups(timedelta(minutes=config.launch.distributed_timeout_minutes)):
        engine = _build_engine(start, layout, tokenizer.eod_id)
    if start.reader is not None:
        restore(config, engine, state, start.reader)
    if start.resumed and start.reader is not None:
        warn_of_other_data(config, start.reader)
        get_logger().info("resumed from %s at iteration %d", start.reader.folder, state.iteration)
    device, dtype = process_device(), DTYPES[config.precision.dtype]
    # Counted without storage: ZeRO 3 has left empty parameters behind in the model itself.
    counted = LanguageModel(config.model, device="meta")
    flops = counted.flops_per_token(config.model.seq_length)
    peak, origin = peak_flops(device, dtype, config.logging.peak_tflops)
    measure = origin if peak is None else f"MFU against {peak / 1e12:.1f} TFLOP/s a device ({origin})"
    _report(config, layout, counted.num_parameters(), update, measure)
    metrics = MetricsLog(config, layout.rank, state.iteration)
    return Run(
        config,
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
    return LRSchedule(*learning_rate_schedule(config, state.lineage, now, update.tokens))


def _claim_folders(config: RunConfig) -> FolderLock | None:
    """Find out now, not at the first checkpoint, that a folder cannot be written or another run is writing to it."""
    for key in ("log_dir", "tensorboard_dir"):
        folder = getattr(config.logging, key)
        try:
            if folder:
                Path(folder).mkdir(parents=True, exist_ok=True)
                tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            if (
                error.errno not in _BROKEN_DISK
            ):  # what goes wrong later is a warning, and so it is on a run's next start
                reason = error.strerror
                raise UserError(f"{key}: {folder} cannot be written: {reason}; choose another folder") from error
    return FolderLock(config.checkpoint.save) if config.checkpoint.save else None


def _held_out_ids(datasets: Any, config: RunConfig) -> Tensor:
    """A few sequences [b, s] of the validation set, else of the training set, the same on every rank.

    Random ones where the run has neither, as at its end without evaluation.
    """
    dataset = datasets.valid if datasets.valid is not None and len(datasets.valid) else datasets.train
    if dataset is None:
        shape, generator = (_PROOF_SEQUENCES, config.model.seq_length), torch.Generator().manual_seed(0)
        return torch.randint(config.model.padded_vocab_size or 1, shape, generator=generator)
    rows = [torch.as_tensor(dataset[i])[:-1] for i in range(min(_PROOF_SEQUENCES, len(dataset)))]
    ids = torch.stack(rows).long()
    _check_ids(ids, config)
    return ids


def _check_ids(tokens: Tensor, config: RunConfig, error: type[UserError] = UserError) -> None:
    rows, lowest, highest = config.model.padded_vocab_size or 0, int(tokens.min()), int(tokens.max())
    if highest >= rows or lowest < 0:
        found = lowest if lowest < 0 else highest
        raise error(
            f"data_path: the data has token id {found}, the embedding {rows} rows (padded_vocab_size); "
            "was the data prepared with the tokenizer of vocab_file?"
        )


def _build_engine(start: Start, layout: Layout, eod_id: int) -> Engine:
    """The engine around this process's part of the model, with its first or loaded values."""
    config, source = start.config, _parameter_source(start)
    model: nn.Module
    if layout.pipeline.size == 1:
        grid = DeepSpeedGrid.of(layout)
        if config.parallel.zero_optimization.stage == 3:
            model = _single_stage_model(config, layout, "meta")
            for name, part in model.parts():
                allocate(part, process_device())
                _fill(part, layout, source, start.tensors, f"{name}.")
                partition_parameters(part, config, layout, grid)
        else:
            model = _single_stage_model(config, layout, process_device())
            _fill(model, layout, source, start.tensors)
        return SingleStageEngine(config, layout, model, source, eod_id, grid)
    # Imports DeepSpeed, which looks at the environment that initialize_distributed has set up.
    from megatron.engine.pipeline_model import PipelineModel

    options = BuildOptions(config.training.pattention_backend, config.training.attention_backend, gather_logits=False)
    model = PipelineModel(config.model, layout, options, process_device(), _checkpoint_layers(config))
    _fill(model, layout, source, start.tensors)
    return PipelineEngine(config, layout, model, source, eod_id)


def _checkpoint_layers(config: RunConfig) -> int:
    return config.training.checkpoint_num_layers if config.training.checkpoint_activations else 0


def _single_stage_model(config: RunConfig, layout: Layout, device: torch.device | str) -> LanguageModel:
    return LanguageModel(
        config.model,
        device=device,
        pattention_backend=config.training.pattention_backend,
        attention_backend=config.training.attention_backend,
        checkpoint_layers=_checkpoint_layers(config),
        layout=layout,
        gather_logits=False,
    )


def _parameter_source(start: Start) -> ParameterSource:
    """Whole fp32 values by canonical name: those the run starts with, or the initial ones."""
    tensors, config = start.tensors, start.config
    if tensors is not None:
        return lambda name: tensors.tensor("model", name)
    whole = dict(LanguageModel(config.model, device="meta").named_parameters())
    return lambda name: initial_value(name, whole[name], config.model, config.training.seed)


@torch.no_grad()
def _fill(
    model: nn.Module, layout: Layout, source: ParameterSource, tensors: TensorSource | None, prefix: str = ""
) -> None:
    """Write this process's share of every parameter, and the buffers of a checkpoint or their first values.

    `prefix` is where in the model this part of it is.
    """
    for name, parameter in model.named_parameters():
        parameter.copy_(take_share(source(prefix + name), parameter, layout.tensor))
    for part in model.modules():
        if isinstance(part, Pattention):
            part.reset_tau()
    if tensors is not None:
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors.tensor("model", prefix + name))


def _build_data(config: RunConfig, state: TrainState, global_batch: int) -> Any:
    """Datasets for the whole run; index caches are built by one process a node, under a file lock."""
    training = config.training
    # Not train_iters * global_batch: a resumed run may have another batch size than the samples it consumed.
    remaining = max(0, (training.train_iters or 0) - state.iteration)
    one_evaluation = training.eval_iters * global_batch
    # GPT-NeoX sizes the set for all evaluations, which decides its order; each of ours reads the beginning of it.
    is_known = any(name.startswith("valid/") for name in state.epoch_blocks)
    evaluations = 1 if is_known else (training.train_iters or 0) // training.eval_interval + 1
    counts = state.consumed_samples + remaining * global_batch, evaluations * one_evaluation, one_evaluation
    train, valid, test = (min(count, _MOST_SAMPLES) for count in counts)
    datasets = build_datasets(config, train, valid, test, epoch_blocks=state.epoch_blocks)
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
    log.info("%d samples x %d tokens an update; %s", update.samples, config.model.seq_length, measure)


def _grid(layout: Layout) -> str:
    """` (2 data x 1 pipeline x 4 tensor, sequence parallel)`; nothing for one process."""
    if layout.world_size == 1:
        return ""
    axes = f"{layout.data.size} data x {layout.pipeline.size} pipeline x {layout.tensor.size} tensor"
    return f" ({axes}{', sequence parallel' if layout.sequence_parallel else ''})"
