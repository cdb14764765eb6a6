"""One save of all ranks: each writes its part, the first publishes the checkpoint, and all learn what became of it."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass

from megatron.checkpoint.state import CanonicalState, folder_name
from megatron.checkpoint.store import BadValues, Part, RunFolder
from megatron.config.sections.checkpoint import CheckpointConfig
from megatron.errors import UserError
from megatron.log import get_logger
from megatron.mpu import Layout
from megatron.mpu.mail import Mail

_saves = itertools.count()


@dataclass(frozen=True)
class SaveResult:
    """What became of a save, the same on all ranks."""

    failure: str | None = None
    """Why there is no checkpoint, for the user."""
    is_fatal: bool = False
    """Another save would fail just as well: it is the values that are wrong."""


def save_together(
    folder: RunFolder, state: CanonicalState, layout: Layout, transient: bool, options: CheckpointConfig
) -> SaveResult:
    """Write this rank's part of a checkpoint, and wait until the first rank has published it. On all ranks."""
    if layout.world_size == 1:
        result = _as_result(lambda: _publish(folder, state, [folder.write_part(state)], transient, options))
        if result.failure:
            folder.discard(state.iteration)
        return result
    mail = Mail(f"save/{next(_saves)}", layout)
    parts: list[Part] = []
    result = _as_result(lambda: parts.append(folder.write_part(state, layout.rank)))
    mail.send(json.dumps({"result": asdict(result), "part": asdict(parts[0]) if parts else None}))
    if layout.rank:
        return SaveResult(**json.loads(mail.wait_for_answer()))
    letters = [json.loads(letter) for letter in mail.collect()]
    results = [SaveResult(**letter["result"]) for letter in letters]
    if failed := next((found for found in results if found.failure), None):
        result = failed
    else:
        parts = [Part(**letter["part"]) for letter in letters]
        result = _as_result(lambda: _publish(folder, state, parts, transient, options))
    if result.failure:
        folder.discard(state.iteration)
    mail.answer(json.dumps(asdict(result)))
    return result


def _as_result(work: Callable[[], object]) -> SaveResult:
    try:
        work()
    except UserError as error:
        return SaveResult(str(error), is_fatal=isinstance(error, BadValues))
    except Exception as error:  # a thread's traceback would be all that is left of it
        get_logger().exception("save: a checkpoint is not written")
        return SaveResult(f"save: {type(error).__name__}: {error}", is_fatal=True)
    return SaveResult()


def _publish(
    folder: RunFolder, state: CanonicalState, parts: list[Part], transient: bool, options: CheckpointConfig
) -> None:
    """Publish a checkpoint and remove those that are no longer kept."""
    folder.publish(state, parts, transient)
    get_logger().info("saved checkpoint %s", folder.path / folder_name(state.iteration))
    if options.keep_last_n_checkpoints or options.non_persistent_save_interval:
        try:
            folder.remove_old(options.keep_last_n_checkpoints, options.extra_save_iters or ())
        except OSError as error:
            get_logger().warning("keep_last_n_checkpoints: %s; an old checkpoint stays", error)


def in_thread(work: Callable[[], SaveResult]) -> Future[SaveResult]:
    """Work begun in a thread of its own, which does not keep the process from ending."""
    future: Future[SaveResult] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name="save").start()
    return future
