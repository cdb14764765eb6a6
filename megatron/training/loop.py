"""The training loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from megatron.config.schema import RunConfig
from megatron.engine.base import StepResult
from megatron.log import get_logger
from megatron.metrics import Metrics
from megatron.mpu.processes import leave_world
from megatron.signals import StopRequest
from megatron.training.checkpointing import save, should_save
from megatron.training.hardware import memory_gib
from megatron.training.run import Run
from megatron.training.setup import start_run
from megatron.training.state import TrainState


def train(config: RunConfig, stop: StopRequest | None = None) -> TrainState:
    """Train as configured, from the checkpoint in `load` if there is one; returns the state at the end.

    Stops early, after saving, when `stop` has heard a signal on any rank, and at exit_interval. Without `stop`, signals
    are heard from the first iteration on. Raises UserError for what a user can mend: data, checkpoint, configuration, a
    loss that is not finite.
    """
    run = start_run(config)
    with StopRequest() if stop is None else nullcontext(stop) as stop:
        stop.hold()
        while _train_and_close(run, stop):
            config = _from_own_checkpoint(config)
            run = start_run(config)
    return run.state


def _train_and_close(run: Run, stop: StopRequest) -> bool:
    try:
        return _train_until_done(run, stop)
    finally:
        run.close()


def _from_own_checkpoint(config: RunConfig) -> RunConfig:
    """The same run, continued from what it has just saved."""
    own = {"load": config.checkpoint.save, "iteration": None, "finetune": False}
    own |= {"no_load_optim": False, "no_load_rng": False}
    return config.replaced(checkpoint=config.checkpoint.replaced(**own))


def _train_until_done(run: Run, stop: StopRequest) -> bool:
    """Train to the end, a request to stop, or the next growth; true when it is time to grow."""
    state, batches = run.state, run.training_batches()
    if not _make_up_evaluations(run, stop):
        _log_stop(run, stop)
        return False
    if state.iteration >= run.last_iteration:
        get_logger().info("iteration %d of train_iters %d is reached already", state.iteration, run.last_iteration)
        return False
    if state.iteration == 0:
        _save_if_due(run)
    if run.engine.any_rank(stop.requested):  # nothing has been trained that is not saved
        _log_stop(run, stop)
        return False
    while state.iteration < run.last_iteration:
        step = _iterate(run, batches)
        if state.iteration % run.config.logging.log_interval == 0:
            run.metrics.log(_training_metrics(run, step))
        stopping = run.engine.any_rank(stop.requested) or _exit_due(run)
        grows = run.growth_is_due()
        _save_if_due(run, force=stopping or grows or state.iteration == run.last_iteration)
        if stopping:
            _log_stop(run, stop)
            return False
        for split in _evaluations_due(run):
            if not _evaluate(run, split, stop):
                return _save_and_stop(run, stop)
        if grows:
            return True
    return False


def _save_and_stop(run: Run, stop: StopRequest) -> bool:
    _save_if_due(run, force=True)
    _log_stop(run, stop)
    return False


def _log_stop(run: Run, stop: StopRequest) -> None:
    reason = "exit_interval" if _exit_due(run) else stop.name or "a signal to another process"
    get_logger().info("stopped at iteration %d (%s)", run.state.iteration, reason)


def _iterate(run: Run, batches: Iterator[list[Any]]) -> StepResult:
    """One update, counted."""
    micro_batches = next(batches)
    step = run.engine.train_step(micro_batches, run.schedule(run.state.updates))
    run.add_loss(step.loss)
    run.state.advance(run.update.samples, run.update.tokens // run.update.samples, step.skipped)
    run.throughput.add(run.update.tokens)
    return step


def _exit_due(run: Run) -> bool:
    interval = run.config.training.exit_interval
    return interval is not None and run.state.iteration % interval == 0 and run.state.iteration < run.last_iteration


def _save_if_due(run: Run, force: bool = False) -> None:
    options, iteration = run.config.checkpoint, run.state.iteration
    if options.save is not None and run.saved != iteration and (force or should_save(options, iteration)):
        save(run.config, run.engine, run.state)
        run.saved = iteration
        run.throughput.skip()


def _training_metrics(run: Run, step: StepResult) -> Metrics:
    """The metrics of a log line; `learning_rate` is the one this iteration's update used."""
    state, rate = run.state, run.throughput.take()
    metrics: Metrics = {
        "iteration": state.iteration,
        run.task.loss_name: run.take_mean_loss(),
        "learning_rate": run.schedule(state.updates - (0 if step.skipped else 1)),
        "grad_norm": None if step.skipped or step.grad_norm is None else float(step.grad_norm),
        "consumed_tokens": state.consumed_tokens,
        "consumed_samples": state.consumed_samples,
        "tokens_per_second": rate,
        "memory_gib": memory_gib(run.engine.device),
    }
    if run.peak_flops is not None:
        metrics["mfu"] = rate * run.flops_per_token / (run.layout.world_size * run.peak_flops)
    if run.engine.loss_scaler:
        metrics["loss_scale"] = run.engine.loss_scaler["cur_scale"]
        metrics["skipped_iterations"] = state.skipped_iterations
    return metrics


def _evaluations_due(run: Run) -> list[str]:
    """The sets that are evaluated at this iteration."""
    iteration, at_end = run.state.iteration, run.state.iteration == run.last_iteration
    is_valid = iteration <= run.last_iteration and iteration % run.config.training.eval_interval == 0
    return [*(["valid"] if is_valid or at_end else []), *(["test"] if at_end else [])]


def _make_up_evaluations(run: Run, stop: StopRequest) -> bool:
    """Evaluate what was due at the checkpoint, where the run ended between saving it and that: its metrics tell.

    Returns: false when a request to stop ended it before its last batch.
    """
    for split in _evaluations_due(run) if run.resumed and run.state.iteration else ():
        has_it = run.metrics.holds(f"{split}_{run.task.loss_name}", run.state.iteration)
        if run.engine.any_rank(run.layout.rank == 0 and not has_it) and not _evaluate(run, split, stop):
            return False
    return True


class _UntilStopped:
    """Batches of an evaluation until one rank is asked to stop; then `stopped` is true on all of them."""

    def __init__(self, run: Run, stop: StopRequest, batches: Iterator[Any]) -> None:
        self._run, self._stop, self._batches, self.stopped = run, stop, batches, False

    def __iter__(self) -> Iterator[Any]:
        for batch in self._batches:
            self.stopped = self._run.engine.any_rank(self._stop.requested)
            if self.stopped:
                return
            yield batch


def _evaluate(run: Run, split: str, stop: StopRequest) -> bool:
    """Metrics of the validation or test set, on the same samples every time.

    Returns: false when a request to stop ended it before its last batch; then nothing is logged.
    """
    dataset = getattr(run.datasets, split)
    if dataset is None or run.config.training.eval_iters == 0:
        return True
    batches = _UntilStopped(run, stop, run.evaluation_batches(dataset))
    sums = run.engine.evaluate(batches)
    if batches.stopped:
        return False
    run.metrics.log(
        {
            "iteration": run.state.iteration,
            **run.task.metrics(split, sums),
            "consumed_tokens": run.state.consumed_tokens,
        }
    )
    run.throughput.skip()
    return True


def shut_down() -> None:
    """Leave the process group so that no communication thread outlives the interpreter."""
    leave_world()
