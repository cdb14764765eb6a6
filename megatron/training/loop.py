"""Training: a run from one of its starts to its end or its next growth, and the loop over these."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

from megatron.config.schema import RunConfig
from megatron.engine.base import StepResult
from megatron.engine.build import build_engine
from megatron.engine.distributed import initialize_distributed
from megatron.engine.replicas import ReplicaCheck
from megatron.engine.settings import EngineSettings
from megatron.growth.schedule import GrowthSchedule
from megatron.log import get_logger
from megatron.metrics import Metrics, MetricsLog, RunningMean, Throughput
from megatron.model.build import build_model
from megatron.model.init import InitialTensors
from megatron.mpu.device import DTYPES, process_device
from megatron.mpu.processes import first_rank_does, leave_world
from megatron.signals import StopRequest
from megatron.tasks import build_task
from megatron.training.checkpointing import Saver
from megatron.training.data import RunData
from megatron.training.folders import claim_folders
from megatron.training.generators import seed_generators
from megatron.training.hardware import memory_gib, peak_flops, report
from megatron.training.new_tokens import NewTokens
from megatron.training.profiling import Profiler
from megatron.training.schedule import LRSchedule
from megatron.training.spikes import Rewind, SpikeGuard, is_skipped
from megatron.training.start import Start
from megatron.training.state import TrainState
from megatron.training.watching import Watched, in_phases

_PROOF_SAMPLES = 4
"""Held-out samples on which a growth is proven to change nothing."""


def train(config: RunConfig, stop: StopRequest | None = None) -> TrainState:
    """Train as configured, from the checkpoint in `load` if there is one; returns the state at the end.

    Stops early, after saving, when `stop` has heard a signal on any rank, at exit_interval and exit_duration_in_mins.
    Without `stop`, signals are heard from the first iteration on. Raises UserError for what a user can mend: data,
    checkpoint, configuration, a loss that is not finite.
    """
    trainer = Trainer(config)
    with StopRequest() if stop is None else nullcontext(stop) as stop:
        stop.hold()
        while _goes_on(trainer, stop):
            config = trainer.next_start(config)
            trainer = Trainer(config, trainer.state.skips)
    return trainer.state


def _goes_on(trainer: Trainer, stop: StopRequest) -> bool:
    """Train; true when a growth or a rewind needs a start of its own."""
    try:
        return trainer.train(stop)
    except Rewind:
        return True


def _from_own_checkpoint(config: RunConfig) -> RunConfig:
    """The same run, continued from what it has just saved."""
    own = {"load": config.checkpoint.save, "iteration": None, "finetune": False}
    own |= {"no_load_optim": False, "no_load_rng": False}
    return config.replaced(checkpoint=config.checkpoint.replaced(**own))


class Trainer:
    """A run from one of its starts to its end, a request to stop, its next growth or rewind: what it needs, its loop.

    Args:
        skips: what rewinds of this run have said to skip; of a run's first start, its checkpoint says it.

    Collective. Raises: UserError for what keeps the run from starting; then it leaves no trace.
    """

    def __init__(self, config: RunConfig, skips: list[list[int]] | None = None) -> None:
        self.layout = initialize_distributed(config)
        with ExitStack() as claims:
            self._progress = claims.enter_context(Watched(config, self.layout))
            lock = first_rank_does(lambda: claim_folders(config), self.layout)
            if lock is not None:
                claims.callback(lock.close)
            self._assemble(config, skips)
            self._claims = claims.pop_all()

    def _assemble(self, config: RunConfig, skips: list[list[int]] | None) -> None:
        self.last_iteration, layout, seed = config.last_iteration, self.layout, config.training.seed
        seed_generators(seed, layout)
        task = self._task = build_task(config)
        update = self._update = config.update_size(layout.data.size)
        self._growths = GrowthSchedule(config.scaling, self.last_iteration, update.tokens)
        start = Start(task, layout, self._growths)
        config, state, checkpoint = start.config, start.state, start.checkpoint
        state.skips = state.skips if skips is None else skips
        self.config, self.state, self._resumed = config, state, start.resumed
        self.data = RunData(task, state, update, layout.data)
        start.prove(self.data.held_out(_PROOF_SAMPLES))
        # Described without storage: ZeRO 3 leaves empty parameters behind in the model itself.
        described = build_model(config.model, device="meta")
        tensors = checkpoint.tensors if checkpoint else InitialTensors(described, config.model, seed)
        settings = EngineSettings(config, update)
        self.engine = build_engine(settings, task, layout, tensors)
        self.engine.on_update = partial(self._progress.enter, "update")
        start.restore(self.engine)
        self._flops = described.flops_per_token()
        self._peak, origin = peak_flops(process_device(), DTYPES[config.precision.dtype], config.logging.peak_tflops)
        measure = origin if self._peak is None else f"MFU against {self._peak / 1e12:.1f} TFLOP/s a device ({origin})"
        report(settings, layout, described.num_parameters(), update, measure)
        self._saver = Saver(config, self.engine, state)
        self._skips = [*(config.training.skip_iterations or ()), *state.skips]
        self._replicas = ReplicaCheck(self.engine, config.training.check_replicas_interval, config.checkpoint.save)
        place = config.checkpoint.save or config.logging.log_dir
        SpikeGuard(config.training, task.loss_name, state, self.data, place).attach(self.engine)
        options, since = self._growths.learning_rate(config.optimization, state)
        self.schedule = LRSchedule(config.replaced(optimization=options), since)
        self._new_tokens = NewTokens(state, self.engine)
        self._metrics = MetricsLog(config, layout.rank, state.iteration, task.console)
        self._profiler = Profiler(config.logging, config.checkpoint.save, self.engine.device, layout.rank)
        self._loss, self._throughput = RunningMean(), Throughput()

    def train(self, stop: StopRequest) -> bool:
        """Train to the end, a request to stop or the next growth, and close; true for that. Raises Rewind too."""
        try:
            return self._train(stop)
        finally:
            self.close()

    def next_start(self, config: RunConfig) -> RunConfig:
        """What the run goes on with, once this one is closed: from its checkpoint, or from where it has started itself.

        Args:
            config: what this one was given.
        """
        self._progress.enter("startup")  # missed again, while it waits for the others' parts of a save
        self._saver.finish()
        return _from_own_checkpoint(config) if self._saver.has_published else config

    def close(self) -> None:
        """Flush the metrics, let go of the model and give the save folder free."""
        self._progress.enter("end")  # what is sent to a server of metrics may take its time
        self._saver.close()
        self._profiler.close()
        self._metrics.close()
        self.engine.close()
        del self._new_tokens  # they refer to the model
        self._claims.close()

    def _train(self, stop: StopRequest) -> bool:
        state = self.state
        batches = in_phases(self.data.training(), self._progress, state)
        if not self._make_up_evaluations(stop):
            self._log_stop(stop)
            return False
        if state.iteration >= self.last_iteration:
            get_logger().info("iteration %d of train_iters %d is reached already", state.iteration, self.last_iteration)
            return False
        if state.iteration == 0:
            self._save_if_due()
        if self.engine.any_rank(stop.requested):  # nothing has been trained that is not saved
            self._log_stop(stop)
            return False
        if self.layout.rank == 0:  # one clock for all
            stop.end_after(self.config.training.exit_duration_in_mins, "exit_duration_in_mins")
        while state.iteration < self.last_iteration:
            self._profiler.before(state.iteration + 1)
            step = self._iterate(batches)
            self._tell(step, stop)
            if step is not None and self._log_due():
                self._metrics.log(self._training_metrics(step))
            self._profiler.after(state.iteration)
            stopping = self.engine.watch.stops or self._exit_due()
            grows = self._growths.is_due(state)
            self._save_if_due(force=stopping or grows or state.iteration == self.last_iteration)
            if stopping:
                self._log_stop(stop)
                return False
            for split in self._evaluations_due():
                if not self._evaluate(split, stop):
                    self._save_if_due(force=True)
                    self._log_stop(stop)
                    return False
            if grows:
                return True
        return False

    def _iterate(self, batches: Iterator[list[Any]]) -> StepResult | None:
        """One update, counted; the device may still be at it. None where the iteration is to be skipped."""
        state, length = self.state, self._update.tokens // self._update.samples
        if is_skipped(state.iteration + 1, self._skips):
            state.advance(self._update.samples, length, left_out=True)
            return None
        micro_batches, age = next(batches), self._new_tokens.before_update()
        step = self.engine.train_step(micro_batches, self.schedule(state.updates), age)
        self._loss.add(step.loss)
        state.advance(self._update.samples, length, step.skipped, step.withheld)
        return step

    def _tell(self, step: StepResult | None, stop: StopRequest) -> None:
        """Tell all ranks of an iteration; what they have to know of it is looked at now or after the next one.

        Raises: UserError when a loss or a gradient norm is not finite, Rewind for a spike that is to be gone back from.
        """
        watch = self.engine.watch
        asked = stop.requested or self._saver.stops
        if step is None:
            watch.ask(asked)
        else:
            watch.post(step.loss, step.grad_norm, asked, self.state.iteration)
        if watch.stops or not self._is_quiet():
            watch.look()
        self._throughput.add(self._update.tokens if step is not None else 0)

    def _is_quiet(self) -> bool:
        """Does nothing follow this iteration for which the host waits for the device anyway?"""
        at_end = self.state.iteration == self.last_iteration
        follows = self._log_due() or self._saver.is_due() or self._exit_due() or self._evaluations_due()
        return not (follows or at_end or self._growths.is_due(self.state))

    def _log_due(self) -> bool:
        return self.state.iteration % self.config.logging.log_interval == 0

    def _exit_due(self) -> bool:
        interval, iteration = self.config.training.exit_interval, self.state.iteration
        return interval is not None and iteration % interval == 0 and iteration < self.last_iteration

    def _log_stop(self, stop: StopRequest) -> None:
        reason = "exit_interval" if self._exit_due() else stop.name or "a signal to another process"
        get_logger().info("stopped at iteration %d (%s)", self.state.iteration, reason)

    def _save_if_due(self, force: bool = False) -> None:
        self._replicas.check_if_due(self.state.iteration, force or self._saver.is_due())
        if force or self._saver.is_due():
            self._progress.enter("save")
        if self._saver.save_if_due(force):
            self._throughput.skip()

    def _training_metrics(self, step: StepResult) -> Metrics:
        """The metrics of a log line; `learning_rate` is the one this iteration's update used."""
        state, rate = self.state, self._throughput.take()
        metrics: Metrics = {
            "iteration": state.iteration,
            self._task.loss_name: self.engine.mean_over_ranks(self._loss.take()),
            "learning_rate": self.schedule(state.updates - (0 if step.skipped else 1)),
            "grad_norm": None if step.skipped or step.grad_norm is None else float(step.grad_norm),
            "consumed_tokens": state.consumed_tokens,
            "consumed_samples": state.consumed_samples,
            "tokens_per_second": rate,
            "memory_gib": memory_gib(self.engine.device),
        }
        if self._peak is not None:
            metrics["mfu"] = rate * self._flops / (self.layout.world_size * self._peak)
        if self.engine.loss_scaler:
            metrics["loss_scale"] = self.engine.loss_scaler["cur_scale"]
            metrics["skipped_iterations"] = state.skipped_iterations
        return metrics

    def _evaluations_due(self) -> list[str]:
        """The sets that are evaluated at this iteration."""
        iteration, at_end = self.state.iteration, self.state.iteration == self.last_iteration
        is_valid = iteration <= self.last_iteration and iteration % self.config.training.eval_interval == 0
        return [*(["valid"] if is_valid or at_end else []), *(["test"] if at_end else [])]

    def _make_up_evaluations(self, stop: StopRequest) -> bool:
        """Evaluate what was due at the checkpoint, where the run ended between saving it and that: its metrics tell.

        Returns: false when a request to stop ended it before its last batch.
        """
        for split in self._evaluations_due() if self._resumed and self.state.iteration else ():
            has_it = self._metrics.holds(f"{split}_{self._task.loss_name}", self.state.iteration)
            if self.engine.any_rank(self.layout.rank == 0 and not has_it) and not self._evaluate(split, stop):
                return False
        return True

    def _evaluate(self, split: str, stop: StopRequest) -> bool:
        """Metrics of the validation or test set, on the same samples every time.

        Returns: false when a request to stop ended it before its last batch; then nothing is logged.
        """
        batches = self.data.evaluation(split)
        if batches is None:
            return True
        watch = self.engine.watch

        def is_requested() -> bool:
            self._progress.enter("evaluation")  # each batch anew: a long evaluation is none that hangs
            return watch.ask(stop.requested)

        until_stopped = _UntilStopped(batches, is_requested)
        sums = self.engine.evaluate(until_stopped)
        watch.look()
        if until_stopped.stopped:
            return False
        measured = self._task.metrics(split, sums)
        place = {"iteration": self.state.iteration}
        self._metrics.log({**place, **measured, "consumed_tokens": self.state.consumed_tokens})
        self._throughput.skip()
        return True


class _UntilStopped:
    """Batches of an evaluation until one rank is asked to stop; then `stopped` is true on all of them."""

    def __init__(self, batches: Iterator[Any], is_requested: Callable[[], bool]) -> None:
        self._batches, self._is_requested, self.stopped = batches, is_requested, False

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self.stopped = self._is_requested()
            if self.stopped:
                return
            yield batch


def shut_down() -> None:
    """Leave the process group so that no communication thread outlives the interpreter."""
    leave_world()
