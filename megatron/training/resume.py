"""Which checkpoint a run goes on from: the newest whole one, or the one that `iteration` names.

The first process decides, for it is the one that reads every file, and tells the others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from megatron.checkpoint.state import MANIFEST, folder_iteration, folder_name
from megatron.checkpoint.store import (
    checkpoint_folder,
    find_checkpoint,
    latest_name,
    list_iterations,
    set_aside,
    set_latest,
)
from megatron.config.checks import broken_promises
from megatron.config.schema import RunConfig
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.mpu.processes import first_rank_does
from megatron.training.soundness import require_sound


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    rollbacks: the iterations that the run was rolled back to so far, this start included.
    """

    checkpoint: Checkpoint
    rollbacks: list[int]


@dataclass(frozen=True)
class _Choice:
    """What to go on from, before it is opened: a folder that has been looked through."""

    folder: Path
    iteration: int
    rollbacks: list[int]


def open_for_resume(config: RunConfig, layout: Layout) -> Resumption | None:
    """The checkpoint a run continues from; None when `load` is unset, missing or empty: it then starts from scratch.

    Damaged ones are passed over, in favour of the newest one before them that is whole, unless `strict_load` or
    `iteration` forbids it. In the run's own folder they are set aside.

    Collective. Raises: UserError, on every rank, when there are checkpoints and none can be used.
    """
    options = config.checkpoint
    if options.load is None:
        _refuse_broken_promise(options, "load is not given")
        return None
    chosen = first_rank_does(lambda: _choose(options, Path(options.load or "")), layout)
    told = [chosen]
    if layout.world_size > 1:
        dist.broadcast_object_list(told, src=0)
    found = told[0]
    if found is None:
        _refuse_broken_promise(options, f"load: {options.load} has none")
        base = options.pretrain_partial_init
        get_logger().info("no checkpoint in %s: starting from %s", options.load, base or "scratch")
        return None
    return Resumption(open_checkpoint(found.folder), found.rollbacks)


def _refuse_broken_promise(options: CheckpointConfig, missing: str) -> None:
    for mistake in broken_promises(options, missing):
        raise mistake


def _choose(options: CheckpointConfig, root: Path) -> _Choice | None:
    """What to go on from, looked through; None where there is no checkpoint at all."""
    if root.exists() and not root.is_dir():
        raise UserError(f"load: {root} is a file; give the folder of the run's checkpoints")
    if options.iteration is not None:
        return _rolled_back(options, root, options.iteration)
    if (root / MANIFEST).is_file():
        return _whole(root)
    name, known = latest_name(root), list_iterations(root)
    if not known and name is None:
        if root.is_dir() and any(root.glob("global_step*")):
            raise UserError(f"load: {root} has global_step folders, but no complete checkpoint; name another folder")
        return None
    newest = folder_iteration(name or "")
    if newest is None:
        missing = f"{root / 'latest'} " + ("is missing" if name is None else "does not name a checkpoint")
        return _newest_whole(options, root, known[::-1], missing)
    if checkpoint_folder(root, newest) is None:
        return _newest_whole(
            options, root, _others(known, newest), f"{root / folder_name(newest)} is not a complete checkpoint"
        )
    return _newest_whole(options, root, [newest, *_others(known, newest)])


def _whole(folder: Path) -> _Choice:
    """A checkpoint that has been looked through. Raises DamagedCheckpoint."""
    reader = CheckpointReader(folder, verify=False)
    require_sound(reader)
    return _Choice(folder, reader.iteration, list(reader.train_state.get("rollbacks", [])))


def _others(known: Sequence[int], newest: int) -> list[int]:
    """The other iterations in the order in which they can take its place: the last one before it first."""
    return [*(i for i in reversed(known) if i < newest), *(i for i in known if i > newest)]


