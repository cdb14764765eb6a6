"""The training loop."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from megatron.config.schema import RunConfig
from megatron.log import get_logger
from megatron.mpu.processes import leave
from megatron.training.checkpointing import save, should_save
from megatron.training.engine import StepResult
from megatron.training.hardware import memory_gib
from megatron.training.metrics import Metrics
from megatron.training.run import Run, start_run
from megatron.training.signals import StopRequest
from megatron.training.state import TrainState


def train(config: RunConfig) -> TrainState:
    """Train as configured, from the checkpoint in `load` if there is one; returns the state at the end.

    Stops early, after saving, on SIGTERM, SIGINT or SIGUSR1 and at exit_interval. Raises UserError for what a user can
    mend: data, checkpoint, configuration, a loss that is not finite.
    """
    run = start_run(config)
    with StopRequest() as stop:
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
    keys = {"load": config.checkpoint.save, "iteration": None, "finetune": False}
    keys |= {"no_load_optim": False, "no_load_rng": False}
    return config.model_copy(update={"checkpoint": config.checkpoint.model_copy(update=keys)})


def _train_until_done(run: Run, stop: StopRequest) -> bool:
    """Train to the end, a request to stop, or the next growth; true when it is time to grow."""
    state, batches = run.state, run.training_batches()
    if state.iteration >= run.last_iteration:
        get_logger().info("iteration %d of train_iters %d is reached already", state.iteration, run.last_iteration)
        return False
    if state.iteration == 0:
        _save_if_due(run)
    while state.iteration < run.last_iteration:
        step = _iterate(run, batches)
        if state.iteration % run.config.logging.log_interval == 0:
            run.metrics.log(_training_metrics(run, step))
        stopping = run.engine.any_rank(stop.requested) or _exit_due(run)
        grows = run.growth_is_due()
        _save_if_due(run, force=stopping or grows or state.iteration == run.last_iteration)
        if stopping:
            reason = "exit_interval" if _exit_due(run) else stop.name or "a signal to another process"
            get_logger().info("stopped at iteration %d (%s)", state.iteration, reason)
            return False
        if state.iteration % run.config.training.eval_interval == 0 or state.iteration == run.last_iteration:
            _evaluate(run, "valid")
        if grows:
            return True
    _evaluate(run, "test")
    return False


def _iterate(run: Run, batches: Iterator[list[Tensor]]) -> StepResult:
    """One update, counted."""
    micro_batches = next(batches)
    step = run.engine.train_step(micro_batches, run.schedule(run.state.updates))
    run.add_loss(step.loss)
    run.state.advance(run.global_batch, run.config.model.seq_length, step.skipped)
    run.throughput.add(run.global_batch * run.config.model.seq_length)
    return step


def _exit_due(run: Run) -> bool:
    interval = run.config.training.exit_interval
    return interval is not None and run.state.iteration % interval == 0 and run.state.iteration < run.last_iteration


def _save_if_due(run: Run, force: bool = False) -> None:
    options = run.config.checkpoint
    if options.save is not None and (force or should_save(options, run.state.iteration)):
        save(run.config, run.engine, run.state)
        run.throughput.skip()


def _training_metrics(run: Run, step: StepResult) -> Metrics:
    """The metrics of a log line; `learning_rate` is the one this iteration's update used."""
    state, rate = run.state, run.throughput.take()
    metrics: Metrics = {
        "iteration": state.iteration,
        "lm_loss": run.take_mean_loss(),
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


def _evaluate(run: Run, split: str) -> None:
    """Loss on the first eval_iters batches of the validation or test set, the same ones every time."""
    dataset = getattr(run.datasets, split)
    if dataset is None or run.config.training.eval_iters == 0:
        return
    loss = run.engine.evaluate(run.evaluation_batches(dataset))
    run.metrics.log(
        {
            "iteration": run.state.iteration,
            f"{split}_lm_loss": loss,
            f"{split}_perplexity": math.exp(min(loss, 80.0)),
            "consumed_tokens": run.state.consumed_tokens,
        }
    )
    run.throughput.skip()


def shut_down() -> None:
    """Leave the process group so that no communication thread outlives the interpreter."""
    leave()
