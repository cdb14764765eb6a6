"""Faults that a rank of a real run meets: each is installed in its process before `train.py` starts."""

from __future__ import annotations

import itertools
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.damage import damaged


@dataclass(frozen=True)
class Fault:
    """What happens to one rank."""

    kind: str
    """One of KINDS."""
    rank: int
    """The rank that it happens to."""
    at: int
    """It happens after so many updates, or so many KiB of checkpoints, of a start."""

    def install(self, rank: int) -> None:
        """In the process of `rank`: have it happen there if it is the one."""
        if rank == self.rank:
            _INSTALL[self.kind](self.at)


def _before_update(number: int, action: Callable[[], object]) -> None:
    from megatron.training.loop import Trainer

    iterate, updates = Trainer._iterate, itertools.count()

    def struck(trainer: Any, batches: Any) -> Any:
        if next(updates) == number:
            action()
        return iterate(trainer, batches)

    Trainer._iterate = struck  # type: ignore[method-assign]


def _kill(at: int) -> None:
    _before_update(at, lambda: os.kill(os.getpid(), signal.SIGKILL))


def _stop(at: int) -> None:
    _before_update(at, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def _raise(at: int) -> None:
    def fault() -> None:
        raise RuntimeError("a fault of the test")

    _before_update(at, fault)


def _not_a_number(at: int) -> None:
    from megatron.engine.single_stage import SingleStageEngine

    reduced = SingleStageEngine._reduced
    updates = []

    def broken(engine: Any, batch: Any, of_outputs: Any) -> Any:
        loss = reduced(engine, batch, of_outputs)
        updates.append(loss)
        return loss * float("nan") if len(updates) == at + 1 else loss

    SingleStageEngine._reduced = broken  # type: ignore[method-assign]


def _on_writing(after_kib: int, action: Callable[[Any, Any], Any], times: int = 1) -> None:
    """Call `action(file, content)` in the place of a write, once so much has been written of checkpoints."""
    from megatron.checkpoint.writer import HashedFile

    write, written, left = HashedFile.write, [0], [times]

    def struck(file: Any, content: Any, *check: Any) -> None:
        written[0] += len(content)
        if written[0] > after_kib * 1024 and left[0]:
            left[0] -= 1
            action(file, content)
        write(file, content, *check)

    HashedFile.write = struck  # type: ignore[method-assign]


def _torn_write(after_kib: int) -> None:
    def tear(file: Any, content: Any) -> None:
        file._file.write(bytes(content)[: len(content) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    _on_writing(after_kib, tear)


def _full_disk(after_kib: int) -> None:
    def refuse(file: Any, content: Any) -> None:
        raise OSError(28, "No space left on device")

    _on_writing(after_kib, refuse)


def _slow_disk(after_kib: int) -> None:
    _on_writing(after_kib, lambda file, content: time.sleep(0.3), times=8)


_INSTALL: dict[str, Callable[[int], None]] = {
    "kill": _kill, "stop": _stop, "error": _raise, "nan": _not_a_number, "torn write": _torn_write,
    "full disk": _full_disk, "slow disk": _slow_disk, "none": lambda at: None,
}  # fmt: skip
KINDS = tuple(kind for kind in _INSTALL if kind != "none")


def draw_fault(kind: str, world: int, saved: int, last: int, kib: int, draw: random.Random) -> Fault:
    """A fault of this kind that a start of a run meets, at a random rank and time.

    Args:
        saved, last: the iteration that the start goes on from, and the run's last one.
        kib: KiB that a rank writes in a checkpoint.
    """
    at = draw.randrange(2 * kib) if kind.endswith(("write", "disk")) else draw.randrange(last - saved)
    return Fault(kind, draw.randrange(world), at)


def damage_newest(folder: Path, draw: random.Random) -> str:
    """Damage a file of the newest checkpoint of a run; which one, "" where there is none."""
    checkpoints = sorted(folder.glob("global_step*"), key=lambda path: int(path.name.removeprefix("global_step")))
    if len(checkpoints) < 2:  # of one alone there is nothing to go back to
        return ""
    file = draw.choice(sorted(path for path in checkpoints[-1].iterdir() if path.stat().st_size))
    file.write_bytes(damaged(file.read_bytes(), draw))
    return f"{checkpoints[-1].name}/{file.name}"