def _newest_whole(
    options: CheckpointConfig, root: Path, candidates: Sequence[int], missing: str | None = None
) -> _Choice:
    """The first of the candidates that is whole.

    Args:
        candidates: iterations, in order.
        missing: what was to be loaded and is not there.

    Raises: UserError when there is none, or another one is needed than strict_load allows.
    """
    faults = [f"load: {missing}"] if missing else []
    damaged: list[Path] = []
    for folder in _same_run(root, candidates, has_head=missing is None):
        if faults and options.strict_load:
            break
        try:
            found = _whole(folder)
        except DamagedCheckpoint as error:
            faults.append(error.fault)
            damaged.append(folder)
            continue
        if faults:
            found = replace(found, rollbacks=_log_of_rollbacks(root, list_iterations(root)))
            _pass_over(options, root, faults, damaged, folder)
        return found
    known = ", ".join(map(str, list_iterations(root))) or "none"
    if options.strict_load:
        advice = "name one with `iteration`, or go on from the newest whole one with strict_load: false"
    else:
        advice = "no other one is whole; bring one back from a copy, or name another folder"
    raise UserError(f"{'; '.join(faults)}; iterations found there: {known}; {advice}")


def _pass_over(options: CheckpointConfig, root: Path, faults: list[str], damaged: list[Path], chosen: Path) -> None:
    """Warn of what is not used. In the folder that the run saves to, set it aside and point `latest` at the chosen."""
    moves = ""
    if options.save is not None and not options.finetune and Path(options.save).resolve() == root.resolve():
        targets = [(folder, set_aside(folder)) for folder in damaged]
        moves = "".join(f"; {folder.name} is renamed to {target.name}" for folder, target in targets if target)
        iteration = folder_iteration(chosen.name)
        with contextlib.suppress(OSError):  # if that cannot be written, the run finds its way again next time
            if iteration is not None:
                set_latest(root, iteration)
    get_logger().warning("%s; going on from %s, the newest whole checkpoint%s", "; ".join(faults), chosen, moves)


def _same_run(root: Path, candidates: Sequence[int], has_head: bool) -> Iterator[Path]:
    """The folders of the candidates, without those that a rollback has left behind.

    A run that was rolled back to 4 while it had 6 goes on with 5, and 6 is none of its checkpoints any more.
    """
    folders = {iteration: checkpoint_folder(root, iteration) for iteration in candidates}
    if has_head and (head := folders[candidates[0]]):
        yield head
    log = _log_of_rollbacks(root, candidates)
    for iteration in candidates[1:] if has_head else candidates:
        mine, folder = _rollbacks(root, iteration), folders[iteration]
        if folder and (mine is None or iteration <= min(log[len(mine) :], default=iteration)):
            yield folder


def _log_of_rollbacks(root: Path, iterations: Sequence[int]) -> list[int]:
    """The iterations that a folder's run was rolled back to. Each checkpoint has the log up to its time."""
    return max((_rollbacks(root, iteration) or [] for iteration in iterations), key=len, default=[])


def _rollbacks(root: Path, iteration: int) -> list[int] | None:
    """The log in a checkpoint's train state; None where it cannot be read."""
    folder = checkpoint_folder(root, iteration)
    try:
        return list(CheckpointReader(folder, verify=False).train_state.get("rollbacks", [])) if folder else None
    except UserError:
        return None


def _rolled_back(options: CheckpointConfig, root: Path, iteration: int) -> _Choice | None:
    """The checkpoint of `iteration`, None where there are none; once a run from it has saved, the newest of that run.

    A command that is run again and again, as a requeued job is, then does not start at `iteration` for ever.
    """
    known = list_iterations(root)
    if not known and not (root / MANIFEST).is_file():
        return None  # the caller says that there is nothing to start from
    log = _log_of_rollbacks(root, known)
    own = [i for i in reversed(known) if log[-1:] == [iteration] and _rollbacks(root, i) == log]
    if own and not options.finetune:
        found = _newest_whole(options, root, [*own, *([] if iteration in own else [iteration])])
        if found.iteration in own:
            get_logger().info(
                "iteration: %d is where this run was rolled back to; going on from what it has saved since, %s",
                iteration, found.folder,
            )  # fmt: skip
        return found
    folder = find_checkpoint(root, iteration)
    assert folder is not None, "find_checkpoint raises where there is none"
    return replace(_whole(folder), rollbacks=[*log, iteration])
