"""A branch of a run: from one of its checkpoints a run of its own that lets the learning rate decay at once, and ends.

The run that it comes from, the trunk, keeps its rate and goes on; nothing of it is written to.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from megatron.checkpoint.new_folder import new_folder, require_new
from megatron.config.checks import find_training_mistakes
from megatron.config.load import resolve_config
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import TOWER_KEYS
from megatron.config.sections.optimization import OptimizationConfig, WsdDecayStyle
from megatron.errors import UserError
from megatron.exchange import Checkpoint, canonical, open_checkpoint
from megatron.growth.schedule import GrowthSchedule, past_growths
from megatron.training.schedule import LRSchedule
from megatron.training.state import TrainState

CONFIG_FILE = "config.yml"
"""In the folder of a branch: its configuration."""


@dataclass(frozen=True)
class Decay:
    """How a branch's learning rate goes down."""

    iters: int
    """Iterations, and so many the branch trains."""
    style: WsdDecayStyle | None = None
    """Shape; default lr_wsd_decay_style of the trunk."""
    min_lr: float | None = None
    """Learning rate at the end; default that of the trunk."""


def branch_run(
    source: str | Path,
    target: str | Path,
    decay: Decay,
    *,
    iteration: int | None = None,
    environment: Mapping[str, Any] | None = None,
) -> RunConfig:
    """Write the folder of a branch: a checkpoint of the trunk, and the configuration that trains on from it.

    The branch's rate is that of the trunk at this checkpoint, decays from the next update on, and reaches min_lr with
    the last. It makes no further growths; folders of logs are its own. Written completely or not at all.

    Args:
        source: the trunk's folder, or one of its checkpoints.
        target: folder of the branch; must not exist or be empty.
        iteration: which of the trunk's checkpoints; default the latest.
        environment: to be recorded beside the checkpoint.

    Returns: the configuration, which is also written to CONFIG_FILE in `target`. Raises: UserError for a checkpoint
        that is damaged or cannot be trained on, and where there is no rate that could decay.
    """
    require_new(Path(target))
    if decay.iters < 1:
        raise UserError(f"--decay-iters: {decay.iters} is no number of iterations; give 1 or more")
    if decay.min_lr is not None and not 0 <= decay.min_lr < math.inf:
        raise UserError(f"--min-lr: {decay.min_lr:g} is no learning rate; give 0 or more")
    base = open_checkpoint(source, iteration=iteration, key="IN")
    if base.iteration is None:
        raise UserError(f"IN: {base.folder} is no training checkpoint; a branch goes on from a run")
    trunk = resolve_config([], base.resolved()).config
    if trunk.checkpoint.no_save_optim and base.iteration:
        raise UserError(f"IN: {base.folder} has no optimizer state (no_save_optim); a branch goes on with it")
    base.verify()
    state = TrainState()
    state.load_state_dict(base.train_state)
    config = _config_of_branch(trunk, _options(base, trunk, state, decay), Path(target), base.iteration + decay.iters)
    for mistake in find_training_mistakes(config):
        raise mistake
    state.lineage, state.rollbacks, state.restarts = past_growths(state.lineage), [], 0
    _write(Path(target), replace(base, settings=config.flat(), train_state=state.state_dict()), config, environment)
    return config


def _options(base: Checkpoint, trunk: RunConfig, state: TrainState, decay: Decay) -> OptimizationConfig:
    """The branch's optimization settings: WSD from the rate that the trunk has here."""
    update = trunk.update_size(_data_ranks(base, trunk))
    growths = GrowthSchedule(trunk.scaling, trunk.last_iteration, update.tokens)
    options, since = growths.learning_rate(trunk.optimization, state)
    rate, peak = LRSchedule(trunk.replaced(optimization=options), since)(state.updates), options.optimizer.params.lr
    floor = options.min_lr if decay.min_lr is None else decay.min_lr
    if rate <= floor:
        raise UserError(
            f"IN: the learning rate at iteration {state.iteration} of {base.folder} is {rate:g}, which is not above "
            f"min_lr {floor:g}; branch where it is, or lower --min-lr"
        )
    return options.replaced(
        **{"optimizer.params.lr": peak if math.isclose(rate, peak, rel_tol=1e-12) else rate},
        min_lr=floor,
        lr_decay_style="WSD",
        lr_decay_iters=state.updates + decay.iters,
        lr_wsd_decay_style=decay.style or options.lr_wsd_decay_style,
        lr_wsd_decay_iters=decay.iters,
        lr_warmup_iters=0,
    )


def _data_ranks(base: Checkpoint, trunk: RunConfig) -> int:
    """Data ranks of the processes that saved a checkpoint, as their random-number states tell."""
    ranks = {name.partition("/")[0] for name in base.tensors.names("rng")}
    return max(1, len(ranks) // (trunk.parallel.model_parallel_size * trunk.parallel.pipeline_stages))


def _config_of_branch(trunk: RunConfig, options: OptimizationConfig, folder: Path, last: int) -> RunConfig:
    logging = trunk.logging
    folders = {key: str(folder / key.removesuffix("_dir")) for key in ("log_dir", "tensorboard_dir")}
    own = {f"logging.{key}": path for key, path in folders.items() if getattr(logging, key)}
    start = {"iteration": None, "pretrain_partial_init": None, "finetune": False}
    start |= dict.fromkeys(TOWER_KEYS)
    start |= {"no_load_optim": False, "no_load_rng": False}
    return trunk.replaced(
        optimization=options,
        scaling=trunk.scaling.replaced(growth=[], partial_init_policy="restart"),
        training=trunk.training.replaced(train_iters=last, exit_interval=None),
        checkpoint=trunk.checkpoint.replaced(save=str(folder), load=str(folder), **start),
        **own,
        **{"logging.profile": None},
    )


def _write(target: Path, checkpoint: Checkpoint, config: RunConfig, environment: Mapping[str, Any] | None) -> None:
    with new_folder(target) as folder:
        canonical.write(folder, checkpoint, environment)
        text = yaml.safe_dump(config.flat(), sort_keys=False)
        (folder / CONFIG_FILE).write_text(
            f"# A branch of {checkpoint.folder}: python deepy.py train.py {target / CONFIG_FILE}\n{text}",
            encoding="utf-8",
        )
