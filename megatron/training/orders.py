"""Building the sample orders of a run before it starts, so that no GPU waits for them."""

from __future__ import annotations

import time

from megatron.config.schema import RunConfig
from megatron.data.datasets import stored_orders
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu.layout import SINGLE, Layout
from megatron.tasks import build_task
from megatron.training.data import RunData
from megatron.training.resume import open_for_resume
from megatron.training.state import TrainState


def build_orders(config: RunConfig, processes: int | None = None) -> None:
    """Write the files of sample order that a run would write at its start; what is there already stays.

    Where `load` has a checkpoint, they are those that the run needs from there on.

    Args:
        processes: of the run, which decide the samples of an update; default those that num_gpus and num_nodes ask
            for, else 1.

    Raises: UserError for data, keys or a checkpoint that the run would refuse, and for processes that do not fit.
    """
    number = processes or (config.launch.num_gpus or 1) * max(1, config.launch.num_nodes)
    parallel = config.parallel
    try:
        layout = Layout.for_world(0, number, parallel.pipeline_stages, parallel.model_parallel_size)
    except ValueError as error:
        raise UserError(f"--processes: {error}") from None
    task, state, begin = build_task(config), TrainState(), time.monotonic()
    update = config.update_size(layout.data.size)
    # Without `save` nothing that is damaged there is set aside: this only looks.
    resumption = open_for_resume(config.checkpoint.replaced(save=None), SINGLE)
    if resumption is not None and not config.checkpoint.finetune:
        state.load_state_dict(resumption.checkpoint.train_state)
    length, iterations = update.tokens // update.samples, config.last_iteration
    get_logger().info(
        "%d processes: %d samples x %d tokens an update, from iteration %d to %d",
        number, update.samples, length, state.iteration, iterations,
    )  # fmt: skip
    sets = RunData(task, state, update, layout.data).sets
    for name in ("train", "valid", "test"):
        dataset = getattr(sets, name)
        if dataset is not None:
            files = stored_orders(dataset)
            kept = f"its order is in {files} parts on disk" if files else "its order is built in memory in a moment"
            get_logger().info("%s: %s samples, %s", name, f"{len(dataset):,}", kept)
    get_logger().info("done in %.1f s", time.monotonic() - begin)
