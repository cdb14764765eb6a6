"""Which checkpoint a run goes on from: the newest whole one, or the one that `iteration` names.

The first process decides, from the records; then each looks through some of the files that were chosen. If they are
damaged, the first one chooses again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from megatron.checkpoint.reader import CheckpointReader, DamagedCheckpoint
from megatron.checkpoint.state import MANIFEST, folder_iteration, folder_name
from megatron.checkpoint.store import RunFolder, set_aside
from megatron.config.checks import broken_promises
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import UserError
from megatron.exchange import Checkpoint, open_checkpoint
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.mpu.collectives import object_from_first_rank
from megatron.mpu.processes import first_rank_does
from megatron.training.soundness import require_consistent, verify_together


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on.

    rollbacks: the iterations that the run was rolled back to so far, this start included.
    """

    checkpoint: Checkpoint
    rollbacks: list[int]


def open_for_resume(options: CheckpointConfig, layout: Layout) -> Resumption | None:
    """The checkpoint a run continues from; None when `load` is unset, missing or empty: it then starts from scratch.

    Damaged ones are passed over, in favour of the newest one before them that is whole, unless `strict_load` or
    `iteration` forbids it. In the run's own folder they are set aside.

    Collective. Raises: UserError, on every rank, when there are checkpoints and none can be used.
    """
    chosen, missing = None, "load is not given"
    if options.load is not None:
        search = _Search(options, RunFolder(options.load))
        chosen, missing = search.agree(layout), f"load: {options.load} has none"
    if chosen is not None:
        return Resumption(open_checkpoint(chosen.folder), chosen.rollbacks)
    for mistake in broken_promises(options, missing):
        raise mistake
    if options.load is not None:
        bases = [options.pretrain_partial_init, options.pretrain_image_tower, options.pretrain_text_tower]
        named = " and ".join(filter(None, bases))
        get_logger().info("no checkpoint in %s: starting from %s", options.load, named or "scratch")
    return None


@dataclass(frozen=True)
class _Choice:
    """What to go on from, before it is opened: a folder that has been looked through."""

    folder: Path
    iteration: int
    rollbacks: list[int]
    faults: tuple[str, ...] = ()
    """Why it is not the latest one."""
    damaged: tuple[Path, ...] = ()
    """The folders that are passed over because of these."""


@dataclass(frozen=True)
class _Search:
    """The search for what to go on from in `found`, the folder that `load` names."""

    options: CheckpointConfig
    found: RunFolder
    damage: dict[Path, DamagedCheckpoint] = field(default_factory=dict)
    """Folders whose files turned out not to be what was saved."""

    def agree(self, layout: Layout) -> _Choice | None:
        """What to go on from, looked through; None where there is no checkpoint at all. Collective."""
        while chosen := object_from_first_rank(first_rank_does(self.choose, layout), layout.world):
            try:
                verify_together(partial(CheckpointReader, chosen.folder, verify=False), layout)
                break
            except DamagedCheckpoint as error:
                self.damage[chosen.folder] = error
        if chosen is not None:
            first_rank_does(partial(self.settle, chosen), layout)
        return chosen

    def choose(self) -> _Choice | None:
        """What to go on from, if its files are whole; None where there is no checkpoint at all."""
        root = self.found.path
        if root.exists() and not root.is_dir():
            raise UserError(f"load: {root} is a file; give the folder of the run's checkpoints")
        if self.options.iteration is not None:
            return self._rolled_back(self.options.iteration)
        if (root / MANIFEST).is_file():
            return self._whole(root)
        name, known = self.found.latest_name(), self.found.iterations()
        if not known and name is None:
            if root.is_dir() and any(root.glob("global_step*")):
                raise UserError(
                    f"load: {root} has global_step folders, but no complete checkpoint; name another folder"
                )
            return None
        newest = folder_iteration(name or "")
        if newest is None:
            missing = f"{root / 'latest'} " + ("is missing" if name is None else "does not name a checkpoint")
            return self._newest_whole(known[::-1], missing)
        # The other iterations in the order in which they can take its place: the last one before it first.
        others = [*(i for i in reversed(known) if i < newest), *(i for i in known if i > newest)]
        if self.found.checkpoint(newest) is None:
            return self._newest_whole(others, f"{root / folder_name(newest)} is not a complete checkpoint")
        return self._newest_whole([newest, *others])

    def _newest_whole(self, candidates: Sequence[int], missing: str | None = None) -> _Choice:
        """The first of the candidates that is whole.

        Args:
            candidates: iterations, in order.
            missing: what was to be loaded and is not there.

        Raises: UserError when there is none, or another one is needed than strict_load allows.
        """
        faults = [f"load: {missing}"] if missing else []
        damaged: list[Path] = []
        for folder in self.found.of_same_run(candidates, has_head=missing is None):
            if faults and self.options.strict_load:
                break
            try:
                choice = self._whole(folder)
            except DamagedCheckpoint as error:
                faults.append(error.fault)
                damaged.append(folder)
                continue
            if faults:
                log = self.found.rollback_log()
                choice = replace(choice, rollbacks=log, faults=tuple(faults), damaged=tuple(damaged))
            return choice
        if self.options.strict_load:
            advice = "name one with `iteration`, or go on from the newest whole one with strict_load: false"
        else:
            advice = "no other one is whole; bring one back from a copy, or name another folder"
        raise UserError(f"{'; '.join(faults)}; iterations found there: {self.found.described()}; {advice}")

    def settle(self, choice: _Choice) -> None:
        """Warn of what is not used. In the run's own folder, set it aside and point `latest` at the chosen one."""
        if not choice.faults:
            return
        moves, save = "", None if self.options.finetune else self.options.save
        if save is not None and Path(save).resolve() == self.found.path.resolve():
            targets = [(folder, set_aside(folder)) for folder in choice.damaged]
            moves = "".join(f"; {folder.name} is renamed to {target.name}" for folder, target in targets if target)
            iteration = folder_iteration(choice.folder.name)
            with contextlib.suppress(OSError):  # if that cannot be written, the run finds its way again next time
                if iteration is not None:
                    self.found.set_latest(iteration)
        get_logger().warning(
            "%s; going on from %s, the newest whole checkpoint%s", "; ".join(choice.faults), choice.folder, moves
        )

    def _rolled_back(self, iteration: int) -> _Choice | None:
        """The checkpoint of `iteration`, None where there are none; once a run from it has saved, the newest of that.

        A command that is run again and again, as a requeued job is, then does not start at `iteration` for ever.
        """
        known = self.found.iterations()
        if not known and not (self.found.path / MANIFEST).is_file():
            return None  # the caller says that there is nothing to start from
        log = self.found.rollback_log(known)
        own = [i for i in reversed(known) if log[-1:] == [iteration] and self.found.rollbacks(i) == log]
        if own and not self.options.finetune:
            choice = self._newest_whole([*own, *([] if iteration in own else [iteration])])
            if choice.iteration in own:
                get_logger().info(
                    "iteration: %d is where this run was rolled back to; going on from what it has saved since, %s",
                    iteration, choice.folder,
                )  # fmt: skip
            return choice
        folder = self.found.find(iteration)
        assert folder is not None, "find raises where there is none"
        return replace(self._whole(folder), rollbacks=[*log, iteration])

    def _whole(self, folder: Path) -> _Choice:
        """A checkpoint that is whole, as far as its records tell. Raises DamagedCheckpoint."""
        if folder in self.damage:
            raise self.damage[folder]
        reader = CheckpointReader(folder, verify=False)
        require_consistent(reader)
        return _Choice(folder, reader.iteration, list(reader.train_state.get("rollbacks", [])))
